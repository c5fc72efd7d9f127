"""Who computes which rollout, decided from lengths alone, and how the tokens come to that rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rl.algorithms.balance import Work, deal
from megatron_rl.packing.layout import Layout
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.types import Rollout

TOKENS = ("token_ids", "rollout_logprobs", "sampled", "routes")  # the fields of a rollout that grow with its length


@dataclass(frozen=True, slots=True)
class Deal:
    """The micro-batches of one mini-batch. Samples are known by their index in the step."""

    work: Work
    bins: list[list[list[int]]]  # of each data-parallel rank: the samples of its micro-batches


def deal_step(rollouts: list[Rollout], layout: Layout) -> list[Deal]:
    """Return the deal of each mini-batch, the same on every rank: it asks for lengths and not for tokens.

    `rollouts`: the step's full list, ordered by prompt then sample. Mini-batch j holds the j-th run of
    `prompts_per_minibatch` prompts. Every rank gets the same number of micro-batches per mini-batch, the smallest that
    longest-processing-time balancing fits into the token budget.

    Raises: ValueError, naming the rollouts, when the samples of a prompt are incomplete or out of order, a rollout is
    empty, has no response, or exceeds the budget or the configured lengths.
    """
    _check_order(rollouts, layout)
    check_rollouts(rollouts, layout)
    size = layout.samples_per_minibatch
    return [deal_samples(range(start, start + size), rollouts, layout) for start in range(0, len(rollouts), size)]


def deal_samples(members: range, rollouts: list[Rollout], layout: Layout) -> Deal:
    """Return the deal of the rollouts with the indices `members`, one mini-batch."""
    if layout.share_prompts:
        work = _shared_work(members, rollouts)
    else:
        work = Work({i: layout.padded(rollouts[i].lengths.total) for i in members})
    return Deal(work, deal(work, layout.capacity, layout.dp_size, count_multiple=layout.count_multiple))


def hand_out(rollouts: list[Rollout], deals: Sequence[Deal], layout: Layout, world: Reducer) -> list[Rollout]:
    """Return the rollouts with the tokens of all that this rank computes. A collective of all ranks.

    Each rank sends what it holds to the ranks that compute it, whatever their tensor-, context- and pipeline-parallel
    place, and receives its own alone: its share of the step.
    Raises: RuntimeError when no rank held the tokens of one.
    """
    shares = [[i for each in deals for chosen in each.bins[rank] for i in chosen] for rank in range(layout.dp_size)]
    held = [[(i, tokens_of(rollouts[i])) for i in share if rollouts[i].has_tokens] for share in shares]
    mine = shares[layout.dp_rank]
    brought = rollouts.copy()
    for part in world.exchange_objects([held[dp_rank] for dp_rank in layout.dp_ranks]):
        for i, tokens in part:
            brought[i] = rollouts[i].replace(**tokens)
    missing = [name_of(brought[i]) for i in mine if not brought[i].has_tokens]
    if missing:
        raise RuntimeError(f"no rank holds the tokens of {listed(missing)}; give each rollout's to one rank at least")
    return brought


def tokens_of(rollout: Rollout) -> dict[str, Any]:
    """Return the fields that travel to the rank that computes it."""
    return {name: getattr(rollout, name) for name in TOKENS}


def _shared_work(members: range, rollouts: list[Rollout]) -> Work:
    """Return the tokens that the predictions of a response need: all before its last, of which the samples of a prompt
    share the prompt. A sample that does not count needs none."""
    families = {i: rollouts[i].prompt_id for i in members if rollouts[i].counts}
    prefixes: dict[int, int] = {}
    for i, family in families.items():
        prefixes[family] = min(rollouts[i].lengths.prompt, prefixes.get(family, rollouts[i].lengths.prompt))
    return Work({i: rollouts[i].lengths.total - 1 if i in families else 0 for i in members}, families, prefixes)


def _check_order(rollouts: list[Rollout], layout: Layout) -> None:
    prompts, samples = layout.prompts_per_step, layout.samples_per_prompt
    if len(rollouts) != prompts * samples:
        raise ValueError(
            f"got {len(rollouts)} rollouts, expected {prompts * samples} "
            f"(train.prompts_per_step={prompts} * rollout.samples_per_prompt={samples})"
        )
    for start in range(0, len(rollouts), samples):
        siblings = rollouts[start : start + samples]
        order = [r.sample_index for r in siblings]
        if len({r.prompt_id for r in siblings}) > 1 or order != sorted(set(order)):
            raise ValueError(
                f"rollouts {start} to {start + samples - 1} are {listed([name_of(r) for r in siblings])}; expected "
                f"{samples} samples of one prompt with ascending sample_index: order the list by prompt, then sample"
            )


def check_rollouts(rollouts: list[Rollout], layout: Layout) -> None:
    """Raises: ValueError, naming the rollouts that cannot be packed and why."""
    faults = [f"{name_of(rollout)}: {fault}" for rollout in rollouts if (fault := _fault(rollout, layout))]
    if faults:
        raise ValueError("rollouts cannot be packed: " + listed(faults))


def _fault(rollout: Rollout, layout: Layout) -> str | None:
    """Return why the rollout cannot be packed; None when it can."""
    if rollout.has_tokens and not len(rollout.token_ids) == len(rollout.sampled) == len(rollout.rollout_logprobs):
        return (
            f"token_ids, sampled and rollout_logprobs have {len(rollout.token_ids)}, {len(rollout.sampled)} and "
            f"{len(rollout.rollout_logprobs)} entries; expected equal lengths"
        )
    length, prompt, response = rollout.lengths
    if length == 0:
        return "no tokens"
    if response == 0:
        return "the response has length 0 (sampled is False everywhere)"
    if prompt == 0:
        return "the response starts at token 0; no position predicts it, so give a prompt"
    if layout.padded(length) > layout.capacity:
        return (
            f"{layout.padded(length)} tokens exceed micro_batch_tokens={layout.micro_batch_tokens} "
            f"(of which {layout.capacity} are usable with lengths padded to a multiple of {layout.pad_multiple})"
        )
    if length > layout.max_tokens:
        return f"{length} tokens exceed max_prompt_tokens + max_response_tokens = {layout.max_tokens}"
    return None


def name_of(rollout: Rollout) -> str:
    """Return how messages name it."""
    return f"(prompt_id={rollout.prompt_id}, sample_index={rollout.sample_index})"


def listed(items: list[str], most: int = 8) -> str:
    """Return the items in one line, the first of them when they are many."""
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")
