"""Tables and pictures of results, and what they were measured with."""

from __future__ import annotations

import csv
import textwrap
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def write(rows: Sequence[dict[str, Any]], path: Path, head: str) -> None:
    """A CSV with machine and versions in its first line, a comment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {head}\n")
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print(f"wrote {path}")


def read(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """What `write` has written: the head, and rows without what is empty in them."""
    with path.open(newline="", encoding="utf-8") as file:
        head = file.readline().removeprefix("# ").rstrip("\n")
        rows = [{key: _number(value) for key, value in row.items() if value != ""} for row in csv.DictReader(file)]
    return head, rows


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def library_versions() -> str:
    """What belongs behind `preftree.report.versions` where kernels are timed."""
    found = ""
    # (Those whose absence is not told serve hybrid models alone.)
    for package, told in {
        "flash-attn-4": True,
        "quack-kernels": True,
        "causal-conv1d": False,
        "flash-linear-attention": False,
        "triton": True,
    }.items():
        try:
            found += f", {package} {version(package)}"
        except PackageNotFoundError:
            found += f", no {package}" * told
    return found


def leave_out_warnings() -> None:
    """Of others: preftree's own say that what is timed is not what it should be, kernels that do not load for one."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module="preftree")


def draw(values: Sequence[tuple[str, str, float]], path: Path, title: str, unit: str) -> None:
    """Bars of ``(case, method, value)``, the methods side by side in each case; says so where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    names, methods = (list(dict.fromkeys(value[place] for value in values)) for place in (0, 1))
    figure, axes = plt.subplots(figsize=(2 + 1.6 * len(names), 5))
    width = 0.8 / max(len(methods), 1)
    for index, method in enumerate(methods):
        found = {case: value for case, other, value in values if other == method}
        places = [i + width * (index - len(methods) / 2) for i, name in enumerate(names) if name in found]
        color = plt.get_cmap("tab20")(index % 20)
        axes.bar(places, [found[name] for name in names if name in found], width, label=method, color=color)
    axes.set_xticks(range(len(names)), [textwrap.fill(name, 22) for name in names], fontsize=7)
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")
