"""Benchmarks: which sets are evaluated, from which files, how they are sampled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from megatron_rl.config.benchmarks import HELD_OUT, PRESETS
from megatron_rl.config.section import NonNegativeInt, PositiveInt, Section

if TYPE_CHECKING:
    pass

SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class SetOptions(Section):
    """One set. null keeps what its preset says; a set without preset needs `path`."""

    path: str | None = Field(None, description="JSON lines with `problem` and `answer`; null: found in eval.folder")
    samples: PositiveInt | None = Field(None, description="responses per problem; without preset: 1")
    temperature: Annotated[float, Field(ge=0)] | None = Field(
        None, description="divides the logits, 0 is greedy; without preset: 0"
    )
    system_prompt: str | None = Field(None, description="system message of the chat template; empty: none")
    suffix: str | None = Field(None, description="appended to each problem")


class EvalConfig(Section):
    """Benchmarks, for `megatron-rl eval` and, with train.eval_every, during training. The length of prompts and
    responses, the engine and the grader are those of `data`, `rollout` and `reward`."""

    sets: tuple[SetName, ...] = Field(
        (),
        description=f"in the table's order, of {', '.join(PRESETS)} or with an entry in `options`; empty: the "
        "command evaluates the held-out problems of `data`",
    )
    folder: str | None = Field(None, description="holds NAME.jsonl or eval_NAME.jsonl of each set without path")
    options: dict[SetName, SetOptions] = Field({}, description="by set: what differs from its preset")
    limit: PositiveInt | None = Field(None, description="only the first problems of each set, to try things out")
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(0.95, description="level of the intervals, fraction")
    resamples: PositiveInt = Field(2000, description="bootstrap replicates per interval")
    seed: NonNegativeInt | None = Field(None, description="of the responses and the bootstrap; null: the run's")

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
    """The file of a set, or a text that says why there is none and what to do."""
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
    found = next((folder / file for file in names if (folder / file).is_file()), None)
    return found or (
        f"eval.folder={folder} holds none of {', '.join(names)} for the set {name}; put its problems there as JSON "
        f"lines with `problem` and `answer` or as Parquet, set eval.options.{name}.path, or take it out of eval.sets"
    )
