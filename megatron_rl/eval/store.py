"""The samples of one set on disk: appended as they come, one line each, and merged when all are there.

While a set is sampled every rank appends to a part of its own, so that a kill costs at most the line being written.
The next process, of any number of ranks, merges what the parts have into samples.jsonl and goes on from there.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.eval.benchmarks import Benchmark
from megatron_rl.files import naming, write_atomically
from megatron_rl.metrics.jsonl import read_rows, replace_lines, to_line

SampleKey = tuple[str, int]  # the problem's id, the sample's number


class EvalError(RuntimeError, UserError):
    """An evaluation cannot be completed, or not in this folder."""


class SampleStore:
    """The folder of one set: protocol.json, problems.jsonl, samples.jsonl."""

    def __init__(self, folder: Path, bench: Benchmark, protocol: dict[str, Any]) -> None:
        """Keep the set. `protocol`: all that the samples depend on, as JSON; samples of different protocols never
        mix."""
        self.folder, self._bench, self._protocol = folder, bench, protocol

    def open(self) -> list[dict[str, Any]]:
        """Claim the folder (rank 0 alone) and return the samples that it has already.

        Raises: EvalError when they are another evaluation's.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "protocol.json"
        wanted = json.loads(json.dumps(self._protocol))
        if path.is_file():
            theirs = json.loads(path.read_text(encoding="utf-8"))
            differs = [name for name in wanted | theirs if wanted.get(name) != theirs.get(name)]
            if differs:
                name = differs[0]
                raise EvalError(
                    f"{self.folder} holds an evaluation with another {', '.join(differs)} ({name}: "
                    f"{theirs.get(name)!r} there, {wanted.get(name)!r} here); give another --out, or remove that folder"
                )
        write_atomically(path, json.dumps(self._protocol, indent=1) + "\n")
        problems = [{"id": p.id, "problem": p.text, "answer": p.prompt.answer} for p in self._bench.problems]
        write_atomically(self.folder / "problems.jsonl", "".join(map(to_line, problems)))
        return self.merge()

    def merge(self) -> list[dict[str, Any]]:
        """Move all samples so far into samples.jsonl (rank 0 alone) and return them, in the order of the set."""
        samples: dict[SampleKey, dict[str, Any]] = {}
        parts = sorted(self.folder.glob("part*.jsonl"))
        for path in [self.folder / "samples.jsonl", *parts]:
            if path.is_file():
                samples |= {(row["id"], row["sample"]): row for row in read_rows(path)[0]}
        order = [(p.id, i) for p in self._bench.problems for i in range(self._bench.samples)]
        rows = [samples[key] for key in order if key in samples]
        if parts:
            self.replace(rows)
            for path in parts:
                path.unlink()
        return rows

    def replace(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write all samples anew (rank 0 alone)."""
        replace_lines(self.folder / "samples.jsonl", (to_line(row).encode() for row in rows))

    @contextlib.contextmanager
    def part(self, rank: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Give what appends a sample of this rank, which outlives the process from then on. Have one at a time, between
        `open` and `merge`."""
        path = self.folder / f"part{rank:04d}.jsonl"
        file = path.open("a", encoding="utf-8")

        def add(row: dict[str, Any]) -> None:
            with naming(path):
                file.write(to_line(row))
                file.flush()

        try:
            yield add
        except BaseException:
            with contextlib.suppress(OSError):  # a disk that was full is so here too, and must not hide the reason
                file.close()
            raise
        with naming(path):
            file.close()


def model_name(path: str | Path) -> str:
    """Return a name for the model of a folder: the folder's, with the run's where a run wrote it."""
    folder = Path(path).resolve()
    if folder.parent.name == "checkpoints":
        return f"{folder.parent.parent.name}-{folder.name}"
    return f"{folder.parent.name}-hf" if folder.name == "hf" else folder.name
