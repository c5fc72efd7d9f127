"""Preflight over a world of ranks, and its report."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_rl import launch
from megatron_rl.config import Config, dump_config, load_config
from megatron_rl.errors import UserError
from megatron_rl.rehearse.kept import carry_verdict, kept_verdict

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from megatron_rl.parallel.reduce import Reducer
    from megatron_rl.preflight.checks import Check

_MARKS = {True: "ok", False: "FAIL", None: "-"}


def preflight(
    config: Annotated[Path, typer.Argument(help="YAML file of the run", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c", show_default=False)] = None,
) -> None:
    """Check versions, GPUs, network, files and engines before a run; exit 1 when something has to be mended.

    Under torchrun or Slurm over all ranks; else over those that this machine can hold.
    """
    resolved = load_config(config, overrides or [])
    if launch.is_rank():
        launch.run_worker(lambda: check_rank(resolved, kept_verdict(resolved, config)), config.parent)
        return
    from megatron_rl import device

    processes = min(resolved.parallel.processes, device.local_gpus() or len(launch.cpu_cores()))
    with tempfile.TemporaryDirectory(prefix="preflight-") as folder:
        copy = Path(folder) / "config.yaml"
        copy.write_text(dump_config(resolved))
        carry_verdict(config, copy)
        command = [sys.executable, "-m", "megatron_rl", "preflight", str(copy)]
        code = launch.run_world(command, processes, Path(folder), resolved.train.grace_seconds)
    sys.exit(code)


def check_rank(config: Config, kept: dict[str, Any] | str) -> None:
    """Run all checks as one rank of a world. `kept`: the verdict of a rehearsal, or why there is none.

    Raises: UserError on rank 0 when a check failed.
    """
    from megatron_rl import device
    from megatron_rl.parallel.world import all_reduce_bandwidth, join_world, leave_world
    from megatron_rl.rollout.clocks import waiting_seconds
    from megatron_rl.rollout.servers.nccl import agree_with_engines

    if device.ON_GPU and launch.local_rank() >= device.local_gpus():
        raise UserError(
            f"rank {os.environ['RANK']} on {socket.gethostname()} has no GPU: {device.local_gpus()} are visible there; "
            "ask for as many GPUs as processes of a node (--gpus-per-node), or lower parallel.world_size"
        )
    launch.check_address()
    agree_with_engines(config.rollout)
    world = join_world(config.parallel.timeout_seconds, waiting_seconds(config))
    # large enough on GPUs for the links' full speed; on CPUs it only shows that the ranks reach each other
    bandwidth, is_right = all_reduce_bandwidth(world, nbytes=2**28 if device.ON_GPU else 2**22, repeats=5)
    checks = _check(config, world, kept, (bandwidth, is_right))
    failed = [check.name for check in checks if check.is_ok is False]
    leave_world()
    if failed and world_rank() == 0:
        raise UserError(f"preflight: {', '.join(failed)} to be mended, see above")


def world_rank() -> int:
    """Return this process's number in the world."""
    return int(os.environ["RANK"])


def _check(config: Config, world: Reducer, kept: dict[str, Any] | str, all_reduce: tuple[float, bool]) -> list[Check]:
    """Check on every rank, and return the checks; rank 0 prints them."""
    from megatron_rl.data.tokenizer import build_tokenizer, vocab_size
    from megatron_rl.preflight.checks import Check, bandwidth_check, fact_checks, rehearsal_check
    from megatron_rl.preflight.facts import gather_facts

    hosts = sorted(set(world.gather_objects(socket.gethostname())))
    runs = config.run_dir.parent
    shared = Path(world.gather_objects(str(runs.absolute() / f".preflight-{uuid.uuid4().hex}"))[0])
    if world_rank() == 0:
        runs.mkdir(parents=True, exist_ok=True)
        shared.touch()
    world.gather_objects(None)  # a barrier: the file is there
    try:
        facts = world.gather_objects(gather_facts(config, shared, hosts))
    finally:
        if world_rank() == 0:
            shared.unlink()
    try:
        vocabulary = vocab_size(build_tokenizer(config))
    except UserError:
        vocabulary = 0  # told among the facts
    existing = len(list((config.run_dir / "checkpoints").glob("step_*")))
    checks = fact_checks(config, facts, vocabulary, existing)
    nodes = sum(fact.local_rank == 0 for fact in facts)
    checks.insert(3, bandwidth_check(world.size, nodes, *all_reduce))
    checks.append(rehearsal_check(kept, facts))
    _print(checks)
    if any(check.is_ok is False for check in checks):
        last = Check("engine start", "not tried: mend what is above first", None)
    else:
        last = _engine_start(config, world, shared.with_suffix(".engine"))
    _print([last])
    return [*checks, last]


def _print(checks: list[Check]) -> None:
    if world_rank() != 0:
        return
    for check in checks:
        first, *rest = check.finding.splitlines() or [""]
        print(f"{_MARKS[check.is_ok]:<5} {check.name:<13} {first}")
        for text in [*rest, *([f"-> {check.remedy}"] if check.remedy else [])]:
            print(" " * 20 + text)
    sys.stdout.flush()


@dataclass(frozen=True)
class _Description:
    """A policy as the engines' folder describes it, without the policy."""

    config: Config
    hf_config: PretrainedConfig


def _engine_start(config: Config, world: Reducer, folder: Path) -> Check:
    """Start every node's servers as training does, without weights, and stop them."""
    from megatron_rl.convert.disk import remove
    from megatron_rl.preflight.checks import Check
    from megatron_rl.rollout.engine import EngineError, Place

    if config.rollout.is_embedded:
        return Check("engine start", "embedded: nothing to start", None)
    from megatron_rl.data.tokenizer import build_tokenizer
    from megatron_rl.plan.memory import with_cache_tokens
    from megatron_rl.plan.shapes import shape_of
    from megatron_rl.preflight.facts import architecture
    from megatron_rl.rollout.build import DIALECTS, engine_key, start_fleet, write_model_dir
    from megatron_rl.rollout.servers.http import Loop
    from megatron_rl.run import hardware_of

    elsewhere = config.model_copy(update={"logging": config.logging.model_copy(update={"run_dir": str(folder)})})
    tokenizer = build_tokenizer(config)
    description = _Description(config, architecture(config, tokenizer))
    elsewhere = with_cache_tokens(elsewhere, shape_of(description.hf_config.to_dict()), hardware_of(world))
    if world_rank() == 0:
        write_model_dir(folder / "engine_model", description, tokenizer)
    world.gather_objects(None)
    place = Place(world_rank(), world.size, launch.local_rank(), world.gather_objects)
    began, fleet, problem = time.monotonic(), None, ""
    loop = Loop(engine_key(config, place))
    try:
        fleet = start_fleet(elsewhere, folder / "engine_model", place, DIALECTS[config.rollout.engine](), loop)
    except (EngineError, OSError, UserError) as error:
        problem = str(error)
    problems = [text for text in world.gather_objects(problem) if text]
    try:
        if fleet is not None and not problems:
            fleet.heal()
    except EngineError as error:  # on every rank alike
        problems = [str(error)]
    servers = [] if fleet is None else list(fleet.urls)
    if fleet is not None:
        fleet.close()
        loop.close()
    world.gather_objects(None)
    if problems:
        remedy = f"the servers' logs are in {folder / 'logs'}"
        return Check("engine start", "\n".join(dict.fromkeys(problems)), False, remedy)
    if world_rank() == 0:
        remove(folder)
    return Check("engine start", f"{len(servers)} servers ready after {time.monotonic() - began:.0f} s, stopped again")
