"""Where preftree keeps on the disk what another process need not find out again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path | None:
    """A folder of the user's own, made if need be; None where none can be."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    try:
        folder = Path(base).expanduser() / "preftree" / name
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter without a home
        return None
    return folder
