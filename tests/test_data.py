"""Preference files: what loads, and that every mistake is named with file, row and field."""

import csv
import gzip
import json

import fuzz
import pyarrow
import pyarrow.parquet
import pytest
from preference_data import chat_pairs, text_pairs

from preftree import KTOTrainer, TPOTrainer
from preftree.data import find_files, is_local, load_pairs


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
def test_kinds_of_file(tmp_path, kind):
    rows = text_pairs(5)
    path = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    dataset = load_pairs(path)
    assert dataset.to_list() == rows
    assert dataset.info.dataset_name == str(path)


def test_fields_that_only_later_rows_have(tmp_path):
    rows = text_pairs(3)
    rows[1]["margin"] = 0.5
    assert load_pairs(write_jsonl(tmp_path / "margins.jsonl", rows))["margin"] == [None, 0.5, None]


def test_rows_of_other_trainers(tmp_path):
    ranked = [{"prompt": "a", "completions": ["b", "c"], "scores": [1.0, 2.0], "pair_weights": [[1, 0, 0.5]]}] * 2
    assert load_pairs(write_jsonl(tmp_path / "ranked.jsonl", ranked)).to_list() == ranked
    answers = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "c", "label": False}]
    loaded = load_pairs(write_jsonl(tmp_path / "answers.jsonl", answers), text_fields=KTOTrainer.text_fields)
    assert loaded.to_list() == answers
    gold = [pair | {"reference": "x"} for pair in text_pairs(2)]
    del gold[1]["reference"]
    path = write_jsonl(tmp_path / "gold.jsonl", gold)
    with pytest.raises(ValueError, match="line 2, field 'reference' is missing"):
        load_pairs(path, text_fields=TPOTrainer.text_fields)


def test_chats_and_sharegpt(tmp_path):
    chats = chat_pairs(4)
    assert load_pairs(write_jsonl(tmp_path / "chat.jsonl", chats)).to_list() == chats
    names = {"user": "human", "assistant": "gpt"}

    def foreign(messages):
        return [{"from": names[m["role"]], "value": m["content"]} for m in messages]

    shared = [
        {
            "conversations": foreign(pair["prompt"]),
            "chosen": foreign(pair["chosen"])[0],
            "rejected": foreign(pair["rejected"])[0],
        }
        for pair in chats
    ]
    assert load_pairs(write_jsonl(tmp_path / "shared.jsonl", shared)).to_list() == chats


def bad(**changes):
    row = {"prompt": "a b", "chosen": "c", "rejected": "d"} | changes
    return [{"prompt": "p", "chosen": "c", "rejected": "r"}, {k: v for k, v in row.items() if v is not ...}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (bad(chosen=...), r"line 2, field 'chosen' is missing"),
        (bad(rejected=5), r"line 2, field 'rejected' is of type int"),
        (bad(prompt=""), r"line 2, field 'prompt': empty"),
        (bad(chosen="  "), r"line 2, field 'chosen': empty"),
        (bad(prompt=["x"]), r"line 2, field 'prompt' is of type list"),
        (bad(prompt=[{"role": "user", "content": "x"}]), r"line 2: all fields must be of one kind"),
        ([{"prompt": "p", "yes": "c", "no": "r"}], r"line 1: there is no column 'chosen' \(columns: prompt, yes, no\)"),
        (["text"], r"line 1: a row must be an object"),
        ([], r"there is no row in it"),
        (bad(tools=3.5), r"line 2, field 'tools': must be a list of objects, not float '3.5'"),
        (bad(tools=["search"]), r"line 2, field 'tools': must be a list of objects, not list"),
        (bad(tools="["), r"line 2, field 'tools': not valid JSON"),
        (
            bad(chat_template_kwargs="x"),
            r"line 2, field 'chat_template_kwargs': must be an object in every row, not str",
        ),
        (
            [row | {"label": value} for row, value in zip(text_pairs(4), (None, "yes", "no", True), strict=True)],
            r"bad.jsonl, row 3, field 'label': no column can hold such values",
        ),
        (bad(tools=[{"a": [[[[[[[[[[[[[1]]]]]]]]]]]]]}]), r"line 2, field 'tools': more than 12 lists in each other"),
        (
            [row | {"tools": [{"name": value}]} for row, value in zip(text_pairs(2), ("search", 3), strict=True)],
            r"bad.jsonl, field 'tools': no column can hold such values",
        ),
        (
            bad(chat_template_kwargs={"a": 1}),
            r"line 1, field 'chat_template_kwargs' is missing, and other rows have it",
        ),
        (
            [{"chosen": "c", "rejected": "r", "conversations": [{"from": "robot", "value": "x"}]}],
            r"line 1, field 'prompt', message 0: 'from' must be one of",
        ),
    ],
)
def test_bad_rows(tmp_path, rows, message):
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=message) as error:
        load_pairs(path)
    assert str(path) in str(error.value)


SOUND = '"prompt": "p", "rejected": "r"'


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f'{{{SOUND}, "chosen": "c", "chosen": "d"}}', "field 'chosen' is there twice"),
        (f'{{{SOUND}, "chosen": {"9" * 5000}}}', r"Exceeds the limit \(4300 digits\)"),
        (f'{{{SOUND}, "chosen": "a \\ud83d b"}}', r"field 'chosen': \\ud83d is half of a character"),
        (f'{{{SOUND}, "chosen": "c", "tools": [{{"\\uDE00": 1}}]}}', r"field 'tools': \\ude00 is half of a character"),
    ],
    ids=["twice", "digits", "half", "half-name"],
)
def test_json_that_python_reads_and_others_do_not(tmp_path, row, message):
    good = json.dumps(text_pairs(1)[0])
    (tmp_path / "x.jsonl").write_text(f"{good}\n{row}\n")
    with pytest.raises(ValueError, match=f"x.jsonl, line 2(, |: ){message}"):
        load_pairs(tmp_path / "x.jsonl")
    (tmp_path / "x.json").write_text(f"[{good}, {row}]")
    with pytest.raises(ValueError, match=f"x.json(, row 1)?(, |: ){message}"):
        load_pairs(tmp_path / "x.json")


def test_characters_written_in_two_halves(tmp_path):
    (tmp_path / "x.jsonl").write_text(f'{{{SOUND}, "chosen": "a \\ud83d\\ude00 b"}}\n')
    assert load_pairs(tmp_path / "x.jsonl")["chosen"] == ["a \U0001f600 b"]


def test_columns_that_are_there_twice(tmp_path):
    names, values = ["prompt", "chosen", "rejected", "chosen"], ["the dog", "a", "b", "c"]
    (tmp_path / "x.csv").write_text(f"{','.join(names)}\n{','.join(values)}\n")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays([pyarrow.array([value]) for value in values], names), tmp_path / "x.parquet"
    )
    for name in ("x.csv", "x.parquet"):
        with pytest.raises(ValueError, match=f"{name}: column 'chosen' is there twice"):
            load_pairs(tmp_path / name)
    # (Of what nobody reads there may be several.)
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected,,\nthe dog,a,b,1,2\n")
    assert len(load_pairs(tmp_path / "x.csv")) == 1


def test_chats_without_a_template(tmp_path):
    path = write_jsonl(tmp_path / "chat.jsonl", chat_pairs(2))
    with pytest.raises(ValueError, match="no chat template"):
        load_pairs(path, chat_template=False)


def test_mixed_kinds_name_the_row(tmp_path):
    rows = [text_pairs(1)[0], chat_pairs(1)[0]]
    with pytest.raises(ValueError, match=r"line 2, field 'prompt' is a list, in the rows before it a string"):
        load_pairs(write_jsonl(tmp_path / "mixed.jsonl", rows))


def test_broken_files(tmp_path):
    good = json.dumps(text_pairs(1)[0]).encode()
    path = tmp_path / "x.jsonl"
    path.write_bytes(good + b"\n" + good[:20])
    with pytest.raises(ValueError, match=r"x.jsonl, line 2: not valid JSON.*torn"):
        load_pairs(path)
    path.write_bytes(good + b"\n" + good.replace(b"prompt", b"pr\xffmpt") + b"\n")
    with pytest.raises(ValueError, match=r"x.jsonl, line 2: invalid UTF-8 at byte 4 \(0xff\)"):
        load_pairs(path)
    for name in ("x.jsonl", "x.json"):
        (tmp_path / name).write_bytes(b"[" * 100_000)
        with pytest.raises(ValueError, match=rf"{name}.*: lists or objects in each other, too many to read"):
            load_pairs(tmp_path / name)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x.json, line 1: not valid JSON"):
        load_pairs(tmp_path / "x.json")
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected\na,b,c\na,b\n")
    with pytest.raises(ValueError, match=r"x.csv, row 1 \(line 3\): 3 columns in the header"):
        load_pairs(tmp_path / "x.csv")
    (tmp_path / "x.parquet").write_bytes(b"PAR1nonsense")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        load_pairs(tmp_path / "x.parquet")
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(good * 50)[:30])
    with pytest.raises(ValueError, match="not a complete gzip file"):
        load_pairs(tmp_path / "x.jsonl.gz")
    damaged = bytearray(gzip.compress(good * 50))
    damaged[12:16] = b"\xff\xff\xff\xff"
    (tmp_path / "x.jsonl.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match="not a complete gzip file"):
        load_pairs(tmp_path / "x.jsonl.gz")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match="unknown kind of file"):
        load_pairs(tmp_path / "x.txt")
    with pytest.raises(FileNotFoundError, match=r"none.jsonl: no such file"):
        load_pairs(tmp_path / "none.jsonl")


def test_damaged_files_are_refused_with_a_message():
    """(`python tests/fuzz.py` tries ten thousand.)"""
    counts = fuzz.run(200, seed=1)
    assert counts["crashed"] == counts["hung"] == 0
    assert counts["taken"] > 10
    assert counts["refused"] > 100


def test_folders_and_names(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", text_pairs(2))
    write_jsonl(tmp_path / "test.jsonl", text_pairs(1))
    assert set(find_files(str(tmp_path))) == {"train", "test"}
    assert is_local(str(tmp_path))
    assert is_local("missing.jsonl")
    assert not is_local("trl-lib/ultrafeedback_binarized")
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl: no such file"):
        find_files("missing.jsonl")
