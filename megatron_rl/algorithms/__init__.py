"""Pure mathematics on tensors: advantages, covariance, losses. Imports torch only."""
