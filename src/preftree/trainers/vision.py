"""Examples with images: TRL's collator makes their tokens, and its processor what the model is given of the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jinja2 import TemplateError
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from preftree.images import PromptImages
from preftree.trainers.columns import IMAGE_COLUMNS, ROW
from preftree.trainers.groups import Group, Layout, truncate

# Of TRL's padded batch, what is no input of images.
_TOKENS = ("input_ids", "attention_mask", "completion_mask")


def holds_images(example: Mapping[str, Any]) -> bool:
    return any(example.get(name) is not None for name in IMAGE_COLUMNS)


def place_of(example: Mapping[str, Any]) -> str:
    """What messages call an example."""
    return f"row {example[ROW]}" if ROW in example else "an example"


def image_token_ids(processor: Any, config: Any) -> frozenset[int]:
    """What stands for images: a processor's and a model's word for it, which are not always the same."""
    ids = [
        getattr(source, name, None)
        for source in (processor, config)
        for name in ("image_token_id", "image_token_index")
    ]
    return frozenset(each for each in ids if isinstance(each, int))


@dataclass
class ImageReader:
    """Reads an example of the raw data, as TRL's vision collator tokenises it.

    Args:
        collator: TRL's, which cuts nothing.
        layout: how its batch is read and cut.
        image_token_ids: what stands for images, as processor and model say it.
        refuses_longer: raise for what is longer than max_length, in place of cutting it.
    """

    collator: DataCollatorForVisionPreference
    layout: Layout
    image_token_ids: frozenset[int]
    refuses_longer: bool = False

    def padded(self, max_length: int | None) -> DataCollatorForVisionPreference:
        """TRL's collator for whole batches."""
        return replace(self.collator, max_length=max_length)

    def __call__(self, example: Mapping[str, Any]) -> Group:
        """The sequences of an example, cut, with its images.

        Raises:
            ValueError: naming the row, if its images do not fit its text, or max_length cuts through them.
            NotImplementedError: for a processor whose output cannot be told apart by sequence.
        """
        where = place_of(example)
        given = {name: value for name, value in example.items() if value is not None and name != ROW}
        try:
            batch = self.collator([given])
        except ValueError as error:
            raise ValueError(f"{where}, its images: {error}") from error
        except TemplateError as error:
            raise ValueError(f"{where}: the chat template: {error}") from error
        (group,) = self.layout.from_padded(batch)
        images = self._images(batch, group, where)
        behind = 0 if images is None else images.length
        if any(token in self.image_token_ids for ids in group.sequences for token in ids[behind:]):
            raise ValueError(f"{where}: its text holds the token that stands for an image, without an image")
        self._check_length(group, images, where)
        cut = [
            truncate(ids, length, self.layout.max_length, self.layout.truncation_mode)
            for ids, length in zip(group.sequences, group.prompt_lengths, strict=True)
        ]
        sequences, prompt_lengths = [ids for ids, _ in cut], [length for _, length in cut]
        return replace(group, sequences=sequences, prompt_lengths=prompt_lengths, images=images)

    def _images(self, batch: Mapping[str, Any], group: Group, where: str) -> PromptImages | None:
        """What the batch holds beside tokens: once for each side, all of it the prompt's."""
        extra = {name: value for name, value in batch.items() if name not in _TOKENS}
        for name, value in extra.items():
            if not isinstance(value, torch.Tensor) or value.shape[0] % len(self.layout.sides):
                raise NotImplementedError(
                    f"{where}: the processor gives {name!r}, which cannot be told apart by sequence"
                )
        shape = batch["input_ids"].shape
        of_tokens = {
            name: value for name, value in extra.items() if value.shape == shape and not value.is_floating_point()
        }
        inputs = {name: self._of_one_side(value, name, where) for name, value in extra.items() if name not in of_tokens}
        if not inputs:
            return None
        prompt = group.sequences[0][: group.prompt_lengths[0]]
        marked = {index for values in of_tokens.values() for index in values[0].nonzero().flatten().tolist()}
        places = marked.union(index for index, token in enumerate(prompt) if token in self.image_token_ids)
        if not places:
            raise ValueError(
                f"{where}: it has images, but no image token in its prompt: does the chat template place them?"
            )
        length = max(places) + 1
        if length > len(prompt):
            raise ValueError(f"{where}: its completion holds a token that stands for an image")
        for name, values in of_tokens.items():
            if bool((values != values[:1]).any()):
                raise NotImplementedError(f"{where}: the processor's {name!r} differs between sequences of one prompt")
        token_inputs = {name: values[0, :length].long() for name, values in of_tokens.items()}
        return PromptImages(inputs, length, token_inputs)

    def _of_one_side(self, values: torch.Tensor, name: str, where: str) -> torch.Tensor:
        first, *others = values.chunk(len(self.layout.sides))
        if not all(torch.equal(first, other) for other in others):
            raise NotImplementedError(f"{where}: the processor's {name!r} differs between sequences of one prompt")
        return first.contiguous()

    def _check_length(self, group: Group, images: PromptImages | None, where: str) -> None:
        max_length, longest = self.layout.max_length, max(map(len, group.sequences))
        if max_length is None or longest <= max_length:
            return
        if self.refuses_longer:
            raise ValueError(f"{where}: {longest} tokens are more than max_length={max_length}: raise it")
        if images is not None and images.length > max_length:
            raise ValueError(
                f"{where}: max_length={max_length} cuts through its images, whose tokens end at {images.length}: raise it, or "
                "set it to None"
            )
