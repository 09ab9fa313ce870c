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
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import conftest
import torch
from preference_data import dataset, text_pairs
from transformers import LlamaConfig, LlamaForCausalLM

import preftree

PAIRS = 40


class WithLedger(preftree.DPOTrainer):
    """Writes down which pairs a step trains on, before it does."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        pairs = [int(length) for length in inputs["pair"].tolist()]
        with Path(self.args.output_dir, "ledger").open("a", encoding="utf-8") as file:
            file.write(json.dumps([self.state.global_step, pairs]) + "\n")
        return super().training_step(model, inputs, num_items_in_batch)

    def _make_collator(self):
        collator = super()._make_collator()
        collator.columns = (*collator.columns, "pair")
        return collator

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "pair" not in self._signature_columns:
            self._signature_columns.append("pair")


def train(model: str, folder: Path) -> None:
    """The run, from the last good checkpoint if there is one; at its end the folder holds a digest of what it came to."""
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
            step, pairs = json.loads(line)
        except ValueError:  # killed while it wrote this
            continue
        if step != last or len(steps[step]) >= 4:  # a new step, or this one again (four pairs a step)
            steps[step] = []
        steps[step] += pairs
        last = step
    return steps


@dataclass
class Ended:
    """How a process ended: whether it was killed, and after how long."""

    killed: bool
    seconds: float


def run_whole(model: str, folder: Path) -> Ended:
    return _run(model, folder, None)


def run_killed(model: str, folder: Path, *moments: float) -> int:
    """Run until the end, killing it after so many seconds, each time that it starts; returns how often it was killed."""
    kills = 0
    for moment in (*moments, None):
        ended = _run(model, folder, moment)
        kills += ended.killed
        if not ended.killed:
            break
    return kills


def _run(model: str, folder: Path, moment: float | None) -> Ended:
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with (folder / "output").open("a") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                warnings.simplefilter("ignore")
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
            return Ended(os.WIFSIGNALED(status), time.perf_counter() - started)
        if moment is not None and time.perf_counter() - started >= moment:
            os.kill(child, signal.SIGKILL)
            moment = None
        time.sleep(0.002)


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
        seconds = run_whole(model, whole).seconds
        equal = kills = 0
        for number in range(options.runs):
            folder = Path(place) / str(number)
            kills += run_killed(model, folder, *(draw.uniform(0, seconds) for _ in range(draw.randint(1, 3))))
            same = (folder / "end").read_text() == (whole / "end").read_text()
            equal += same and ledger_of(folder) == ledger_of(whole)
            print(f"run {number}: {equal} of {number + 1} equal, {kills} kills", flush=True)
    print(f"{options.runs} runs, {kills} kills: {equal} ended with the same weights, losses and pairs of each step")


if __name__ == "__main__":
    main()
