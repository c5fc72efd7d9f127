"""What must agree across options. Each check says what was got, what was expected and what to change."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.config.engine_checks import beside_faults, divisors, engine_faults, model_engine_faults
from megatron_rl.config.evaluation import set_path
from megatron_rl.config.megatron_options import (
    STAGE_FIELDS,
    chunk_layers,
    megatron_faults,
    megatron_notes,
    option_faults,
)
from megatron_rl.errors import ConfigError
from megatron_rl.models.facts import (
    architecture_faults,
    has_dense_layers,
    head_width,
    is_moe,
    num_experts,
    read_hf_config,
)

if TYPE_CHECKING:
    from megatron_rl.algorithms.policy_loss import PolicyLoss
    from megatron_rl.config.sections import Config


def check_consistency(config: Config) -> None:
    """Check what must agree. Raises: ConfigError listing every inconsistency with its remedy."""
    hf = read_hf_config(config.model)
    unsupported = architecture_faults(hf, needs_vocabulary=config.data.type != "countdown")
    faults = [fault for find in _FINDERS for fault in find(config)] + [f"model: {fault}" for fault in unsupported]
    if not unsupported:
        faults += [fault for find in _MODEL_FINDERS for fault in find(config, hf)]
    if faults := faults + [*engine_faults(config), *_eval_faults(config)]:
        raise ConfigError("the config is inconsistent:\n" + "\n".join(f"  - {fault}" for fault in faults))


def run_notes(config: Config) -> list[str]:
    """Return the lines that a run says at its start, and `train --check` at its end."""
    notes = [*config.loss.notes(config), *megatron_notes(config)]
    if config.float32_logits and config.rollout.server.urls and not config.rollout.is_embedded:
        option = {"sglang": "--enable-fp32-lm-head", "vllm": """--hf-overrides '{"head_dtype": "float32"}'"""}
        notes.append(
            "the trainer's output layer gives float32 logits: the servers of rollout.server.urls need "
            f"{option[config.rollout.engine]}, or log-probabilities differ by bfloat16's rounding of theirs"
        )
    return notes


def _folder_faults(config: Config) -> Iterator[str]:
    template = config.logging.run_dir
    try:
        fields = {field[1:] for field in string.Formatter().parse(template) if field[1] is not None}
    except ValueError:  # a brace without its partner
        fields = {("", "", None)}
    if fields - {("name", "", None)}:
        yield f"logging.run_dir={template!r}: the only placeholder is {{name}}"
        return
    if config.name in (".", ".."):
        yield f"name={config.name} names no folder of its own; choose a word"
    if ".." in Path(template.partition("{name}")[2]).parts:
        yield f"logging.run_dir={template!r} leaves the folder {{name}} again; write no .. behind it"


def _layout_faults(config: Config) -> Iterator[str]:
    parallel = config.parallel
    model_parallel = parallel.tp * parallel.pp * parallel.cp
    if parallel.processes % model_parallel:
        low = parallel.processes // model_parallel * model_parallel
        near = f"{low} or {low + model_parallel}" if low else str(model_parallel)
        yield (
            f"parallel.world_size={parallel.processes} is not a multiple of tp*pp*cp={model_parallel}; set it to {near}"
        )
    yield from context_faults(config, config.model.layers)
    if parallel.sp and parallel.tp == 1:
        yield "parallel.sp=true needs parallel.tp > 1; set sp=false or raise tp"
    if parallel.vpp > 1 and parallel.pp == 1:
        yield f"parallel.vpp={parallel.vpp} interleaves chunks of pipeline stages: raise pp, or set vpp=1"
    if parallel.cp > 1 and config.train.share_prompts is True:
        yield (
            f"train.share_prompts=true with parallel.cp={parallel.cp}, which cuts sequences into chunks that cannot "
            "see a shared prompt; set share_prompts=auto or cp=1"
        )


def context_faults(config: Config, layers: str) -> list[str]:
    """Return why attention of these `layers` cannot work under context parallelism."""
    if config.parallel.cp == 1 or config.model.dtype != "float32" or layers != "transformer_engine":
        return []
    return [
        f"parallel.cp={config.parallel.cp} with model.dtype=float32: Transformer Engine's attention over context-"
        "parallel ranks takes bfloat16 alone; set dtype=bfloat16, model.layers=torch, or cp=1"
    ]


def _batch_faults(config: Config) -> Iterator[str]:
    train = config.train
    if train.prompts_per_step % train.prompts_per_minibatch:
        yield (
            f"train.prompts_per_step={train.prompts_per_step} is not a multiple of "
            f"prompts_per_minibatch={train.prompts_per_minibatch}; choose one of {divisors(train.prompts_per_step)}"
        )
    sequences = train.prompts_per_minibatch * config.rollout.samples_per_prompt
    if sequences < config.parallel.dp:
        yield (
            f"a mini-batch has {sequences} sequences (prompts_per_minibatch * samples_per_prompt) for "
            f"{config.parallel.dp} data-parallel ranks; raise prompts_per_minibatch or lower world_size"
        )
    longest, parallel = config.max_sequence_tokens, config.parallel
    needed = -(-longest // parallel.token_multiple) * parallel.token_multiple
    if train.micro_batch_tokens < needed:
        padded = f", padded to a multiple of {parallel.token_multiple}" if needed > longest else ""
        yield (
            f"train.micro_batch_tokens={train.micro_batch_tokens} is below the longest sequence "
            f"(max_prompt_tokens + max_response_tokens = {longest}{padded}); raise it to at least {needed}"
        )
    if config.algorithm.overlong.penalty_buffer > config.rollout.max_response_tokens:
        yield (
            f"algorithm.overlong.penalty_buffer={config.algorithm.overlong.penalty_buffer} exceeds "
            f"rollout.max_response_tokens={config.rollout.max_response_tokens}"
        )
    needs_group = config.algorithm.advantage != "reinforce_pp" or config.algorithm.dynamic_sampling.enabled
    if needs_group and config.rollout.samples_per_prompt < 2:
        yield (
            f"rollout.samples_per_prompt={config.rollout.samples_per_prompt}: {config.algorithm.advantage} and dynamic "
            "sampling compare the samples of one prompt; set it to at least 2"
        )
    held_out = config.data.type != "jsonl" or config.data.eval_path is not None
    if config.train.eval_every and not held_out and not config.eval.sets:
        yield (
            "train.eval_every is set, but neither data.eval_path nor eval.sets; give held-out problems or benchmarks, "
            "or set eval_every=0"
        )


def _save_faults(config: Config) -> Iterator[str]:
    train = config.train
    if train.keep_best and not train.eval_every:
        yield "train.keep_best=true has no evaluations to compare; set train.eval_every, or keep_best=false"
    if train.resume in ("auto", "never") or any((config.run_dir / "checkpoints").glob("step_*")):
        return  # a run that has checkpoints of its own goes on from them: the one it began from may be gone
    path = Path(train.resume)
    if not (path / "metadata.json").is_file():
        near = sorted([*path.glob("step_*"), *path.glob("checkpoints/step_*")])
        hint = f"; did you mean {near[-1]}?" if near else ""
        yield f"train.resume={path}: expected auto, never or a checkpoint folder of a run{hint}"
    elif not (path / "config.yaml").is_file():
        yield f"train.resume={path} is a converted model and no run's checkpoint; set model.path to it"


def _loss_faults(config: Config) -> Iterator[str]:
    loss = config.loss
    yield from dict.fromkeys([*loss.faults(config), *loss.at_the_end().faults(config)])
    if loss.adaptive_entropy is not None and loss.entropy_coef:
        yield (
            f"loss.entropy_coef={loss.entropy_coef} and loss.adaptive_entropy are both set; begin at another "
            "coefficient with adaptive_entropy.initial_coef, and leave entropy_coef at 0"
        )
    yield from _band_faults(loss)
    truncated = config.rollout.top_p < 1 or config.rollout.top_k > 0
    if truncated and loss.rollout_correction is None:
        yield (
            "rollout.top_p/top_k cut the sampling distribution, so the samples do not come from the policy that is "
            "trained; set top_p=1 and top_k=0, or turn on the correction with loss.rollout_correction={cap: 2}"
        )
    if config.warm_start is not None and config.data.type != "countdown":
        yield "warm_start needs a task with known solutions (data.type=countdown); remove it"


def _band_faults(loss: PolicyLoss) -> Iterator[str]:
    band = loss.entropy_band
    if band is None:
        return
    value = getattr(loss, band.option)
    if not band.minimum <= value <= band.maximum:
        yield (
            f"loss.{band.option}={value} is outside of loss.entropy_band's [{band.minimum}, {band.maximum}], where the "
            "adaptation begins; widen the bounds or move the value"
        )


def _expert_faults(config: Config, hf: dict[str, Any]) -> Iterator[str]:
    parallel = config.parallel
    if not is_moe(hf):
        if parallel.ep > 1:
            yield f"parallel.ep={parallel.ep}: {hf['model_type']} has no experts; set ep=1"
        return
    experts, width = num_experts(hf) or 0, hf["moe_intermediate_size"]
    stage = parallel.processes // parallel.pp
    if stage % parallel.ep or experts % parallel.ep:
        yield (
            f"parallel.ep={parallel.ep} must divide the {stage} processes of a pipeline stage and the model's "
            f"{experts} experts; choose ep from {divisors(math.gcd(stage, experts))}"
        )
    if parallel.ep == 1 and width % parallel.tp:
        yield f"model moe_intermediate_size={width} is not divisible by parallel.tp={parallel.tp}"
    if parallel.tp > 1 and not parallel.sp:
        yield "a mixture of experts trains under parallel.tp > 1 only with sp=true, as Megatron does it"


def _offload_faults(config: Config) -> Iterator[str]:
    if not config.optimizer.cpu_offload:
        return
    if config.model.dtype == "float32":
        yield (
            "optimizer.cpu_offload=true: in float32 Megatron's distributed optimizer updates views of the weights, "
            "which its optimizer on the host does not take; set model.dtype=bfloat16, or cpu_offload=false"
        )
    if not config.parallel.distributed_optimizer:
        yield (
            "optimizer.cpu_offload=true is for Megatron's distributed optimizer; set parallel.distributed_optimizer="
            "true, or cpu_offload=false"
        )
    if config.rollout.server.share_memory:
        yield (
            "optimizer.cpu_offload=true with rollout.server.share_memory=true: the latter brings all of the "
            "optimizer's state to the GPU after each generation; choose one"
        )


def _model_faults(config: Config, hf: dict[str, Any]) -> Iterator[str]:
    """Yield how the model does not fit the layout and the lengths. hf: a config.json without faults of its own."""
    tp, pp = config.parallel.tp, config.parallel.pp
    heads, layers = hf["num_attention_heads"], hf["num_hidden_layers"]
    groups = hf.get("num_key_value_heads") or heads
    fits = [d for d in divisors(heads) if groups % d == 0 or d % groups == 0]
    if heads % tp:
        yield f"model num_attention_heads={heads} is not divisible by parallel.tp={tp}; choose tp from {fits}"
    elif groups % tp and tp % groups:
        yield (
            f"model num_key_value_heads={groups} is neither a multiple nor a divisor of parallel.tp={tp}; "
            f"choose tp from {fits}"
        )
    elif 2 * groups * head_width(hf) % tp:
        yield (
            f"model num_key_value_heads={groups} of width {head_width(hf)} cannot be cut into parallel.tp={tp} equal "
            f"parts; choose tp from {[d for d in fits if groups % d == 0]}"
        )
    if has_dense_layers(hf) and hf["intermediate_size"] % tp:
        yield f"model intermediate_size={hf['intermediate_size']} is not divisible by parallel.tp={tp}"
    vpp, options = config.parallel.vpp, config.model.megatron
    options = {} if option_faults("model.megatron", options) else options
    chunks = chunk_layers(layers, config.parallel, options)
    fewest = min(map(min, chunks))
    if STAGE_FIELDS & options.keys():
        if fewest < 1 or sum(map(sum, chunks)) != layers:
            yield (
                f"model.megatron: pipeline stages of {[sum(stage) for stage in chunks]} layers, each of {vpp} equal "
                f"chunks with a layer at least, do not make num_hidden_layers={layers}; change them, or "
                "parallel.pp"
            )
    elif layers % pp:
        stages = divisors(layers)
        yield f"model num_hidden_layers={layers} is not divisible by parallel.pp={pp}; choose pp from {stages}"
    elif layers % (pp * vpp):
        yield (
            f"parallel.vpp={vpp} does not divide the {layers // pp} layers of a pipeline stage; choose vpp from "
            f"{divisors(layers // pp)}"
        )
    recomputed = config.model.recompute_layers or 1
    if recomputed > max(1, fewest):
        yield (
            f"model.recompute_layers={recomputed} exceeds the {fewest} layers of a model chunk (num_hidden_layers"
            " / pp / vpp); lower it"
        )
    for name, occurs in {"mlp": has_dense_layers(hf), "moe": is_moe(hf)}.items():
        if name in (config.model.recompute_modules or ()) and not occurs:
            yield f"model.recompute_modules: no layer of this {hf['model_type']} has a {name}; remove it"
    longest = config.max_sequence_tokens
    positions = hf.get("max_position_embeddings")
    if isinstance(positions, int) and longest > positions:
        yield (
            f"the longest sequence (max_prompt_tokens + max_response_tokens = {longest}) exceeds the model's "
            f"max_position_embeddings={positions}; shorten one of them"
        )


def _eval_faults(config: Config) -> Iterator[str]:
    """Yield one line per fault in what training will evaluate; `megatron-rl eval` looks for its files itself."""
    if not config.train.eval_every:
        return
    yield from (fault for name in config.eval.sets if isinstance(fault := set_path(config.eval, name), str))
    if config.eval.beside:
        yield from beside_faults(config)
    elif config.eval.server != type(config.eval.server)():
        yield "eval.server does nothing without eval.beside=true; set that, or remove the section"
    if config.eval.sets and config.data.type == "countdown":
        yield (
            "eval.sets need a tokenizer for text, and data.type=countdown brings one for its own characters; empty it"
        )


_FINDERS = (megatron_faults, _folder_faults, _layout_faults, _batch_faults, _save_faults, _loss_faults, _offload_faults)
_MODEL_FINDERS = (_model_faults, _expert_faults, model_engine_faults)
