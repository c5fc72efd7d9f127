"""What decides the shape of a rank's micro-batches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rl import device
from megatron_rl.config import Config
from megatron_rl.errors import ConfigError

if TYPE_CHECKING:
    from megatron_rl.parallel.groups import Groups


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything that decides which rank and which micro-batch a sample is computed in; one for a whole run."""

    micro_batch_tokens: int  # budget of one micro-batch, padding included
    prompts_per_step: int
    prompts_per_minibatch: int
    samples_per_prompt: int
    max_tokens: int  # of one sample; token_ids_global = rollout index * max_tokens + position
    aggregation: str  # of the loss: what a token weighs
    constant_length: int  # tokens, for the aggregation that divides by it
    share_prompts: bool  # the samples of a prompt compute it once
    dp_rank: int = 0
    dp_size: int = 1
    dp_ranks: tuple[int, ...] = (0,)  # of every process, in the order of the world's ranks
    cp_rank: int = 0
    cp_size: int = 1
    pad_multiple: int = 1  # lengths of micro-batches over all context-parallel ranks (sequence, context parallelism)
    row_multiple: int = 1  # and this many times as much where the budget allows, see device.row_multiple
    equal_lengths: bool = False  # of all micro-batches of a mini-batch: pipeline stages exchange tensors of one shape
    count_multiple: int = 1  # micro-batches per mini-batch (virtual pipeline stages)

    @staticmethod
    def of(config: Config, groups: Groups | None = None) -> Layout:
        """Return the run's layout on this rank; without `groups`, that of a process alone.

        Raises: ConfigError when train.share_prompts=true cannot work on this machine.
        """
        layout = Layout(
            micro_batch_tokens=config.train.micro_batch_tokens,
            prompts_per_step=config.train.prompts_per_step,
            prompts_per_minibatch=config.train.prompts_per_minibatch,
            samples_per_prompt=config.rollout.samples_per_prompt,
            max_tokens=config.max_sequence_tokens,
            aggregation=config.loss.aggregation,
            constant_length=config.rollout.max_response_tokens,
            share_prompts=shares_prompts(config),
        )
        if groups is None:
            return layout
        return dataclasses.replace(
            layout,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
            dp_ranks=groups.dp_ranks,
            cp_rank=groups.cp_rank,
            cp_size=groups.cp_size,
            pad_multiple=config.parallel.token_multiple,
            row_multiple=device.row_multiple(config.parallel.token_multiple // groups.cp_size),
            equal_lengths=groups.pp_size > 1,
            count_multiple=config.parallel.micro_batch_multiple,
        )

    def __post_init__(self) -> None:
        """Raises: ValueError for places and multiples that cannot be."""
        for name in ("dp", "cp"):
            rank, size = getattr(self, f"{name}_rank"), getattr(self, f"{name}_size")
            if not 0 <= rank < size:
                raise ValueError(f"{name}_rank={rank} is not in [0, {name}_size={size})")
        if self.pad_multiple < 1 or self.pad_multiple % self.sequence_multiple:
            raise ValueError(
                f"pad_multiple={self.pad_multiple} must be a multiple of {self.sequence_multiple} tokens, two chunks "
                f"for each of {self.cp_size} context-parallel ranks"
            )
        if self.capacity == 0:
            raise ValueError(
                f"micro_batch_tokens={self.micro_batch_tokens} is below the padding multiple {self.pad_multiple}; "
                "raise it"
            )

    @property
    def samples_per_minibatch(self) -> int:
        """Return the number of samples of one optimiser update, over all ranks."""
        return self.prompts_per_minibatch * self.samples_per_prompt

    @property
    def capacity(self) -> int:
        """Return the tokens that fit once the length is rounded up to the padding multiple."""
        return self.micro_batch_tokens // self.pad_multiple * self.pad_multiple

    @property
    def sequence_multiple(self) -> int:
        """Return what each sequence is padded to a multiple of, to be cut into two chunks a context-parallel rank."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    def padded(self, length: int) -> int:
        """Return the tokens that a sequence of `length` takes up."""
        return _round_up(length, self.sequence_multiple)

    def filled(self, total: int) -> int:
        """Return the tokens of a micro-batch whose sequences take up `total`."""
        return min(_round_up(max(1, total), self.pad_multiple * self.row_multiple), self.capacity)


def shares_prompts(config: Config) -> bool:
    """Return whether the samples of a prompt compute it once (train.share_prompts).

    Exact: a sample's tokens attend to the prompt's keys and go on from its positions, and each sample predicts its
    first token from the prompt's last output. A sample's last token, which predicts nothing, is left out. A GPU has no
    such path here: it would need an attention kernel that takes a shared prefix (a block mask, or two calls merged by
    their log-sum-exp), which neither Transformer Engine's packed one nor torch's does. Under context parallelism the
    two chunks of a rank would have to see a prefix that other ranks hold. With rollout.routing_replay, an engine may
    take a prompt's token to other experts in each sample.
    Raises: ConfigError when it is on and cannot work on this machine.
    Source: prefix grouping, arXiv 2506.05433.
    """
    if config.train.share_prompts is True and device.ON_GPU:
        raise ConfigError("train.share_prompts=true: on a GPU packed attention has no shared prefix; set auto or false")
    able = not device.ON_GPU and config.parallel.cp == 1 and not config.rollout.routing_replay
    return able and config.train.share_prompts is not False


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
