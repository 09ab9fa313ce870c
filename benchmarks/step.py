"""A DPO training step by TRL and by preftree, side by side in one run: pairs a second and peak memory.

Each side runs in a process of its own, in turn, on the same random pairs: SmolLM2-135M-Instruct, fp32, SGD, separate
reference, no activation checkpointing. The first step of each process is not counted. "packed" is preftree with sharing
switched off: what packing and scoring only the responses give without it.

    python benchmarks/step.py --prompt 500 --response 60 --pairs 2
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SIDES = ("trl", "packed", "preftree")
sys.path.insert(0, str(ROOT / "examples"))


def random_pairs(count: int, prompt: int, response: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Tokenised pairs of random tokens, lengths a tenth around the given ones."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        spread = max(length // 10, 1)
        size = length + int(torch.randint(-spread, spread + 1, (), generator=generator))
        return torch.randint(100, vocabulary, (size,), generator=generator).tolist()

    return [
        {"prompt_ids": draw(prompt), "chosen_ids": draw(response), "rejected_ids": draw(response)} for _ in range(count)
    ]


def run_side(options: argparse.Namespace) -> dict[str, float]:
    """Train a few steps with one side; seconds of the counted steps and peak memory in GB."""
    import torch
    import trl
    from datasets import Dataset
    from smollm2 import smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import preftree

    folder = smollm2(ROOT / "build" / "smollm2")
    library = trl if options.side == "trl" else preftree
    own = {"share_prefixes": False} if options.side == "packed" else {}
    args = library.DPOConfig(
        **own,
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=options.pairs,
        max_steps=1,
        optim="sgd",
        report_to="none",
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        max_length=None,
        disable_tqdm=True,
        save_strategy="no",
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = Dataset.from_list([{"prompt": "a ", "chosen": "b", "rejected": "c"}] * options.pairs)
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = library.DPOTrainer(model, args=args, train_dataset=text, processing_class=tokenizer)
    trainer.create_optimizer_and_scheduler(1)
    trainer.current_gradient_accumulation_steps = 1  # what `train` sets before it steps
    pairs = random_pairs(options.pairs * (options.steps + 1), options.prompt, options.response, 49000)
    seconds = []
    for step in range(options.steps + 1):
        batch = pairs[step * options.pairs : (step + 1) * options.pairs]
        started = time.perf_counter()
        trainer.training_step(trainer.model, trainer.data_collator(batch))
        trainer.optimizer.step()
        trainer.model.zero_grad()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e9
    return {"seconds": statistics.median(seconds[1:]), "peak_gb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=500, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=60, help="tokens of a response")
    parser.add_argument("--pairs", type=int, default=2, help="pairs a step")
    parser.add_argument("--steps", type=int, default=2, help="counted steps of a round")
    parser.add_argument("--rounds", type=int, default=2, help="how often they take turns")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options)))
        return
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side, results in measured.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(output.strip().splitlines()[-1]))
    from preftree.report import versions

    print(
        f"SmolLM2-135M, {options.pairs} pairs of ({options.prompt}, {options.response}, {options.response}) tokens a step"
    )
    print(f"{'':<10}{'pairs/s':>9}{'(rounds)':>24}{'peak GB':>9}")
    for side, results in measured.items():
        each = [options.pairs / result["seconds"] for result in results]
        peak = max(result["peak_gb"] for result in results)
        print(f"{side:<10}{statistics.median(each):>9.3f}{' '.join(f'{rate:.3f}' for rate in each):>24}{peak:>9.2f}")
    for other in ("trl", "packed"):
        pairs = zip(measured[other], measured["preftree"], strict=True)
        ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in pairs]
        rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"preftree / {other}: {statistics.median(ratios):.2f}x pairs/s (rounds: {rounds})")
    print(versions())


if __name__ == "__main__":
    main()
