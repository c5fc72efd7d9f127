"""What stands beside the weights in every model folder that this program writes.

The source's files are carried over byte for byte, but for what training or a conversion changed: the dtype, a
vocabulary that the source did not state. A policy without a source folder has its files generated.

Transformers 4 silently takes a config.json as transformers 5 writes it for another model (RoPE with its default
frequencies, 128 experts), and cannot load such a tokenizer. So what stands in the new form alone is written in the old
form too, which both read.
"""

import copy
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from megatron_rl.config import Config
from megatron_rl.convert.safetensors_io import TensorInfo
from megatron_rl.convert.weights import Weights
from megatron_rl.data.tokenizer import tokenizer_folder
from megatron_rl.models.facts import hf_folder

Files = dict[str, bytes]  # path inside the model folder -> contents

_CONFIG, _TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
_OF_MODEL = ("generation_config.json", "LICENSE*", "NOTICE*")
_OF_TOKENIZER = (
    "tokenizer* vocab* merges.txt *.model *.tiktoken tekken.json special_tokens_map.json added_tokens.json "
    "*chat_template* additional_chat_templates/*"
).split()
_DTYPE_KEYS = ("torch_dtype", "dtype")
# of a config that transformers has read: what is no part of the model, or has a rule of its own below
_NOT_COMPARED = {"architectures", "rope_parameters", "transformers_version", "_name_or_path", *_DTYPE_KEYS}


class Described(Protocol):
    """A model as far as its description goes: the policy, or one that is not built."""

    @property
    def config(self) -> Config:
        """Return the config of the run."""

    @property
    def hf_config(self) -> PretrainedConfig:
        """Return the model's architecture."""


def policy_files(policy: Described, tokenizer: Any) -> Files:
    """Return what stands beside the policy's weights: config.json, generation config and licence of model.path, and the
    tokenizer with its chat template unless `tokenizer` is None.

    Raises: OSError when a source folder cannot be read.
    """
    config, hf = policy.config, policy.hf_config
    if config.model.path is None:
        files = {_CONFIG: _config_json(_generated_config(hf), hf, config.model.dtype)}
    else:
        files = _model_part(hf_folder(config.model.path), hf, config.model.dtype)
    if tokenizer is not None:
        folder = tokenizer_folder(config)
        files |= _generated_tokenizer(tokenizer) if folder is None else _tokenizer_part(folder)
    return files


def converted_files(weights: Weights, tensors: Iterable[TensorInfo]) -> Files:
    """Return what stands beside the weights of a model folder once they are stored as `tensors`.

    Raises: OSError when the folder cannot be read.
    """
    dtypes = {str(info.dtype).removeprefix("torch.") for info in tensors}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    return _model_part(weights.hf_folder, weights.hf, dtype) | _tokenizer_part(weights.hf_folder)


def write_files(folder: Path, files: Files) -> None:
    """Write the files into `folder`, which is made when it is not there. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, contents in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(contents)


def _carried(folder: Path, patterns: Iterable[str]) -> Files:
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def _model_part(folder: Path, hf: PretrainedConfig, dtype: str | None) -> Files:
    source = (folder / _CONFIG).read_bytes()
    return {_CONFIG: _config_json(json.loads(source), hf, dtype, source)} | _carried(folder, _OF_MODEL)


def _tokenizer_part(folder: Path) -> Files:
    files = _carried(folder, _OF_TOKENIZER)
    if _TOKENIZER_CONFIG in files:
        files[_TOKENIZER_CONFIG] = _tokenizer_config(files[_TOKENIZER_CONFIG])
    return files


def _generated_config(hf: PretrainedConfig) -> dict[str, Any]:
    """Return every option of the architecture, and of those that all models have what differs from the default."""
    common = PretrainedConfig().to_dict()
    return {
        name: value
        for name, value in hf.to_dict().items()
        if name not in _DTYPE_KEYS and (name not in common or value != common[name])
    }


def _generated_tokenizer(tokenizer: Any) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _tokenizer_part(Path(folder))


def _config_json(raw: dict[str, Any], hf: PretrainedConfig, dtype: str | None, source: bytes | None = None) -> bytes:
    """Return the config.json that describes `hf`: `raw` with what it lacks, or `source` itself when it lacks nothing.

    `dtype`: of the weights; None when they have several.
    """
    try:
        _understood(raw)
    except Exception:  # of many types: it refuses 1 for 1.0 and null for most values, which the policy reads as meant
        raw, source = _generated_config(hf), None
    told = raw | _rope_of_transformers_4(raw, hf)
    if hf.model_type == "qwen3_moe":
        told["num_experts"] = hf.num_experts
    if not told.get("architectures"):  # servers choose the model's class by it
        told["architectures"] = [AutoModelForCausalLM._model_mapping[type(hf)].__name__]
    if dtype is not None:
        told |= dict.fromkeys([key for key in _DTYPE_KEYS if key in told] or _DTYPE_KEYS[:1], dtype)
    understood = _understood(told).to_dict()
    told |= {
        name: value
        for name, value in hf.to_dict().items()
        if name not in _NOT_COMPARED and understood.get(name) != value
    }
    return source if source is not None and told == raw else _json(told)


def _understood(raw: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(**copy.deepcopy(raw))  # it writes into the dicts of RoPE


def _rope_of_transformers_4(raw: dict[str, Any], hf: PretrainedConfig) -> dict[str, Any]:
    """Return `rope_theta` and `rope_scaling` where `raw` states RoPE as transformers 5 does and not, or not the same,
    as transformers 4 does."""
    if "rope_parameters" not in raw:
        return {}
    old = {name: value for name, value in raw.items() if name != "rope_parameters"}
    if "rope_theta" in raw and _understood(old).rope_parameters == hf.rope_parameters:
        return {}
    told = {"rope_theta": hf.rope_parameters["rope_theta"]}
    scaling = {name: value for name, value in hf.rope_parameters.items() if name != "rope_theta"}
    if scaling["rope_type"] != "default":
        return told | {"rope_scaling": scaling}
    return told | ({"rope_scaling": None} if "rope_scaling" in raw else {})


def _tokenizer_config(source: bytes) -> bytes:
    """Return a tokenizer_config.json that transformers 4 and 5 read alike; `source` itself when it is one."""
    raw = json.loads(source)
    told = dict(raw)
    if isinstance(raw.get("extra_special_tokens"), list):  # transformers 4 knows a dict of named tokens by this name
        tokens = [*told.pop("extra_special_tokens"), *(raw.get("additional_special_tokens") or [])]
        told["additional_special_tokens"] = [token for i, token in enumerate(tokens) if token not in tokens[:i]]
    if raw.get("tokenizer_class") == "TokenizersBackend":
        told["tokenizer_class"] = "PreTrainedTokenizerFast"
    return source if told == raw else _json(told)


def _json(contents: dict[str, Any]) -> bytes:
    return (json.dumps(contents, indent=2, ensure_ascii=False) + "\n").encode()
