"""Sends malformed model outputs through the graders: python scripts/fuzz_graders.py [COUNT] [SEED]. Exit code 1 when a
verifier raised, or an answer had no verdict long after its deadline."""

from __future__ import annotations

import sys
import time
from collections import Counter
from concurrent.futures import Future
from itertools import islice

from megatron_rl.grading.fuzz import malformed
from megatron_rl.grading.pool import GradingPool
from megatron_rl.grading.verdict import Verdict, Verifier

DEADLINE = 2.0
VERIFIERS = (
    Verifier("math", {}),
    Verifier("exact", {}),
    Verifier("regex", {"pattern": r"\\boxed\{(.*?)\}"}),
    Verifier("format", {"pattern": r"\A[^$]*\$[^$]+\$"}),
)


def main(count: int, seed: int) -> int:
    began, outcomes, right = time.monotonic(), Counter[str](), 0
    pool = GradingPool(VERIFIERS, workers=2, deadline_seconds=DEADLINE)
    pairs = malformed(count, seed)
    failed = 0
    while chunk := list(islice(pairs, 500)):
        begun: list[Future[Verdict]] = [pool.submit(*pair) for pair in chunk]
        for pair, future in zip(chunk, begun, strict=True):
            verdict = future.result(timeout=DEADLINE * len(chunk) + 60)
            outcomes[verdict.unfinished or ("error" if verdict.error else "graded")] += 1
            right += verdict.values[0] > 0
            if verdict.error:
                failed += 1
                print(f"{pair!r}:\n{verdict.error}")
            elif verdict.unfinished:
                print(f"{verdict.unfinished}: {pair[0][:150]!r} against {pair[1]!r}")
    pool.close()
    seconds = time.monotonic() - began
    print(f"{count} outputs in {seconds:.0f} s ({count / seconds:.0f}/s): {dict(outcomes)}, accepted {right}")
    return int(failed > 0)


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    sys.exit(main(*(numbers + [100_000, 1][len(numbers) :])))
