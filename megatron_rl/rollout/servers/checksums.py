"""Proof by checksums that an update replaced every weight: the log-probabilities of a probe do not show one lost bucket
when an update moves weights by a bit or two, as in bfloat16."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from megatron_rl.rollout.engine import EngineError
from megatron_rl.rollout.servers.shims.vllm.megatron_rl_digest import digest

Checksums = list[dict[str, int | str]]  # of each worker of a server: by parameter


def digested(stream: Iterable[tuple[str, Tensor]], digests: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the stream; note the digest of each tensor in `digests`."""
    for name, tensor in stream:
        digests[name] = digest(tensor)
        yield name, tensor
        del tensor  # as in pack_buckets


class WeightProof:
    """Compares what servers hold with what they were sent, one update after the other."""

    def __init__(self, parameter_of: Callable[[str], str | None]) -> None:
        """`parameter_of`: `Dialect.parameter_of`."""
        self._parameter_of = parameter_of
        self._sent: dict[str, list[int]] = {}  # by parameter: the digests of its weights, in the last update
        self._held: dict[int, Checksums] = {}  # by the number of workers of a server: its checksums then

    def check(self, digests: dict[str, int], servers: Mapping[str, Checksums]) -> None:
        """Check all servers after an update. `digests`: of the weights sent; `servers`: checksums by address.

        Where a server's checksums are digests, each equals what was sent. Where their form is the server's own, all
        servers of equally many workers have the same, and a parameter's checksum changed since the last update if and
        only if its weights did. Raises: EngineError naming the server and the weight.
        """
        sent: dict[str, list[int]] = defaultdict(list)
        for name, value in digests.items():
            parameter = self._parameter_of(name)
            if parameter is not None:
                sent[parameter].append(value)
                continue
            for url, workers in servers.items():
                if any(worker.get(name) != value for worker in workers):
                    raise _fault(url, name, "is not what was sent")
        held: dict[int, Checksums] = {}
        for url, workers in servers.items():
            first, before = held.setdefault(len(workers), workers), self._held.get(len(workers))
            for parameter, values in sent.items():
                if any(parameter not in worker for worker in workers):
                    raise _fault(url, parameter, "is no parameter there")
                if _differs(parameter, workers, first):
                    raise _fault(url, parameter, "is not that of another server of the same kind")
                if before is None or parameter not in self._sent:
                    continue
                moved = values != self._sent[parameter]
                if moved != _differs(parameter, workers, before):
                    fault = "was sent anew and is as before" if moved else "was sent as before and is another"
                    raise _fault(url, parameter, fault)
        self._sent, self._held = sent, held


def _differs(parameter: str, workers: Checksums, others: Checksums) -> bool:
    return [worker[parameter] for worker in workers] != [other[parameter] for other in others]


def _fault(url: str, name: str, what: str) -> EngineError:
    return EngineError(
        f"after a weight update {name} at {url} {what}: the server does not hold the weights that it was sent. Try "
        "another rollout.weight_sync.mode; if it keeps weights in another dtype than the policy, or in another layout "
        "than the other servers, set rollout.weight_sync.checksums=false"
    )
