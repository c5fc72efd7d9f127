"""A real Slurm on this machine: four nodes of pretended GPUs, each a slurmd of its own, all on loopback."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
_NODES = 4  # as many as the largest job asks for: --test-only wants to see them
_GPUS = 8
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=3
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=15
SlurmdParameters=config_overrides
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] CPUs=8 RealMemory=2000 Gres=gpu:{gpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=48:00:00 State=UP
"""


class Cluster:
    """Daemons and the commands to speak to them; `close` ends all it started."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        """`folder`: new, and short: sockets lie in it. `environment`: on top of this process's, of every command."""
        self.folder = folder
        self.env = {**os.environ, **environment, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._slurmds: dict[str, subprocess.Popen[bytes]] = {}
        self._write_config()
        munge = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key"]
        munge += [
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munge.pid",
            f"--seed-file={folder}/munge.seed",
        ]
        try:
            self._daemons.append(self._start(munge))
            until(lambda: (folder / "munge.socket").exists(), 30)
            self._daemons.append(self._start(["slurmctld", "-D", "-i"]))
            until(lambda: self._says("scontrol", "ping", "UP"), 30)
            self.start_nodes()
        except BaseException:
            self.close()
            raise

    def start_nodes(self) -> None:
        """Start the nodes that are not up, and wait until they can run jobs."""
        for name in (f"n{number}" for number in range(1, _NODES + 1)):
            if name not in self._slurmds:
                self._slurmds[name] = self._start(["slurmd", "-D", "-N", name])
        # nodes that were never seen begin as drained: their GPUs are counted only when they register
        until(lambda: self._says("sinfo", "--noheader", "--format=%T", "idle", "mixed", "allocated"), 60)

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a Slurm command, both streams."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, root: Path, *arguments: str) -> str:
        """sbatch from the project's folder; the job's id."""
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={self.folder}/%j.out", *arguments],
            env=self.env, cwd=root, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def output(self, job: str) -> str:
        """What the job's script printed."""
        path = self.folder / f"{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def facts(self, job: str) -> dict[str, str]:
        """`scontrol show job`, by field."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, states: Iterable[str], seconds: float) -> dict[str, str]:
        """The job's facts once it is in one of `states`."""
        until(lambda: self.facts(job)["JobState"] in states, seconds, lambda: self.output(job))
        return self.facts(job)

    def kill_node(self, name: str) -> None:
        """As if its power went: the daemon and all that runs there."""
        daemon = self._slurmds.pop(name)
        daemon.kill()
        daemon.wait()
        for pid in _processes_of(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End all jobs and daemons."""
        with contextlib.suppress(Exception):
            self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
            self.run("scancel", "--user=root", check=False)
            until(lambda: not self.run("squeue", "--noheader", check=False).strip(), 30)
        for process in [*self._slurmds.values(), *reversed(self._daemons)]:
            process.terminate()
        for process in [*self._slurmds.values(), *self._daemons]:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _write_config(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        (folder / "state").mkdir()
        for number in range(1, _NODES + 1):
            (folder / f"spool.n{number}").mkdir()
        for number in range(_GPUS):  # Slurm wants a file for each; nobody opens it
            (folder / f"gpu{number}").touch()
        port, *ports = free_ports(_NODES + 1)
        between = f"{ports[0]}-{ports[-1]}"
        config = _CONF.format(folder=folder, host=host, port=port, nodes=_NODES, ports=between, gpus=_GPUS)
        (folder / "slurm.conf").write_text(config)
        (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-{_GPUS - 1}]\n")
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        program = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or command[0]
        log = (self.folder / f"{Path(program).name}.out").open("ab")
        with log:
            return subprocess.Popen(
                [program, *command[1:]],
                env=self.env,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                preexec_fn=_end_with_the_tests,
            )

    def _says(self, *command_then_words: str) -> bool:
        """Whether every line of the answer holds one of the words after the options."""
        command = [part for part in command_then_words[:2]]
        rest = list(command_then_words[2:])
        while rest and rest[0].startswith("-"):
            command.append(rest.pop(0))
        lines = self.run(*command, check=False).split("\n")
        lines = [line for line in lines if line.strip()]
        return bool(lines) and all(any(word in line for word in rest) for line in lines)


def _end_with_the_tests() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG: also when they are killed


def free_ports(count: int) -> list[int]:
    """Neighbouring ports that nobody listens on."""
    for first in range(21000 + os.getpid() % 5000, 32000, count):
        ports = range(first, first + count)
        if all(_is_free(port) for port in ports):
            return list(ports)
    raise RuntimeError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _processes_of(node: str) -> list[int]:
    """Processes that slurmd started on the node, and the slurmstepds over them."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            if f"SLURMD_NODENAME={node}".encode() not in environment:
                continue
            found.add(int(folder.name))
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                found.add(int(parent))
        except OSError:  # it ended meanwhile
            continue
    return sorted(found)


def until(condition: Callable[[], bool], seconds: float, story: Callable[[], str] = str) -> None:
    """Wait, looking twice a second. `story`: what to tell when it was in vain."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {seconds:g} s\n{story()}"
        time.sleep(0.5)


def steps_of(run_dir: Path) -> list[int]:
    """Of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []
