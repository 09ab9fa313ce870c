"""A DPO training step by TRL and by preftree, side by side in one run: pairs a second, TFLOP/s, peak memory, start-up.

    python benchmarks/step.py                              # CPU: SmolLM2-135M, fp32. GPU: Qwen3-1.7B's shape, bf16
    python benchmarks/step.py --suites fixed lengths growth --out benchmarks/results

Each side runs in a process of its own, in turn, on the same random pairs: random weights on a GPU, SGD, a separate reference
model, no activation checkpointing. "packed" is preftree with sharing switched off: what packing, compiled layers and scoring
only the responses give without it. TRL runs as many pairs at once as fit, in several micro-batches if need be. The first
steps of a case are not counted; before those that are, a GPU is brought to the heat of long training, for what is measured
first would have a cooler card. "start_s" is a process's time up to the end of its first step, imports and the making of
weights and batches included; "first_step_s" is that of a case's first step. Lists of more than two responses are trained as
all their pairs; TRL is given these one by one.

TFLOP/s count the products of what a side computes, padding left out: 2 operations a weight and token, 4 (head size) (heads)
(layers) a visible pair, three times that with a backward pass. MFU is their share of the card's dense bf16 rate. On a GPU
steps follow each other as in training: a step's seconds are those between its end and that of the step before on the GPU.
With ``--profile`` more steps that follow each other say which kernels the time goes to, and which share of it has none (which
watching the kernels may make more of: "traced_s" is the seconds that such a step takes).
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from cards import heat
from packing import MEDIANS
from tables import draw, leave_out_warnings, library_versions, write

ROOT = Path(__file__).parent.parent
SIDES = ("trl", "packed", "preftree")
ON_A_GPU = "qwen3-1.7b"
MODELS = ("smollm2", "llama-3-8b", "qwen3-1.7b", "qwen3-0.6b", "qwen3.5-2b", "lfm2-1.2b", "tiny")
# Dense bf16 TFLOP/s by the vendor.
PEAK = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
# Seconds of products before the steps that count, in a side's first case and in the others.
HEATING = (5.0, 1.0)


@dataclass(frozen=True)
class Case:
    """What a step holds.

    Attributes:
        name: for the table.
        lengths: tokens of each pair's (or list's) prompt and responses, step by step.
        cached: the reference's log-probabilities are columns of the data.
        row_length: of preftree's rows; None for one row of a static length.
    """

    name: str
    lengths: tuple[tuple[tuple[int, ...], ...], ...]
    cached: bool = False
    row_length: int | None = None

    @property
    def examples(self) -> int:
        return len(self.lengths[0])

    @property
    def pairs(self) -> int:
        """Of a step: of a list's responses, each with each."""
        return sum(math.comb(len(responses), 2) for _, *responses in self.lengths[0])


def even(name: str, prompt: int, response: int, pairs: int, steps: int, spread: float = 0.0, **options: Any) -> Case:
    """Pairs of about the same lengths: a share ``spread`` around the given ones."""
    draw = np.random.default_rng(0)
    around = 1 + spread * draw.uniform(-1, 1, (steps, pairs, 3))
    lengths = (np.array([prompt, response, response]) * around).round().astype(int).clip(2)
    return Case(name, tuple(tuple(map(tuple, step)) for step in lengths.tolist()), **options)


def log_normal(name: str, prompt: int, response: int, pairs: int, steps: int, **options: Any) -> Case:
    """Lengths log-normal around medians, with sigma 0.6 for prompts and 0.5 for responses, as in `packing`."""
    draw = np.random.default_rng(0)
    spread = np.array([0.6, 0.5, 0.5]) * draw.standard_normal((steps, pairs, 3))
    lengths = (np.array([prompt, response, response]) * np.exp(spread)).round().astype(int).clip(8, 4096)
    return Case(name, tuple(tuple(map(tuple, step)) for step in lengths.tolist()), **options)


def cases(suite: str, steps: int) -> list[Case]:
    """The cases of a suite for a GPU."""
    if suite == "fixed":
        return [
            even("4 pairs (1536, 256, 256)", 1536, 256, 4, steps),
            even("8 pairs (1536, 256, 256)", 1536, 256, 8, steps, row_length=8192),
            even("4 pairs (1536, 256, 256), cached reference", 1536, 256, 4, steps, cached=True),
            even("8 pairs (1536, 256, 256), cached reference", 1536, 256, 8, steps, cached=True, row_length=8192),
            even("16 pairs (64, 512, 512)", 64, 512, 16, steps),
        ]
    if suite == "lengths":
        return [
            log_normal(name, prompt, response, 64, steps, row_length=16384)
            for name, (prompt, response) in MEDIANS.items()
        ]
    if suite == "growth":
        by_row = [even(f"1 pair, row {n}", n * 3 // 4, n // 8, 1, steps) for n in (1024, 4096, 16384, 65536)]
        by_batch = [even(f"{n} pairs (384, 64, 64)", 384, 64, n, steps, row_length=8192) for n in (1, 8, 64, 512)]
        by_list = [
            Case(f"2 lists of {n}, prompt 1024, responses 256", (((1024, *[256] * n),) * 2,) * steps)
            for n in (2, 4, 8, 16)
        ]
        return by_row + by_batch + by_list
    if suite == "mixed":
        return [log_normal("200 batches of 8 pairs, UltraFeedback", *MEDIANS["UltraFeedback"], 8, 200)]
    raise ValueError(f"unknown suite {suite!r}")


def random_examples(
    lengths: tuple[tuple[int, ...], ...], seed: int, vocabulary: int, cached: bool, ranked: bool
) -> list[dict[str, Any]]:
    """Tokenised pairs of random tokens; a list of more than two responses as one example if ``ranked``, else as its pairs."""
    draw = np.random.default_rng(seed)
    examples = []
    for parts in lengths:
        prompt, *responses = (draw.integers(100, vocabulary, length).tolist() for length in parts)
        if ranked and len(responses) > 2:
            sequences = [prompt + response for response in responses]
            scores = [float(-place) for place in range(len(responses))]
            examples.append(
                {"sequences": sequences, "prompt_lengths": [len(prompt)] * len(sequences), "scores": scores}
            )
            continue
        for chosen, rejected in combinations(responses, 2):
            example: dict[str, Any] = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            if cached:
                example |= {"ref_chosen_logps": -float(len(chosen)), "ref_rejected_logps": -float(len(rejected))}
            examples.append(example)
    return examples


def tiny_tokenizer(vocabulary: int):
    """A tokenizer of numbers: the trainers want one, the pairs are tokenised already."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {str(index): index for index in range(2, min(vocabulary, 1000))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


def shape(name: str):
    """The configuration of a model that is made with random weights."""
    from transformers import Lfm2Config, LlamaConfig, Qwen3_5TextConfig, Qwen3Config

    common = {"max_position_embeddings": 1 << 17, "tie_word_embeddings": True}
    qwen3 = {"vocab_size": 151936, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    small = {"vocab_size": 2000, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    qwen3_5 = {"vocab_size": 248320, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256}
    qwen3_5 |= {"linear_num_key_heads": 16, "linear_num_value_heads": 16}
    lfm2 = {"vocab_size": 65536, "num_attention_heads": 32, "num_key_value_heads": 8}
    lfm2 |= {"full_attn_idxs": [2, 5, 8, 10, 12, 14]}
    llama = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
    llama |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    kind, widths, settings = {
        "llama-3-8b": (LlamaConfig, (4096, 14336, 32), llama),
        "qwen3-1.7b": (Qwen3Config, (2048, 6144, 28), qwen3),
        "qwen3-0.6b": (Qwen3Config, (1024, 3072, 28), qwen3),
        "qwen3.5-2b": (Qwen3_5TextConfig, (2048, 6144, 24), qwen3_5),
        "lfm2-1.2b": (Lfm2Config, (2048, 12288, 16), lfm2),
        "tiny": (Qwen3Config, (64, 128, 2), small),
    }[name]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers")
    return kind(**dict(zip(names, widths, strict=True)), **(common | settings))


def model_and_tokenizer(name: str):
    """The model, its reference and a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name == "smollm2":
        sys.path.insert(0, str(ROOT / "examples"))
        from smollm2 import smollm2

        folder = smollm2(ROOT / "build" / "smollm2")
        models = [AutoModelForCausalLM.from_pretrained(folder) for _ in range(2)]
        return *models, AutoTokenizer.from_pretrained(folder)
    config = shape(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16 if device == "cuda" else torch.float32
            )
        model.generation_config.pad_token_id = 0
        models.append(model)
    return *models, tiny_tokenizer(config.vocab_size)


def operations(case: Case, cost: Any, side: str) -> float:
    """Operations of a mean step, forward and backward, reference included (see the module's docstring)."""
    total = 0.0
    for step in case.lengths:
        for prompt, *responses in step:
            scored = sum(responses) * cost.per_scored
            sequences = [(prompt + length) for length in responses]
            if side == "preftree":
                tokens = prompt + sum(responses)
                visible = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in responses)
            else:
                # Each of a list's responses stands in a pair with each other one.
                times = len(responses) - 1 if side == "trl" else 1
                tokens, visible = times * sum(sequences), times * sum(n * (n + 1) / 2 for n in sequences)
                scored *= times
            total += (3 if case.cached else 4) * (tokens * cost.per_token + visible * cost.per_pair + scored)
    return total / len(case.lengths)


def run_side(
    side: str, model_name: str, wanted: list[Case], started: float, uncompiled: bool = False, profiled: bool = False
) -> list[dict[str, Any]]:
    """Train a few steps of each case with one side; ``started`` is when its process was."""
    import torch
    import trl
    from datasets import Dataset

    import preftree
    from preftree.plan import ModelCost

    leave_out_warnings()
    cuda = torch.cuda.is_available()
    model, reference, tokenizer = model_and_tokenizer(model_name)
    cost = ModelCost.from_config(model.config)
    vocabulary = model.config.vocab_size
    results = []
    library = trl if side == "trl" else preftree
    for case in wanted:
        own = {
            "row_length": case.row_length,
            "share_prefixes": side == "preftree",
            "compile_layers": False if uncompiled else None,
        }
        own = {} if side == "trl" else own
        args = library.DPOConfig(
            **own,
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=case.examples,
            max_steps=1,
            optim="sgd",
            learning_rate=1e-6,
            report_to="none",
            bf16=False,  # the weights are: no autocast
            use_cpu=not cuda,
            gradient_checkpointing=False,
            max_length=None,
            disable_tqdm=True,
            save_strategy="no",
            precompute_ref_log_probs=case.cached,
        )
        text = [{"prompt": "2 ", "chosen": "3", "rejected": "4"}] * case.examples
        trainer = library.DPOTrainer(
            model,
            **({} if case.cached else {"ref_model": reference}),
            args=args,
            train_dataset=Dataset.from_list(text),
            processing_class=tokenizer,
        )
        trainer.create_optimizer_and_scheduler(1)
        micro = case.pairs if side == "trl" else case.examples
        result = asdict(case) | {"side": side, "pairs": case.pairs}
        del result["lengths"]
        while micro:
            try:
                measured = timed_steps(trainer, case, micro, vocabulary, HEATING[bool(results)] if cuda else None)
                break
            except RuntimeError as error:
                # Out of memory, or in TRL whatever a library makes of batches that are too large for it.
                if side != "trl" and not isinstance(error, torch.OutOfMemoryError):
                    raise
                print(f"{case.name}: {micro} at once: {str(error)[:100]}", file=sys.stderr, flush=True)
                micro = micro // 2 if side == "trl" else 0
            # (Behind the handler: the error held what the batch had taken.)
            trainer.model.zero_grad()
            if cuda:
                torch.cuda.empty_cache()
        if not micro:
            results.append(result | {"left_out": "out of memory"})
        else:
            seconds, first, ended, peak, compilations = measured
            median = statistics.median(seconds)
            tflops = operations(case, cost, side) / median / 1e12
            result |= {"micro_batch": micro, "seconds": median, "pairs_per_s": case.pairs / median, "tflops": tflops}
            result |= {"peak_gb": peak, "first_step_s": first}
            result["compilations_later"] = compilations
            if profiled and cuda:
                result |= profile_steps(trainer, case, micro, vocabulary)
            if not results:
                result["start_s"] = ended - started
            results.append(result)
        print({key: value for key, value in results[-1].items() if key != "kernels"}, file=sys.stderr, flush=True)
        del trainer
        if cuda:
            torch.cuda.empty_cache()
    return results


def collate(trainer: Any, case: Case, micro: int, vocabulary: int) -> list[list[dict[str, Any]]]:
    """The micro-batches of each step."""
    import preftree

    ranked = isinstance(trainer, preftree.DPOTrainer)
    batches = []
    for step, lengths in enumerate(case.lengths):
        examples = random_examples(lengths, step, vocabulary, case.cached, ranked)
        trainer.current_gradient_accumulation_steps = -(-len(examples) // micro)  # what `train` sets before it steps
        parts = [examples[first : first + micro] for first in range(0, len(examples), micro)]
        batches.append([trainer.data_collator(part) for part in parts])
    return batches


def take_step(trainer: Any, parts: list[dict[str, Any]]) -> None:
    for batch in parts:
        trainer.training_step(trainer.model, batch)
    trainer.optimizer.step()
    trainer.model.zero_grad()


def profile_steps(trainer: Any, case: Case, micro: int, vocabulary: int) -> dict[str, Any]:
    """Kernels of steps that follow each other: milliseconds and calls a step, longest first, and the share of time without."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    batches = collate(trainer, case, micro, vocabulary)[-8:]
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for parts in batches:
            take_step(trainer, parts)
        torch.cuda.synchronize()
    on_device = (event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    kernels = sorted(on_device, key=lambda event: event.time_range.start)
    # The first steps find the device waiting: the host is not ahead of it yet, as it is in training.
    ahead = len(batches) // 2
    kernels = kernels[len(kernels) * ahead // len(batches) :]
    steps = len(batches) - ahead
    busy, started = 0.0, kernels[0].time_range.start
    until = started
    for event in kernels:
        start, end = event.time_range.start, event.time_range.end
        busy += max(end - max(start, until), 0.0)
        until = max(until, end)
    traced = {"idle": 1 - busy / (until - started), "traced_s": (until - started) / 1e6 / steps}
    return traced | {"kernels": by_kernel(kernels, steps)}


def by_kernel(events: Iterable[Any], steps: int) -> list[dict[str, Any]]:
    """Milliseconds and calls a step of each kernel in a profiler's events on the device, longest first."""
    spent: dict[str, list[float]] = {}
    for event in events:
        spent.setdefault(event.name, []).append((event.time_range.end - event.time_range.start) / 1e3)
    return [
        {"kernel": name, "ms": sum(times) / steps, "calls": len(times) / steps}
        for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))
    ]


def timed_steps(
    trainer: Any, case: Case, micro: int, vocabulary: int, heating: float | None
) -> tuple[list[float], float, float, float, int]:
    """Seconds of the steps that count, of the first one, when that ended, peak GB, and graphs compiled after the third.

    ``heating``: seconds of it before the steps that count, on a GPU; None without one.
    """
    import torch
    from torch._dynamo.utils import counters

    cuda = heating is not None
    batches = collate(trainer, case, micro, vocabulary)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    ends: list[Any] = []
    compiled = 0
    for number, parts in enumerate(batches):
        if number == 3:
            compiled = counters["stats"]["unique_graphs"]
        started = time.perf_counter()
        take_step(trainer, parts)
        if cuda and number == 0:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        if number == 0:
            ended = time.time()
            if heating is not None:
                heat(heating)
        if cuda:
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()
    if cuda:
        torch.cuda.synchronize()
        seconds[1:] = [one.elapsed_time(other) / 1e3 for one, other in pairwise(ends)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 1e9
    # On a GPU the first step compiles, and the second may find a kernel that it has not seen.
    counted = seconds[2:] if cuda and len(seconds) > 3 else seconds[1:]
    later = counters["stats"]["unique_graphs"] - compiled if len(batches) > 3 else 0
    return counted, seconds[0], ended, peak, later


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All sides in turn, each in a process of its own."""
    measured: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
    for _ in range(options.rounds):
        for side, results in measured.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--started", str(time.time())]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if process.returncode:
                raise SystemExit(f"{side} failed with exit status {process.returncode}")
            results += json.loads(process.stdout.strip().splitlines()[-1])
    return measured


def summarise(measured: dict[str, list[dict[str, Any]]], peak: float | None) -> list[dict[str, Any]]:
    """Medians over rounds, and ratios to the other sides; printed, and as rows of a table."""
    rows = []
    names = list(dict.fromkeys(result["name"] for results in measured.values() for result in results))
    for name in names:
        print(f"\n{name}")
        print(f"{'':<10}{'pairs/s':>10}{'(rounds)':>26}{'TFLOP/s':>9}{'MFU':>7}{'peak GB':>9}{'first step':>12}")
        by_side: dict[str, dict[str, Any]] = {}
        for side, results in measured.items():
            own = [result for result in results if result["name"] == name]
            if any("left_out" in result for result in own):
                print(f"{side:<10}{own[0].get('left_out')}")
                rows.append({"case": name, "side": side, "left_out": own[0].get("left_out")})
                continue
            rates = [result["pairs_per_s"] for result in own]
            row: dict[str, Any] = {
                "case": name,
                "side": side,
                "pairs": own[0]["pairs"],
                "micro_batch": own[0]["micro_batch"],
            }
            row |= {key: statistics.median(r[key] for r in own) for key in ("pairs_per_s", "tflops", "first_step_s")}
            row["compilations_later"] = max(result["compilations_later"] for result in own)
            row["peak_gb"] = max(result["peak_gb"] for result in own)
            row["mfu"] = row["tflops"] / peak if peak else None
            if "idle" in own[-1]:
                row |= {key: own[-1][key] for key in ("idle", "traced_s")}
            if any("start_s" in result for result in own):
                row["start_s"] = max(result.get("start_s", 0.0) for result in own)
            by_side[side] = row
            rows.append(row)
            share = f"{row['mfu']:.1%}" if peak else ""
            shown = " ".join(f"{rate:.3f}" for rate in rates)
            line = (
                f"{side:<10}{row['pairs_per_s']:>10.3f}{shown:>26}{row['tflops']:>9.2f}{share:>7}{row['peak_gb']:>9.2f}"
            )
            print(line + f"{row['first_step_s']:>10.1f} s")
            if row["compilations_later"]:
                print(f"{'':<10}{row['compilations_later']} graphs compiled after the third step")
            show_profile(own[-1])
        ours = by_side.get("preftree")
        for other in ("trl", "packed"):
            if ours and other in by_side:
                theirs = by_side[other]
                rounds = [
                    r["pairs_per_s"] / t["pairs_per_s"]
                    for r, t in zip(
                        [r for r in measured["preftree"] if r["name"] == name],
                        [r for r in measured[other] if r["name"] == name],
                        strict=True,
                    )
                ]
                ours[f"over_{other}"] = statistics.median(rounds)
                ours[f"memory_of_{other}"] = ours["peak_gb"] / theirs["peak_gb"]
                listed = ", ".join(f"{ratio:.2f}" for ratio in rounds)
                print(
                    f"preftree / {other}: {statistics.median(rounds):.2f}x pairs/s (rounds: {listed}), "
                    f"{ours[f'memory_of_{other}']:.2f}x its memory, {ours['tflops'] / theirs['tflops']:.3f} of its TFLOP/s"
                )
    return rows


def show_profile(result: dict[str, Any], count: int = 16) -> None:
    """The kernels that take longest."""
    if "kernels" not in result:
        return
    kernels = result["kernels"]
    total = sum(kernel["ms"] for kernel in kernels)
    print(
        f"  {total:.1f} ms of kernels in a step of {result['traced_s'] * 1e3:.1f} ms, {result['idle']:.1%} without one"
    )
    for kernel in kernels[:count]:
        print(
            f"  {kernel['ms']:>9.2f} ms {kernel['ms'] / total:>6.1%} {kernel['calls']:>7.0f} x {kernel['kernel'][:110]}"
        )


def kernels_of(measured: dict[str, list[dict[str, Any]]], count: int = 30) -> list[dict[str, Any]]:
    """The kernels that take longest in each case that was profiled, of the last round."""
    last = {(result["name"], side): result for side, results in measured.items() for result in results}
    return [
        {"case": name, "side": side} | kernel
        for (name, side), result in last.items()
        for kernel in result.get("kernels", [])[:count]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="default by device")
    parser.add_argument("--suites", nargs="+", choices=("fixed", "lengths", "growth", "mixed"), help="cases for a GPU")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="of a suite, the cases whose name contains one of these"
    )
    parser.add_argument("--row-length", type=int, help="of preftree's rows, in place of a case's own")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--prompt", type=int, default=500, help="without suites: tokens of a prompt")
    parser.add_argument("--response", type=int, default=60, help="without suites: tokens of a response")
    parser.add_argument("--pairs", type=int, default=2, help="without suites: pairs a step")
    parser.add_argument("--steps", type=int, help="counted steps of a round (2; 6 with suites)")
    parser.add_argument("--rounds", type=int, help="how often the sides take turns (2; 1 with suites)")
    parser.add_argument("--out", type=Path, help="folder for a CSV")
    parser.add_argument("--uncompiled", action="store_true", help="packed and preftree without compiled layers (GPU)")
    parser.add_argument("--profile", action="store_true", help="which kernels the time goes to (GPU)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    cuda = torch.cuda.is_available()
    options.model = options.model or (ON_A_GPU if cuda else "smollm2")
    steps = (options.steps or (6 if options.suites else 2)) + (2 if cuda else 1)
    options.rounds = options.rounds or (1 if options.suites else 2)
    if options.suites:
        every = [case for suite in options.suites for case in cases(suite, steps)]
        wanted = [case for case in every if any(part in case.name for part in options.only)]
    else:
        size = (options.prompt, options.response, options.response)
        name = f"{options.pairs} pairs of {size} tokens a step, lengths a tenth around"
        wanted = [even(name, options.prompt, options.response, options.pairs, steps, spread=0.1)]
    if options.row_length:
        wanted = [replace(case, row_length=options.row_length) for case in wanted]
    if options.side:
        results = run_side(options.side, options.model, wanted, options.started, options.uncompiled, options.profile)
        print(json.dumps(results))
        return
    from preftree.report import versions

    card = torch.cuda.get_device_name() if cuda else ""
    peak = next((rate for name, rate in PEAK.items() if name in card), None)
    print(f"{options.model}; {versions()}")
    measured = measure(options)
    rows = summarise(measured, peak)
    if options.out:
        suites = "_".join(options.suites or ["pairs"])
        if options.suites and options.model != ON_A_GPU:
            suites += f"_{options.model}"
        if options.row_length:
            suites += f"_rows_{options.row_length}"
        machine = card.split()[1].lower() if card else "cpu"
        head = f"{options.model}; {versions()}{library_versions()}"
        write(rows, options.out / f"step_{suites}_{machine}.csv", head)
        if kernels := kernels_of(measured):
            write(kernels, options.out / f"step_{suites}_kernels_{machine}.csv", head)
        rates = [(row["case"], row["side"], row["pairs_per_s"]) for row in rows if "pairs_per_s" in row]
        # Cases differ by orders of magnitude: each side's rate over that of the slowest one.
        slowest = {case: min(rate for other, _, rate in rates if other == case) for case, *_ in rates}
        ratios = [(case, side, rate / slowest[case]) for case, side, rate in rates]
        draw(ratios, options.out / f"step_{suites}_{machine}.png", head, "pairs/s over those of the slowest side")


if __name__ == "__main__":
    main()
