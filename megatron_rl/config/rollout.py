"""How rollouts are sampled, by which engine, and how it gets the policy's weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_rl.config.section import Fraction, NonNegativeInt, PositiveInt, Section

Seconds = Annotated[float, Field(gt=0)]


class ServerConfig(Section):
    """Engine servers, for engine sglang or vllm."""

    urls: tuple[str, ...] = Field((), description="servers to use, as http://node1:30000; empty: the run starts some")
    count: PositiveInt = Field(1, description="servers that the run starts on each node")
    tp: PositiveInt = Field(1, description="tensor-parallel size of each server that the run starts")
    python: str | None = Field(
        None, description="interpreter with the engine; null: this one if it has it, else .engines/ENGINE/bin/python"
    )
    max_concurrency: PositiveInt = Field(64, description="requests in flight per server")
    kv_tokens: PositiveInt = Field(16384, description="key-value cache of a server on a CPU, tokens")
    memory_fraction: Fraction = Field(0.6, description="of a GPU's memory, for a server's weights and key-value cache")
    share_memory: bool = Field(
        False,
        description="servers and trainer take turns with the GPUs: the servers' memory is released while training, "
        "gradients and optimizer state move to the host while generating",
    )
    start_seconds: Seconds = Field(900.0, description="from start to healthy")
    request_seconds: Seconds = Field(1800.0, description="deadline of one response, retries included")
    max_failures: NonNegativeInt = Field(3, description="restarts of dead servers in a run before it ends")
    extra_args: tuple[str, ...] = Field((), description="appended to the command line of each server")


class WeightSyncConfig(Section):
    """The way of the policy's weights into the servers."""

    mode: Literal["colocated", "disaggregated", "disk"] = Field(
        "colocated",
        description="colocated: memory shared on one machine; disaggregated: broadcast through a process group; disk: "
        "a Hugging Face folder that trainer and servers see",
    )
    bucket_mib: PositiveInt = Field(512, description="weights are sent in buckets of at most this many MiB")
    host: str | None = Field(
        None, description="disaggregated: the trainer's address for the servers; null: found from the route to them"
    )
    folder: str | None = Field(None, description="disk: where; null: run_dir/engine_weights")
    max_probe_error: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="after each update a fixed prompt's log-probabilities, the servers' against the trainer's, may "
        "differ by this on average (nats); null: 1e-3 in float32, 0.1 in bfloat16",
    )


class RolloutConfig(Section):
    """Sampling of the training rollouts."""

    engine: Literal["transformers", "sglang", "vllm"] = Field(
        "transformers", description="transformers: embedded, each rank generates its share; sglang, vllm: servers"
    )
    samples_per_prompt: PositiveInt = Field(8, description="n; the group of the advantage estimators")
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="divides the logits, in the trainer too")
    top_p: Fraction = Field(1.0, description="nucleus mass; 1 keeps all tokens")
    top_k: NonNegativeInt = Field(0, description="keep the k likeliest tokens; 0 keeps all")
    max_response_tokens: PositiveInt = Field(1024, description="a response is cut here (finish_reason length)")
    stop_token_ids: tuple[int, ...] | None = Field(
        None,
        description="each ends a response; null: the tokenizer's end-of-sequence token and all that the model's "
        "generation_config.json names",
    )
    batch_size: PositiveInt = Field(256, description="embedded engine: sequences decoded together on one rank")
    max_staleness: NonNegativeInt = Field(
        0,
        description="steps by which the weights that began a response may be older than those it trains; above 0 the "
        "next steps' responses are generated during training",
    )
    routing_replay: bool = Field(
        False,
        description="mixture of experts: the engine reports the experts that it routed each token to, and the policy's "
        "forward passes take the same (R3); a response that a weight update interrupted has those of its last weights",
    )
    server: ServerConfig = ServerConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
