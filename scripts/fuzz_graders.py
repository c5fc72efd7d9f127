"""Sends malformed model outputs through the graders: python scripts/fuzz_graders.py [--count N] [--seed S].

Exit code 1 when a verifier raised, or an answer crashed its process or had no verdict long after its deadline. Answers
that reach the deadline are counted and shown: they cost themselves alone, and yet each is work that a bound in
megatron_rl/grading/ should have refused.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import Future
from itertools import islice

from megatron_rl.grading.fuzz import malformed
from megatron_rl.grading.pool import GradingPool
from megatron_rl.grading.verdict import Verdict, Verifier

CLOCK = Verifier("fuzz_graders:clock", {})  # this module, which a grading process finds where the script was found
VERIFIERS = (
    CLOCK,
    Verifier("math", {}),
    Verifier("math", {"strict": True}),
    Verifier("exact", {}),
    Verifier("regex", {"pattern": r"\\boxed\{([^{}]*)\}"}),
    Verifier("format", {"pattern": r"\A[^$]*\$[^$]+\$"}),
    CLOCK,
)
OUTCOMES = ("graded", "accepted", "deadline", "crash", "error", "hang")
CHUNK = 256
GRACE_SECONDS = 60.0  # beyond the deadlines of all that is queued: then it is a hang
PROGRESS_SECONDS = 5.0


def clock(response: str, answer: str) -> float:
    """CPU seconds of the grading process so far."""
    return time.process_time()


class Tally:
    """What came of the answers, by kind."""

    def __init__(self, count: int) -> None:
        self.count, self.done = count, 0
        self.began = self.told = time.monotonic()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(
            float
        )  # of CPU; of an answer that was not graded, its deadline
        self.longest: dict[str, tuple[float, str]] = {}

    def add(self, kind: str, response: str, outcome: str, seconds: float) -> None:
        self.done += 1
        self.outcomes[kind, outcome] += 1
        self.seconds[kind] += seconds
        if seconds > self.longest.get(kind, (0.0, ""))[0]:
            self.longest[kind] = seconds, response

    def progress(self) -> None:
        now = time.monotonic()
        if now - self.told < PROGRESS_SECONDS:
            return
        self.told = now
        rate = self.done / (now - self.began)
        late = sum(n for (_, outcome), n in self.outcomes.items() if outcome not in ("graded", "accepted"))
        left = (self.count - self.done) / rate
        print(f"{self.done:,}/{self.count:,}, {rate:.0f}/s, {left:.0f} s to go, {late} not graded", flush=True)

    def total(self, outcome: str) -> int:
        return sum(n for (_, what), n in self.outcomes.items() if what == outcome)

    def table(self) -> str:
        heads = ("kind", "answers", *OUTCOMES[1:], "ms each", "longest s")
        lines = ["".join(f"{head:>11}" for head in heads)]
        for kind, (longest, _) in sorted(self.longest.items()):
            counts = [self.outcomes[kind, outcome] for outcome in OUTCOMES]
            cells = [kind, sum(counts), *counts[1:], f"{1000 * self.seconds[kind] / sum(counts):.2f}", f"{longest:.2f}"]
            lines.append("".join(f"{cell!s:>11}" for cell in cells))
        return "\n".join(lines)


def main(count: int, seed: int, workers: int, deadline: float) -> int:
    pool = GradingPool(VERIFIERS, workers=workers, deadline_seconds=deadline)
    tally, triples, hung = Tally(count), malformed(count, seed), False
    while not hung and (chunk := list(islice(triples, CHUNK))):
        begun: list[Future[Verdict]] = [pool.submit(response, gold) for _, response, gold in chunk]
        for (kind, response, gold), future in zip(chunk, begun, strict=True):
            try:
                verdict = future.result(timeout=deadline * len(chunk) + GRACE_SECONDS)
                outcome = verdict.unfinished or ("error" if verdict.error else "graded")
            except TimeoutError:
                verdict, outcome, hung = Verdict(()), "hang", True
            if outcome == "graded":
                began, accepted, *_, ended = verdict.values
                tally.add(kind, response, "accepted" if accepted else outcome, ended - began)
            else:
                tally.add(kind, response, outcome, deadline)
            if outcome != "graded":
                print(f"{outcome}: {kind}, {response[:300]!r} against {gold!r}\n{verdict.error}", flush=True)
            tally.progress()
            if hung:
                break
    pool.close()
    seconds = time.monotonic() - tally.began
    print(tally.table())
    print(
        f"{tally.done:,} outputs (seed {seed}) in {seconds:.0f} s, {tally.done / seconds:.0f}/s: "
        + ", ".join(f"{tally.total(outcome):,} {outcome}" for outcome in OUTCOMES)
    )
    return int(any(tally.total(outcome) for outcome in ("crash", "error", "hang")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="outputs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the outputs (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="grading processes (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=10.0, help="seconds for an answer (default: %(default)s)")
    given = parser.parse_args()
    sys.exit(main(given.count, given.seed, given.workers, given.deadline))
