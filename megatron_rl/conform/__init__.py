"""Proof on the user's own machines that the parallel layout does not change the algorithm."""
