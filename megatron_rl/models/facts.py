"""Facts of a model that its config.json tells, read as plain data: nothing here needs torch or transformers."""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError

from megatron_rl.errors import ConfigError
from megatron_rl.models.keys import ConfigKeys


@dataclass(frozen=True, slots=True)
class Architecture:
    """What sets a model type apart, as transformers builds it."""

    qkv_bias: bool = False  # biases on the query, key and value projections
    qk_norm: bool = False  # an RMSNorm per head of queries and keys
    is_moe: bool = False  # a mixture of experts in place of the MLP
    head_width: int | None = None  # where config.json does not say; None: hidden_size / num_attention_heads
    sliding_window: int | None = None  # tokens, where config.json does not say and the key alone decides
    even_hidden: bool = False  # hidden_size must be a multiple of num_attention_heads even where head_dim is given


ARCHITECTURES = {
    "llama": Architecture(even_hidden=True),
    "mistral": Architecture(sliding_window=4096),
    "qwen2": Architecture(qkv_bias=True),
    "qwen3": Architecture(qk_norm=True, head_width=128),
    "qwen3_moe": Architecture(qk_norm=True, is_moe=True),
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_EXPERT_SIZES = ("num_experts", "moe_intermediate_size", "num_experts_per_tok")
# rope types with fixed frequencies up to max_position_embeddings, and what each must state
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


class ModelSource(Protocol):
    """Where the config's section `model` says that the policy comes from."""

    @property
    def path(self) -> str | None:
        """Return the folder with config.json and weights, if there is one."""

    @property
    def hf_config(self) -> dict[str, Any] | None:
        """Return the contents of a config.json as the YAML states them, if it does."""


# ------------------------------------------------------------------------------------------------------------- files


def hf_folder(path: str | Path) -> Path:
    """Return where a model's config.json and tokenizer are: the folder, or `hf/` inside a Megatron checkpoint."""
    folder = Path(path)
    return folder / "hf" if (folder / "metadata.json").is_file() else folder


def read_config_json(folder: Path) -> dict[str, Any]:
    """Read a model's config.json, its known keys typed. Raises: ConfigError when it is missing, no JSON or mistyped."""
    if fault := model_folder_fault(folder):
        raise ConfigError(fault)
    path = hf_folder(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}; give a folder with a Hugging Face config.json") from error
    try:
        typed: dict[str, Any] = TypeAdapter(ConfigKeys).validate_python(raw)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise ConfigError(f"{path}: {'; '.join(faults)}") from error
    return {key: typed[key] for key in raw}


def read_hf_config(model: ModelSource) -> dict[str, Any]:
    """Read the policy's Hugging Face config as a dict: that of model.path; model.hf_config without a path, or where the
    path is not on this machine (then `require_model` refuses to train).

    Raises: ConfigError when model.path has no readable config.json, or one that disagrees with model.hf_config.
    """
    path, stated = model.path, model.hf_config
    if path is None:
        return dict(stated or {})
    if stated is not None and not Path(path).exists():
        return dict(stated)
    try:
        stored = read_config_json(Path(path))
    except ConfigError as error:
        raise ConfigError(f"model.path={error}") from error
    if stated is not None:
        shared = [key for key in stated if key in stored]  # a config.json leaves out what is the default
        differ = [f"{key}: {stated[key]!r}, there {stored[key]!r}" for key in shared if stated[key] != stored[key]]
        if differ:
            raise ConfigError(
                f"model.hf_config states another architecture than {hf_folder(path) / 'config.json'} ("
                + "; ".join(differ)
                + "); correct model.path, or model.hf_config"
            )
    return stored


def require_model(model: ModelSource) -> None:
    """Raises: ConfigError when the weights that the config names are not on this machine."""
    if model.path is not None and (fault := model_folder_fault(model.path)):
        raise ConfigError(f"model.path={fault}")


def model_folder_fault(path: str | Path) -> str | None:
    """Return why a folder is no model, beginning with the folder, with what was probably meant; None when it is one.

    A model is a Hugging Face folder with config.json, or a Megatron checkpoint with its sub-folder hf.
    """
    folder = Path(path)
    if not folder.exists():
        remedy = (
            "; download the model into it, name another, or set the environment variable MEGATRON_RL_MODELS where the "
            "config uses it"
        )
        on_hub = f". A model of the hub: hf download {path} --local-dir FOLDER" if _is_hub_name(path) else ""
        return f"{path}: no such folder here{folder_hint(path) or remedy + on_hub}"
    if not (hf_folder(folder) / "config.json").is_file():
        return (
            f"{path}: neither a Hugging Face model (config.json and safetensors) nor a Megatron checkpoint with its "
            f"sub-folder hf{folder_hint(path)}"
        )
    return None


def folder_hint(path: str | Path) -> str:
    """Return `; did you mean ...?` for a folder above the wanted one, or a name on the hub; empty without a guess."""
    folder = Path(path)
    if _is_hub_name(path) and not folder.exists():
        home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
        cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
        folder = cache / f"models--{str(path).replace('/', '--')}"
    patterns = ("snapshots/*", "step_*", "checkpoints/step_*")
    near = [guess for pattern in patterns for guess in sorted(folder.glob(pattern)) if guess.is_dir()]
    return f"; did you mean {near[-1]}?" if near else ""


def _is_hub_name(path: str | Path) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) is not None


# ------------------------------------------------------------------------------------------ what the policy can be


def architecture_faults(hf: dict[str, Any], *, needs_vocabulary: bool = False) -> list[str]:
    """Return what keeps the policy from being this model, one line per fault; empty when nothing does.

    hf: contents of a config.json. The one list that the config's checks, conversion and the policy itself ask.
    needs_vocabulary: vocab_size must be there, else the task's tokenizer tells it.
    """
    kind = hf.get("model_type")
    if kind not in ARCHITECTURES:
        return [f"model_type {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}"]
    stated = {key: hf.get(key) for key in _SIZES + ("vocab_size",) * needs_vocabulary}
    if is_moe(hf):
        stated |= {key: hf.get(key) for key in _EXPERT_SIZES} | {"num_experts": num_experts(hf)}
    lacking = [key for key, value in stated.items() if not isinstance(value, int) or value < 1]
    if lacking:
        return [f"the Hugging Face config lacks a positive {', '.join(lacking)}"]
    features = [*_unsupported(hf), *_unsupported_rope(hf)]
    faults = [f"{kind} with {', '.join(features)} is not supported; choose another model"] if features else []
    if len(hf.get("layer_types") or range(hf["num_hidden_layers"])) != hf["num_hidden_layers"]:
        faults.append(f"layer_types names {len(hf['layer_types'])} layers, num_hidden_layers={hf['num_hidden_layers']}")
    return faults + _head_faults(hf)


def _unsupported(hf: dict[str, Any]) -> list[str]:
    """Return the features that the Megatron policy would silently drop."""
    kind, activation = hf["model_type"], hf.get("hidden_act") or "silu"
    window = hf.get("sliding_window", ARCHITECTURES[kind].sliding_window) if kind == "mistral" else None
    other = ", ".join(sorted({str(layer) for layer in hf.get("layer_types") or ()} - {"full_attention"}))
    always_1 = is_moe(hf) and hf.get("norm_topk_prob") and hf["num_experts_per_tok"] == 1
    features = {
        "sliding-window attention (use_sliding_window)": hf.get("use_sliding_window"),
        f"sliding-window attention (sliding_window {window}, null would be full attention)": window is not None,
        f"layers of other kinds ({other} in layer_types)": other,
        "a bias on the attention output (attention_bias)": hf.get("attention_bias"),
        "biases in the MLP (mlp_bias)": hf.get("mlp_bias"),
        f"hidden_act {activation!r} (only silu)": activation not in ("silu", "swish"),
        "quantised weights (quantization_config; give the model that it was made from)": hf.get("quantization_config"),
        "norm_topk_prob and one expert a token (its weight is always 1, so the router cannot learn)": always_1,
    }
    return [feature for feature, occurs in features.items() if occurs]


def _unsupported_rope(hf: dict[str, Any]) -> list[str]:
    """Return what the rotary embedding asks for beyond fixed frequencies. transformers reads rope_scaling first."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if any(isinstance(value, dict) for value in rope.values()):
        return ["rope_parameters by kind of layer"]
    if kind not in _ROPE_KEYS:
        return [f"rope_type {kind!r} (only {', '.join(_ROPE_KEYS)})"]
    lacking = [key for key in _ROPE_KEYS[kind] if rope.get(key) is None]
    if lacking:
        return [f"rope_type {kind!r} that lacks {', '.join(lacking)}"]
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1):
        return [f"rotation of a part of each head (partial_rotary_factor {partial})"]
    scaling = _yarn_scaling(rope) if kind == "yarn" else 1.0
    return [f"rope_type 'yarn' that scales attention by {scaling:g} (attention_factor)"] if scaling != 1 else []


def _yarn_scaling(rope: dict[str, Any]) -> float:
    """Return YaRN's factor on the attention's cosines and sines. Source: arXiv 2309.00071, section 3.4, as
    transformers' modeling_rope_utils computes it."""
    stated, numerator, denominator = (rope.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if stated is not None:
        return float(stated)

    def scale(weight: float) -> float:
        return 1.0 if rope["factor"] <= 1 else 0.1 * weight * math.log(rope["factor"]) + 1.0

    return scale(numerator) / scale(denominator) if numerator and denominator else scale(1.0)


def _head_faults(hf: dict[str, Any]) -> list[str]:
    """Return what is wrong with the attention heads' number and width."""
    hidden, heads, faults = hf["hidden_size"], hf["num_attention_heads"], []
    groups = hf.get("num_key_value_heads") or heads
    needs_multiple = ARCHITECTURES[hf["model_type"]].even_hidden or not hf.get("head_dim")
    if needs_multiple and hidden % heads:
        give = "" if hf.get("head_dim") else " or give head_dim"
        faults.append(f"hidden_size={hidden} is not divisible by num_attention_heads={heads}; change one of them{give}")
    elif head_width(hf) % 2:
        faults.append(f"heads of width {head_width(hf)}: rotary embedding turns pairs; make it even")
    if heads % groups:
        faults.append(f"num_attention_heads={heads} is not divisible by num_key_value_heads={groups}")
    return faults


# ---------------------------------------------------------------------------------------------------- derived facts


def head_width(hf: dict[str, Any]) -> int:
    """Return the width of one attention head, from the contents of a config.json."""
    kind = ARCHITECTURES.get(hf.get("model_type", ""), Architecture())
    return hf.get("head_dim") or kind.head_width or hf["hidden_size"] // hf["num_attention_heads"]


def is_moe(hf: dict[str, Any]) -> bool:
    """Return whether the contents of a config.json describe a mixture of experts."""
    return ARCHITECTURES.get(hf.get("model_type", ""), Architecture()).is_moe


def moe_layers(hf: dict[str, Any]) -> list[int]:
    """Return the layers, from 0, whose MLP is a mixture of experts. Source: transformers' Qwen3MoeDecoderLayer."""
    if not is_moe(hf):
        return []
    dense, step = hf.get("mlp_only_layers") or (), hf.get("decoder_sparse_step") or 1
    return [layer for layer in range(hf["num_hidden_layers"]) if layer not in dense and (layer + 1) % step == 0]


def has_dense_layers(hf: dict[str, Any]) -> bool:
    """Return whether a layer has one MLP for all tokens, from the contents of a config.json."""
    return len(moe_layers(hf)) < hf["num_hidden_layers"]


def num_experts(hf: dict[str, Any]) -> int | None:
    """Return the experts of one layer; transformers 5 writes another key than the checkpoints on the hub have."""
    return hf.get("num_experts") or hf.get("num_local_experts")
