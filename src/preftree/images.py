"""Images of a tree's or a row's sequences: what a processor makes of them, beside the tokens that stand for them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

# By the names of the model's arguments.
Inputs = dict[str, torch.Tensor]


@dataclass(eq=False)
class PromptImages:
    """The images of one prompt.

    Attributes:
        inputs: what the processor gives the model for these images alone (`pixel_values`, `image_grid_thw`, ...), of any
            shape; the first dimension is that along which those of several prompts are put together.
        length: how many leading tokens of the prompt hold the images' tokens.
        token_inputs: LongTensors ``[length]``, what the model is given beside these tokens (`mm_token_type_ids`,
            `token_type_ids`). Tokens behind them have 0.
    """

    inputs: Inputs
    length: int
    token_inputs: Inputs

    @cached_property
    def digest(self) -> bytes:
        """Equal for equal images."""
        digest = hashlib.sha256()
        for name, tensor in sorted((self.inputs | self.token_inputs).items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.digest()


@dataclass(eq=False)
class Images:
    """The images of a tree or of a row, in the order in which their tokens stand there.

    Attributes:
        sets: `PromptImages.inputs`, one for each place where a prompt with images stands.
        set_of: for each sequence the index of its set, -1 without images.
        token_inputs: LongTensors ``[S]`` that the model is given beside the tokens' ids.
    """

    sets: list[Inputs]
    set_of: list[int]
    token_inputs: Inputs

    @property
    def inputs(self) -> Inputs:
        """Arguments of the model for all of the images at once, tokens' (``[1, S]``) included.

        Raises:
            ValueError: if images are of different kinds, or of different shapes and nothing tells a model how large each is.
        """
        return _joined(self.sets) | {name: values[None] for name, values in self.token_inputs.items()}

    def alone(self, sequence: int, nodes: torch.Tensor) -> Inputs:
        """The same for one sequence by itself, which lies on these nodes ``[L]``."""
        place = self.set_of[sequence]
        own = {} if place < 0 else self.sets[place]
        return own | {name: values[nodes][None] for name, values in self.token_inputs.items()}

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for inputs in (*self.sets, self.token_inputs) for tensor in inputs.values()]

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> Images:
        """The same images with the next of others in place of `tensors`, in their order."""
        *sets, token_inputs = [{name: next(tensors) for name in inputs} for inputs in (*self.sets, self.token_inputs)]
        return Images(sets, self.set_of, token_inputs)


def _joined(sets: Sequence[Inputs]) -> Inputs:
    """Inputs of all prompts, one behind the other; what is smaller is filled up with zeros, as processors do it."""
    joined: Inputs = {}
    if len({tuple(sorted(inputs)) for inputs in sets}) > 1:
        raise ValueError(f"of some images a model would be given {sorted(sets[0])}, of others something else")
    for name in sets[0]:
        tensors = [inputs[name] for inputs in sets]
        shapes = {tensor.shape[1:] for tensor in tensors}
        if len(shapes) > 1:
            if all(each.is_floating_point() for each in sets[0].values()):
                raise ValueError(
                    f"{name}: images of different shapes, {sorted(map(list, shapes))}, and nothing says how large each is"
                )
            largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
            tensors = [_filled_up(tensor, largest) for tensor in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def _filled_up(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    missing = [size - own for size, own in zip(shape, tensor.shape[1:], strict=True)]
    return torch.nn.functional.pad(tensor, [width for size in reversed(missing) for width in (0, size)])
