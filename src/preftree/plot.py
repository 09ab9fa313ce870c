"""Pictures: a row and its mask, training curves, length distributions. Text needs nothing, PNG needs matplotlib."""

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


def draw_row(row: PackedRow, path: str | Path | None = None, max_size: int = 64) -> str:
    """See `PackedRow.draw`."""
    cells = _cells(row, max_size)
    if path is None:
        lines = [repr(row)]
        lines += ["".join("#" if visible else "." for visible in line) for line in cells.tolist()]
        return "\n".join(lines)
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6, 6))
    axes.imshow(cells.numpy(), cmap="Blues", interpolation="nearest", extent=(0, len(row), len(row), 0))
    axes.set_xlabel("key (index in the row)")
    axes.set_ylabel("query")
    axes.set_title(f"{row.num_sequences} sequences, {row.num_tokens} of {len(row)} tokens used", fontsize=10)
    return _save(figure, path)


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
