"""Options of the reward: which verifiers, how their values are put together, and the processes that run them."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from megatron_rl.algorithms.section import Float, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, Section


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]


class MathOptions(Section):
    """Options of `math`: the last \\boxed against the gold answer, by value."""

    strict: bool = False
    r"""Only a \boxed counts, an integer must be written as an integer, a fraction reduced, a rounded decimal is wrong,
    as in PRIME's verifier."""
    rounding_digits: NonNegativeInt = 5
    """Significant digits from which on a decimal counts as the exact gold answer that it rounds, as 3.1416 does for pi;
    0: never."""
    unevaluated: bool = False
    """A sum or product over a range counts as its value, though the gold answer has none."""
    earlier_box: bool = False
    r"""An earlier \boxed counts when the last one is cut."""


class RegexOptions(Section):
    """Options of `regex`: the first group of the last match must be the answer."""

    pattern: Pattern
    """Python regular expression; without a group the whole match counts."""
    ignore_case: bool = False
    """Whether the match, and the comparison with the answer, ignore upper and lower case."""


class FormatOptions(Section):
    """Options of `format`: 1 when the pattern is found, whatever the answer."""

    pattern: Pattern
    r"""Python regular expression; \A and \Z anchor it to the whole response."""


class RemoteOptions(Section):
    """Options of `remote`: POST {"response", "answer"}, reply {"score": number}."""

    url: str = Field(pattern=r"^https?://")
    """Address of the verifier."""
    headers: dict[str, str] = Field(default_factory=dict)
    """HTTP headers of the request, such as Authorization; saved with the config."""
    timeout_seconds: PositiveFloat = 5.0
    """Time that one try may take."""
    retries: NonNegativeInt = 2
    """Further tries after failed connections, HTTP 429 and 5xx."""


class VerifierConfig(Section):
    """A verifier with its options, which are the section of its own name."""

    function: str = "countdown"
    """countdown, exact, math, regex, format, remote, or module:function taking (response, answer) and returning a
    float."""
    math: MathOptions | None = None
    """Options of function=math."""
    regex: RegexOptions | None = None
    """Options of function=regex."""
    format: FormatOptions | None = None
    """Options of function=format."""
    remote: RemoteOptions | None = None
    """Options of function=remote."""

    @property
    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of the function."""
        section = getattr(self, self.function, None) if self.function in _WITH_OPTIONS else None
        return {} if section is None else section.model_dump()

    @model_validator(mode="after")
    def _options_of_the_function(self) -> VerifierConfig:
        for name in _WITH_OPTIONS:
            if getattr(self, name) is not None and name != self.function:
                raise ValueError(f"{name}: has no effect with function={self.function}; remove it")
        if self.function in _REQUIRED and getattr(self, self.function) is None:
            raise ValueError(f"function={self.function} needs its section, {self.function}: {_REQUIRED[self.function]}")
        return self


_BOUNDED = ("countdown", "exact")  # no answer makes them hang or crash, and a process costs more than they do
_WITH_OPTIONS = ("math", "regex", "format", "remote")
_REQUIRED = {"regex": "{pattern: ...}", "format": "{pattern: ...}", "remote": "{url: ...}"}


class TermConfig(VerifierConfig):
    """A verifier whose weighted value is added to the reward and leaves the score alone."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """Name of the metric reward/term/<name>."""
    weight: Float
    """Weight in the reward; negative for a penalty."""


class RewardConfig(VerifierConfig):
    """What a response earns: reward = weight * score + terms + length + penalties on overlong responses.

    The score is the verdict of `function`: accuracy is made of it.
    """

    weight: PositiveFloat = 1.0
    """Weight of the score in the reward."""
    terms: tuple[TermConfig, ...] = ()
    """Further verifiers whose values are added to the reward, format for instance."""
    length_weight: NonNegativeFloat = 0.0
    """Weight of Kimi's length reward, relative to the group: +0.5 for the shortest correct response to -0.5 for the
    longest, wrong ones at most 0; 0: off."""
    max_failures: Fraction = 0.1
    """Fraction of a step's gradings that may raise or return NaN (scored 0, counted)."""
    workers: NonNegativeInt | None = None
    """Grading processes of each rank at most; 0: in the trainer's own process, without a deadline; null: 0 when every
    verifier is countdown or exact, whose work is bounded, else 2."""
    deadline_seconds: PositiveFloat = 10.0
    """CPU time for one answer, after which it scores 0; time spent waiting for something but the CPU, as for a remote
    verifier's reply, counts too."""
    memory_gib: PositiveFloat | None = 8.0
    """Private memory of a grading process; null: no limit."""

    @property
    def processes(self) -> int:
        """Return `workers`, or what its null stands for."""
        if self.workers is not None:
            return self.workers
        return 0 if all(verifier.function in _BOUNDED for verifier in (self, *self.terms)) else 2

    @model_validator(mode="after")
    def _names_differ(self) -> RewardConfig:
        names = [term.name for term in self.terms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"terms: the name {twice[0]!r} comes twice")
        return self
