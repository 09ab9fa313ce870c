"""Rows go to a GPU in few copies that nobody waits for."""

import pytest
import torch

from preftree.transfer import is_on, send

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_is_on():
    device = torch.zeros(1, device="cuda").device
    assert is_on(device, "cuda")
    assert is_on(device, device)
    assert not is_on(device, "cpu")
    assert not is_on(torch.device("cpu"), "cuda")


def test_tensors_of_all_kinds_in_one_copy_a_type(monkeypatch):
    """Odd sizes, empty ones, views, one that is there already; the copies are made while the device is busy."""
    given = [
        torch.arange(7),
        torch.arange(12.0).view(3, 4).t(),
        torch.empty(0, 5),
        torch.arange(33).view(3, 11)[:, ::2],
        torch.tensor(3.5),
        torch.ones(17, dtype=torch.bool),
        torch.arange(4, device="cuda"),
    ]
    pinned = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: (pinned.append(k.get("pin_memory")), empty(*a, **k))[1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        sent = send(given, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pinned == [True] * 3
    for one, other in zip(given, sent, strict=True):
        assert other.is_cuda
        assert other.dtype == one.dtype
        assert other.shape == one.shape
        assert other.data_ptr() % 16 == 0
        assert torch.equal(other.cpu(), one.cpu())
