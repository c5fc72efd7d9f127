"""From a response to the reward that the advantage estimator sees."""
