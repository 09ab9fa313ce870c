"""The demo: plan, train SmolLM2-135M-Instruct on the pairs of `examples/data`, check, and time sharing.

By DPO, or by another method of pairs: `python examples/demo.py --method simpo`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from smollm2 import smollm2

from preftree import cli
from preftree.trainers.base import TreeTrainer

HERE = Path(__file__).parent
# Where a method's paper takes other values than DPO's: SimPO's beta multiplies log-probabilities per token.
SETTINGS = {"simpo": ["--beta", "2.0", "--simpo_gamma", "1.0"]}


def check(method: str, history: list[dict[str, float]]) -> list[str]:
    """What the run must show; the list of what it does not."""
    train = [entry for entry in history if "loss" in entry]
    before, *_, after = [entry for entry in history if "eval_loss" in entry]
    failed = []
    if method == "dpo":
        last = sum(entry["loss"] for entry in train[-5:]) / 5
        if abs(train[0]["loss"] - math.log(2)) > 1e-6:
            failed.append(f"the first loss is {train[0]['loss']}, not ln 2")
        if last >= math.log(2):
            failed.append(f"the loss did not fall: {last:.4f}")
        if train[-1]["rewards/margins"] <= 0:
            failed.append("the margin did not rise")
    # Without a reference, margins start anywhere, and differ from pair to pair: only the same pairs can be compared.
    for name, sign in (("eval_loss", -1), ("eval_rewards/margins", 1)):
        if sign * (after[name] - before[name]) <= 0:
            failed.append(f"{name} of the held-out pairs went from {before[name]:.4f} to {after[name]:.4f}")
    return failed


def seconds_a_pair(trainer: TreeTrainer, batches: int = 3) -> tuple[float, float]:
    """Forward and backward passes (a reference included) with and without sharing, in turn on the same pairs."""
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
    parser.add_argument("--method", choices=("dpo", "orpo", "cpo", "simpo"), default="dpo")
    parser.add_argument("--output_dir", type=Path, default=Path("build/demo"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    model = smollm2(arguments.output_dir.parent / "smollm2")
    method = arguments.method
    recipe = ["--config", str(HERE / "dpo.yaml"), "--model_name_or_path", str(model)]
    recipe += ["--dataset_name", str(HERE / "data" / "train.jsonl")]
    recipe += ["--eval_dataset_name", str(HERE / "data" / "test.jsonl"), "--output_dir", str(arguments.output_dir)]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    print("== preftree plan", flush=True)
    if status := cli.main(["plan", *recipe, "--draw", str(arguments.output_dir / "plan.png")]):
        return status
    print(f"== preftree {method}", flush=True)
    trainer = cli.run(method, [*recipe, *SETTINGS.get(method, [])])
    if trainer is None:
        return 130
    failed = check(method, trainer.state.log_history)
    computed = trainer.computed.copy()
    with_sharing, without = seconds_a_pair(trainer)
    pairs = computed["examples"]
    print(f"\n== {time.perf_counter() - started:.0f} s in all, {torch.get_num_threads()} threads")
    for failure in failed:
        print(f"FAILED: {failure}")
    if not failed:
        print("the loss fell, the margin rose, held-out pairs got better")
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
