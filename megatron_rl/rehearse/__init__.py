"""A run's step on this machine before the cluster has one: what it costs, without weights and without a GPU."""
