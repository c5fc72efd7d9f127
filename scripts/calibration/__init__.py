"""The planner's constants: public measurements, the fit to them, and how far predictions are from what was measured."""
