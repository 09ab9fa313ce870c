"""Decoder layers whose weights stay in the host's memory and come to the device for the time that they run: no gradients.

Two layers' worth of memory on the device take turns. While one layer runs, the next one's weights are copied from page-locked
memory on a stream of their own. A layer's parameters are the host's again as soon as it has run, so that whoever reads or
changes them between passes meets the weights themselves (who changes them waits for the device first: it may still copy).
"""

from __future__ import annotations

from typing import Any

import torch

from preftree.models.prepared import PreparedModel

# What kernels may expect of an address, in bytes.
_ALIGNED = 256


def offload_layers(prepared: PreparedModel, device: torch.device) -> None:
    """Keep a prepared model's decoder layers in the host's memory; the rest of it stays on the device.

    Raises:
        NotImplementedError: if layers cannot be told apart, share weights, or are quantised or sharded.
    """
    family = type(prepared.model).__name__
    layers = prepared.layers
    if layers is None:
        raise NotImplementedError(
            f"{family} cannot be offloaded: it has no list of its {prepared.attention_layers} layers"
        )
    weights = [weight for layer in layers for weight in layer.parameters()]
    if len({id(weight) for weight in weights}) < len(weights):
        raise NotImplementedError(f"{family} cannot be offloaded: its layers share weights")
    if getattr(prepared.model, "is_quantized", False):
        raise NotImplementedError(f"{family} cannot be offloaded: its weights are quantised")
    if any(type(weight) is not torch.nn.Parameter or weight.device != device for weight in weights):
        raise NotImplementedError(f"{family} cannot be offloaded: its layers' weights are sharded, or not on {device}")
    _Offloaded(list(layers), device)


class _Offloaded:
    """Brings weights to the device before a layer runs, and the next one's behind them."""

    def __init__(self, layers: list[torch.nn.Module], device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.device = device
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None
        self.parameters = [list(layer.parameters()) for layer in layers]
        self.places = [_places(parameters) for parameters in self.parameters]
        sizes = [places[-1][1] if places else 0 for places in self.places]
        self.hosts = []
        for parameters, places, size in zip(self.parameters, self.places, sizes, strict=True):
            host = torch.empty(size, dtype=torch.uint8, pin_memory=self.on_gpu)
            for parameter, own in zip(parameters, _views(host, parameters, places), strict=True):
                own.copy_(parameter.data)
                parameter.data = own
            self.hosts.append(host)
        self.buffers = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(2)]
        self.read: list[Any] = [None, None]  # by buffer: when the layer that had it was done
        self.ahead: tuple[int, Any] | None = None  # the layer whose weights are on their way, and when they are there
        for index, layer in enumerate(layers):
            # Before whatever else looks at the layer's arguments, the last one's cut among it.
            layer.register_forward_pre_hook(lambda *_, index=index: self._bring(index), prepend=True)
            layer.register_forward_hook(lambda *_, index=index: self._take_back(index), always_call=True)

    def _bring(self, index: int) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "layers that are offloaded to the host's memory run without gradients only: torch.no_grad()"
            )
        copied = self.ahead[1] if self.ahead is not None and self.ahead[0] == index else self._copy(index)
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)
        for parameter, own in zip(self.parameters[index], self._views_of(self.buffers[index % 2], index), strict=True):
            parameter.data = own
        self.ahead = (index + 1, self._copy(index + 1)) if index + 1 < len(self.hosts) else None

    def _take_back(self, index: int) -> None:
        for parameter, own in zip(self.parameters[index], self._views_of(self.hosts[index], index), strict=True):
            parameter.data = own
        if self.on_gpu:
            self.read[index % 2] = torch.cuda.current_stream(self.device).record_event()

    def _copy(self, index: int) -> Any:
        """Start to copy a layer's weights to its buffer; when they are there, on a GPU."""
        host, buffer, read = self.hosts[index], self.buffers[index % 2], self.read[index % 2]
        if self.stream is None:
            buffer[: len(host)].copy_(host)
            return None
        with torch.cuda.stream(self.stream):
            if read is not None:
                self.stream.wait_event(read)
            buffer[: len(host)].copy_(host, non_blocking=True)
            return self.stream.record_event()

    def _views_of(self, memory: torch.Tensor, index: int) -> list[torch.Tensor]:
        return _views(memory, self.parameters[index], self.places[index])


def _places(parameters: list[torch.nn.Parameter]) -> list[tuple[int, int]]:
    """Where each parameter begins and ends in the memory of all, in bytes."""
    places, end = [], 0
    for parameter in parameters:
        start = -(-end // _ALIGNED) * _ALIGNED
        end = start + parameter.numel() * parameter.element_size()
        places.append((start, end))
    return places


def _views(
    memory: torch.Tensor, parameters: list[torch.nn.Parameter], places: list[tuple[int, int]]
) -> list[torch.Tensor]:
    return [
        memory[start:end].view(parameter.dtype).view(parameter.shape)
        for parameter, (start, end) in zip(parameters, places, strict=True)
    ]
