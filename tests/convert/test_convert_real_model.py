"""SmolLM2-135M-Instruct, a real model (Llama architecture, tied, 9 heads, 3 key-value groups), through every format."""

from __future__ import annotations

import dataclasses
import json
import queue
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.convert.to_hf import megatron_to_hf
from megatron_rl.convert.to_megatron import hf_to_megatron
from megatron_rl.packing import Layout, pack_supervised
from tests.convert.smollm import download
from tests.policy.tiny import make_config, policy_of, same_bits
from tests.worlds import Worlds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PROMPTS = ["What is the capital of France?", "Compute 12 * 7 and explain.", "Write one line about the sea."]
NEW_TOKENS = 24  # at most
LAYOUTS: list[dict[str, Any]] = [{"tp": 3}, {"pp": 2}, {"tp": 3, "pp": 2}]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(Hugging Face folder in float32, its conversion)."""
    root = tmp_path_factory.mktemp("smollm2")
    download(root)
    hf_to_megatron(root / "hf", root / "megatron")
    return root / "hf", root / "megatron"


def _through_layouts(
    megatron: Path, hf: Path, sequences: list[list[int]], layouts: list[dict[str, Any]], targets: list[Path]
) -> list[tuple[float, bool, list[Tensor]]]:
    """Per layout: the checkpoint loaded into a policy, and saved again; whether its weights are those of `hf`, and on
    the last stage the logits of each sequence."""
    import torch.distributed as dist

    from megatron_rl.policy.schedule import run_schedule  # before Megatron, which it prepares

    from megatron.core import dist_checkpointing  # isort: skip
    from megatron.core.dist_checkpointing.strategies import filesystem_async  # isort: skip

    found = []
    for layout, target in zip(layouts, targets, strict=True):
        config = make_config(megatron, parallel=layout)
        with policy_of(config) as policy:
            layout = dataclasses.replace(
                Layout.of(config),
                micro_batch_tokens=max(map(len, sequences)),
                equal_lengths=policy.groups.pp_size > 1,
            )
            batch = pack_supervised([(sequence[:1], sequence[1:]) for sequence in sequences], layout)

            def full(logits: Tensor, micro_batch: Any, tp: Any = policy.groups.tp) -> tuple[int, Tensor]:
                shards = [torch.empty_like(logits) for _ in range(tp.size())]
                dist.all_gather(shards, logits.contiguous(), group=tp)
                number = int(micro_batch.prompt_ids.max())
                return number, torch.cat(shards, dim=1)[micro_batch.prompt_ids == number]

            with torch.no_grad():
                logits = dict(run_schedule(policy.model, batch, full, forward_only=True))
            # one rank compares: six copies of the model would not fit everywhere
            expected = tensors_of(hf) if policy.groups.rank == 0 else {}
            same = [torch.equal(expected[name], tensor) for name, tensor in policy.hf_weights() if expected]
            if policy.groups.rank == 0:
                assert len(same) == len(expected) > 0
                target.mkdir()
            dist.barrier()
            filesystem_async._results_queue = queue.SimpleQueue()  # the default is a manager process a rank
            metadata = {"singleton_local_shards": False, "dp_cp_group": policy.groups.dp_cp}
            dist_checkpointing.save(
                {"model": policy.model.chunks[0].sharded_state_dict(metadata=metadata)}, str(target)
            )
            found.append((all(same), [logits[i] for i in range(len(sequences))] if logits else []))
    return found


def test_every_format_and_layout_is_the_same_model(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf, megatron = folders
    raw = json.loads((hf / "config.json").read_text())
    assert (raw["num_attention_heads"], raw["num_key_value_heads"], raw["vocab_size"]) == (9, 3, 49152)
    assert raw["model_type"] == "llama" and raw["tie_word_embeddings"] and len(list(hf.glob("*.safetensors"))) > 1
    model, tokenizer = AutoModelForCausalLM.from_pretrained(hf).eval(), AutoTokenizer.from_pretrained(hf)
    greedy, reference = [], []
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
        with torch.inference_mode():
            text = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)
            reference.append(model(text).logits[0])
        greedy.append((ids.shape[1], text[0].tolist()))
    sequences = [text for _, text in greedy]
    found: list[Any] = []
    pool = Worlds()
    try:
        for i, layout in enumerate(LAYOUTS):
            size = layout.get("tp", 1) * layout.get("pp", 1)
            target = tmp_path / str(i)
            ranks = pool.run(size, _through_layouts, megatron, hf, sequences, [layout], [target], timeout=1500)
            assert all(rank[0][0] for rank in ranks), layout
            found.append(ranks[-1][0][1])
            shutil.copytree(hf, target / "hf", ignore=shutil.ignore_patterns("*.safetensors*"))
            megatron_to_hf(target, tmp_path / f"hf{i}", max_shard_size="200MB")
            assert same_bits(tensors_of(tmp_path / f"hf{i}"), tensors_of(hf)), layout
            back = AutoTokenizer.from_pretrained(tmp_path / f"hf{i}")
            assert back.chat_template == tokenizer.chat_template and back(PROMPTS[0]) == tokenizer(PROMPTS[0])
    finally:
        pool.close()
    worst = 0.0
    for layout, logits in zip(LAYOUTS, found, strict=True):
        for (length, text), ours, theirs in zip(greedy, logits, reference, strict=True):
            worst = max(worst, (ours - theirs).abs().max().item())
            # token by token what the policy would choose after the text so far: its own greedy text, by induction
            assert ours[length - 1 : -1].argmax(-1).tolist() == text[length:], (layout, tokenizer.decode(text))
    print(f"largest |difference| of the logits: {worst:.2e}")
    assert worst < 1e-4
