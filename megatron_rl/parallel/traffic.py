"""Watching collectives: Megatron's and ours alike, because it is the process group's methods that report."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed import ProcessGroup, Work

from megatron_rl.parallel.reduce import Reducer

# (operation, the group's name, number of the call among the group's, and on the monotonic clock the call, the start and
# the end of the stretch that held up the caller)
Report = Callable[[str, str, int, float, float, float], None]
POINT_TO_POINT = ("send", "recv")

# operation -> methods of ProcessGroup; releases of torch differ in the names of some
_OPERATIONS = {
    "all_reduce": "allreduce allreduce_coalesced",
    "all_gather": "allgather _allgather_base all_gather_single allgather_into_tensor_coalesced "
    "all_gather_single_coalesced",
    "reduce_scatter": "reduce_scatter _reduce_scatter_base reduce_scatter_single reduce_scatter_tensor_coalesced "
    "reduce_scatter_single_coalesced",
    "all_to_all": "alltoall alltoall_base all_to_all_single",
} | {name: name for name in ("broadcast", "reduce", "gather", "scatter", "barrier", *POINT_TO_POINT)}
_METHODS = {method: operation for operation, methods in _OPERATIONS.items() for method in methods.split()}
_ADJACENT_SECONDS = 1e-4  # a wait that follows its call so closely is one stretch with it
_CLOCK_ROUNDS = 9


@contextlib.contextmanager
def watch_collectives(report: Report) -> Iterator[None]:
    """Report every collective of this process until the context closes.

    An asynchronous one is reported when it is waited for, from the beginning of the wait: only what holds up the caller
    counts. With NCCL calls and waits return at once, so that the times are the host's, not the device's. The numbers
    tell which calls of different ranks are one collective; sends and receives, which only two ranks make, have -1.
    """
    pending: dict[int, tuple[str, str, int, float, float]] = {}  # by id of the Work; an id that comes again replaces it
    calls: Counter[str] = Counter()

    def calling(method: Callable[..., Any], operation: str) -> Callable[..., Any]:
        def call(group: ProcessGroup, *arguments: Any, **options: Any) -> Any:
            name, number = group.group_name, -1
            if operation not in POINT_TO_POINT:
                number, calls[name] = calls[name], calls[name] + 1
            start = time.perf_counter()
            work = method(group, *arguments, **options)
            end = time.perf_counter()
            if work is None:
                report(operation, name, number, start, start, end)
            else:
                pending[id(work)] = (operation, name, number, start, end)
            return work

        return call

    def waiting(method: Callable[..., Any]) -> Callable[..., Any]:
        def wait(work: Work, *arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = method(work, *arguments, **options)
            end = time.perf_counter()
            if (known := pending.pop(id(work), None)) is not None:
                operation, group, number, called, returned = known
                began = called if start - returned < _ADJACENT_SECONDS else start
                report(operation, group, number, called, began, end)
            return result

        return wait

    # read from vars: reading from the class would unwrap pybind's descriptor, and putting back what comes then would
    # leave a function that no longer binds to its object
    own = vars(ProcessGroup)
    saved = [(ProcessGroup, name, own[name]) for name in _METHODS if name in own] + [(Work, "wait", vars(Work)["wait"])]
    for owner, name, _ in saved:
        bound = getattr(owner, name)
        setattr(owner, name, waiting(bound) if owner is Work else calling(bound, _METHODS[name]))
    try:
        yield
    finally:
        for owner, name, method in saved:
            setattr(owner, name, method)


def clock_offset(world: Reducer, rank: int, machine: str) -> float:
    """Return the seconds to add to this rank's monotonic clock to get rank 0's. A collective.

    Processes of one `machine` (its boot id) share the clock: exactly 0. Between machines: the median difference right
    after a few gathers, good to about the time of one.
    """
    machines = world.gather_objects(machine)
    differences = []
    for _ in range(_CLOCK_ROUNDS):
        world.gather_objects(None)
        clocks = world.gather_objects(time.perf_counter())
        differences.append([clocks[0] - clock for clock in clocks])
    ordered = sorted(row[rank] for row in differences)
    return 0.0 if machines[rank] == machines[0] else ordered[len(ordered) // 2]
