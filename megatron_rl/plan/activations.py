"""Bytes of one rank's activations: what a layer keeps, and the fullest places of a pass.

Each count was read off the tensors that are alive at the peaks of `megatron-rl rehearse`; phases of the recipes agree
within 3% (tests/rehearse/test_recipes.py). Transformer Engine's layers are not rehearsed: they count as torch's,
where nothing else is said.
"""

from dataclasses import dataclass

from megatron_rl.models.hardware import CHUNK_LOGITS, PACKS_KEPT, ROUNDED_LOGITS
from megatron_rl.plan.shapes import ModelShape, Spread

Parts = dict[str, float]  # part -> bytes


@dataclass(frozen=True, slots=True)
class Passes:
    """What the trainer runs: `tokens` of one micro-batch, and micro-batches of one update on a rank."""

    tokens: int
    micro_batches: int
    element_bytes: int  # of weights and activations: 2 or 4
    float32_logits: bool = False  # of 2-byte elements: the output layer gives 4 bytes
    chunked: bool = False  # logits exist in chunks alone
    on_gpu: bool = True  # norms and gates are fused, attention takes packed tokens
    engine: bool = True  # Transformer Engine's layers; False: torch's


def layer_activations(shape: ModelShape, layout: Spread, passes: Passes) -> float:
    """Return the bytes that one layer keeps of one micro-batch for its backward pass, on a rank.

    Per token, in elements: two norms' outputs and two sums that are the next norms' inputs (4 h, split by tp under
    sequence parallelism), then, split by tp, the projection to queries, keys and values, which stays whole as the
    values are a part of it; rotated queries and keys; the attention's output; the MLP's two projections and their
    product (3 f). Flash attention keeps one float32 per head instead of the scores. Under selective recomputation
    torch's layers keep queries that are not rotated yet, and no rotated keys. Norms of queries and keys keep their
    inputs. On a CPU the norms keep their scaled input as well (6 h), attention works on a padded copy and the gate's
    SiLU is a tensor of its own (4 f).
    Source: the method of Korthikanti et al., arXiv 2205.05198, section 4, counted anew for RMSNorm, grouped queries,
    gated MLPs and attention without stored scores (Dao, arXiv 2307.08691).
    """
    hidden, attention = shape.hidden, shape.heads * shape.head_dim
    rotated = attention + shape.groups * shape.head_dim
    norms = (4 if passes.on_gpu else 6) * hidden
    inner = shape.qkv_width + attention + shape.qk_norm * rotated
    if not passes.on_gpu or (layout.cp > 1 and not passes.engine):
        inner += attention
    elif shape.gated:  # plain GPT rotates nothing
        inner += rotated if passes.engine or layout.recompute != "selective" else attention
    scores = 4.0 * shape.heads if layout.recompute != "selective" else 0.0  # that recomputes the core attention
    mlp: float = (shape.mlp_matrices if passes.on_gpu else shape.mlp_matrices + 1) * shape.ffn
    if shape.moe_layers:
        mlp = shape.experts_per_token * (3 * shape.expert_ffn + 2 * hidden / (layout.tp // layout.expert_tp))
    elements = norms / (layout.tp if layout.sp else 1) + (inner + mlp) / layout.tp
    tokens = passes.tokens / layout.cp
    return tokens * (elements * passes.element_bytes + scores / layout.tp)


def layer_input(shape: ModelShape, layout: Spread, passes: Passes) -> float:
    """Return the bytes of one layer's input, all that full recomputation keeps. Source: arXiv 2205.05198, section 5."""
    return _whole_hidden(shape, layout, passes) / (layout.tp if layout.sp else 1)


def _whole_hidden(shape: ModelShape, layout: Spread, passes: Passes) -> float:
    return passes.tokens / layout.cp * shape.hidden * passes.element_bytes


def _widest(shape: ModelShape, layout: Spread, passes: Passes) -> float:
    """Return the bytes of one of an MLP's inner tensors of its widest layer."""
    ffn = max(shape.ffn, shape.experts_per_token * shape.expert_ffn)
    return passes.tokens / layout.cp * passes.element_bytes * ffn / layout.tp


def forward_peak(shape: ModelShape, layout: Spread, passes: Passes) -> float:
    """Return the bytes of a forward pass that keeps nothing, at its fullest place in a layer: the MLP's projections and
    their product, beside the layer's input, the sum after the attention, its norm, and the first layer's input; of a
    pipeline also what it sent last."""
    beside = (4 + (layout.pp > 1)) * layer_input(shape, layout, passes)
    return beside + shape.mlp_matrices * _widest(shape, layout, passes)


def backward_peak(shape: ModelShape, layout: Spread, passes: Passes) -> float:
    """Return the bytes of a layer's backward pass beside what is kept, at its fullest place: the gradient of the MLP's
    first projections (that of their product has taken the product's place), that of the layer's output, and all of the
    layer itself where it is computed anew."""
    again = layer_activations(shape, layout, passes) if layout.recompute == "full" else 0.0
    return again + (shape.mlp_matrices - 1) * _widest(shape, layout, passes) + layer_input(shape, layout, passes)


def in_flight(layout: Spread, micro_batches: int, stage: int) -> float:
    """Return the micro-batches whose activations a stage keeps at the peak of 1F1B, in units of all its layers.

    Source: arXiv 2104.04473, section 2.2; the interleaved schedule keeps (1 + (p - 1) / (p v)) times more on the first
    stage (arXiv 2205.05198, section 4.2.3).
    """
    depth = layout.pp - stage
    if layout.vpp > 1:
        return min(depth * (1 + (layout.pp - 1) / (layout.pp * layout.vpp)), micro_batches)
    return min(depth, micro_batches)


def kept_activations(shape: ModelShape, layout: Spread, passes: Passes, stage: int) -> float:
    """Return the bytes that a stage keeps for the backward passes at the peak: of each micro-batch in flight its
    layers' activations, or their inputs alone, and the input of the first."""
    one_input = layer_input(shape, layout, passes)
    layer = one_input if layout.recompute == "full" else layer_activations(shape, layout, passes)
    layers = shape.layers * layout.share(stage)
    return in_flight(layout, passes.micro_batches, stage) * (layers * layer + one_input)


def logits_bytes(shape: ModelShape, layout: Spread, passes: Passes) -> float:
    """Return the bytes of the logits that exist at once, a whole `[T, V / tp]` or a chunk: statistics and gradient are
    computed in place (parallel/vocab.py)."""
    return (4 if passes.float32_logits else passes.element_bytes) * _logits(shape, layout, passes)


def _logits(shape: ModelShape, layout: Spread, passes: Passes) -> float:
    count = passes.tokens / layout.cp * shape.vocab / layout.tp
    return min(count, CHUNK_LOGITS) if passes.chunked else count


def output_peak(shape: ModelShape, layout: Spread, passes: Passes, *, backward: bool) -> float:
    """Return the bytes beside the logits while they exist: the output layer's input of all ranks, and in the backward
    pass its gradient and the weight's. Of a float32 gradient a block at a time is rounded to the weight's bytes, in
    chunks a whole one, and chunks add up the weight's gradient in float32 (parallel/fused_linear.py)."""
    hands_over = passes.chunked or passes.float32_logits
    hidden, width = _whole_hidden(shape, layout, passes), passes.element_bytes
    whole = hidden if hands_over or not layout.sp else 0.0  # Megatron's own gathers it in its buffer
    if not backward:
        return whole
    weight = shape.vocab / layout.tp * shape.hidden
    at_once = _logits(shape, layout, passes) if passes.chunked else ROUNDED_LOGITS
    rounded = width * at_once if passes.float32_logits else 0.0
    return whole + hidden + rounded + weight * (4 + width if passes.chunked and width == 2 else width)


def gather_buffer(shape: ModelShape, layout: Spread, passes: Passes, stage: int) -> float:
    """Return the bytes of the hidden states of all tensor ranks that Megatron's layers gather under sequence
    parallelism, in one buffer that they keep for ever. Transformer Engine's have none, but Megatron's output layer."""
    hands_over = passes.chunked or passes.float32_logits
    gathers = not passes.engine or (stage == layout.pp - 1 and not hands_over)
    return _whole_hidden(shape, layout, passes) if layout.sp and gathers else 0.0


def rotary_tables(shape: ModelShape, layout: Spread, passes: Passes) -> float:
    """Return the bytes of cosines and sines that torch's layers keep of the micro-batches that they saw last. (Their
    masks under context parallelism are not counted.)"""
    one = 2 * 4.0 * passes.tokens / layout.cp * shape.head_dim
    return 0.0 if passes.engine else PACKS_KEPT * one


def pass_parts(shape: ModelShape, layout: Spread, passes: Passes, stage: int) -> dict[str, Parts]:
    """Return what a forward pass ("old logprobs") and an update ("training") add to the state at their fullest: in a
    layer or, on the last stage, around the logits, which exist when no layer works."""
    tables, kept = rotary_tables(shape, layout, passes), kept_activations(shape, layout, passes, stage)
    gathered = _whole_hidden(shape, layout, passes) if passes.engine and layout.sp else 0.0  # anew by each layer
    parts = {
        "old logprobs": {"activations": tables + gathered + forward_peak(shape, layout, passes)},
        "training": {"activations": tables + gathered + kept + backward_peak(shape, layout, passes)},
    }
    if stage < layout.pp - 1:
        return parts
    logits = {"fused logits" if passes.chunked else "logits": logits_bytes(shape, layout, passes)}
    received = tables + (layout.pp > 1) * layer_input(shape, layout, passes)
    forward, backward = (output_peak(shape, layout, passes, backward=back) for back in (False, True))
    around = {
        "old logprobs": {"activations": received + forward} | logits,
        "training": {"activations": tables + kept + backward} | logits,
    }
    return {name: max(parts[name], around[name], key=lambda each: sum(each.values())) for name in parts}
