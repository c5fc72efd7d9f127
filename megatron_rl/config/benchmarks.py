"""How the paper evaluates, and what it publishes. Source: arXiv 2505.22617, section 4 and Table 2."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HELD_OUT = "held_out"  # stands for the held-out problems of the config's `data`


@dataclass(frozen=True, slots=True)
class Preset:
    """The protocol of one benchmark."""

    title: str  # the table's column
    stems: tuple[str, ...]  # of its file's name
    system: str | None  # key in prompts.json
    temperature: float  # 0 is greedy
    samples: int  # responses per problem


# GSM8K is not among the paper's sets: greedy, with the suffix of the others.
PRESETS: dict[str, Preset] = {
    "aime24": Preset("AIME24", ("aime24",), "thought_solution", 0.6, 32),
    "aime25": Preset("AIME25", ("aime25",), "thought_solution", 0.6, 32),
    "amc": Preset("AMC", ("amc",), "thought_solution", 0.6, 32),
    "math500": Preset("MATH-500", ("math500",), "thought_solution", 0.0, 1),
    "omni_math": Preset("OMNI-MATH", ("omni_math", "omni_math_rule"), "actions", 0.0, 1),
    "olympiadbench": Preset("OlympiadBench", ("olympiadbench",), "thought_solution", 0.0, 1),
    "minerva": Preset("Minerva", ("minerva",), "thought_solution", 0.0, 1),
    "gsm8k": Preset("GSM8K", ("gsm8k",), None, 0.0, 1),
}
PAPER_SETS = ("aime24", "aime25", "amc", "math500", "omni_math", "olympiadbench", "minerva")


@dataclass(frozen=True, slots=True)
class Published:
    """One row of the paper's table, in percent as printed: avg@32 for AIME and AMC."""

    model: str
    method: str
    scores: tuple[float, ...]  # in the order of PAPER_SETS
    average: float  # as printed; not the mean of the printed scores, for a reason that the paper does not give


PUBLISHED: tuple[Published, ...] = (
    Published("Qwen2.5-7B", "GRPO", (21.2, 9.6, 58.7, 78.8, 27.9, 40.7, 36.7), 38.6),
    Published("Qwen2.5-7B", "clip-higher", (18.1, 11.5, 56.6, 79.2, 29.8, 43.3, 40.4), 38.8),
    Published("Qwen2.5-7B", "Clip-Cov", (22.1, 15.8, 58.2, 80.4, 30.5, 44.1, 41.1), 40.4),
    Published("Qwen2.5-7B", "KL-Cov", (22.6, 12.9, 61.4, 80.8, 29.1, 42.6, 38.2), 40.6),
    Published("Qwen2.5-32B", "GRPO", (21.8, 16.2, 69.7, 84.2, 35.2, 43.6, 45.5), 45.8),
    Published("Qwen2.5-32B", "clip-higher", (35.6, 22.3, 69.5, 77.2, 35.1, 42.5, 43.0), 47.2),
    Published("Qwen2.5-32B", "Clip-Cov", (32.3, 22.7, 67.2, 87.0, 42.0, 57.2, 46.0), 50.3),
    Published("Qwen2.5-32B", "KL-Cov", (36.8, 30.8, 74.5, 84.6, 39.1, 49.0, 46.3), 52.2),
)


@cache
def prompts() -> dict[str, Any]:
    """Return the paper's prompts: `suffix`, `systems` by key, and where they come from."""
    return json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))
