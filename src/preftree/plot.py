"""Pictures: a row's trees and mask, training curves, length distributions. Text needs nothing, PNG needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from preftree.attention.mask import visible_nodes
from preftree.packing import PackedRow


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'preftree[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _cells(row: PackedRow, max_size: int) -> torch.Tensor:
    """The mask in at most ``max_size`` cells a side, a cell being 1 if anything in it is visible: bool ``[C, C]``."""
    visible = visible_nodes(row.to("cpu"))
    size = len(row)
    if size <= max_size:
        return visible
    factor = -(-size // max_size)
    padding = -size % factor
    padded = torch.nn.functional.pad(visible.float(), (0, padding, 0, padding))
    return torch.nn.functional.max_pool2d(padded[None], factor)[0].bool()


def _levels(row: PackedRow) -> list[int]:
    """How many runs stand above each of the row's runs."""
    levels: list[int] = []
    for _, _, before in row.runs:
        levels.append(levels[before] + 1 if before >= 0 else 0)
    return levels


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _tree_lines(row: PackedRow, most: int) -> list[str]:
    """The row's runs, indented below the run they continue."""
    counts = row.node_counts.tolist()
    lines = [
        f"{'  ' * level}{start}-{stop - 1}: {_count(stop - start, 'token')} in {_count(counts[start], 'sequence')}"
        for level, (start, stop, _) in zip(_levels(row), row.runs, strict=True)
    ]
    if len(lines) > most:
        lines = [*lines[:most], f"... and {len(lines) - most} more runs"]
    return [*lines, f"{row.num_tokens}-{len(row) - 1}: padding"] if row.num_tokens < len(row) else lines


def draw_row(row: PackedRow, path: str | Path | None = None, max_size: int = 64) -> str:
    """See `PackedRow.draw`."""
    cells = _cells(row, max_size)
    if path is None:
        mask = ["".join("#" if visible else "." for visible in line) for line in cells.tolist()]
        return "\n".join([repr(row), *_tree_lines(row, max_size), *mask])
    plt = _pyplot()
    figure, (tree, axes) = plt.subplots(1, 2, figsize=(11, 5.5))
    for level, (start, stop, before) in zip(_levels(row), row.runs, strict=True):
        first = int(row.position_ids[start])
        shade = 0.35 + 0.65 * min(int(row.node_counts[start]), 4) / 4
        tree.barh(
            (start + stop) / 2, stop - start, stop - start, left=first, color=plt.cm.Blues(shade), edgecolor="white"
        )
        if level:
            above = row.runs[before]
            tree.plot([first, first], [above[1], (start + stop) / 2], color="grey", linewidth=0.7)
    tree.set_xlabel("position in the sequence")
    tree.set_ylabel("index in the row")
    tree.set_ylim(len(row), 0)
    tree.set_title("runs, darker the more sequences share them", fontsize=10)
    axes.imshow(cells.numpy(), cmap="Blues", interpolation="nearest", extent=(0, len(row), len(row), 0))
    axes.set_xlabel("key (index in the row)")
    axes.set_ylabel("query")
    axes.set_title(f"mask: {row.num_sequences} sequences, {row.num_tokens} of {len(row)} tokens used", fontsize=10)
    return _save(figure, path)


def lengths_as_text(lengths: Mapping[str, Sequence[int]], bins: int = 12, width: int = 40) -> str:
    """Histograms of token counts, one below the other, a bar a line."""
    lines = []
    for name, values in lengths.items():
        step = max(-(-max(values) // bins), 1)
        counts = [0] * (max(values) // step + 1)
        for value in values:
            counts[value // step] += 1
        lines.append(name)
        for number, count in enumerate(counts):
            bar = "#" * -(-count * width // max(counts))
            lines.append(f"{number * step:>8}-{(number + 1) * step - 1:<8}{bar} {count or ''}".rstrip())
    return "\n".join(lines)


def _save(figure: Any, path: str | Path) -> str:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)
    return str(path)


def draw_curves(history: Sequence[Mapping[str, float]], path: str | Path) -> str:
    """Loss, rewards' margin and accuracy over steps, of training and evaluation; from a Trainer's ``log_history``."""
    plt = _pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.5))
    for axes, name in zip(panels, ("loss", "rewards/margins", "rewards/accuracies"), strict=True):
        for key, style in ((name, "-"), (f"eval_{name}", "o--")):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(
                    *zip(*points, strict=True), style, markersize=4, label="held out" if "eval" in key else "training"
                )
        axes.set_xlabel("step")
        axes.set_title(name)
        if axes.lines:
            axes.legend()
    return _save(figure, path)


def draw_lengths(lengths: Mapping[str, Sequence[int]], path: str | Path) -> str:
    """Histograms of token counts, one a panel."""
    plt = _pyplot()
    figure, panels = plt.subplots(1, len(lengths), figsize=(4 * len(lengths), 3.2), squeeze=False)
    for axes, (name, values) in zip(panels[0], lengths.items(), strict=True):
        axes.hist(values, bins=30)
        axes.set_title(name)
        axes.set_xlabel("tokens")
    return _save(figure, path)
