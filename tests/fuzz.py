"""Damaged data files, thousands of them: each is read, checked, tokenised and merged into trees, or refused with a message.

    python tests/fuzz.py [--inputs 10000] [--recipes 500] [--seed 0]

Files of pairs, chats, ranked lists and of the other trainers' data, as JSON Lines, JSON, CSV and Parquet, plain and
compressed. Up to three things are wrong with each: a field is gone, of another kind or full of junk, a chat has other roles or
parts, bytes are cut off or put in. What is counted: "taken", "refused" (an error of the kinds that say what is wrong),
"crashed" (any other error) and "hung" (more than 20 seconds); of what is refused, how many messages name the file, and a row.

Recipes with up to three options of other kinds and sizes than they may have train a step of a tiny model, or are refused:
counted are how many messages name an option that was set, and "left something" where a refused run has written a model.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import csv
import dataclasses
import gzip
import io
import json
import os
import random
import re
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest
import datasets
import pyarrow
import pyarrow.parquet
import trl
import yaml
from preference_data import chat_pairs, examples, text_pairs
from trl_runs import COMMON

from preftree import DPOConfig, cli, data

SECONDS = 20
REFUSALS = (ValueError, NotImplementedError, OSError, ImportError)
# Those that can tokenise without a model; of the others' data, the reading is tried.
TOKENISES = ("dpo", "reward", "tpo")
METHODS = (*TOKENISES, "orpo", "kto")
JUNK: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        3.5,
        1e308,
        float("nan"),
        float("inf"),
        "",
        " ",
        "\n",
        "\x00",
        "\ud800",
        "{{ 1 }}",
        "x" * 5000,
    ),
    *([], [[]], [None], {}, {"a": 1}, [1, 2], ["the cat"], [{"role": "user"}], [{"content": "a"}], {"text": ["a"]}),
    *([{"role": "user", "content": None}], [{"role": 3, "content": "a"}], [{"role": "tool", "content": ["a"]}]),
    [{"role": "user", "content": [{"type": "text", "text": "the"}]}],
    [{"role": "assistant", "content": "the", "tool_calls": [{"function": {"name": "f"}}]}],
)


def rows_of(draw: random.Random) -> tuple[str, list[dict[str, Any]]]:
    """A method, and sound data for it."""
    method = draw.choice(METHODS)
    seed = draw.randrange(1000)
    pairs = (text_pairs if draw.random() < 0.5 else chat_pairs)(draw.randint(1, 6), seed)
    if method in ("dpo", "reward") and draw.random() < 0.3:
        count = draw.randint(2, 4)
        rows = [
            {
                "prompt": pair["prompt"],
                "completions": [pair[draw.choice(("chosen", "rejected"))] for _ in range(count)],
                draw.choice(("scores", "ranks")): draw.sample(range(9), count),
            }
            for pair in pairs
        ]
        return method, rows
    return method, [dict(row) for row in examples(method.upper(), pairs)]


def nest(depth: int) -> Any:
    value: Any = "deep"
    for _ in range(depth):
        value = [value]
    return value


def damage(draw: random.Random, rows: list[dict[str, Any]]) -> None:
    """Something wrong with a row."""
    row = draw.choice(rows)
    if not row:
        return
    name = draw.choice(list(row))
    junk = copy.deepcopy(draw.choice((*JUNK, nest(draw.choice((2, 200))))))
    kind = draw.randrange(8)
    if kind == 0:
        del row[name]
    elif kind == 1:
        row[draw.choice(("Prompt", "chosen ", "text", "messages", "conversations", "images", "tools", "label", ""))] = (
            row.pop(name)
        )
    elif kind == 2:
        row[
            draw.choice(("extra", "margin", "pair_weights", "scores", "ranks", "image", "images", "tools", "label"))
        ] = junk
    elif kind == 3 and isinstance(row[name], list) and row[name]:
        row[name][draw.randrange(len(row[name]))] = junk
    elif kind == 4 and isinstance(row[name], list) and row[name] and isinstance(row[name][0], dict):
        message = draw.choice(row[name])
        if isinstance(message, dict):
            message[draw.choice(("role", "content", "name", "from"))] = junk
    elif kind == 5 and isinstance(row[name], list):
        row[name] = draw.choice((row[name] * 2, row[name][:-1], [*row[name], junk]))
    elif kind == 6:
        rows.append(draw.choice((junk, {}, dict(row))))  # type: ignore[arg-type]
    else:
        row[name] = junk


def garble(draw: random.Random, content: bytes) -> bytes:
    """Something wrong with a file's bytes."""
    place = draw.randrange(len(content) + 1)
    junk = draw.choice((b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", b"}", b"\n\n", b'"', b",", b"\xf0\x9f", b"[" * 3000))
    return draw.choice(
        (content[:place], content[:place] + junk + content[place:], junk + content, b"", b"\n" * 3, content[::-1])
    )


def write(draw: random.Random, rows: list[Any], folder: Path) -> Path:
    """The rows as a file of some kind; damaged once more, now and then."""
    suffix = draw.choice((".jsonl", ".jsonl", ".jsonl", ".json", ".csv", ".parquet"))
    content = b""
    if suffix == ".parquet":
        try:
            sink = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row for row in rows if isinstance(row, dict)]), sink)
            content = sink.getvalue()
        except Exception:  # what Parquet does not take
            suffix = ".jsonl"
    if suffix == ".csv":
        text = io.StringIO()
        names = list({name: None for row in rows if isinstance(row, dict) for name in row})
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        for row in rows:
            if isinstance(row, dict):
                writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
        content = text.getvalue().encode("utf-8", "surrogatepass")
    elif suffix == ".json":
        content = json.dumps(rows).encode()
    elif suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if draw.random() < 0.3:
        content = garble(draw, content)
    if suffix != ".parquet" and draw.random() < 0.1:
        content, suffix = gzip.compress(content), suffix + ".gz"
        if draw.random() < 0.3:
            content = garble(draw, content)
    path = folder / f"train{suffix}"
    path.write_bytes(content)
    return path


class Reader:
    """Reads files as the command line does, up to the trees."""

    def __init__(self) -> None:
        self.tokenizer = conftest.word_tokenizer()
        self.methods = {name: cli.METHODS[name] for name in METHODS}
        common = {"output_dir": "unused", "report_to": "none", "use_cpu": True, "bf16": False}
        self.args = {name: method.config(**common) for name, method in self.methods.items()}

    def read(self, path: Path, method: str) -> int:
        """How many examples there are."""
        trainer, args = self.methods[method].trainer, self.args[method]
        found = data.load_pairs(path, True, trainer.text_fields, getattr(args, "ties", "error"))
        if method not in TOKENISES:
            return len(found)
        dataset = trainer.tokenize(found, self.tokenizer, args, len(self.tokenizer))
        layout = trainer.layout(args)
        return len([layout.group(example).tree() for example in dataset])


class HungError(Exception):
    """More than `SECONDS`."""


# Options that reach beyond a run: the network, other processes, the whole interpreter, minutes of compilation.
BEYOND = re.compile(
    r"hub|push|deepspeed|fsdp|xla|tpu|ddp|local_rank|parallel|seed|determinism|compile|memory_budget|report_to|jit_checkpoint|debug|use_cpu|"
    r"config|dataset_name|model_name|output_dir|logging_dir|max_steps|liger|torchdynamo|tf32|remote_code|datasets|"
    r"log_level|disable_tqdm|streaming|nccl|mp_parameters|trackio|project|use_cache|resume|bits|bnb|load_in"
)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        3.5,
        -0.25,
        float("nan"),
        float("inf"),
        "",
        " ",
        "x",
        "-1",
        "0",
        "1e-3",
        "no",
        "steps",
    ),
    *([], ["x"], [1, 2], [None], {}, {"x": 1}, {"x": {"y": []}}, "2020-01-01", "a/b", "\u2603" * 40),
)


def recipe_of(draw: random.Random, names: list[str]) -> dict[str, Any]:
    return {name: draw.choice(VALUES) for name in draw.sample(names, draw.randint(1, 3))}


def run_recipes(count: int, seed: int) -> collections.Counter[str]:
    """Counts of what came of recipes."""
    datasets.disable_progress_bars()
    counts, said = collections.Counter[str](), set()
    kinds = (DPOConfig, trl.ModelConfig, cli.TemplateArguments)
    names = sorted({field.name for kind in kinds for field in dataclasses.fields(kind) if field.init})
    names = [name for name in names if not BEYOND.search(name)]
    with tempfile.TemporaryDirectory() as place:
        model = conftest.make_tiny_model(Path(place) / "model", conftest.word_tokenizer())
        data_file = Path(place) / "pairs.jsonl"
        data_file.write_text("".join(json.dumps(row) + "\n" for row in text_pairs(4)))
        for number in range(count):
            draw = random.Random(f"{seed} {number}")
            options, out = recipe_of(draw, names), Path(place) / f"out{number}"
            recipe = Path(place) / "recipe.yaml"
            recipe.write_text(yaml.safe_dump(COMMON | {"per_device_train_batch_size": 2} | options))
            fixed = {"model_name_or_path": model, "dataset_name": data_file, "output_dir": out, "max_steps": 1}
            command = ["--config", str(recipe)]
            for name, value in fixed.items():
                command += [f"--{name}", str(value)]
            outcome, message = attempt(lambda command=command: cli.run("dpo", command), str(options))
            counts[outcome] += 1
            if outcome == "refused":
                counts["names an option"] += any(name in message for name in options)
                counts["left something"] += any(out.glob("*.safetensors"))
            elif outcome != "taken" and (last := message.strip().splitlines()[-1][:150]) not in said:
                said.add(last)
                print(f"{outcome}, recipe {number} ({options}): {message[-1500:]}", flush=True)
    return counts


def attempt(run: Callable[[], Any], what: str) -> tuple[str, str]:
    """What came of a file or a recipe, and what was said."""

    def too_long(*_: object) -> None:
        raise HungError

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()) as said:
            warnings.simplefilter("ignore")
            run()
        return "taken", ""
    except HungError:
        return "hung", what
    except SystemExit as error:  # argparse's, with its message on standard error
        return ("refused", said.getvalue()) if error.code == 2 else ("crashed", f"exit status {error.code}")
    except REFUSALS as error:
        return ("refused", str(error)) if str(error).strip() else ("crashed", f"no message: {type(error).__name__}")
    except Exception:
        return "crashed", traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(inputs: int, seed: int, keep: Path | None = None) -> collections.Counter[str]:
    """Counts of all outcomes; files that crash or hang are kept."""
    datasets.disable_progress_bars()
    reader, counts = Reader(), collections.Counter[str]()
    said = set()
    with tempfile.TemporaryDirectory() as place:
        for number in range(inputs):
            draw = random.Random(f"{seed} {number}")
            method, rows = rows_of(draw)
            for _ in range(draw.randint(0, 3)):
                damage(draw, rows := [row for row in rows if isinstance(row, dict)] or [{}])
            path = write(draw, rows, Path(place))
            outcome, message = attempt(lambda path=path, method=method: reader.read(path, method), method)
            counts[outcome] += 1
            if outcome == "refused":
                counts["names the file"] += str(path) in message
                counts["names a row"] += bool(re.search(r"\brow \d+|\bline \d+", message))
            elif outcome != "taken":
                last = message.strip().splitlines()[-1][:150]
                if last not in said:
                    said.add(last)
                    print(f"{outcome}, input {number} ({method}, {path.name}): {message[-1500:]}", flush=True)
                if keep is not None:
                    path.rename(keep / f"{number}-{method}-{path.name}")
            path.unlink(missing_ok=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--recipes", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for files that crash or hang")
    options = parser.parse_args()
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    for what, count, run_all in (
        ("inputs", options.inputs, lambda: run(options.inputs, options.seed, options.keep)),
        ("recipes", options.recipes, lambda: run_recipes(options.recipes, options.seed)),
    ):
        if count:
            counts = run_all()
            print(f"{count} {what}: " + ", ".join(f"{number} {name}" for name, number in counts.most_common()))


if __name__ == "__main__":
    main()
