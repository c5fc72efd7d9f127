"""A whole RL step against TRL's GRPOTrainer on a CPU: the quickstart's model from one folder (or a wider one, see
--width), the same prompts in the same order, sampling, updates and verifier, by turns:
python scripts/bench_step.py --trl /path/to/python.

TRL lives in an environment of its own: python -m venv trl && trl/bin/pip install trl==1.16.0 torch==2.13.0 (the build
of torch that this project runs on, so that both compute with the same kernels).

--model FOLDER takes any Hugging Face model instead, with the problems of --config (configs/smollm2_135m.yaml: model and
problems come from scripts/get_smollm2.py) and responses of exactly --tokens tokens, and says what the processor could
do: the forward and backward passes at the rate of its matrix products, decoding at the rate at which it reads weights.

--before CHECKOUT... measures earlier versions of this project as well, by turns, each with its own quickstart:
git worktree add /tmp/before COMMIT; python scripts/bench_step.py --layouts "ours dp2" --before /tmp/before
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Path("configs") / "quickstart.yaml"
LAYOUTS = {  # of two cores: what is measured, with its processes and threads each
    "ours dp2": (2, 1),
    "ours dp2 sharded": (2, 1),
    "ours dp2 bare": (2, 1),
    "ours tp2": (2, 1),
    "ours 1x2": (1, 2),
    "trl 1x2": (1, 2),
    "trl dp2": (2, 1),
}
_DP2 = ["parallel.tp=1", "parallel.world_size=2"]
# gradients are added up by all-reduce and every process updates all weights, as TRL's do
_ALL_REDUCE = "parallel.distributed_optimizer=false"
# without what TRL does not do: realised entropy change, entropy ledger, values of the logged samples' tokens
_BARE = ["train.entropy_probe=false", "logging.ledger_every=0", "logging.samples_per_step=0"]
OVERRIDES = {
    "ours dp2": [*_DP2, _ALL_REDUCE],
    "ours dp2 sharded": _DP2,
    "ours dp2 bare": [*_DP2, _ALL_REDUCE, *_BARE],
    "ours tp2": [],
    "ours 1x2": ["parallel.tp=1"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="the Python interpreter of an environment with TRL")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a run")
    parser.add_argument(
        "--warmup", type=int, default=12, help="steps before them (oneDNN builds kernels for new shapes)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="runs of every layout, by turns")
    parser.add_argument(
        "--before", type=Path, nargs="+", default=[], help="checkouts of earlier versions of this project"
    )
    parser.add_argument("--width", type=int, default=1, help="times the quickstart's hidden and intermediate size")
    parser.add_argument("--model", type=Path, help="Hugging Face folder of another model")
    parser.add_argument("--config", type=Path, default=CONFIG, help="whose problems and batches; with --model")
    parser.add_argument("--tokens", type=int, help="of every response; with --model")
    parser.add_argument("--set", nargs="*", default=[], help="a.b=c, for both sides; model.dtype=float32 for instance")
    parser.add_argument("--trl-worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trl_worker:
        train_trl(options.trl_worker)
        return
    wants_trl = any(layout.startswith("trl") for layout in options.layouts)
    if wants_trl and not (options.trl and Path(options.trl).is_file()):
        sys.exit(f"--trl: got {options.trl}, expected the Python interpreter of an environment with TRL.\n{__doc__}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = options.model.resolve() if options.model else warmed_model(folder, options.width)
        task = write_task(folder, model, options)
        roots = [ROOT, *(path.resolve() for path in options.before)]
        # earlier versions know not all of the other one's options
        compared = [layout for layout in OVERRIDES if layout != "ours dp2 bare"]
        turns = [(layout, root) for layout in options.layouts for root in (roots if layout in compared else [ROOT])]
        names = {turn: turn[0] if turn[1] == ROOT else f"{turn[0]} of {turn[1].name}" for turn in turns}
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in names.values()}
        for number in range(options.rounds):
            for (layout, root), name in names.items():
                print(f"round {number + 1}, {name}: load {os.getloadavg()[0]:.1f} at its start", flush=True)
                out = folder / f"{number} {name}"
                ours = layout in OVERRIDES
                found = (
                    run_ours(out, layout, task, root)
                    if ours
                    else run_trl(out, layout, task, os.path.abspath(options.trl))
                )
                rows[name] += found[options.warmup :]
            show(rows, task)  # after every round: an interrupted run has shown the rounds it finished


def show(rows: dict[str, list[dict[str, float]]], task: dict[str, Any]) -> None:
    """Medians over the measured steps of all rounds; `rows`: seconds by phase, `total` among them, and `tokens`, the
    mean length of the responses."""
    for layout, steps in rows.items():
        seconds = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
        total, length = seconds.pop("total"), seconds.pop("tokens")
        quarters = statistics.quantiles([step["total"] for step in steps], n=4)
        phases = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
        print(
            f"{layout}: {task['samples'] / total:.0f} samples/s; step {total:.3f} s (middle half {quarters[0]:.3f} to "
            f"{quarters[2]:.3f}, {len(steps)} steps): {phases}; {length:.1f} tokens a response"
        )
    passes, decoding = task["limit"]
    print(
        f"limit of {task['processor']}: {passes:.3f} s for forward and backward passes, {decoding:.3f} s for decoding"
    )


def limits(task: dict[str, Any], prompt_tokens: float) -> tuple[float, float]:
    """Seconds of a step, when its passes ran at the rate of large matrix products on all cores, every prompt computed
    once, and decoding at the rate at which two processes read their weights."""
    import torch

    from megatron_rl.models.architecture import resolve_hf_config
    from megatron_rl.plan.shapes import forward_flops, matrix_parameters, shape_of

    shape = shape_of(resolve_hf_config(json.loads((Path(task["model"]) / "config.json").read_text())).to_dict())
    samples, length, dtype = task["samples"], task["max_response_tokens"], getattr(torch, task["dtype"])
    tokens = prompt_tokens * samples / task["samples_per_prompt"] + samples * length
    flops = 3 * tokens * sum(forward_flops(shape, prompt_tokens + length / 2))
    torch.set_num_threads(os.cpu_count() or 1)
    a, many = torch.ones(2048, 2048, dtype=dtype), torch.ones(2**28, dtype=torch.uint8).view(torch.int64)
    product = min(timed(lambda: a @ a) for _ in range(9))
    reading = min(timed(many.sum) for _ in range(9))
    weights = sum(matrix_parameters(shape)) * dtype.itemsize * 2  # of two processes
    return flops / (2 * 2048**3 / product), length * weights / (2**28 / reading)


def timed(function: Any) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def processor() -> str:
    """Its name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "this processor")


def warmed_model(folder: Path, width: int) -> Path:
    """The quickstart's model, as many times as wide with as many heads, after its warm start and one RL step."""
    sys.path.insert(0, str(ROOT))
    from megatron_rl.config import load_config

    hf = load_config(ROOT / CONFIG).model.hf_config
    assert hf is not None
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    overrides = [f"model.hf_config.{name}={hf[name] * width}" for name in names]
    overrides += ["train.num_steps=1", "train.save_hf=true"]
    train_ours(folder / "warm", overrides, threads=1, root=ROOT)
    return folder / "warm" / "hf"


def write_task(folder: Path, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What both trainers are asked to do, as plain data, with the prompts in the order in which ours draws them."""
    sys.path.insert(0, str(ROOT))
    from megatron_rl.config import load_config
    from megatron_rl.data.cursor import PromptCursor
    from megatron_rl.data.problems import load_prompts
    from megatron_rl.data.tokenizer import build_tokenizer

    overrides = list(options.set)
    if options.model:
        # a token that no policy samples: both sides are asked for the same lengths
        unused = json.loads((model / "config.json").read_text())["vocab_size"] - 1
        overrides += [f"model.path={model}", f"rollout.stop_token_ids=[{unused}]", "train.share_prompts=auto"]
        overrides += [f"rollout.max_response_tokens={options.tokens}"] if options.tokens else []
    config, steps = load_config(options.config, overrides), options.warmup + options.steps
    tokenizer = build_tokenizer(config)
    cursor = PromptCursor(load_prompts(config, tokenizer).train, config.seed)
    prompts = [prompt for _ in range(steps) for prompt in cursor.take(config.train.prompts_per_step)]
    reward = config.reward
    task = {
        "model": str(model),
        "config": str(options.config),
        "overrides": overrides,
        "fixed": bool(options.model),
        "dtype": config.model.dtype,
        "steps": steps,
        "updates": config.minibatches_per_step,
        "samples": config.train.prompts_per_step * config.rollout.samples_per_prompt,
        "samples_per_prompt": config.rollout.samples_per_prompt,
        "max_response_tokens": config.rollout.max_response_tokens,
        "temperature": config.rollout.temperature,
        "eps": [config.loss.eps_low, config.loss.eps_high],  # type: ignore[attr-defined]
        "optimizer": config.optimizer.model_dump(),
        "seed": config.seed,
        "reward": [reward.function, reward.regex.model_dump() if reward.regex else {}],
        "rows": [{"prompt": tokenizer.decode(p.token_ids), "answer": p.answer} for p in prompts],
        "processor": processor(),
    }
    mean = statistics.fmean(len(prompt.token_ids) for prompt in prompts)
    task["limit"] = limits(task, mean)
    (folder / "task.json").write_text(json.dumps(task))
    return task


def run_ours(out: Path, layout: str, task: dict[str, Any], root: Path) -> list[dict[str, float]]:
    """Seconds of each step by phase, with the code of the checkout `root`."""
    overrides = [f"model.path={task['model']}", "model.hf_config=null", "warm_start=null", *OVERRIDES[layout]]
    overrides += [*task["overrides"], f"train.num_steps={task['steps']}"]
    config = (ROOT if task["fixed"] else root) / task["config"]
    train_ours(out, overrides, threads=LAYOUTS[layout][1], root=root, config=config)
    rows = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        row = {name.removeprefix("time/"): value for name, value in metrics.items() if name.startswith("time/")}
        row.pop("eval", None)
        rows.append(row | {"tokens": metrics["response/length_mean"]})
    return rows


def train_ours(out: Path, overrides: list[str], threads: int, root: Path, config: Path | None = None) -> None:
    """One run of a config, by default the quickstart, without evaluation or checkpoints."""
    quiet = ["train.eval_every=0", "train.save_final=false", "logging.tensorboard=false", f"logging.run_dir={out}"]
    command = [sys.executable, "-m", "megatron_rl", "train", str(config or root / CONFIG), *quiet, *overrides]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    call(command, out, {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}, root)


def run_trl(out: Path, layout: str, task: dict[str, Any], python: str) -> list[dict[str, float]]:
    """Seconds of each step by phase; every `updates` optimizer updates are one step."""
    processes, threads = LAYOUTS[layout]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    out.mkdir()
    command = [python, *launcher, str(Path(__file__).resolve()), "--trl-worker", str(out)]
    call(
        command, out, {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}, ROOT
    )
    rows: list[dict[str, float]] = json.loads((out / "steps.json").read_text())
    return rows


def call(command: list[str], out: Path, env: dict[str, str], root: Path) -> None:
    """Run to the end in `root`, and stop everything with the end of the output when it fails."""
    done = subprocess.run(
        command, cwd=root, env=os.environ | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        sys.exit(f"{out.name} failed with code {done.returncode}:\n{done.stdout[-4000:]}")


def train_trl(out: Path) -> None:
    """One rank of TRL's trainer, in its environment. A phase is what a method of the trainer takes; grading, forward
    and backward of the updates, and the optimizer are the rest of a step."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    task = json.loads((out.parent / "task.json").read_text())
    clock = Clock()

    class Steps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % task["updates"] == 0:
                clock.lap()

    grade = verifier(*task["reward"])

    def reward(completions: list[str], answer: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        clock.lengths += map(len, completion_ids)
        with clock("reward"):
            return [grade(response, a) for response, a in zip(completions, answer, strict=True)]

    if task["fixed"]:
        tokenizer = AutoTokenizer.from_pretrained(task["model"], padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.chat_template = None  # the prompts are rendered
    else:
        names = {"pad_token": "<pad>", "eos_token": "<eos>", "padding_side": "left"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{task['model']}/tokenizer.json", **names)
    trainer = GRPOTrainer(
        task["model"], reward, GRPOConfig(**trl_options(task, out)), Dataset.from_list(task["rows"]), None, tokenizer
    )
    trainer.add_callback(Steps())
    for phase, method in (("generate", "_generate"), ("update", "training_step")):
        setattr(trainer, method, clock.timed(phase, getattr(trainer, method)))
    trainer._prepare_inputs = clock.timed("inputs", trainer._prepare_inputs)
    trainer.train()
    if trainer.accelerator.is_main_process:
        (out / "steps.json").write_text(json.dumps(clock.rows))
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # gloo's threads, alive at the interpreter's end, now and then abort a process that has done its work


def trl_options(task: dict[str, Any], out: Path) -> dict[str, Any]:
    """The task in TRL's words, and what makes it fastest here: no recomputation, nothing saved."""
    optimizer, size = task["optimizer"], int(os.environ.get("WORLD_SIZE", "1"))
    fixed = {"min_new_tokens": task["max_response_tokens"]} if task["fixed"] else {}
    return {
        "output_dir": str(out),
        "use_cpu": True,
        "bf16": task["dtype"] == "bfloat16",
        "generation_kwargs": fixed,
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": "float32"},  # the weights that Adam moves; bf16 is autocast
        "per_device_train_batch_size": task["samples"] // task["updates"] // size,
        "steps_per_generation": task["updates"],
        "num_generations": task["samples_per_prompt"],
        "max_steps": task["steps"] * task["updates"],
        "max_completion_length": task["max_response_tokens"],
        "temperature": task["temperature"],
        "top_k": 0,
        "beta": 0.0,
        "epsilon": task["eps"][0],
        "epsilon_high": task["eps"][1],
        "learning_rate": optimizer["lr"],
        "lr_scheduler_type": "constant",
        "adam_beta1": optimizer["beta1"],
        "adam_beta2": optimizer["beta2"],
        "adam_epsilon": optimizer["eps"],
        "weight_decay": optimizer["weight_decay"],
        "max_grad_norm": optimizer["clip_grad"],
        "shuffle_dataset": False,
        "seed": task["seed"],
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": task["updates"],
        "disable_tqdm": True,
    }


def verifier(name: str, options: dict[str, Any]) -> Any:
    """The project's verifier, from its file: the rest of the project does not import in TRL's environment."""
    spec = importlib.util.spec_from_file_location("rules", ROOT / "megatron_rl" / "grading" / "rules.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return functools.partial(getattr(module, name), **options)


class Clock:
    """Wall seconds by phase, without those of the phases inside, and the rows of the steps so far."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.lengths: list[int] = []
        self._seconds: dict[str, float] = {}
        self._inner = [0.0]
        self._begin = 0.0

    def start(self) -> None:
        self._begin = time.perf_counter()

    def lap(self) -> None:
        now = time.perf_counter()
        self.rows.append({**self._seconds, "total": now - self._begin, "tokens": statistics.fmean(self.lengths)})
        self.lengths, self._seconds, self._begin = [], {}, now

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            taken = time.perf_counter() - begin
            self._seconds[phase] = self._seconds.get(phase, 0.0) + taken - self._inner.pop()
            self._inner[-1] += taken

    def timed(self, phase: str, function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self(phase):
                return function(*args, **kwargs)

        return wrapped


if __name__ == "__main__":
    main()
