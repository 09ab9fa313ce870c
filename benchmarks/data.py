"""Pairs by the million: how much memory `preftree plan` and training take, and how fast batches are made.

    python benchmarks/data.py --pairs 1000000 [--parts plan batches train] [--workers 0 1 2] [--out benchmarks/results]

Makes Parquet files of random words (prompts and responses log-normal, sigma 0.5) and a tiny model, and watches processes that
read them: `preftree plan` over all of them, the batches of `preftree dpo` (read, checked, tokenised, merged, packed) from a
stream and from the disk with so many workers, and a whole `preftree dpo` over all pairs from a stream. Memory is what the
processes hold together, at its most, without pages of files (RssAnon), every fifth of a second. Runs on CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from step import tiny_tokenizer
from tables import write

WORDS = 900
SHARDS = 8


def make_files(folder: Path, pairs: int, prompt: int, response: int) -> None:
    """Sharded Parquet files of pairs of random words."""
    import pyarrow
    import pyarrow.parquet

    draw = np.random.default_rng(0)
    words = np.array([str(number) for number in range(2, WORDS)])
    for shard in range(SHARDS):
        path = folder / f"train-{shard:05}-of-{SHARDS:05}.parquet"
        count = pairs // SHARDS + (shard < pairs % SHARDS)
        writer = None
        for first in range(0, count, 10_000):
            size = min(10_000, count - first)
            columns = {}
            for name, median in (("prompt", prompt), ("chosen", response), ("rejected", response)):
                lengths = (median * np.exp(0.5 * draw.standard_normal(size))).round().astype(int).clip(2)
                text = words[draw.integers(0, len(words), lengths.sum())]
                before = "" if name == "prompt" else " "
                columns[name] = [before + " ".join(part) for part in np.split(text, lengths.cumsum()[:-1])]
            table = pyarrow.table(columns)
            writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()


def make_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=WORDS, pad_token_id=0, eos_token_id=1, max_position_embeddings=4096, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer(WORDS).save_pretrained(folder)


def held(process: int) -> int:
    """Bytes of a process and of those that it started, pages of files left out."""
    total, pending = 0, [process]
    while pending:
        number = pending.pop()
        try:
            status = Path(f"/proc/{number}/status").read_text()
            total += next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024
            for task in Path(f"/proc/{number}/task").iterdir():
                pending += map(int, (task / "children").read_text().split())
        except (OSError, StopIteration):  # it has ended
            continue
    return total


def watched(command: list[str]) -> tuple[str, float, float]:
    """What a command prints, its seconds, and the GB that it held at its most."""
    most, done = 0, threading.Event()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def watch() -> None:
        nonlocal most
        while not done.wait(0.2):
            most = max(most, held(process.pid))

    thread = threading.Thread(target=watch)
    thread.start()
    output, _ = process.communicate()
    done.set()
    thread.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit status {process.returncode}")
    return output, time.perf_counter() - started, most / 1e9


def batches(folder: Path, streaming: bool, workers: int, count: int, size: int) -> dict[str, Any]:
    """In this process: pairs a second of the first batches, behind those that fill the workers' queues."""
    import torch

    import preftree
    from preftree.data import find_files, load_pairs, stream_pairs

    torch.set_num_threads(1)
    paths = find_files(str(folder / "data"))["train"]
    args = preftree.DPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=size,
        row_length=8192,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=2 if workers else None,
        max_steps=10**6,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    data = stream_pairs(paths) if streaming else load_pairs(paths)
    trainer = preftree.DPOTrainer(str(folder / "model"), args=args, train_dataset=data)
    loader = iter(trainer.get_train_dataloader())
    for _ in range(4 * max(workers, 1)):
        next(loader)
    started = time.perf_counter()
    for _ in range(count):
        next(loader)
    return {"pairs_per_s": count * size / (time.perf_counter() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--prompt", type=int, default=60, help="median words of a prompt")
    parser.add_argument("--response", type=int, default=20, help="median words of a response")
    parser.add_argument("--size", type=int, default=256, help="pairs of a batch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=100, help="that are timed")
    parser.add_argument("--parts", nargs="+", choices=("plan", "batches", "train"), default=["plan", "batches"])
    parser.add_argument("--folder", type=Path, help="where to make the files (a temporary one)")
    parser.add_argument("--out", type=Path, help="folder for a CSV")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, streaming, workers = options.measure
        print(json.dumps(batches(Path(folder), streaming == "stream", int(workers), options.batches, options.size)))
        sys.stdout.flush()
        os._exit(0)  # workers that read ahead are not waited for

    from preftree.report import versions

    rows: list[dict[str, Any]] = []

    def note(what: str, seconds: float, most: float, **values: Any) -> None:
        rows.append({"what": what, "seconds": seconds, "most_gb": most, **values})
        shown = "".join(f", {name.replace('_', ' ')} {value:,.0f}" for name, value in values.items())
        print(f"{what:<36}{seconds:>8.0f} s, at most {most:.2f} GB{shown}", flush=True)

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        (folder / "data").mkdir()
        make_files(folder / "data", options.pairs, options.prompt, options.response)
        make_model(folder / "model")
        size = sum(file.stat().st_size for file in (folder / "data").iterdir())
        print(f"{options.pairs:,} pairs, {size / 1e9:.2f} GB of Parquet; {versions()}", flush=True)
        os.environ |= {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        given = ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "data")]
        given += ["--output_dir", str(folder / "out"), "--per_device_train_batch_size", str(options.size)]
        given += ["--bf16", "false", "--use_cpu", "true"]
        command = [sys.executable, "-m", "preftree"]
        if "plan" in options.parts:
            output, seconds, most = watched([*command, "plan", *given])
            print(output)
            note("plan", seconds, most, pairs_per_s=options.pairs / seconds)
        for kind in ("stream", "disk"):
            for workers in options.workers if "batches" in options.parts else ():
                measure = ["--measure", str(folder), kind, str(workers)]
                mine = [sys.executable, __file__, "--batches", str(options.batches), "--size", str(options.size)]
                output, seconds, most = watched([*mine, *measure])
                found = json.loads(output.strip().splitlines()[-1])
                note(f"batches from a {kind}, {workers} workers", seconds, most, workers=workers, **found)
        if "train" in options.parts:
            steps = str(options.pairs // options.size)
            more = ["--dataset_streaming", "true", "--max_steps", steps, "--row_length", "8192", "--report_to", "none"]
            more += ["--save_strategy", "no", "--logging_steps", "1000", "--dataloader_num_workers", "1"]
            more += ["--precompute_ref_log_probs", "false", "--gradient_checkpointing", "false"]
            _, seconds, most = watched([*command, "dpo", *given, *more])
            note("training from a stream", seconds, most, pairs_per_s=options.pairs / seconds)
    if options.out:
        write(rows, options.out / "data.csv", f"{options.pairs} pairs; {versions()}")


if __name__ == "__main__":
    main()
