"""Cached reference log-probabilities: found again by content alone, and never taken for something else's."""

import pytest
import torch
from families import exact_model
from preference_data import dataset, text_pairs
from trl_runs import differences, train

from preftree.trainers import reference

EXAMPLES = [
    {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]},
    {"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8]},
]
COLUMNS = {"ref_chosen_logps": torch.tensor([1.0, 2.0]), "ref_rejected_logps": torch.tensor([3.0, 4.0])}


def test_key_is_the_content():
    key = reference.content_key("weights", EXAMPLES, {"ld_alpha": None})
    assert key == reference.content_key("weights", [dict(example) for example in EXAMPLES], {"ld_alpha": None})
    moved = [{"prompt_ids": [5, 6, 7], "chosen_ids": [], "rejected_ids": [8, 9]}, EXAMPLES[1]]
    changed = [{**EXAMPLES[0], "rejected_ids": [8, 10]}, EXAMPLES[1]]
    others = [
        reference.content_key("weights", EXAMPLES[::-1], {"ld_alpha": None}),
        reference.content_key("weights", moved, {"ld_alpha": None}),
        reference.content_key("weights", changed, {"ld_alpha": None}),
        reference.content_key("other weights", EXAMPLES, {"ld_alpha": None}),
        reference.content_key("weights", EXAMPLES, {"ld_alpha": 0.5}),
    ]
    assert len({key, *others}) == 1 + len(others)


def test_configuration_counts_and_its_name_does_not():
    one, other = exact_model("mistral-window").config, exact_model("mistral-window").config
    other.name_or_path = "elsewhere"
    assert reference.arithmetic_of(one) == reference.arithmetic_of(other)
    other.sliding_window = 9
    assert reference.arithmetic_of(one) != reference.arithmetic_of(other)


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "new" / "cache.safetensors"
    assert reference.load(path, "key", 2) is None
    reference.save(path, "key", COLUMNS)
    loaded = reference.load(path, "key", 2)
    assert all(torch.equal(loaded[name], column) for name, column in COLUMNS.items())
    assert reference.load(path, "another key", 2) is None
    assert reference.load(path, "key", 3) is None
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_changed_byte_anywhere_is_a_miss(tmp_path):
    path = tmp_path / "cache.safetensors"
    reference.save(path, "key", COLUMNS)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        loaded = reference.load(path, "key", 2)
        # (Bytes that hold nothing, like the padding of the header, may change.)
        assert loaded is None or all(torch.equal(loaded[name], column) for name, column in COLUMNS.items()), at
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert reference.load(path, "key", 2) is None, length


def test_nothing_is_left_when_saving_fails(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("preftree.trainers.reference.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        reference.save(tmp_path / "cache.safetensors", "key", COLUMNS)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def passes(monkeypatch):
    """How often the trainer ran the reference over a data set."""
    from preftree import DPOTrainer

    counted = []
    stock = DPOTrainer._run_reference

    def counting(self, examples, name, batch_size):
        counted.append(name)
        return stock(self, examples, name, batch_size)

    monkeypatch.setattr(DPOTrainer, "_run_reference", counting)
    return counted


def test_a_second_run_reuses_them_unless_something_differs(model_path, passes):
    def run(pairs=15, **settings):
        passes.clear()
        trainer = train("preftree", model_path, dataset(text_pairs(pairs)), precompute_ref_log_probs=True, **settings)
        return trainer, list(passes)

    first, computed = run()
    assert computed == ["train"]
    again, computed = run(loss_type="ipo", beta=0.01, learning_rate=1e-4, per_device_train_batch_size=3)
    assert computed == []
    assert again.train_dataset["ref_chosen_logps"] == first.train_dataset["ref_chosen_logps"]
    for settings in ({"ld_alpha": 0.5}, {"max_length": 12}, {"pairs": 14}, {"bf16": True}):
        assert run(**settings)[1] == ["train"], settings


@pytest.mark.parametrize("ld_alpha", [0.5, 0.0])
def test_another_ld_alpha_after_a_run_without_is_still_trls(model_path, passes, ld_alpha):
    settings = {"precompute_ref_log_probs": True}
    train("preftree", model_path, dataset(text_pairs(15)), **settings)
    ours = train("preftree", model_path, dataset(text_pairs(15)), ld_alpha=ld_alpha, **settings)
    theirs = train("trl", model_path, dataset(text_pairs(15)), ld_alpha=ld_alpha)
    assert max(differences(theirs, ours)) <= 1e-5
