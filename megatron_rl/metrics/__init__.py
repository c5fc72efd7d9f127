"""What a run reports: named sums over ranks, times, samples, and the files that hold them."""

from megatron_rl.metrics.collect import Metrics, Timers

__all__ = ["Metrics", "Timers"]
