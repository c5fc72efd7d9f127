"""Pure mathematics: of tensors (advantages, covariance, losses), and of lengths (balance). Imports torch only."""
