"""How long ranks wait for the one that has most to do: a step's pairs shared out at random, and by cost. By simulation.

    python benchmarks/ranks.py [--pairs 8] [--steps 20] [--out benchmarks/results]

Pairs of log-normal lengths around UltraFeedback's medians (as in `packing`), each costing what its tree costs Qwen3-1.7B's
shape (`preftree.plan.ModelCost`: operations of layers, attention and head). Each rank has so many pairs of a step in the mean.
The figure is the share of a step that the mean rank waits, mean over the steps; what ranks tell each other is not in it.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
from step import MEDIANS, Case, log_normal, shape
from tables import write

from preftree.plan import ModelCost
from preftree.report import versions
from preftree.trainers.balance import assign, imbalance

RANKS = (2, 4, 8, 16, 64, 256, 1024)


def waits(case: Case, cost: ModelCost, ranks: int, balanced: bool, shared: bool = True) -> float:
    """Share of a step that the mean rank waits for the slowest one, mean over the case's steps.

    Args:
        balanced: pairs are shared out by cost, as preftree's trainers do it, or as they come.
        shared: a pair's prompt is computed once.
    """
    found = []
    for step in case.lengths:
        lengths = np.array(step, dtype=float)
        prompts, responses = lengths[:, 0], lengths[:, 1:]
        together = [responses] if shared else [response[:, None] for response in responses.T]
        costs = np.sum([cost.of_prompts(prompts, each) for each in together], axis=0)
        shares = assign(costs.tolist(), ranks) if balanced else np.arange(len(costs)).reshape(ranks, -1)
        found.append(imbalance([costs[share].sum() for share in shares]))
    return statistics.mean(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8, help="of a rank and step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lengths", choices=MEDIANS, default="UltraFeedback")
    parser.add_argument("--out", type=Path, help="folder for a CSV")
    options = parser.parse_args()
    cost = ModelCost.from_config(shape("qwen3-1.7b"))
    rows = []
    print(f"{options.lengths}, {options.pairs} pairs a rank\n{'ranks':>6}{'at random':>12}{'by cost':>10}")
    for ranks in RANKS:
        case = log_normal("", *MEDIANS[options.lengths], options.pairs * ranks, options.steps)
        row = {"ranks": ranks, "pairs": options.pairs}
        row |= {"at_random": waits(case, cost, ranks, False), "by_cost": waits(case, cost, ranks, True)}
        rows.append(row)
        print(f"{ranks:>6}{row['at_random']:>12.1%}{row['by_cost']:>10.2%}", flush=True)
    if options.out:
        write(rows, options.out / "ranks.csv", f"{options.lengths}; {versions()}")


if __name__ == "__main__":
    main()
