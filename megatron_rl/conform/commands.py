"""`megatron-rl conform`: its arguments, and starting the processes."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.config import Config, load_config, parse_config
from megatron_rl.config.megatron_options import STAGE_FIELDS
from megatron_rl.config.world import in_world
from megatron_rl.errors import ConfigError
from megatron_rl.models.facts import require_model


def conform(
    config: Annotated[Path, typer.Argument(help="YAML file of the run", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c", show_default=False)] = None,
    against: Annotated[str, typer.Option(help="the reference layout, as tp=2,dp=2; the rest is 1")] = "tp=1",
    tokens: Annotated[int, typer.Option(min=64, help="of the mini-batch that is compared, about")] = 32768,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="of the model; by default what the reference has room for", show_default=False),
    ] = None,
    engine: Annotated[bool, typer.Option(help="Start the engine and compare its log-probabilities as well.")] = True,
) -> None:
    """Prove that the parallel layout does not change the algorithm, on the machines where it will run.

    One mini-batch goes through the run's layout and a reference layout: logits, selected tokens, loss, every gradient,
    an update, a checkpoint, the engine. Exit code 1 when something differs by more than rounding.
    """
    resolved = load_config(config, overrides or [])
    require_model(resolved.model)
    reference = reference_of(resolved, against)
    folder = resolved.run_dir / "conform"

    def work() -> None:
        from megatron_rl.conform.run import Question, main  # torch and Megatron: seconds

        main(resolved, Question(reference, tokens, layers, engine), folder)

    options = ["--against", against, "--tokens", str(tokens), *(["--layers", str(layers)] if layers else [])]
    options += ["--engine" if engine else "--no-engine"]
    sys.exit(in_world(resolved, folder / "config.yaml", work, "conform", options))


def reference_of(config: Config, against: str) -> Config:
    """Return the config under the layout that `against` spells, of no more processes than the run's.

    Raises: ConfigError naming what is wrong with it.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, against.split(",")):
        name, _, value = part.strip().partition("=")
        known = name in ("tp", "pp", "vpp", "cp", "dp", "ep") and name not in sizes
        if not known or not value.isdecimal() or int(value) < 1:
            raise ConfigError(
                f"--against {against}: got {part!r}, expected sizes of tp, pp, vpp, cp, dp, ep, each once, as tp=2,dp=2"
            )
        sizes[name] = int(value)
    dp = sizes.pop("dp", 1)
    processes = dp * sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("cp", 1)
    if processes > config.parallel.processes:
        raise ConfigError(
            f"--against {against}: the reference needs {processes} processes, and the run has "
            f"{config.parallel.processes}; choose a smaller one"
        )
    kept = config.parallel.model_dump(include={"distributed_optimizer", "timeout_seconds"})
    raw = config.model_dump(mode="json", exclude_unset=True)
    raw["parallel"] = {**sizes, "world_size": processes, **kept}
    if sizes.get("pp", 1) != config.parallel.pp:
        raw["model"]["megatron"] = {k: v for k, v in config.model.megatron.items() if k not in STAGE_FIELDS}
    try:  # the whole config's checks: heads, layers and experts that do not divide
        return parse_config(raw)
    except ConfigError as error:
        raise ConfigError(f"--against {against}: {error}") from error
