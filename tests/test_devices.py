"""What a GPU would refuse, found on a CPU: tensors of two devices in one operator, and those of the wrong kind in a
collective. `tests/device_book.py` keeps the book; every run of this file must leave its list of faults empty."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.device_book import Book, booked, install, rewritten
from tests.tiny import HF, tiny_raw, trained
from tests.worlds import Worlds

LIMIT = 420.0
MOE = {key: value for key, value in HF.items() if key != "model_type"} | {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "tie_word_embeddings": False,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
DP2: dict[str, Any] = {"tp": 1, "world_size": 2}
ONE_STEP = {"num_steps": 1}
SAVING = {"save_every": 1, "eval_every": 1, "entropy_tangent": True, "save_hf": True}
KL_COV = {"type": "kl_cov", "select_fraction": 0.05, "ref_kl_coef": 0.1}
CLIP_COV = {"type": "clip_cov", "select_fraction": 0.05, "cov_low": 0.01}

# every loss, every way to lay out a model over two ranks
RUNS: dict[str, dict[str, Any]] = {
    "tp2_bf16": {
        "parallel": {"tp": 2, "sp": True},
        "model": {"dtype": "bfloat16", "recompute": "full"},
        "loss": KL_COV,
        "train": SAVING | ONE_STEP,
        "logging": {"samples_per_step": 4},
    },
    "tp2_bf16 resumed": {
        "parallel": {"tp": 2, "sp": True},
        "model": {"dtype": "bfloat16", "recompute": "full"},
        "loss": KL_COV,
        "train": SAVING,
        "logging": {"samples_per_step": 4},
    },
    "pp2": {"parallel": {"tp": 1, "pp": 2}, "model": {"fused_linear_stats": "on"}, "loss": CLIP_COV},
    "cp2": {
        "parallel": {"tp": 1, "cp": 2, "world_size": 2},
        "loss": {
            "type": "gspo",
            "aggregation": "seq_mean_token_mean",
            "rollout_correction": {"weights": "mask", "level": "sequence", "cap": 1.4, "max_kl": 0.05},
        },
        "train": ONE_STEP,
    },
    "ep2": {"parallel": DP2 | {"ep": 2}, "model": {"hf_config": MOE}, "loss": {"type": "steer"}, "train": ONE_STEP},
    "dp2": {
        "parallel": DP2 | {"distributed_optimizer": False},
        "loss": {"type": "forking", "adaptive_entropy": {"target_entropy": 9, "initial_coef": 0.01}},
        "train": {"share_prompts": False},
    },
    "gaussian_cov": {"parallel": DP2, "loss": {"type": "gaussian_cov"}, "train": ONE_STEP},
    "entropy_advantage": {"parallel": DP2, "loss": {"type": "entropy_advantage"}, "train": ONE_STEP},
    "cispo": {"parallel": DP2, "loss": {"type": "cispo"}, "train": ONE_STEP},
    "ppo_clip": {"parallel": DP2, "loss": {"type": "ppo_clip", "entropy_coef": 0.01}, "train": ONE_STEP},
}


def keep_books(raws: dict[str, dict[str, Any]]) -> dict[str, Book]:
    """On a rank: one run after the other, each with a book of its own."""
    import time

    install()
    books = {}
    for name, raw in raws.items():
        books[name] = Book()
        start = time.perf_counter(); cpu=time.process_time()
        with booked(books[name]), trained(raw):
            pass
        print("TOOK", name, time.perf_counter() - start, time.process_time()-cpu, flush=True)
    return books


@pytest.fixture(scope="module")
def pool() -> Iterator[Worlds]:
    """Processes of their own: a book can be kept only where Megatron was imported for it."""
    worlds = Worlds()
    yield worlds
    worlds.close()


def books_of(pool: Worlds, folder: Path, runs: dict[str, dict[str, Any]], size: int = 2) -> dict[str, Book]:
    """The book of each run, over all ranks. What is written behind a blank in a run's name starts where it ended."""
    raws = {name: tiny_raw(folder, name.split()[0], **sections) for name, sections in runs.items()}
    books = {name: Book() for name in runs}
    for rank in pool.run(size, keep_books, raws, timeout=LIMIT):
        for name, book in rank.items():
            books[name].faults += book.faults
            books[name].reads += book.reads
    return books


@pytest.fixture(scope="module")
def books(pool: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Book]:
    return books_of(pool, tmp_path_factory.mktemp("devices"), RUNS)


def test_no_operator_gets_tensors_of_two_devices(books: dict[str, Book]) -> None:
    for k,b in books.items():
        print(k)
        for f in b.faults.items(): print("   F", *f)
        for f in b.reads.items(): print("   r", *f)
    assert {name: book.faults for name, book in books.items() if book.faults} == {}
