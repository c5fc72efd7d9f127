"""Benchmarks: the problems of a set as prompts, and how they are asked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_rl.algorithms.hashing import hash64
from megatron_rl.config.benchmarks import HELD_OUT, PRESETS, prompts
from megatron_rl.config.evaluation import SetOptions, set_path
from megatron_rl.data.problems import load_prompts
from megatron_rl.data.rows import read_rows, with_suffix
from megatron_rl.data.tokenizer import encode_prompt
from megatron_rl.errors import DataError
from megatron_rl.types import Prompt

if TYPE_CHECKING:
    from megatron_rl.config import Config

_STREAM = 3  # separates the seeds of benchmarks from those of rollout/collect.py


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of a set. The prompt's `prompt_id` is a digest of `id`: it fixes the draws, whatever else is in the
    set."""

    id: str
    text: str
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A set of problems with its protocol: samples of each, temperature, seed."""

    name: str
    title: str
    problems: tuple[Problem, ...]
    num_in_file: int  # more than `problems` when eval.limit took the first ones
    samples: int
    temperature: float  # 0 is greedy
    by_text: bool  # the whole response is the answer; else it is looked for as the verifier `math` does
    seed: int  # of the draws, with the prompt and the sample

    @property
    def digest(self) -> str:
        """Return a fingerprint of the identifiers, prompts and answers."""
        rows = [(p.id, p.prompt.token_ids, p.prompt.answer) for p in self.problems]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def load_benchmarks(config: Config, tokenizer: Any) -> list[Benchmark]:
    """Return the sets that `eval.sets` names, in its order; without any, the held-out problems of `data` as one set.

    Raises: DataError for a missing file, a bad line, an identifier that comes twice, or a prompt that is too long.
    """
    if not config.eval.sets:
        return [_held_out(config, tokenizer)]
    return [_load(name, config, tokenizer) for name in config.eval.sets]


def _seed(config: Config, name: str) -> int:
    seed = config.seed if config.eval.seed is None else config.eval.seed
    # 63 bits, because engines behind HTTP take no negative seed
    return int(hash64(seed, _STREAM, _digest(name))) & (2**63 - 1)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def _load(name: str, config: Config, tokenizer: Any) -> Benchmark:
    path = set_path(config.eval, name)
    if isinstance(path, str):
        raise DataError(path)
    preset, options = PRESETS.get(name), config.eval.options.get(name, SetOptions())
    system, suffix = None, ""
    if preset is not None:
        system, suffix = prompts()["systems"][preset.system] if preset.system else None, prompts()["suffix"]
    limit = config.data.max_prompt_tokens
    problems: dict[str, Problem] = {}
    num_in_file = 0
    for where, row in read_rows(path):
        num_in_file += 1
        if config.eval.limit is not None and num_in_file > config.eval.limit:
            continue
        # the config's own words come first, then the row's, then the protocol's
        asked_by = next(s for s in (options.system_prompt, row.system, system or "") if s is not None)
        ending = next(s for s in (options.suffix, row.suffix, suffix) if s is not None)
        text = with_suffix(row.problem, ending)
        token_ids = encode_prompt(text, asked_by or None, tokenizer, row.turns, where)
        if len(token_ids) > limit:
            raise DataError(
                f"{where}: the prompt of problem {row.id} has {len(token_ids)} tokens, data.max_prompt_tokens="
                f"{limit}; raise that limit: a benchmark without its longest problems is another one"
            )
        if row.id in problems:
            raise DataError(f"{where}: the id {row.id!r} comes twice; make ids unique")
        problems[row.id] = Problem(row.id, row.problem, Prompt(_digest(row.id), token_ids, row.answer, name))
    samples = options.samples or (preset.samples if preset else 1)
    temperature = options.temperature
    if temperature is None:
        temperature = preset.temperature if preset else 0.0
    return Benchmark(
        name=name,
        title=preset.title if preset else name,
        problems=tuple(problems.values()),
        num_in_file=num_in_file,
        samples=samples,
        temperature=temperature,
        by_text=False,
        seed=_seed(config, name),
    )


def _held_out(config: Config, tokenizer: Any) -> Benchmark:
    prompts = load_prompts(config, tokenizer).eval
    if not prompts:
        raise DataError(
            "there is nothing to evaluate: eval.sets is empty and `data` has no held-out problems; name sets, or set "
            "data.num_eval or data.eval_path"
        )
    problems = [Problem(str(prompt.prompt_id), tokenizer.decode(prompt.token_ids), prompt) for prompt in prompts]
    return Benchmark(
        name=HELD_OUT,
        title="held-out",
        problems=tuple(problems[: config.eval.limit]),
        num_in_file=len(problems),
        samples=config.train.eval_samples,
        temperature=config.train.eval_temperature,
        by_text=config.data.type == "countdown",
        seed=_seed(config, HELD_OUT),
    )
