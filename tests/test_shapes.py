"""Shapes in signatures: that each can be checked and is, and that a run needs no checker."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch

from tests import shape_checks
from tests.worlds import ROOT, Worlds

SHAPED = re.compile(r"""\w+\[Tensor, ['"][^'"]*['"]\]""")


def public_functions() -> Iterator[tuple[str, Any, Callable[..., Any]]]:
    """(name, module, function) of what the folders offer: functions, and methods of classes."""
    for folder in shape_checks.FOLDERS:
        for found in pkgutil.iter_modules(importlib.import_module(folder).__path__, f"{folder}."):
            module = importlib.import_module(found.name)
            for name, value in vars(module).items():
                members = vars(value).items() if inspect.isclass(value) else [("", value)]
                if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__:
                    for member, function in members:
                        if inspect.isfunction(function) and not member.startswith("_"):
                            yield f"{module.__name__}.{name}.{member}".rstrip("."), module, function


def written_annotations(function: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    """(argument, annotation as it stands in the source)."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
        if argument.annotation is not None:
            yield argument.arg, ast.unparse(argument.annotation)
    if node.returns is not None:
        yield "return", ast.unparse(node.returns)


def test_each_tensor_has_a_shape_and_each_shape_can_be_read() -> None:
    """jaxtyping does not check an annotation that it cannot evaluate, and says nothing."""
    shapes = 0
    for name, module, function in public_functions():
        for argument, annotation in written_annotations(function):
            if "Tensor" in annotation:
                assert "Tensor" not in SHAPED.sub("", annotation), f"{name}: {argument}: {annotation}"
                eval(annotation, vars(module))
                shapes += 1
    assert shapes > 50


def refused() -> list[str]:
    """The calls of wrong shapes and types that went through."""
    from megatron_rl.algorithms.advantages import ADVANTAGES
    from megatron_rl.algorithms.kl import kl_penalty
    from megatron_rl.config import AlgorithmConfig
    from megatron_rl.parallel.reduce import Reducer
    from megatron_rl.parallel.vocab import vocab_parallel_stats
    from megatron_rl.types import TokenStats

    shard = {"group": None, "vocab_start": 0, "vocab_size": 5}
    calls: dict[str, Callable[[], Any]] = {
        "shape in algorithms": lambda: kl_penalty(torch.zeros(3), torch.zeros(1), "k1"),  # would broadcast
        "dtype in algorithms": lambda: ADVANTAGES["rloo"](torch.ones(2), torch.ones(2), AlgorithmConfig()),
        "shape in parallel": lambda: vocab_parallel_stats(torch.zeros(1, 3, 5), torch.zeros(3).long(), **shard),
        "shape of a method": lambda: Reducer(None).top_k(torch.zeros(3), torch.arange(2), 1),
        "shape of a field": lambda: TokenStats(torch.zeros(3), torch.zeros(2)),
        "dtype in parallel": lambda: Reducer(None).top_k(torch.zeros(3), torch.zeros(3), 1),
    }
    passed = []
    for name, call in calls.items():
        try:
            call()
            passed.append(name)
        except jaxtyping.TypeCheckError:
            continue
    return passed


def test_a_wrong_shape_or_type_is_refused_here_and_in_worlds(worlds: Worlds) -> None:
    assert refused() == []
    assert worlds.run(1, refused) == [[]]


def test_checks_can_be_turned_off() -> None:
    from megatron_rl.algorithms.kl import kl_penalty

    with shape_checks.off():
        assert kl_penalty(torch.zeros(3), torch.zeros(1), "k1").shape == (3,)
    with pytest.raises(jaxtyping.TypeCheckError, match="ref_logprobs"):
        kl_penalty(torch.zeros(3), torch.zeros(1), "k1")


def test_a_run_needs_no_checker() -> None:
    code = """
import sys
sys.modules["jaxtyping"] = sys.modules["beartype"] = None  # importing them raises ImportError
import torch
from megatron_rl import types
from megatron_rl.algorithms import advantages, aggregation, covariance, kl, ledger, prediction, terms
from megatron_rl.parallel import context, engine_group, fused_linear, groups, reduce, traffic, vocab, weights, world
assert types.Float[torch.Tensor, "T V"] is torch.Tensor
stats = vocab.vocab_parallel_stats(
    torch.zeros(3, 4), torch.arange(3), group=None, vocab_start=0, vocab_size=4
)
print(float(kl.kl_penalty(stats.logprobs, torch.zeros(1), "k1").sum()))  # unchecked: [3] and [1]
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(-3 * torch.tensor(4.0).log().item(), rel=1e-6)
