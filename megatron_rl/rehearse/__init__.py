"""A run's step on this machine before the cluster has one, as one of its ranks: true shapes, lifetimes and collectives
without values (`run.py`), and the host's part at the true batch (`host.py`)."""
