"""`report.md` of a training run: curves, held-out figures, and what sharing saved."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers

from preftree.version import __version__

_SHOWN = (
    "loss",
    "nll_loss",
    "kl",
    "rewards/margins",
    "rewards/accuracies",
    "margin",
    "accuracy",
    "logps/chosen",
    "logps/rejected",
)


def write_report(
    directory: Path,
    history: Sequence[Mapping[str, float]],
    computed: Mapping[str, int],
    settings: Mapping[str, object],
    seconds: float,
) -> Path:
    """Write ``report.md`` and, with matplotlib, ``curves.png`` into a directory.

    Args:
        history: a Trainer's ``log_history``.
        computed: `TreeTrainer.computed`.
        settings: what to list under settings.
        seconds: of training.

    Returns:
        The report's path.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lines = ["# Training report", ""]
    try:
        from preftree.plot import draw_curves

        draw_curves(history, directory / "curves.png")
        lines += ["![loss, margins and accuracies](curves.png)", ""]
    except ImportError:
        lines += ["(no curves: matplotlib is not installed; `pip install 'preftree[plot]'`)", ""]
    for title, prefix in (("Training", ""), ("Held-out pairs", "eval_")):
        entries = [entry for entry in history if f"{prefix}loss" in entry]
        if not entries:
            continue
        lines += [f"## {title}", "", "| | first | last |", "| --- | --- | --- |"]
        for name in _SHOWN:
            key = prefix + name
            if key in entries[0] and key in entries[-1]:
                lines.append(f"| {name} | {entries[0][key]:.4f} | {entries[-1][key]:.4f} |")
        lines.append("")
    lines += ["## What sharing saved", "", *sharing_table(computed, seconds), "", "## Settings", ""]
    lines += ["| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in settings.items()]
    lines += [f"| versions | {versions()} |", ""]
    path = directory / "report.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def sharing_table(computed: Mapping[str, int], seconds: float) -> list[str]:
    """Markdown rows: tokens with and without sharing, fill of the rows, examples a second."""
    tokens, unshared = computed["tokens"], computed["unshared_tokens"]
    return [
        "| | |",
        "| --- | --- |",
        f"| examples trained on | {computed['examples']:,} |",
        f"| tokens without sharing | {unshared:,} |",
        f"| tokens computed | {tokens:,} ({unshared / max(tokens, 1):.2f}x fewer) |",
        f"| rows | {computed['rows']:,}, {tokens / max(computed['row_tokens'], 1):.1%} full |",
        f"| seconds of training | {seconds:.1f} ({computed['examples'] / max(seconds, 1e-9):.2f} examples/s) |",
    ]


def versions() -> str:
    """Machine and versions in one line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"preftree {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, {device}"
    )
