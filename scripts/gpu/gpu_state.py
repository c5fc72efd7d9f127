"""What a step moves and keeps: offload and reload, checkpoints, each to the same bits and with its peaks."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpu_answer import Answer
from gpu_cases import (
    batch_of,
    config_of,
    join,
    larger_model,
    parameter_count,
    policy_of,
    same_bits,
    state_of,
    update,
)
from torch import Tensor

from megatron_rl import device
from megatron_rl.config import Config
from megatron_rl.parallel.groups import Groups
from megatron_rl.policy.checkpoint import CheckpointStore
from megatron_rl.policy.policy import MegatronPolicy
from megatron_rl.types import TrainBatch

UPDATES = 4
Trained = tuple[list[Tensor], list[float]]


def offload(answer: Answer) -> None:
    """Look that four updates with an offload in their middle are four updates, and how much memory it frees."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        cases = (("bfloat16", False), ("bfloat16", True), ("float32", True))  # what is forbidden once stays so
        for dtype, is_deterministic in cases if device.ON_GPU else cases[1:2]:
            config = config_of(folder, model={"dtype": dtype}, train={"deterministic": is_deterministic})
            groups = join(config)
            straight, again, moved = (trained(config, groups, moves) for moves in (False, False, True))
            repeats = same_bits(straight[0], again[0]) and straight[1] == again[1]
            returns = same_bits(straight[0], moved[0]) and straight[1] == moved[1]
            case = f"{dtype}{', train.deterministic' if is_deterministic else ''}"
            answer.figure(case, {"the same run twice": repeats, "with an offload": returns, "norms": straight[1]})
            said = f"twice the same: {repeats}; the same with an offload: {returns}"
            # without the option torch may take kernels whose sums change from run to run: then nothing is proven
            if repeats or is_deterministic:
                answer.check(case, repeats and returns, said)
            else:
                answer.skip(case, said)
        freed(answer, folder)


def trained(config: Config, groups: Groups, moves: bool) -> Trained:
    """Return the state after UPDATES updates and their gradient norms; `moves`: offload and reload before the first and
    in the middle."""
    policy = policy_of(config, groups)
    batch = policy.with_old_logprobs(batch_of(config, groups))
    norms = []
    for number in range(UPDATES):
        if moves and number in (0, UPDATES // 2):
            policy.offload()
            policy.reload()
        norms.append(update(policy, batch, number).grad_norm)
    return state_of(policy), norms


def freed(answer: Answer, folder: Path) -> None:
    """Measure the device memory that an offload gives to other processes, and how fast it comes and goes."""
    model = {"hf_config": larger_model(), "dtype": "bfloat16"}
    config = config_of(folder, model=model)
    groups = join(config)
    policy = policy_of(config, groups)
    batch = policy.with_old_logprobs(batch_of(config, groups))
    update(policy, batch, 0)
    moved = 12 * parameter_count(policy)  # bytes that travel: float32 weights and two moments
    rates: dict[str, Any] = {}
    device.give_back_memory()
    before = device.gpu_memory()[1] if device.ON_GPU else 0
    for turn in ("first", "second"):
        for act in (policy.offload, policy.reload):
            began = time.perf_counter()
            act()
            device.synchronize()
            rates[f"{turn} {act.__name__}"] = moved / (time.perf_counter() - began)
            if act == policy.offload and device.ON_GPU:
                rates[f"{turn} free"] = device.gpu_memory()[1] - before
    answer.figure("bytes per second, and bytes freed", rates)
    text = f"{moved / 2**30:.2f} GiB; second time out {rates['second offload'] / 1e9:.1f} GB/s, "
    text += f"back {rates['second reload'] / 1e9:.1f} GB/s"
    if not device.ON_GPU:
        answer.skip("memory that an offload frees", f"a CPU's: {text}")
        return
    expected = 16 * parameter_count(policy)  # and float32 gradients
    share = rates["second free"] / expected
    answer.check("memory that an offload frees", share >= 0.9, f"{share:.2f} of gradients and optimizer; {text}")


def save(answer: Answer) -> None:
    """Look that a checkpoint, written at once or in the background, loads to the same bits and the same next update."""
    with TemporaryDirectory() as name:
        for in_background in (False, True):
            folder = Path(name) / f"{in_background}"
            model = {"hf_config": larger_model(), "dtype": "bfloat16"}
            train = {"deterministic": True, "async_save": in_background}
            config = config_of(folder, model=model, train=train)
            groups = join(config)
            one_save(answer, config, groups, "in the background" if in_background else "at once")


def one_save(answer: Answer, config: Config, groups: Groups, how: str) -> None:
    """Train, save, train on; then load into another policy and train on from there."""
    policy = policy_of(config, groups)
    batch = policy.with_old_logprobs(batch_of(config, groups))
    for number in range(2):
        update(policy, batch, number)
    store = CheckpointStore(config.run_dir / "checkpoints", policy, groups)
    before = state_of(policy)
    held, figures = bytes_now(), {}
    began = time.perf_counter()
    path = store.save(2, {"here": 1})
    figures["seconds until training goes on"] = time.perf_counter() - began
    figures["peak over what is held"] = device.peak_since_reset() - held
    norm = update(policy, batch, 2).grad_norm
    after = state_of(policy)
    store.finish()
    figures["seconds until it is written"] = time.perf_counter() - began
    nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    del policy
    figures |= load(answer, config, groups, path, (before, after, norm), batch, how)
    figures |= {
        "held": held,
        "written": nbytes,
        "host's peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    answer.figure(f"bytes and seconds, {how}", figures)
    over = figures["peak over what is held"]
    text = f"{over / 2**20:+.0f} MiB beside {held / 2**20:.0f} held, {nbytes / 2**20:.0f} written in "
    text += f"{figures['seconds until it is written']:.1f} s"
    if device.ON_GPU:  # gradients are given up meanwhile
        answer.check(f"peak of a save {how}", over <= 0.05 * held, text)
    else:
        answer.skip(f"peak of a save {how}", f"a CPU's: {text}")


def bytes_now() -> int:
    """Begin a new peak; return what is held now."""
    device.give_back_memory()
    device.reset_peak()
    return device.peak_since_reset()


def load(
    answer: Answer,
    config: Config,
    groups: Groups,
    path: Path,
    told: tuple[list[Tensor], list[Tensor], float],
    batch: TrainBatch,
    how: str,
) -> dict[str, float]:
    """Load into a fresh policy; add the lines; return the figures of the load."""
    before, after, norm = told
    policy: MegatronPolicy = policy_of(config, groups)
    store = CheckpointStore(path.parent, policy, groups)
    held = bytes_now()
    began = time.perf_counter()
    step, extra = store.load(path)
    figures = {"seconds of a load": time.perf_counter() - began, "peak of a load": device.peak_since_reset() - held}
    is_same = same_bits(weights(before, policy), weights(state_of(policy), policy))
    answer.check(f"load of a save {how}", is_same and step == 2 and extra == {"here": 1}, "weights are the same bits")
    next_norm = update(policy, batch, 2).grad_norm
    same_end = same_bits(after, state_of(policy)) and next_norm == norm
    answer.check(f"next update after a load, {how}", same_end, f"gradient norms {norm!r} and {next_norm!r}")
    return figures


def weights(state: list[Tensor], policy: MegatronPolicy) -> list[Tensor]:
    """Return the part of a state that is the model's."""
    return state[: len(policy.parameters)]
