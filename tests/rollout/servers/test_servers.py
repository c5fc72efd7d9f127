"""Weights into real SGLang and vLLM servers, from real Megatron policies, in every way that a CPU allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rollout.servers.servers_case import ENGINES, python_of, raw_of, rows, serving, train_and_compare
from tests.worlds import Worlds

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]
MODES = ("colocated", "disaggregated", "disk")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("engine_tp", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_update_is_served_exactly(
    worlds: Worlds, tmp_path: Path, engine: str, engine_tp: int, tied: bool
) -> None:
    """Two steps of training per layout and mode, all on one server: after each update it continues greedily as
    transformers does with the exported weights, and not as with the weights before."""
    with serving(engine, tmp_path, tp=engine_tp, tied=tied) as (_, url):
        for layout in ({"tp": 2}, {"tp": 1, "pp": 2}):
            raws = [
                raw_of(
                    tmp_path,
                    f"{mode}_{'tp' if layout['tp'] == 2 else 'pp'}",
                    engine,
                    tied=tied,
                    parallel=layout,
                    rollout={
                        "server": {"urls": [url], "tp": engine_tp},
                        "weight_sync": {"mode": mode, "bucket_mib": 1},
                    },
                )
                for mode in MODES
            ]
            for rank in worlds.run(2, train_and_compare, raws, timeout=600):
                for raw, steps in zip(raws, rank, strict=True):
                    for step, found in enumerate(steps, start=1):
                        assert found["same"] and found["worst"] < 1e-4, (raw["name"], step, found)
                        assert found["mismatch"] < 1e-4 and found["versions"] == {step}
                    assert steps[1]["stale"] > 1e-2, "the weights hardly moved: a stale server would pass"


def test_servers_and_trainer_take_turns_with_the_memory(worlds: Worlds, tmp_path: Path) -> None:
    """The server sleeps during training and gets its weights when it wakes; gradients are freed in between."""
    python_of("sglang")
    raw = raw_of(tmp_path, "turns", "sglang", rollout={"server": {"share_memory": True}}, train={"num_steps": 3})
    for (steps,) in worlds.run(2, train_and_compare, [raw], timeout=300):
        assert all(found["same"] and found["worst"] < 1e-4 for found in steps)
        assert all(found["stale"] > 1e-2 for found in steps[1:])
    assert all(row["optimizer/grad_norm"] > 0 for row in rows(tmp_path / "turns"))
