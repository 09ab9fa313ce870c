"""Runs that are killed (SIGKILL) at random moments and go on from their last good checkpoint, against one that is left alone.

    python tests/kill_and_resume.py [--runs 100] [--seed 0]

A tiny model, 40 pairs, two epochs of 10 steps, a checkpoint after each second step. A ledger says which pairs each step
trained on: of a step that was done again the last entry counts, for what came before it is lost with the weights that it made.
Runs start from one process that has imported everything, and are killed up to three times each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conftest
import torch
from preference_data import dataset, text_pairs
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import preftree

PAIRS = 40
STEPS = 20


class WithLedger(preftree.DPOTrainer):
    """Writes down which pairs a step trains on, before it does."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        pairs = [int(length) for length in inputs["pair"].tolist()]
        write_down(Path(self.args.output_dir), [self.state.global_step, pairs])
        return super().training_step(model, inputs, num_items_in_batch)

    def _make_collator(self):
        collator = super()._make_collator()
        collator.columns = (*collator.columns, "pair")
        return collator

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "pair" not in self._signature_columns:
            self._signature_columns.append("pair")


def write_down(folder: Path, entry: list | None) -> None:
    with (folder / "ledger").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def train(model: str, folder: Path) -> None:
    """The run, from the last good checkpoint if there is one; at its end the folder holds a digest of what it came to."""
    write_down(folder, None)
    data = dataset(text_pairs(PAIRS)).add_column("pair", list(range(PAIRS)))
    args = preftree.DPOConfig(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        learning_rate=0.01,
        logging_steps=1,
        row_length=64,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = WithLedger(model, args=args, train_dataset=data)
    # A run that was killed before its first checkpoint has none, or only a torn one.
    known = preftree.trainers.checkpoints.last_good(folder)[0] is not None
    trainer.train(resume_from_checkpoint=True if known else None)
    digest = hashlib.sha256()
    for name, parameter in trainer.model.named_parameters():
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    end = {"weights": digest.hexdigest(), "losses": losses, "steps": trainer.state.global_step}
    (folder / "end").write_text(json.dumps(end))


def ledger_of(folder: Path) -> dict[int, list[int]]:
    """The pairs of each step, as it was done last."""
    steps: dict[int, list[int]] = {}
    last = None
    for line in (folder / "ledger").read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # killed while it wrote this
            continue
        step, pairs = entry or (None, [])  # a run goes on here
        if step is not None and step != last:
            steps[step] = []
        if step is not None:
            steps[step] += pairs
        last = step
    return steps


@dataclass
class Moment:
    """So many seconds after a run, from where it went on, has begun so many micro-batches."""

    batches: int
    seconds: float


def moment(draw: random.Random) -> Moment:
    return Moment(draw.randrange(2 * STEPS), draw.uniform(0, 0.1))


def run_whole(model: str, folder: Path) -> None:
    _run(model, folder, None)


def run_killed(model: str, folder: Path, *moments: Moment) -> int:
    """Run until the end, killing it at a moment each time that it starts; returns how often it was killed."""
    kills = 0
    for each in (*moments, None):
        if not _run(model, folder, each):
            break
        kills += 1
    return kills


def _run(model: str, folder: Path, when: Moment | None) -> bool:
    """Run until the end, or until a process is killed: whether it was."""
    folder.mkdir(parents=True, exist_ok=True)
    ledger = folder / "ledger"
    begun = _lines(ledger)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with (folder / "output").open("a") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                warnings.simplefilter("ignore")
                # Progress bars have one lock for all processes, which a process may hold that is killed.
                own_lock(tqdm, threading.RLock())
                train(model, folder)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status != 0 and not os.WIFSIGNALED(status):
                raise RuntimeError(f"the run failed: {(folder / 'output').read_text()[-2000:]}")
            return os.WIFSIGNALED(status)
        if when is not None and _lines(ledger) - begun > when.batches:
            time.sleep(when.seconds)
            os.kill(child, signal.SIGKILL)
            when = None
        time.sleep(0.002)


def own_lock(bars: type[tqdm], lock: Any) -> None:
    """Have progress bars of a class, and of those made from it, which may have one of their own, take another lock."""
    bars.set_lock(lock)
    for each in bars.__subclasses__():
        own_lock(each, lock)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def tiny_model(folder: Path) -> str:
    tokenizer = conftest.word_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, pad_token_id=0, eos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        model = tiny_model(Path(place) / "model")
        whole = Path(place) / "whole"
        run_whole(model, whole)
        equal = kills = 0
        for number in range(options.runs):
            folder = Path(place) / str(number)
            kills += run_killed(model, folder, *(moment(draw) for _ in range(draw.randint(1, 3))))
            same = (folder / "end").read_text() == (whole / "end").read_text()
            equal += same and ledger_of(folder) == ledger_of(whole)
            print(f"run {number}: {equal} of {number + 1} equal, {kills} kills", flush=True)
    print(f"{options.runs} runs, {kills} kills: {equal} ended with the same weights, losses and pairs of each step")


if __name__ == "__main__":
    main()
