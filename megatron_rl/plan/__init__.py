"""What a run will do, worked out from its config alone."""
