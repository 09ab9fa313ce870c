"""Checkpoints that are torn, damaged or cannot be written; and runs that are killed and go on."""

import json
import shutil
import warnings

import pytest
import torch
from kill_and_resume import Moment, ledger_of, run_killed, run_whole
from preference_data import dataset, text_pairs
from trl_runs import construct

from preftree.trainers import checkpoints

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "per_device_train_batch_size": 2}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run" / "checkpoint-4"
    checkpoints.begin(folder)
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345678")
    (folder / "inner" / "state").write_bytes(b"abc")
    checkpoints.finish(folder)
    return folder


def test_whole_ones_have_no_fault(folder, tmp_path):
    assert checkpoints.fault_of(folder) is None
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint-4"]
    foreign = tmp_path / "run" / "checkpoint-7"
    foreign.mkdir()
    assert checkpoints.last_good(folder.parent) == (foreign, [])


def flip(path):
    data = bytearray(path.read_bytes())
    data[1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: flip(folder / "weights"), "weights has changed since it was written"),
        (lambda folder: (folder / "inner" / "state").write_bytes(b"ab"), "inner/state has 2 bytes in place of 3"),
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (
            lambda folder: (folder / "preftree_files.json").write_text('{"weights": 3}'),
            "preftree_files.json is damaged",
        ),
        (lambda folder: (folder / "preftree_files.json").write_text("{"), "preftree_files.json is damaged"),
        (checkpoints.begin, "it was not written to its end"),
    ],
)
def test_damage_is_named_and_the_last_good_one_used(folder, damage, says):
    earlier = folder.with_name("checkpoint-2")
    checkpoints.begin(earlier)
    shutil.copytree(folder, earlier)
    checkpoints.finish(earlier)
    shutil.copytree(earlier, folder.with_name("checkpoint-10x"))
    damage(folder)
    assert checkpoints.fault_of(folder) == says
    with pytest.raises(ValueError, match=f"checkpoint .*checkpoint-4 is damaged: {says}"):
        checkpoints.to_resume(str(folder), folder.parent)
    with pytest.warns(UserWarning, match=f"passed over: .*checkpoint-4: {says}. Going on from .*checkpoint-2"):
        assert checkpoints.to_resume(True, folder.parent) == str(earlier)
    shutil.rmtree(earlier)
    with pytest.raises(ValueError, match=f"no good checkpoint to go on from in .*run: .*checkpoint-4: {says}"):
        checkpoints.to_resume(True, folder.parent)


def test_nothing_to_go_on_from(tmp_path):
    assert checkpoints.to_resume(None, tmp_path) is checkpoints.to_resume(False, tmp_path) is None
    for output_dir in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"no good checkpoint to go on from in .*: there is none"):
            checkpoints.to_resume(True, output_dir)


def trainer_of(model_path, output_dir, **settings):
    settings = SAVING | {"output_dir": str(output_dir)} | settings
    return construct("preftree", model_path, dataset(text_pairs(11)), **settings)


def test_going_on_is_bitwise_the_same(model_path, tmp_path):
    """From the last good checkpoint, the one after it being torn."""
    whole = trainer_of(model_path, tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "other")
    flip(tmp_path / "other" / "checkpoint-6" / "model.safetensors")
    other = trainer_of(model_path, tmp_path / "other")
    with pytest.warns(
        UserWarning, match=r"checkpoint-6: model.safetensors has changed .* Going on from .*checkpoint-4"
    ):
        other.train(resume_from_checkpoint=True)
    for one, two in zip(whole.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert [log["loss"] for log in whole.state.log_history if "loss" in log] == [
        log["loss"] for log in other.state.log_history if "loss" in log
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.to_resume(True, tmp_path / "other").endswith("checkpoint-6")


@pytest.mark.parametrize("late", [False, True])
def test_full_disk(model_path, tmp_path, monkeypatch, late):
    """Early, among what transformers writes, or late, when nothing is left to write but what the checkpoint holds."""
    trainer = trainer_of(model_path, tmp_path, save_total_limit=1)
    owner, name = (checkpoints, "finish") if late else (type(trainer), "_save_rng_state")
    save = getattr(owner, name)

    def full(*args):
        if str(args[-1]).endswith("-4"):
            raise OSError(28, "No space left on device")
        save(*args)

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(
        OSError, match=r"checkpoint-4 could not be written.* No space left .* last good one is .*checkpoint-2"
    ):
        trainer.train()
    # The one before has not been taken away for it.
    assert [path.name for path in tmp_path.iterdir() if "checkpoint" in path.name] == ["checkpoint-2"]
    monkeypatch.undo()
    trainer_of(model_path, tmp_path, save_total_limit=1).train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.iterdir() if "checkpoint" in path.name] == ["checkpoint-6"]


def test_killed_runs_end_as_others(model_path, tmp_path):
    """At three moments: early, in between, late. (`python tests/kill_and_resume.py` kills a hundred.)"""
    run_whole(model_path, tmp_path / "whole")
    for batches in (1, 10, 27):
        folder = tmp_path / f"killed-{batches}"
        assert run_killed(model_path, folder, Moment(batches, 0.01), Moment(5, 0.03)) == 2
        assert ledger_of(folder) == ledger_of(tmp_path / "whole")
        assert (folder / "end").read_text() == (tmp_path / "whole" / "end").read_text()
    steps = ledger_of(tmp_path / "whole")
    assert sorted(pair for pairs in steps.values() for pair in pairs) == sorted([*range(40)] * 2)
    assert json.loads((tmp_path / "whole" / "end").read_text())["steps"] == len(steps) == 20
