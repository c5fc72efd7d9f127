"""What packing refuses, with the names of the rollouts at fault."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_rl.config import Config
from megatron_rl.types import Rollout

if TYPE_CHECKING:
    from megatron_rl.packing import Layout


def check_groups(rollouts: list[Rollout], config: Config) -> None:
    """Raises: ValueError unless the rollouts are the step's groups, by prompt and then by sample."""
    groups, samples = config.train.prompts_per_step, config.rollout.samples_per_prompt
    if len(rollouts) != groups * samples:
        raise ValueError(
            f"got {len(rollouts)} rollouts, expected {groups * samples} "
            f"(train.prompts_per_step={groups} * rollout.samples_per_prompt={samples})"
        )
    for start in range(0, len(rollouts), samples):
        group = rollouts[start : start + samples]
        order = [r.sample_index for r in group]
        if len({r.prompt_id for r in group}) > 1 or order != sorted(set(order)):
            raise ValueError(
                f"rollouts {start} to {start + samples - 1} are {listed([named(r) for r in group])}; expected "
                f"{samples} "
                "samples of one prompt with ascending sample_index: order the list by prompt, then sample"
            )


def check_rollouts(rollouts: list[Rollout], layout: Layout, *, may_be_masked: bool) -> None:
    """`may_be_masked`: overlong filtering may have cleared the loss_mask of a response that was cut.

    Raises: ValueError naming what cannot be packed.
    """
    faults = []
    for rollout in rollouts:
        length = len(rollout.token_ids)
        if rollout.loss_mask.shape != (length,) or rollout.rollout_logprobs.shape != (length,):
            faults.append(
                f"{named(rollout)}: token_ids, loss_mask and rollout_logprobs have {length}, "
                f"{len(rollout.loss_mask)} and "
                f"{len(rollout.rollout_logprobs)} entries; expected equal lengths"
            )
        elif length == 0:
            faults.append(f"{named(rollout)}: no tokens")
        elif not rollout.loss_mask.any() and not (may_be_masked and rollout.finish_reason == "length"):
            faults.append(f"{named(rollout)}: the response has length 0 (loss_mask is False everywhere)")
        elif rollout.loss_mask[0]:
            faults.append(
                f"{named(rollout)}: the response starts at token 0; no position predicts it, so give a prompt"
            )
        elif layout.padded(length) > layout.capacity:
            faults.append(
                f"{named(rollout)}: {layout.padded(length)} tokens exceed micro_batch_tokens={layout.budget} "
                f"(of which {layout.capacity} are usable with lengths padded to a multiple of {layout.pad_multiple})"
            )
        elif length > layout.stride:
            faults.append(
                f"{named(rollout)}: {length} tokens exceed max_prompt_tokens + max_response_tokens = {layout.stride}"
            )
    if faults:
        raise ValueError("rollouts cannot be packed: " + listed(faults))


def named(rollout: Rollout) -> str:
    """How errors call a rollout."""
    return f"(prompt_id={rollout.prompt_id}, sample_index={rollout.sample_index})"


def listed(items: list[str], most: int = 8) -> str:
    """The first `most` of them, and how many are left."""
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")
