"""SGLang's HTTP interface, as of 0.5.23. Source: sglang.srt.entrypoints.http_server and managers.io_struct."""

import base64
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from megatron_rl import device, launch
from megatron_rl.errors import UserError
from megatron_rl.models.facts import read_config_json
from megatron_rl.rollout.clocks import CONTROL_SECONDS, HEALTH_SECONDS, LOAD_SECONDS
from megatron_rl.rollout.engine import EngineError, Request
from megatron_rl.rollout.servers.answers import seed_of
from megatron_rl.rollout.servers.checksums import Checksums
from megatron_rl.rollout.servers.http import Server
from megatron_rl.rollout.servers.protocol import Completion, Dialect, LaunchSpec, Manifest

_SHIMS = Path(__file__).parent / "shims" / "sglang"
_NO_LIMIT = 0.95  # of free memory
_IDLE_SECONDS = 30  # for requests that end to have ended
_INITIAL_VERSION = "default"  # what a server that never got weights reports
# A server keeps this many positions of --context-length, and of its cache, for itself: it refuses a longer prompt, and
# ends a response early without saying so. Source: `get_worker_info` of managers.tp_worker, and of the scheduler the
# limit of max_new_tokens.
_RESERVED_TOKENS = 8
# Source: `stacked_params_mapping` and `make_expert_params_mapping` of sglang.srt.models and layers.moe
_MERGED = (
    (r"\b[qkv]_proj\b", "qkv_proj"),
    (r"\bexperts\.\d+\.(gate|up)_proj\.", "experts.w13_"),
    (r"\bexperts\.\d+\.down_proj\.", "experts.w2_"),
    (r"\b(gate|up)_proj\b", "gate_up_proj"),
)


class SGLang(Dialect):
    """Speaks to an SGLang server."""

    name = "sglang"

    @override
    def command(self, spec: LaunchSpec) -> tuple[list[str], dict[str, str]]:
        longest = spec.context_tokens + _RESERVED_TOKENS
        argv = [str(spec.python), "-m", "sglang.launch_server", "--model-path", str(spec.model_dir)]
        argv += ["--load-format", "dummy", "--skip-tokenizer-init", "--dtype", spec.dtype]
        argv += ["--host", spec.host, "--port", str(spec.port), "--tp-size", str(spec.tp)]
        argv += ["--context-length", str(longest), "--max-running-requests", str(spec.max_concurrency)]
        argv += ["--skip-server-warmup", "--log-level", "warning"]
        argv += ["--enable-return-routed-experts"] if spec.with_routes else []
        argv += ["--max-total-tokens", str(max(spec.kv_tokens, longest))] if spec.kv_tokens else []
        argv += ["--enable-deterministic-inference"] if spec.deterministic else []
        argv += ["--enable-fp32-lm-head"] if spec.float32_logits else []
        argv += ["--api-key", spec.key] if spec.key else []
        env = {
            "HF_HUB_OFFLINE": "1",
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # the reserved positions are never computed
            "SGL_FORCE_SHUTDOWN": "1",  # SIGTERM waits for no request
        }
        if spec.devices:
            # SGLang takes a fraction of what it finds free, and its cache is the smaller of that and the tokens
            argv += ["--mem-fraction-static", str(_NO_LIMIT if spec.kv_tokens else spec.memory_fraction)]
            argv += ["--enable-memory-saver"] if spec.colocated else []
            env |= device.visible_devices(spec.devices)
        else:
            if spec.deterministic:
                raise EngineError(
                    "rollout.server.deterministic=true: SGLang draws from seeds in its batch-invariant mode alone, "
                    "which needs a GPU; set it to false, or rollout.engine to vllm or transformers"
                )
            argv += ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
            argv += ["--mem-fraction-static", "0.8"]
            cores = launch.cpu_cores()
            env |= {
                # glibc keeps freed memory for the next weight bucket, whose fresh pages cost as much as its way here
                "MALLOC_MMAP_MAX_": "0",
                "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
                "OMP_NUM_THREADS": "1",
                "SGLANG_USE_CPU_ENGINE": "1",
                "PYTHONPATH": str(_SHIMS),
                "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(cores[i % len(cores)]) for i in range(spec.tp)),
            }
        return [*argv, *spec.extra_args], env

    @override
    async def health(self, server: Server, seconds: float = HEALTH_SECONDS) -> None:
        """Ask /model_info: the server answers once its model is loaded, and ends itself when one of its workers dies.

        Not /health, which makes a server that someone else started sample a token, and so fails during a pause.
        """
        await server.get("/model_info", seconds=seconds)

    @override
    async def settle_in(self, server: Server) -> None:
        """Exempt the objects made so far from garbage collection: each flush collects garbage, which then takes 0.25 s
        less."""
        await server.post("/freeze_gc", seconds=CONTROL_SECONDS)

    @override
    async def generate(self, server: Server, request: Request, rid: str, *, seconds: float) -> Completion:
        answer = await server.post("/generate", generate_body(request, rid), seconds=seconds)
        meta = answer["meta_info"]
        reason = meta["finish_reason"]
        if isinstance(reason.get("matched"), str):  # no stop strings are asked for
            raise EngineError(f"{server.url}/generate: the server reports {reason}; the weights may have diverged")
        rows = meta["output_token_logprobs"]  # [logprob, token id, text]
        if reason["type"] == "length" and len(rows) < request.sampling.max_response_tokens:
            wanted = request.sampling.max_response_tokens
            raise EngineError(
                f"{server.url} ended a response after {len(rows)} of {wanted} tokens: its context or its cache is too "
                f"short; start it with --context-length {len(request.token_ids) + wanted + _RESERVED_TOKENS} or more"
            )
        spans = [(_version(span["version"]), span["end"] - span["start"]) for span in meta.get("weight_versions") or ()]
        if not spans and rows:
            spans = [(_version(meta["weight_version"]), len(rows))]
        # JSON has no NaN
        logprobs = [math.nan if row[0] is None else row[0] for row in rows]
        routes = meta.get("routed_experts")  # int32; SGLang keeps them with the key-value entries
        routes = torch.frombuffer(bytearray(base64.b64decode(routes)), dtype=torch.int32) if routes else None
        cached = meta.get("cached_tokens") or 0
        return Completion([row[1] for row in rows], logprobs, reason["type"], tuple(spans), routes, cached)

    @override
    async def abort(self, server: Server, rid: str) -> None:
        await server.post("/abort_request", {"rid": _whole(rid)}, seconds=CONTROL_SECONDS)

    @override
    async def pause(self, server: Server) -> None:
        """Stop decoding; requests give up their cache and are computed anew, so that none mixes entries of two
        models."""
        await server.post("/pause_generation", {"mode": "retract"}, seconds=CONTROL_SECONDS)

    @override
    async def resume(self, server: Server) -> None:
        await server.post("/continue_generation", {}, seconds=CONTROL_SECONDS)

    @override
    async def flush(self, server: Server) -> None:
        """Forget all key-value entries, without SGLang's `timeout`: it would wait for requests that a pause holds
        back."""
        await server.post("/flush_cache", {}, seconds=CONTROL_SECONDS)

    @override
    async def sleep(self, server: Server) -> None:
        """Wait until no request runs, then give the memory back: SGLang dies when it sleeps with requests.

        Raises: ServerRefused when requests have not ended after 30 s.
        """
        await server.post("/flush_cache", {}, seconds=CONTROL_SECONDS, timeout=str(_IDLE_SECONDS))
        await server.post("/release_memory_occupation", {}, seconds=CONTROL_SECONDS)

    @override
    async def wake(self, server: Server) -> None:
        await server.post("/resume_memory_occupation", {}, seconds=CONTROL_SECONDS)

    @override
    async def hf_config(self, server: Server) -> dict[str, Any]:
        """Read config.json in the folder that the server was started from: it names the folder, not its contents.

        Not /model_info, which names the folder of the last `load_folder`: that one may be gone.
        """
        path = (await server.get("/server_info", seconds=CONTROL_SECONDS))["model_path"]
        try:
            return read_config_json(Path(path))
        except UserError as error:
            raise EngineError(
                f"{server.url} serves {path}, whose config.json cannot be read here, and a weight of a wrong shape "
                "would kill it; start it from a folder that the trainer sees under the same path"
            ) from error

    @override
    async def weight_version(self, server: Server) -> int:
        return _version((await server.get("/model_info", seconds=CONTROL_SECONDS))["weight_version"])

    @override
    async def num_workers(self, server: Server) -> int:
        return int((await server.get("/server_info", seconds=CONTROL_SECONDS))["tp_size"])

    @override
    async def capacity(self, server: Server) -> int:
        info = await server.get("/server_info", seconds=CONTROL_SECONDS)
        return int(info["max_total_num_tokens"]) * int(info["dp_size"])

    @override
    async def open_group(
        self, server: Server, *, host: str, port: int, rank_offset: int, world_size: int, name: str, backend: str
    ) -> None:
        body = {"master_address": host, "master_port": port, "rank_offset": rank_offset, "world_size": world_size}
        await _checked(server, "/init_weights_update_group", body | {"group_name": name, "backend": backend})

    @override
    async def close_group(self, server: Server, name: str) -> None:
        await _checked(server, "/destroy_weights_update_group", {"group_name": name})

    @override
    async def begin_update(self, server: Server) -> None:
        await _checked(server, "/begin_weight_update", {})

    @override
    async def receive_broadcast(self, server: Server, manifest: Manifest, group: str) -> None:
        body = {"names": manifest.names, "dtypes": manifest.dtypes, "shapes": manifest.shapes, "group_name": group}
        body |= {"load_format": "flattened_bucket", "flush_cache": False}
        await _checked(server, "/update_weights_from_distributed", body)

    @override
    def shared_object(self, manifest: Manifest, flat: Tensor) -> Any:
        """Return SGLang's flat bucket: it reads the metadata by attribute, and its unpickler admits SimpleNamespace."""
        metadata, start = [], 0
        for name, shape, dtype in zip(manifest.names, manifest.shapes, manifest.dtypes, strict=True):
            kind: torch.dtype = getattr(torch, dtype)
            count = torch.Size(shape).numel() * kind.itemsize
            metadata.append(
                SimpleNamespace(
                    name=name, shape=torch.Size(shape), dtype=kind, start_idx=start, end_idx=start + count, numel=count
                )
            )
            start += count
        return {"flattened_tensor": flat, "metadata": metadata}

    @override
    async def receive_shared(self, server: Server, manifest: Manifest, payloads: list[bytes]) -> None:
        body = {"serialized_named_tensors": [base64.b64encode(payload).decode() for payload in payloads]}
        await _checked(
            server, "/update_weights_from_tensor", body | {"load_format": "flattened_bucket", "flush_cache": False}
        )

    @override
    async def load_folder(self, server: Server, path: Path, weight_version: int) -> None:
        body = {"model_path": str(path), "load_format": "auto", "weight_version": str(weight_version)}
        await _checked(server, "/update_weights_from_disk", body)

    @override
    def parameter_of(self, name: str) -> str:
        for pattern, merged in _MERGED:
            name = re.sub(pattern, merged, name)
        return name

    @override
    async def checksums(self, server: Server) -> Checksums:
        """Return hashes of the bytes of each worker's shards, in SGLang's layout: SHA-256 on a CPU, one of its own on a
        GPU. Source: `tensor_hash` of sglang.srt.managers.mm_utils."""
        answer = await _checked(server, "/weights_checker", {"action": "checksum", "selector": "target"})
        return [rank["checksums"] for rank in answer["ranks"]]

    @override
    async def end_update(self, server: Server, weight_version: int) -> None:
        await _checked(server, "/end_weight_update", {})
        body = {"new_version": str(weight_version), "abort_all_requests": False}
        await _checked(server, "/update_weight_version", body)


def generate_body(request: Request, rid: str) -> dict[str, Any]:
    """Return the body of POST /generate. SGLang ignores unknown fields in silence, except among the sampling
    parameters."""
    sampling = request.sampling
    return {
        "rid": _whole(rid),
        "input_ids": list(request.token_ids),
        "return_logprob": True,
        "return_routed_experts": request.with_routes,
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "max_new_tokens": sampling.max_response_tokens,
            "sampling_seed": seed_of(request),  # heeded under --enable-deterministic-inference alone
            "stop_token_ids": list(sampling.stop_token_ids) or None,
            # it overrules stop_token_ids too, so that an end-of-sequence token in the server's config.json also ends
            # a response: servers that the run starts have none there
            "ignore_eos": not sampling.stop_token_ids,
        },
    }


def _whole(rid: str) -> str:
    """Return a name that begins no other: SGLang aborts all requests that begin with a name, so 1-2 would end 1-20."""
    return f"{rid}."


async def _checked(server: Server, path: str, body: dict[str, Any]) -> Any:
    answer = await server.post(path, body, seconds=LOAD_SECONDS)
    if isinstance(answer, dict) and not answer.get("success", True):
        raise EngineError(f"{server.url}{path}: {answer.get('message', json.dumps(answer))}")
    return answer


def _version(text: str) -> int:
    return -1 if text == _INITIAL_VERSION else int(text)
