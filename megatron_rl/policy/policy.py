"""The policy: forward statistics, one optimizer update, and its weights as a Hugging Face stream."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_rl import device
from megatron_rl.algorithms.terms import LossFunction
from megatron_rl.config import Config
from megatron_rl.convert.hf import Source, random_source
from megatron_rl.convert.weights import open_weights
from megatron_rl.errors import UserError
from megatron_rl.metrics.spans import OFF, Spans
from megatron_rl.models.mapping import global_name, load_weights
from megatron_rl.parallel.fused_linear import float32_linear, linear_stats
from megatron_rl.parallel.groups import Groups, broadcast_from_last_stage
from megatron_rl.parallel.vocab import VocabShard, vocab_parallel_stats
from megatron_rl.parallel.weights import weight_stream
from megatron_rl.policy.build import build_model, build_optimizer, padded_vocab_size
from megatron_rl.policy.host_copies import HostCopies
from megatron_rl.policy.kept_forward import KeptForward
from megatron_rl.policy.schedule import run_schedule
from megatron_rl.types import MicroBatch, MiniBatch, TokenStats, TrainBatch, UpdateResult

if TYPE_CHECKING:
    from megatron_rl.algorithms.policy_loss import PolicyLoss


class NonFiniteError(UserError):
    """The loss or the gradient stopped being finite; the weights are those of the last good update."""


class MegatronPolicy:
    """A Megatron-Core model with its optimizer. Every method is collective: call it on all ranks, in the same order."""

    def __init__(
        self,
        raw_hf_config: dict[str, Any],
        config: Config,
        groups: Groups,
        *,
        total_updates: int,
        fuse_output_layer: bool = False,
    ) -> None:
        """Build and load the weights. `total_updates`: optimizer updates of the whole run, for the schedule;
        `fuse_output_layer`: see `build_model`."""
        self.config, self.groups = config, groups
        self.model = build_model(raw_hf_config, config, groups, fuse_output_layer=fuse_output_layer)
        self.hf_config = self.model.hf_config
        self._fuses = fuse_output_layer
        self.temperature = config.rollout.temperature
        self.context = groups.context_ranks
        path = config.model.path
        hf = self.hf_config
        self.load(open_weights(path, hf).read if path is not None else random_source(hf, config.seed))
        self._total_updates = total_updates
        self.reset_optimizer()
        self._reference: list[Tensor] | None = None
        self.skipped_in_a_row = 0
        self._kept = KeptForward()

    @property
    def parameters(self) -> list[tuple[str, Tensor]]:
        """Return this rank's (Megatron name, shard) pairs, layers numbered over the whole model. A collective."""
        self.model.complete_weights()
        return [
            (global_name(name, chunk.decoder.layers[0].layer_number - 1), parameter)
            for chunk in self.model.chunks
            for name, parameter in chunk.named_parameters()
        ]

    def reset_optimizer(self) -> None:
        """Build a fresh optimizer and schedule, with main weights copied from the current parameters."""
        self.optimizer, self.scheduler = build_optimizer(self.model, self.config, self._total_updates)
        self._host_copies, self._is_offloaded = HostCopies(self.optimizer), False

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set that of the next update only: the schedule sets it again after that."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def load(self, source: Source) -> None:
        """Fill the weights from Hugging Face tensors; an existing optimizer must be `reset_optimizer` after it.

        Raises: ConfigError naming a missing or mis-shaped tensor.
        """
        load_weights(
            self.parameters,
            source,
            self.hf_config,
            tp_rank=self.groups.tp_rank,
            tp_size=self.groups.tp_size,
            padded_vocab=padded_vocab_size(self.hf_config.vocab_size, self.groups.tp_size),
            ep_rank=self.groups.ep_rank,
            ep_size=self.groups.ep_size,
        )

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Stream the full (hf_name, tensor) pairs to every rank."""
        return weight_stream(self.parameters, self.hf_config, self.groups)

    def with_old_logprobs(self, batch: TrainBatch) -> TrainBatch:
        """Return the batch with the log-probabilities of the old policy, with those of the reference policy where one
        is kept, and with the statistics of the current weights if this step recomputes them.

        Each mini-batch is computed as its update will compute it: before the weights move, recomputed and current
        log-probabilities are the same bits, and KL-Cov's |difference| has no gradient then instead of the sign of a
        rounding error.
        """
        algorithm = self.config.algorithm
        if self._reference is not None:
            batch = batch.with_ref_logprobs(self.ref_logprobs(batch.mini_batches))
        if algorithm.recomputes(batch.step):
            first, *others = batch.mini_batches
            later = [self.stats(mini_batch, with_sum_p2=True) for mini_batch in others]
            # last, so that nothing comes between this pass and the update that may begin with it
            batch = batch.with_old_stats([self.stats(first, with_sum_p2=True, keep=True), *later])
        if algorithm.old_logprobs == "recompute":
            return batch
        parts = [(each, [m.rollout_logprobs for m in each.micro_batches]) for each in batch.mini_batches]
        return TrainBatch(batch.step, tuple(each.replace_each("old_logprobs", rollout) for each, rollout in parts))

    def with_selection_stats(self, mini_batch: MiniBatch, loss: PolicyLoss) -> MiniBatch:
        """Return the mini-batch with the statistics by which `loss` marks tokens: those of the current weights where it
        asks for them and they have moved, at the price of a forward pass, else those that it has.

        With algorithm.old_logprobs=rollout the first mini-batch may have none, and pays a pass too. In every step it is
        trained against that pass, which is the old policy's, lest KL-Cov's penalty push against the engine's error.
        """
        if loss.statistics == "current" and mini_batch.index > 0:
            return mini_batch.with_stats(self.stats(mini_batch, with_sum_p2=True))
        if self.config.algorithm.old_logprobs == "recompute" or loss.statistics != "current":
            return mini_batch
        if mini_batch.micro_batches[0].stats is None:
            mini_batch = mini_batch.with_stats(self.stats(mini_batch, with_sum_p2=True, keep=True))
        exact = [micro_batch.computed_stats.logprobs for micro_batch in mini_batch.micro_batches]
        return mini_batch.replace_each("old_logprobs", exact)

    def stats(self, mini_batch: MiniBatch, *, with_sum_p2: bool = False, keep: bool = False) -> list[TokenStats]:
        """Return statistics of each micro-batch's tokens under the current weights, on every pipeline stage; forward
        only. `keep`: see KeptForward."""
        keep = keep and self.groups.pp_size == 1 and len(mini_batch.micro_batches) == 1
        self._kept.forget()

        def collect(output: Tensor, micro_batch: MicroBatch) -> TokenStats:
            if keep:
                self._kept.keep(micro_batch, output)
            with torch.no_grad():
                return self._token_stats(output, micro_batch, with_sum_p2)

        with torch.set_grad_enabled(keep):
            outputs: list[TokenStats | None] = run_schedule(self.model, mini_batch, collect, forward_only=True)
        outputs = outputs or [None] * len(mini_batch.micro_batches)
        return [
            self._on_every_stage(stats, micro_batch, with_sum_p2)
            for stats, micro_batch in zip(outputs, mini_batch.micro_batches, strict=True)
        ]

    def offload(self) -> None:
        """Free the gradients' memory and move the optimizer's to the host, until `reload`; the weights stay."""
        for ddp in self.model.ddp:
            ddp.offload_grad_buffers()
        # in float32 the optimizer's parameters are views of the model's, and moving them would tear the two apart
        if self.config.model.dtype != "float32":
            self._host_copies.move_out()
        self._is_offloaded = True

    def reload(self) -> None:
        """Undo `offload`; gradients are zero."""
        for ddp in self.model.ddp:
            ddp.restore_grad_buffers()
        if self.config.model.dtype != "float32":
            self._host_copies.move_back()
        self._is_offloaded = False

    @contextlib.contextmanager
    def without_gradients(self) -> Iterator[None]:
        """Free the gradients' memory meanwhile; they are zero afterwards. What `offload` freed stays so."""
        holding = [] if self._is_offloaded else self.model.ddp
        for ddp in holding:
            ddp.offload_grad_buffers()
        try:
            yield
        finally:
            for ddp in holding:
                ddp.restore_grad_buffers()

    def keep_reference(self) -> None:
        """Freeze a copy of the current weights as the reference policy."""
        self._reference = self.copy_weights()

    def ref_logprobs(self, mini_batches: Sequence[MiniBatch]) -> list[list[Tensor]]:
        """Return log-probabilities `[T]` under the reference, which is another model and routes by itself, per
        mini-batch and micro-batch. Raises: RuntimeError when none was kept."""
        if self._reference is None:
            raise RuntimeError("no reference policy: call keep_reference() first")
        with self.at(self._reference):
            unrouted = [m.replace_each("routes", [None] * len(m.micro_batches)) for m in mini_batches]
            return [[stats.logprobs for stats in self.stats(mini_batch)] for mini_batch in unrouted]

    def copy_weights(self) -> list[Tensor]:
        """Return copies of this rank's shards, in the order of `parameters`. A collective."""
        return [parameter.detach().clone() for _, parameter in self.parameters]

    @contextlib.contextmanager
    def at(self, weights: list[Tensor]) -> Iterator[None]:
        """Hold these weights in place of the current ones, for forward and backward passes alone; afterwards the
        current ones are back, bit for bit."""
        current = self.copy_weights()
        try:
            self._set_parameters(weights)
            yield
        finally:
            self._set_parameters(current)

    def update(self, mini_batch: MiniBatch, loss: LossFunction, spans: Spans = OFF) -> UpdateResult:
        """Make one optimizer update: forward, backward, clip, step; `spans` sees the first two and the last two.

        A non-finite gradient leaves weights, moments and schedule alone and is reported as skipped. So does a
        mini-batch without a counted token (overlong filtering can mask all of it): its mean is 0/0, and Adam's momentum
        would move the weights for it.
        Raises: NonFiniteError when more than train.max_nonfinite_updates gradients in a row were not finite.
        """
        with spans("forward_backward"):
            sums = self.backward(mini_batch, loss)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        with spans("optimizer"):
            grad_norm, skipped = self._step(mini_batch)
        if not math.isfinite(grad_norm):
            self._count_skipped(mini_batch, grad_norm, sums)
        elif not skipped:
            self.skipped_in_a_row = 0
            self.scheduler.step(increment=1)
        return UpdateResult(sums, grad_norm, learning_rate, skipped)

    def backward(self, mini_batch: MiniBatch, loss: LossFunction) -> dict[str, Tensor]:
        """Leave the gradients of the mean loss in Megatron's buffers; returns this data-parallel rank's part of the
        metrics."""

        def on_output(output: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            stats = self._token_stats(output, micro_batch, False)
            outputs = loss(micro_batch.loss_inputs(stats, self.context))
            count = torch.tensor(micro_batch.loss_denominator, dtype=torch.int32, device=output.device)
            return outputs.loss_sum, count, outputs.metrics

        self.clear_gradients()
        output = self._kept.take(mini_batch)
        collected = run_schedule(self.model, mini_batch, on_output, forward_only=False, output=output)
        sums = add_up(collected)
        if self.groups.pp_size > 1:
            sums = self.groups.stage_ranks.gather_objects({name: pair.cpu() for name, pair in sums.items()})[-1]
        return sums

    def clear_gradients(self) -> None:
        """Forget what `backward` left."""
        for ddp in self.model.ddp:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()  # without it the distributed optimizer steps on stale gradients from update 2 on

    def _step(self, mini_batch: MiniBatch) -> tuple[float, bool]:
        """Do what ChainedOptimizer.step does, with a look at the norm before anything moves: (norm, whether
        skipped)."""
        self.optimizer.prepare_grads()  # its overflow flag belongs to fp16 loss scaling
        grad_norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(grad_norm) or (grad_norm == 0 and self._is_empty(mini_batch)):
            return grad_norm, True
        if self.config.optimizer.clip_grad > 0:
            # as Megatron's own function, which copies every gradient a second time on a CPU
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            total = torch.tensor(grad_norm, dtype=torch.float64, device=device.device())
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optimizer.clip_grad, total)
        if not self.optimizer.step_with_ready_grads():
            raise RuntimeError("Megatron's optimizer refused a finite gradient")
        return grad_norm, False

    def _is_empty(self, mini_batch: MiniBatch) -> bool:
        """Return whether no rank has a counted token."""
        counted = any(micro_batch.loss_denominator for micro_batch in mini_batch.micro_batches)
        return not self.groups.token_ranks.any(counted)

    def _count_skipped(self, mini_batch: MiniBatch, grad_norm: float, sums: dict[str, Tensor]) -> None:
        self.skipped_in_a_row += 1
        allowed = self.config.train.max_nonfinite_updates
        if self.skipped_in_a_row > allowed:
            bad = [name for name, pair in sums.items() if not torch.isfinite(pair).all()]
            raise NonFiniteError(
                f"the gradient norm was {grad_norm} in {self.skipped_in_a_row} updates in a row (mini-batch "
                f"{mini_batch.index}; non-finite metrics: {', '.join(bad) or 'none'}); "
                f"train.max_nonfinite_updates={allowed}. The weights are those of the last finite "
                "update. Look at optimizer.lr, rewards and the train-against-rollout mismatch."
            )

    def _token_stats(self, output: Tensor, micro_batch: MicroBatch, with_sum_p2: bool) -> TokenStats:
        group = self.groups.tp if self.groups.tp_size > 1 else None
        options: dict[str, Any] = {"temperature": self.temperature, "with_sum_p2": with_sum_p2}
        if self._fuses:
            shard, weight = VocabShard(group, self.model.vocab_start, self.model.vocab_size), self.model.output_weight
            options["float32_logits"] = self.config.float32_logits
            return linear_stats(output, weight, micro_batch.labels, shard, **options)
        if self.model.hands_over_hidden:
            output = float32_linear(output, self.model.output_weight)
        return vocab_parallel_stats(
            output,
            micro_batch.labels,
            group=group,
            vocab_start=self.model.vocab_start,
            vocab_size=self.model.vocab_size,
            block_rows=self.config.model.logits_block_rows,
            **options,
        )

    def _on_every_stage(self, stats: TokenStats | None, micro_batch: MicroBatch, with_sum_p2: bool) -> TokenStats:
        fields = ["logprobs", "entropy", *(["sum_p2", "sum_p2_logp"] if with_sum_p2 else [])]
        tensors = [getattr(stats, field, None) for field in fields]
        return TokenStats(*broadcast_from_last_stage(tensors, self.groups, like=micro_batch.advantages))

    def _set_parameters(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for (_, parameter), value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)


def add_up(collected: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sums of the micro-batches' metrics, float64 [2] each."""
    sums: dict[str, Tensor] = {}
    for metrics in collected:
        for name, pair in metrics.items():
            sums[name] = (
                sums.get(name, torch.zeros(2, dtype=torch.float64, device=pair.device)) + pair.detach().double()
            )
    return sums
