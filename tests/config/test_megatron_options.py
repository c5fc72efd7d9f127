"""Fields that pass through to Megatron: known at load without its import, typed, and refused where they break what the
project promises."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from typing import Any, get_args

import pytest

from megatron_rl.config import parse_config
from megatron_rl.config.megatron_options import AttnBackend, chunk_layers, fields, megatron_notes, refusal
from megatron_rl.errors import ConfigError
from tests.config.test_config import raw

MOE = {
    "hf_config": {
        "model_type": "qwen3_moe",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
}
EP2 = {"world_size": 2, "ep": 2}


def load(**changes: Any) -> Any:
    return parse_config(raw(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__megatron": {"bias_dropout_fusoin": True}}, "no such field; did you mean 'bias_dropout_fusion'"),
        ({"parallel__ddp": {"overlap_grad_reduc": True}}, "no such field; did you mean 'overlap_grad_reduce'"),
        ({"model__megatron": {"hiddensize": 4}}, "no such field; known here: account_for_embedding"),  # none refused
        ({"model__megatron": {"hidden_size": 4}}, r"megatron.hidden_size does not pass through: config.json says"),
        ({"model__megatron": {"calculate_per_token_loss": False}}, "does not pass through: the loss is divided once"),
        ({"model__megatron": {"tensor_model_parallel_size": 2}}, "does not pass through: set parallel.tp"),
        ({"parallel__ddp": {"use_megatron_fsdp": True}}, "does not pass through: checkpoints, offload"),
        ({"parallel__ddp": {"bucket_size": "many"}}, r"ddp.bucket_size: got 'many', expected Optional\[int\]"),
        ({"parallel__ddp": {"overlap_grad_reduce": 1}}, "ddp.overlap_grad_reduce: got 1, expected bool"),
        ({"model__megatron": {"moe_token_dispatcher_type": "all"}}, "got 'all', expected Literal.'allgather'"),
        ({"model__megatron": {"timers": "x"}}, "megatron.timers takes a Python object"),
        ({"parallel__ddp": {"overlap_param_gather": True}}, "overlap_grad_reduce=true; set both"),
        (
            {"model": MOE, "model__megatron": {"moe_token_dispatcher_type": "allgather"}, "parallel": EP2},
            "equally many tokens",
        ),
        (
            {"model__megatron": {"num_layers_in_first_pipeline_stage": 4}, "parallel__pp": 2},
            r"stages of \[4, 0\] layers.*num_hidden_layers=4",
        ),
        ({"model__megatron": {"num_layers_in_first_pipeline_stage": "2"}}, "got '2', expected Optional"),
    ],
)
def test_each_fault_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load(**changes)
    assert str(error.value).count("\n  - ") == 1


def test_what_passes_is_noted_with_megatrons_default() -> None:
    config = load(model__megatron={"attention_backend": "flash"}, parallel__ddp={"bucket_size": 1000})
    first, second = megatron_notes(config)
    assert re.search(r"attention_backend=.flash. passes to Megatron, whose default is AttnBackend.auto", first)
    assert re.search(r"parallel.ddp.bucket_size=1000 .* None", second)
    assert megatron_notes(load()) == []


def test_load_imports_neither_megatron_nor_torch() -> None:
    code = (
        "import sys; from megatron_rl.config.megatron_options import option_faults;"
        "assert option_faults('model.megatron', {'num_layer': 1}) and not option_faults('parallel.ddp', {});"
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_source_is_read_as_python_reads_it() -> None:
    from megatron_rl import policy  # noqa: F401  (makes Megatron importable)

    from megatron.core.distributed import DistributedDataParallelConfig  # isort: skip
    from megatron.core.transformer.enums import AttnBackend as Enum
    from megatron.core.transformer.transformer_config import TransformerConfig

    for option, kind in (("model.megatron", TransformerConfig), ("parallel.ddp", DistributedDataParallelConfig)):
        assert fields(option).keys() == {field.name for field in dataclasses.fields(kind)}
    assert set(get_args(AttnBackend)) == set(Enum.__members__)


def test_each_refusal_names_a_field() -> None:
    from fnmatch import fnmatch

    from megatron_rl.config.megatron_options import _REFUSED

    names = [*fields("model.megatron"), *fields("parallel.ddp")]
    for pattern in " ".join(_REFUSED.values()).split():
        assert any(fnmatch(name, pattern) for name in names), pattern


def test_what_the_policy_sets_by_other_options_is_refused() -> None:
    """Every field that transformer_config fills is refused, but for how the same is computed on a device."""
    import ast
    import inspect

    from megatron_rl.policy import build

    source = ast.parse(inspect.getsource(build.transformer_config))
    calls = [node for node in ast.walk(source) if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict"]
    names = {word.arg for call in calls for word in call.keywords if word.arg}
    assert len(names) > 20 and {name for name in names if refusal(name) is None} == set()


@pytest.mark.parametrize(
    ("pp", "vpp", "options", "chunks"),
    [
        (2, 1, {}, [[4], [4]]),
        (2, 2, {}, [[2, 2], [2, 2]]),
        (2, 1, {"num_layers_in_first_pipeline_stage": 3}, [[3], [5]]),
        (4, 1, {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3}, [[1], [2], [2], [3]]),
        (3, 1, {"account_for_embedding_in_pipeline_split": True}, [[2], [3], [3]]),
        (
            5,
            2,
            {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
            [[0, 1], [1, 1], [1, 1], [1, 1], [1, 0]],
        ),
    ],
)
def test_layers_are_dealt_as_megatron_deals_them(pp: int, vpp: int, options: dict[str, Any], chunks: Any) -> None:
    from types import SimpleNamespace

    from megatron_rl import policy  # noqa: F401

    from megatron.core.transformer.transformer_block import get_num_layers_to_build  # isort: skip

    assert chunk_layers(8, SimpleNamespace(pp=pp, vpp=vpp), options) == chunks  # type: ignore[arg-type]
    names = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
    splits = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
    theirs = SimpleNamespace(
        num_layers=8,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        pipeline_model_parallel_layout=None,
        **{name: options.get(name) for name in names},
        **{name: options.get(name, False) for name in splits},
    )
    for stage in range(pp):
        for chunk in range(vpp):
            vp_stage = chunk if vpp > 1 else None
            assert get_num_layers_to_build(theirs, vp_stage, stage) == chunks[stage][chunk]
