"""Layouts of a config on a cluster: which are valid, which fit, which is fastest, and what would make one fit."""

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rl.config import Config, dump_config, parse_config
from megatron_rl.config.engine_checks import divisors
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.models.facts import is_moe, num_experts, read_hf_config
from megatron_rl.models.hardware import Hardware
from megatron_rl.plan.step import Load, StepPlan, plan_step

Changes = dict[str, Any]  # dotted option -> value


@dataclass(frozen=True, slots=True)
class Proposal:
    """Changes to a config, which `load_config` accepts as overrides, and the plan of the changed config."""

    changes: Changes
    plan: StepPlan
    rehearsal: dict[str, Any] | None = None  # fits, peak (bytes), where; None: not rehearsed

    @property
    def overrides(self) -> list[str]:
        """Return the changes as the command line takes them: a.b=c."""
        return [
            f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in self.changes.items()
        ]


def changed(config: Config, changes: Changes) -> Config:
    """Return the changed config. Raises: ConfigError when it is not valid."""
    raw = config.model_dump(mode="json")
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = raw
        for parent in parents:
            node = node[parent]
        node[last] = value
    return parse_config(raw)


def search(config: Config, hardware: Hardware, load: Load) -> list[Proposal]:
    """Return the valid layouts of the config's processes that fit, fastest first. Batch, model and engine stay as they
    are, but for the engines' tensor parallelism."""
    return _fitting(config, _candidates(config, hardware), hardware, load)


def _fitting(config: Config, candidates: Iterable[Changes], hardware: Hardware, load: Load) -> list[Proposal]:
    """Return those of the changes that are valid and fit, the fastest first."""
    proposals = []
    for changes in candidates:
        try:
            candidate = changed(config, changes | {"parallel.world_size": config.parallel.processes})
        except ConfigError:
            continue
        if (plan := plan_step(candidate, hardware, load)).memory.fits:
            proposals.append(Proposal(changes, plan))
    return sorted(proposals, key=lambda proposal: (proposal.plan.total, proposal.plan.memory.peak))


_CHUNKS = (1, 2, 4)  # model chunks of a stage: more save little of the bubble, and each sends more activations


def _candidates(config: Config, hardware: Hardware) -> Iterator[Changes]:
    hf, world = read_hf_config(config.model), config.parallel.processes
    tps = divisors(min(world, hardware.gpus_per_node))
    pps = divisors(world)
    eps = divisors(num_experts(hf) or 1) if is_moe(hf) else [1]
    servers = not config.rollout.is_embedded and not config.rollout.server.urls
    engines = divisors(config.rollout.server.tp * config.rollout.server.count) if servers else [None]
    # not selective: flash attention keeps no scores, so that it saves next to nothing
    for tp, pp, cp, ep, recompute, engine_tp in itertools.product(tps, pps, tps, eps, ("none", "full"), engines):
        if world % (tp * pp * cp):
            continue
        chunks = hf["num_hidden_layers"] // pp
        changes: Changes = {
            "parallel.world_size": world,
            "parallel.tp": tp,
            "parallel.pp": pp,
            "parallel.cp": cp,
            "parallel.sp": tp > 1,
            "model.recompute": recompute,
        }
        if is_moe(hf):
            changes["parallel.ep"] = ep
        if engine_tp is not None:
            per_node = config.rollout.server.tp * config.rollout.server.count
            changes |= {"rollout.server.tp": engine_tp, "rollout.server.count": per_node // engine_tp}
        yield from (changes | {"parallel.vpp": vpp} for vpp in _CHUNKS if vpp == 1 or (pp > 1 and chunks % vpp == 0))


def rehearsed(config: Config, proposals: list[Proposal], gpu: str) -> list[Proposal]:
    """Return the proposals with the verdicts of their rehearsals. Each takes a process of its own, which chooses its
    device before torch comes, and about a minute. Raises: UserError when one cannot run."""
    answers = []
    for proposal in proposals:
        with tempfile.TemporaryDirectory() as folder:
            path, answer = Path(folder) / "config.yaml", Path(folder) / "rehearsal.json"
            path.write_text(dump_config(changed(config, proposal.changes)))
            options = ["--ranks", "all-kinds", "--gpu", gpu, "--output", folder]
            command = [sys.executable, "-m", "megatron_rl", "rehearse", str(path), *options]
            done = subprocess.run(command, capture_output=True, text=True)
            if not answer.is_file():
                raise UserError(f"rehearsal of {' '.join(proposal.overrides)}: {done.stderr or done.stdout}")
            verdict = json.loads(answer.read_text())
        answers.append(replace(proposal, rehearsal={name: verdict[name] for name in ("fits", "peak", "where")}))
    return answers


def remedies(config: Config, hardware: Hardware, load: Load) -> list[Proposal]:
    """Return single changes after which the config fits, the fastest first."""
    parallel, server, longest = config.parallel, config.rollout.server, config.max_sequence_tokens
    singles: list[Changes] = [
        {"model.recompute": "selective"},
        {"model.recompute": "full"},
        {"parallel.sp": True},
        {"parallel.tp": 2 * parallel.tp},
        {"parallel.tp": 2 * parallel.tp, "parallel.sp": True},
        {"parallel.pp": 2 * parallel.pp},
        {"parallel.distributed_optimizer": True},
        {"train.micro_batch_tokens": max(longest, config.train.micro_batch_tokens // 2)},
        {"train.micro_batch_tokens": longest},
    ]
    if config.rollout.is_embedded:
        singles += [{"rollout.batch_size": max(1, config.rollout.batch_size // 4)}]
    else:
        singles += [
            {"rollout.server.share_memory": True},
            {"rollout.server.tp": 2 * server.tp},
            *({"rollout.server.memory_fraction": round(share / 10, 1)} for share in range(1, 10)),
        ]
    return _fitting(config, singles, hardware, load)
