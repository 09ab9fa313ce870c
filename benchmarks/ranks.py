"""How long ranks wait for the one that has most to do: a step's pairs shared out at random, and by cost. By simulation.

    python benchmarks/ranks.py [--pairs 8] [--steps 20] [--out benchmarks/results]

Pairs of log-normal lengths around UltraFeedback's medians (as in `packing`), each costing what its tree costs Qwen3-1.7B's
shape (`preftree.plan.ModelCost`: operations of layers, attention and head). Each rank has so many pairs of a step in the mean.
The figure is the share of a step that the mean rank waits, mean over the steps; what ranks tell each other is not in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from step import MEDIANS, log_normal, shape
from tables import write

from preftree.plan import ModelCost
from preftree.report import versions
from preftree.trainers.balance import assign, imbalance

RANKS = (2, 4, 8, 16, 64, 256, 1024)


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
        waits: dict[str, list[float]] = {"at_random": [], "by_cost": []}
        for step in case.lengths:
            lengths = np.array(step, dtype=float)
            costs = cost.of_prompts(lengths[:, 0], lengths[:, 1:])
            waits["at_random"].append(imbalance(costs.reshape(ranks, -1).sum(1).tolist()))
            waits["by_cost"].append(imbalance([costs[share].sum() for share in assign(costs.tolist(), ranks)]))
        row = {"ranks": ranks, "pairs": options.pairs} | {
            name: float(np.mean(values)) for name, values in waits.items()
        }
        rows.append(row)
        print(f"{ranks:>6}{row['at_random']:>12.1%}{row['by_cost']:>10.2%}", flush=True)
    if options.out:
        write(rows, options.out / "ranks.csv", f"{options.lengths}; {versions()}")


if __name__ == "__main__":
    main()
