"""A grading process: answers in, verdicts out, one at a time, until its parent is gone. Imports no torch."""

import dataclasses
import json
import os
import resource
import signal
from multiprocessing.connection import Connection

from megatron_rl.grading.registry import RewardError, load_reward
from megatron_rl.grading.verdict import judge
from megatron_rl.launch import die_with_parent


def main(fd: int) -> None:
    """Serve on the socket `fd`. The first message has what to load: see `GradingPool`."""
    # Ctrl-C and a scheduler's warning reach every process of a run; the trainer alone decides when grading ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.set_inheritable(fd, False)  # what a verifier starts must not keep the socket open
    connection = Connection(fd)
    try:
        setup = json.loads(connection.recv_bytes())
        die_with_parent(setup["parent"])
        if setup["memory_bytes"]:
            # private memory, not address space: what CUDA and sanitizers merely reserve does not count
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            limit = setup["memory_bytes"] if hard == resource.RLIM_INFINITY else min(hard, setup["memory_bytes"])
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        try:
            functions = [load_reward(v["function"], v["options"]) for v in setup["verifiers"]]
        except RewardError as error:
            connection.send_bytes(json.dumps({"error": str(error)}).encode())
            return
        connection.send_bytes(b"{}")
        while True:
            response, answer = json.loads(connection.recv_bytes())
            verdict = judge(functions, response, answer)
            connection.send_bytes(json.dumps(dataclasses.asdict(verdict)).encode())
    except (EOFError, OSError):
        return  # the parent closed the socket
