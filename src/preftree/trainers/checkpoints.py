"""Checkpoints that say whether they are whole: a run that is killed while it saves goes on from the last good one.

While a checkpoint is written a mark stands beside it; the last thing written is a list of its files with their sizes and
hashes, and the mark goes. Checkpoints of other trainers have neither and are taken as they are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

_FILES = "preftree_files.json"
_CHUNK = 1 << 24


class KeepsCheckpoints(Trainer):
    """A trainer that goes on from whole checkpoints, and takes older ones away when a new one is whole."""

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                found = [to_resume(resume_from_checkpoint, Path(self.args.output_dir))]
            except ValueError as error:
                found = [error]
        if self.args.world_size > 1:
            broadcast_object_list(found)
        if isinstance(found[0], ValueError):
            raise found[0]
        return super().train(found[0], *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            begin(folder)
        self.accelerator.wait_for_everyone()
        # Older ones go when this one is whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                finish(folder)
        except (OSError, SafetensorError) as error:
            discard(folder)
            last, _ = last_good(run)
            raise OSError(
                f"checkpoint {folder} could not be written, and what there was of it is gone: {error}. The last good one is "
                f"{last}: go on with resume_from_checkpoint=True"
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)


def begin(folder: Path) -> None:
    """Mark a checkpoint as one that is being written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _mark(folder).touch()
    _sync(folder.parent)


def finish(folder: Path) -> None:
    """List a checkpoint's files, which are on the disk by then, and take its mark away."""
    files: dict[str, Any] = {}
    for path in _files_of(folder):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "xxh3_128": _hash_of(path)}
    temporary = folder / f"{_FILES}.part"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(files, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / _FILES)
    _sync(folder)
    _mark(folder).unlink()
    _sync(folder.parent)


def discard(folder: Path) -> None:
    """Take away what has been written of a checkpoint that cannot be finished: the disk may be full."""
    shutil.rmtree(folder, ignore_errors=True)
    _mark(folder).unlink(missing_ok=True)


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is whole, or not one of these."""
    if _mark(folder).exists():
        return "it was not written to its end"
    listed = folder / _FILES
    if not listed.is_file():
        return None
    try:
        files = json.loads(listed.read_text(encoding="utf-8"))
        expected = {name: (entry["size"], entry["xxh3_128"]) for name, entry in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{_FILES} is damaged"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes in place of {size}"
        if _hash_of(path) != digest:
            return f"{name} has changed since it was written"
    return None


def last_good(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The latest whole checkpoint in a folder, None if there is none, and what is wrong with each later one."""
    faults: list[str] = []
    for folder in _checkpoints(output_dir):
        if (fault := fault_of(folder)) is None:
            return folder, faults
        faults.append(f"{folder}: {fault}")
    return None, faults


def to_resume(asked: str | bool | None, output_dir: Path) -> str | None:
    """The checkpoint to go on from, None for none; warns of later ones that are passed over.

    Args:
        asked: as for `transformers.Trainer.train`: a folder, or True for the last good one in ``output_dir``.

    Raises:
        ValueError: for a folder that is damaged, naming the file, and if there is no good one.
    """
    if asked is None or asked is False:
        return None
    if asked is not True:
        if (fault := fault_of(Path(asked))) is not None:
            raise ValueError(
                f"checkpoint {asked} is damaged: {fault}. Go on from another one (True takes the last good one)"
            )
        return asked
    folder, faults = last_good(output_dir)
    if folder is None:
        known = "; ".join(faults) if faults else "there is none"
        raise ValueError(f"no good checkpoint to go on from in {output_dir}: {known}")
    for fault in faults:
        warnings.warn(f"damaged checkpoint passed over: {fault}. Going on from {folder}", UserWarning, stacklevel=3)
    return str(folder)


def _checkpoints(output_dir: Path) -> list[Path]:
    """Latest first."""
    if not output_dir.is_dir():
        return []
    steps = {}
    for path in output_dir.iterdir():
        if path.is_dir() and (found := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)):
            steps[int(found[1])] = path
    return [steps[step] for step in sorted(steps, reverse=True)]


def _mark(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.unfinished"


def _files_of(folder: Path) -> Iterator[Path]:
    own = {_FILES, f"{_FILES}.part"}
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in own)


def _hash_of(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Names in a folder, on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
