"""What the SGLang dialect says, against what SGLang understands, without a running server."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch

from megatron_rl import device
from megatron_rl.errors import UserError
from megatron_rl.rollout.build import DIALECTS
from megatron_rl.rollout.engine import EngineError, Request, SamplingParams
from megatron_rl.rollout.servers.http import Server
from megatron_rl.rollout.servers.protocol import LaunchSpec, Manifest
from megatron_rl.rollout.servers.sglang import SGLang, generate_body
from megatron_rl.rollout.servers.weight_sync import share
from tests.rollout.servers.servers_case import python_of

DIALECT = SGLang()
MANIFEST = Manifest(["a", "b"], [[2, 3], [4]], ["float32", "float32"])
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_response_tokens=3, stop_token_ids=(), seed=0)
SAMPLED = SamplingParams(temperature=0.7, top_p=0.9, top_k=5, max_response_tokens=3, stop_token_ids=(8,), seed=0)


class Recorder:
    """Stands for a `Server`: notes each request, and gives an answer of the form that SGLang gives."""

    url = "http://recorder"

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[str, str, dict[str, str], Any]] = []
        self.answers = answers

    async def post(self, path: str, body: Any = None, *, seconds: float, **params: str) -> Any:
        self.calls.append(("POST", path, params, body))
        return self.answers.get(path.strip("/"), {"success": True, "message": "", "ranks": [{"checksums": {}}]})

    async def get(self, path: str, *, seconds: float, **params: str) -> Any:
        self.calls.append(("GET", path, params, None))
        told = {"model_path": "none", "weight_version": "3", "tp_size": 2, "max_total_num_tokens": 64, "dp_size": 2}
        return self.answers.get(path.strip("/"), told)


def say(recorder: Recorder, *calls: Any) -> list[Any]:
    async def main() -> list[Any]:
        return [await call(cast(Server, recorder)) for call in calls]

    return asyncio.run(main())


def answered(reason: dict[str, Any], rows: Sequence[Any], **meta: Any) -> Recorder:
    info = {"finish_reason": reason, "output_token_logprobs": rows, "weight_version": "3"}
    return Recorder(generate={"meta_info": info | meta})


def complete(recorder: Recorder, sampling: SamplingParams = GREEDY) -> Any:
    wanted = Request(0, 0, (1, 2), sampling)
    return say(recorder, lambda server: DIALECT.generate(server, wanted, "r", seconds=1))[0]


ROWS = [[-0.1, 4, None], [-0.2, 5, None], [-0.3, 6, None]]


def test_sglang_understands_every_request(tmp_path: Path) -> None:
    """It ignores unknown fields in silence, so a renamed one would change what is sampled, or leave old weights."""
    python = python_of("sglang")
    recorder = answered({"type": "length"}, ROWS)
    payload = share(DIALECT.shared_object(MANIFEST, torch.zeros(40, dtype=torch.uint8)))
    group = {"host": "h", "port": 1, "rank_offset": 1, "world_size": 3, "name": "g", "backend": "gloo"}
    say(
        recorder,
        DIALECT.health,
        lambda s: DIALECT.generate(s, Request(0, 0, (1, 2), GREEDY), "r", seconds=1),
        lambda s: DIALECT.generate(s, Request(0, 0, (1, 2), SAMPLED, with_routes=True), "r", seconds=1),
        lambda s: DIALECT.abort(s, "r"),
        *(DIALECT.pause, DIALECT.resume, DIALECT.flush, DIALECT.sleep, DIALECT.wake),
        *(DIALECT.weight_version, DIALECT.num_workers, DIALECT.begin_update),
        lambda s: DIALECT.open_group(s, **group),
        lambda s: DIALECT.close_group(s, "g"),
        lambda s: DIALECT.receive_broadcast(s, MANIFEST, "g"),
        lambda s: DIALECT.receive_shared(s, MANIFEST, [payload, payload]),
        lambda s: DIALECT.load_folder(s, tmp_path, 4),
        lambda s: DIALECT.end_update(s, 4),
        DIALECT.checksums,
    )
    assert len({call[1] for call in recorder.calls}) == 18, "a method whose requests are not checked"
    broken = [
        ["POST", "/generate", {}, generate_body(Request(0, 0, (1,), GREEDY), "r") | {"inputs": [1]}],
        ["POST", "/generate", {}, {"input_ids": [1], "sampling_params": {"max_tokens": 1}}],
        ["POST", "/flush_cache", {"patience": "1"}, {}],
        ["POST", "/get_weight_version", {}, {}],
        ["POST", "/update_weight_version", {}, {"new_version": 3}],
    ]
    _, env = DIALECT.command(spec(tmp_path, python=python))
    done = subprocess.run(
        [str(python), str(Path(__file__).parent / "sglang_contract.py")],
        input=json.dumps([*recorder.calls, *broken]),
        env=os.environ | env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *faults, last = done.stdout.splitlines()
    assert last == "checked"
    assert [fault.partition(":")[0] for fault in faults] == [f"{call[0]} {call[1]}" for call in broken], faults


def test_a_bucket_can_be_unpickled_by_the_server(tmp_path: Path) -> None:
    """Its unpickler admits few classes, and a refusal kills the server."""
    python = python_of("sglang")
    flat = torch.cat([torch.arange(6.0), torch.arange(4.0) + 10]).view(torch.uint8)
    (tmp_path / "payload").write_bytes(share(DIALECT.shared_object(MANIFEST, flat)))
    code = """
import sys
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
import torch
torch.multiprocessing.set_sharing_strategy("file_system")
bucket = MultiprocessingSerializer.deserialize(open(sys.argv[1], "rb").read())
bucket = FlattenedTensorBucket(flattened_tensor=bucket["flattened_tensor"], metadata=bucket["metadata"])
print({name: tensor.tolist() for name, tensor in bucket.reconstruct_tensors()})
"""
    _, env = DIALECT.command(spec(tmp_path, python=python))
    done = subprocess.run(
        [str(python), "-c", code, str(tmp_path / "payload")],
        env=os.environ | env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = {"a": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], "b": [10.0, 11.0, 12.0, 13.0]}
    assert done.stdout.splitlines()[-1] == str(expected)


def spec(folder: Path, **changes: Any) -> LaunchSpec:
    options: dict[str, Any] = {
        "python": Path("python"),
        "model_dir": folder,
        "port": 1,
        "tp": 2,
        "dtype": "float32",
        "devices": (),
        "context_tokens": 64,
        "max_concurrency": 4,
        "kv_tokens": 64,
        "memory_fraction": 0.5,
        "colocated": False,
        "extra_args": ("--log-level", "info"),
    }
    return LaunchSpec(**(options | changes))


def test_the_command_leaves_room_for_what_the_server_reserves(tmp_path: Path) -> None:
    argv, env = DIALECT.command(spec(tmp_path))
    option = dict(zip(argv, argv[1:], strict=False))
    assert int(option["--context-length"]) > 64 and int(option["--max-total-tokens"]) > 64
    assert len(env["SGLANG_CPU_OMP_THREADS_BIND"].split("|")) == 2
    assert argv[-2:] == ["--log-level", "info"]  # argparse takes the last
    for flag, asked in {
        "--enable-return-routed-experts": "with_routes",
        "--enable-fp32-lm-head": "float32_logits",
    }.items():
        assert flag not in argv and flag in DIALECT.command(spec(tmp_path, **{asked: True}))[0]


def test_servers_that_repeat_are_told_so_where_they_can(tmp_path: Path) -> None:
    hf = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    said: dict[str, Any] = {}
    for engine, dialect in DIALECTS.items():
        with mock.patch.object(device, "visible_devices", lambda _: {}):
            said[engine] = [dialect().command(spec(tmp_path, devices=(0, 1), deterministic=on)) for on in (False, True)]
    (plain, _), (argv, _) = said["sglang"]
    assert [flag for flag in argv if flag not in plain] == ["--enable-deterministic-inference"]
    (_, plain), (_, env) = said["vllm"]
    assert dict(env.items() - plain.items()) == {"VLLM_BATCH_INVARIANT": "1"}
    with pytest.raises(EngineError, match="needs a GPU"):
        DIALECT.command(spec(tmp_path, deterministic=True))


def test_each_response_has_its_seed_in_every_run() -> None:
    from megatron_rl.rollout.servers import vllm

    def seed(prompt_id: int, sample_index: int, **sampling: int) -> int:
        wanted = Request(prompt_id, sample_index, (1, 2), dataclasses.replace(SAMPLED, **sampling))
        seeds = [generate_body(wanted, rid)["sampling_params"]["sampling_seed"] for rid in ("a", "b")]
        seeds += [vllm.generate_body(wanted, rid, seeded=True)["sampling_params"]["seed"] for rid in ("a", "b")]
        assert len(set(seeds)) == 1 and 0 <= seeds[0] < 2**63
        assert vllm.generate_body(wanted, "a")["sampling_params"]["seed"] is None
        return seeds[0]

    assert len({seed(0, 0), seed(1, 0), seed(0, 1), seed(0, 0, seed=1)}) == 4
    assert seed(3, 2) == 6500988549979002746  # as an earlier run had it


def test_vllm_is_told_of_a_float32_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_rl.rollout.servers.vllm import VLLM

    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 128})
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for asked in (True, False):
        argv, _ = VLLM().command(spec(tmp_path, devices=(0, 1), float32_logits=asked))
        assert ('{"head_dtype": "float32"}' in argv) == asked == ("--hf-overrides" in argv)


def test_a_server_on_gpus_sees_its_own_among_those_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    argv, env = DIALECT.command(spec(tmp_path, devices=(1, 2), colocated=True))
    assert env["CUDA_VISIBLE_DEVICES"] == "5,6" and "--enable-memory-saver" in argv and "cpu" not in argv
    assert env["PYTORCH_CUDA_ALLOC_CONF"] == env["PYTORCH_ALLOC_CONF"] == ""  # removed: no expandable segments
    with pytest.raises(UserError, match="GPU 3, and 3 are visible"):
        DIALECT.command(spec(tmp_path, devices=(2, 3)))


@pytest.mark.parametrize("engine", DIALECTS)
def test_a_cache_in_tokens_does_not_depend_on_what_is_free(tmp_path: Path, engine: str) -> None:
    """As a server starts the trainer holds part of the GPU, and the two engines read a fraction in their own ways."""
    hf = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    option = {}
    for kv_tokens in (None, 1000):
        launch = spec(tmp_path, devices=(0, 1), kv_tokens=kv_tokens)
        with mock.patch.object(device, "visible_devices", lambda _: {}):
            argv, _ = DIALECTS[engine]().command(launch)
        option[kv_tokens] = dict(zip(argv, argv[1:], strict=False))
    if engine == "sglang":  # which takes the smaller of the tokens and its fraction of what is free
        assert option[1000]["--max-total-tokens"] == "1000" and float(option[1000]["--mem-fraction-static"]) > 0.9
        assert "--max-total-tokens" not in option[None] and option[None]["--mem-fraction-static"] == "0.5"
    else:  # which then ignores its fraction; 1,024 tokens in blocks, 2 of 4 heads on each GPU, in float32
        assert option[1000]["--kv-cache-memory-bytes"] == str(2 * 3 * 2 * 16 * 4 * 1024)
        assert "--kv-cache-memory-bytes" not in option[None]


# --- answers that no healthy server gives -----------------------------------------------------------------------------


def test_spans_come_from_the_answer() -> None:
    spans = [{"version": "2", "start": 0, "end": 1}, {"version": "3", "start": 1, "end": 3}]
    got = complete(answered({"type": "length"}, ROWS, weight_versions=spans))
    assert got.token_ids == [4, 5, 6] and got.spans == ((2, 1), (3, 2))
    assert complete(answered({"type": "length"}, ROWS)).spans == ((3, 3),)
    assert complete(answered({"type": "abort"}, [])).spans == ()


def test_an_answer_of_broken_weights_is_none_of_the_policy() -> None:
    got = complete(answered({"type": "length"}, [[None, 4, None], *ROWS[1:]]))  # JSON's form of NaN
    assert math.isnan(got.logprobs[0])
    with pytest.raises(EngineError, match="NaN happened"):  # it puts a stop token there, which nobody sampled
        complete(answered({"type": "stop", "matched": "NaN happened"}, ROWS), SAMPLED)


def test_a_response_that_the_server_cut_short_is_refused() -> None:
    with pytest.raises(EngineError, match="2 of 3 tokens.*--context-length"):
        complete(answered({"type": "length"}, ROWS[:2]))


def test_every_refusal_in_an_answer_is_an_error() -> None:
    refused = {"success": False, "message": "no session"}
    paths = ("begin_weight_update", "update_weights_from_distributed", "update_weights_from_tensor")
    calls = (
        DIALECT.begin_update,
        lambda s: DIALECT.receive_broadcast(s, MANIFEST, "g"),
        lambda s: DIALECT.receive_shared(s, MANIFEST, [b""]),
    )
    for path, call in zip(paths, calls, strict=True):
        with pytest.raises(EngineError, match="no session"):
            say(Recorder(**{path: refused}), call)
    for path in ("end_weight_update", "update_weight_version"):
        with pytest.raises(EngineError, match="no session"):
            say(Recorder(**{path: refused}), lambda s: DIALECT.end_update(s, 1))
