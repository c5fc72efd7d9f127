"""How rollouts are sampled, by which engine, and how it gets the policy's weights."""

from typing import Literal

from megatron_rl.algorithms.section import (
    Fraction,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from megatron_rl.config.paths import PathText


class ServerConfig(Section):
    """Engine servers, for engine sglang or vllm."""

    urls: tuple[str, ...] = ()
    """Servers to use, as http://node1:30000; empty: the run starts some."""
    count: PositiveInt = 1
    """Servers that the run starts on each node."""
    tp: PositiveInt = 1
    """Tensor-parallel size of each server that the run starts."""
    python: PathText | None = None
    """Interpreter with the engine; null: this one if it has it, else .engines/ENGINE/bin/python."""
    max_concurrency: PositiveInt = 64
    """Requests in flight per server."""
    kv_tokens: PositiveInt | None = None
    """Key-value cache of a server, tokens; null: 16384 on a CPU, on a GPU by memory_fraction."""
    memory_fraction: Fraction = 0.6
    """Fraction of a GPU's memory for a server's weights and key-value cache. On the trainer's GPUs the planner turns it
    into tokens, so that a server's cache does not depend on what the trainer holds when it starts."""
    share_memory: bool = False
    """Servers and trainer take turns with the GPUs: the servers' memory is released while training, gradients and
    optimizer state move to the host while generating."""
    start_seconds: PositiveFloat = 900.0
    """Time that a server may take from its start until it is healthy."""
    request_seconds: PositiveFloat = 1800.0
    """Deadline of one response, retries included."""
    deterministic: bool = False
    """Each response is drawn from a seed of its own and computed alike in every batch, slower, so that two runs sample
    the same tokens where the engine can do so (docs/engines.md); train --check says where it cannot."""
    max_failures: NonNegativeInt = 3
    """Restarts of dead servers in a run before it ends."""
    extra_args: tuple[str, ...] = ()
    """Appended to the command line of each server."""


class WeightSyncConfig(Section):
    """The way of the policy's weights into the servers."""

    mode: Literal["colocated", "disaggregated", "disk"] = "colocated"
    """colocated: memory shared on one machine; disaggregated: broadcast through a process group; disk: a Hugging Face
    folder that trainer and servers see."""
    bucket_mib: PositiveInt = 512
    """Weights are sent in buckets of at most this many MiB."""
    host: str | None = None
    """disaggregated: the trainer's address for the servers; null: found from the route to them."""
    folder: PathText | None = None
    """disk: the folder through which the weights go; null: run_dir/engine_weights."""
    checksums: bool = True
    """After each update the weights that the servers hold are compared with those sent, by checksums: a bucket that was
    lost is an error. On a CPU this reads each weight twice more; on GPUs it was not measured."""
    max_probe_error: PositiveFloat | None = None
    """After each update a fixed prompt's log-probabilities, the servers' against the trainer's, may differ by this on
    average (nats); null: 1e-3 in float32, 0.1 in bfloat16."""


class RolloutConfig(Section):
    """Sampling of the training rollouts."""

    engine: Literal["transformers", "sglang", "vllm"] = "transformers"
    """transformers: embedded, each rank generates its share; sglang, vllm: servers."""
    samples_per_prompt: PositiveInt = 8
    """Responses to each prompt, which the advantage estimators compare."""
    temperature: PositiveFloat = 1.0
    """Divides the logits, in the trainer too."""
    top_p: Fraction = 1.0
    """Nucleus mass; 1 keeps all tokens."""
    top_k: NonNegativeInt = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    max_response_tokens: PositiveInt = 1024
    """A response is cut here (finish_reason length)."""
    stop_token_ids: tuple[Int, ...] | None = None
    """Tokens of which each ends a response; null: the tokenizer's end-of-sequence token and all that the model's
    generation_config.json names; []: none."""
    batch_size: PositiveInt = 256
    """Embedded engine: sequences decoded together on one rank."""
    max_staleness: NonNegativeInt = 0
    """Steps by which the weights that began a response may be older than those it trains; above 0 the next steps'
    responses are generated during training."""
    oversample: NonNegativeFloat | Literal["auto"] = "auto"
    """Dynamic sampling: prompts drawn beyond those of which train.prompts_per_step are kept on average, as a fraction
    of it; auto: none. What is not needed is ended, and drawn again."""
    routing_replay: bool = False
    """Mixture of experts: the engine reports the experts that it routed each token to, and the policy's forward passes
    take the same (R3); a response that a weight update interrupted has those of its last weights."""
    server: ServerConfig = ServerConfig()
    """Engine servers, for engine sglang or vllm."""
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    """The way of the policy's weights into the servers."""

    @property
    def is_embedded(self) -> bool:
        """Return whether each trainer process generates its own share, without servers."""
        return self.engine == "transformers"

    @property
    def shares_devices(self) -> bool:
        """Return whether the run starts servers on the devices of its trainer."""
        return not self.is_embedded and not self.server.urls and self.weight_sync.mode == "colocated"
