"""Does sharing cost precision? DPO in bf16 with and without sharing, both against the same training in float32.

    python benchmarks/precision.py [--model qwen3-0.6b] [--steps 50] [--seeds 3]

Three trainings from the same weights on the same pairs: float32 and unshared (the measure), bf16 autocast unshared, bf16
autocast shared. For each seed of the data: how far the losses of all steps, and the log-probabilities that the trained
weights give held-out pairs (computed in float32, sequence by sequence), are from float32's, root mean square; and the ratio
of the two. Random weights, random tokens of log-normal lengths, AdamW. Where sharing costs nothing the ratios lie around 1.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from step import log_normal, model_and_tokenizer
from tables import leave_out_warnings, library_versions, write

import preftree
from preftree.report import versions

CUDA = torch.cuda.is_available()
RUNS = {"float32": (False, False), "bf16": (True, False), "bf16 shared": (True, True)}


class KeepsLosses(preftree.DPOTrainer):
    """Keeps each step's loss as it is: logs may round it."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.losses: list[float] = []

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*args, **options)
        self.losses.append(float(loss))
        return loss


def pairs(count: int, prompt: int, response: int, seed: int) -> list[dict[str, str]]:
    """Pairs of random numbers as text, which the tokenizer reads as tokens."""
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> str:
        return " ".join(map(str, torch.randint(2, 1000, (length,), generator=generator).tolist()))

    lengths = log_normal("", prompt, response, count, seed + 1).lengths[seed]
    return [
        {"prompt": text(p) + " ", "chosen": text(chosen), "rejected": text(rejected)} for p, chosen, rejected in lengths
    ]


def train(options: argparse.Namespace, data: list[dict[str, str]], bf16: bool, share: bool) -> KeepsLosses:
    model, reference, tokenizer = model_and_tokenizer(options.model)
    args = preftree.DPOConfig(
        share_prefixes=share,
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=options.pairs,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        beta=0.5,
        bf16=bf16,
        tf32=False if CUDA else None,
        use_cpu=not CUDA,
        gradient_checkpointing=False,
        max_length=None,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = KeepsLosses(
        # The same numbers in each run: those that bf16 can hold.
        model.bfloat16().float(),
        ref_model=reference.bfloat16().float(),
        args=args,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


@torch.no_grad()
def held_out_logps(trainer: KeepsLosses, data: list[dict[str, str]]) -> torch.Tensor:
    """Of each response, by the trained weights in float32, sequence by sequence."""
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model).float().eval(), trainer.processing_class
    logps = []
    for pair in data:
        prompt = tokenizer(pair["prompt"]).input_ids
        for side in ("chosen", "rejected"):
            sequence = prompt + tokenizer(pair[side]).input_ids
            tree = preftree.TokenTree.from_sequences([sequence], [len(prompt)])
            row = preftree.pack([tree])[0]
            logps.append(preftree.sequence_logps(model, row).logps.double().cpu())
    return torch.cat(logps)


def rms(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ("qwen3-0.6b", "qwen3-1.7b", "tiny", "smollm2")
    parser.add_argument("--model", choices=models, default="qwen3-0.6b" if CUDA else "tiny")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=8, help="a step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed, where several processes share them")
    parser.add_argument("--prompt", type=int, default=400 if CUDA else 60)
    parser.add_argument("--response", type=int, default=120 if CUDA else 20)
    parser.add_argument("--learning-rate", type=float, default=1e-6 if CUDA else 1e-3)
    parser.add_argument("--out", type=Path, help="folder for a CSV")
    options = parser.parse_args()
    leave_out_warnings()
    head = f"{options.model}; {versions()}{library_versions()}"
    print(head)
    rows: list[dict[str, Any]] = []
    for seed in range(options.first, options.first + options.seeds):
        data = pairs(options.steps * options.pairs, options.prompt, options.response, seed)
        held_out = pairs(16, options.prompt, options.response, 100 + seed)
        losses, logps = {}, {}
        for name, (bf16, share) in RUNS.items():
            trainer = train(options, data, bf16, share)
            losses[name] = torch.tensor(trainer.losses, dtype=torch.float64)
            logps[name] = held_out_logps(trainer, held_out)
            del trainer
        row: dict[str, Any] = {"seed": seed, "first_loss": losses["float32"][0].item()}
        row["last_loss"] = losses["float32"][-5:].mean().item()
        for what, found in (("losses", losses), ("logps", logps)):
            apart, shared = (rms(found[name], found["float32"]) for name in ("bf16", "bf16 shared"))
            row |= {f"{what}_bf16": apart, f"{what}_bf16_shared": shared, f"{what}_ratio": shared / apart}
        rows.append(row)
        print(", ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)
    for what in ("losses", "logps"):
        print(
            f"{what}: shared over unshared, median of seeds {statistics.median(r[f'{what}_ratio'] for r in rows):.3f}"
        )
    if options.out:
        machine = torch.cuda.get_device_name().split()[1].lower() if CUDA else "cpu"
        write(rows, options.out / f"precision_{machine}.csv", head)


if __name__ == "__main__":
    main()
