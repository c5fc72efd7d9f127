"""What a config that can work should still make its author stop and think: said at the start of a run and by
--check."""

from __future__ import annotations

from megatron_rl.config.loss import ClipCovLoss, CovarianceLoss, KlCovLoss
from megatron_rl.config.sections import Config

_LARGE_FRACTION, _LARGE_COUNT = 0.02, 1000  # the paper's largest fraction is 0.002


def config_notes(config: Config) -> list[str]:
    """Return one sentence or two per option under which a covariance method does nothing, or hardly what was meant."""
    loss = config.loss
    if not isinstance(loss, CovarianceLoss):
        return []
    notes = []
    if isinstance(loss, KlCovLoss) and config.minibatches_per_step == 1:
        notes.append(
            "loss.type=kl_cov with one mini-batch per step: the update is on-policy, so |logprobs - old_logprobs| is 0 "
            "and its gradient vanishes; KL-Cov then does nothing. Lower train.prompts_per_minibatch to get several "
            "updates a step"
        )
    if loss.cov_scope == "microbatch" and config.train.micro_batch_tokens < 2 * config.max_sequence_tokens:
        notes.append(
            f"loss.cov_scope=microbatch and train.micro_batch_tokens={config.train.micro_batch_tokens}: a micro-batch "
            "may hold one sequence, whose tokens share one advantage, so that their covariance is identically 0. Use "
            "cov_scope=minibatch, or raise train.micro_batch_tokens"
        )
    if isinstance(loss, ClipCovLoss | KlCovLoss) and loss.select_fraction >= _LARGE_FRACTION:
        samples = config.train.prompts_per_minibatch * config.rollout.samples_per_prompt
        selected = int(loss.select_fraction * samples * config.rollout.max_response_tokens)
        if selected > _LARGE_COUNT:
            notes.append(
                f"loss.select_fraction={loss.select_fraction} selects up to {selected:,} tokens of a mini-batch; it "
                "is a fraction, never a percentage: the paper's 0.2% is 0.002"
            )
    return notes
