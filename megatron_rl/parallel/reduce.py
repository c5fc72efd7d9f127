"""Global statistics over the ranks that hold different tokens: packed sums, exact quantiles, and the distributed top-k.

Every function gives the same bits on every rank of the group, because all ranks reduce the same gathered data.
"""

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rl.types import Float, Float64, Int64, Shaped

# torch 2.13 renamed it; the old name warns
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_FEW = 1 << 14  # values a rank that are rather gathered than counted by bins
_FIRST_VALUES = 1 << 11  # of those, and of a top-k, in the collective that tells how many there are
_MANY = 1 << 20  # slots of a top-k over all ranks, from which on histograms narrow down what is offered
_FIRST_BYTES = 1 << 12  # of an object, in the collective that tells the sizes


class Reducer:
    """Collectives over one process group (None: this process alone), as the algorithms ask for them: `types.Ranks`.

    Numbers travel on the group itself; objects and flags, which a rank may wait for, on a gloo group of the same ranks:
    a rank that waits in NCCL keeps its GPU busy, which an engine may be generating on, and is given up after a time.
    """

    def __init__(
        self, group: ProcessGroup | None, device: torch.device | None = None, hosts: ProcessGroup | None = None
    ) -> None:
        """`device`: where tensors that a method makes itself live; None: the CPU. `hosts`: the gloo group for objects
        and flags; None: `group` is one."""
        self.group, self._hosts = group, hosts or group
        self.device = device or torch.device("cpu")
        self.size = 1 if group is None else dist.get_world_size(group)

    def sum(self, values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Return the element-wise sum over ranks, a new tensor; values are float64 or integers.

        Ranks are gathered and added in rank order, so that the result does not depend on the backend's reduction tree.
        """
        if self.size == 1:
            return values.clone()
        return self._gather(values).sum(0)

    def max(self, values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Return the element-wise maximum over ranks."""
        if self.size == 1:
            return values.clone()
        return self._gather(values).amax(0)

    def top_k(
        self, values: Float[Tensor, "N"], ids: Int64[Tensor, "N"], k: int
    ) -> tuple[Float64[Tensor, "k"], Int64[Tensor, "k"]]:
        """Return the k largest of all ranks' `values` and their ids; ties go to the smaller id.

        ids: unique over all ranks. There are fewer than k when fewer exist; they are sorted by falling value, then
        rising id. Each rank offers its local best k, see `top_ks_and_sum`.
        """
        (best,), _ = self.top_ks_and_sum([(values, ids, k)], values.new_zeros(0, dtype=torch.float64))
        return best

    def top_ks_and_sum(
        self, sets: Sequence[tuple[Float[Tensor, "_"], Int64[Tensor, "_"], int]], sums: Float64[Tensor, "*shape"]
    ) -> tuple[list[tuple[Float64[Tensor, "_"], Int64[Tensor, "_"]]], Float64[Tensor, "*shape"]]:
        """Return `top_k` of each (values, ids, k), and the `sum` of `sums`.

        The first collective brings the sums, how many values each rank offers and the first of them; where some are
        missing, a second one brings as many as the rank that offers most has. Before quotas that are large over all
        ranks, histograms tell what can win at all, so that a rank offers about its share of the winners.
        """
        if self.size > 1 and self.size * sum(k for *_, k in sets) > _MANY:
            sets = self._contenders(sets)
        local = [_best(values.double(), ids, min(k, values.numel())) for values, ids, k in sets]
        if self.size == 1:
            return local, sums.clone()
        # bits travel as integers: an id may not fit a float
        offers = [torch.stack([values.view(torch.int64), ids]) for values, ids in local]

        def slots(widths: Sequence[int]) -> list[Tensor]:
            return [_padded(offer[:, :n], n).flatten() for offer, n in zip(offers, widths, strict=True)]

        firsts = [min(k, _FIRST_VALUES) for *_, k in sets]
        sizes = torch.tensor([offer.shape[1] for offer in offers], device=sums.device)
        counts, totals, *rows = self._gather_parts([sizes, sums.flatten().view(torch.int64), *slots(firsts)])
        offered = counts.tolist()
        most = [max(column) for column in zip(*offered, strict=True)]
        if any(n > first for n, first in zip(most, firsts, strict=True)):
            rows = self._gather_parts(slots(most))
        best = []
        for i, (row, (*_, k)) in enumerate(zip(rows, sets, strict=True)):
            pairs = row.view(self.size, 2, row.shape[1] // 2)
            values, ids = torch.cat([pair[:, : n[i]] for pair, n in zip(pairs, offered, strict=True)], dim=1)
            best.append(_best(values.view(torch.float64), ids, min(k, len(ids))))
        return best, totals.contiguous().view(torch.float64).sum(0).view(sums.shape)

    def _contenders(
        self, sets: Sequence[tuple[Float[Tensor, "_"], Int64[Tensor, "_"], int]]
    ) -> list[tuple[Float[Tensor, "_"], Int64[Tensor, "_"], int]]:
        """Return the sets without this rank's values that are, as float32, below the k-th largest of all ranks'."""
        # 0.0 - x: both zeros become one value, as they are in the order by value, then id; NaN is the largest
        keys = [_ordered_bits(0.0 - values.float()).where(~values.isnan(), 0) for values, *_ in sets]
        last = self._order_statistics(keys, [max(0, k - 1) for *_, k in sets])
        kept = [key <= bound for key, bound in zip(keys, last, strict=True)]
        return [(values[keep], ids[keep], k) for (values, ids, k), keep in zip(sets, kept, strict=True)]

    def quantiles(self, values: Float[Tensor, "N"], fractions: list[float]) -> list[float]:
        """Return exact lower quantiles over all ranks' `values`, as float32: the element of rank floor(q * (n - 1)).

        Radix selection: four 256-bin histograms, so four small collectives whatever n is; fewer values are gathered and
        sorted. NaN for an empty set.
        """
        keys = _ordered_bits(values.float())
        # the first collective brings how many there are, and all of them when they are few
        head = torch.nn.functional.pad(keys[:_FIRST_VALUES], (1, max(0, _FIRST_VALUES - keys.numel())))
        head[0] = keys.numel()
        rows = self._gather(head)
        counts = rows[:, 0].tolist()
        total, most = sum(counts), max(counts)
        if total == 0:
            return [float("nan")] * len(fractions)
        ranks = [int(q * (total - 1)) for q in fractions]
        if most > _FEW:
            return [_from_ordered_bits(key) for key in self._order_statistics([keys] * len(ranks), ranks).tolist()]
        rows = rows[:, 1:] if most <= _FIRST_VALUES else self._gather(_padded(keys, most))
        ordered = torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)]).sort().values
        return [_from_ordered_bits(key) for key in ordered[ranks].tolist()]

    def kth_largest(self, values: Float[Tensor, "N"], k: int) -> float:
        """Return the k-th largest of all ranks' `values`, as float32, exact; 1 <= k <= their number."""
        (key,) = self._order_statistics([_ordered_bits(-values.float())], [k - 1]).tolist()
        return -_from_ordered_bits(key)

    def _order_statistics(self, keys: Sequence[Int64[Tensor, "_"]], ranks: list[int]) -> Int64[Tensor, "_"]:
        """Return for each set of all processes' `keys` that of the given rank, counted from 0 upwards, or the last.

        Nothing is read on the host between the four collectives.
        """
        remaining = torch.tensor(ranks, device=keys[0].device)
        prefixes = torch.zeros_like(remaining)
        for shift in (24, 16, 8, 0):
            histograms = torch.zeros(len(keys), 256, dtype=torch.int64, device=keys[0].device)
            for histogram, prefix, values in zip(histograms, prefixes, keys, strict=True):
                histogram.index_add_(0, (values >> shift) & 255, (values >> (shift + 8) == prefix).long())
            counts = self.sum(histograms).cumsum(1)
            remaining = remaining.minimum((counts[:, -1] - 1).clamp_min(0))
            digits = torch.searchsorted(counts, remaining[:, None], right=True).clamp_max(255)
            remaining = remaining - torch.where(digits > 0, counts.gather(1, (digits - 1).clamp_min(0)), 0)[:, 0]
            prefixes = prefixes << 8 | digits[:, 0]
        return prefixes

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on some rank."""
        return flag if self.size == 1 else bool(self._gather_on_hosts(torch.tensor([flag])).any())

    def gather(self, values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "R *shape"]:
        """Return every rank's values, in rank order."""
        return self._gather(values)

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's picklable value, in rank order, on every rank.

        The first collective brings the sizes and what fits behind them, a second one the rest of larger values.
        """
        if self.size == 1:
            return [value]
        data = pickled(value)
        payload = torch.frombuffer(bytearray(len(data).to_bytes(8, "little") + data), dtype=torch.uint8)
        rows = self._gather_on_hosts(_padded(payload[:_FIRST_BYTES], _FIRST_BYTES))
        sizes = [8 + int.from_bytes(bytes(row[:8].tolist()), "little") for row in rows]
        if (rest := max(sizes) - _FIRST_BYTES) > 0:
            rows = torch.cat([rows, self._gather_on_hosts(_padded(payload[_FIRST_BYTES:], rest))], dim=1)
        rank, parts = dist.get_rank(self.group), rows.numpy()
        return [value if i == rank else pickle.loads(parts[i, 8:size].data) for i, size in enumerate(sizes)]

    def exchange_objects(self, values: Sequence[Any]) -> list[Any]:
        """Send the picklable value i to rank i. Returns what each rank sent to this one, in rank order.

        A rank receives its own values alone, so its work does not grow with the ranks. The first collective brings the
        sizes. A value that several ranks get is pickled once.
        """
        if self.size == 1:
            return list(values)
        blobs = {id(value): pickled(value) for value in values}
        sent = [len(blobs[id(value)]) for value in values]
        sizes = torch.empty(self.size, dtype=torch.int64)
        dist.all_to_all_single(sizes, torch.tensor(sent), group=self._host_group)
        came = sizes.tolist()
        payload = torch.frombuffer(bytearray().join(blobs[id(value)] for value in values), dtype=torch.uint8)
        received = torch.empty(sum(came), dtype=torch.uint8)
        dist.all_to_all_single(received, payload, came, sent, group=self._host_group)
        return [pickle.loads(part.numpy().data) for part in received.split(came)]

    def barrier(self) -> None:
        """Wait for every rank, on the host."""
        self.any(False)

    def _gather_parts(self, parts: list[Tensor]) -> list[Tensor]:
        """Return every rank's values of each of the flat `parts`: [R, N] each."""
        return list(self._gather(torch.cat(parts)).split([len(part) for part in parts], dim=1))

    def _gather(self, values: Tensor, group: ProcessGroup | None = None) -> Tensor:
        """Return every rank's values: [R, *values.shape]."""
        if self.size == 1:
            return values[None]
        flat = torch.empty((self.size * values.numel(),), dtype=values.dtype, device=values.device)
        all_gather_flat(flat, values.contiguous().reshape(-1), group=group or self.group)
        return flat.view(self.size, *values.shape)

    def _gather_on_hosts(self, values: Tensor) -> Tensor:
        return self._gather(values, self._host_group)

    @property
    def _host_group(self) -> ProcessGroup | None:
        if dist.get_backend(self._hosts) != dist.Backend.GLOO:
            raise RuntimeError("objects and flags travel on a gloo group, and this one is another's; give `hosts`")
        return self._hosts


def _padded(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - values.shape[-1]))


class _Pickler(pickle.Pickler):
    """Tensors on the host as their bytes: torch writes each as an archive of its own, 20 times slower when small."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type not in ("cpu", "meta"):
            # it would come back on the GPU of the sender's number, which on another machine is another rank's
            raise TypeError(f"an object to gather holds a tensor on {value.device}; give it as .cpu()")
        if type(value) is not Tensor or value.is_meta or value.requires_grad or value.layout != torch.strided:
            return NotImplemented
        data = value.contiguous().view(-1).view(torch.uint8) if value.numel() else value
        return _tensor, (data.numpy().tobytes(), value.dtype, tuple(value.shape))


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def pickled(value: Any) -> bytes:
    """Return an object as it travels. Raises: TypeError for a tensor that is not on the host."""
    file = io.BytesIO()
    _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def _best(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values, NaN above all, ties by smaller id: sorted by id first, a stable sort keeps that."""
    if 0 < k < values.numel():  # sort only what can win
        contenders = ~(values < values.topk(k).values[-1])  # NaN stays in: every rank must offer its k slots
        values, ids = values[contenders], ids[contenders]
    by_id = ids.argsort()
    by_value = values[by_id].argsort(descending=True, stable=True)[:k]
    order = by_id[by_value]
    return values[order], ids[order]


def _ordered_bits(values: Tensor) -> Tensor:
    """Map float32 to int64 in [0, 2^32) such that the integers sort as the floats do."""
    bits = values.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)


def _from_ordered_bits(key: int) -> float:
    bits = key - 0x80000000 if key >= 0x80000000 else 0xFFFFFFFF - key
    signed = bits - (1 << 32) if bits >= 0x80000000 else bits
    return float(torch.tensor([signed], dtype=torch.int32).view(torch.float32))
