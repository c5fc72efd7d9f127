"""Benchmarks: the problems of a set as prompts, and how they are asked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.algorithms.hashing import hash64
from megatron_rl.config.benchmarks import HELD_OUT, PRESETS, prompts
from megatron_rl.config.evaluation import SetOptions, set_path
from megatron_rl.data import DataError, encode_prompt, load_prompts
from megatron_rl.data.problems import parse_line
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
    system, suffix = options.system_prompt, options.suffix
    if system is None and preset is not None and preset.system is not None:
        system = prompts()["systems"][preset.system]
    if suffix is None:
        suffix = prompts()["suffix"] if preset is not None else ""
    rows = _read(path)
    limit = config.data.max_prompt_tokens
    problems: dict[str, Problem] = {}
    for number, (identifier, text, answer) in enumerate(rows[: config.eval.limit], start=1):
        token_ids = encode_prompt(text + suffix, system or None, tokenizer)
        if len(token_ids) > limit:
            raise DataError(
                f"{path}: the prompt of problem {identifier} has {len(token_ids)} tokens, data.max_prompt_tokens="
                f"{limit}; raise that limit: a benchmark without its longest problems is another one"
            )
        if identifier in problems:
            raise DataError(f"{path}: the id {identifier!r} comes twice, again as problem {number}; make ids unique")
        prompt = Prompt(_digest(identifier), token_ids, answer, name)
        problems[identifier] = Problem(identifier, text, prompt)
    samples = options.samples or (preset.samples if preset else 1)
    temperature = options.temperature
    if temperature is None:
        temperature = preset.temperature if preset else 0.0
    return Benchmark(
        name=name,
        title=preset.title if preset else name,
        problems=tuple(problems.values()),
        num_in_file=len(rows),
        samples=samples,
        temperature=temperature,
        by_text=False,
        seed=_seed(config, name),
    )


def _read(path: Path) -> list[tuple[str, str, str]]:
    """Return (id, problem, answer) of each line; the id is the row's number where a line has none."""
    rows: list[tuple[str, str, str]] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                record = parse_line(line, f"{path}, line {number}")
                answer = record["answer"] if isinstance(record["answer"], str) else json.dumps(record["answer"])
                rows.append((str(record.get("id", len(rows))), record["problem"], answer))
    if not rows:
        raise DataError(f"{path}: holds no problem; expected one JSON object per line with `problem` and `answer`")
    return rows


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
