"""DPO on several GPUs, TRL's, packed and shared: the table of arXiv 2410.20305, with our figures beside the paper's.

    python benchmarks/paper_table.py --gpus 8 --model llama-3-8b --checkpointing --tokens 32768 --out benchmarks/results
    python benchmarks/paper_table.py --gpus 1 2 --model qwen3-1.7b --only UltraFeedback     # how it scales
    ... --gpus 1 2 --project 4 8                                                    # how it would, on more GPUs of a host
    python benchmarks/paper_table.py --gpus 2 --cpu --model tiny --pairs 2 --only TLDR      # what it does, without GPUs

Each side trains by `trainer.train()`, one distribution after the other, in as many processes as there are GPUs (one GPU: a
plain process without any engine), on the same random pairs of log-normal lengths (see `step`): random weights in bfloat16,
SGD, a separate reference, so many pairs a GPU and step (``--pairs``, or about as many as have ``--tokens``). "packed" is
preftree with sharing switched off. TRL takes ``--trl-pairs`` at once and accumulates.

Tokens are those of all sequences, each by itself, so that sides compare. MFU counts what a side computes (see `step`). A
step's seconds are those between the ends of two steps on the GPU; the first steps, which compile, are not counted, and cards
are heated before those that are. "idle" is from steps after these, watched one by one: the share of a step that the mean rank
spends without a kernel that computes, "exchange" the part of it in which one exchanges or copies, or waits for others to, and
"imbalance" the share that the mean rank would wait if ranks met at each step's end alone (by what their computing kernels
take). "at random" is the imbalance of the same steps if ranks took pairs as they come, by operations. A side that takes longer
than ``--limit`` says where it was. What was measured until then counts, and so where this is interrupted or told to end:
``--read`` goes on with what earlier calls wrote (the later file counts where two have the same). "of one GPU" is by operations
a second, for steps of several GPUs are other draws. ``--project`` is no measurement: see `projection`.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from packing import MEDIANS
from projection import is_projected, project
from ranks import waits
from step import PEAK, SIDES, Case, by_kernel, log_normal, operations, random_examples, shape, tiny_tokenizer
from tables import leave_out_warnings, library_versions, read, write

from preftree.plan import ModelCost
from preftree.report import versions

# Speed-ups of sharing over packing without it, on 8 H100s with ZeRO-3 (arXiv 2410.20305).
PAPER = {
    "Capybara": 1.34,
    "HH-RLHF": 1.41,
    "MetaMath-DPO": 1.57,
    "TLDR": 1.35,
    "Tulu-HelpSteer": 1.48,
    "UltraFeedback": 1.17,
}
ENGINES = ("ddp", "fsdp2", "zero3")
# Steps before those that are timed, and those that are watched behind them.
FIRST, WATCHED = 3, 2
_ACCELERATE = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
_ZERO3 = {
    "zero_optimization": {"stage": 3, "overlap_comm": True, "stage3_prefetch_bucket_size": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": "auto"},
}


def pairs_of(name: str, options: argparse.Namespace) -> int:
    """Of a GPU and step."""
    if options.tokens is None:
        return options.pairs
    drawn = log_normal(name, *MEDIANS[name], 512, 1)
    at_once = options.tokens / (tokens_of(drawn)[0] / 512) / options.trl_pairs
    return max(round(at_once), 1) * options.trl_pairs


def make_case(name: str, gpus: int, options: argparse.Namespace) -> Case:
    """The steps of all GPUs."""
    steps = FIRST + options.steps + WATCHED
    return log_normal(name, *MEDIANS[name], pairs_of(name, options) * gpus, steps, row_length=options.row_length)


def timed(case: Case) -> Case:
    """Its steps that are timed."""
    return replace(case, lengths=case.lengths[FIRST : len(case.lengths) - WATCHED])


def tokens_of(case: Case) -> list[int]:
    """Of each step's sequences."""
    return [sum(len(parts) * prompt + sum(parts) for prompt, *parts in step) for step in case.lengths]


def busy_seconds(kernels: Sequence[Any], ranks: int) -> tuple[float, float]:
    """Seconds in which a kernel computes, and in which one computes or exchanges; with several ranks, behind the first that
    exchanges, by which they begin together."""
    exchanging = [event.time_range.end for event in kernels if event.name.lower().startswith("nccl")]
    begun = min(exchanging) if ranks > 1 else float("-inf")
    found = []
    for left_out in (("nccl", "memcpy", "memset"), ()):
        busy, until = 0.0, begun
        kept = [event.time_range for event in kernels if not event.name.lower().startswith(left_out)]
        for span in sorted(kept, key=lambda span: span.start):
            busy += max(span.end - max(span.start, until), 0.0)
            until = max(until, span.end)
        found.append(busy / 1e6)
    return found[0], found[1]


def watch(steps: int, cuda: bool, profile_kernels: bool):
    """A callback that times steps on the device and, behind these, watches some one by one; keeps their kernels if told to."""
    import time

    import torch
    from cards import heat
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self):
            self.ends: list[Any] = []
            self.watched: list[tuple[float, float, float]] = []  # computing, busy, whole
            self.kernels: list[Any] = []
            self.profiler: Any = None

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step < FIRST + steps:
                return
            if cuda:
                torch.cuda.synchronize()
                self.profiler = profile(activities=[ProfilerActivity.CUDA])
                self.profiler.__enter__()
                if torch.distributed.is_initialized():
                    torch.distributed.barrier()
                torch.cuda.synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step > FIRST + steps:
                if cuda:
                    torch.cuda.synchronize()
                    whole = time.perf_counter() - self.began
                    self.profiler.__exit__(None, None, None)
                    on_device = torch.autograd.DeviceType.CUDA
                    kernels = [event for event in self.profiler.events() if event.device_type == on_device]
                    self.watched.append((*busy_seconds(kernels, args.world_size), whole))
                    if profile_kernels:
                        self.kernels += kernels
                    self.profiler = kernels = None
                    gc.collect()  # else it may come within the next step, for so many events
                return
            if state.global_step < FIRST:
                return
            if cuda:
                if state.global_step == FIRST:
                    heat(3.0)
                self.ends.append(torch.cuda.Event(enable_timing=True))
                self.ends[-1].record()
            else:
                self.ends.append(time.perf_counter())

        def seconds(self) -> list[float]:
            if not cuda:
                return [other - one for one, other in pairwise(self.ends)]
            torch.cuda.synchronize()
            return [one.elapsed_time(other) / 1e3 for one, other in pairwise(self.ends)]

    return Watch()


def train(side: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Train in this process, one of several perhaps, and what was measured (the same on all ranks)."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    import preftree
    from preftree.trainers.balance import imbalance

    leave_out_warnings()
    cuda = not options.cpu
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(rank)
    config = shape(options.model)
    library = trl if side == "trl" else preftree
    own: dict[str, Any] = {"row_length": case.row_length, "share_prefixes": side == "preftree"}
    pairs = case.pairs // ranks
    at_once = min(options.trl_pairs, pairs) if side == "trl" else pairs
    args = library.DPOConfig(
        **({} if side == "trl" else own),
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=pairs // at_once,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=1e-6,
        logging_steps=1000,
        report_to="none",
        bf16=False,  # the weights are: no autocast
        use_cpu=not cuda,
        gradient_checkpointing=options.checkpointing,
        ddp_find_unused_parameters=False,
        train_sampling_strategy="sequential",
        dataloader_num_workers=2 if cuda else 0,
        max_length=None,
        disable_tqdm=True,
        save_strategy="no",
        **({"deepspeed": _ZERO3} if options.engine == "zero3" and ranks > 1 else {}),
    )
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        with torch.device("cuda" if cuda else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)
        model.generation_config.pad_token_id = 0
        models.append(model)

    tokenised = Dataset.from_list(
        [
            example
            for number, step in enumerate(case.lengths)
            for example in random_examples(step, number, config.vocab_size, False, False)
        ]
    )

    class Trainer(library.DPOTrainer):
        def _prepare_dataset(self, *given):
            return tokenised

    watched = watch(len(case.lengths) - FIRST - WATCHED, cuda, options.profile)
    trainer = Trainer(
        models[0],
        ref_model=models[1],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "2 ", "chosen": "3", "rejected": "4"}]),
        processing_class=tiny_tokenizer(config.vocab_size),
        callbacks=[watched],
    )
    del models, model
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()

    cost = ModelCost.from_config(config)
    device = trainer.args.device
    seconds = watched.seconds()
    case = timed(case)
    tokens = tokens_of(case)
    median = statistics.median(seconds)
    result = {
        "case": case.name,
        "side": side,
        "gpus": ranks,
        "engine": options.engine if ranks > 1 else "",
        "pairs": pairs,
        "seconds": median,
        "pairs_per_s": case.pairs * len(seconds) / sum(seconds),
        "tokens_per_s_per_gpu": sum(tokens) / sum(seconds) / ranks,
        "tflops_per_gpu": operations(case, cost, side) * len(seconds) / sum(seconds) / ranks / 1e12,
    }
    if cuda:
        peaks = trainer.accelerator.gather(torch.tensor([torch.cuda.max_memory_allocated() / 1e9], device=device))
        times_RS3 = trainer.accelerator.gather(torch.tensor(watched.watched, device=device)[None]).cpu()
        computing_RS, busy_RS, whole_RS = times_RS3.unbind(-1)
        whole_S = whole_RS.amax(0)
        result |= {
            "peak_gb": peaks.max().item(),
            "idle": float((1 - computing_RS.mean(0) / whole_S).mean()),
            "exchange": float(((busy_RS - computing_RS).mean(0) / whole_S).mean()),
            "imbalance": statistics.mean(imbalance(step) for step in computing_RS.T.tolist()),
        }
    if options.profile:
        result["kernels"] = by_kernel(watched.kernels, WATCHED)
    return result | {"at_random": waits(case, cost, ranks, balanced=False, shared=side == "preftree")}


def launch(
    side: str, gpus: int, names: Sequence[str], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], bool]:
    """One side of these cases in processes of its own, of those that it gets to, and whether it was interrupted."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.jsonl"
        worker = [__file__, *sys.argv[1:], "--only", *names, "--worker", side, str(gpus), str(out)]
        start = [sys.executable]
        environment = dict(os.environ)
        if gpus == 1:
            environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        else:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
            if options.engine == "fsdp2":
                environment |= _ACCELERATE | {"FSDP_RESHARD_AFTER_FORWARD": str(not options.no_reshard).lower()}
        interrupted = False
        process = subprocess.Popen([*start, *worker], env=environment)
        try:
            end = f"failed with exit status {process.wait(options.limit)}"
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
            interrupted = isinstance(stopped, KeyboardInterrupt)
            end = "interrupted" if interrupted else f"stopped after {options.limit} s"
            process.terminate()  # torchrun ends its processes then; killed, it would leave them behind
            process.wait()
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    for name in names[len(rows) :]:
        print(f"{name}, {side}, {gpus} GPUs: {end}", file=sys.stderr)
    return rows, interrupted


def work(side: str, gpus: int, out: Path, options: argparse.Namespace) -> None:
    """One side of all cases, in one of the processes."""
    import torch

    faulthandler.dump_traceback_later(0.9 * options.limit)
    for name in options.only:
        result = train(side, make_case(name, gpus, options), options)
        if int(os.environ.get("RANK", 0)) == 0:
            with out.open("a") as file:
                file.write(json.dumps(result) + "\n")
        gc.collect()
        if not options.cpu:
            torch.cuda.empty_cache()
    sys.stderr.flush()
    os._exit(0)  # leaving by the interpreter's own way, gloo's threads abort a rank now and then


def show(row: dict[str, Any], peak: float | None) -> None:
    shares = {"MFU": row["tflops_per_gpu"] / peak if peak else None}
    shares |= {name: row.get(name) for name in ("idle", "exchange", "imbalance", "at_random")}
    shown = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share is not None)
    print(
        f"{row['case']:<16}{row['side']:<10}{row['gpus']} x: {row['pairs_per_s']:.2f} pairs/s, "
        f"{row['tokens_per_s_per_gpu']:,.0f} tokens/s a GPU, {row.get('peak_gb', 0):.1f} GB, {shown}",
        flush=True,
    )


def scale(rows: Sequence[dict[str, Any]]) -> None:
    """What a GPU of several does of what one alone does, put into the rows: by operations, for steps are not equally long."""
    alone = {(row["case"], row["side"]): row for row in rows if row["gpus"] == 1}
    for row in rows:
        if row["gpus"] > 1 and (one := alone.get((row["case"], row["side"]))) is not None:
            row["of_one_gpu"] = share = row["tflops_per_gpu"] / one["tflops_per_gpu"]
            tokens = row["tokens_per_s_per_gpu"] / one["tokens_per_s_per_gpu"]
            print(
                f"{row['case']}, {row['side']}: a GPU of {row['gpus']} does {share:.3f} of the operations a second that one "
                f"alone does, {tokens:.3f} of the tokens"
            )


def compare(rows: Sequence[dict[str, Any]], case_of: Callable[[str, int], Case], cost: ModelCost) -> None:
    """Each case's ratios, beside what operations allow and the paper's, put into preftree's rows."""
    found = {(row["case"], row["gpus"], row["side"]): row for row in rows}
    for name, gpus in dict.fromkeys((row["case"], row["gpus"]) for row in rows):
        ours = found.get((name, gpus, "preftree"))
        for other in ("packed", "trl"):
            theirs = found.get((name, gpus, other))
            if ours is None or theirs is None:
                continue
            ours[f"over_{other}"] = ratio = ours["pairs_per_s"] / theirs["pairs_per_s"]
            line = f"{name}, {gpus} GPUs: preftree / {other} {ratio:.2f}x"
            if other == "packed":
                # What is projected goes by the rates of one GPU, so by its steps.
                case = timed(case_of(name, 1 if is_projected(ours) else gpus))
                ideal = operations(case, cost, "packed") / operations(case, cost, "preftree")
                ours |= {"operations": ideal, "paper": PAPER[name]}
                line += f" (operations {ideal:.2f}x: {ratio / ideal:.3f} of it; the paper {PAPER[name]}x)"
            print(line + ", a projection" * is_projected(ours))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, default=[8])
    parser.add_argument("--engine", choices=ENGINES, default="fsdp2", help="of several GPUs")
    parser.add_argument("--model", choices=("llama-3-8b", "qwen3-1.7b", "tiny"), default="llama-3-8b")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--only", nargs="+", choices=MEDIANS, default=list(MEDIANS), help="distributions")
    parser.add_argument("--pairs", type=int, default=64, help="of a GPU and step")
    parser.add_argument("--tokens", type=int, help="of a GPU and step, about, in place of --pairs")
    parser.add_argument("--trl-pairs", type=int, default=4, help="that TRL takes at once")
    parser.add_argument("--row-length", type=int, default=16384, help="of preftree's rows, at most")
    parser.add_argument("--steps", type=int, default=4, help="that are timed")
    parser.add_argument("--checkpointing", action="store_true", help="activations are computed again")
    parser.add_argument(
        "--no-reshard", action="store_true", help="FSDP2 keeps layers' weights whole from forward to backward"
    )
    parser.add_argument(
        "--project", nargs="+", type=int, default=[], help="numbers of GPUs of one host, by calculation"
    )
    parser.add_argument("--profile", action="store_true", help="which kernels the steps' time goes to, for --out (GPU)")
    parser.add_argument("--cpu", action="store_true", help="by gloo, to try the script")
    parser.add_argument(
        "--read", nargs="+", type=Path, default=[], help="CSVs of earlier calls: what they have is not measured"
    )
    parser.add_argument("--limit", type=int, default=600, help="seconds of a side")
    parser.add_argument("--out", type=Path, help="folder for a CSV")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tokens is None and options.pairs % min(options.trl_pairs, options.pairs):
        raise SystemExit("--trl-pairs must divide --pairs")
    if options.project and not {1, 2} <= set(options.gpus):
        raise SystemExit("--project needs --gpus 1 2: it goes by what one and two GPUs do")
    if options.worker:
        side, gpus, out = options.worker
        work(side, int(gpus), Path(out), options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    engine = options.engine + (" without resharding" if options.no_reshard else "")
    size = f"{options.pairs} pairs" if options.tokens is None else f"about {options.tokens} tokens"
    settings = f"{options.model}, {engine}, {size} a GPU and step, {options.steps} steps, rows of {options.row_length}"
    settings += ", activations computed again" * options.checkpointing
    earlier, kernels, heads = {}, [], {}
    for path in options.read:
        heads[str(path)], found = read(path)
        earlier |= {(row["gpus"], row["side"], row["case"]): row for row in found if not is_projected(row)}
    wanted = {
        (gpus, side): [name for name in options.only if (gpus, side, name) not in earlier]
        for gpus in options.gpus
        for side in options.sides
    }
    if any(wanted.values()):
        heads["here"] = f"{settings}; {versions()}{library_versions()}"
    head = list(heads.values())[-1]
    for place, told in heads.items():
        if told.split(";")[0] != settings or told != head:
            raise SystemExit(
                f"measured in another way or on another machine:\n{place}: {told}\nwanted: {settings}; {head}"
            )
    print(head, flush=True)
    card = None if options.cpu else next((kind for kind in PEAK if kind in head), None)

    def case_of(name: str, gpus: int) -> Case:
        return make_case(name, gpus, options)

    rows = list(earlier.values())
    for (gpus, side), names in wanted.items():
        if not names:
            continue
        found, interrupted = launch(side, gpus, names, options)
        for row in found:
            show(row, PEAK.get(card))
            place = {name: row[name] for name in ("case", "side", "gpus")}
            kernels += [place | kernel for kernel in row.pop("kernels", [])]
        rows += found
        if interrupted:
            break
    cost = ModelCost.from_config(shape(options.model))
    scale(rows)
    rows += [row for gpus in options.project for row in project(rows, options.only, case_of, gpus, cost)]
    compare(rows, case_of, cost)
    if options.out:
        count = "_".join(map(str, options.gpus))
        kind = options.engine + ("_whole" if options.no_reshard else "")
        name = f"paper_table_{options.model}_{kind}_{count}_{(card or 'cpu').lower()}"
        write(rows, options.out / f"{name}.csv", head)
        if kernels:
            write(kernels, options.out / f"{name}_kernels.csv", head)
    if not rows:
        raise SystemExit("nothing ran")


if __name__ == "__main__":
    main()
