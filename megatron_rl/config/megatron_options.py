"""Options that pass through to Megatron-Core: the fields of two of its dataclasses, read from its source.

Nothing of Megatron is imported, which would take torch and seconds: a config is also loaded on a laptop.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import typing
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from megatron_rl.errors import ConfigError

if TYPE_CHECKING:
    from megatron_rl.config.sections import Config, ParallelConfig

# option -> files of megatron/core and the dataclasses in them, a base class first
_SOURCES = {
    "model.megatron": {
        "model_parallel_config.py": "ModelParallelConfig",
        "transformer/transformer_config.py": "TransformerConfig",
    },
    "parallel.ddp": {"distributed/distributed_data_parallel_config.py": "DistributedDataParallelConfig"},
}
AttnBackend = typing.Literal["flash", "fused", "unfused", "local", "auto"]  # names of Megatron's enum
_TYPES: dict[str, Any] = {name: getattr(typing, name) for name in ("Optional", "Union", "Literal", "List", "Tuple")}
_TYPES |= {"AttnBackend": AttnBackend, "CudaGraphScope": str}

# of uneven pipeline stages: the layers of the first and the last, and whether embedding and loss count as one
_FIXED = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
_COUNTED = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
STAGE_FIELDS = {*_FIXED, *_COUNTED}
# why fields do not pass through, and which (* stands for any letters)
_REFUSED: dict[str, str] = json.loads((Path(__file__).parent / "megatron_refused.json").read_text())


class MegatronField(NamedTuple):
    """A field of one of Megatron's dataclasses, as its source has it."""

    annotation: str
    default: str


@cache
def fields(option: str) -> dict[str, MegatronField]:
    """Return the fields by name that `option` may pass. Raises: ConfigError where Megatron-Core is not installed."""
    spec = importlib.util.find_spec("megatron")  # a package without code of its own
    folders = [Path(place) / "core" for place in (spec.submodule_search_locations or ())] if spec is not None else []
    result: dict[str, MegatronField] = {}
    for file, name in _SOURCES[option].items():
        path = next((folder / file for folder in folders if (folder / file).is_file()), None)
        if path is None:
            raise ConfigError(f"{option}: Megatron-Core is not installed, whose {file} says what there is; install it")
        classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        body = next(node.body for node in classes if node.name == name)
        for node in (node for node in body if isinstance(node, ast.AnnAssign)):
            default = node.value
            if isinstance(default, ast.Call):  # dataclasses.field(default=...)
                default = next((word.value for word in default.keywords if word.arg == "default"), None)
            text = "" if default is None else ast.unparse(default)
            result[ast.unparse(node.target)] = MegatronField(ast.unparse(node.annotation), text)
    return result


def refusal(name: str) -> str | None:
    """Return why a field does not pass through; None: it does."""
    return next(
        (why for why, names in _REFUSED.items() if any(fnmatch(name, pattern) for pattern in names.split())), None
    )


def option_faults(option: str, given: Mapping[str, Any]) -> list[str]:
    """Return one line for each field that does not exist, does not pass through, or has a value of another type."""
    faults = []
    for name, value in given.items():
        known, reason = fields(option), refusal(name)
        passing = [other for other in known if refusal(other) is None and not other.startswith("_")]
        if name not in known:
            near = difflib.get_close_matches(name, passing, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(passing))}"
            faults.append(f"{option}.{name}: Megatron-Core has no such field; {hint}")
        elif reason is not None:
            faults.append(f"{option}.{name} does not pass through: {reason}")
        else:
            faults += _type_fault(f"{option}.{name}", known[name].annotation, value)
    return faults


def _type_fault(where: str, annotation: str, value: Any) -> list[str]:
    try:
        kind = eval(annotation, {**_TYPES})  # Megatron's own source, of which names are all that is evaluated
    except (NameError, AttributeError):
        return [f"{where} takes a Python object ({annotation}), which no config holds; remove it"]
    try:
        TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return [f"{where}: got {value!r}, expected {annotation}"]
    return []


def megatron_faults(config: Config) -> Iterator[str]:
    """Yield one line per fault in what passes through, with its remedy."""
    ddp = config.parallel.ddp
    yield from option_faults("model.megatron", config.model.megatron) + option_faults("parallel.ddp", ddp)
    if ddp.get("overlap_param_gather") and not (
        config.parallel.distributed_optimizer and ddp.get("overlap_grad_reduce")
    ):
        yield (
            "parallel.ddp.overlap_param_gather=true needs parallel.distributed_optimizer=true and "
            "parallel.ddp.overlap_grad_reduce=true; set both"
        )
    if config.model.megatron.get("moe_token_dispatcher_type") == "allgather" and config.parallel.ep > 1:
        yield (
            "model.megatron.moe_token_dispatcher_type=allgather takes equally many tokens from every rank of "
            "parallel.ep, whose micro-batches have lengths of their own; leave it at alltoall, or set ep=1"
        )


def megatron_notes(config: Config) -> list[str]:
    """Return one line for each field that passes through, beside Megatron's own default."""
    given = {"model.megatron": config.model.megatron, "parallel.ddp": config.parallel.ddp}
    return [
        f"{option}.{name}={json.dumps(value)} passes to Megatron, whose default is {fields(option)[name].default}"
        for option, values in given.items()
        for name, value in values.items()
    ]


def chunk_layers(layers: int, parallel: ParallelConfig, options: Mapping[str, Any]) -> list[list[int]]:
    """Return the layers of each model chunk, `[stage][chunk]`, as `get_num_layers_to_build` of Megatron's
    transformer_block deals them; whether they are positive and make up `layers`, the caller must check."""
    pp, vpp = parallel.pp, parallel.vpp
    fixed = {stage: options[name] for stage, name in zip((0, pp - 1), _FIXED, strict=True) if options.get(name)}
    ends = [bool(options.get(name)) for name in _COUNTED]
    total = layers - sum(fixed.values()) + sum(ends)
    even = total // max(1, pp - len(fixed))
    result = [[fixed.get(stage, even) // vpp] * vpp for stage in range(pp)]
    result[0][0] -= ends[0]
    result[-1][-1] -= ends[1]
    return result
