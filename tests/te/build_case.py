"""One rank's policy of Transformer Engine's layers, built of fake tensors on "cuda": prints what is wrong with it, and
what it is made of. `python -m tests.te.build_case CONFIG.json RANK`; test_te_models.py starts it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from tests.te import pretend  # isort: skip  before the rest: the device is chosen at its import

from megatron_rl import device
from megatron_rl.config import parse_config
from megatron_rl.convert.weights import expected_shapes
from megatron_rl.models.facts import read_hf_config
from megatron_rl.models.mapping import find_row, full_shapes, global_name, model_rows, split_of

EXPERT = re.compile(r"local_experts\.(\d+)\.")


def main(raw: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return the faults of this rank's model, the rows of the mapping table that it has and those it shall have, and
    its layers and optimizers by class."""
    config = parse_config(raw)
    pretend.join_world(rank, config.parallel.processes)
    from megatron_rl.parallel.groups import init_groups
    from megatron_rl.policy import build

    assert device.ON_GPU and device.layers("auto") == "transformer_engine"
    groups = init_groups(config.parallel, config.seed)
    with pretend.fake_tensors():
        model = build.build_model(read_hf_config(config.model), config, groups, fuse_output_layer=False)
        optimizer = build.build_optimizer(model, config, 100)[0]
    hf = model.hf_config
    local = getattr(hf, "num_experts", 0) // groups.ep_size
    first = groups.ep_rank * local
    faults, rows = [], set()
    for chunk in model.chunks:
        offset = chunk.decoder.layers[0].layer_number - 1
        for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
            if tensor.device.type != "cuda":
                faults.append(f"{name} is on {tensor.device}")
        for name, parameter in chunk.named_parameters():
            if parameter.dtype != build.DTYPES[config.model.dtype]:
                faults.append(f"{name} is {parameter.dtype}")
            try:
                row = find_row(global_name(name, offset), hf.tie_word_embeddings, first)
            except KeyError as error:
                faults.append(str(error))
                continue
            rows.add(row.megatron)
            split = split_of(row, groups.tp_rank, groups.tp_size, groups.ep_size)[1]
            got, expected = full_shapes(row, tuple(parameter.shape), hf, split), expected_shapes(row, hf)
            if got != expected:
                faults.append(f"{name} {tuple(parameter.shape)} makes {got}, expected {expected}")
    mine = [
        row.megatron
        for row in model_rows(hf)
        if not row.is_expert or first <= int(EXPERT.search(row.megatron)[1]) < first + local  # type: ignore[index]
    ]
    classes = {type(module) for chunk in model.chunks for module in chunk.modules()}
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return {
        "faults": faults,
        "rows": sorted(rows),
        "expected": mine,
        "layers": sorted(base.__name__ for kind in classes for base in kind.__mro__ if _is_engine(base)),
        "optimizers": sorted({type(inner.optimizer).__name__ for inner in chained}),
        "has engine's Adam": all(_is_engine(type(inner.optimizer)) for inner in chained),
    }


def _is_engine(kind: type) -> bool:
    return kind.__module__.startswith("transformer_engine.")


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))))
