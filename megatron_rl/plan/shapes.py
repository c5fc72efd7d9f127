"""A model as the planner sees it: its sizes, its parameters on a rank, its floating-point operations."""

from dataclasses import dataclass
from typing import Any

from megatron_rl.config import Config, ModelConfig
from megatron_rl.config.megatron_options import chunk_layers
from megatron_rl.models import facts
from megatron_rl.models.facts import ARCHITECTURES, Architecture

# Of the countdown task's tokenizer, which the quickstart's model config leaves to the task
COUNTDOWN_VOCAB = 21


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder. Widths in elements; `ffn` and `expert_ffn` are widths of one projection."""

    layers: int
    hidden: int
    heads: int
    groups: int  # key-value heads
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    gated: bool = True  # three matrices in the MLP, else two
    qkv_bias: bool = False
    qk_norm: bool = False
    moe_layers: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0

    @property
    def qkv_width(self) -> int:
        """Return the width of the fused query, key and value projection."""
        return (self.heads + 2 * self.groups) * self.head_dim

    @property
    def mlp_matrices(self) -> int:
        """Return the matrices of one MLP."""
        return 3 if self.gated else 2

    @property
    def layer_weights(self) -> tuple[int, int, int]:
        """Return the parameters in matrices of one layer's attention, of a dense MLP, of an expert."""
        attention = self.hidden * (self.qkv_width + self.heads * self.head_dim)
        return attention, self.mlp_matrices * self.hidden * self.ffn, self.mlp_matrices * self.hidden * self.expert_ffn


@dataclass(frozen=True, slots=True)
class Spread:
    """How a model is spread. `dp` excludes context parallelism; gradients and optimizer state are over dp * cp."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    vpp: int = 1  # model chunks on a stage
    sp: bool = False
    distributed_optimizer: bool = True
    recompute: str = "none"  # none, selective, full
    stage_layers: tuple[int, ...] = ()  # of each pipeline stage; none: equal parts

    def share(self, stage: int | None = None) -> float:
        """Return the share of all layers that a pipeline stage has; None: the stage with most of them."""
        if not self.stage_layers:
            return 1 / self.pp
        return (max(self.stage_layers) if stage is None else self.stage_layers[stage]) / sum(self.stage_layers)

    @property
    def gpus(self) -> int:
        """Return the number of ranks."""
        return self.tp * self.pp * self.dp * self.cp

    @property
    def shards(self) -> int:
        """Return the ranks that share a weight's optimizer state."""
        return self.dp * self.cp if self.distributed_optimizer else 1

    @property
    def expert_tp(self) -> int:
        """Return the tensor parallelism inside an expert: dealt-out ones stay whole, see parallel/groups.py."""
        return self.tp if self.ep == 1 else 1

    @property
    def expert_shards(self) -> int:
        """Return the ranks that share an expert's optimizer state."""
        copies = self.tp * self.dp * self.cp // (self.ep * self.expert_tp)
        return copies if self.distributed_optimizer else 1

    def text(self) -> str:
        """Return a text for people: the sizes above 1, then the switches."""
        sizes = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "cp": self.cp, "ep": self.ep, "dp": self.dp}
        parts = [f"{name} {size}" for name, size in sizes.items() if size > 1 or name in ("tp", "pp", "dp")]
        switches = {
            "sp": self.sp,
            "distributed optimizer": self.distributed_optimizer,
            f"recompute {self.recompute}": self.recompute != "none",
        }
        return ", ".join([*parts, *(name for name, is_on in switches.items() if is_on)])


def layout_of(config: Config) -> Spread:
    """Return the layout that the config asks for."""
    parallel, layers = config.parallel, facts.read_hf_config(config.model)["num_hidden_layers"]
    stages = [sum(stage) for stage in chunk_layers(layers, parallel, config.model.megatron)]
    alike = ("tp", "pp", "dp", "cp", "ep", "vpp", "sp", "distributed_optimizer")
    return Spread(
        **{name: getattr(parallel, name) for name in alike},
        recompute=config.model.recompute,
        stage_layers=tuple(stages) if len(set(stages)) > 1 else (),
    )


def bubble(layout: Spread, micro_batches: float) -> float:
    """Return the idle share of a pipelined pass, relative to its work: (p - 1) / (m v).

    Source: Narayanan et al., arXiv 2104.04473, section 2.2.
    """
    return (layout.pp - 1) / (micro_batches * layout.vpp)


def shape_of(hf: dict[str, Any], vocab: int | None = None) -> ModelShape:
    """Return the shape of a model from the contents of its config.json; `vocab` where it does not say."""
    # plain GPT, with two matrices in its MLP, appears among the published rows alone
    kind = ARCHITECTURES.get(hf["model_type"], Architecture())
    heads = hf["num_attention_heads"]
    return ModelShape(
        layers=hf["num_hidden_layers"],
        hidden=hf["hidden_size"],
        heads=heads,
        groups=hf.get("num_key_value_heads") or heads,
        head_dim=facts.head_width(hf),
        ffn=hf["intermediate_size"],
        vocab=hf.get("vocab_size") or vocab or 0,
        tied=bool(hf.get("tie_word_embeddings")),
        gated=hf["model_type"] in ARCHITECTURES,
        qkv_bias=kind.qkv_bias,
        qk_norm=kind.qk_norm,
        moe_layers=len(facts.moe_layers(hf)),
        experts=(facts.num_experts(hf) or 0) if kind.is_moe else 0,
        experts_per_token=hf["num_experts_per_tok"] if kind.is_moe else 0,
        expert_ffn=hf["moe_intermediate_size"] if kind.is_moe else 0,
    )


@dataclass(frozen=True, slots=True)
class RankParameters:
    """Parameters that one rank holds; experts apart, because other ranks share them."""

    dense: float
    experts: float

    @property
    def total(self) -> float:
        """Return all of them."""
        return self.dense + self.experts


def rank_parameters(shape: ModelShape, layout: Spread, stage: int, *, vocab_multiple: int) -> RankParameters:
    """Return the parameters of a rank on a pipeline stage.

    The vocabulary is padded to a multiple of tp * vocab_multiple. A tied embedding lies on both ends of a pipeline.
    Source: the shapes of Megatron-Core's GPTModel, as policy/build.py asks for them.
    """
    tp, hidden, share = layout.tp, shape.hidden, layout.share(stage)
    attention, mlp, expert = shape.layer_weights
    replicated = 2 * hidden + shape.qk_norm * 2 * shape.head_dim
    dense = shape.layers * ((attention + shape.qkv_bias * shape.qkv_width) / tp + replicated)
    dense += (shape.layers - shape.moe_layers) * mlp / tp
    dense += shape.moe_layers * shape.experts * hidden  # routers
    experts = shape.moe_layers * shape.experts / layout.ep * expert / layout.expert_tp
    embedding = -(-shape.vocab // (tp * vocab_multiple)) * vocab_multiple * hidden
    first, last = stage == 0, stage == layout.pp - 1
    copies = first + last if not (shape.tied and first and last) else 1
    return RankParameters(dense * share + copies * embedding + last * hidden, experts * share)


def parameters(shape: ModelShape) -> float:
    """Return the parameters of the whole model, its vocabulary not padded."""
    return rank_parameters(shape, Spread(), 0, vocab_multiple=1).total


def count_parameters(hf: dict[str, Any], vocab: int = 0) -> tuple[int, int]:
    """Return the parameters of the decoder layers with the final norm, and those of the embedding and the output layer,
    from the contents of a config.json; `vocab` where it does not say."""
    shape = shape_of(hf, vocab)
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    return round(parameters(shape)) - embeddings, embeddings


def matrix_parameters(shape: ModelShape) -> tuple[float, float]:
    """Return the parameters (in matrix products of the layers that one token meets, in the output layer)."""
    attention, mlp, expert = shape.layer_weights
    routed = shape.moe_layers * (expert * shape.experts_per_token + shape.hidden * shape.experts)
    layers = shape.layers * attention + (shape.layers - shape.moe_layers) * mlp + routed
    return layers, shape.vocab * shape.hidden


def forward_flops(shape: ModelShape, context: float) -> tuple[float, float]:
    """Return the operations per token of a forward pass, (matrix products, attention). `context` is the mean number of
    tokens attended to, half the length for causal attention over whole sequences; a backward pass costs twice.

    Source: Narayanan et al., arXiv 2104.04473, appendix, with causal attention counted as what it computes.
    """
    layers, output = matrix_parameters(shape)
    return 2.0 * (layers + output), 4.0 * shape.layers * shape.heads * shape.head_dim * context


def width_of(model: ModelConfig) -> int:
    """Return the bytes of one weight."""
    return 2 if model.dtype == "bfloat16" else 4


def kv_bytes_per_token(shape: ModelShape, element_bytes: int) -> float:
    """Return the bytes that one token takes in the whole model's key-value cache."""
    return 2.0 * shape.layers * shape.groups * shape.head_dim * element_bytes
