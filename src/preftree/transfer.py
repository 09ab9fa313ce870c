"""Many small tensors to a device at once, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Where a tensor begins in the buffer that is sent, in elements: kernels are compiled for pointers that divide by 16 bytes.
_STEP = 16


def is_on(device: torch.device, wanted: torch.device | str) -> bool:
    """Whether a tensor of ``device`` is where it is wanted; "cuda" is the current GPU."""
    wanted = torch.device(wanted)
    if wanted.type == "cuda" and wanted.index is None:
        wanted = torch.device("cuda", torch.cuda.current_device())
    return device == wanted


def send(tensors: Sequence[torch.Tensor], device: torch.device | str) -> list[torch.Tensor]:
    """The tensors on ``device``; to a GPU those of the CPU in one copy for each type, out of page-locked memory.

    A tensor by itself would be copied out of ordinary memory, for which the host waits until the GPU has done all that it was
    told to do before.
    """
    if torch.device(device).type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    sent = list(tensors)
    by_type: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.device.type == "cpu":
            by_type.setdefault(tensor.dtype, []).append(index)
        else:
            sent[index] = tensor.to(device, non_blocking=True)
    for dtype, indices in by_type.items():
        starts, size = [], 0
        for index in indices:
            starts.append(size)
            size += -(-tensors[index].numel() // _STEP) * _STEP
        buffer = torch.empty(size, dtype=dtype, pin_memory=True)
        for index, start in zip(indices, starts, strict=True):
            buffer[start : start + tensors[index].numel()].copy_(tensors[index].flatten())
        there = buffer.to(device, non_blocking=True)
        for index, start in zip(indices, starts, strict=True):
            shape = tensors[index].shape
            sent[index] = there[start : start + shape.numel()].view(shape)
    return sent
