"""Public measurements of other stacks (published.csv) as cases for the planner's formulas.

What a row does not say is filled in by the rules below, which are assumptions; the file itself holds what was
published.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from megatron_rl.models.hardware import GIB, HARDWARE, Hardware
from megatron_rl.plan.activations import Passes, backward_peak, kept_activations
from megatron_rl.plan.seconds import Generation
from megatron_rl.plan.shapes import ModelShape, Spread, parameters, shape_of

Row = dict[str, str]
FOLDER = Path(__file__).resolve().parent

# name as published, up to a suffix -> name in models.json
_MODELS = {
    "LLAMA3.1_8B": "Llama3.1-8B",
    "Llama3-8B": "Llama3.1-8B",
    "Llama3-70B": "Llama3.1-70B",
    "Qwen3-4B-Instruct-2507": "Qwen3-4B",
    "Qwen2.5-Math-7B": "Qwen2.5-7B",
    "Qwen2.5-7B-Instruct (ReTool multi-turn)": "Qwen2.5-7B",
}
_SYSTEMS = {"DGX-H100": "h100", "H100 HBM3": "h100", "H100-96GB HBM2e 500W": "h100", "H200": "h200", "GB200": "gb200"}


@cache
def rows() -> tuple[Row, ...]:
    """Read the data file."""
    return tuple(csv.DictReader(FOLDER.joinpath("published.csv").read_text().splitlines()))


@cache
def models() -> dict[str, dict[str, object]]:
    """Return the sizes of the models in the rows, in the words of a config.json."""
    return json.loads(FOLDER.joinpath("models.json").read_text())


def model_name(row: Row) -> str:
    """Return one name for a model that stacks spell differently."""
    return _MODELS.get(row["model"], row["model"])


def shape(row: Row) -> ModelShape:
    """Return the shape of the row's model."""
    return shape_of(models()[model_name(row)])


def hardware(row: Row) -> Hardware | None:
    """Return the row's machine; None where the planner does not know the machine's speed."""
    name = _SYSTEMS.get(row["system"])
    return HARDWARE[name] if name else None


def size(row: Row, column: str) -> int:
    """Return a size from its column; an empty one is 1."""
    return int(row[column] or 1)


@dataclass(frozen=True, slots=True)
class TrainingCase:
    """A row that trained whole models: seconds for `tokens` tokens of one data-parallel rank."""

    row: Row
    shape: ModelShape
    layout: Spread
    hardware: Hardware
    tokens: float
    context: float
    micro_batches: int
    seconds: float
    recomputed: float  # forward passes of the layers that were run again


def training_cases() -> list[TrainingCase]:
    """Return the rows of pre-training, fine-tuning and trainer steps on machines that the planner knows."""
    kinds = ("pretrain", "sft", "RL-trainer-step")
    return [
        _training_case(row) for row in rows() if row["kind"] in kinds and row["system"] in _SYSTEMS and _is_hopper(row)
    ]


def _is_hopper(row: Row) -> bool:
    return _SYSTEMS[row["system"]] in ("h100", "h200")


def _training_case(row: Row) -> TrainingCase:
    """Return the case of a row by these rules: Megatron-LM ran with sequence parallelism and, as its pipeline's depth
    of chunks is not published, with one layer a chunk; a micro-batch is one sequence. prime-rl recomputes all layers,
    torchtitan all ("full AC") or half ("selective"), Megatron-LM none. Sharded data parallelism hides its
    communication."""
    model, machine = shape(row), hardware(row)
    assert machine is not None
    layout = Spread(
        tp=size(row, "TP"),
        pp=size(row, "PP"),
        dp=size(row, "DP"),
        cp=size(row, "CP"),
        vpp=model.layers // size(row, "PP") if size(row, "PP") > 1 else 1,
        sp=size(row, "TP") > 1,
        recompute="full" if recomputed(row) == 1.0 else "none",
    )
    length = int(row["seq"])
    if row["tflops_gpu"]:
        sequences = int(row["GBS"]) // layout.dp
        per_token = _megatron_flops(model, length)
        seconds = sequences * length * layout.dp * per_token / (float(row["tflops_gpu"]) * 1e12 * int(row["gpus"]))
    else:
        sequences = size(row, "MBS")
        seconds = sequences * length * layout.dp / (float(row["tokens_s_gpu"]) * int(row["gpus"]))
    return TrainingCase(
        row,
        model,
        layout,
        machine,
        sequences * length,
        length / 2,
        sequences if layout.pp > 1 else 1,
        seconds,
        recomputed(row),
    )


def recomputed(row: Row) -> float:
    """Return the share of the layers' forward pass that the row's stack ran again."""
    if row["stack"] == "prime-rl":
        return 1.0
    if "full AC" in row["note"]:
        return 1.0
    return 0.5 if "selective AC" in row["note"] or "SAC" in row["note"] else 0.0


def _megatron_flops(model: ModelShape, length: int) -> float:
    """Return the operations per trained token as Megatron-LM reports them: attention not halved for causality.

    Source: Megatron-LM r0.8.0, training.py, num_floating_point_operations.
    """
    hidden, layers = model.hidden, model.layers
    return 12.0 * layers * hidden**2 * (2 + length / hidden + model.ffn / hidden + model.vocab / (2 * layers * hidden))


# Mean tokens attended to in the rows of verl, whose lengths are not published: the ratio hardly depends on it.
RATIO_CONTEXT = 2048.0


def forward_rows() -> list[Row]:
    """Return the rows that tell the seconds of old log-probabilities and of the update, on the same tokens."""
    return [row for row in rows() if row["stack"] == "verl" and row["old_logp_s"] and row["update_s"]]


@dataclass(frozen=True, slots=True)
class RLCase:
    """A whole on-policy step with colocated generation; `tokens` of one data-parallel rank."""

    row: Row
    shape: ModelShape
    layout: Spread
    hardware: Hardware
    generation: Generation
    tokens: float
    context: float
    micro_batches: int
    seconds: float


def rl_cases() -> list[RLCase]:
    """Return NeMo-RL's on-policy steps of dense models."""
    return [_rl_case(row) for row in rows() if row["kind"] == "RL" and row["stack"] == "NeMo-RL"]


def _rl_case(row: Row) -> RLCase:
    """Return the case of a row by these rules, from NeMo-RL's recipes where the row is silent: groups of 32, a vLLM
    with 0.6 of the memory and at most 256 sequences, one sequence a micro-batch, old and reference log-probabilities
    each step. Rows without a layout ran without tensor and pipeline parallelism. Prompt tokens are what the throughput
    counts beyond the responses."""
    model, machine, gpus = shape(row), hardware(row), int(row["gpus"])
    assert machine is not None
    engine_tp = int(row["backend"].split("[TP,PP]=[")[1].split(",")[0])
    sequences = int(row["GBS"].split("/")[0].removeprefix("G"))
    seconds, response = float(row["step_s"]), float(row["avg_seq"])
    length = float(row["tokens_s_gpu"]) * seconds * gpus / sequences
    layout = Spread(tp=size(row, "TP"), pp=size(row, "PP"), sp=size(row, "TP") > 1)
    layout = replace(layout, dp=gpus // layout.gpus)
    generation = Generation(
        sequences=sequences * engine_tp / gpus,
        tp=engine_tp,
        prompt=length - response,
        response=response,
        limit=int(row["seq"]),
        pool_bytes=0.6 * machine.memory * engine_tp - 2 * parameters(model),
        most_together=256,
        samples_per_prompt=32,
    )
    return RLCase(
        row,
        model,
        layout,
        machine,
        generation,
        tokens=sequences / layout.dp * length,
        context=length / 2,
        micro_batches=sequences // layout.dp,
        seconds=seconds,
    )


# Bytes per logit of an eager cross entropy: bfloat16 logits, their float32 copy, its log-softmax and their gradients.
_EAGER_LOSS_BYTES = 16.0


@dataclass(frozen=True, slots=True)
class MemoryCase:
    """A row's peak bytes, published and predicted."""

    row: Row
    published: float
    predicted: float


def memory_cases() -> list[MemoryCase]:
    """Return the rows of fully sharded training that tell their peak memory, on any GPU; none whose activations were
    offloaded."""
    chosen = [row for row in rows() if row["mem_gib"] and "Offload" not in row["backend"]]
    return [MemoryCase(row, float(row["mem_gib"]) * GIB, _sharded_bytes(row)) for row in chosen]


def _sharded_bytes(row: Row) -> float:
    """Return the bytes of a rank by these rules: float32 weights, gradients and moments over all ranks; activations by
    the planner's formulas, half of them where a stack recomputes half ("selective"); an eager loss, but chunks of
    logits too small to count in prime-rl's RL."""
    model, half = shape(row), recomputed(row) == 0.5
    layout = Spread(dp=size(row, "DP"), recompute="full" if recomputed(row) == 1.0 else "none")
    passes = Passes(tokens=size(row, "MBS") * int(row["seq"]), micro_batches=1, element_bytes=2)
    activations = kept_activations(model, layout, passes, 0) + backward_peak(model, layout, passes)
    logits = 0.0 if row["algo"] == "RL Full" else passes.tokens * model.vocab * _EAGER_LOSS_BYTES
    return 16.0 * parameters(model) / layout.dp + activations * (0.5 if half else 1.0) + logits
