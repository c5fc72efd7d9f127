"""Wall seconds of one step's collection (Collector.collect) with two real SGLang servers on this machine:
python scripts/bench_collect.py [--before CHECKOUT]

With --before an earlier version of this project is measured too, by turns: git worktree add /tmp/before COMMIT. Each
turn is a process with the code of its checkout, which starts servers of its own.

The servers' model is tiny, and every decode step is stretched to --step-ms, whatever its batch, as on a GPU
(bench_collect_server/). Lengths of responses are log-normal, and rewards come from a hash, so that all sides are asked
for the same: prompts, lengths, and which groups teach something. Tokens are counted in the servers, step by step.

needed: the tokens of the groups used, and of the groups drawn before the last of them that taught nothing: nobody can
    know that before they are there.
thrown away: all other tokens that the servers made during the steps, those of aborted responses included.
ideal: the needed tokens at the throughput of servers with a full queue, measured at each turn's begin and end.
in order: the same, when each slot of a server takes the next needed response in the order of the draw as soon as it is
    free, and a step ends with its last response: what a collector that aborts nothing could reach if it knew in advance
    which groups it needs.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_collect_task import PROBE_SEED, Book, response_tokens

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = Path(__file__).resolve().parent / "bench_collect_server"
WARM_SECONDS = 4.0  # of a full queue, before its throughput is measured
PROMPT_TOKENS = 32
NUM_PROMPTS = 4096
HF = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, nargs="+", default=[], help="checkouts of other versions")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each version")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a turn")
    parser.add_argument("--prompts", type=int, default=32, help="train.prompts_per_step")
    parser.add_argument("--samples", type=int, default=8, help="rollout.samples_per_prompt")
    parser.add_argument("--concurrency", type=int, default=16, help="rollout.server.max_concurrency, of each server")
    parser.add_argument("--median", type=float, default=32.0, help="of the responses' tokens")
    parser.add_argument("--limit", type=int, default=384, help="rollout.max_response_tokens; lengths stay below")
    parser.add_argument("--step-ms", type=float, default=50.0, help="least time of a decode step in a server")
    parser.add_argument("--full-seconds", type=float, default=15.0, help="of a full queue, before and after the steps")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more of the config")
    parser.add_argument("--json", type=Path, help="write all turns into this file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(json.loads(options.work))
        return
    roots = [ROOT, *(path.resolve() for path in options.before)]
    turns: dict[str, list[dict[str, Any]]] = {root.name: [] for root in roots}
    if len(turns) != len(roots):
        sys.exit(f"--before: got {[str(root) for root in roots]}, expected folders of different names")
    for number in range(options.rounds):
        for root in roots if number % 2 == 0 else reversed(roots):
            load = os.getloadavg()[0]
            with tempfile.TemporaryDirectory() as folder:
                turn = turn_of(root, options, Path(folder)) | {"load": [load, os.getloadavg()[0]]}
            turns[root.name].append(turn)
            print(f"round {number + 1}, {line(root.name, summary([turn]))}", flush=True)
        show(turns, options)  # after every round: an interrupted run has shown the rounds it finished


def show(turns: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Print what all turns of each version say together, and write --json."""
    found = {name: summary(rows) for name, rows in turns.items()}
    for name, row in found.items():
        print(f"all turns, {line(name, row)}")
        if name != ROOT.name:
            print(
                f"{ROOT.name} is {row['seconds'] / found[ROOT.name]['seconds']:.2f} times as fast as {name}", flush=True
            )
    if options.json:
        setting = {key: value for key, value in vars(options).items() if isinstance(value, (int, float, list))}
        setting["before"] = [str(path) for path in options.before]
        options.json.write_text(json.dumps({"setting": setting, "summary": found, "turns": turns}, indent=1))


def turn_of(root: Path, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the checkout `root` needs for some steps, with servers of its own."""
    keys = ("steps", "prompts", "samples", "concurrency", "median", "limit", "full_seconds", "set")
    setting = {key: getattr(options, key) for key in keys} | {
        "root": str(root),
        "folder": str(folder),
        "parent": os.getpid(),
    }
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "BENCH_STEP_SECONDS": str(options.step_ms / 1000),
        "BENCH_STEP_LOG": str(folder / "steps"),
    }
    command = [sys.executable, __file__, "--work", json.dumps(setting)]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{root.name} failed with code {done.returncode}:\n{done.stdout[-6000:]}")
    turn: dict[str, Any] = json.loads((folder / "turn.json").read_text())
    return turn


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of steps, and sums of tokens, over all turns of a version."""
    steps = [step for turn in turns for step in turn["steps"]]
    tokens = {key: sum(turn["tokens"][key] for turn in turns) for key in turns[0]["tokens"]}

    def at_full(key: str) -> float:
        return sum(turn["tokens"][key] / statistics.fmean(turn["throughput"]) for turn in turns) / len(steps)

    return {
        "seconds": statistics.median(step["seconds"] for step in steps),
        "fastest": min(step["seconds"] for step in steps),
        "slowest": max(step["seconds"] for step in steps),
        "num_steps": len(steps),
        "ideal": at_full("needed"),
        "in_order": at_full("in_order"),
        "of_ideal": at_full("needed") / statistics.fmean(step["seconds"] for step in steps),
        "of_in_order": at_full("in_order") / statistics.fmean(step["seconds"] for step in steps),
        "tokens": tokens,
        "thrown_away": 1 - tokens["needed"] / tokens["generated"],
        "aborted": 1 - tokens["in_whole"] / tokens["generated"],
        "throughput": [value for turn in turns for value in turn["throughput"]],
        "decode_ms": statistics.fmean(turn["decode_ms"] for turn in turns),
        "idle": statistics.fmean(turn["idle"] for turn in turns),
        "filled": statistics.fmean(turn["filled"] for turn in turns),
        "drawn": sum(turn["drawn"] for turn in turns) / len(steps),
        "kept": statistics.fmean(turn["kept"] for turn in turns),
        "load": [value for turn in turns for value in turn["load"]],
    }


def line(name: str, row: dict[str, Any]) -> str:
    tokens, rates = row["tokens"], row["throughput"]
    return (
        f"{name}: {row['seconds']:.1f} s a step ({row['fastest']:.1f} to {row['slowest']:.1f}, {row['num_steps']} "
        f"steps); ideal {row['ideal']:.1f} s, {row['of_ideal']:.2f} of it reached; "
        f"in order {row['in_order']:.1f} s, {row['of_in_order']:.2f} of it\n"
        f"    {row['drawn']:.1f} prompts drawn a step, {row['kept']:.2f} of them teach; {tokens['generated']} tokens "
        f"generated, {tokens['needed']} needed, {row['thrown_away']:.1%} thrown away, "
        f"{row['aborted']:.1%} of aborted responses; servers idle {row['idle']:.1%} of the time, {row['filled']:.1%} "
        f"of their slots filled\n"
        f"    a decode step {row['decode_ms']:.1f} ms, full queue {min(rates):.0f} to {max(rates):.0f} tokens/s, load "
        f"{min(row['load']):.1f} to {max(row['load']):.1f}"
    )


# ---------------------------------------------------------------------------------------------------------- one turn


def work(setting: dict[str, Any]) -> None:
    """Collect some steps with servers of this process's own, and write turn.json into the turn's folder."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    from megatron_rl import __file__ as package
    from megatron_rl import launch

    launch.die_with_parent(setting["parent"])
    assert Path(package).is_relative_to(setting["root"]), package
    from megatron_rl import train
    from megatron_rl.config import parse_config
    from megatron_rl.parallel.groups import destroy_groups, init_groups
    from megatron_rl.rollout.servers.http import KEY_VARIABLE
    from megatron_rl.rollout.servers.processes import free_port

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), KEY_VARIABLE: secrets.token_hex(16)}
    book = Book(setting["median"], setting["limit"])
    install(book)
    config = parse_config(raw_config(setting))
    run = train.set_up(config, init_groups(config.parallel, config.seed))
    answers = {prompt.prompt_id: prompt.answer for prompt in run.train_prompts}
    log, steps, used, throughput = StepLog(Path(setting["folder"]) / "steps"), [], set(), []
    try:
        for step in range(setting["steps"]):
            with run.served.session(run.timers) as engine:
                if step == 0:
                    throughput.append(full_queue(engine, run, setting, log))
                began = time.monotonic()
                result = run.collector.collect(step)
                ended = time.monotonic()
                run.collector.go_ahead(step)
            run.served.weight_version = step + 1
            used |= {book.newest[prompt_id] for prompt_id in result.prompts_by_id}
            steps.append({"began": began, "ended": ended, "seconds": ended - began})
        with run.served.session(run.timers) as engine:
            throughput.append(full_queue(engine, run, setting, log))
    finally:
        run.close()
    busy, filled = log.busy([(step["began"], step["ended"]) for step in steps], setting["concurrency"])
    needed, slots = book.needed(used, answers), 2 * setting["concurrency"]
    tokens = {
        "generated": log.tokens(steps[0]["began"], steps[-1]["ended"]),
        "in_whole": book.in_whole(),
        "used": book.tokens(used),
        "needed": book.tokens(needed),
        "in_order": slots * book.in_order(needed, slots),
    }
    row = {"steps": steps, "tokens": tokens, "throughput": throughput, "idle": 1 - busy, "filled": filled}
    row["decode_ms"] = 1000 * log.decode_seconds()
    row["drawn"] = len(book.groups)
    row["kept"] = statistics.fmean(group.is_informative(answers[key[1]]) for key, group in book.groups.items())
    (Path(setting["folder"]) / "turn.json").write_text(json.dumps(row))
    destroy_groups()


def install(book: Book) -> None:
    """Hook into what all versions share: the making of a request, and a server's answer to it."""
    from megatron_rl.rollout.engine import Request
    from megatron_rl.rollout.servers.sglang import SGLang

    make, generate, command = Request.__init__, SGLang.generate, SGLang.command

    def shortened(request: Any, *args: Any, **kwargs: Any) -> None:
        make(request, *args, **kwargs)
        book.shorten(request)

    async def counted(dialect: Any, server: Any, request: Any, rid: str, **kwargs: Any) -> Any:
        done = await generate(dialect, server, request, rid, **kwargs)
        book.answered(request, len(done.token_ids))
        return done

    def paced(dialect: Any, spec: Any) -> tuple[list[str], dict[str, str]]:
        argv, env = command(dialect, spec)
        return argv, env | {"PYTHONPATH": f"{PLUGIN}{os.pathsep}{env['PYTHONPATH']}"}

    for owner, name, hook in (
        (Request, "__init__", shortened),
        (SGLang, "generate", counted),
        (SGLang, "command", paced),
    ):
        setattr(owner, name, hook)


def raw_config(setting: dict[str, Any]) -> dict[str, Any]:
    """A run of the countdown game with two servers on this machine; `set`: what differs from it."""
    concurrency, limit = setting["concurrency"], setting["limit"]
    server = {
        "count": 2,
        "max_concurrency": concurrency,
        "kv_tokens": concurrency * (PROMPT_TOKENS + limit),
        "python": str(ROOT / ".engines" / "sglang" / "bin" / "python"),
        "extra_args": ["--sleep-on-idle"],  # an idle server would take a core from the other
    }
    raw: dict[str, Any] = {
        "name": "bench_collect",
        "model": {"hf_config": HF},
        "data": {"type": "countdown", "num_train": NUM_PROMPTS, "num_eval": 0, "max_prompt_tokens": PROMPT_TOKENS},
        "rollout": {
            "engine": "sglang",
            "samples_per_prompt": setting["samples"],
            "max_response_tokens": limit,
            "stop_token_ids": [],
            "server": server,
            "weight_sync": {"bucket_mib": 4},
        },
        "reward": {"function": "bench_collect_task:grade", "workers": 0},
        "algorithm": {"dynamic_sampling": {"enabled": True}},
        "train": {
            "num_steps": setting["steps"],
            "prompts_per_step": setting["prompts"],
            "prompts_per_minibatch": setting["prompts"],
            "micro_batch_tokens": PROMPT_TOKENS + limit,
            "eval_every": 0,
        },
        "logging": {"run_dir": setting["folder"] + "/run", "tensorboard": False},
    }
    for text in setting["set"]:
        name, _, value = text.partition("=")
        *sections, key = name.split(".")
        section = raw
        for part in sections:
            section = section.setdefault(part, {})
        section[key] = json.loads(value)
    return raw


class StepLog:
    """What the servers' plugin noted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def servers(self) -> list[list[tuple[float, float, str, int]]]:
        """(begin, end, kind, requests) of each step, by server."""
        rows = [
            [(float(a), float(b), kind, int(n)) for a, b, kind, n in map(str.split, path.read_text().splitlines())]
            for path in sorted(self._folder.glob("*.txt"))
        ]
        assert len(rows) == 2, f"{len(rows)} servers wrote steps into {self._folder}, expected 2"
        return rows

    def tokens(self, since: float, until: float) -> int:
        return sum(count for rows in self.servers() for _, end, _, count in rows if since < end <= until)

    def decode_seconds(self) -> float:
        """Median seconds of a decode step."""
        return statistics.median(
            end - begin for rows in self.servers() for begin, end, kind, _ in rows if kind == "decode"
        )

    def busy(self, spans: list[tuple[float, float]], concurrency: int) -> tuple[float, float]:
        """Fractions of the spans' time: a server makes a step; a slot of a server has a request."""
        seconds = filled = 0.0
        for rows in self.servers():
            for begin, end, _, count in rows:
                if any(since < end <= until for since, until in spans):
                    seconds += end - begin
                    filled += (end - begin) * count / concurrency
        whole = 2 * sum(until - since for since, until in spans)
        return seconds / whole, filled / whole


def full_queue(engine: Any, run: Any, setting: dict[str, Any], log: StepLog) -> float:
    """Tokens per second of both servers together while each always has as many requests as it takes."""
    from megatron_rl.rollout.servers.http import KEY_VARIABLE

    begin, end = asyncio.run(flood(engine._fleet.urls, run, setting, os.environ[KEY_VARIABLE]))
    time.sleep(1.0)  # the last aborted requests leave
    return log.tokens(begin, end) / (end - begin)


async def flood(urls: list[str], run: Any, setting: dict[str, Any], key: str) -> tuple[float, float]:
    """Keep the servers full with requests as the collector's; return the seconds between which they were."""
    import aiohttp

    from megatron_rl.rollout.engine import Request, SamplingParams
    from megatron_rl.rollout.servers.http import Server
    from megatron_rl.rollout.servers.sglang import SGLang

    dialect = SGLang()

    def requests() -> Iterator[Request]:
        for prompt, sample in itertools.product(reversed(run.train_prompts), range(setting["samples"])):
            length = response_tokens(setting["median"], setting["limit"], PROBE_SEED, prompt.prompt_id, sample)
            yield Request(
                prompt.prompt_id, sample, prompt.token_ids, SamplingParams(1.0, 1.0, 0, length, (), PROBE_SEED)
            )

    async def slot(server: Server, wanted: Iterator[Request], names: Iterator[str]) -> None:
        for request, rid in zip(wanted, names, strict=False):
            try:
                await dialect.generate(server, request, rid, seconds=600)
            except asyncio.CancelledError:
                await dialect.abort(server, rid)
                return

    wanted, names = requests(), (f"full-{time.monotonic_ns()}-{number}" for number in itertools.count())
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session:
        servers = [Server(url, session) for url in urls]
        slots = [asyncio.create_task(slot(s, wanted, names)) for s in servers for _ in range(setting["concurrency"])]
        await asyncio.sleep(WARM_SECONDS)
        begin = time.monotonic()
        await asyncio.sleep(setting["full_seconds"])
        end = time.monotonic()
        assert not any(task.done() for task in slots), "the prompts were too few to keep the servers full"
        for task in slots:
            task.cancel()
        await asyncio.gather(*slots)
    return begin, end


if __name__ == "__main__":
    main()
