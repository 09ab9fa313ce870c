"""What more GPUs of a host would do, by what one and two of them did. A projection is no measurement.

A GPU of n does so much of what one alone does:

    (1 - imbalance(n)) / (1 + exchange(n)),  exchange(n) = exchange(2) * 2 * (n - 1) / n

imbalance(n) is simulated: the share of a step that the mean rank waits for the slowest, if pairs are shared out as the side
shares them out (preftree's trainers by cost, TRL's as they come) and take as long as their operations
(`preftree.plan.ModelCost`). exchange(2) is what two GPUs took longer than one beyond that: weights gathered and gradients
added up that computing did not hide, as a share of computing. Each of n GPUs receives (n - 1) / n of these, through links of
its own (a host with NVSwitch; between hosts this does not hold).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ranks import waits
from step import SIDES, Case

from preftree.plan import ModelCost

_PROJECTION = "projection"


def is_projected(row: dict[str, Any]) -> bool:
    """Whether a table's row comes from `project`."""
    return row.get("engine") == _PROJECTION


def efficiency(of_two: float, waits_of_two: float, waits_of_all: float, gpus: int) -> float:
    """What a GPU of so many does of what one alone does (see the module), by what a GPU of two does of it."""
    exchange = max((1 - waits_of_two) / of_two - 1, 0.0)
    return (1 - waits_of_all) / (1 + exchange * 2 * (gpus - 1) / gpus)


def project(
    rows: Sequence[dict[str, Any]],
    names: Sequence[str],
    case_of: Callable[[str, int], Case],
    gpus: int,
    cost: ModelCost,
) -> list[dict[str, Any]]:
    """Rows for so many GPUs, of each case and side of which ``rows`` have one GPU and two (with "of_one_gpu").

    Args:
        case_of: a case by its name and the number of GPUs.
    """
    found = {(row["case"], row["gpus"], row["side"]): row for row in rows}
    projected = []
    for name in names:
        for side in SIDES:
            one, two = found.get((name, 1, side)), found.get((name, 2, side))
            if one is None or two is None:
                continue
            how = {"balanced": side != "trl", "shared": side == "preftree"}
            wait = waits(case_of(name, gpus), cost, gpus, **how)
            share = efficiency(two["of_one_gpu"], waits(case_of(name, 2), cost, 2, **how), wait, gpus)
            row = {"case": name, "side": side, "gpus": gpus, "engine": _PROJECTION, "pairs": one["pairs"]}
            row |= {"pairs_per_s": share * gpus * one["pairs_per_s"], "of_one_gpu": share, "imbalance": wait}
            row |= {rate: share * one[rate] for rate in ("tokens_per_s_per_gpu", "tflops_per_gpu")}
            projected.append(row)
            line = f"{name}, {side}, projection: a GPU of {gpus} would do {share:.3f} of what one alone does"
            print(f"{line} (imbalance {wait:.1%})")
    return projected
