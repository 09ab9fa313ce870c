"""The state of a GPU that figures are taken in."""

from __future__ import annotations

import time

import torch


def heat(seconds: float) -> None:
    """Products without a pause: a card at rest would run what follows faster than one that has trained for minutes."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(20):
            x @ x
        torch.cuda.synchronize()
