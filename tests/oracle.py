"""The independent oracle: the stock model on each sequence alone, and random trees to compare on."""

from __future__ import annotations

import copy

import torch

import preftree


def random_sequences(
    generator: torch.Generator, vocabulary: int, trees: int = 3
) -> list[tuple[list[list[int]], list[int]]]:
    """Random trees of odd shapes as (sequences, prompt lengths): 1-4 responses, some nested, one duplicated."""

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    def draw(length: int) -> list[int]:
        return torch.randint(0, vocabulary, (length,), generator=generator).tolist()

    result = []
    for index in range(trees):
        prompt = draw(integer(1, 17))
        sequences, prompt_lengths = [], []
        for _ in range(integer(1, 4) if index else 3):
            start = prompt
            if sequences and integer(0, 1):  # branch off inside an earlier response: shared beyond the prompt
                start = sequences[-1][: integer(len(prompt), len(sequences[-1]))]
            sequences.append(start + draw(integer(1, 11)))
            prompt_lengths.append(len(prompt))
        if index == 1:
            sequences.append(list(sequences[0]))
            prompt_lengths.append(max(len(prompt) - 1, 0))
        result.append((sequences, prompt_lengths))
    return result


def stock_logps(model, sequence: list[int], prompt_length: int) -> torch.Tensor:
    """Sum of the log-probabilities of ``sequence[prompt_length:]``, by the stock model on that sequence alone."""
    ids = torch.tensor([sequence], device=model.device)
    log_p = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    first = max(prompt_length, 1)
    return log_p[torch.arange(first - 1, len(sequence) - 1), ids[0, first:]].sum()


def compare_with_stock(model, groups, backend: str = "auto", row_length: int | None = None, spare: int = 7):
    """Largest relative difference of sequence log-probs, and of gradients by parameter, against the oracle.

    A random weight on each sequence makes the gradients tell the sequences apart. Returns (logps difference, {name:
    gradient difference relative to its largest entry}).
    """
    stock = copy.deepcopy(model)
    prepared = preftree.prepare_model(model, backend=backend)
    trees = [preftree.TokenTree.from_sequences(*group) for group in groups]
    if row_length is None:
        row_length = sum(len(tree) for tree in trees) + spare
    rows = preftree.pack(trees, row_length, pad_token_id=1)
    sequences = [sequence for group in groups for sequence in group[0]]
    prompt_lengths = [length for group in groups for length in group[1]]
    weights = torch.randn(len(sequences), generator=torch.Generator().manual_seed(1)).to(model.device)

    expected = torch.stack([stock_logps(stock, s, p) for s, p in zip(sequences, prompt_lengths, strict=True)])
    (expected * weights).sum().backward()
    got = torch.zeros_like(expected)
    for row in rows:
        out = preftree.sequence_logps(prepared, row)
        (out.logps * weights[row.sequence_ids]).sum().backward()
        got[row.sequence_ids] = out.logps.detach()
    logps = ((got - expected).abs() / expected.abs().clamp(min=1)).max().item()
    largest = max(p.grad.abs().max().item() for p in stock.parameters() if p.grad is not None)
    gradients = {}
    for (name, mine), (_, theirs) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        if theirs.grad is None:
            continue
        # A key bias has no gradient but rounding: measure against no less than a thousandth of the largest of all.
        scale = max(theirs.grad.abs().max().item(), 1e-3 * largest)
        mine_grad = torch.zeros_like(theirs.grad) if mine.grad is None else mine.grad
        gradients[name] = (mine_grad - theirs.grad).abs().max().item() / scale
    return logps, gradients


def random_row(seed: int, trees: int = 4, spare: int = 6, stretch: int = 1) -> preftree.PackedRow:
    """A row of `random_sequences` with ``spare`` tokens of padding, each token ``stretch`` times: longer, branching alike."""
    groups = random_sequences(torch.Generator().manual_seed(seed), 90, trees=trees)
    built = [
        preftree.TokenTree.from_sequences(
            [[token for token in sequence for _ in range(stretch)] for sequence in sequences],
            [stretch * length for length in prompt_lengths],
        )
        for sequences, prompt_lengths in groups
    ]
    return preftree.pack(built, sum(len(tree) for tree in built) + spare)[0]


def shallow_row(seed, spare):
    """Prompts with responses, of which the first, or what it is a response to, has more than one end; and sequences alone."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most):
        return torch.randint(
            0, 9, (int(torch.randint(1, most, (), generator=generator)),), generator=generator
        ).tolist()

    trees = []
    for number in range(4):
        prompt = draw(30)
        members = [[*prompt, 10 + branch, *draw(20)] for branch in range(1 + (seed + number) % 4)]
        members += [[*members[0], 20 + branch, *draw(20)] for branch in range(number % 3)]
        trees.append(preftree.TokenTree.from_sequences(members, [len(prompt)] * len(members)))
    return preftree.pack(trees, sum(map(len, trees)) + spare)[0]


def row_of_lengths(seed: int, vocabulary: int, trees: int, prompt: int, *responses: int) -> preftree.PackedRow:
    """A row of trees of random tokens, each with a prompt and responses of these lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    groups = []
    for _ in range(trees):
        shared = draw(prompt)
        sequences = [shared + draw(length) for length in responses]
        groups.append(preftree.TokenTree.from_sequences(sequences, [prompt] * len(responses)))
    return preftree.pack(groups)[0]


def walks_up(row: preftree.PackedRow) -> list[list[int]]:
    """For each node the way from it to its root: itself first."""
    parent = row.parent.tolist()
    walks = []
    for node in range(len(row)):
        walk, at = [], node
        while at >= 0:
            walk.append(at)
            at = parent[at]
        walks.append(walk)
    return walks


def seen_by_walking_up(row: preftree.PackedRow, allowed) -> torch.Tensor:
    """Bool ``[S, S]``: keys on the way up that ``allowed(query position, key position)``, positions being steps of it."""
    visible = torch.zeros(len(row), len(row), dtype=torch.bool)
    for query, walk in enumerate(walks_up(row)):
        position = len(walk) - 1
        for steps, key in enumerate(walk):
            visible[query, key] = allowed(position, position - steps)
    return visible
