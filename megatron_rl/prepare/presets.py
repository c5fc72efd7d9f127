"""Known problem sets, as assets/presets.yaml states them."""

from dataclasses import dataclass, replace
from typing import Any

from megatron_rl.config.benchmarks import prompts
from megatron_rl.files import read_asset


@dataclass(frozen=True)
class Preset:
    """One problem set. Fields are tried in order; a dot descends into a nested value."""

    source: str  # value of `source` in the rows, by which metrics and tables group them
    hub: str = ""  # Hugging Face dataset; empty: local files only
    config: str | None = None
    split: str = "train"
    problem: tuple[str, ...] = ("problem", "question", "prompt")
    answer: tuple[str, ...] = ("answer", "final_answer", "reward_model.ground_truth", "solution")
    around: tuple[tuple[str, str], ...] = ()  # (prefix, suffix) pairs that the set itself puts around a problem
    suffix: str = "{suffix}"
    system: str | None = None
    elsewhere: str = ""  # why the hub will not do, and where the file is


def _preset(stated: dict[str, Any]) -> Preset:
    preset, paper = Preset(**stated | {"around": tuple(map(tuple, stated.get("around", ())))}), prompts()
    system = None if preset.system is None else paper["systems"][preset.system]
    return replace(preset, suffix=preset.suffix.replace("{suffix}", paper["suffix"]), system=system)


PRESETS = {name: _preset(stated) for name, stated in read_asset(__file__, "presets.yaml").items()}
