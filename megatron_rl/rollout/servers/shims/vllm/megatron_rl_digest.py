"""A number for a tensor's bits, the same in the trainer and in an engine's workers, on a CPU and on a GPU.

It needs torch alone.
"""

import functools

import torch

_WORDS = 1 << 16  # of a row: what a CPU's cache holds
# rows at a time: on a GPU few launches count
_CPU_ROWS, _GPU_ROWS = 1, 64


def digest(tensor: torch.Tensor) -> int:
    """Return 63 bits that two tensors of other bytes share with a chance of about 2^-31: each row of 32-bit words is
    multiplied by fixed random odd numbers and summed."""
    data = tensor.detach().reshape(-1).view(torch.uint8)
    if data.numel() % 4 or data.storage_offset() % 4:
        data = torch.cat([data, data.new_zeros(-data.numel() % 4)])
    words, factors = data.view(torch.int32), _factors(data.device)
    whole = words.numel() // _WORDS * _WORDS
    rows, rest = words[:whole].view(-1, _WORDS), words[whole:]
    parts = rows.split(_CPU_ROWS if data.device.type == "cpu" else _GPU_ROWS) if whole else ()
    sums = [(part * factors).sum(1) for part in parts] + [(rest * factors[: rest.numel()]).sum(0, keepdim=True)]
    total = 0
    for value in torch.cat(sums).tolist():
        total = (total * 0x1E3779B97F4A7C15 + value) % (1 << 63)
    return total


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(1)
    return (torch.randint(-(1 << 31), 1 << 31, (_WORDS,), generator=numbers) | 1).to(torch.int32).to(device)
