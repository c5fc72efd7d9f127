"""`megatron-rl shadow`: its arguments, and starting the processes."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from megatron_rl.algorithms.methods import METHODS
from megatron_rl.algorithms.policy_loss import PolicyLoss
from megatron_rl.config import Config, parse_config
from megatron_rl.config.environment import for_libraries
from megatron_rl.config.yaml_text import read_yaml
from megatron_rl.errors import ConfigError, UserError


def shadow(
    run_dir: Annotated[Path, typer.Argument(help="run folder with checkpoints", metavar="RUN", show_default=False)],
    checkpoint: Annotated[
        Path | None, typer.Option(help="one of its checkpoints; by default the newest", show_default=False)
    ] = None,
    methods: Annotated[
        Path | None,
        typer.Option(help="YAML file: name -> loss section; default: all methods", show_default=False),
    ] = None,
    updates: Annotated[
        int, typer.Option(min=1, help="mini-batches compared; between them, one update with the run's own loss")
    ] = 2,
    one_process: Annotated[bool, typer.Option("--one-process", help="Ignore the run's process layout.")] = False,
) -> None:
    """Replay the step after a checkpoint through every method: selected tokens, entropy change, gradient directions.

    Writes RUN/shadow/step_NNNNNNNN.json and prints tables. Training is not touched; the run may go on meanwhile.
    """
    path = _checkpoint(run_dir, checkpoint)
    config = shadow_config(path, one_process=one_process)
    losses = _read_methods(methods) if methods else default_methods(config.loss)
    from megatron_rl import launch

    def work() -> None:
        from megatron_rl.lab.shadow import main  # torch and Megatron: seconds

        main(config, path, losses, updates, run_dir / "shadow")

    # the folder is the lock, so that the run's own stays free
    processes, environment = config.parallel.processes, for_libraries(config)
    folder = run_dir / "shadow"
    sys.exit(launch.in_world(work, sys.argv[1:], folder, processes=processes, environment=environment))


def shadow_config(checkpoint: Path, *, one_process: bool) -> Config:
    """The config that wrote the checkpoint, for a step that samples with the embedded engine and keeps no reference.

    Raises: ConfigError.
    """
    raw: dict[str, Any] = _read(checkpoint / "config.yaml", "the run's config")
    raw["warm_start"] = None
    raw["loss"]["ref_kl_coef"] = 0.0
    raw["rollout"] |= {"engine": "transformers", "max_staleness": 0}
    raw["train"] |= {"resume": "auto", "eval_every": 0, "keep_best": False}
    if one_process:
        raw["parallel"] = {"distributed_optimizer": raw["parallel"]["distributed_optimizer"]}
    return parse_config(raw)


def _checkpoint(run_dir: Path, given: Path | None) -> Path:
    found = sorted((run_dir / "checkpoints").glob("step_*"))
    path = given or (found[-1] if found else None)
    if path is None or not (path / "metadata.json").is_file():
        raise UserError(
            f"{path or run_dir / 'checkpoints'}: no checkpoint of a run there; shadow replays the step after one: save "
            "some with train.save_every, or name one with --checkpoint"
        )
    return path


def _read(file: Path, content: str) -> Any:
    try:
        return read_yaml(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot read {content}: {error}") from error


def default_methods(own: PolicyLoss) -> dict[str, dict[str, Any]]:
    """Return the loss sections that the methods say are worth comparing, by name, and a run's `own` that is none."""
    losses: dict[str, dict[str, Any]] = {}
    for kind, method in METHODS.items():
        losses |= {name: {"type": kind, **options} for name, options in (method.compared or {kind: {}}).items()}
    return losses if own.type in METHODS else losses | {own.type.rpartition(":")[2]: own.model_dump(mode="json")}


def _read_methods(path: Path) -> dict[str, dict[str, Any]]:
    losses = _read(path, "the methods")
    if not isinstance(losses, dict) or not losses or not all(isinstance(loss, dict) for loss in losses.values()):
        raise ConfigError(f"{path}: expected a mapping of names to loss sections, as grpo: {{type: ppo_clip}}")
    return losses
