"""Global statistics over the ranks that hold different tokens: packed sums, exact quantiles, and the distributed top-k.

Every function gives the same bits on every rank of the group, because all ranks reduce the same gathered data.
"""

from __future__ import annotations

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
_FIRST_VALUES = 1 << 11  # of those, in the collective that tells how many there are
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
        rising id. Each rank offers its local best k; one all-gather decides.
        """
        (best,), _ = self.top_ks_and_sum([(values, ids, k)], values.new_zeros(0, dtype=torch.float64))
        return best

    def top_ks_and_sum(
        self,
        sets: Sequence[tuple[Float[Tensor, "_"], Int64[Tensor, "_"], int]],
        sums: Float64[Tensor, "*shape"],
    ) -> tuple[list[tuple[Float64[Tensor, "_"], Int64[Tensor, "_"]]], Float64[Tensor, "*shape"]]:
        """Return `top_k` of each (values, ids, k), and the `sum` of `sums`, in one collective."""
        local = [_best(values.double(), ids, min(k, values.numel())) for values, ids, k in sets]
        if self.size == 1:
            return local, sums.clone()
        # the quota bounds what a rank can contribute; -inf with id -1 marks an empty slot
        slots = [
            part
            for (values, ids), (*_, k) in zip(local, sets, strict=True)
            for part in (_slots(values, k, -torch.inf).view(torch.int64), _slots(ids, k, -1))
        ]
        # bits travel as integers: an id may not fit a float
        parts = [*slots, sums.contiguous().view(-1).view(torch.int64)]
        gathered = self._gather(torch.cat(parts)).split([len(part) for part in parts], dim=1)
        best = []
        for values, ids, (*_, k) in zip(gathered[:-1:2], gathered[1:-1:2], sets, strict=True):
            values, ids, real = _doubles(values).flatten(), ids.flatten(), ids.flatten() >= 0
            best.append(_best(values[real], ids[real], min(k, int(real.sum()))))
        return best, _doubles(gathered[-1]).sum(0).view(sums.shape)

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
            return self._order_statistics(keys, ranks)
        rows = rows[:, 1:] if most <= _FIRST_VALUES else self._gather(_padded(keys, most))
        ordered = torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)]).sort().values
        return [_from_ordered_bits(key) for key in ordered[ranks].tolist()]

    def kth_largest(self, values: Float[Tensor, "N"], k: int) -> float:
        """Return the k-th largest of all ranks' `values`, as float32, exact; 1 <= k <= their number."""
        keys = _ordered_bits(-values.float())
        return -self._order_statistics(keys, [k - 1])[0]

    def _order_statistics(self, keys: Tensor, ranks: list[int]) -> list[float]:
        """Return the elements of the given ranks, counted from 0 upwards, of all processes' `keys`."""
        remaining, prefixes = list(ranks), [0] * len(ranks)
        for shift in (24, 16, 8, 0):
            histograms = []
            for prefix in prefixes:
                inside = keys if shift == 24 else keys[(keys >> (shift + 8)) == prefix]
                histograms.append(torch.bincount((inside >> shift) & 255, minlength=256))
            for i, counts in enumerate(self.sum(torch.stack(histograms)).cumsum(1)):
                digit = int(torch.searchsorted(counts, remaining[i], right=True))
                remaining[i] -= int(counts[digit - 1]) if digit else 0
                prefixes[i] = (prefixes[i] << 8) | digit
        return [_from_ordered_bits(key) for key in prefixes]

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on some rank."""
        return flag if self.size == 1 else bool(self._gather_on_hosts(torch.tensor([flag])).any())

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's picklable value, in rank order, on every rank.

        The first collective brings the sizes and what fits behind them, a second one the rest of larger values.
        """
        if self.size == 1:
            return [value]
        data = _dumps(value)
        payload = torch.frombuffer(bytearray(len(data).to_bytes(8, "little") + data), dtype=torch.uint8)
        rows = self._gather_on_hosts(_padded(payload[:_FIRST_BYTES], _FIRST_BYTES))
        sizes = [8 + int.from_bytes(bytes(row[:8].tolist()), "little") for row in rows]
        if (rest := max(sizes) - _FIRST_BYTES) > 0:
            rows = torch.cat([rows, self._gather_on_hosts(_padded(payload[_FIRST_BYTES:], rest))], dim=1)
        rank, parts = dist.get_rank(self.group), rows.numpy()
        return [value if i == rank else pickle.loads(parts[i, 8:size].data) for i, size in enumerate(sizes)]

    def barrier(self) -> None:
        """Wait for every rank, on the host."""
        self.any(False)

    def _gather(self, values: Tensor, group: ProcessGroup | None = None) -> Tensor:
        """Return every rank's values: [R, *values.shape]."""
        if self.size == 1:
            return values[None]
        flat = torch.empty((self.size * values.numel(),), dtype=values.dtype, device=values.device)
        all_gather_flat(flat, values.contiguous().reshape(-1), group=group or self.group)
        return flat.view(self.size, *values.shape)

    def _gather_on_hosts(self, values: Tensor) -> Tensor:
        if dist.get_backend(self._hosts) != dist.Backend.GLOO:
            raise RuntimeError("objects and flags travel on a gloo group, and this one is another's; give `hosts`")
        return self._gather(values, self._hosts)


def _slots(values: Tensor, count: int, empty: float) -> Tensor:
    slots = values.new_full((count,), empty)
    slots[: len(values)] = values
    return slots


def _doubles(bits: Tensor) -> Tensor:
    return bits.contiguous().view(torch.float64)


def _padded(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - values.numel()))


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


def _dumps(value: Any) -> bytes:
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
