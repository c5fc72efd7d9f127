"""Prove on the user's own machines that the parallel layout does not change the algorithm.

One frozen mini-batch goes through the run's layout and through a reference layout, and the results are compared.
"""
