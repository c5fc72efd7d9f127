"""The embedded engine: each trainer rank holds a full Hugging Face replica and generates its share in process.

Own decoding loop, because Hugging Face's `generate` draws from one RNG stream, which ties a sample to its batch.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.initialization import no_init_weights
from typing_extensions import override

from megatron_rl.algorithms.hashing import hash_uniform
from megatron_rl.convert.hf import hub_views
from megatron_rl.device import decoding_multiple, fast_linear_layers, float32_product
from megatron_rl.rollout.cache import roomy_cache
from megatron_rl.rollout.engine import EngineAborted, EngineError, Request, RolloutEngine, SamplingParams
from megatron_rl.rollout.recorder import RouteRecorder
from megatron_rl.rollout.sampling import sample_tokens
from megatron_rl.types import Rollout

# finished rows leave the batch once they are this share of it: less often, and decoding computes for nothing;
# more often, and copying the cache costs more than it saves
_COMPACT_SHARE = 1 / 8
# random numbers are hashed for this many positions at once, to keep small kernels out of the token loop
_UNIFORMS_BLOCK = 64
_GROUPED = "grouped_sdpa"  # attention, by the name that transformers knows it by


class TransformersEngine(RolloutEngine):
    """`RolloutEngine` over a replica of the policy in this process."""

    def __init__(
        self,
        hf_config: dict[str, Any],
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
        float32_logits: bool = False,
        float32_activations: bool = False,
    ) -> None:
        """`hf_config` holds the contents of a config.json; `batch_size` is the most sequences decoded together;
        `float32_logits`, `float32_activations`: of a bfloat16 model, as the trainer computes them."""
        config = transformers.AutoConfig.for_model(**hf_config)
        # no random initialisation: every parameter must be streamed before use, and the global RNG stays untouched
        with no_init_weights(), torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=_attention(device)
            )
        model.tie_weights()  # without initialisation transformers leaves them apart
        self.model = model.eval().requires_grad_(False)
        fast_linear_layers(self.model)
        if float32_activations:
            _use_float32_activations(self.model)
        elif float32_logits:
            head = self.model.get_output_embeddings()
            head.forward = lambda x: float32_product(x.flatten(0, -2), head.weight).unflatten(0, x.shape[:-1])
        self._routes = RouteRecorder(self.model)
        self.weight_version = -1
        self._device = torch.device(device)
        self._batch_size = batch_size
        self._trouble = "it has no weights yet; call update_weights"
        self._asleep = False
        self._abort = threading.Event()

    @override
    def update_weights(self, stream: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        # a tied weight may come under one of its names or under both, then with equal values
        if self._asleep:
            raise EngineError("update_weights: the engine sleeps; call wake first")
        self._trouble = "its last update_weights failed and left a mixture of weights; update again"
        parameters = hub_views(dict(self.model.named_parameters(remove_duplicate=False)))
        canonical: dict[int, str] = {}  # of each tensor, its first name
        for name, parameter in parameters.items():
            canonical.setdefault(id(parameter), name)
        seen: set[str] = set()
        loaded: set[int] = set()
        with torch.inference_mode():
            for name, tensor in stream:
                if name not in parameters:
                    raise EngineError(f"update_weights: the model has no weight {name!r}; it has {_some(parameters)}")
                parameter = parameters[name]
                if name in seen:
                    raise EngineError(f"update_weights: {name!r} came twice")
                if tensor.shape != parameter.shape:
                    raise EngineError(
                        f"update_weights: {name!r} has shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}"
                    )
                if id(parameter) not in loaded:
                    parameter.copy_(tensor)
                elif not torch.equal(parameter, tensor.to(parameter)):
                    raise EngineError(
                        f"update_weights: {name!r} is tied to {canonical[id(parameter)]!r} but came with other values"
                    )
                seen.add(name)
                loaded.add(id(parameter))
        missing = [name for key, name in canonical.items() if key not in loaded]
        if missing:
            raise EngineError(f"update_weights: {len(missing)} weights did not come: {_some(missing)}")
        self.weight_version, self._trouble = weight_version, ""

    @override
    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Rollout]]:
        self.health()
        self._abort.clear()
        self._check_requests(requests)
        # equal sampling, then similar lengths, then equal prompts: no padding to speak of, and one prefill per prompt
        keys = [(r.sampling, len(r.token_ids), r.token_ids, r.prompt_id, r.sample_index) for r in requests]
        order = sorted(range(len(requests)), key=lambda i: keys[i])
        for sampling, run in groupby(order, key=lambda i: requests[i].sampling):
            indices = list(run)
            for start in range(0, len(indices), self._batch_size):
                batch = indices[start : start + self._batch_size]
                yield from zip(batch, self._decode([requests[i] for i in batch], sampling), strict=True)

    @override
    def sleep(self) -> None:
        self.model.to("cpu")  # on a GPU its memory is free then
        self._asleep = True

    @override
    def wake(self) -> None:
        self.model.to(self._device)
        self._asleep = False

    @override
    def abort(self) -> None:
        self._abort.set()  # takes effect before the next token

    @override
    def health(self) -> None:
        if self._trouble:
            raise EngineError(f"the transformers engine cannot generate: {self._trouble}")
        if self._asleep:
            raise EngineError("the transformers engine cannot generate: it sleeps; call wake first")

    @override
    def close(self) -> None:
        self._trouble = "it was closed"
        self.model.to("meta")

    def _check_requests(self, requests: Sequence[Request]) -> None:
        vocab_size = self.model.config.vocab_size
        for request in requests:
            if not request.token_ids:
                raise EngineError(f"generate: prompt {request.prompt_id} is empty; a prompt needs at least one token")
            if min(request.token_ids) < 0 or max(request.token_ids) >= vocab_size:
                raise EngineError(
                    f"generate: prompt {request.prompt_id} has a token id outside [0, {vocab_size}): the tokenizer "
                    "does not fit the model"
                )

    @torch.inference_mode()
    def _decode(self, requests: list[Request], sampling: SamplingParams) -> list[Rollout]:
        wanted = any(request.with_routes for request in requests)
        self._routes.begin(wanted, len(requests), sampling.max_response_tokens)
        logits, cache, mask = self._prefill(requests, sampling.max_response_tokens)
        width, count = mask.shape[1] - sampling.max_response_tokens, len(requests)
        prompt_ids = self._int64([[r.prompt_id] for r in requests])
        sample_indices = self._int64([[r.sample_index] for r in requests])
        stops = self._int64(sampling.stop_token_ids)
        positions = self._int64([[len(r.token_ids)] for r in requests])  # of the next token to be fed
        rows = torch.arange(count, device=self._device)  # the request of each row still in the batch
        alive = torch.ones(count, dtype=torch.bool, device=self._device)
        tokens_out = torch.zeros((count, sampling.max_response_tokens), dtype=torch.int64, device=self._device)
        logprobs_out = torch.zeros_like(tokens_out, dtype=torch.float32)
        lengths = torch.zeros(count, dtype=torch.int64, device=self._device)
        stopped = torch.zeros(count, dtype=torch.bool, device=self._device)
        padded = not bool(mask.all())
        multiple = decoding_multiple()
        for step in range(sampling.max_response_tokens):
            if self._abort.is_set():
                raise EngineAborted(f"generate: aborted with {count} responses unfinished")
            offset = step % _UNIFORMS_BLOCK
            if offset == 0:
                block = torch.arange(step, step + _UNIFORMS_BLOCK, device=self._device)
                # nothing else enters: the same request gives the same tokens in any batch, on any rank
                draws = hash_uniform(sampling.seed, prompt_ids, sample_indices, block)
            uniform = draws[rows, offset]
            tokens, logprobs = sample_tokens(logits, uniform, sampling.temperature, sampling.top_p, sampling.top_k)
            # a finished row that is still in the batch goes on writing; its length keeps that out of the result
            tokens_out[rows, step], logprobs_out[rows, step] = tokens, logprobs
            lengths[rows] += alive
            ends = torch.isin(tokens, stops)
            stopped[rows] |= ends & alive
            alive = alive & ~ends
            num_alive = int(alive.sum())
            if num_alive == 0 or step + 1 == sampling.max_response_tokens:
                break
            kept = -(-num_alive // multiple) * multiple
            if kept <= (1 - _COMPACT_SHARE) * len(rows):
                keep = alive.argsort(descending=True, stable=True)[:kept]
                cache.batch_select_indices(keep)
                rows, tokens, positions, mask, alive = (each[keep] for each in (rows, tokens, positions, mask, alive))
            output = self.model(
                input_ids=tokens[:, None],
                attention_mask=mask[:, None, None, : width + step + 1] if padded else None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            self._routes.fed(rows, step)
            logits, positions = output.logits[:, -1], positions + 1
        return self._collect(requests, tokens_out, logprobs_out, lengths, stopped)

    def _prefill(self, requests: list[Request], room: int) -> tuple[Tensor, transformers.Cache, Tensor]:
        """One forward over the distinct prompts, left-padded; then logits [B, V], cache and mask [B, width + room]."""
        prompts = {prompt: row for row, prompt in enumerate(dict.fromkeys(r.token_ids for r in requests))}
        width = max(map(len, prompts))
        token_ids = self._int64([(0,) * (width - len(prompt)) + prompt for prompt in prompts])
        pads = self._int64([[width - len(prompt)] for prompt in prompts])
        columns = torch.arange(width + room, device=self._device)
        mask = columns >= pads
        output = self.model(
            input_ids=token_ids,
            attention_mask=mask[:, :width] if bool(pads.any()) else None,
            position_ids=(columns[:width] - pads).clamp(min=0),
            past_key_values=roomy_cache(),
            use_cache=True,
            logits_to_keep=1,
        )
        self._routes.prompts([prompts[r.token_ids] for r in requests])
        logits, cache = output.logits[:, -1], output.past_key_values
        if len(prompts) != len(requests):
            expand = self._int64([prompts[r.token_ids] for r in requests])
            cache.batch_select_indices(expand)
            logits, mask = logits[expand], mask[expand]
        return logits, cache, mask

    def _collect(
        self, requests: list[Request], tokens: Tensor, logprobs: Tensor, lengths: Tensor, stopped: Tensor
    ) -> list[Rollout]:
        tokens, logprobs, lengths = tokens.cpu(), logprobs.cpu(), lengths.cpu()
        sampled = torch.arange(tokens.shape[1]) < lengths[:, None]
        wrong = (sampled & ~logprobs.isfinite()).any(1).nonzero().flatten().tolist()
        if wrong:
            request = requests[wrong[0]]
            raise EngineError(
                f"generate: prompt {request.prompt_id}, sample {request.sample_index}: a sampled token's "
                f"log-probability is not finite under weight version {self.weight_version}; the weights have diverged"
            )
        # all rollouts' tensors behind one another: a few operations for the batch instead of several for each
        counts = lengths.tolist()
        sizes = [len(request.token_ids) + count for request, count in zip(requests, counts, strict=True)]
        parts = torch.tensor([(len(request.token_ids), count) for request, count in zip(requests, counts, strict=True)])
        loss_mask = torch.tensor([False, True]).repeat(len(requests)).repeat_interleave(parts.flatten())
        token_ids = torch.empty(len(loss_mask), dtype=torch.int64)
        token_ids[~loss_mask] = torch.tensor([token for request in requests for token in request.token_ids])
        token_ids[loss_mask] = tokens[sampled]
        rollout_logprobs = torch.zeros(len(loss_mask)).masked_scatter_(loss_mask, logprobs[sampled])
        fields = zip(*(values.split(sizes) for values in (token_ids, rollout_logprobs, loss_mask)), strict=True)
        rollouts = []
        for row, (request, of_row, stop) in enumerate(zip(requests, fields, stopped.tolist(), strict=True)):
            (ids, logprobs, mask), length = of_row, counts[row]
            rollouts.append(
                Rollout(
                    prompt_id=request.prompt_id,
                    sample_index=request.sample_index,
                    token_ids=ids,
                    rollout_logprobs=logprobs,
                    sampled=mask,
                    finish_reason="stop" if stop else "length",
                    weight_version=self.weight_version,
                    spans=((self.weight_version, length),),
                    routes=self._routes.of(row, len(request.token_ids), length) if request.with_routes else None,
                )
            )
        return rollouts

    def _int64(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _attention(device: torch.device) -> str:
    """transformers' own SDPA copies keys and values for every query head where there is a mask, which a GPU's kernels
    need and a CPU's does not."""
    if device.type != "cpu":
        return "sdpa"
    transformers.AttentionInterface.register(_GROUPED, _grouped_attention)
    transformers.AttentionMaskInterface.register(_GROUPED, transformers.masking_utils.sdpa_mask)
    return _GROUPED


def _grouped_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """query `[B, heads, q, d]`, key and value `[B, groups, k, d]`, mask bool `[B, 1, q, k]` -> `[B, q, heads, d]`."""
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None and query.shape[2] > 1, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


def _use_float32_activations(model: torch.nn.Module) -> None:
    """Let all but the weights of linear layers, embeddings and experts be float32: those layers take either."""
    experts = [module for module in model.modules() if any(p.ndim == 3 for p in module.parameters(recurse=False))]
    for module in model.modules():
        if module not in experts and not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    for module in experts:
        dtype = next(module.parameters()).dtype
        module.register_forward_pre_hook(
            lambda _, inputs, dtype=dtype: tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
        )
    for module in (model.get_input_embeddings(), *experts):  # type: ignore[operator]
        module.register_forward_hook(lambda _, inputs, output: output.float())


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
