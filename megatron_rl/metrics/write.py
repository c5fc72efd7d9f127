"""Writers of a run's numbers: metrics.jsonl, samples.jsonl, ledger.jsonl, TensorBoard, W&B and the terminal.

Only rank 0 writes; on other ranks every method returns at once, so the training loop needs no `if rank == 0`.
"""

import contextlib
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from megatron_rl.config import Config, dump_config
from megatron_rl.errors import ConfigError
from megatron_rl.files import naming, write_atomically
from megatron_rl.launch import say
from megatron_rl.metrics.jsonl import amend_row, cut_from_step, to_line, without_non_finite

# what the terminal shows: label, metric, format
SHOWN = (
    ("reward", "reward/mean", "{:.3f}"),
    ("accuracy", "reward/accuracy", "{:.3f}"),
    ("entropy", "entropy/mean", "{:.3f}"),
    ("tokens/s", "throughput/tokens_per_second", "{:,.0f}"),
)


class RunLogger:
    """The writers of one run; a context manager.

    `start_step`: the first step that this process will log. Rows of that step and later, left by an earlier process
    that was killed after its last checkpoint, are dropped, so that the files tell one story.

    Raises: ConfigError when logging.wandb_project is set and wandb is not installed; UserError when an existing file
    has a broken line in its middle.
    """

    def __init__(
        self, run_dir: Path, config: Config, *, rank: int = 0, start_step: int = 0, console: Console | None = None
    ) -> None:
        """Open the files of the run; config.yaml becomes the resolved `config`."""
        self._active = rank == 0
        if not self._active:
            return
        self._run_dir = run_dir
        self._wandb = _start_wandb(run_dir, config) if config.logging.wandb_project else None
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / "config.yaml", dump_config(config))
        self._progress = _ProgressDisplay(console or Console(), config.name, start_step, config.train.num_steps)
        self._files: dict[str, TextIO] = {}
        for name in ("metrics", "samples", "ledger"):
            path = run_dir / f"{name}.jsonl"
            if dropped := cut_from_step(path, start_step):
                self.message(f"{path}: dropped {dropped} rows from step {start_step} on, of an earlier process")
            self._files[name] = path.open("a", encoding="utf-8")
        self._tensorboard: Any = None
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import; not needed without it

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step)

    def log(self, step: int, metrics: dict[str, float], *, late: bool = False) -> None:
        """Write one step everywhere; the metrics.jsonl line is flushed, so it outlives this process from then on.
        `late`: add to a step that was logged before; to W&B, whose steps only go on, with a metric `eval/step`."""
        if not self._active:
            return
        if late:
            path = self._run_dir / "metrics.jsonl"
            self._files["metrics"].close()
            amend_row(path, step, metrics)
            self._files["metrics"] = path.open("a", encoding="utf-8")
        else:
            self._append("metrics", {"step": step, **{name: metrics[name] for name in sorted(metrics)}})
            self._progress.advance(step, metrics)
        if self._tensorboard is not None:
            with naming(self._run_dir / "tensorboard"):
                for name, value in metrics.items():
                    self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics | ({"eval/step": step} if late else {}), step=None if late else step)

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Append decoded rollouts to samples.jsonl, one line each, with their step."""
        if not self._active:
            return
        self._append("samples", *({"step": step, **sample} for sample in samples))

    def log_ledger(self, step: int, entry: dict[str, Any], tokenizer: Any) -> None:
        """Append who spent the step's entropy to ledger.jsonl: algorithms/ledger.py's entry, six digits a number, with
        each token's text put before its id's columns. Nothing without tokens."""
        if not self._active or not entry:
            return
        named = [[tokenizer.decode([row[0]]), *row] for row in entry["tokens"]]
        self._append("ledger", {"step": step, **without_non_finite(entry | {"tokens": named}, 6)})

    def _append(self, name: str, *rows: dict[str, Any]) -> None:
        file = self._files[name]
        with naming(Path(file.name)):
            file.writelines(map(to_line, rows))
            file.flush()

    def message(self, text: str) -> None:
        """Tell the user something, above the progress display."""
        if self._active:
            say(text, write=self._progress.message)

    def close(self) -> None:
        """Flush and close every writer, also when one cannot be; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        with contextlib.ExitStack() as stack:
            if self._wandb is not None:
                stack.callback(self._wandb.finish)
            if self._tensorboard is not None:
                stack.callback(self._tensorboard.close)
            for file in self._files.values():
                stack.enter_context(naming(Path(file.name)))
                stack.callback(file.close)
            stack.callback(self._progress.close)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, also when the run failed: what was logged stays readable. A disk that was full in the run is so here
        too, and must not hide the reason."""
        with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
            self.close()


class _ProgressDisplay:
    """A live bar on a terminal, one plain line a step elsewhere (a file, a pipe, a Slurm log)."""

    def __init__(self, console: Console, name: str, start_step: int, num_steps: int) -> None:
        self._console, self._name, self._num_steps = console, name, num_steps
        self._start_step, self._start = start_step, time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            columns = [TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()]
            self._bar = Progress(*columns, TextColumn("{task.fields[shown]}"), console=console)
            self._task = self._bar.add_task(name, total=num_steps, completed=start_step, shown="starting")
            self._bar.start()

    def advance(self, step: int, metrics: dict[str, float]) -> None:
        """Show a finished step."""
        done = step + 1 - self._start_step
        left = (time.monotonic() - self._start) / max(done, 1) * (self._num_steps - step - 1)
        shown = [f"{label} {style.format(metrics[name])}" for label, name, style in SHOWN if name in metrics]
        text = "  ".join([*shown, f"left {format_duration(left)}"])
        if self._bar is None:
            # soft_wrap: a line per step whatever width rich assumes for a file
            self._console.print(
                f"{self._name}  step {step + 1}/{self._num_steps}  {text}", soft_wrap=True, highlight=False
            )
        else:
            self._bar.update(self._task, completed=step + 1, shown=text)

    def message(self, text: str) -> None:
        """Print above the bar."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def format_duration(seconds: float) -> str:
    """Return `m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _start_wandb(run_dir: Path, config: Config) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"logging.wandb_project={config.logging.wandb_project!r} needs wandb, which is not installed: "
            "pip install wandb, or remove the option"
        ) from error
    run_dir.mkdir(parents=True, exist_ok=True)
    # Each process is a W&B run of its own (W&B refuses steps that go back); the group holds the resumed ones together.
    return wandb.init(
        project=config.logging.wandb_project,
        name=config.name,
        group=config.name,
        dir=str(run_dir),
        config=config.model_dump(mode="json"),
    )
