"""Known problem sets: where they come from, how their rows read, and what the paper puts around a problem.

Source of the prompts: arXiv 2505.22617 and its evaluation files. The system prompt of evaluation asks for a thought and
a solution, OMNI-MATH's for named actions; training on DAPO-Math-17k has the suffix alone.
"""

from dataclasses import dataclass

from megatron_rl.config.benchmarks import prompts

_SUFFIX: str = prompts()["suffix"]
_SYSTEMS: dict[str, str] = prompts()["systems"]


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
    suffix: str = _SUFFIX
    system: str | None = None
    evaluation: bool = False
    elsewhere: str = ""  # why the hub will not do, and where the file is


_AROUND_DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n",
    '\n\nRemember to put your answer on its own line after "Answer:".',
)


# The paper scores OMNI-MATH by rules, so on the part whose answers rules can grade.
_OMNI_MATH = (
    "KbsdJames/Omni-MATH on the hub has 4,428 problems and no split of the 2,821 whose answers rules can grade, which "
    "are the paper's; they are omni_math_rule.jsonl of github.com/KbsdJames/omni-math-rule"
)


def _evaluation(
    source: str, hub: str, split: str = "test", config: str | None = None, system: str = _SYSTEMS["thought_solution"]
) -> Preset:
    return Preset(source, hub, config, split, system=system, evaluation=True)


PRESETS: dict[str, Preset] = {
    "plain": Preset("", suffix=""),
    "dapo_math_17k": Preset(
        "dapo-math-17k",
        "BytedTsinghua-SIA/DAPO-Math-17k",
        around=(_AROUND_DAPO,),
        suffix="\n" + _SUFFIX,
    ),
    "math": Preset("math-train", "DigitalLearningGmbH/MATH-lighteval"),
    "gsm8k": Preset("gsm8k", "openai/gsm8k", config="main"),
    "aime24": _evaluation("aime", "HuggingFaceH4/aime_2024", "train"),
    "aime25": _evaluation("aime25", "math-ai/aime25"),
    "amc": _evaluation("amc", "AI-MO/aimo-validation-amc", "train"),
    "math500": _evaluation("math", "HuggingFaceH4/MATH-500"),
    "olympiadbench": _evaluation("olympiad_bench", "Hothan/OlympiadBench", "train", "OE_TO_maths_en_COMP"),
    "minerva": _evaluation("minerva", "math-ai/minervamath"),
    "omni_math": Preset("omni-math", elsewhere=_OMNI_MATH, system=_SYSTEMS["actions"], evaluation=True),
    "gsm8k_test": Preset("gsm8k", "openai/gsm8k", "main", "test", evaluation=True),
}
