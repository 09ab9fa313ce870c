"""Fits the cost model of `preftree.attention.cost` on this GPU and prints its factors.

    python benchmarks/attention_cost.py [--sizes 64 128 256] [--backends flash varlen flex]

Rows of many shapes (pairs, lists of responses, a system prompt over several prompts, uneven lengths) are timed with each
backend, forward and backward; the factors are the non-negative ones with the smallest squared relative error. A second set
of rows that the fit has not seen tells how far the backend that the model chooses is behind the best one. All times go to
`benchmarks/results/attention_cost_<device>.csv`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import attention as bench
import numpy as np
import torch
from tables import library_versions, write

from preftree.attention import BACKENDS, Layer, cost
from preftree.attention.cost import Work
from preftree.attention.mask import CAUSAL, sliding_window
from preftree.packing import static_length
from preftree.report import versions

NAMES = ("flash", "varlen", "flex")


def uneven(count: int, prompt: int, response: int, responses: int, seed: int) -> bench.Case:
    """``count`` prompts with responses of log-normal lengths around the given ones."""
    generator, draw = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    trees = []
    for index in range(count):
        lengths = np.exp(np.log([prompt] + [response] * responses) + 0.5 * draw.standard_normal(responses + 1))
        first, *others = np.clip(lengths, 4, 20000).astype(int).tolist()
        shared = bench.tokens(generator, first, index)
        trees.append([shared + bench.tokens(generator, length, i) for i, length in enumerate(others)])
    return bench.Case(f"{count} uneven ({prompt}, {responses} x {response}) {seed}", trees)


def alone(count: int, length: int) -> bench.Case:
    """Sequences that share nothing."""
    generator = torch.Generator().manual_seed(0)
    return bench.Case(f"{count} x {length} alone", [[bench.tokens(generator, length, i)] for i in range(count)])


def fitting_rows() -> list[bench.Case]:
    return [
        bench.pairs_of(1, 6144, 1024, 1024),
        bench.pairs_of(2, 3000, 700, 900),
        bench.pairs_of(6, 900, 300, 200),
        bench.pairs_of(12, 200, 400, 350),
        bench.pairs_of(40, 100, 90, 110),
        bench.pairs_of(100, 60, 30, 30),
        bench.pairs_of(3, 600, 300, 300, 300, 300),
        bench.pairs_of(16, 250, 100, 100, 100, 100),
        uneven(8, 700, 450, 2, 0),
        uneven(60, 120, 60, 2, 1),
        uneven(5, 120, 290, 4, 2),
        bench.system_prompt(400, 6, 300, 3, 200),
        alone(16, 1000),
    ]


def held_out_rows() -> list[bench.Case]:
    return [
        uneven(10, 700, 180, 2, 10),
        uneven(20, 380, 35, 2, 11),
        uneven(30, 120, 290, 2, 12),
        uneven(80, 127, 59, 2, 13),
        uneven(4, 3000, 1000, 2, 14),
        alone(30, 500),
    ]


def windowed(cases: list[bench.Case], windows: tuple[int, ...]) -> list[bench.Case]:
    """The same trees under sliding windows."""
    return [
        bench.Case(f"{case.name} window {window}", case.trees, sliding_window(window))
        for case in cases
        for window in windows
    ]


def static(case: bench.Case) -> bench.Case:
    """The same trees in a row of one of a few lengths: FlexAttention compiles for each."""
    return bench.Case(case.name, case.trees, case.rule, row_length=static_length(case.row.num_tokens, block=4096))


def milliseconds(case: bench.Case, shape: bench.Shape, backend: str, repeats: int) -> float:
    forward, inputs, gradient = bench.tree_method(case, shape, backend)()
    return bench.timed(lambda: torch.autograd.grad(forward(), inputs, gradient), repeats).median


def non_negative(features: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Factors >= 0 with the smallest squared relative error: the best of all subsets of features."""
    weighted, ones = features / times[:, None], np.ones(len(times))
    best, found = np.inf, np.zeros(features.shape[1])
    for count in range(1, features.shape[1] + 1):
        for chosen in map(list, combinations(range(features.shape[1]), count)):
            solution = np.linalg.lstsq(weighted[:, chosen], ones, rcond=None)[0]
            error = float(((weighted[:, chosen] @ solution - 1) ** 2).sum())
            if (solution >= 0).all() and error < best:
                best, found = error, np.zeros(features.shape[1])
                found[chosen] = solution
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--backends", nargs="+", choices=NAMES, default=list(NAMES), help="fit these, keep the others")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the cost model is for GPUs: there is none here")
    print(versions() + library_versions(), flush=True)
    capability = torch.cuda.get_device_capability()
    fitted = cost.FACTORS.setdefault(capability[0], {})
    times: list[dict[str, object]] = []
    for size in options.sizes:
        shape = bench.Shape(32, 8, size, torch.bfloat16)
        layer = Layer("cuda", capability, torch.bfloat16, 32, 8, size, size, CAUSAL)
        able = [name for name in options.backends if BACKENDS[name].refusal(layer) is None]
        rows, unseen = fitting_rows(), held_out_rows()
        fitted.setdefault(size, {})
        kinds = [("", able, rows, unseen)]
        # FlexAttention's time under a window stays above the others': it would only have to be compiled again.
        narrow = [name for name in able if name != "flex"]
        kinds.append((" window", narrow, windowed(rows[:6] + rows[-2:-1], (256, 1500)), windowed(unseen[:5:2], (512,))))
        for kind, names, seen, new in kinds:
            cases = [static(case) for case in seen]
            for name in names:
                spent = np.array([milliseconds(case, shape, name, options.repeats) for case in cases])
                features = np.array([Work.of(case.row, case.rule.window).features(name) for case in cases])
                factors = non_negative(features, spent)
                fitted[size][name + kind] = tuple(float(f"{factor:.4g}") for factor in factors)
                times += [
                    timing(case, size, name, "fitted", ms, expected)
                    for case, ms, expected in zip(cases, spent, features @ factors, strict=True)
                ]
                worst = np.abs(features @ factors / spent - 1).max()
                print(
                    f"  {size} {name}{kind}: {fitted[size][name + kind]}, within {worst:.1%} on {len(cases)} rows",
                    flush=True,
                )
            for case in map(static, new):
                times += report(case, shape, replace(layer, rule=case.rule), names, options.repeats)
    machine = torch.cuda.get_device_name().split()[1].lower()
    write(times, options.out / f"attention_cost_{machine}.csv", versions() + library_versions())
    print(f"FACTORS = {{{capability[0]}: {fitted}}}")


def timing(case: bench.Case, size: int, backend: str, kind: str, ms: float, expected: float) -> dict[str, object]:
    return {
        "size": size,
        "row": case.name,
        "set": kind,
        "backend": backend,
        "ms": round(ms, 4),
        "expected_ms": round(expected, 4),
    }


def report(
    case: bench.Case, shape: bench.Shape, layer: Layer, names: list[str], repeats: int
) -> list[dict[str, object]]:
    """How far the backend that the model chooses for a row is behind the best one."""
    measured = {name: milliseconds(case, shape, name, repeats) for name in names}
    chosen = cost.fastest(names, layer, case.row)
    behind = measured[chosen] / min(measured.values()) - 1
    work = Work.of(case.row, case.rule.window)
    expected = {name: cost.estimate(name, layer, work) or 0.0 for name in names}
    listed = ", ".join(f"{name} {time:.3f} ms (expected {expected[name]:.3f})" for name, time in measured.items())
    print(f"  {layer.size} {case.name}: chose {chosen}, {behind:.1%} behind the best: {listed}", flush=True)
    return [timing(case, layer.size, name, "held out", measured[name], expected[name]) for name in names]


if __name__ == "__main__":
    main()
