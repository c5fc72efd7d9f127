"""Checks of all ranks' facts: each passes or names the remedy. Pure: no device, no network."""

import collections
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from megatron_rl.config import Config, ModelConfig, ParallelConfig
from megatron_rl.config.megatron_options import megatron_notes
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.models.facts import read_hf_config
from megatron_rl.models.hardware import FILL, with_memory
from megatron_rl.plan.memory import memory_of
from megatron_rl.plan.shapes import count_parameters, layout_of, shape_of
from megatron_rl.preflight.facts import Facts

_MOSTLY_FREE = 0.9  # of a GPU's memory, before anything is loaded
_BYTES_PER_PARAMETER = {"float32": 16, "bfloat16": 14}  # weights, and in float32 main weights and two moments


@dataclass(frozen=True, slots=True)
class Check:
    """One check. `is_ok` None: there is nothing to check here."""

    name: str
    finding: str
    is_ok: bool | None = True
    remedy: str = ""


def fact_checks(config: Config, facts: list[Facts], vocabulary: int, existing_checkpoints: int) -> list[Check]:
    """Return all checks that follow from the facts. `vocabulary`: the tokenizer's size."""
    return [
        _ranks(config.parallel, facts),
        _versions(facts),
        _gpus(facts),
        _hosts(config.rollout, facts),
        _engine_version(config.rollout, facts),
        _repeats(config.rollout, facts),
        Check("Megatron", "\n".join(megatron_notes(config)) or "options as this project sets them", None),
        _on_nodes("model", facts, lambda fact: fact.model_fault, config.model.path or "random weights"),
        _data(facts),
        _on_nodes("reward", facts, lambda fact: fact.reward_fault, config.reward.function),
        _folder(config, facts),
        _save(config, facts, vocabulary),
        _room(config, facts, vocabulary, existing_checkpoints),
    ]


def bandwidth_check(ranks: int, nodes: int, bytes_per_second: float, is_right: bool) -> Check:
    """Return the check of the all-reduce: its sums, and its bandwidth in bytes/s."""
    if ranks == 1:
        return Check("all-reduce", "one rank alone", None)
    where = f"{ranks} ranks on {nodes} node{'s' * (nodes > 1)}"
    if not is_right:
        remedy = "a link or a GPU computes wrong sums: find it with nccl-tests, node by node, and exclude its node"
        return Check("all-reduce", f"wrong sums over {where}", False, remedy)
    return Check("all-reduce", f"{bytes_per_second / 1e9:.2f} GB/s bus bandwidth, {where}")


def rehearsal_check(kept: dict[str, Any] | str, facts: list[Facts]) -> Check:
    """Return the check of the verdict that `megatron-rl rehearse` left, on the memory of the GPUs that are here; a text
    says why there is none."""
    if isinstance(kept, str):
        return Check("rehearsal", kept, None)
    least = min((fact.gpu[2] for fact in facts if fact.gpu is not None), default=None)
    room = kept["room"] if least is None else FILL * least
    finding = f"{kept['where']} takes {_gib(kept['peak'])} of {_gib(room)}"
    if kept["peak"] <= room:
        return Check("rehearsal", finding)
    remedy = " ".join(kept["remedies"][0]) if kept["remedies"] else "another layout (megatron-rl plan --search)"
    return Check("rehearsal", finding, False, f"{remedy}, and rehearse again: megatron-rl rehearse")


def checkpoint_bytes(model: ModelConfig, vocabulary: int) -> int:
    """Return the bytes of one checkpoint: weights and optimizer state, without Megatron's bookkeeping. `vocabulary`
    where the model does not say its own."""
    return sum(count_parameters(read_hf_config(model), vocabulary)) * _BYTES_PER_PARAMETER[model.dtype]


def _nodes(facts: Iterable[Facts]) -> list[Facts]:
    return [fact for fact in facts if fact.local_rank == 0]


def _on_nodes(what: str, facts: list[Facts], fault_of: Callable[[Facts], str], fine: str, remedy: str = "") -> Check:
    """Return a check that names the nodes with a fault; one that all of them have is said once."""
    nodes = _nodes(facts)
    faults = {fact.host: fault for fact in nodes if (fault := fault_of(fact))}
    if not faults:
        return Check(what, fine)
    if len(faults) == len(nodes) and len(set(faults.values())) == 1:
        return Check(what, next(iter(faults.values())), False, remedy)
    return Check(what, "\n".join(f"{host}: {fault}" for host, fault in faults.items()), False, remedy)


def _ranks(parallel: ParallelConfig, facts: list[Facts]) -> Check:
    wanted, running, nodes = parallel.processes, len(facts), len(_nodes(facts))
    text = f"{running} of {wanted} on {nodes} node{'s' * (nodes > 1)}"
    if running < wanted:
        return Check("ranks", f"{text}: those that this machine can hold; a job checks them all", None)
    return Check("ranks", text)


def _versions(facts: list[Facts]) -> Check:
    first = facts[0].versions
    shown = ", ".join(f"{name} {version}" for name, version in first.items())
    remedy = "install what is supported: make gpu (docs/install_gpu.md), or make on a CPU machine"
    check = _on_nodes("versions", facts, lambda fact: "; ".join(fact.version_faults), shown, remedy)
    others = [f"{fact.host}: {_difference(first, fact.versions)}" for fact in _nodes(facts) if fact.versions != first]
    if check.is_ok and others:
        finding = "\n".join([f"{facts[0].host}: {shown}", *others])
        return Check("versions", finding, False, "use one environment, or one container, on all nodes")
    return check


def _difference(first: dict[str, str], other: dict[str, str]) -> str:
    names = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
    return ", ".join(f"{name} {other.get(name, 'is missing')}" for name in names)


def _gpus(facts: list[Facts]) -> Check:
    gpus = [(fact.host, fact.local_rank, *fact.gpu) for fact in facts if fact.gpu is not None]
    if not gpus:
        return Check("GPUs", "no GPU here: the ranks run on CPUs, over gloo", None)
    bare = sorted({fact.host for fact in facts if fact.gpu is None})
    if bare:
        remedy = "ask Slurm for GPUs on every node, or take the node out: sbatch --exclude"
        return Check("GPUs", f"no GPU on {', '.join(bare)}", False, remedy)
    full = [
        f"{host} GPU {index}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        for host, index, _, free, total in gpus
        if free < _MOSTLY_FREE * total
    ]
    if full:
        remedy = "end the processes that hold it (nvidia-smi names them), or take the node out: sbatch --exclude"
        return Check("GPUs", "\n".join(full), False, remedy)
    kinds = sorted({name for _, _, name, _, _ in gpus})
    if len(kinds) > 1:
        return Check("GPUs", f"of several kinds: {', '.join(kinds)}", False, "ask for one kind: sbatch --constraint")
    least = min(free for *_, free, _ in gpus)
    return Check("GPUs", f"{len(gpus)} x {kinds[0]}, at least {least / 2**30:.1f} GiB free on each")


def _hosts(rollout: RolloutConfig, facts: list[Facts]) -> Check:
    if len(_nodes(facts)) == 1 or rollout.is_embedded:
        return Check("node names", "the engines' addresses stay on their node", None)
    remedy = "engines are reached by their node's hostname: add the nodes to DNS or /etc/hosts"
    fine = "every node resolves every other"
    return _on_nodes("node names", facts, lambda fact: _unresolved(fact.unknown_hosts), fine, remedy)


def _unresolved(hosts: list[str]) -> str:
    return f"cannot resolve {', '.join(hosts)}" if hosts else ""


def _engine_version(rollout: RolloutConfig, facts: list[Facts]) -> Check:
    if rollout.is_embedded:
        return Check("engine", "transformers, embedded", None)
    versions = sorted({fact.engine_version for fact in _nodes(facts)})
    offer = ", ".join(versions) if any(versions) else f"at {', '.join(rollout.server.urls)}"
    return _on_nodes("engine", facts, lambda fact: fact.engine_fault, f"{rollout.engine} {offer}")


def _repeats(rollout: RolloutConfig, facts: list[Facts]) -> Check:
    """Say whether two runs sample the same tokens."""
    engine, name = {"sglang": "SGLang", "vllm": "vLLM"}.get(rollout.engine, ""), "same rollouts"
    if rollout.is_embedded:
        return Check(name, "in every run: the embedded engine hashes its draws")
    if not rollout.server.deterministic:
        return Check(name, "no: servers draw anew in each run; rollout.server.deterministic=true", None)
    if rollout.server.urls:
        start = {"sglang": "--enable-deterministic-inference", "vllm": "VLLM_BATCH_INVARIANT=1"}[rollout.engine]
        return Check(name, f"if the servers were started with {start}, which is not checked", None)
    if facts[0].gpu is not None:
        return Check(name, f"as far as {engine}'s batch-invariant mode goes: docs/engines.md")
    if rollout.engine == "sglang":
        remedy = "set rollout.server.deterministic=false, or rollout.engine to vllm or transformers"
        return Check(name, "no: SGLang draws from seeds in its batch-invariant mode, which needs a GPU", False, remedy)
    return Check(name, "unless rounding decides a token: vLLM on a CPU has seeds, but no batch-invariant mode", None)


def _data(facts: list[Facts]) -> Check:
    check = _on_nodes("data", facts, lambda fact: fact.data_fault, facts[0].data)
    nodes = _nodes(facts)
    if check.is_ok and len({fact.data for fact in nodes}) > 1:
        finding = "\n".join(f"{fact.host}: {fact.data}" for fact in nodes)
        return Check("data", finding, False, "the nodes read different files: put the data on a disk that all share")
    return check


def _folder(config: Config, facts: list[Facts]) -> Check:
    blind = [fact.host for fact in _nodes(facts) if not fact.sees_shared]
    if blind:
        remedy = "put logging.run_dir (MEGATRON_RL_RUNS) on a disk that all nodes share"
        finding = f"{config.run_dir.parent} is not the same folder on {', '.join(blind)}"
        return Check("run folder", finding, False, remedy)
    return Check("run folder", f"{config.run_dir}, seen by every node")


def _room(config: Config, facts: list[Facts], vocabulary: int, existing: int) -> Check:
    one = checkpoint_bytes(config.model, vocabulary)
    more = max(1, config.train.keep_checkpoints + 1 - existing)  # the newest is written before the oldest goes
    free = min(fact.free_bytes for fact in _nodes(facts))
    finding = f"{_gib(one)} a checkpoint, room for {more} more asked, {_gib(free)} free"
    if free < more * one:
        return Check("disk", finding, False, "make room, lower train.keep_checkpoints, or move logging.run_dir")
    return Check("disk", finding)


def _save(config: Config, facts: list[Facts], vocabulary: int) -> Check:
    """Check the GPU's and the host's memory at the time of a save, as plan/memory.py predicts them."""
    gpus = [fact.gpu for fact in facts if fact.gpu is not None]
    if not gpus:
        return Check("memory", "no GPU here: each rank copies its share of a checkpoint", None)
    shape, layout = shape_of(read_hf_config(config.model), vocabulary), layout_of(config)
    on_a_node = max(collections.Counter(fact.host for fact in facts).values())
    hardware = with_memory(min(total for _, _, total in gpus), on_gpu=True)
    memory = memory_of(config, shape, layout, replace(hardware, gpus_per_node=on_a_node))
    least, needed = min(fact.host_bytes for fact in _nodes(facts)), sum(memory.host.values())
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in memory.host.items())
    finding = f"a save takes {_gib(memory.total('checkpoint'))} of a GPU's {_gib(hardware.memory)}, and at most "
    finding += f"{_gib(needed)} of {_gib(least)} on a node's host ({parts})"
    remedy = ""
    if memory.total("checkpoint") > memory.room:
        remedy = "give the model more GPUs: parallel.tp, .pp or .dp (megatron-rl plan)"
    elif needed > least:
        remedy = "ask Slurm for all of a node's memory (--mem=0), or spread the ranks over more nodes"
    return Check("memory", finding, not remedy, remedy)


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
