"""The tree's rule and the soft cap in CuTe DSL, as FlashAttention-4's kernels call them on entries of blocks.

The kernels put a branch around each entry and reduce its indices modulo the row when a mask reads auxiliary tensors, so
that every entry waits for a load of its own; on an H100 that doubles the time of a partial block. These masks get plain
addresses instead and load by an instruction that the compiler may neither move into a branch nor repeat: one load for
each key (or query) that a thread holds. The arrays must be as long as the kernels' last tile.

Importing this module needs flash-attn-4.
"""

# No `from __future__ import annotations`: CuTe DSL reads annotations as they are.

import hashlib
from functools import cache
from pathlib import Path

import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op
from flash_attn.cute.utils import scalar_to_ssa

# All that kernels with these masks are made of, see `flash_parts`.
_OWN = ("flash_mask", "flash_bits", "flash_order")
_SOURCE = hashlib.sha256(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in _OWN)).hexdigest()


def _told_apart(function, name):
    """With the attribute that FlashAttention-4 keys compiled kernels by; of itself it would not look at what this calls."""
    function.__cute_hash__ = f"preftree {name} {_SOURCE}"
    return function


@dsl_user_op
def _load(address: Int64, *, loc=None, ip=None) -> Int32:
    """The int32 at an address that no running kernel writes to."""
    return Int32(
        llvm.inline_asm(
            T.i32(),
            [Int64(address).ir_value(loc=loc, ip=ip)],
            "ld.global.nc.b32 $0, [$1];",
            "=r,l",
            has_side_effects=True,
            is_align_stack=False,
            asm_dialect=llvm.AsmDialect.AD_ATT,
            loc=loc,
            ip=ip,
        )
    )


@cute.jit
def load(base, index):
    """The int32 of an index, in an array that begins at an address."""
    return _load(Int64(base) + Int64(index) * 4)


@cute.jit
def _at(base, index):
    return scalar_to_ssa(load(base, index[0]), Int32)


@cute.jit
def tree_mask(batch, head, query, key, seqlen_info, tensors, scalars):
    """``key <= query < end[key]``; ``scalars``: address of `end`."""
    return (key <= query) & (query < _at(scalars[0], key))


@cute.jit
def tree_mask_by_entry(batch, head, query, key, seqlen_info, tensors, scalars):
    """`tree_mask` for kernels whose own class of masks asks for each entry: `flash_bits` knows it not."""
    return tree_mask(batch, head, query, key, seqlen_info, tensors, scalars)


@cute.jit
def tree_mask_from(batch, head, query, key, seqlen_info, tensors, scalars):
    """As `tree_mask`, from ``lowest[query]`` on; ``scalars``: addresses of `end`, positions and lowest positions."""
    seen = _at(scalars[1], key) >= _at(scalars[2], query)
    return (key <= query) & (query < _at(scalars[0], key)) & seen


@cute.jit
def tree_mask_of_two(batch, head, query, key, seqlen_info, tensors, scalars):
    """Where a query sees two runs of keys, the second up to itself; ``scalars``: addresses of the first run's start and stop
    and of the second run's start."""
    above = (key >= _at(scalars[0], query)) & (key < _at(scalars[1], query))
    return above | ((key >= _at(scalars[2], query)) & (key <= query))


_told_apart(tree_mask, "tree_mask")
_told_apart(tree_mask_by_entry, "tree_mask_by_entry")
_told_apart(tree_mask_of_two, "tree_mask_of_two")
_told_apart(tree_mask_from, "tree_mask_from")


@cache
def softcap_functions(softcap: float):
    """``c tanh(score / c)`` and its derivative times a gradient; FlashAttention-4's own take an approximate tanh."""

    @cute.jit
    def cap(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors, aux_scalars=None):
        return softcap * cute.math.tanh(score / softcap)

    @cute.jit
    def uncap(gradient, score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors, aux_scalars=None):
        value = cute.math.tanh(score / softcap)
        return gradient * (1.0 - value * value)

    return _told_apart(cap, f"cap {softcap!r}"), _told_apart(uncap, f"uncap {softcap!r}")
