from __future__ import annotations

import contextlib
import http.server
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_rl.algorithms.section import Section
from megatron_rl.config import parse_config
from megatron_rl.config.reward import RewardConfig, VerifierConfig
from megatron_rl.errors import ConfigError
from megatron_rl.grading.pool import GradingPool
from megatron_rl.grading.registry import REWARDS, RewardError
from megatron_rl.grading.verdict import Verifier
from scripts.malformed_outputs import malformed
from tests.tiny import rows_of, tiny_raw, train_each

BEHAVE = Verifier("tests.grading.functions:behave", {})


@contextlib.contextmanager
def pool(*verifiers, **options):
    made = GradingPool(verifiers or (BEHAVE,), **{"workers": 1, "deadline_seconds": 1.0} | options)
    try:
        yield made
    finally:
        made.close()


def test_what_a_response_does_costs_that_response_alone():
    with pool(memory_gib=2) as grading:
        pairs = [
            ("a", "a"),
            ("hang", ""),
            ("a", "a"),
            ("crash", ""),
            ("a", "b"),
            ("exit", ""),
            ("raise", ""),
            ("nan", ""),
        ]
        pairs += [("memory", ""), ("torch", ""), ("spin", ""), ("\ud800\x00", "\ud800\x00")]
        got = [future.result(30) for future in [grading.submit(*pair) for pair in pairs]]
    assert [verdict.values[0] for verdict in got] == [1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    ended = {pairs[i][0]: verdict.unfinished for i, verdict in enumerate(got) if verdict.unfinished}
    assert ended == {"hang": "deadline", "crash": "crash", "exit": "crash", "spin": "deadline"}
    errors = {pairs[i][0]: verdict.error for i, verdict in enumerate(got) if verdict.error}
    assert errors.keys() == {"raise", "nan", "memory"}
    assert "KeyError: 'no verdict'" in errors["raise"] and "MemoryError" in errors["memory"]


def test_a_process_that_gets_no_cpu_loses_none_of_its_time():
    """Stopped for longer than the deadline, as on a machine that has other work."""
    with pool(deadline_seconds=0.5) as grading:
        pid = int(grading.submit("pid", "").result(30).values[0])
        answer = grading.submit("work", "")
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(pid, signal.SIGCONT)
        assert answer.result(60).values == (1.0,)
        assert grading.submit("spin", "").result(60).unfinished == "deadline"


# each would keep a reader or a computation busy for minutes or for ever
HOSTILE = (
    r"9^{9^{9}}",
    r"(x+1)^{99}" * 20,
    r"{9^9}^{{9^9}^{9^9}}",
    r"\sin(100! \cdot l \cdot o \cdot g)",
    r"10^{9999}\sin 9i",
    r"\frac{\sqrt{2}}{\log_{(123456789)^{99}}{9999^{\sqrt{2}}}}",
    r"102\int_0^1 e^{x^2}(x+1)^{99}",
    r"\binom{1000!}{1000}",
    r"\lfloor \sum_{k=1}^{123456789} k \rfloor",
    r"\arctan{\sin(e^{123456789})}",
    r"e^{1000!}",
    r"\sqrt{\pi}^{10^{9999}}",
    "5" + "!" * 300,
    r"\sum_{k=1}^{300}\sum_{j=1}^{300}\sum_{i=1}^{300} 1",
)


def test_hostile_expressions_are_refused_and_malformed_outputs_cost_themselves():
    with pool(Verifier("math", {}), Verifier("math", {"strict": True}), deadline_seconds=60.0, workers=2) as grading:
        begun = [grading.submit(response, gold) for _, response, gold in malformed(300, seed=5)]
        begun += [grading.submit(f"\\boxed{{{text}}}", "-3") for text in HOSTILE]
        begun.append(grading.submit(r"\boxed{7}", "7"))
        got = [future.result(400) for future in begun]
    assert not [verdict for verdict in got if verdict.error or verdict.unfinished]
    assert {verdict.values for verdict in got[-1 - len(HOSTILE) : -1]} == {(0.0, 0.0)} and got[-1].values == (1.0, 1.0)


def test_no_process_is_left_when_the_pool_closes_or_its_process_is_killed():
    with pool() as grading:
        pid = int(grading.submit("pid", "").result().values[0])
        assert pid != os.getpid() and psutil.pid_exists(pid)
        grading.submit("hang", "")
    assert not psutil.pid_exists(pid)
    code = (
        "from tests.grading.test_pool import GradingPool, BEHAVE; p = GradingPool([BEHAVE], deadline_seconds=900.0); "
        "print(int(p.submit('pid', '').result().values[0]), flush=True); p.submit('spin', '').result()"
    )
    root = Path(__file__).resolve().parents[2]
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root, text=True)
    assert owner.stdout is not None
    worker = psutil.Process(int(owner.stdout.readline()))
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    for _ in range(600):
        if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    pytest.fail("the grading process outlived the one that started it")


def test_a_function_that_cannot_be_loaded_is_told_at_once():
    with pytest.raises(RewardError, match="has no 'behav'; did you mean 'behave'"):
        GradingPool([Verifier("tests.grading.functions:behav", {})])


class Service(http.server.BaseHTTPRequestHandler):
    replies: list[tuple[int, str]] = []
    seen: list[dict[str, str]] = []

    def do_POST(self):
        self.seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        code, text = self.replies.pop(0)
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


def test_a_remote_verifier_is_asked_again_and_its_refusals_are_told():
    server = http.server.HTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Service.replies = [(503, "busy"), (200, '{"score": 0.5}'), (400, "what?"), (200, "[]")]
    remote = Verifier("remote", {"url": f"http://127.0.0.1:{server.server_port}", "retries": 1})
    try:
        with pool(remote, deadline_seconds=20.0) as grading:
            got = [grading.submit("r", "a").result(60) for _ in range(3)]
    finally:
        server.shutdown()
        server.server_close()
    assert got[0].values == (0.5,) and Service.seen[0] == {"response": "r", "answer": "a"}
    assert "HTTP 400: what?" in got[1].error and 'expected {"score": number}' in got[2].error


def test_options_of_the_config_are_the_keyword_arguments_of_the_functions():
    for name, function in REWARDS.items():
        arguments = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
        field = VerifierConfig.model_fields.get(name)
        section = (
            next((s for s in getattr(field.annotation, "__args__", ()) if s is not type(None)), Section)
            if field
            else Section
        )
        assert set(section.model_fields) == arguments, name


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"function": "exact", "math": {"strict": True}}, "math: has no effect with function=exact"),
        ({"function": "regex"}, "function=regex needs its section, regex: {pattern: ...}"),
        ({"function": "regex", "regex": {"pattern": "("}}, "not a regular expression"),
        ({"terms": [{"name": "a", "weight": 1, "function": "exact"}] * 2}, "the name 'a' comes twice"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, reward, message):
    with pytest.raises(ConfigError) as refused:
        parse_config(tiny_raw(tmp_path) | {"reward": reward})
    assert message in str(refused.value)


def test_a_run_grades_in_processes_on_every_rank_and_leaves_none(tmp_path, worlds):
    reward = {
        "function": "tests.grading.functions:behave",
        "workers": 1,
        "terms": [{"name": "digit", "weight": 0.5, "function": "format", "format": {"pattern": r"\d"}}],
        "length_weight": 0.1,
    }
    raw = tiny_raw(tmp_path, "graded", logging={"samples_per_step": 16}) | {"reward": reward}
    worlds.run(2, train_each, [raw])
    for row, samples in zip(rows_of(raw), (rows_of(raw, "samples.jsonl")[i : i + 16] for i in (0, 16)), strict=True):
        digits = [any(c.isdigit() for c in s["response"]) for s in samples]
        assert row["reward/term/digit"] == pytest.approx(sum(digits) / 16) and row["reward/unfinished_fraction"] == 0
        assert all(-0.05 <= s["reward"] - s["score"] - 0.5 * d <= 0.05 for s, d in zip(samples, digits, strict=True))
    children = {p.pid for p in psutil.Process().children(recursive=True)}
    assert not [p for p in children if "grading.worker" in " ".join(psutil.Process(p).cmdline())]


@pytest.mark.parametrize(
    ("reward", "processes"),
    [
        ({"function": "countdown"}, 0),
        ({"function": "exact"}, 0),
        ({"function": "math"}, 2),
        ({"function": "my_rewards:score"}, 2),
        ({"function": "countdown", "terms": [{"name": "form", "weight": 0.1, "function": "form:score"}]}, 2),
        ({"function": "countdown", "workers": 1}, 1),
        ({"function": "math", "workers": 0}, 0),
    ],
)
def test_only_verifiers_that_can_hang_get_processes_by_default(reward, processes):
    assert RewardConfig(**reward).processes == processes
