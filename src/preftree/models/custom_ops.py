"""preftree's own operators for compiled layers, called with less ado than `torch.library.custom_op` makes of each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("preftree", "FRAGMENT")


def opaque(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """An operator that compilers do not look into, without a gradient of its own; `fake` says what its results look like."""
    return _operator(schema, "CompositeExplicitAutograd")


def composite(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """An operator that stands in captured graphs as one node and is compiled as the operators that its function calls."""
    return _operator(schema, "CompositeImplicitAutograd")


def fake(operator: Any) -> Callable[[Callable[..., Any]], Any]:
    """What results of an `opaque` operator look like, as a function of its arguments."""
    return torch.library.register_fake(operator.name(), lib=_LIBRARY)


def _operator(schema: str, key: str) -> Callable[[Callable[..., Any]], Any]:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)

    def register(function: Callable[..., Any]) -> Any:
        _LIBRARY.impl(name, function, key)
        operator = getattr(torch.ops.preftree, name).default
        operator.__doc__ = function.__doc__
        return operator

    return register
