"""Facts that one rank finds on its node. Nothing here fails: a fault is a text, for `checks.py` to put together."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from megatron_rl import device, launch
from megatron_rl.config import Config
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.data.problems import load_prompts
from megatron_rl.data.tokenizer import build_tokenizer, vocab_size
from megatron_rl.errors import UserError
from megatron_rl.models.facts import read_hf_config, require_model
from megatron_rl.reward.shape import build_grader
from megatron_rl.rollout.servers.fleet import engine_python

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CORES = ("transformer-engine-cu12", "transformer-engine-cu13")
_SHOWN = ("torch", "megatron-core", "transformers", "transformer-engine", "transformer-engine-torch", *_CORES)
_PROBE_SECONDS = 120.0  # for the engine's interpreter to name its version, from a cold shared disk


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts of one rank; those marked node are looked up by the node's first rank alone."""

    rank: int
    local_rank: int
    host: str
    versions: dict[str, str]
    version_faults: list[str]
    gpu: tuple[str, int, int] | None  # name, free bytes, all bytes
    engine_version: str = ""  # node
    engine_fault: str = ""  # node
    model_fault: str = ""  # node
    reward_fault: str = ""  # node
    data: str = ""  # node: rows and fingerprint
    data_fault: str = ""  # node
    sees_shared: bool = True  # node: the file that rank 0 wrote beside the run folder
    free_bytes: int = 0  # node: of that folder
    host_bytes: int = 0  # node: memory of all its ranks together
    unknown_hosts: list[str] = field(default_factory=list)  # node: names of other nodes that it cannot resolve


def gather_facts(config: Config, shared: Path, hosts: list[str]) -> Facts:
    """Return this rank's facts. `shared`: a file that rank 0 wrote; `hosts`: the names of all nodes."""
    versions = {"python": sys.version.split()[0]}
    versions |= {name: version for name in _SHOWN if (version := _installed(name))} | device.gpu_versions()
    facts = Facts(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=launch.local_rank(),
        host=socket.gethostname(),
        versions=versions,
        version_faults=_version_faults(config.model.layers) + device.driver_faults(),
        gpu=device.gpu_memory() if device.ON_GPU else None,
    )
    if launch.local_rank() != 0:
        return facts
    engine_version, engine_fault = _engine_version(config.rollout)
    data, data_fault = _data(config)
    return dataclasses.replace(
        facts,
        engine_version=engine_version,
        engine_fault=engine_fault,
        model_fault=_fault_of(lambda: _open_model(config)),
        reward_fault=_fault_of(lambda: build_grader(config.reward).close()),
        data=data,
        data_fault=data_fault,
        sees_shared=shared.is_file(),
        free_bytes=shutil.disk_usage(shared.parent).free if shared.parent.is_dir() else 0,
        host_bytes=_host_bytes(),
        unknown_hosts=[host for host in hosts if _fault_of(functools.partial(socket.getaddrinfo, host, None))],
    )


def requirements(extra: str = "") -> list[Requirement]:
    """Return the requirements in the project's own metadata, those without an extra or those of one. Raises:
    PackageNotFoundError."""
    wanted = [Requirement(text) for text in importlib.metadata.requires("megatron-rl") or []]
    return [
        requirement
        for requirement in wanted
        if (requirement.marker is None) == (extra == "")
        and (requirement.marker is None or requirement.marker.evaluate({"extra": extra}))
    ]


def _version_faults(layers: str) -> list[str]:
    """Return what is not as the project's metadata asks. `layers`: model.layers; torch's need no Transformer Engine."""
    has_engine = device.ON_GPU and (layers == "transformer_engine" or device.has_transformer_engine())
    try:
        wanted = requirements() + (requirements("gpu") if has_engine else [])
    except importlib.metadata.PackageNotFoundError:
        return ["megatron-rl is not installed beside this code, so nothing says what it needs; pip install -e ."]
    faults = []
    for requirement in wanted:
        version = _installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            faults.append(f"{requirement.name} {version or 'is missing'}, supported: {requirement.specifier or 'any'}")
    cores = [name for name in _CORES if _installed(name)]
    if len(cores) > 1:
        faults.append(
            f"{' and '.join(cores)} lie in the same folder, one over the other; uninstall both, then make gpu"
        )
    try:
        from megatron_rl.policy.adam import engine_faults  # a Transformer Engine of another torch breaks this import

        faults += engine_faults() if has_engine else []
    except Exception as error:
        faults.append(f"Megatron-Core cannot be imported: {type(error).__name__}: {error}")
    return faults


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _engine_version(rollout: RolloutConfig) -> tuple[str, str]:
    engine, server = rollout.engine, rollout.server
    if rollout.is_embedded or server.urls:
        return "", ""
    code = f"import importlib.metadata as m; print(m.version({engine!r}))"
    try:
        python = engine_python(engine, server.python)
        answer = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=_PROBE_SECONDS)
    except (UserError, OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    if answer.returncode:
        return "", f"{python} has no {engine}: {answer.stderr.strip().splitlines()[-1:]}"
    version = answer.stdout.strip()
    try:
        wanted = {requirement.name: requirement.specifier for requirement in requirements(engine)}
    except importlib.metadata.PackageNotFoundError:
        return version, ""  # told among the versions
    if not wanted[engine].contains(version.split("+")[0], prereleases=True):
        return version, f"{python} has {engine} {version}, supported: {wanted[engine]}"
    return version, ""


def _open_model(config: Config) -> None:
    """Read config.json, every file's header, and one tensor."""
    from megatron_rl.convert.weights import open_weights

    require_model(config.model)
    hf = architecture(config, build_tokenizer(config))
    if config.model.path is not None:
        open_weights(config.model.path, hf).read("model.norm.weight")


def architecture(config: Config, tokenizer: Any) -> PretrainedConfig:
    """Return the model's architecture. Raises: ConfigError."""
    from megatron_rl.models.architecture import resolve_hf_config  # transformers: seconds

    return resolve_hf_config({"vocab_size": vocab_size(tokenizer)} | read_hf_config(config.model))


def _data(config: Config) -> tuple[str, str]:
    try:
        problems = load_prompts(config, build_tokenizer(config))
    except (UserError, OSError) as error:
        return "", str(error)
    digest = hashlib.sha256(repr([prompt.token_ids for prompt in problems.train]).encode()).hexdigest()[:8]
    return f"{len(problems.train):,} training and {len(problems.eval):,} held-out problems ({digest})", ""


def _fault_of(look: Callable[[], Any]) -> str:
    try:
        look()
    except (UserError, OSError) as error:
        return str(error)
    return ""


def _host_bytes() -> int:
    """Return the node's memory, or what a Slurm job or a container may use of it (cgroups, versions 2 and 1)."""
    bounds = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        for place in (Path(group), *Path(group).parents):
            file = Path("/sys/fs/cgroup", root, str(place).lstrip("/"), name)
            bounds += [int(text) for text in (file.read_text().strip(),) if text.isdigit()] if file.is_file() else []
    return min(bounds)
