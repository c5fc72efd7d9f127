from __future__ import annotations

import time
from typing import Any

from megatron_rl.parallel.groups import Groups  # noqa: F401  prepares Megatron before torch.distributed is used
from tests.worlds import Worlds

Call = tuple[str, str, int, float, float, float]


def _watched() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from megatron_rl.parallel.reduce import Reducer
    from megatron_rl.parallel.traffic import clock_offset, watch_collectives

    rank, calls = dist.get_rank(), []
    values, before = torch.ones(2), dict(vars(dist.ProcessGroup))
    with watch_collectives(lambda *call: calls.append(call)):
        dist.all_reduce(values)
        if rank == 1:
            time.sleep(0.2)
        dist.all_reduce(values)  # rank 0 waits
        work = dist.all_reduce(values, async_op=True)
        time.sleep(0.2)
        work.wait()
        if rank == 0:
            dist.send(values, 1)
        else:
            dist.recv(values, 0)
        Reducer(dist.group.WORLD).sum(values.double())
    assert vars(dist.ProcessGroup) == before | {"__doc__": before["__doc__"]}
    dist.all_reduce(values)  # works as ever, and unseen
    return {
        "sum": values.tolist(),
        "names": [(name, number) for name, _, number, *_ in calls],
        "held": [end - start for *_, start, end in calls],
        "called_before": [start - called for *_, called, start, _ in calls],
        "same_machine": clock_offset(Reducer(dist.group.WORLD), rank, "a"),
        "other_machine": clock_offset(Reducer(dist.group.WORLD), rank, f"m{rank}"),
    }


def test_collectives_are_seen_and_left_as_they_were(worlds: Worlds) -> None:
    first, second = worlds.run(2, _watched)
    point = {0: ("send", -1), 1: ("recv", -1)}
    for rank, seen in enumerate((first, second)):
        expected = [("all_reduce", 0), ("all_reduce", 1), ("all_reduce", 2), point[rank], ("all_gather", 3)]
        assert seen["names"] == expected
        assert seen["sum"] == [16.0, 16.0]
        assert seen["same_machine"] == 0.0
    assert first["held"][1] > 0.1 and first["called_before"][1] == 0.0
    assert first["called_before"][2] > 0.15  # asynchronous: what held up the caller began at the wait
    assert abs(second["other_machine"]) < 5.0  # in truth 0; a loaded machine stretches a gather
