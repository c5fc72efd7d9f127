"""What a rehearsal says: against the planner and the GPU's room, as JSON, as tables and as a page."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_rl.config import Config
from megatron_rl.files import write_atomically
from megatron_rl.models.facts import read_hf_config
from megatron_rl.models.hardware import GIB, Hardware
from megatron_rl.plan.memory import Memory, memory_of
from megatron_rl.plan.search import remedies
from megatron_rl.plan.seconds import fitted_constants
from megatron_rl.plan.shapes import layout_of, shape_of
from megatron_rl.plan.step import Load
from megatron_rl.rehearse.books import Phase
from megatron_rl.rehearse.run import Rehearsal
from megatron_rl.report.page import document
from megatron_rl.report.panels import table_html

Rows = list[list[str]]

UNSEEN = (
    "Transformer Engine's layers (torch's stand in for them) and the workspaces of all kernels",
    "NCCL's buffers, the driver's context, the allocator's rounding and fragmentation",
    "the engine: its rows are the planner's",
    "values: what is selected, whether a gradient is finite, how ranks differ in their tokens",
)
# parts of the planner that a rehearsal takes over: of other processes, of the driver, of an embedded engine
_ENGINE = ("process", "engine process", "engine weights", "KV cache", "sampling")
_PLANNED = {"old logprobs": "old logprobs", "select": "old logprobs", "update": "training"}
_ASLEEP = "training"  # phases that the planner does not know lie beside an engine as training does
_ALIVE = 20  # tags in the answer
_SECTIONS = ("parallel", "rollout", "loss", "optimizer", "warm_start")


def answer(config: Config, hardware: Hardware, rehearsals: Sequence[Rehearsal]) -> dict[str, Any]:
    """Return the verdict and all that was seen, as plain data. `fits`: every phase of every rank."""
    shape, spread = shape_of(read_hf_config(config.model), rehearsals[0].vocabulary), layout_of(config)
    memory = memory_of(config, shape, spread, hardware)
    ranks = [
        {"rank": r.rank, "stage": r.stage, "phases": [_as_data(phase, memory) for phase in r.phases]}
        for r in rehearsals
    ]
    fullest = max((p | {"rank": r["rank"]} for r in ranks for p in r["phases"]), key=lambda phase: phase["total"])
    fixes: list[list[str]] = []
    if fullest["total"] > memory.room:
        load = Load(min(256.0, config.data.max_prompt_tokens), config.rollout.max_response_tokens / 2)
        # the planner must say that the change saves what is too much here
        bound = memory.peak - (fullest["total"] - memory.room)
        proposals = remedies(config, hardware, fitted_constants(), load, shape.vocab)
        fixes = [p.overrides for p in proposals if p.plan.memory.peak <= bound]
    return {
        "name": config.name,
        "hash": memory_hash(config),
        "gpu": hardware.name,
        "room": memory.room,
        "peak": fullest["total"],
        "fullest": f"{fullest['name']} on rank {fullest['rank']}",
        "fits": fullest["total"] <= memory.room,
        "remedies": fixes,
        "layout": spread.text(),
        "layers": rehearsals[0].layers,
        "depths": rehearsals[0].depths,
        "unseen": UNSEEN,
        "ranks": ranks,
    }


def memory_hash(config: Config) -> str:
    """Return a hash of the options that a rehearsal depends on, and a few more."""
    raw = config.model_dump(mode="json")
    parts = {name: raw[name] for name in _SECTIONS} | {"prompt": raw["data"]["max_prompt_tokens"]}
    parts |= {"model": raw["model"] | {"path": None, "hf_config": dict(read_hf_config(config.model))}}
    parts |= {name: value for name, value in raw["train"].items() if "tokens" in name or "prompts" in name}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _as_data(phase: Phase, memory: Memory) -> dict[str, Any]:
    kind = phase.name.rstrip(" 12")
    planned = _PLANNED.get(kind, kind if kind in memory.phases else None)
    engine = {name: size for name, size in memory.phases[planned or _ASLEEP].items() if name in _ENGINE}
    device = sum(phase.device.values())
    return {
        "name": phase.name,
        "device": device,
        "parts": _by_part(phase.device),
        "engine": engine,
        "total": device + sum(engine.values()),
        "planned": None if planned is None else memory.phases[planned],
        "host": sum(phase.host.values()),
        "host_parts": _by_part(phase.host),
        "alive": _largest(phase.device),
        "host_alive": _largest(phase.host),
        "collectives": [[*key, calls, phase.traffic[key]] for key, calls in sorted(phase.calls.items())],
        "flops": [[*key, count] for key, count in sorted(phase.flops.items(), key=lambda pair: -pair[1])],
        "reads": [[*key, count] for key, count in phase.reads.items()],
    }


def _by_part(tags: dict[tuple[str, ...], float]) -> dict[str, float]:
    parts: Counter[str] = Counter()
    for (part, *_), size in tags.items():
        parts[part] += size  # type: ignore[assignment]
    return dict(parts)


def _largest(tags: dict[tuple[str, ...], float]) -> list[list[Any]]:
    return [[*tag, size] for tag, size in sorted(tags.items(), key=lambda pair: -pair[1])[:_ALIVE]]


def memory_rows(phases: Sequence[dict[str, Any]]) -> Rows:
    """Return a header and a row a phase, GiB: the parts at the device's peak, the planner's total, the host's peak."""
    parts = list(dict.fromkeys(part for phase in phases for part, size in phase["parts"].items() if size > GIB / 200))
    rows = [["phase", *parts, "engine, process", "total", "planned", "host, a rank"]]
    for phase in phases:
        planned = "–" if phase["planned"] is None else _gib(sum(phase["planned"].values()))
        sizes = [_gib(phase["parts"].get(part, 0.0)) for part in parts]
        rest = [_gib(sum(phase["engine"].values())), _gib(phase["total"]), planned, _gib(phase["host"])]
        rows.append([phase["name"], *sizes, *rest])
    return rows


def detail_rows(phases: Sequence[dict[str, Any]], most: int | None = None) -> dict[str, Rows]:
    """Return tables by title: what is alive at each peak, collectives, operations; of each phase at most `most`
    rows."""
    alive: Rows = [["phase", "part", "made by", "at", "GiB"]]
    calls: Rows = [["phase", "collective", "group", "dtype", "calls", "GB"]]
    flops: Rows = [["phase", "module", "operator", "TFLOP"]]
    for phase in phases:
        name = phase["name"]
        alive += [[name, *tag, _gib(size)] for *tag, size in phase["alive"][:most] if size > GIB / 1000]
        alive += [[f"{name}, host", *tag, _gib(size)] for *tag, size in phase["host_alive"][:most] if size > GIB / 1000]
        largest = sorted(phase["collectives"], key=lambda row: -row[-1])[:most]
        calls += [[name, *key, f"{number:,.0f}", f"{size / 1e9:.3f}"] for *key, number, size in largest]
        flops += [[name, *key, f"{count / 1e12:.1f}"] for *key, count in phase["flops"][:most]]
    return {"Alive at each peak": alive, "Collectives of a rank": calls, "Operations of a rank": flops}


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def verdict_text(found: dict[str, Any]) -> str:
    """Return the verdict in words, with what would make the run fit."""
    where = f"{found['fullest']} takes {_gib(found['peak'])} of {_gib(found['room'])} GiB ({found['gpu']})"
    if found["fits"]:
        return f"fits: {where}"
    fixes = [f"would fit with {' '.join(overrides)}" for overrides in found["remedies"]]
    return "\n".join([f"does not fit: {where}", *fixes[:3]] + ["no single change makes it fit"] * (not fixes))


def write(found: dict[str, Any], folder: Path) -> None:
    """Write rehearsal.json and rehearsal.html into the folder."""
    write_atomically(folder / "rehearsal.json", json.dumps(found, indent=1))
    depth = f"{found['layers']} layers" + (f", from {found['depths']}" if len(found["depths"]) > 1 else "")
    body = [f"<header><h1>Rehearsal of {escape(found['name'])}</h1><p>{escape(found['layout'])}; {depth}</p></header>"]
    body.append(f"<p>{escape(verdict_text(found))}</p>")
    for rank in found["ranks"]:
        tables = {"Memory, GiB": memory_rows(rank["phases"])} | detail_rows(rank["phases"])
        body += [
            f"<section><h2>{title}, rank {rank['rank']}</h2>{table_html(rows)}</section>"
            for title, rows in tables.items()
        ]
    body.append(f"<section><h2>Not seen</h2>{''.join(f'<p>{escape(text)}</p>' for text in UNSEEN)}</section>")
    write_atomically(folder / "rehearsal.html", document(f"Rehearsal of {found['name']}", body, {}))
