"""Preference data larger than memory: kept on the disk in pieces, in several files, as a stream; plans that hold one batch."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from preference_data import text_pairs

import preftree
from preftree import data, plan
from preftree.data import find_files, load_pairs, stream_pairs
from preftree.packing import pack
from preftree.trainers.kto import KTOTrainer


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(data, "_ROWS_IN_MEMORY", 7)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet_parts(folder, rows, count, split="train"):
    """Files as the Hub names them, of about as many rows."""
    paths = []
    for number in range(count):
        own = rows[number * len(rows) // count : (number + 1) * len(rows) // count]
        paths.append(folder / f"{split}-{number:05}-of-{count:05}.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(own), paths[-1])
    return paths


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("count", [6, 7, 8, 23])
def test_rows_on_the_disk_are_those_of_the_file(tmp_path, count):
    rows = text_pairs(count)
    dataset = load_pairs(write_jsonl(tmp_path / "pairs.jsonl", rows))
    assert dataset.to_list() == rows
    assert bool(dataset.cache_files) == (count >= 7)
    assert dataset.info.dataset_name == str(tmp_path / "pairs.jsonl")


@pytest.mark.usefixtures("small_pieces")
def test_columns_that_come_late(tmp_path):
    """A column that the first rows have not, integers before other numbers, and fields within fields."""
    rows = [dict(pair) for pair in text_pairs(23)]
    for number, row in enumerate(rows):
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        for side in ("chosen", "rejected"):
            row[side] = [{"role": "assistant", "content": row[side]}]
        row["margin"] = number if number < 9 else number + 0.5
        row["tools"] = [{"name": "look", "description": None if number < 15 else "what is there"}]
        if number > 20:
            row["images"] = []
    path = write_jsonl(tmp_path / "late.jsonl", rows)
    with pytest.MonkeyPatch.context() as whole:
        whole.setattr(data, "_ROWS_IN_MEMORY", 1000)
        expected = load_pairs(path)
    found = load_pairs(path)
    assert found.cache_files
    assert not expected.cache_files
    assert found.to_list() == expected.to_list()
    assert set(found.column_names) == set(expected.column_names)


@pytest.mark.usefixtures("small_pieces")
def test_values_that_no_column_can_hold(tmp_path):
    rows = [{**pair, "margin": 0.5 if number < 12 else "high"} for number, pair in enumerate(text_pairs(23))]
    with pytest.raises(ValueError, match=r"wrong.jsonl.*no column can hold"):
        load_pairs(write_jsonl(tmp_path / "wrong.jsonl", rows))


@pytest.mark.usefixtures("small_pieces")
def test_an_error_in_a_later_piece_names_its_row(tmp_path):
    rows = text_pairs(23)
    rows[19] = {**rows[19], "chosen": 5}
    with pytest.raises(ValueError, match=r"x.jsonl, line 20, field 'chosen'"):
        load_pairs(write_jsonl(tmp_path / "x.jsonl", rows))


@pytest.mark.parametrize("pieces", [7, 1000])
def test_files_of_a_split_follow_each_other(tmp_path, monkeypatch, pieces):
    monkeypatch.setattr(data, "_ROWS_IN_MEMORY", pieces)
    rows = text_pairs(25)
    paths = parquet_parts(tmp_path, rows, 3)
    parquet_parts(tmp_path, rows[:4], 2, "test")
    found = find_files(str(tmp_path))
    assert found["train"] == paths
    assert len(found["test"]) == 2
    dataset = load_pairs(found["train"])
    assert dataset.to_list() == rows
    assert dataset.info.dataset_name == f"{tmp_path}, train"


def test_a_file_that_is_missing(tmp_path):
    paths = parquet_parts(tmp_path, text_pairs(9), 3)
    other = write_jsonl(tmp_path / "train.jsonl", text_pairs(2))
    with pytest.raises(FileNotFoundError, match=r"do not belong together: train-00000-of-00003.parquet, .*train.jsonl"):
        find_files(str(tmp_path))
    other.unlink()
    paths[1].unlink()
    with pytest.raises(FileNotFoundError, match="of split 'train' the file number 1 of 3 is missing"):
        find_files(str(tmp_path))
    paths[0].rename(tmp_path / "train-00001-of-00004.parquet")
    with pytest.raises(FileNotFoundError, match="the files of split 'train' do not belong together"):
        find_files(str(tmp_path))


def test_a_stream_reads_what_it_is_asked_for(tmp_path):
    """And says what is wrong when it comes there; workers share the files."""
    rows = text_pairs(25)
    stream = stream_pairs(parquet_parts(tmp_path, rows, 3))
    assert list(stream) == rows
    assert stream.num_shards == 3
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(row["prompt"] + row["chosen"] for row in loader) == sorted(r["prompt"] + r["chosen"] for r in rows)
    rows[11] = {**rows[11], "rejected": ""}
    broken = stream_pairs([write_jsonl(tmp_path / "broken.jsonl", rows)])
    assert len(list(broken.take(9))) == 9
    with pytest.raises(ValueError, match=r"broken.jsonl, line 12, field 'rejected'"):
        list(broken)
    answers = [{"prompt": "the dog", "completion": " runs", "label": True}]
    kto = stream_pairs([write_jsonl(tmp_path / "kto.jsonl", answers)], text_fields=KTOTrainer.text_fields)
    assert list(kto) == answers


def test_a_plan_holds_a_batch_at_a_time():
    """The same figures from trees that are made when they are asked for."""
    generator = torch.Generator().manual_seed(0)

    def draw(most):
        return torch.randint(
            2, 50, (int(torch.randint(1, most, (), generator=generator)),), generator=generator
        ).tolist()

    pairs = [(draw(30), draw(12), draw(12)) for _ in range(23)]

    def tree(example):
        prompt = example["prompt"]
        return preftree.TokenTree.from_sequences([prompt + example[side] for side in "ab"], [len(prompt)] * 2)

    examples = [{"prompt": prompt, "a": a, "b": b} for prompt, a, b in pairs]
    made = []

    class Table:
        def __len__(self):
            return len(examples)

        def __getitem__(self, numbers):
            made.append(numbers)
            return {name: [example[name] for example in examples[numbers]] for name in ("prompt", "a", "b")}

    cost = plan.ModelCost(3.0, 5.0, 0.25)
    for row_length in (None, 96):
        lazy = plan.make_plan(plan.TreesOf(Table(), tree), 4, row_length, cost)
        whole = plan.make_plan([tree(example) for example in examples], 4, row_length, cost)
        assert lazy == whole
        assert lazy.pairs == 23
        assert list(lazy.prompts) == [len(prompt) for prompt, _, _ in pairs]
        assert list(lazy.responses) == [len(each) for _, a, b in pairs for each in (a, b)]
        rows = [
            pack([tree(example) for example in examples[n : n + 4]], lazy.row_length, lengths=32)
            for n in range(0, 23, 4)
        ]
        assert lazy.rows_per_step == sum(map(len, rows)) / 6
        tokens = sum(2 * len(prompt) + len(a) + len(b) for prompt, a, b in pairs)
        assert lazy.unshared_tokens == tokens
        lengths = [len(prompt) + len(each) for prompt, a, b in pairs for each in (a, b)]
        longest = [max(lengths[first : first + 8]) for first in range(0, 46, 8)]
        assert lazy.padded_tokens == sum(8 * each for each in longest[:-1]) + 6 * longest[-1]
        alone = sum(3 * n + n * (n + 1) / 2 / 4 for n in lengths)
        scored = 5 * sum(len(a) + len(b) for _, a, b in pairs)
        visible = sum(int((tree(example).position_ids + 1).sum()) for example in examples)
        assert lazy.speedup == pytest.approx((scored + alone) / (scored + 3 * lazy.shared_tokens + visible / 4))
    assert all(numbers.stop - numbers.start == 4 for numbers in made)
