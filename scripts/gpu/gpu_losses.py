"""Every loss in float32 and bfloat16: one frozen mini-batch on this device and on the CPU, then compared.

What is measured and how it is compared is `megatron-rl conform`'s: logits, log-probabilities, selected tokens, loss
metrics, gradients, an update, a checkpoint. The CPU is a process of its own, because a process has one device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpu_answer import Answer
from gpu_cases import batch_of, config_of, join, policy_of, small_model, update

from megatron_rl import device
from megatron_rl.algorithms.methods import METHODS
from megatron_rl.config import Config
from megatron_rl.conform.frozen import frozen_config
from megatron_rl.conform.measure import measure
from megatron_rl.conform.verdicts import compare
from megatron_rl.errors import UserError
from megatron_rl.models.facts import read_hf_config
from megatron_rl.rollout.servers.processes import free_port

TOKENS, FEW_TOKENS = 2048, 512  # of the frozen mini-batch, about
OF_A_DRY_RUN = ("kl_cov float32", "clip_cov bfloat16", "qwen3_moe float32")  # the CPU against itself
_CORRECTED = {"rollout_correction": {"weights": "mask", "level": "sequence", "cap": 1.4}}
KL_COV = {"type": "kl_cov", "select_fraction": 0.05}
OPTIONS: dict[str, dict[str, Any]] = {
    "kl_cov": {"select_fraction": 0.05, "ref_kl_coef": 0.1},
    "clip_cov": {"select_fraction": 0.05, "cov_low": 0.01},
    "ppo_clip": {"entropy_coef": 0.01},
    "gspo": {"aggregation": "seq_mean_token_mean"} | _CORRECTED,
    "cispo": {},
    "forking": {},
    "entropy_advantage": {},
    "steer": {},
    "gaussian_cov": {},
}
QWEN3 = {"model_type": "qwen3", "head_dim": 32}
MOE = {
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
SECONDS = 90  # for the CPU, from when the device is through


def cases(folder: Path, *, are_all: bool) -> dict[str, Config]:
    """Return the configs by name, most telling first; else those of a dry run, of fewer tokens."""
    assert OPTIONS.keys() == METHODS.keys(), OPTIONS.keys() ^ METHODS.keys()
    made = {}
    for dtype in ("float32", "bfloat16"):
        for loss, options in OPTIONS.items():
            made[f"{loss} {dtype}"] = config_of(folder, loss={"type": loss} | options, model={"dtype": dtype})
    plain = {"type": "ppo_clip"}
    others: dict[str, dict[str, Any]] = {
        "qwen3, full recomputation": {"model": {"hf_config": small_model(**QWEN3), "recompute": "full"}},
        "qwen3_moe": {"model": {"hf_config": small_model(**MOE)}},
        "fused output layer": {"model": {"fused_linear_stats": "on"}},
        "shared prompts": {"train": {"share_prompts": True}},
    }
    for name, sections in others.items():
        made[f"{name} float32"] = config_of(folder, loss=plain, **sections)
    made = {name: frozen_config(config, TOKENS if are_all else FEW_TOKENS) for name, config in made.items()}
    return made if are_all else {name: made[name] for name in OF_A_DRY_RUN}


def measure_all(folder: Path, side: str, *, are_all: bool) -> None:
    """Measure the cases on this process's device, into `folder/side/`."""
    configs = cases(folder / side / "data", are_all=are_all)
    groups = join(next(iter(configs.values())))
    for name, config in configs.items():
        target = folder / side / name
        try:
            measure(config, dict(read_hf_config(config.model)), groups, target, resumes=target)
        except Exception as error:  # of one case; the others go on
            target.mkdir(parents=True, exist_ok=True)
            (target / "error.txt").write_text(f"{type(error).__name__}: {error}")


def losses(answer: Answer) -> None:
    """Compare every case with the CPU's, one line each: the verdict that is nearest to its limit, or beyond."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        which = "all" if device.ON_GPU else "few"
        environment = os.environ | {"MEGATRON_RL_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": str(min(4, os.cpu_count() or 1))}
        with (folder / "host.log").open("w") as log:
            host = subprocess.Popen(
                [sys.executable, __file__, str(folder), which], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            measure_all(folder, "device", are_all=device.ON_GPU)
            patience = SECONDS * float(os.environ.get("TEST_GPU_PATIENCE", "1"))
            ending = f"code {code}" if (code := host.wait(patience)) else ""
        except subprocess.TimeoutExpired:  # what it has measured is compared
            ending = f"not after {patience:.0f} s"
        finally:
            host.kill()
        if ending:
            answer.check("the CPU's process ended", False, f"{ending}: {(folder / 'host.log').read_text()[-500:]}")
        for case, config in cases(folder / "device" / "data", are_all=device.ON_GPU).items():
            compare_case(answer, case, config, folder)


def compare_case(answer: Answer, name: str, config: Config, folder: Path) -> None:
    """Add the line of one case."""
    ours, theirs = folder / "device" / name, folder / "host" / name
    errors = [path for side in (ours, theirs) if (path := side / "error.txt").exists()]
    if errors or not all((side / "numbers.json").exists() for side in (ours, theirs)):
        wrong = "; ".join(f"{path.parent.parent.name}: {path.read_text()}" for path in errors)
        answer.check(name, False, wrong[:600] or "was not measured")
        return
    verdicts = compare(ours, theirs, config.model.dtype, 0.0)
    answer.figure(name, {v.name: [v.deviation, v.tolerance, v.place] for v in verdicts})
    bad = [v for v in verdicts if not v.is_ok]
    shown = bad or sorted(verdicts, key=lambda v: -v.deviation / max(v.tolerance, 1e-30))[:1]
    text = "; ".join(f"{v.name} {v.deviation:.1e} of {v.tolerance:.0e} at {v.place or 'none'}" for v in shown)
    answer.check(name, not bad, text)


def first(answer: Answer) -> None:
    """Look that a step's first update sees the old log-probabilities again, bit for bit, and its second does not."""
    shapes = {
        "one micro-batch": {"micro_batch_tokens": 8192},
        "several micro-batches": {"micro_batch_tokens": 256},
        "shared prompts": {"micro_batch_tokens": 8192, "share_prompts": True},
    }
    with TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16") if device.ON_GPU else ("bfloat16",):
            for name, train in shapes.items():
                config = config_of(Path(folder), model={"dtype": dtype}, loss=KL_COV, train=train)
                try:
                    equal, moved, count = differences(config)
                except UserError as error:
                    answer.check(f"{name}, {dtype}", False, str(error))
                    continue
                text = f"{count} micro-batches; mean k3 of the first update {equal:.1e}, of the second {moved:.1e} nats"
                answer.check(f"{name}, {dtype}", equal == 0.0 < moved, text)


def differences(config: Config) -> tuple[float, float, int]:
    """Return the sum of the first update's k3 and |ratio - 1|, the mean k3 of the second, and the micro-batches of the
    first."""
    groups = join(config)
    policy = policy_of(config, groups)
    batch = policy.with_old_logprobs(batch_of(config, groups))
    results = [update(policy, batch, number) for number in range(2)]
    kl, ratio = results[0].sums["loss/approx_kl"], results[0].sums["loss/ratio"]
    later = results[1].sums["loss/approx_kl"]
    first_difference = abs(float(kl[0])) + abs(float(ratio[0] - ratio[1]))
    return first_difference, float(later[0] / later[1]), len(batch.mini_batches[0].micro_batches)


if __name__ == "__main__":
    measure_all(Path(sys.argv[1]), "host", are_all=sys.argv[2] == "all")
