"""What a rehearsal says: against the planner and the GPU's room, as JSON, as tables and as a page."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rl.config import Config
from megatron_rl.files import write_atomically
from megatron_rl.models.facts import read_hf_config
from megatron_rl.models.hardware import GIB, Hardware
from megatron_rl.plan.memory import Memory, memory_of
from megatron_rl.plan.search import remedies
from megatron_rl.plan.shapes import layout_of, shape_of
from megatron_rl.plan.step import Load
from megatron_rl.rehearse.books import Numbers, Phase
from megatron_rl.rehearse.kept import memory_hash
from megatron_rl.rehearse.run import Rehearsal
from megatron_rl.report.page import document

Rows = list[list[str]]

UNSEEN = (
    "Transformer Engine's layers (torch's stand in for them) and the workspaces of kernels",
    "NCCL's buffers, the driver's context, the allocator's rounding and fragmentation",
    "the engine: its memory is the planner's",
    "values: what is selected, whether a gradient is finite, how the tokens of ranks differ",
)
# the planner's parts that a rehearsal takes over, and its names of the phases
_TAKEN = ("process", "engine process", "engine weights", "KV cache", "sampling")
_PLANNED = {"old logprobs": "old logprobs", "select": "old logprobs", "update": "training"}
_ALIVE = 20  # tags of a peak in the answer
_SHOWN = GIB / 1000


def answer(config: Config, hardware: Hardware, rehearsals: Sequence[Rehearsal]) -> dict[str, Any]:
    """Return the verdict and all that was seen, as plain data. `fits`: every phase of every rank."""
    first, spread = rehearsals[0], layout_of(config)
    shape = shape_of(read_hf_config(config.model), first.vocabulary)
    memory = memory_of(config, shape, spread, replace(hardware, has_engine=False))  # its layers are torch's
    ranks = [{"rank": r.rank, "phases": [_as_data(phase, memory) for phase in r.phases]} for r in rehearsals]
    peak, where = max((p["total"], f"{p['name']} on rank {r['rank']}") for r in ranks for p in r["phases"])  # type: ignore[attr-defined]
    fixes: list[list[str]] = []
    if peak > memory.room:  # what saves in the planner's eyes what is too much here
        load = Load(min(256.0, config.data.max_prompt_tokens), config.rollout.max_response_tokens / 2)
        found = remedies(config, hardware, load)
        fixes = [p.overrides for p in found if p.plan.memory.peak <= memory.peak - (peak - memory.room)]
    return {
        "name": config.name,
        "hash": memory_hash(config),
        "gpu": hardware.name,
        "room": memory.room,
        "peak": peak,
        "where": where,
        "fits": peak <= memory.room and not memory.faults,
        "faults": memory.faults,
        "remedies": fixes,
        "layout": spread.text(),
        "layers": first.layers,
        "depths": first.depths,
        "unseen": UNSEEN,
        "ranks": ranks,
    }


def _as_data(phase: Phase, memory: Memory) -> dict[str, Any]:
    """Return a phase beside the planner's; what that does not know lies beside an engine as training does."""
    kind = phase.name.rstrip(" 12")
    planned = memory.phases.get(_PLANNED.get(kind, kind), {})
    taken = {name: size for name, size in (planned or memory.phases["training"]).items() if name in _TAKEN}
    return {
        "name": phase.name,
        "total": sum(phase.device.values()) + sum(taken.values()),
        "parts": _by_part(phase.device) | taken,
        "planned": planned,
        "host": _by_part(phase.host),
        "alive": [[*tag, size] for tag, size in phase.device.most_common(_ALIVE)],
        "host_alive": [[*tag, size] for tag, size in phase.host.most_common(_ALIVE)],
        "collectives": [[*key, phase.calls[key], size] for key, size in phase.traffic.most_common()],
        "flops": [[*key, count] for key, count in phase.flops.most_common()],
    }


def _by_part(tags: Numbers) -> dict[str, float]:
    parts: Counter[str] = Counter()
    for (part, *_), size in tags.items():
        parts[part] += size
    return dict(parts)


def tables(phases: Sequence[dict[str, Any]], most: int | None = None) -> dict[str, Rows]:
    """Return rows under a header by title: memory, GiB; what is alive at each peak, collectives and operations, of each
    phase at most `most`."""
    parts = list(dict.fromkeys(part for phase in phases for part, size in phase["parts"].items() if size > _SHOWN))
    memory: Rows = [["GiB", *parts, "total", "planned", "host"]]
    alive: Rows = [["phase", "part", "made by", "at", "GiB"]]
    calls: Rows = [["phase", "collective", "group", "dtype", "calls", "GB"]]
    flops: Rows = [["phase", "module", "operator", "TFLOP"]]
    for phase in phases:
        name, planned = phase["name"], sum(phase["planned"].values())
        sizes = [_gib(phase["parts"].get(part, 0.0)) for part in parts]
        memory.append([name, *sizes, *map(_gib, (phase["total"], planned, sum(phase["host"].values())))])
        for place, tags in ((name, phase["alive"]), (f"{name}, host", phase["host_alive"])):
            made = [tag for tag in tags if most is None or tag[1]]  # the state has no maker, and a row in `memory`
            alive += [[place, *tag, _gib(size)] for *tag, size in made[:most] if size > _SHOWN]
        calls += [[name, *key, f"{n:,.0f}", f"{size / 1e9:.3f}"] for *key, n, size in phase["collectives"][:most]]
        flops += [[name, *key, f"{count / 1e12:.1f}"] for *key, count in phase["flops"][:most]]
    titles = ("memory at each peak", "alive at each peak", "collectives of the rank", "operations of the rank")
    return dict(zip(titles, (memory, alive, calls, flops), strict=True))


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def verdict_text(found: dict[str, Any]) -> str:
    """Return the verdict in words, with what would make the run fit."""
    where = f"{found['where']} takes {_gib(found['peak'])} of {_gib(found['room'])} GiB ({found['gpu']})"
    if found["fits"]:
        return f"fits: {where}"
    if found["faults"]:
        return f"does not fit: {'; '.join(found['faults'])}"
    fixes = [f"the planner says that it would fit with {' '.join(overrides)}" for overrides in found["remedies"][:3]]
    return "\n".join(
        [f"does not fit: {where}", *(fixes or ["no single change makes it fit: megatron-rl plan --search"])]
    )


def write(found: dict[str, Any], folder: Path) -> None:
    """Write rehearsal.json and rehearsal.html into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "rehearsal.json", json.dumps(found, indent=1))
    title, verdict = f"Rehearsal of {found['name']}", verdict_text(found).splitlines()
    page = document(
        Path(__file__).parent / "assets" / "rehearsal.html", title, found=found, verdict=verdict, tables=tables
    )
    write_atomically(folder / "rehearsal.html", page)
