"""What the products of a training step take on a GPU that is at its limit of power: how near the wall a step is.

    python benchmarks/products.py [--tokens 8192 --scored 2048] [--out benchmarks/results]

A step with a separate reference: each product of a decoder layer and of the head, forward for policy and reference and
backward for the policy, in bfloat16, as often as it stands in a step (the last layer's at scored tokens, but for its keys and
values). Long products one after the other draw more power than a card may, so that its clock falls: the time of one product
alone promises what no step can keep. So the card is heated first, and each product runs for a while, by cuBLAS and by the
kernels that layers use, in turns. For products that compute what stands behind them (gated MLPs, sums with the residual
stream) cuBLAS's column has the product alone. Microseconds are means over the rounds, by events on the device. Needs a GPU.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cards import heat
from tables import library_versions, write

from preftree.kernels import kernels_of
from preftree.report import versions


@dataclass
class Product:
    """A product of a step.

    Attributes:
        name: for the table.
        calls: how often a step has it.
        operations: of one call.
        methods: who computes it, by name.
    """

    name: str
    calls: float
    operations: float
    methods: dict[str, Callable[[], Any]]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def plain(name: str, calls: float, x: torch.Tensor, weight_ED: torch.Tensor) -> list[Product]:
    """``x weight^T`` forward for both models, and its two gradients; ``calls`` a model."""
    grad = random(len(x), len(weight_ED))
    operations = 2 * x.numel() * len(weight_ED)
    return [
        Product(f"{name}, forward", 2 * calls, operations, {"cuBLAS": lambda: x @ weight_ED.T}),
        Product(f"{name}, input's gradient", calls, operations, {"cuBLAS": lambda: grad @ weight_ED}),
        Product(f"{name}, weight's gradient", calls, operations, {"cuBLAS": lambda: grad.T @ x}),
    ]


def products_of(options: argparse.Namespace, kernels: Any) -> list[Product]:
    hidden, features = options.hidden, options.intermediate
    q_size, k_size = options.heads * options.head_size, options.groups * options.head_size
    x = random(options.tokens, hidden)
    # Layers project queries, keys and values by one product; the last one keys and values alone, and at scored tokens
    # queries and what follows.
    calls = options.layers - 1 + options.scored / options.tokens
    listed = plain("queries, keys, values", options.layers - 1, x, random(q_size + 2 * k_size, hidden))
    listed += plain("last keys, values", 2, x, random(k_size, hidden))
    listed += plain("last queries", 1, x[: options.scored], random(q_size, hidden))
    attended, output = random(options.tokens, q_size), random(hidden, q_size)
    listed += plain("attention's output", calls, attended, output)
    if kernels is not None:
        listed[-3].methods["fused"] = lambda: kernels.onto(attended, output, x)

    weights, down, grad = random(2 * features, hidden) / hidden**0.5, random(hidden, features), random(*x.shape)
    inner, both = random(options.tokens, features), x @ weights.T
    twice, once = 4 * x.numel() * features, 2 * x.numel() * features
    gated = {
        "gate and up, kept": (calls, twice, lambda: x @ weights.T, lambda by: by.up(x, weights, "swiglu", True)),
        "gate and up, reference": (calls, twice, lambda: x @ weights.T, lambda by: by.up(x, weights, "swiglu", False)),
        "down, forward": (2 * calls, once, lambda: inner @ down.T, lambda by: by.onto(inner, down, x)),
        "down, input's gradient": (
            calls,
            once,
            lambda: grad @ down,
            lambda by: by.up_backward(grad, down, both, "swiglu"),
        ),
        "down, weight's gradient": (calls, once, lambda: grad.T @ inner, None),
        "gate and up, input's gradient": (
            calls,
            twice,
            lambda: both @ weights,
            lambda by: by.input_gradient(both, weights),
        ),
        "gate and up, weights' gradient": (calls, twice, lambda: both.T @ x, lambda by: by.weight_gradients(both, x)),
    }
    for name, (count, operations, by_cublas, by_kernels) in gated.items():
        methods: dict[str, Callable[[], Any]] = {"cuBLAS": by_cublas}
        if kernels is not None and by_kernels is not None:
            methods["fused"] = lambda run=by_kernels: run(kernels)
        listed.append(Product(name, count, operations, methods))
    return listed + plain("head", 1, random(options.scored, hidden), random(options.vocabulary, hidden))


def under_load(product: Product, seconds: float, rounds: int) -> dict[str, float]:
    """Microseconds of a call by each method, in turns, without a pause between them."""
    # As many calls as take about that long at 650 TFLOP/s.
    calls = int(seconds * 6.5e14 / product.operations) + 1
    events: dict[str, list[Any]] = {name: [] for name in product.methods}
    names = list(product.methods)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            run = product.methods[name]
            for _ in range(calls // 4 + 1):
                run()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            for _ in range(calls):
                run()
            pair[1].record()
            events[name].append(pair)
    torch.cuda.synchronize()
    return {
        name: statistics.mean(start.elapsed_time(end) for start, end in pairs) / calls * 1e3
        for name, pairs in events.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("tokens", 8192, "of a row"),
        ("scored", 2048, "tokens of it that the head sees"),
        ("hidden", 2048, "size of hidden states (defaults: Qwen3-1.7B)"),
        ("intermediate", 6144, "features of the MLP"),
        ("heads", 16, "of queries"),
        ("groups", 8, "of keys and values"),
        ("head-size", 128, "of each head"),
        ("layers", 28, "of the model"),
        ("vocabulary", 151936, "tokens"),
        ("rounds", 4, "turns of each method"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    parser.add_argument("--seconds", type=float, default=0.2, help="of a turn (0.2)")
    parser.add_argument("--out", type=Path, help="folder for a CSV")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU")
    kernels = kernels_of("preftree.models.products_quack")
    refusal = "not installed" if kernels is None else kernels.refusal(torch.cuda.get_device_capability())
    if refusal is not None:
        print(f"no fused kernels: {refusal}")
        kernels = None
    head = f"{versions()}{library_versions()}"
    print(head)
    listed = products_of(options, kernels)
    for product in listed:
        for run in product.methods.values():
            run()
    heat(3.0)

    rows = []
    print(f"\n{'':<34}{'calls':>7}{'TFLOP':>8}{'cuBLAS us':>11}{'fused us':>10}{'TFLOP/s':>9}{'ms a step':>11}")
    for product in listed:
        found = under_load(product, options.seconds, options.rounds)
        used = found.get("fused", found["cuBLAS"])
        row: dict[str, Any] = {"product": product.name, "calls": product.calls}
        row["tflop"] = product.calls * product.operations / 1e12
        row |= {"cublas_us": found["cuBLAS"], "fused_us": found.get("fused")}
        row |= {"tflops": product.operations / used / 1e6, "ms_a_step": product.calls * used / 1e3}
        rows.append(row)
        fused = f"{row['fused_us']:.0f}" if "fused" in found else ""
        print(
            f"{product.name:<34}{product.calls:>7.1f}{row['tflop']:>8.2f}{row['cublas_us']:>11.0f}{fused:>10}"
            f"{row['tflops']:>9.0f}{row['ms_a_step']:>11.2f}"
        )
    total, tflop = (sum(row[key] for row in rows) for key in ("ms_a_step", "tflop"))
    by_cublas = sum(row["calls"] * row["cublas_us"] for row in rows) / 1e3
    print(
        f"\n{tflop:.1f} TFLOP a step: {total:.1f} ms, {tflop / total * 1e3:.0f} TFLOP/s; by cuBLAS alone {by_cublas:.1f} ms"
    )
    if options.out:
        card = torch.cuda.get_device_name().split()[1].lower()
        write(rows, options.out / f"products_{card}.csv", head)


if __name__ == "__main__":
    main()
