"""Benchmarks: which sets are evaluated, from which files, how they are sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from megatron_rl.algorithms.section import Float, NonNegativeFloat, NonNegativeInt, PositiveInt, Section
from megatron_rl.config.benchmarks import HELD_OUT, PRESETS
from megatron_rl.config.paths import PathText
from megatron_rl.config.rollout import ServerConfig

SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class SetOptions(Section):
    """One set. null keeps what its preset says; a set without preset needs `path`."""

    path: PathText | None = None
    """File of JSON lines with `problem` and `answer`; null: found in eval.folder."""
    samples: PositiveInt | None = None
    """Responses per problem; without preset: 1."""
    temperature: NonNegativeFloat | None = None
    """Divides the logits, 0 is greedy; without preset: 0."""
    system_prompt: str | None = None
    """System message of the chat template; empty: none."""
    suffix: str | None = None
    """Appended to each problem."""


class EvalConfig(Section):
    """Benchmarks, for `megatron-rl eval` and, with train.eval_every, during training. The length of prompts and
    responses, the engine and the grader are those of `data`, `rollout` and `reward`."""

    sets: tuple[SetName, ...] = Field(
        (),
        description=f"Names of the sets in the table's order, of {', '.join(PRESETS)} or with an entry in `options`; "
        "empty: the command evaluates the held-out problems of `data`.",
    )
    folder: PathText | None = None
    """Folder with NAME.jsonl or eval_NAME.jsonl of each set without path."""
    options: dict[SetName, SetOptions] = {}
    """What differs from a set's preset, by the set's name."""
    limit: PositiveInt | None = None
    """Only the first problems of each set, to try things out."""
    confidence: Float = Field(0.95, gt=0, lt=1)
    """Level of the confidence intervals, a fraction."""
    resamples: PositiveInt = 2000
    """Bootstrap replicates per interval."""
    seed: NonNegativeInt | None = None
    """Seed of the responses and the bootstrap; null: the run's."""
    beside: bool = False
    """In training, the sets are evaluated by servers of their own while the next steps train: docs/data.md."""
    server: ServerConfig = ServerConfig()
    """beside: these servers, of rollout.engine; those that the run starts are on its first node, on GPUs that neither
    the trainer nor its rollouts have."""

    @model_validator(mode="after")
    def _known_sets(self) -> EvalConfig:
        for name, options in self.options.items():
            if name not in PRESETS and options.path is None:
                raise ValueError(f"options.{name}: no preset is called so ({', '.join(PRESETS)}); give its path")
        for name in self.sets:
            if name not in PRESETS and name not in self.options:
                raise ValueError(f"sets: {name!r} is none of {', '.join(PRESETS)}; give options.{name}.path")
        if HELD_OUT in (*self.sets, *self.options):
            raise ValueError(f"{HELD_OUT!r} names the held-out problems of `data`; call the set otherwise")
        if len(set(self.sets)) < len(self.sets):
            raise ValueError(f"sets: {', '.join(self.sets)} names a set twice")
        return self


def set_path(eval_config: EvalConfig, name: str) -> Path | str:
    """Return the file of a set, or a text that says why there is none and what to do."""
    options = eval_config.options.get(name)
    if options is not None and options.path is not None:
        path = Path(options.path)
        return path if path.is_file() else f"eval.options.{name}.path={path}: no such file; name JSON lines or Parquet"
    if eval_config.folder is None:
        return (
            f"eval.sets has {name}, but neither eval.folder nor eval.options.{name}.path says where its problems are; "
            f"set one of them (JSON lines with `problem` and `answer`, or Parquet)"
        )
    folder, stems = Path(eval_config.folder), PRESETS[name].stems if name in PRESETS else (name,)
    names = [f"{prefix}{stem}.{end}" for end in ("jsonl", "parquet") for stem in stems for prefix in ("", "eval_")]
    files = [folder / file for file in names if (folder / file).is_file()]
    if files:
        return files[0]
    return (
        f"eval.folder={folder} holds none of {', '.join(names)} for the set {name}; put its problems there as JSON "
        f"lines with `problem` and `answer` or as Parquet, set eval.options.{name}.path, or take it out of eval.sets"
    )
