"""The trie merge against brute force: paths spell the sequences, and visibility is exactly ancestry."""

import random

import pytest
import torch

import preftree


def brute_force_nodes(sequences):
    """All distinct non-empty prefixes."""
    return {tuple(sequence[:length]) for sequence in sequences for length in range(1, len(sequence) + 1)}


def random_family(generator, sequences=6):
    """Sequences over three tokens: they share, nest, repeat and differ at the root by chance."""
    made = [[generator.randrange(3) for _ in range(generator.randint(1, 7))] for _ in range(sequences)]
    made.append(list(made[0]))
    made.append(made[1][: max(1, len(made[1]) // 2)])
    return made


@pytest.mark.parametrize("seed", range(30))
def test_against_brute_force(seed):
    generator = random.Random(seed)
    sequences = random_family(generator)
    tree = preftree.TokenTree.from_sequences(sequences, [0] * len(sequences))
    assert len(tree) == len(brute_force_nodes(sequences))
    prefixes = []
    for node in range(len(tree)):
        parent = int(tree.parent[node])
        assert parent < node
        prefixes.append((*(prefixes[parent] if parent >= 0 else ()), int(tree.input_ids[node])))
        assert int(tree.position_ids[node]) == len(prefixes[node]) - 1
    assert set(prefixes) == brute_force_nodes(sequences)
    for sequence, path in zip(sequences, tree.paths, strict=True):
        assert tree.input_ids[path].tolist() == sequence
        assert tree.position_ids[path].tolist() == list(range(len(sequence)))
    for query in range(len(tree)):
        for key in range(len(tree)):
            visible = key <= query < int(tree.end[key])
            assert visible == (prefixes[query][: len(prefixes[key])] == prefixes[key])


def test_small_tree_by_hand():
    tree = preftree.TokenTree.from_sequences([[5, 6, 7], [5, 6, 8, 9], [5, 6]], [2, 2, 1])
    assert tree.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert tree.position_ids.tolist() == [0, 1, 2, 2, 3]
    assert tree.end.tolist() == [5, 5, 3, 5, 5]
    assert tree.parent.tolist() == [-1, 0, 1, 1, 3]
    assert [path.tolist() for path in tree.paths] == [[0, 1, 2], [0, 1, 3, 4], [0, 1]]
    assert repr(tree) == "TokenTree(3 sequences, 9 tokens in 5 nodes)"


def test_unshared_keeps_the_sequences():
    sequences = [[1, 2, 3], [1, 2, 4, 4], [1]]
    tree = preftree.TokenTree.from_sequences(sequences, [1, 1, 0]).unshared()
    assert len(tree) == 8
    assert [tree.input_ids[path].tolist() for path in tree.paths] == sequences
    assert tree.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert tree.end.tolist() == [3, 3, 3, 7, 7, 7, 7, 8]
    assert tree.parent.tolist() == [-1, 0, 1, -1, 3, 4, 5, -1]


def test_multiplicities():
    """A sequence that counts for nothing, listed again to be scored from another token on, lies on nodes of the others."""
    sequences, counts = [[1, 2, 3], [1, 2], [1, 2, 3], [4]], [3, 1, 0, 0]
    tree = preftree.TokenTree.from_sequences(sequences, [2, 1, 0, 0], counts)
    assert len(tree) == 4
    assert tree.num_unshared_tokens == 3 * 3 + 2
    alone = tree.unshared()
    assert len(alone) == 3 + 2 + 1  # [4] has no other to lie on
    assert [alone.input_ids[path].tolist() for path in alone.paths] == sequences
    assert alone.paths[2].tolist() == alone.paths[0].tolist()
    row = preftree.pack([tree], 6)[0]
    assert row.node_counts.tolist() == [4, 4, 3, 0, 0, 0]
    assert row.last_nodes.tolist() == [2, 1, 2, 3]
    for bad in ([1, 1], [1, 1, 1, -1]):
        with pytest.raises(ValueError, match="multiplicities must be 4 numbers of at least 0"):
            preftree.TokenTree.from_sequences(sequences, [2, 1, 0, 0], bad)


def test_deep_chains_need_no_recursion():
    sequences = [[1] * length for length in range(1, 3000, 2)]
    assert len(preftree.TokenTree.from_sequences(sequences, [0] * len(sequences))) == 2999


@pytest.mark.parametrize(
    ("sequences", "prompts", "message"),
    [
        ([], [], "at least one sequence"),
        ([[1], []], [0, 0], "sequence 1 is empty"),
        ([[1, 2]], [3], "prompt length 3"),
        ([[1, 2]], [-1], "prompt length -1"),
        ([[1, 2]], [1.5], r"sequence 0: prompt length 1\.5 is not an integer"),
        ([[1, 2]], [1, 1], "1 sequences, but 2 prompt lengths"),
        ([[1, -2]], [1], "token 1: id -2 is negative"),
        ([[1.5, 2.0]], [1], "integers"),
        ([["a"]], [0], "integers"),
        ([[[1, 2]]], [0], "flat list"),
    ],
)
def test_bad_input(sequences, prompts, message):
    with pytest.raises(ValueError, match=message):
        preftree.TokenTree.from_sequences(sequences, prompts)


def test_takes_tensors():
    tree = preftree.TokenTree.from_sequences([torch.tensor([1, 2]), torch.tensor([1, 3])], torch.tensor([1, 1]))
    assert tree.input_ids.tolist() == [1, 2, 3]
