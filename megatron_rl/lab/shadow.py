"""One step of a run, sampled again from a checkpoint, through many methods: their tokens, entropy change, direction.

The batch is the one that the run would have trained on after the checkpoint, as long as it samples with the embedded
engine: prompts and draws are functions of the checkpoint's cursor and of the seed.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from megatron_rl.algorithms.control import LossController, mean_entropy
from megatron_rl.algorithms.methods import LossConfig
from megatron_rl.algorithms.policy_loss import PolicyLoss
from megatron_rl.config import Config
from megatron_rl.errors import ConfigError
from megatron_rl.files import write_atomically
from megatron_rl.lab.compare import compare
from megatron_rl.metrics.jsonl import without_non_finite
from megatron_rl.parallel.groups import destroy_groups
from megatron_rl.policy.checkpoint import CheckpointStore
from megatron_rl.rollout.world import join
from megatron_rl.run import set_up
from megatron_rl.train import packed


def main(config: Config, checkpoint: Path, losses: dict[str, dict[str, Any]], updates: int, folder: Path) -> None:
    """Compare on every rank of the world, write folder/NAME.json, print tables."""
    groups = join(config)
    result = replay(config, groups, checkpoint, losses, updates)
    if groups.rank == 0:
        path = folder / f"{checkpoint.name}.json"
        write_atomically(path, json.dumps(without_non_finite(result), indent=1))
        show(result, Console())
        print(path)
    groups.all_ranks.barrier()
    destroy_groups()


def replay(
    config: Config, groups: Any, checkpoint: Path, losses: dict[str, dict[str, Any]], updates: int
) -> dict[str, Any]:
    """Return the comparison as plain data, the same on every rank; collective. `losses`: name -> loss section.

    Mini-batch i is compared at the weights that i updates with the run's own loss reached, so the first is on-policy
    and the later ones are not. Options that the methods share (aggregation) are theirs, not the run's.
    Raises: ConfigError for an unusable loss; UserError for a checkpoint that cannot be read.
    """
    exact = config.algorithm.model_copy(update={"old_logprobs": "recompute"})  # every method needs the statistics
    config = config.model_copy(update={"algorithm": exact})
    methods = {name: _loss(name, raw) for name, raw in losses.items()}
    run = set_up(config, groups)
    step, state = CheckpointStore(checkpoint.parent, run.policy, groups, run.tokenizer).load(checkpoint)
    run.collector.cursor.restore(state["cursor"])
    run.served.weight_version, run.controller.state = state["weight_version"], state["control"]
    with run.served.session(run.timers):
        collected = run.collector.collect(step)
    _, batch = packed(run, collected, step)
    batch = run.policy.with_old_logprobs(batch)
    own = run.controller.next_loss(batch)
    followed = {name: LossController(loss, run.ranks).next_loss(batch) for name, loss in methods.items()}
    comparisons = []
    for mini_batch in batch.mini_batches[:updates]:
        mini_batch = mini_batch.with_stats(run.policy.stats(mini_batch, with_sum_p2=True))
        comparisons.append(compare(run.policy, mini_batch, followed, run.ranks, seed=config.seed, step=step))
        marked = own.mark(mini_batch, run.ranks, seed=config.seed, step=step)
        run.policy.update(marked, own)
    run.close()
    return {
        "checkpoint": str(checkpoint),
        "step": step,
        "run_loss": config.loss.type,
        "entropy": mean_entropy(batch, run.ranks),
        "accuracy": collected.metrics["reward/accuracy"],
        "losses": {name: loss.model_dump(mode="json", exclude_defaults=True) for name, loss in methods.items()},
        "minibatches": comparisons,
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print one table per mini-batch; `dH, logits` and `dH, step`: compare.py's `predicted_change`, `entropy_slope`."""
    names = list(result["losses"])
    for found in result["minibatches"]:
        policy = "on-policy" if found["minibatch"] == 0 else f"after {found['minibatch']} updates"
        table = Table(
            title=f"step {result['step']}, mini-batch {found['minibatch']} ({policy}), {found['tokens']} tokens"
        )
        table.add_column("method", no_wrap=True)
        for header in ("restrained", "dH, logits", "dH, step", "norm", f"cos {names[0]}"):
            table.add_column(header, justify="right", no_wrap=True)
        table.add_column("overlaps", no_wrap=True)
        for i, name in enumerate(names):
            row = found["methods"][name]
            others = [(v, names[j]) for j, v in enumerate(found["overlap"][i]) if j != i and v]
            best = max(others, default=None)
            table.add_row(
                name,
                f"{row['restrained_fraction']:.3f}",
                "" if row["predicted_change"] is None else f"{row['predicted_change']:+.4f}",
                f"{row['entropy_slope']:+.3f}",
                f"{row['grad_norm']:.3f}",
                f"{found['cosine'][i][0]:.3f}",
                "" if best is None else f"{best[0]:.2f} {best[1]}",
            )
        console.print(table)


def _loss(name: str, raw: dict[str, Any]) -> PolicyLoss:
    try:
        loss: PolicyLoss = TypeAdapter(LossConfig).validate_python(raw)
    except ValidationError as error:
        raise ConfigError(f"method {name}: {error}") from error
    if loss.ref_kl_coef:
        raise ConfigError(f"method {name}: ref_kl_coef={loss.ref_kl_coef} has no reference policy here; set it to 0")
    return loss
