"""What a step costs the host of one rank beside the GPUs' work, when ranks and batch grow together:
python scripts/bench_host.py [--rollouts 2048] [--growth 4].

`megatron_rl.rehearse.host` as rank 0 of a world of tp 8 and dp 4 with --rollouts responses (mean length 4,200, at most
8,192: the 32B recipe's), then of dp 4 * growth with as many times the responses. CPU seconds of one thread, the median
of --repeats.
"""

from __future__ import annotations

import argparse
import os
import statistics

from megatron_rl.config import Config, parse_config
from megatron_rl.rehearse.host import STAND_INS, rehearse_host

TP, DP, SAMPLES, UPDATES, LIMIT, VOCAB = 8, 4, 8, 8, 8192, 151_643


def make_config(dp: int, rollouts: int) -> Config:
    prompts = rollouts // SAMPLES
    train = {"prompts_per_step": prompts, "prompts_per_minibatch": prompts // UPDATES, "micro_batch_tokens": 20_480}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}
    return parse_config(
        {
            "model": {"hf_config": {"model_type": "qwen2", "vocab_size": VOCAB, **sizes}},
            "parallel": {"world_size": TP * dp, "tp": TP, "sp": True},
            "data": {"type": "jsonl", "train_path": "none", "max_prompt_tokens": 1024},
            "rollout": {"samples_per_prompt": SAMPLES, "max_response_tokens": LIMIT},
            "reward": {"function": "math"},
            "train": train,
        }
    )


def measure(dp: int, rollouts: int) -> dict[str, float]:
    """Return the CPU seconds of each phase of a step on rank 0."""
    phases = rehearse_host(make_config(dp, rollouts), mean_response=4200).phases
    seconds = {name: cost.device_seconds for name, cost in phases.items() if name != STAND_INS}
    return seconds | {"all": sum(seconds.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=2048, help="of a step on dp 4")
    parser.add_argument("--growth", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for factor in (1, options.growth):
        runs = [measure(DP * factor, options.rollouts * factor) for _ in range(options.repeats)]
        rows.append({name: statistics.median(run[name] for run in runs) for name in runs[0]})
    print(f"| part | dp {DP} | dp {DP * options.growth}, batch x{options.growth} | ratio |\n|---|---|---|---|")
    for name, before in rows[0].items():
        print(f"| {name} | {before:.2f} s | {rows[1][name]:.2f} s | {rows[1][name] / max(before, 1e-3):.2f} |")
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
