"""Sharing out a step's examples over ranks: all of them, once each, the largest load small."""

import itertools

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from transformers import LlamaConfig

from preftree.plan import ModelCost
from preftree.trainers.balance import BalancedBatches, assign, costs_of, imbalance, share_out
from preftree.trainers.collator import TreeCollator
from preftree.trainers.groups import Layout


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 50])
def test_every_example_once(ranks, count):
    costs = np.random.default_rng(count).lognormal(size=count).tolist()
    shares = assign(costs, ranks)
    assert sorted(itertools.chain(*shares)) == list(range(count))
    assert all(share == sorted(share) for share in shares)
    assert min(map(len, shares)) >= min(count // ranks, 1)


def test_no_rank_has_much_more_than_the_best_possible():
    generator = np.random.default_rng(0)
    for _ in range(50):
        costs = generator.lognormal(sigma=1.0, size=6).tolist()
        best = min(
            max(sum(costs[i] for i in range(6) if where[i] == rank) for rank in range(3))
            for where in itertools.product(range(3), repeat=6)
        )
        loads = [sum(costs[i] for i in share) for share in assign(costs, 3)]
        assert best <= max(loads) <= 4 / 3 * best + 1e-9


def test_imbalance():
    assert imbalance([1.0, 3.0, 2.0]) == pytest.approx(1 / 3)
    assert imbalance([2.0, 2.0]) == imbalance([0.0, 0.0]) == 0


@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_are_those_of_one_process(drop_last):
    costs = np.random.default_rng(1).lognormal(size=23)
    steps = []
    for ranks in (1, 4):
        generator = torch.Generator().manual_seed(0)
        orders = [torch.Generator() for _ in range(ranks)]
        for order in orders:
            order.set_state(generator.get_state())
        batches = [
            BalancedBatches(RandomSampler(range(23), generator=orders[rank]), 8 // ranks, ranks, rank, costs, drop_last)
            for rank in range(ranks)
        ]
        assert {len(each) for each in batches} == {2 if drop_last else 3}
        steps.append([sorted(itertools.chain(*step)) for step in zip(*batches, strict=True)])
    assert steps[0] == steps[1]
    assert len(steps[0]) == (2 if drop_last else 3)


def test_costs_are_those_of_a_tree():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    cost = ModelCost.from_config(config)
    lengths = [(5, 3, 2), (9, 1, 4), (2, 8, 8), (12, 2, 2)]
    columns = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), zip(*lengths, strict=True), strict=True))
    data = Dataset.from_dict({name: [list(range(3, 3 + n)) for n in counts] for name, counts in columns.items()})

    def expected(prompt, chosen, rejected):
        visible = prompt**2 / 2 + sum(n * prompt + n**2 / 2 for n in (chosen, rejected))
        tokens = prompt + chosen + rejected
        return cost.per_token * tokens + cost.per_pair * visible + cost.per_scored * (chosen + rejected)

    assert costs_of(data, Layout(), config).tolist() == pytest.approx([expected(*each) for each in lengths])
    order = [3, 0, 3]
    assert costs_of(data.select(order), Layout(), config).tolist() == pytest.approx(
        [expected(*lengths[i]) for i in order]
    )
    # Cut to ten tokens.
    cut = [(5, 3, 2), (9, 1, 1), (2, 8, 8), (10, 0, 0)]
    assert costs_of(data, Layout(max_length=10), config).tolist() == pytest.approx([expected(*each) for each in cut])
    assert costs_of(data.remove_columns("prompt_ids"), Layout(), config) is None
    assert costs_of(data.to_iterable_dataset(), Layout(), config) is None
    # Sequences that hold their prompts, which are told or not.
    columns = {"prompt_input_ids": [5, 9], "chosen_input_ids": [8, 10], "rejected_input_ids": [7, 13]}
    labelled = Dataset.from_dict({name: [list(range(n)) for n in counts] for name, counts in columns.items()})
    told = [expected(5, 3, 2), expected(9, 1, 4)]
    assert costs_of(labelled, Layout(form="labels"), config).tolist() == pytest.approx(told)
    whole = Dataset.from_dict({"chosen_ids": [[1] * 8, [1] * 10], "rejected_ids": [[1] * 7, [1] * 13]})
    alone = [expected(0, 8, 7), expected(0, 10, 12)]
    assert costs_of(whole, Layout(form="whole", max_length=12), config).tolist() == pytest.approx(alone)


def loader_of(rank, ranks=3, batch_size=2, count=17, **options):
    loader = DataLoader(range(count), batch_size=batch_size, collate_fn=list)
    return prepare_data_loader(loader, num_processes=ranks, process_index=rank, put_on_device=False, **options)


def test_a_loader_of_accelerates():
    Accelerator(cpu=True)
    seen = []
    for rank in range(3):
        loader = loader_of(rank)
        assert share_out(loader, None)
        assert len(loader) == 3
        seen.append([list(batch) for batch in loader])
        assert [list(batch) for batch in skip_first_batches(loader, 2)] == seen[-1][2:]
    assert [sorted(itertools.chain(*step)) for step in zip(*seen, strict=True)] == [
        [0, 1, 2, 3, 4, 5],
        [6, 7, 8, 9, 10, 11],
        [12, 13, 14, 15, 16],
    ]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(7))


def test_loaders_that_are_left_alone():
    Accelerator(cpu=True)
    streamed = prepare_data_loader(
        DataLoader(Stream(), batch_size=2, collate_fn=list), num_processes=2, process_index=1, put_on_device=False
    )
    assert not share_out(streamed, None)
    assert not share_out(loader_of(1, ranks=2, batch_size=4, split_batches=True), None)
    balanced = DataLoader(
        range(9), batch_sampler=BalancedBatches(SequentialSampler(range(9)), 2, 2, 0), collate_fn=list
    )
    assert not share_out(prepare_data_loader(balanced, num_processes=2, process_index=0, put_on_device=False), None)


def test_a_batch_without_examples():
    collator = TreeCollator(pad_token_id=0, columns=("weight",))
    some = collator([{"prompt_ids": [3, 4], "chosen_ids": [5], "rejected_ids": [6, 7]}])
    none = collator([])
    assert set(none) >= set(some)
    assert [row.num_sequences for row in none["rows"]] == [0]
    assert none["members"][0].keys() == some["members"][0].keys()
    assert not any(part.numel() for part in none["members"][0].values())
    assert (none["normaliser"], none["num_tokens"], none["tokens"]) == (0, 0, {"chosen": 0, "rejected": 0})
