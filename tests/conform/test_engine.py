"""The engine's line of `megatron-rl conform`: it passes on the policy's weights, and on no others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from megatron_rl.config import parse_config
from megatron_rl.conform.verdicts import Verdict
from megatron_rl.rollout.probe import probe_limit
from tests.conform.case import conformed
from tests.rollout.servers.servers_case import python_of, raw_of
from tests.worlds import Worlds

SENT = ("scaled", "an update behind")


def conformed_and_misled(raw: dict[str, Any], folder: Path) -> dict[str, float]:
    """`conformed`, and the engine's deviation after it got other weights than the policy has, by what was sent."""
    from megatron_rl.conform import measure
    from megatron_rl.convert.safetensors_io import stored_tensors

    start, deviations, real = folder / "work" / "run" / "start", {}, measure.probe_distance

    def probe(engine: Any, policy: Any, *arguments: Any) -> Any:
        answer = real(engine, policy, *arguments)

        def stream(kind: str) -> Iterator[tuple[str, Tensor]]:
            stored = stored_tensors(start)
            for name, tensor in policy.hf_weights():
                yield name, tensor * 1.05 if kind == "scaled" else stored[name].read()

        for version, kind in enumerate(SENT, start=2):
            engine.update_weights(stream(kind), version)
            deviations[kind] = real(engine, policy, *arguments)[0]
        return answer

    with mock.patch.object(measure, "probe_distance", probe):
        conformed(raw, folder)
    return deviations


def check(worlds: Worlds, folder: Path, raw: dict[str, Any]) -> None:
    ranks = worlds.run(2, conformed_and_misled, raw, folder, timeout=1000)
    lines = {each["name"]: each for each in json.loads((folder / "conform.json").read_text())["verdicts"]}
    limit = probe_limit(parse_config(raw))
    print(lines["engine"], ranks)
    assert lines["engine"]["ok"] and lines["engine"]["tolerance"] == limit == 1e-3
    for deviations in ranks:
        assert len(deviations) == len(SENT)
        assert not any(Verdict("engine", deviation, limit).is_ok for deviation in deviations.values())


@pytest.mark.slow
def test_the_embedded_engine(worlds: Worlds, tmp_path: Path) -> None:
    check(worlds, tmp_path, raw_of(tmp_path, "run", "transformers"))


@pytest.mark.engines
@pytest.mark.timeout(1200)
def test_a_server_of_sglang(worlds: Worlds, tmp_path: Path) -> None:
    python_of("sglang")
    check(worlds, tmp_path, raw_of(tmp_path, "run", "sglang"))
