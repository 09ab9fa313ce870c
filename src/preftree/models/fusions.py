"""What a layer's captured graph is rewritten to before it is compiled: operations whose backward pass a compiler does badly.

Patterns are of operations, not of model families: whatever spells out an RMSNorm gets it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from preftree.models.rms_norm import MOST_READERS

_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.setitem)
_FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def fuse(module: GraphModule) -> None:
    """Rewrite a graph that Dynamo captured, in place: the same numbers, other operations.

    What writes into tensors may do so through any view of them, and at any place: such a graph stays as it is.
    """
    graph = module.graph
    if any(map(_writes, graph.nodes)):
        return
    for node in list(graph.find_nodes(op="call_function", target=torch.rsqrt)):
        _fuse_rms_norm(graph, node)
    graph.lint()
    module.recompile()


def _name(node: Any) -> str | None:
    """What a node computes, whether it is called as a function or as a method."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", None)


def _tensor(node: Any) -> torch.Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _before_cast(node: Any) -> Any:
    """What a node converts to another type, or the node itself."""
    return node.args[0] if _name(node) in ("to", "float", "type_as", "type") else node


def _writes(node: Node) -> bool:
    """Whether a node changes what it reads."""
    return (_name(node) or "").endswith("_") or node.target in _IN_PLACE or "out" in node.kwargs


def _only_user(node: Any) -> Any:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _erase(graph: Graph, *nodes: Node) -> None:
    """Take out what nobody reads any more, readers before what they read. A node may be given more than once."""
    for node in dict.fromkeys(nodes):
        if not node.users and _name(node) is not None:
            graph.erase_node(node)


def _mean_square(node: Any) -> Any:
    """``x`` of a node that is ``mean(x**2, -1, keepdim=True)``."""
    if _name(node) != "mean" or node.kwargs.get("dim", *node.args[1:2]) not in (-1, [-1], (-1,)):
        return None
    if node.kwargs.get("keepdim", *node.args[2:3] or (False,)) is not True or "dtype" in node.kwargs:
        return None
    square = node.args[0]
    if _name(square) in ("pow", "square") and square.args[1:] in ((2,), (2.0,), ()) and len(square.users) == 1:
        return square.args[0]
    if square.target is operator.mul and square.args[0] is square.args[1] and len(square.users) == 1:
        return square.args[0]
    return None


def _fuse_rms_norm(graph: Graph, root: Any) -> None:
    """Replace the RMSNorm around a reciprocal root, if it is one: ``scale * (x / rms(x))`` with whatever casts between."""
    added = root.args[0]
    if _name(added) != "add" or added.kwargs or len(added.users) != 1 or not isinstance(added.args[1], float):
        return
    mean, eps = added.args
    x32 = _mean_square(mean)
    if x32 is None or len(mean.users) != 1 or (value := _tensor(x32)) is None or value.dtype != torch.float32:
        return
    x = _before_cast(x32)
    normed = _only_user(root)
    if normed is None or normed.target is not operator.mul or set(normed.args) != {x32, root}:
        return
    # What is scaled, perhaps after a cast; and what is cast after that.
    rounded = _only_user(normed)
    if rounded is None or _before_cast(rounded) is not normed:
        rounded = normed
    scaled = _only_user(rounded)
    if scaled is None or scaled.target is not operator.mul or rounded not in scaled.args:
        return
    scale = scaled.args[1] if scaled.args[0] is rounded else scaled.args[0]
    result = _only_user(scaled)
    if result is None or _before_cast(result) is not scaled:
        result = scaled
    values: list[Any] = [_tensor(node) for node in (x, scale, rounded, result)]
    if any(value is None or value.dtype not in _FLOATING for value in values):
        return
    before, factor, inner, outer = values
    if factor.ndim != 1 or factor.shape[0] != before.shape[-1] or outer.shape != before.shape:
        return
    order = {node: place for place, node in enumerate(graph.nodes)}
    later = [user for user in x.users if order[user] > order[result]]
    readers = list(result.users)
    copies = max(1, min(len(readers), MOST_READERS))
    with graph.inserting_before(result):
        arguments = (x, scale, eps, inner.dtype, outer.dtype, copies)
        both = graph.call_function(torch.ops.preftree.rms_norm.default, arguments)
        results = graph.call_function(operator.getitem, (both, 1))
        fused = [graph.call_function(operator.getitem, (results, place)) for place in range(copies)]
        beside = graph.call_function(operator.getitem, (both, 0)) if later else x
    for node, value in ((beside, before), *((each, outer) for each in fused)):
        node.meta["example_value"] = value
    for place, reader in enumerate(readers):
        reader.replace_input_with(result, fused[min(place, copies - 1)])
    for user in later:
        user.replace_input_with(x, beside)
    _erase(graph, result, scaled, rounded, normed, root, added, mean, mean.args[0], x32)
