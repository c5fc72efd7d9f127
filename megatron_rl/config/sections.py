"""Every option: type, range, unit and meaning. A run is one YAML file plus `a.b=c` overrides.

`load_config` refuses unknown keys (naming the nearest known one) and layouts that cannot work, before any process
starts. The resolved copy is saved with the run. All config objects are frozen.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_rl.config.evaluation import EvalConfig
from megatron_rl.config.loss import LossConfig, PpoClipLoss
from megatron_rl.config.reward import RewardConfig
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.config.section import NonNegativeInt, PositiveInt, Section


class ModelConfig(Section):
    """The policy: `path` (a Hugging Face folder with config.json and safetensors) or `hf_config` (random weights).

    With both, `hf_config` states the architecture where the folder is not, so that a recipe can be checked and planned
    anywhere; where the folder is, its config.json must agree.
    """

    path: str | None = Field(None, description="Hugging Face model folder; its weights are the initial policy")
    hf_config: dict[str, Any] | None = Field(
        None, description="contents of a config.json; without `path` the weights are random, drawn from `seed`"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of parameters and activations")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activation recomputation: of whole layers (full) or of `recompute_modules` (selective)"
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        None, description="full: units of recompute_layers each, or that many layers of each model chunk; null: uniform"
    )
    recompute_layers: PositiveInt | None = Field(None, description="full: see recompute_method; null: 1")
    recompute_modules: tuple[Literal["core_attn", "mlp", "moe"], ...] | None = Field(
        None, min_length=1, description="selective: what is recomputed in every layer; null: core_attn"
    )
    logits_block_rows: PositiveInt | None = Field(
        None,
        description="on a CPU, rows of logits that the vocabulary statistics treat at once; null: by cache",
    )
    fused_linear_stats: Literal["off", "on", "auto"] = Field(
        "off",
        description="on: never hold the logits, and compute them twice; auto: on where the planner finds no room for "
        "them in the device's memory",
    )

    @model_validator(mode="after")
    def _has_source(self) -> ModelConfig:
        if self.path is None and self.hf_config is None:
            raise ValueError("set model.path, or model.hf_config for random weights")
        return self

    @model_validator(mode="after")
    def _recompute_options(self) -> ModelConfig:
        owners = {"recompute_method": "full", "recompute_layers": "full", "recompute_modules": "selective"}
        for name, owner in owners.items():
            if getattr(self, name) is not None and self.recompute != owner:
                raise ValueError(f"{name} does nothing with recompute={self.recompute}; remove it, or set {owner}")
        return self


class ParallelConfig(Section):
    """Process layout. The data-parallel size is world_size / (tp * pp * cp)."""

    world_size: PositiveInt | None = Field(
        None, description="processes, started if torchrun did not; null: tp * pp * cp"
    )
    tp: PositiveInt = Field(1, description="tensor-parallel size")
    pp: PositiveInt = Field(1, description="pipeline-parallel size")
    vpp: PositiveInt = Field(1, description="virtual pipeline stages: model chunks that a pipeline rank interleaves")
    cp: PositiveInt = Field(1, description="context-parallel size: ranks that share each sequence's tokens")
    ep: PositiveInt = Field(1, description="expert-parallel size, a divisor of tp * cp * dp; 1: tp splits the experts")
    sp: bool = Field(False, description="sequence parallelism inside the tensor-parallel group")
    distributed_optimizer: bool = Field(True, description="shard the optimizer state over data-parallel ranks")

    @property
    def processes(self) -> int:
        """Number of processes in the world."""
        return self.world_size or self.tp * self.pp * self.cp

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        return self.processes // (self.tp * self.pp * self.cp)

    @property
    def token_multiple(self) -> int:
        """Packing pads each micro-batch, over all context-parallel ranks, to a multiple of this many tokens: each rank
        has two chunks of every sequence, and sequence parallelism splits what it has."""
        return self.cp * math.lcm(2 if self.cp > 1 else 1, self.tp if self.sp else 1)

    @property
    def micro_batch_multiple(self) -> int:
        """A mini-batch has a multiple of this many micro-batches: interleaved chunks go through in groups of pp."""
        return self.pp if self.vpp > 1 else 1


class CountdownData(Section):
    """The countdown game of reasoning-gym: reach a target from given numbers with + - * /. Character tokenizer."""

    type: Literal["countdown"] = "countdown"
    num_numbers: Annotated[int, Field(ge=2, le=6)] = Field(3, description="numbers per problem")
    max_number: PositiveInt = Field(9, description="largest given number")
    max_target: PositiveInt = Field(50, description="largest target")
    num_train: PositiveInt = Field(4096, description="training problems")
    num_eval: NonNegativeInt = Field(256, description="held-out problems")
    max_prompt_tokens: PositiveInt = Field(32, description="a longer prompt is an error")


class JsonlData(Section):
    """JSON lines with `problem` and `answer`; the prompt is the tokenizer's chat template when it has one."""

    type: Literal["jsonl"] = "jsonl"
    train_path: str = Field(description="training problems")
    eval_path: str | None = Field(None, description="held-out problems")
    tokenizer: str | None = Field(None, description="Hugging Face tokenizer folder; null: model.path")
    system_prompt: str | None = Field(None, description="system message, where a row has no `system` of its own")
    suffix: str = Field("", description="appended to each problem that has no `suffix` of its own")
    max_prompt_tokens: PositiveInt = Field(2048, description="longer prompts are dealt with by `overlong_prompts`")
    overlong_prompts: Literal["error", "drop"] = Field("error", description="drop counts and logs what it drops")


class DynamicSamplingConfig(Section):
    """DAPO's dynamic sampling: groups whose rewards are all equal carry no gradient; drop and refill them."""

    enabled: bool = False
    max_batches: PositiveInt = Field(10, description="generation batches per step before the run stops with an error")


class OverlongConfig(Section):
    """Responses cut at the length limit (arXiv 2503.14476, section 3.4)."""

    filter: bool = Field(False, description="mask the loss of responses that were cut")
    penalty_buffer: NonNegativeInt = Field(
        0, description="tokens before the limit over which the penalty grows; 0: none"
    )
    penalty_factor: Annotated[float, Field(ge=0)] = Field(1.0, description="penalty at the limit, in reward units")


class AlgorithmConfig(Section):
    """From rewards to advantages."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "qae"] = Field("grpo", description="estimator")
    qae_quantile: Annotated[float, Field(gt=0, lt=1)] = Field(0.4, description="K of the quantile baseline")
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    overlong: OverlongConfig = OverlongConfig()


DataConfig = Annotated[CountdownData | JsonlData, Field(discriminator="type", description="problems")]


class OptimizerConfig(Section):
    """Adam as Megatron-Core runs it."""

    lr: Annotated[float, Field(ge=0)] = Field(1e-6, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="after warm-up, to 0 at num_steps, in each of a step's updates"
    )
    warmup_steps: NonNegativeInt = Field(
        0,
        description="optimizer updates of linear warm-up, of which a step has train.prompts_per_step / "
        "prompts_per_minibatch; a run that goes on with other batch sizes keeps the steps that these were",
    )
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_grad: Annotated[float, Field(ge=0)] = Field(1.0, description="global gradient norm; 0: off")
    cpu_offload: bool = Field(
        False, description="Adam's moments are kept, and its update is computed, on the host; a GPU keeps the weights"
    )


class WarmStartConfig(Section):
    """Supervised steps on the task's own solutions before RL; cached by the hash of everything they depend on."""

    steps: PositiveInt = Field(300, description="optimizer updates")
    batch_size: PositiveInt = Field(128, description="sequences per update")
    lr: Annotated[float, Field(gt=0)] = Field(1e-3, description="peak, linear to 0")
    cache_dir: str = Field("runs/warm_start", description="where the warmed weights are kept, in Hugging Face format")


class TrainConfig(Section):
    """The RL loop."""

    num_steps: PositiveInt = Field(100, description="RL steps (one generation phase each)")
    prompts_per_step: PositiveInt = Field(32, description="prompts whose groups form one step")
    prompts_per_minibatch: PositiveInt = Field(8, description="prompts per optimizer update")
    micro_batch_tokens: PositiveInt = Field(
        4096, description="token budget of one packed micro-batch, over its context-parallel ranks together"
    )
    share_prompts: Literal["auto"] | bool = Field(
        "auto",
        description="compute a prompt once for the samples of its group that meet in a micro-batch, and no tokens that "
        "predict nothing; exact; auto: where it works, on a CPU with parallel.cp=1 and without rollout.routing_replay",
    )
    max_nonfinite_updates: NonNegativeInt = Field(
        3, description="updates in a row with a non-finite gradient that are skipped and counted before the run ends"
    )
    entropy_probe: bool = Field(
        True, description="one extra forward of the first mini-batch after the updates: realised entropy change"
    )
    entropy_tangent: bool = Field(
        False,
        description="one extra forward and backward of the first mini-batch before the updates: the entropy change "
        "that their real movement of the weights predicts to first order",
    )
    eval_every: NonNegativeInt = Field(0, description="steps between evaluations; 0: never")
    eval_samples: PositiveInt = Field(1, description="samples per held-out prompt")
    eval_temperature: Annotated[float, Field(ge=0)] = Field(1.0, description="0 is greedy")
    save_every: NonNegativeInt = Field(0, description="steps between checkpoints; 0: only at a stop or at the end")
    save_final: bool = Field(True, description="save a checkpoint after the last step")
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints kept; the disk needs room for one more")
    keep_best: bool = Field(
        False,
        description="save at every new best eval/accuracy (eval/average without held-out problems), and keep the best",
    )
    async_save: bool = Field(False, description="write in a background process; complete ones count, as always")
    save_hf: bool = Field(False, description="write the final model to run_dir/hf, in Hugging Face format")
    resume: str = Field("auto", description="auto: from the run's newest; never; or a checkpoint folder to start from")
    grace_seconds: Annotated[float, Field(ge=0)] = Field(
        10.0, description="from Ctrl-C or SIGTERM to the kill: time to reach a step's end and save"
    )


class LoggingConfig(Section):
    """Where numbers go; metrics.jsonl is always written."""

    run_dir: str = Field("runs/{name}", description="folder of the run; {name} is replaced")
    tensorboard: bool = Field(True, description="event files under run_dir/tensorboard")
    wandb_project: str | None = Field(
        None, description="W&B project; needs the extra `wandb`; WANDB_MODE=offline works"
    )
    samples_per_step: NonNegativeInt = Field(4, description="decoded rollouts kept per step in samples.jsonl")
    ledger_every: NonNegativeInt = Field(
        1, description="steps between entries of ledger.jsonl, which says which tokens spent the entropy; 0: never"
    )


class Config(Section):
    """A whole run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$", description="names the run folder")
    seed: NonNegativeInt = Field(1, description="of initial weights, data order and sampling")
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    loss: LossConfig = PpoClipLoss()
    optimizer: OptimizerConfig = OptimizerConfig()
    warm_start: WarmStartConfig | None = None
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.logging.run_dir.format(name=self.name))

    @property
    def minibatches_per_step(self) -> int:
        """Optimizer updates in one RL step."""
        return self.train.prompts_per_step // self.train.prompts_per_minibatch
