"""Rollouts into packed micro-batches."""

from megatron_rl.packing.layout import Layout, shares_prompts
from megatron_rl.packing.pack import computed, pack, pack_supervised, packing_metrics

__all__ = ["Layout", "computed", "pack", "pack_supervised", "packing_metrics", "shares_prompts"]
