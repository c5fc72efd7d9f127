"""vLLM's HTTP interface, as of 0.32, with a worker extension of ours (shims/vllm). Source:
vllm.entrypoints.scale_out.token_in_token_out, vllm.entrypoints.rl.online and vllm.entrypoints.serve.dev."""

import base64
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from megatron_rl import device, launch
from megatron_rl.models.facts import head_width, read_config_json
from megatron_rl.rollout.clocks import CONTROL_SECONDS, HEALTH_SECONDS, LOAD_SECONDS
from megatron_rl.rollout.engine import EngineError, Request
from megatron_rl.rollout.servers.answers import seed_of
from megatron_rl.rollout.servers.checksums import Checksums
from megatron_rl.rollout.servers.http import KEY_VARIABLE, Server
from megatron_rl.rollout.servers.protocol import Completion, Dialect, LaunchSpec, Manifest

_SHIMS = Path(__file__).parent / "shims" / "vllm"
# of vLLM's attention on a CPU: vllm.v1.attention.backends.cpu_attn, get_supported_head_sizes
_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
_LEAST_BATCH_TOKENS = 2048  # of one forward pass, as vLLM sets it
_INITIAL_VERSION = "default"  # what a server that never got weights reports


class VLLM(Dialect):
    """Speaks to a vLLM server."""

    name = "vllm"
    checksums_are_digests = True

    @override
    def command(self, spec: LaunchSpec) -> tuple[list[str], dict[str, str]]:
        argv = [str(spec.python), "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(spec.model_dir)]
        argv += ["--load-format", "dummy", "--dtype", spec.dtype, "--served-model-name", "policy"]
        argv += ["--host", spec.host, "--port", str(spec.port), "--tensor-parallel-size", str(spec.tp)]
        argv += ["--max-model-len", str(spec.context_tokens), "--max-num-seqs", str(spec.max_concurrency)]
        argv += ["--enable-scale-out", "--skip-tokenizer-init", "--logprobs-mode", "processed_logprobs"]
        argv += ["--enable-prompt-tokens-details"]
        argv += ["--hf-overrides", '{"head_dtype": "float32"}'] if spec.float32_logits else []
        argv += ["--worker-extension-cls", "megatron_rl_vllm.Extension"]
        argv += ["--weight-transfer-config", '{"backend": "megatron_rl"}', "--disable-uvicorn-access-log"]
        env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        env["PYTHONPATH"] = str(_SHIMS)
        hf = read_config_json(spec.model_dir)
        if spec.key:  # vLLM's own --api-key leaves the routes of the weights open
            argv += ["--middleware", "megatron_rl_key.KeyRequired"]
            env[KEY_VARIABLE] = spec.key
        if spec.devices:
            argv += ["--gpu-memory-utilization", str(spec.memory_fraction)]
            argv += ["--enable-sleep-mode"] if spec.colocated else []
            argv += ["--kv-cache-memory-bytes", str(_cache_bytes(hf, spec))] if spec.kv_tokens else []
            env |= device.visible_devices(spec.devices)
            env |= {"VLLM_BATCH_INVARIANT": "1"} if spec.deterministic else {}
        else:
            if spec.colocated:
                raise EngineError("rollout.server.share_memory=true: vLLM cannot sleep on a CPU; set it to false")
            cores = launch.cpu_cores()
            if head_width(hf) not in _CPU_HEAD_SIZES:
                raise EngineError(
                    f"rollout.engine=vllm on a CPU cannot serve heads of width {head_width(hf)}; it has "
                    f"{', '.join(map(str, _CPU_HEAD_SIZES))}. Change the model, or set rollout.engine=sglang"
                )
            if spec.deterministic:
                # on a CPU vLLM 0.32 dies when it computes a part of a seeded request's prompt: it rewinds the
                # generator, as a GPU's alone can be (`_bookkeeping_sync` of v1.worker.gpu_model_runner)
                longest = max(_LEAST_BATCH_TOKENS, spec.context_tokens)
                argv += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(longest)]
            argv += ["--enforce-eager", "--kv-cache-memory-bytes", str(_cache_bytes(hf, spec))]
            env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[i % len(cores)]) for i in range(spec.tp))
        return [*argv, *spec.extra_args], env

    @override
    async def health(self, server: Server, seconds: float = HEALTH_SECONDS) -> None:
        await server.get("/health", seconds=seconds)

    @override
    async def settle_in(self, server: Server) -> None:
        """Do nothing: vLLM needs no preparation."""

    @override
    async def generate(self, server: Server, request: Request, rid: str, *, seconds: float) -> Completion:
        answer = await server.post("/inference/v1/generate", generate_body(request, rid, self.seeded), seconds=seconds)
        choice = answer["choices"][0]
        tokens = choice["token_ids"] or []
        rows = (choice["logprobs"] or {"content": []})["content"]
        spans = [(_version(span["version"]), span["end"] - span["start"]) for span in choice["weight_versions"] or ()]
        cached = ((answer.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        logprobs = [row["logprob"] for row in rows]
        return Completion(tokens, logprobs, choice["finish_reason"], tuple(spans) or None, cached_tokens=cached)

    @override
    async def abort(self, server: Server, rid: str) -> None:
        await server.post("/abort_requests", {"request_ids": [rid]}, seconds=CONTROL_SECONDS)

    @override
    async def pause(self, server: Server) -> None:
        """Stop decoding; requests stay, and the flush that follows has them computed anew."""
        await server.post("/pause", seconds=CONTROL_SECONDS, mode="keep")

    @override
    async def resume(self, server: Server) -> None:
        await server.post("/resume", seconds=CONTROL_SECONDS)

    @override
    async def flush(self, server: Server) -> None:
        answer = await server.post("/reset_prefix_cache", seconds=CONTROL_SECONDS, reset_running_requests="true")
        if not answer["success"]:
            raise EngineError(f"{server.url} did not reset its prefix cache")

    @override
    async def sleep(self, server: Server) -> None:
        """Give the memory back; at level 2 vLLM keeps no copy of the weights either."""
        await server.post("/sleep", seconds=CONTROL_SECONDS, level="2")

    @override
    async def wake(self, server: Server) -> None:
        await server.post("/wake_up", seconds=CONTROL_SECONDS)

    @override
    async def hf_config(self, server: Server) -> dict[str, Any]:
        return (await _rpc(server, "megatron_rl_hf_config"))[0]

    @override
    async def weight_version(self, server: Server) -> int:
        return _version((await server.get("/weight_info", seconds=CONTROL_SECONDS))["weight_version"])

    @override
    async def num_workers(self, server: Server) -> int:
        return len(await _rpc(server, "megatron_rl_hf_config"))

    @override
    async def capacity(self, server: Server) -> int:
        """Return the tokens of as many requests of the greatest length as fit at once: vLLM counts in whole blocks."""
        metrics = str(await server.get("/metrics", seconds=CONTROL_SECONDS))
        tokens = re.findall(r'^vllm:cache_config_info{.*\bkv_cache_size_tokens="(\d+)"', metrics, re.MULTILINE)
        if not tokens:
            raise EngineError(
                f"{server.url}/metrics has no kv_cache_size_tokens; start the server without --disable-log-stats"
            )
        return sum(map(int, tokens))

    @override
    async def open_group(
        self, server: Server, *, host: str, port: int, rank_offset: int, world_size: int, name: str, backend: str
    ) -> None:
        info = {"host": host, "port": port, "rank_offset": rank_offset, "world_size": world_size}
        body = {"init_info": info | {"name": name, "backend": backend}}
        await server.post("/init_weight_transfer_engine", body, seconds=LOAD_SECONDS)

    @override
    async def close_group(self, server: Server, name: str) -> None:
        await server.post("/shutdown_weight_transfer_engine", seconds=CONTROL_SECONDS)

    @override
    async def begin_update(self, server: Server) -> None:
        await server.post("/start_weight_update", seconds=LOAD_SECONDS)

    @override
    async def receive_broadcast(self, server: Server, manifest: Manifest, group: str) -> None:
        await server.post("/update_weights", {"update_info": _bucket(manifest)}, seconds=LOAD_SECONDS)

    @override
    def shared_object(self, manifest: Manifest, flat: Tensor) -> Any:
        return flat

    @override
    async def receive_shared(self, server: Server, manifest: Manifest, payloads: list[bytes]) -> None:
        infos = [_bucket(manifest) | {"payload": base64.b64encode(payload).decode()} for payload in payloads]
        await server.post("/update_weights", {"update_info": infos}, seconds=LOAD_SECONDS)

    @override
    async def load_folder(self, server: Server, path: Path, weight_version: int) -> None:
        await _rpc(server, "megatron_rl_load_folder", path=str(path))
        body = {"new_version": str(weight_version)}
        await server.post("/update_weight_version", body, seconds=CONTROL_SECONDS)

    @override
    def parameter_of(self, name: str) -> str:
        return name

    @override
    async def checksums(self, server: Server) -> Checksums:
        """Return digests of what each worker's loader was given: on a CPU vLLM packs its parameters away."""
        return await _rpc(server, "megatron_rl_digests")

    @override
    async def end_update(self, server: Server, weight_version: int) -> None:
        body = {"weight_version": str(weight_version)}
        await server.post("/finish_weight_update", body, seconds=LOAD_SECONDS)


def generate_body(request: Request, rid: str, seeded: bool = False) -> dict[str, Any]:
    """Return the body of POST /inference/v1/generate. `seeded`: the seed goes along, which makes sampling slower."""
    sampling = request.sampling
    return {
        "request_id": rid,
        "token_ids": list(request.token_ids),
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_response_tokens,
            "seed": seed_of(request) if seeded else None,
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": True,  # of the server's config.json; stop_token_ids count all the same
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
        },
    }


async def _rpc(server: Server, method: str, **arguments: str) -> list[Any]:
    body = {"method": method, "kwargs": arguments, "timeout": LOAD_SECONDS}
    answer = await server.post("/collective_rpc", body, seconds=LOAD_SECONDS)
    return answer["results"]


def _bucket(manifest: Manifest) -> dict[str, Any]:
    return {"names": manifest.names, "shapes": manifest.shapes, "dtypes": manifest.dtypes}


def _cache_bytes(hf: dict[str, Any], spec: LaunchSpec) -> int:
    """Return the bytes of the keys and values of `kv_tokens` tokens on one worker, rounded up to vLLM's blocks of 128
    tokens."""
    heads = math.ceil((hf.get("num_key_value_heads") or hf["num_attention_heads"]) / spec.tp)
    itemsize = getattr(torch, spec.dtype).itemsize
    tokens = math.ceil((spec.kv_tokens or 0) / 128) * 128
    return 2 * hf["num_hidden_layers"] * heads * head_width(hf) * itemsize * tokens


def _version(text: str) -> int:
    return -1 if text == _INITIAL_VERSION else int(text)
