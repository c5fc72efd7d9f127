"""A number for a tensor's bits, the same in the trainer and in an engine's workers. It needs torch alone."""

import functools

import torch


def digest(tensor: torch.Tensor) -> int:
    """Return 64 bits that two tensors of other bytes share with a chance of about 2^-31: each block of 32-bit words is
    multiplied by fixed random odd numbers and summed."""
    data = tensor.detach().reshape(-1).view(torch.uint8)
    if data.numel() % 4 or data.storage_offset() % 4:
        data = torch.cat([data, data.new_zeros(-data.numel() % 4)])
    factors, total = _factors(data.device), torch.zeros((), dtype=torch.int64, device=data.device)
    for block in data.view(torch.int32).split(factors.numel()):
        total = total * 0x1E3779B97F4A7C15 + (block * factors[: block.numel()]).sum()
    return int(total)


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    words = 1 << (16 if device.type == "cpu" else 22)  # on a CPU what its cache holds, on a GPU few launches
    numbers = torch.Generator().manual_seed(1)
    return (torch.randint(-(1 << 31), 1 << 31, (words,), generator=numbers) | 1).to(torch.int32).to(device)
