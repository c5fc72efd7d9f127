"""A run's step rehearsed by one process that stands for a rank: true shapes, lifetimes and collectives, no values."""
