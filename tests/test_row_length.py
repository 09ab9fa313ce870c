"""`row_length="auto"`: the search against brute force, the optimizer's share against what it keeps, training unchanged."""

import pytest
import torch
from preference_data import dataset, text_pairs
from trl_runs import construct, differences, train

import preftree
from preftree.packing import static_length
from preftree.trainers import row_length
from preftree.trainers.collator import TreeCollator
from preftree.trainers.row_length import FitRows, fitting_length, pending_optimizer_bytes

LENGTHS = sorted({static_length(tokens) for tokens in range(128, 65537, 128)})


@pytest.mark.parametrize("fixed", [0, 10_000_000])
@pytest.mark.parametrize("free", [1_100_000, 3_000_000, 47_000_000, 10**9, 10**12])
@pytest.mark.parametrize("start", [300, 2048, 9000])
def test_the_longest_that_fits_and_none_tried_that_does_not(fixed, free, start):
    free += fixed
    tried = []

    def peak_of(length):
        tried.append(length)
        return fixed + 8000 * length

    expected = max(length for length in LENGTHS if fixed + 8000 * length <= free)
    assert fitting_length(peak_of, free, start) == expected
    # Whatever the first length was: all that did not fit came before one that did.
    fits = [fixed + 8000 * length <= free for length in tried]
    assert fits == sorted(fits)
    assert len(tried) <= 12


def test_memory_that_grows_faster_than_a_line():
    assert fitting_length(lambda length: length**2, 5000**2) == max(length for length in LENGTHS if length <= 5000)


def test_nothing_fits():
    with pytest.raises(ValueError, match=r"a row of 128 tokens takes .* GB, 0.00 GB are free. Switch"):
        fitting_length(lambda length: 10**7 + length, 10**6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adafactor, {}),
    ],
)
def test_pending_bytes_are_those_it_then_keeps(kind, options):
    model = torch.nn.Sequential(torch.nn.Linear(256, 300), torch.nn.Linear(300, 7).bfloat16())
    optimizer = kind(model.parameters(), **options)
    pending = pending_optimizer_bytes(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    assert pending == pytest.approx(kept, rel=0.02, abs=6000)
    assert pending_optimizer_bytes(optimizer) == 0


def test_an_optimizer_that_cannot_be_tried_is_taken_to_keep_two_numbers():
    class Particular(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("not on this tensor")

    parameter = torch.nn.Parameter(torch.zeros(1000))
    assert pending_optimizer_bytes(Particular([parameter], lr=0.1)) == 8000
    assert pending_optimizer_bytes(None) == 0


@pytest.mark.parametrize("value", ["auto", "96", 96, None])
def test_values(value, tmp_path):
    config = preftree.DPOConfig(str(tmp_path), row_length=value, use_cpu=True)
    assert config.given_row_length == {"auto": None, None: None}.get(value, 96)


@pytest.mark.parametrize("value", ["long", "0", 0])
def test_other_values_are_refused(value, tmp_path):
    with pytest.raises(ValueError, match="row_length must be"):
        preftree.DPOConfig(str(tmp_path), row_length=value, use_cpu=True)


def test_rows_grow_for_a_longer_tree():
    def example(prompt):
        return {"prompt_ids": [5] * prompt, "chosen_ids": [6, 7], "rejected_ids": [8, 9]}

    collator = TreeCollator(0, row_length=256, grows=True, static=True)
    assert [len(row) for row in collator([example(20), example(30)])["rows"]] == [128]
    batch = collator([example(20), example(600)])
    assert max(len(row) for row in batch["rows"]) == static_length(604, 32)
    with pytest.raises(ValueError, match="does not fit into row_length=256"):
        TreeCollator(0, row_length=256)([example(600)])


def test_found_when_training_begins(model_path, monkeypatch):
    """On a GPU that is made up: a token of a row takes a megabyte, eight gigabytes are free; nothing else changes."""
    data = dataset(text_pairs(12))
    lengths = []

    def peak_bytes(trainer, length):
        lengths.append(length)
        assert trainer.model.training
        before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
        real(trainer, length // 16)
        assert all(torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
        return length << 20

    real = row_length.peak_bytes
    monkeypatch.setattr(row_length, "peak_bytes", peak_bytes)
    monkeypatch.setattr(row_length, "free_bytes", lambda device: 8 << 30)
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)

    plain = train("preftree", model_path, data, own={"row_length": 7168})
    fitted = construct("preftree", model_path, data, own={"row_length": "auto"})
    assert fitted._trees.row_length is None  # there is no GPU
    fitted.add_callback(FitRows(fitted))
    fitted.train()
    assert fitted._trees.row_length == max(lengths) == 7168
    assert max(differences(plain, fitted)) <= 1e-6
