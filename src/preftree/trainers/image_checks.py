"""What is wrong with preference data's images, said with the row and the column, before any training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Image, IterableDataset
from pyarrow import ArrowException

from preftree.trainers.columns import IMAGE_COLUMNS, PAIR_FIELDS, ROW, columns_of


def with_images(dataset: Dataset | IterableDataset, source: str, check: Callable[..., Any]) -> Any:
    """A data set with a column of images, which it gives decoded, checked; its rows numbered in a column.

    Args:
        check: called with each example, without its images, and with where it stands. A stream is checked as it comes.

    Raises:
        ValueError: naming row and column, for missing images, or as many of them as the prompt has no place for.
    """
    column = next(name for name in IMAGE_COLUMNS if name in columns_of(dataset))

    def checked(example: dict[str, Any], index: int) -> None:
        where = f"{source}, row {index}"
        check({name: value for name, value in example.items() if name != column}, where)
        _check_images(example, column, where)

    kinds = [Image(decode=decode) for decode in (True, False)]
    wanted, undecoded = kinds if column == "image" else map(datasets.Sequence, kinds)
    own = (dataset.features or {column: wanted})[column]
    try:
        dataset = dataset if own == wanted else dataset.cast_column(column, wanted)
    except (TypeError, ValueError, ArrowException) as error:
        raise ValueError(
            f"{source}, column {column!r}: its values ({own}) are no images, nor paths of image files, nor {{'bytes', 'path'}}"
        ) from error
    if isinstance(dataset, IterableDataset):

        def marked(example: dict[str, Any], index: int) -> dict[str, Any]:
            checked(example, index)
            return {**example, ROW: index}

        return dataset.map(marked, with_indices=True)
    for index, example in enumerate(dataset.cast_column(column, undecoded)):
        checked(example, index)
    return dataset.add_column(ROW, list(range(len(dataset))))


def _check_images(example: Mapping[str, Any], column: str, where: str) -> None:
    images = example[column]
    if images is None:
        raise ValueError(f"{where}, column {column!r}: it is missing")
    images = [images] if column == "image" else images
    for number, image in enumerate(images):
        which = f"{where}, column {column!r}" + (f", image {number}" if column == "images" else "")
        if image is None:
            raise ValueError(f"{which}: it is missing")
        path = image.get("path") if isinstance(image, Mapping) and image.get("bytes") is None else None
        if path is not None and "://" not in path and not Path(path).is_file():
            raise ValueError(f"{which}: there is no file {path}")
    if not isinstance(example["prompt"], list):
        return  # plain text: what stands for images in it, the processor knows
    places = {name: _image_places(example[name]) for name in ("prompt", *PAIR_FIELDS)}
    for name in PAIR_FIELDS:
        if places[name]:
            raise ValueError(f"{where}, field {name!r}: it has a place for an image, but images belong into the prompt")
    text = any(message["role"] == "user" and isinstance(message.get("content"), str) for message in example["prompt"])
    if places["prompt"] != len(images) and not (places["prompt"] == 0 and text):
        raise ValueError(
            f"{where}, column {column!r}: {len(images)} images, but the prompt has {places['prompt']} places for them "
            "({'type': 'image'})"
        )


def _image_places(messages: Any) -> int:
    parts = [part for message in messages for part in message.get("content") or () if isinstance(part, Mapping)]
    return sum(part.get("type") == "image" for part in parts)
