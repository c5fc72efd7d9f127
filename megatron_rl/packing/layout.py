"""What decides the shape of a rank's micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl import device
from megatron_rl.config import Config
from megatron_rl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Layout:
    """What decides the shape of a rank's micro-batches."""

    budget: int  # tokens of one micro-batch, padding included
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    pad_multiple: int
    row_multiple: int
    equal_lengths: bool
    count_multiple: int
    num_micro_batches: int | None
    share_prompts: bool
    aggregation: str
    constant_length: int
    stride: int  # token_ids_global = rollout index * stride + position; at least the longest sequence

    def __post_init__(self) -> None:
        """Raises: ValueError for places and multiples that cannot be."""
        for name in ("dp", "cp"):
            rank, size = getattr(self, f"{name}_rank"), getattr(self, f"{name}_size")
            if not 0 <= rank < size:
                raise ValueError(f"{name}_rank={rank} is not in [0, {name}_size={size})")
        forced = self.num_micro_batches
        if self.pad_multiple < 1 or (forced is not None and (forced < 1 or forced % self.count_multiple)):
            raise ValueError(
                f"pad_multiple={self.pad_multiple} and num_micro_batches={forced} must be at least 1, the second a "
                f"multiple of {self.count_multiple}"
            )
        if self.pad_multiple % self.sequence_multiple:
            raise ValueError(
                f"pad_multiple={self.pad_multiple} must be a multiple of {self.sequence_multiple} tokens, two chunks "
                f"for each of {self.cp_size} context-parallel ranks"
            )
        if self.capacity == 0:
            raise ValueError(
                f"micro_batch_tokens={self.budget} is below the padding multiple {self.pad_multiple}; raise it"
            )

    @property
    def capacity(self) -> int:
        """Tokens that fit once the length is rounded up to the padding multiple."""
        return self.budget // self.pad_multiple * self.pad_multiple

    @property
    def sequence_multiple(self) -> int:
        """Each sequence is padded to a multiple of it, to be cut into two chunks for every context-parallel rank."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    def padded(self, length: int) -> int:
        """Tokens that a sequence of `length` takes up."""
        return _round_up(length, self.sequence_multiple)

    def filled(self, total: int) -> int:
        """Tokens of a micro-batch whose sequences take up `total`."""
        return min(_round_up(max(1, total), self.pad_multiple * self.row_multiple), self.capacity)


def shares_prompts(config: Config) -> bool:
    """Whether the samples of a group compute their prompt once (train.share_prompts).

    Exact: a sample's tokens attend to the prompt's keys and go on from its positions, and each sample predicts its
    first token from the prompt's last output. A sample's last token, which predicts nothing, is left out. A GPU has no
    such path here: it would need an attention kernel that takes a shared prefix (a block mask, or two calls merged by
    their log-sum-exp), which Transformer Engine's packed one does not. Under context parallelism the two chunks of a
    rank would have to see a prefix that other ranks hold. With rollout.routing_replay, an engine may take a prompt's
    token to other experts in each sample.
    Raises: ConfigError when it is on and cannot work on this machine.
    Source: prefix grouping, arXiv 2506.05433.
    """
    if config.train.share_prompts is True and device.ON_GPU:
        raise ConfigError(
            "train.share_prompts=true: on a GPU Transformer Engine's attention has no shared prefix; set auto or false"
        )
    able = not device.ON_GPU and config.parallel.cp == 1 and not config.rollout.routing_replay
    return able and config.train.share_prompts is not False


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
