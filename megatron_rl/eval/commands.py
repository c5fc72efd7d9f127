"""`megatron-rl eval`: the command line of this package. torch is imported when it runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.config import Config, load_config
from megatron_rl.config.evaluation import set_path
from megatron_rl.config.world import in_world
from megatron_rl.errors import ConfigError


def evaluate(
    config: Annotated[Path, typer.Argument(help="YAML file, as for train", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="a.b=c, for example eval.sets=[aime24,amc]", show_default=False)
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Hugging Face folder or Megatron checkpoint; by default model.path.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="folder of the results; by default eval/MODEL in the run's folder", show_default=False),
    ] = None,
) -> None:
    """Evaluate a model on the sets of `eval`. After a kill the same command goes on where it was."""
    resolved = evaluation_config(config, overrides or [], model, out)
    sys.exit(run_evaluation(resolved))


def evaluation_config(path: Path, overrides: list[str], model: Path | None, out: Path | None) -> Config:
    """Return the config with `model` as model.path and `out` as run folder.

    Raises: ConfigError when there is no model, or a set has no file.
    """
    from megatron_rl.eval.store import model_name  # torch

    if model is not None:
        overrides = [*overrides, f"model.path={model}", "model.hf_config=null"]
    config = load_config(path, overrides)
    if config.model.path is None:
        raise ConfigError(f"{path} trains from random weights; say which model to evaluate with --model")
    paths = [set_path(config.eval, name) for name in config.eval.sets]
    faults = [fault for fault in paths if isinstance(fault, str)]
    if faults:
        raise ConfigError("the sets cannot be evaluated:\n" + "\n".join(f"  - {fault}" for fault in faults))
    folder = out or config.run_dir / "eval" / model_name(config.model.path)
    if "{" in str(folder) or "}" in str(folder):
        raise ConfigError(f"--out {folder}: braces are not allowed in the name")
    logging = config.logging.model_copy(update={"run_dir": str(folder)})
    return config.model_copy(update={"logging": logging})


def run_evaluation(config: Config) -> int:
    """Evaluate with a resolved config, as this rank inside a world, else as the parent of a new one; return the exit
    code.

    Raises: UserError when this world is not the config's, or the folder is in use.
    """

    def work() -> None:
        from megatron_rl.eval import run  # torch and Megatron: seconds

        run.main(config)

    return in_world(config, config.run_dir / "config.yaml", work, "eval", ["--out", str(config.run_dir)])
