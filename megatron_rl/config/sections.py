"""Every option: type, range, unit and meaning. A run is one YAML file plus `a.b=c` overrides.

`load_config` refuses unknown keys (naming the nearest known one) and layouts that cannot work, before any process
starts. The resolved copy is saved with the run. All config objects are frozen.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, GetPydanticSchema, model_validator

from megatron_rl.algorithms.methods import LossConfig
from megatron_rl.algorithms.methods.ppo_clip import PpoClipLoss
from megatron_rl.algorithms.section import (
    Float,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from megatron_rl.config.evaluation import EvalConfig
from megatron_rl.config.paths import PathText
from megatron_rl.config.reward import RewardConfig
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.models.keys import ConfigKeys

# contents of a config.json, the known keys typed
HfConfig = Annotated[dict[str, Any], GetPydanticSchema(lambda _, handler: handler(ConfigKeys))]


def _switch(value: Any) -> Any:
    """Return on and off as texts, which YAML 1.1 reads as truth values."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class ModelConfig(Section):
    """The policy: `path` (a Hugging Face folder with config.json and safetensors) or `hf_config` (random weights).

    With both, `hf_config` states the architecture where the folder is not, so that a recipe can be checked and planned
    anywhere; where the folder is, its config.json must agree.
    """

    path: PathText | None = None
    """Hugging Face model folder; its weights are the initial policy."""
    hf_config: HfConfig | None = None
    """Contents of a config.json; without `path` the weights are random, drawn from `seed`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of parameters and activations."""
    layers: Literal["auto", "transformer_engine", "torch"] = "auto"
    """Whose layers: Transformer Engine's, on a GPU alone, or Megatron's own with torch's attention and norms; auto:
    Transformer Engine's where it is installed on a GPU, else torch."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: of whole layers (full) or of `recompute_modules` (selective)."""
    recompute_method: Literal["uniform", "block"] | None = None
    """full: units of recompute_layers each, or that many layers of each model chunk; null: uniform."""
    recompute_layers: PositiveInt | None = None
    """full: the layers that recompute_method speaks of; null: 1."""
    recompute_modules: tuple[Literal["core_attn", "mlp", "moe"], ...] | None = Field(None, min_length=1)
    """selective: what is recomputed in every layer; null: core_attn."""
    logits_block_rows: PositiveInt | None = None
    """On a CPU, rows of logits that the vocabulary statistics treat at once; null: by cache."""
    fused_linear_stats: Annotated[Literal["off", "on", "auto"], BeforeValidator(_switch)] = "off"
    """on: never hold the logits, and compute them twice; auto: on where the planner finds no room for them in the
    device's memory."""

    logits_dtype: Literal["auto", "float32", "model"] = "auto"
    """float32: a bfloat16 model's output layer gives float32 logits, of twice the memory, because bfloat16's steps of
    0.06 nats and more hide the sign of logprobs - old_logprobs; model: bfloat16; auto: float32 where the
    log-probabilities of two policies are compared: several updates a step, a correction, a reference."""

    activations: Literal["auto", "model"] = "auto"
    """auto: on a CPU, what is between a bfloat16 model's products is float32, so that trainer and embedded engine agree
    to 1e-4 nats; model: bfloat16, as on a GPU."""

    megatron: dict[str, Any] = {}
    """Fields of Megatron's TransformerConfig by name, passed as they are: docs/models.md."""

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.path is None and self.hf_config is None:
            raise ValueError("set model.path, or model.hf_config for random weights")
        owners = {"recompute_method": "full", "recompute_layers": "full", "recompute_modules": "selective"}
        for name, owner in owners.items():
            if getattr(self, name) is not None and self.recompute != owner:
                raise ValueError(f"{name} does nothing with recompute={self.recompute}; remove it, or set {owner}")
        return self


class ParallelConfig(Section):
    """Process layout. The data-parallel size is world_size / (tp * pp * cp)."""

    world_size: PositiveInt | None = None
    """Processes, started if torchrun did not; null: tp * pp * cp."""
    tp: PositiveInt = 1
    """Tensor-parallel size."""
    pp: PositiveInt = 1
    """Pipeline-parallel size."""
    vpp: PositiveInt = 1
    """Virtual pipeline stages: model chunks that a pipeline rank interleaves."""
    cp: PositiveInt = 1
    """Context-parallel size: ranks that share each sequence's tokens."""
    ep: PositiveInt = 1
    """Expert-parallel size, a divisor of tp * cp * dp; 1: tp splits the experts."""
    sp: bool = False
    """Sequence parallelism inside the tensor-parallel group."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over data-parallel ranks."""
    timeout_seconds: PositiveFloat = 1800.0
    """Longest that ranks wait for what one of them computes, reads or writes alone, a checkpoint for instance; what
    they wait for engine servers comes on top, from rollout.server."""
    ddp: dict[str, Any] = {}
    """Fields of Megatron's DistributedDataParallelConfig by name, passed as they are: docs/models.md."""

    @property
    def processes(self) -> int:
        """Return the number of processes in the world."""
        return self.world_size or self.tp * self.pp * self.cp

    @property
    def dp(self) -> int:
        """Return the data-parallel size."""
        return self.processes // (self.tp * self.pp * self.cp)

    @property
    def token_multiple(self) -> int:
        """Return the number of tokens of which each micro-batch, over all context-parallel ranks, is padded to a
        multiple: each rank has two chunks of every sequence, and sequence parallelism splits what it has."""
        return self.cp * math.lcm(2 if self.cp > 1 else 1, self.tp if self.sp else 1)

    @property
    def micro_batch_multiple(self) -> int:
        """Return the number of which a mini-batch has a multiple of micro-batches: interleaved chunks go through in
        groups of pp."""
        return self.pp if self.vpp > 1 else 1


class CountdownData(Section):
    """The countdown game of reasoning-gym: reach a target from given numbers with + - * /. Character tokenizer."""

    type: Literal["countdown"] = "countdown"
    num_numbers: Int = Field(3, ge=2, le=6)
    """Numbers per problem."""
    max_number: PositiveInt = 9
    """Largest given number."""
    max_target: PositiveInt = 50
    """Largest target."""
    num_train: PositiveInt = 4096
    """Training problems."""
    num_eval: NonNegativeInt = 256
    """Held-out problems."""
    max_prompt_tokens: PositiveInt = 32
    """A longer prompt is an error."""


class JsonlData(Section):
    """A file of problems: JSON lines or Parquet, see docs/data.md; prompts are rendered by the tokenizer's chat
    template when it has one."""

    type: Literal["jsonl"] = "jsonl"
    train_path: PathText
    """File of the training problems."""
    eval_path: PathText | None = None
    """File of the held-out problems."""
    tokenizer: PathText | None = None
    """Hugging Face tokenizer folder; null: model.path."""
    system_prompt: str | None = None
    """System message, where a row has no `system` of its own."""
    suffix: str = ""
    """Appended to each problem that has no `suffix` of its own."""
    max_prompt_tokens: PositiveInt = 2048
    """Longer prompts are dealt with by `overlong_prompts`."""
    overlong_prompts: Literal["error", "drop"] = "error"
    """What a prompt above max_prompt_tokens is: an error, or dropped, counted and logged."""


class DynamicSamplingConfig(Section):
    """DAPO's dynamic sampling: groups whose rewards are all equal carry no gradient; drop and refill them."""

    enabled: bool = False
    """Whether such groups are dropped and refilled."""
    max_batches: PositiveInt = 10
    """Generation batches per step before the run stops with an error."""


class OverlongConfig(Section):
    """Responses cut at the length limit (arXiv 2503.14476, section 3.4)."""

    filter: bool = False
    """Mask the loss of responses that were cut."""
    penalty_buffer: NonNegativeInt = 0
    """Tokens before the limit over which the penalty grows; 0: none."""
    penalty_factor: NonNegativeFloat = 1.0
    """Penalty at the limit, in reward units."""


class AlgorithmConfig(Section):
    """From rewards to advantages."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "qae"] = "grpo"
    """How the rewards of a prompt's responses become advantages."""
    qae_quantile: Float = Field(0.4, gt=0, lt=1)
    """qae: the quantile of the group's rewards that is the baseline, K in the paper."""
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    """Which groups of a step are drawn again."""
    overlong: OverlongConfig = OverlongConfig()
    """What becomes of responses at the length limit."""
    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    """Log-probabilities of the old policy: recompute: a forward pass with the weights at the start of the step;
    rollout: those that the engine reported, without a pass; what it changes: docs/algorithms.md."""
    old_logprobs_check_every: PositiveInt = 10
    """rollout: of so many steps the first recomputes them too, to measure how far the engine's are from them."""
    max_mismatch: PositiveFloat | None = None
    """rollout: the mean difference of the two, nats per token, at which the run ends before it updates; null: 1e-3 in
    float32, 0.05 in bfloat16."""

    def recomputes(self, step: int) -> bool:
        """Return whether this step pays the forward pass of the old log-probabilities."""
        return self.old_logprobs == "recompute" or step % self.old_logprobs_check_every == 0


DataConfig = Annotated[CountdownData | JsonlData, Field(discriminator="type", description="The problems.")]


class OptimizerConfig(Section):
    """Adam as Megatron-Core runs it."""

    lr: NonNegativeFloat = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after warm-up, in each of a step's updates; linear and cosine end at 0 after
    num_steps."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer updates of linear warm-up, of which a step has train.prompts_per_step / prompts_per_minibatch; a run
    that goes on with other batch sizes keeps the steps that these were."""
    beta1: Float = Field(0.9, ge=0, lt=1)
    """Decay of Adam's mean of the gradient, per update."""
    beta2: Float = Field(0.999, ge=0, lt=1)
    """Decay of Adam's mean of the squared gradient, per update."""
    eps: PositiveFloat = 1e-8
    """Added to the root of that mean before it divides."""
    weight_decay: NonNegativeFloat = 0.0
    """Each update takes lr * weight_decay of a weight away, apart from the gradient."""
    clip_grad: NonNegativeFloat = 1.0
    """Global gradient norm; 0: off."""
    cpu_offload: bool = False
    """Adam's moments are kept, and its update is computed, on the host; a GPU keeps the weights."""


class WarmStartConfig(Section):
    """Supervised steps on the task's own solutions before RL; cached by the hash of everything they depend on."""

    steps: PositiveInt = 300
    """Optimizer updates."""
    batch_size: PositiveInt = 128
    """Sequences per update."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate; it falls linearly to 0."""
    cache_dir: PathText = "runs/warm_start"
    """Where the warmed weights are kept, in Hugging Face format."""


class TrainConfig(Section):
    """The RL loop."""

    num_steps: PositiveInt = 100
    """RL steps (one generation phase each)."""
    prompts_per_step: PositiveInt = 32
    """Prompts whose groups form one step."""
    prompts_per_minibatch: PositiveInt = 8
    """Prompts per optimizer update."""
    micro_batch_tokens: PositiveInt = 4096
    """Token budget of one packed micro-batch, over its context-parallel ranks together."""
    share_prompts: Literal["auto"] | bool = "auto"
    """Compute a prompt once for the samples of its group that meet in a micro-batch, and no tokens that predict
    nothing; exact; auto: where it works, on a CPU with parallel.cp=1 and without rollout.routing_replay."""
    deterministic: bool = False
    """On a GPU, no kernel whose sums depend on the order of threads, and NCCL's rings alone: slower, and a resumed run
    repeats the trainer's bits. A CPU always does so."""
    max_nonfinite_updates: NonNegativeInt = 3
    """Updates in a row with a non-finite gradient that are skipped and counted before the run ends."""
    entropy_probe: bool = True
    """One extra forward of the first mini-batch after the updates: realised entropy change."""
    entropy_tangent: bool = False
    """One extra forward and backward of the first mini-batch before the updates: the entropy change that their real
    movement of the weights predicts to first order."""
    entropy_tangent_every: NonNegativeInt = 0
    """In each so many steps two extra forward and backward passes of the first mini-batch after the updates, on the way
    of their movement of the weights: the entropy change that it predicts to fourth order; 0: never."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations; 0: never."""
    eval_samples: PositiveInt = 1
    """Samples per held-out prompt."""
    eval_temperature: NonNegativeFloat = 1.0
    """Divides the logits of the evaluation's samples; 0 is greedy."""
    save_every: NonNegativeInt = 0
    """Steps between checkpoints; 0: only at a stop or at the end."""
    save_final: bool = True
    """Save a checkpoint after the last step."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept; the disk needs room for one more."""
    keep_best: bool = False
    """Save at every new best eval/accuracy (eval/average without held-out problems), and keep the best."""
    async_save: bool = False
    """Write in a background process; complete ones count, as always."""
    save_hf: bool = False
    """Write the final model to run_dir/hf, in Hugging Face format."""
    resume: PathText = "auto"
    """auto: from the run's newest; never; or a checkpoint folder to start from."""
    grace_seconds: NonNegativeFloat = 10.0
    """From Ctrl-C or SIGTERM to the kill: time to reach a step's end and save."""


class LoggingConfig(Section):
    """Where numbers go; metrics.jsonl is always written."""

    run_dir: PathText = "runs/{name}"
    """Folder of the run; {name} is replaced."""
    tensorboard: bool = True
    """Event files under run_dir/tensorboard."""
    wandb_project: str | None = None
    """W&B project; needs the extra `wandb`; WANDB_MODE=offline works."""
    samples_per_step: NonNegativeInt = 4
    """Decoded rollouts kept per step in samples.jsonl."""
    ledger_every: NonNegativeInt = 1
    """Steps between entries of ledger.jsonl, which says which tokens spent the entropy; 0: never."""


class Config(Section):
    """A whole run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$")
    """Names the run folder."""
    seed: NonNegativeInt = 1
    """Seed of initial weights, data order and sampling."""
    model: ModelConfig
    """The policy."""
    parallel: ParallelConfig = ParallelConfig()
    """How processes share the model and the data."""
    data: DataConfig
    """The problems."""
    rollout: RolloutConfig = RolloutConfig()
    """How responses are sampled, and by which engine."""
    reward: RewardConfig = RewardConfig()
    """What a response earns."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """From rewards to advantages."""
    loss: LossConfig = PpoClipLoss()
    """The policy loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Adam and its learning rate."""
    warm_start: WarmStartConfig | None = None
    """Supervised steps before RL; null: none."""
    train: TrainConfig = TrainConfig()
    """The loop: steps, batches, evaluations, checkpoints."""
    eval: EvalConfig = EvalConfig()
    """Which benchmarks are evaluated, and how."""
    logging: LoggingConfig = LoggingConfig()
    """Where numbers go."""

    @property
    def run_dir(self) -> Path:
        """Return the folder of the run."""
        return Path(self.logging.run_dir.format(name=self.name))

    @property
    def minibatches_per_step(self) -> int:
        """Return the number of optimizer updates in one RL step."""
        return self.train.prompts_per_step // self.train.prompts_per_minibatch

    @property
    def float32_logits(self) -> bool:
        """Return whether the output layer of a bfloat16 model gives float32, in the trainer and in its engines."""
        loss, chosen = self.loss, self.model.logits_dtype
        # with one update a step, recomputed and current log-probabilities are the same bits: every ratio is 1
        compares = self.minibatches_per_step > 1 or loss.rollout_correction is not None or loss.ref_kl_coef > 0
        compares |= self.algorithm.old_logprobs == "rollout"
        return self.model.dtype == "bfloat16" and (chosen == "float32" or (chosen == "auto" and compares))

    @property
    def max_sequence_tokens(self) -> int:
        """Return the tokens of the longest sequence, prompt and response."""
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens
