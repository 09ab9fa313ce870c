"""The demo: plan, train SmolLM2-135M-Instruct by DPO on the pairs of `examples/data`, check, and time sharing."""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from smollm2 import smollm2

from preftree import DPOTrainer, cli

HERE = Path(__file__).parent


def check(history: list[dict[str, float]]) -> list[str]:
    """What the run must show; the list of what it does not."""
    train = [entry for entry in history if "loss" in entry]
    held_out = [entry for entry in history if "eval_loss" in entry]
    failed = []
    if abs(train[0]["loss"] - math.log(2)) > 1e-6:
        failed.append(f"the first loss is {train[0]['loss']}, not ln 2")
    last = sum(entry["loss"] for entry in train[-5:]) / 5
    if last >= math.log(2):
        failed.append(f"the loss did not fall: {last:.4f}")
    if train[-1]["rewards/margins"] <= 0:
        failed.append("the margin did not rise")
    if held_out[-1]["eval_loss"] >= held_out[0]["eval_loss"]:
        failed.append("held-out pairs did not get better")
    return failed


def seconds_a_pair(trainer: DPOTrainer, batches: int = 3) -> tuple[float, float]:
    """Forward and backward passes (reference included) with and without sharing, in turn on the same pairs."""
    size = trainer.args.per_device_train_batch_size
    spent = {True: 0.0, False: 0.0}
    for number in range(batches):
        pairs = [trainer.train_dataset[i] for i in range(number * size, (number + 1) * size)]
        for share in spent:
            collator = replace(trainer._trees, share_prefixes=share)
            started = time.perf_counter()
            trainer.training_step(trainer.model, collator(pairs))
            spent[share] += time.perf_counter() - started
            trainer.model.zero_grad()
    return spent[True] / (batches * size), spent[False] / (batches * size)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("build/demo"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    model = smollm2(arguments.output_dir.parent / "smollm2")
    recipe = ["--config", str(HERE / "dpo.yaml"), "--model_name_or_path", str(model)]
    recipe += ["--dataset_name", str(HERE / "data" / "train.jsonl")]
    recipe += ["--eval_dataset_name", str(HERE / "data" / "test.jsonl"), "--output_dir", str(arguments.output_dir)]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    print("== preftree plan", flush=True)
    if status := cli.main(["plan", *recipe, "--draw", str(arguments.output_dir / "plan.png")]):
        return status
    print("== preftree dpo", flush=True)
    trainer = cli.run("dpo", recipe)
    if trainer is None:
        return 130
    failed = check(trainer.state.log_history)
    computed = trainer.computed.copy()
    with_sharing, without = seconds_a_pair(trainer)
    pairs = computed["examples"]
    print(f"\n== {time.perf_counter() - started:.0f} s in all, {torch.get_num_threads()} threads")
    for failure in failed:
        print(f"FAILED: {failure}")
    if not failed:
        print("the loss fell from ln 2, the margin rose, held-out pairs got better")
    print(
        f"sharing saved {computed['unshared_tokens'] - computed['tokens']:,} of {computed['unshared_tokens']:,} tokens "
        f"({computed['unshared_tokens'] / computed['tokens']:.2f}x fewer)"
    )
    print(
        f"and {without - with_sharing:.2f} of {without:.2f} s a pair, timed in turn on the same pairs "
        f"({without / with_sharing:.2f}x faster): about {pairs * (without - with_sharing):.0f} s over this run"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
