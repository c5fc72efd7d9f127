"""The same tiny step on a real gloo world and as one process of a world that is not there."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_rl.config import Config, parse_config
from tests.invariance_case import LAYOUTS
from tests.tiny import HF, tiny_raw

VOCABULARY = 24
BFLOAT16 = {"dtype": "bfloat16", "activations": "model", "recompute": "full"}
CASES: dict[str, dict[str, Any]] = {
    "tp2 sp": {"parallel": LAYOUTS["tp2_sp"]},
    "tp2 sp bfloat16 recomputed": {"parallel": LAYOUTS["tp2_sp"], "model": BFLOAT16},
    "dp2": {"parallel": LAYOUTS["dp2"]},
    "pp2": {"parallel": LAYOUTS["pp2"]},
    "cp2": {"parallel": LAYOUTS["cp2"]},
}


def tiny_config(**sections: Any) -> Config:
    """Two updates of two or more full micro-batches on each of two ranks."""
    model = {"hf_config": HF | {"vocab_size": VOCABULARY, "tie_word_embeddings": False}, **sections.pop("model", {})}
    parallel = {"tp": 1} | sections.pop("parallel")
    train = {"share_prompts": False, "micro_batch_tokens": 96, "prompts_per_minibatch": 4, "prompts_per_step": 8}
    loss = {"type": "kl_cov", "select_fraction": 0.05}
    return parse_config(tiny_raw(Path("/nowhere"), model=model, parallel=parallel, train=train, loss=loss, **sections))


def real_books(case: str) -> list[Any]:
    """The phases on this rank of a real world, with real tensors."""
    return _books(tiny_config(**CASES[case]), fakes=False)


def rehearsed_books(case: str) -> list[Any]:
    """The phases of rank 0, in a process alone."""
    import torch.distributed as dist

    dist.destroy_process_group()
    return _books(tiny_config(**CASES[case]), fakes=True)


def _books(config: Config, *, fakes: bool) -> list[Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megatron_rl.kernels import linear_cpu
    from megatron_rl.rehearse.books import Books
    from megatron_rl.rehearse.run import build, perform_step
    from megatron_rl.rehearse.world import Watch, fake_world

    enter = Books.enter

    def enter_but_copies_of_gloo(books: Books, storage: Any, tag: Any, *options: Any) -> None:
        """Leave out the input that gloo's reduce-scatter copies, and splits, while one waits for it."""
        if not tag.maker.endswith("split"):
            enter(books, storage, tag, *options)

    watch = Watch(FakeTensorMode(allow_non_fake_inputs=True) if fakes else None)
    gc.collect()
    gc.disable()  # cycles would be freed at other moments in a process that did something before
    with (
        # oneDNN's product is a CPU's alone, and its stand-in makes other temporaries
        mock.patch.object(linear_cpu, "_HAS_ONEDNN", False),
        mock.patch.object(Books, "enter", enter_but_copies_of_gloo),
        fake_world(0, 2, watch) if fakes else watch,
    ):
        perform_step(config, build(config, watch.books), watch)
    gc.enable()
    gc.collect()
    return watch.books.phases
