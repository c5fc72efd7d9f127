"""Peak memory and speed of `megatron-rl convert` on a synthetic Llama of a given size, each direction in a process of
its own: python scripts/bench_convert.py --gigabytes 4 --shards 4."""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HIDDEN, FFN, VOCAB, HEADS, GROUPS = 2048, 5632, 32000, 16, 4
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // HEADS * GROUPS, HIDDEN),
    "self_attn.v_proj": (HIDDEN // HEADS * GROUPS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint in bfloat16")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; needs three times the size")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for row in measure(Path(folder), options.gigabytes, options.shards):
            print(
                f"{row['direction']:16} {row['gigabytes']:.2f} GB in {row['seconds']:.0f} s, peak RSS "
                f"{row['peak_gb']:.2f} GB (at rest {row['rest_gb']:.2f}), bound {row['bound_gb']:.2f} GB"
            )


def measure(folder: Path, gigabytes: float, shards: int) -> list[dict[str, Any]]:
    """Convert there and back; a dict a direction, sizes in GB (10^9 bytes), the bound being 1.5 times the largest shard
    + 1 GB. Raises: CalledProcessError when a conversion fails."""
    source, middle, target = (folder / name for name in ("hf", "megatron", "back"))
    write_model(source, gigabytes, shards)
    sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
    limit = f"{math.ceil(max(sizes) / 1e6)}MB"
    rows = [
        convert("hf-to-megatron", source, middle),
        convert("megatron-to-hf", middle, target, "--max-shard-size", limit),
    ]
    for row in rows:
        row.update(gigabytes=sum(sizes) / 1e9, bound_gb=1.5 * max(sizes) / 1e9 + 1)
    shutil.rmtree(middle)
    return rows


def convert(direction: str, *arguments: Any) -> dict[str, Any]:
    """Run one command in a fresh process that reports its own peak."""
    start = time.monotonic()
    command = [sys.executable, __file__, "--child", "convert", direction, *map(str, arguments)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row = json.loads(result.stdout.splitlines()[-1])
    return row | {"direction": direction, "seconds": time.monotonic() - start}


def child(arguments: list[str]) -> None:
    """The command line itself, with the resident memory after its imports and at its peak."""
    from megatron_rl import cli
    from megatron_rl.convert import to_hf, to_megatron
    from megatron_rl.policy import build

    assert to_hf and to_megatron and build
    rest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.argv = ["megatron-rl", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code:
            raise
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak_gb": peak * 1024 / 1e9, "rest_gb": rest * 1024 / 1e9}))


def write_model(folder: Path, gigabytes: float, shards: int) -> None:
    """A Llama of random bytes that are finite bfloat16 numbers, one tensor in memory at a time."""
    layer_bytes = 2 * sum(math.prod(shape) for shape in LAYER.values())
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / layer_bytes))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LAYER.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_shards(folder, shapes, shards)


def _write_shards(folder: Path, shapes: dict[str, tuple[int, ...]], shards: int) -> None:
    import numpy

    generator = numpy.random.default_rng(1)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    parts: list[list[str]] = [[] for _ in range(shards)]
    seen = 0
    for name, shape in shapes.items():
        parts[min(shards - 1, seen * shards // total)].append(name)
        seen += 2 * math.prod(shape)
    weight_map = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header, offset = {}, 0
        for name in names:
            end = offset + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, end]}
            offset, weight_map[name] = end, file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for name in names:  # sign, exponents 64 to 127, 7 bits of mantissa
                bits = generator.integers(0, 2**13, math.prod(shapes[name]), dtype=numpy.uint16)
                stream.write((bits + numpy.uint16(0x2000)).tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
