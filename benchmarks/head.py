"""The output head and the log-probabilities of its tokens: preftree against libraries' kernels, forward and backward.

    python benchmarks/head.py [--tokens 4096] [--vocabularies 32000 151936 262144]

Each method gives the log-probability of one target a token, from hidden states and the head's weights, and the gradients of
both for an arbitrary weight of each token. "statistics" also gives entropy, mean logit and whether the target is the most
probable token, which TRL's metrics want. Error: of log-probabilities (largest difference), and of both gradients (relative
norm of the difference), against float64 from the same bfloat16 numbers on the first 256 tokens. Milliseconds are medians on
the device; memory is the peak beyond the inputs and their gradients. Needs a GPU; what is not installed is left out.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from attention import timed
from tables import library_versions, write

from preftree.logprobs import _score_nodes
from preftree.report import versions
from preftree.token_scores import _statistics, token_scores

Method = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def in_torch(statistics: bool) -> Method:
    """Logits in float32, log-sum-exp and gather: what the kernels replace."""

    def run(hidden, weight, targets):
        logits = (hidden @ weight.T).float()
        log_z = logits.logsumexp(-1)
        if statistics:
            with torch.no_grad():
                _statistics(logits, log_z, targets)
        return logits.gather(-1, targets[:, None])[:, 0] - log_z

    return run


def by_preftree(statistics: bool, chunked: bool = True) -> Method:
    """As `sequence_logps` does it: chunks whose logits are computed again in the backward pass."""

    def run(hidden, weight, targets):
        if not chunked:
            return token_scores(hidden @ weight.T, targets, statistics)["token_logps"]
        head: Any = SimpleNamespace(vocabulary_size=len(weight), logits=lambda some: some @ weight.T)
        return _score_nodes(head, hidden, targets, statistics)["token_logps"]

    return run


def by_cut_cross_entropy(hidden, weight, targets):
    from cut_cross_entropy import linear_cross_entropy

    # Without filtering: by default gradients below the type's epsilon are left out.
    return -linear_cross_entropy(hidden, weight, targets, reduction="none", filter_eps=None)


def by_liger(hidden, weight, targets):
    from liger_kernel.transformers.functional import liger_cross_entropy

    return -liger_cross_entropy(hidden @ weight.T, targets, reduction="none")


METHODS: dict[str, Method] = {
    "torch": in_torch(False),
    "torch, statistics": in_torch(True),
    "preftree": by_preftree(False),
    "preftree, statistics": by_preftree(True),
    "preftree, statistics, in one chunk": by_preftree(True, chunked=False),
    "cut-cross-entropy, exact": by_cut_cross_entropy,
    "Liger cross entropy": by_liger,
}


def errors(method: Method, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Against float64."""
    few, upstream = hidden[:256], torch.linspace(-1, 1, 256, device=hidden.device)
    found = []
    for run, dtype in ((method, hidden.dtype), (exact, torch.float64)):
        h, w = (x.detach().to(dtype).requires_grad_() for x in (few, weight))
        logps = run(h, w, targets[:256])
        gradients = torch.autograd.grad(logps, (h, w), upstream.to(logps.dtype))
        found.append([x.detach().double() for x in (logps, *gradients)])
        del h, w, gradients
    (logps, dh, dw), (logps_64, dh_64, dw_64) = found
    return {
        "logps_error": float((logps - logps_64).abs().max()),
        "hidden_grad_error": float((dh - dh_64).norm() / dh_64.norm()),
        "weight_grad_error": float((dw - dw_64).norm() / dw_64.norm()),
    }


def exact(hidden, weight, targets):
    return (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def measure(method: Method, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, repeats: int) -> Any:
    upstream = torch.linspace(-1, 1, len(targets), device=hidden.device)
    h, w = (x.detach().requires_grad_() for x in (hidden, weight))

    def both():
        logps = method(h, w, targets)
        return torch.autograd.grad(logps, (h, w), upstream.to(logps.dtype))

    def forward():
        with torch.no_grad():
            method(h, w, targets)

    result = errors(method, hidden, weight, targets)
    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    own = (h.numel() + w.numel()) * h.element_size()
    result["peak_mb"] = (torch.cuda.max_memory_allocated() - before - own) / 2**20
    result["forward_ms"] = timed(forward, repeats).median
    result["both_ms"] = timed(both, repeats).median
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32000, 151936, 262144])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("these are kernels for GPUs: there is none here")
    head = f"{versions()}{library_versions()}"
    print(f"{head}; {options.tokens} tokens, hidden size {options.hidden}, bfloat16")
    rows: list[dict[str, Any]] = []
    for vocabulary in options.vocabularies:
        generator = torch.Generator("cuda").manual_seed(0)
        hidden = torch.randn(options.tokens, options.hidden, generator=generator, device="cuda").bfloat16()
        weight = (0.05 * torch.randn(vocabulary, options.hidden, generator=generator, device="cuda")).bfloat16()
        targets = torch.randint(0, vocabulary, (options.tokens,), generator=generator, device="cuda")
        products = 3 * 2 * options.tokens * options.hidden * vocabulary
        for name, method in METHODS.items():
            row: dict[str, Any] = {"vocabulary": vocabulary, "method": name}
            try:
                row |= measure(method, hidden, weight, targets, options.repeats)
            except (ImportError, RuntimeError, TypeError, ValueError) as error:
                row["left_out"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
                print(f"  {vocabulary:>7} {name:<36} left out: {row['left_out']}", flush=True)
            else:
                row["tflops"] = products / row["both_ms"] / 1e9
                figures = " ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float))
                print(f"  {vocabulary:>7} {name:<36} {figures}", flush=True)
            rows.append(row)
            gc.collect()
            torch.cuda.empty_cache()
    write(rows, options.out / f"head_{torch.cuda.get_device_name().split()[1].lower()}.csv", head)


if __name__ == "__main__":
    main()
