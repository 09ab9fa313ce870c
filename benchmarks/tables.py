"""Tables of results, and what they were measured with."""

from __future__ import annotations

import csv
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


def library_versions() -> str:
    """What belongs behind `preftree.report.versions` where kernels are timed."""
    found = ""
    for package in ("flash-attn-4", "triton"):
        try:
            found += f", {package} {version(package)}"
        except PackageNotFoundError:
            found += f", no {package}"
    return found
