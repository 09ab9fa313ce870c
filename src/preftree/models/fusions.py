"""What a layer's captured graph is rewritten to before it is compiled: operations that a compiler does badly.

Patterns are of operations, not of model families: whatever spells out an RMSNorm or a gated MLP gets it.
"""

from __future__ import annotations

import inspect
import operator
from types import FunctionType
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from preftree.models import heads, products  # noqa: F401 (registers operators)
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
    # Norms behind the products, which leave their results fewer readers; what rotates norms behind these, and what projects
    # what they rotate.
    for names, rewrite in (
        (("silu", "gelu"), _fuse_gated_mlp),
        (("linear",), _fuse_residual),
        (("rsqrt",), _fuse_rms_norm),
        (("cat",), _fuse_rotation),
        (("row_attention.default",), _fuse_heads),
    ):
        for node in list(graph.nodes):
            if _name(node) in names:
                rewrite(graph, node)
    graph.lint()
    module.recompile()


def _called(node: Any) -> str | None:
    """What a node computes, whether it is called as a function or as a method."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", None)


def _name(node: Any) -> str | None:
    """What a node computes, as patterns name it: None for what is given by keyword alone, which stays as it is."""
    name = _called(node)
    return name if name is not None and node.args else None


def _tensor(node: Any) -> torch.Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _before_cast(node: Any) -> Any:
    """What a node converts to another type, or the node itself."""
    return node.args[0] if _name(node) in ("to", "float", "type_as", "type") else node


def _writes(node: Node) -> bool:
    """Whether a node changes what it reads."""
    named = (_called(node) or "").endswith("_") or node.target in _IN_PLACE
    return named or "out" in node.kwargs or _told_in_place(node)


def _told_in_place(node: Node) -> bool:
    """Whether a function of `torch.nn.functional` is given True for its argument ``inplace``, by name or by place."""
    if node.op != "call_function" or not isinstance(node.target, FunctionType):
        return False
    names = list(inspect.signature(node.target).parameters)
    return dict(zip(names, node.args, strict=False)).get("inplace", node.kwargs.get("inplace")) is True


def _only_user(node: Any) -> Any:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other(node: Any, operand: Any) -> Any:
    """Of a sum or product of two, the one that is not this one."""
    return node.args[1] if node.args[0] is operand else node.args[0]


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
    scale = _other(scaled, rounded)
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
    # Each that reads numbers gets a copy of its own; who asks for sizes has no gradient.
    readers = sorted(result.users, key=_asks_for_sizes, reverse=True)
    asking = sum(map(_asks_for_sizes, readers))
    copies = max(1, min(len(readers) - asking, MOST_READERS))
    with graph.inserting_before(result):
        arguments = (x, scale, eps, inner.dtype, outer.dtype, copies)
        both = graph.call_function(torch.ops.preftree.rms_norm.default, arguments)
        results = graph.call_function(operator.getitem, (both, 1))
        fused = [graph.call_function(operator.getitem, (results, place)) for place in range(copies)]
        beside = graph.call_function(operator.getitem, (both, 0)) if later else x
    for node, value in ((beside, before), *((each, outer) for each in fused)):
        node.meta["example_value"] = value
    for place, reader in enumerate(readers):
        reader.replace_input_with(result, fused[min(max(place - asking, 0), copies - 1)])
    for user in later:
        user.replace_input_with(x, beside)
    _erase(graph, result, scaled, rounded, normed, root, added, mean, mean.args[0], x32)


def _asks_for_sizes(node: Node) -> bool:
    return _called(node) in ("size", "dim", "getattr")


def _linear(node: Any) -> tuple[Any, Any] | None:
    """Input and weight of a product without a bias."""
    if _name(node) != "linear" or node.kwargs or node.args[2:] not in ((), (None,)):
        return None
    return node.args[:2]


def _gated_unit(node: Any) -> str | None:
    """The name of the gated unit with an activation."""
    if _name(node) == "silu" and node.kwargs in ({}, {"inplace": False}) and len(node.args) == 1:
        return "swiglu"
    if _name(node) == "gelu" and node.kwargs == {"approximate": "tanh"} and len(node.args) == 1:
        return "geglu"
    return None


def _added_to(node: Any) -> tuple[Any, Any]:
    """What is added to a node that nothing else reads, and the sum; or neither."""
    total = _only_user(node)
    if _name(total) != "add" or total.kwargs or len(total.args) != 2 or total.args[0] is total.args[1]:
        return None, None
    other = _other(total, node)
    values: list[Any] = [_tensor(each) for each in (node, other, total)]
    if any(v is None or v.dtype != values[0].dtype or v.shape != values[0].shape for v in values):
        return None, None
    return other, total


def _replace(graph: Graph, result: Any, target: Any, arguments: tuple[Any, ...], *inner: Any) -> None:
    """Compute a node otherwise, without those that it was computed from."""
    with graph.inserting_before(result):
        fused = graph.call_function(target, arguments)
    fused.meta["example_value"] = _tensor(result)
    result.replace_all_uses_with(fused)
    _erase(graph, result, *inner)


def _fuse_gated_mlp(graph: Graph, activated: Any) -> None:
    """Replace the gated MLP around an activation, if it is one that kernels serve: ``down(activation(gate(x)) * up(x))``."""
    unit, gate, gated = _gated_unit(activated), activated.args[0], _only_user(activated)
    if unit is None or _only_user(gate) is None or gated is None or gated.target is not operator.mul:
        return
    up = _other(gated, activated)
    down = _only_user(gated)
    if (ahead := _linear(gate)) is None or (beside := _linear(up)) is None or (behind := _linear(down)) is None:
        return
    if beside[0] is not ahead[0] or behind[0] is not gated or _only_user(up) is None:
        return
    operands = (*ahead, beside[1], behind[1])
    values: list[Any] = [_tensor(node) for node in (*operands, gate, up, down)]
    if any(value is None or value.dtype != values[0].dtype for value in values) or values[4].shape != values[5].shape:
        return
    if products.serves(*values[:4]):
        residual, total = _added_to(down)
        inner = (down, gated, activated, gate, up)
        _replace(graph, total or down, torch.ops.preftree.gated_mlp.default, (*operands, residual, unit), *inner)


def _fuse_residual(graph: Graph, node: Any) -> None:
    """Let a product be added to the residual stream as it is computed, if kernels serve it."""
    residual, total = _added_to(node)
    operands = _linear(node)
    if total is None or operands is None:
        return
    values: list[Any] = [_tensor(each) for each in (*operands, node)]
    if all(value is not None and value.dtype == values[0].dtype for value in values) and products.serves(*values[:2]):
        _replace(graph, total, torch.ops.preftree.linear_onto.default, (*operands, residual), node)


def _half(node: Any, x: Any, half: slice) -> bool:
    return _name(node) == "getitem" and node.args == (x, (Ellipsis, half))


def _rotation(turned: Any) -> tuple[Any, Any, Any, list[Any]] | None:
    """Heads, cosines, sines, and nodes from the sum on, of ``x cos + cat(-x's second half, x's first) sin``, if it is that."""
    parts, *dim = turned.args
    if not isinstance(parts, tuple | list) or len(parts) != 2 or turned.kwargs.get("dim", *dim) != -1:
        return None
    by_sin: Any = _only_user(turned)
    added: Any = None if by_sin is None else _only_user(by_sin)
    if added is None or _name(added) != "add" or added.kwargs or len(added.args) != 2 or _name(parts[0]) != "neg":
        return None
    second, first = parts[0].args[0], parts[1]
    x: Any = second.args[0] if _name(second) == "getitem" else None
    if (value := _tensor(x)) is None or not isinstance(size := value.shape[-1], int) or size % 2:
        return None
    if not _half(first, x, slice(None, size // 2, None)) or not _half(second, x, slice(size // 2, None, None)):
        return None
    by_cos: Any = _other(added, by_sin)
    if by_sin.target is not operator.mul or getattr(by_cos, "target", None) is not operator.mul:
        return None
    inner = [by_cos, by_sin, turned, parts[0], first, second]
    if set(x.users) != {by_cos, first, second} or any(len(node.users) != 1 for node in inner):
        return None
    return x, _other(by_cos, x), _other(by_sin, turned), [added, *inner]


def _fuse_rotation(graph: Graph, turned: Any) -> None:
    """Let an RMSNorm of heads be rotated by position as it is computed, where halves of heads are put together for it."""
    if (found := _rotation(turned)) is None:
        return
    x, cos, sin, (added, *inner) = found
    value, *angles = (_tensor(node) for node in (x, cos, sin))
    # x is the transpose of the only result of a norm that nothing else reads.
    if value is None or value.ndim != 4 or _name(x) != "transpose" or x.args[1:] != (1, 2):
        return
    expected = (value.shape[0], 1, *value.shape[2:])
    for angle in angles:
        if angle is None or angle.dtype != value.dtype or tuple(angle.shape) != expected or angle.requires_grad:
            return
    normed = x.args[0]
    if (results := _of_results(normed)) is None:
        return
    both = results.args[0]
    if any(len(node.users) != 1 for node in (normed, results, both)):
        return
    arguments = (*both.args[:5], cos, sin)
    _replace(graph, added, torch.ops.preftree.rms_norm_rotated.default, arguments, *inner, x, normed, results, both)


def _projected(heads_BSHD: Any) -> tuple[Any, Any, Any, list[Any]] | None:
    """Input, weight, head size and nodes of heads that are projected without a bias, if they are."""
    product: Any = heads_BSHD.args[0] if _name(heads_BSHD) in ("view", "reshape") else None
    operands, value = _linear(product), _tensor(heads_BSHD)
    if operands is None or value is None or value.ndim != 4 or any(len(x.users) != 1 for x in (heads_BSHD, product)):
        return None
    return *operands, value.shape[-1], [heads_BSHD, product]


def _fuse_heads(graph: Graph, attention: Any) -> None:
    """Project queries, keys and values by one product, if the former are normed and rotated and kernels serve."""
    q, k, v = attention.args[:3]
    rotated = torch.ops.preftree.rms_norm_rotated.default
    if _name(v) != "transpose" or v.args[1:] != (1, 2) or any(node.target is not rotated for node in (q, k)):
        return
    # (Others may read them before attention does, where the product will stand.)
    if q.args[2:] != k.args[2:] or any(len(node.users) != 1 for node in (q, k, v)):
        return
    found = [_projected(node.args[0]) for node in (q, k, v)]
    if any(each is None for each in found):
        return
    inputs, weights, sizes, inner = zip(*found, strict=True)
    sources = {_of_results(x) or x for x in inputs}
    x = inputs[0]
    values: list[Any] = [_tensor(each) for each in (x, *weights, *inner[0])]
    if len(sources) > 1 or any(each is None or each.dtype != values[0].dtype for each in values):
        return
    if values[0].ndim != 3 or q.args[4] != values[0].dtype or not products.serves(*values[:4]):
        return
    arguments = (x, *weights, q.args[1], k.args[1], *q.args[2:4], *q.args[5:], sizes[2])
    with graph.inserting_before(attention):
        together = graph.call_function(torch.ops.preftree.normed_heads.default, arguments)
        results = [graph.call_function(operator.getitem, (together, place)) for place in range(3)]
    for node, result in zip((q, k, v), results, strict=True):
        result.meta["example_value"] = _tensor(node)
        node.replace_all_uses_with(result)
    _erase(graph, q, k, v, *(node for nodes in inner for node in nodes))
    if (copies := _of_results(x)) is not None:
        _drop_copies(graph, copies)


def _of_results(node: Any) -> Any:
    """The results of an `rms_norm` that a node is one of, or None."""
    results: Any = node.args[0] if _name(node) == "getitem" else None
    both: Any = results.args[0] if _name(results) == "getitem" else None
    return results if both is not None and both.target is torch.ops.preftree.rms_norm.default else None


def _drop_copies(graph: Graph, results: Any) -> None:
    """Have an `rms_norm` give as many copies of its result as are read."""
    _erase(graph, *list(results.users))
    for place, copy in enumerate(list(results.users)):
        copy.args = (results, place)
    both = results.args[0]
    both.args = (*both.args[:5], len(results.users))
