"""Merging and packing on one core: seconds for many long pairs, and how full rows of 8,192 tokens get.

    python benchmarks/packing.py

Lengths of the second part are log-normal around the medians of the data sets in "Accelerating Direct Preference
Optimization with Prefix Sharing" (arXiv 2410.20305), as reconstructed from its tables of median lengths and ratios.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

import preftree
from preftree.report import versions

# Median tokens of a prompt and of a response.
MEDIANS = {
    "Capybara": (712, 448),
    "HH-RLHF": (127, 59),
    "MetaMath-DPO": (694, 178),
    "TLDR": (382, 34),
    "Tulu-HelpSteer": (669, 106),
    "UltraFeedback": (121, 288),
}


def random_pair(generator: np.random.Generator, prompt: int, chosen: int, rejected: int) -> list[list[int]]:
    """Two token lists that share a prompt of random tokens and differ from there on."""
    shared, first, second = (generator.integers(2, 50000, length).tolist() for length in (prompt, chosen, rejected))
    return [shared + [0] + first[1:], shared + [1] + second[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=1500, help="tokens of a pair's two sequences, each")
    parser.add_argument("--row_length", type=int, default=8192)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    response = options.tokens // 6
    prompt = options.tokens - response
    pairs = [random_pair(generator, prompt, response, response) for _ in range(options.pairs)]
    started = time.perf_counter()
    trees = [preftree.TokenTree.from_sequences(pair, [prompt, prompt]) for pair in pairs]
    merged = time.perf_counter()
    rows = preftree.pack(trees, options.row_length)
    packed = time.perf_counter()
    print(f"{options.pairs} pairs of 2 x {options.tokens} tokens, one core:")
    print(f"from_sequences {merged - started:.2f} s, pack {packed - merged:.2f} s, together {packed - started:.2f} s")
    print(f"\n{options.pairs} pairs of log-normal lengths in rows of {options.row_length} tokens")
    print(f"{'':<16}{'prompt':>8}{'response':>10}{'rows':>7}{'full':>8}{'tokens saved':>14}")
    for name, (prompt, response) in MEDIANS.items():
        medians, spread = np.array([prompt, response, response]), np.array([0.6, 0.5, 0.5])
        drawn = medians * np.exp(spread * generator.standard_normal((options.pairs, 3)))
        lengths = drawn.round().astype(int).clip(8, 4096)
        trees = []
        for prompt_length, chosen, rejected in lengths.tolist():
            pair = random_pair(generator, prompt_length, chosen, rejected)
            trees.append(preftree.TokenTree.from_sequences(pair, [prompt_length] * 2))
        rows = preftree.pack(trees, options.row_length)[:-1]  # the last one holds what is left
        full = sum(row.num_tokens for row in rows) / (len(rows) * options.row_length)
        saved = sum(tree.num_unshared_tokens for tree in trees) / sum(len(tree) for tree in trees)
        print(f"{name:<16}{prompt:>8}{response:>10}{len(rows) + 1:>7}{full:>8.1%}{saved:>13.2f}x")
    print(versions())


if __name__ == "__main__":
    main()
