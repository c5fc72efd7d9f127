"""Proof by checksums that an update replaced every weight: the log-probabilities of a probe do not show one lost bucket
when an update moves weights by a bit or two, as in bfloat16."""

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

    def __init__(self, parameter_of: Callable[[str], str], *, exact: bool) -> None:
        """`parameter_of`, `exact`: the Dialect's `parameter_of` and `checksums_are_digests`."""
        self._parameter_of, self._exact = parameter_of, exact
        # by the number of workers of a server: by parameter, the digests sent to it last and the checksums held then
        self._last: dict[int, tuple[dict[str, list[int]], dict[str, list[int | str | None]]]] = {}

    def check(self, digests: dict[str, int], servers: Mapping[str, Checksums]) -> None:
        """Check all servers after an update. `digests`: of the weights sent; `servers`: checksums by address.

        Digests equal those sent. Where a server has checksums of its own, a parameter's are those of before if and only
        if its weights are: the server's before was the last update, or another server of equally many workers.
        Raises: EngineError naming the server and the parameter.
        """
        sent: dict[str, list[int]] = defaultdict(list)
        for name, value in digests.items():
            sent[self._parameter_of(name)].append(value)
        for url, workers in servers.items():
            held = {name: [worker.get(name) for worker in workers] for name in sent}
            sent_before, held_before = self._last.get(len(workers), ({}, {}))
            for name, values in sent.items():
                moved, changed = values != sent_before.get(name), held[name] != held_before.get(name)
                is_other = self._exact and held[name] != values * len(workers)
                if None in held[name] or moved != changed or is_other:
                    raise EngineError(
                        f"{url} does not hold the weights that it was sent: {name} was sent "
                        f"{'anew' if moved else 'as before'}, and is {'another' if changed else 'as before'}. Try "
                        "another rollout.weight_sync.mode; where servers compute in another dtype than the policy, or "
                        "differ in their layout, set rollout.weight_sync.checksums=false"
                    )
            self._last[len(workers)] = sent, held
