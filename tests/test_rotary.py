"""Rotary frequencies that change with a sequence's length: every sequence of a row has those that it has alone."""

import copy
import random

import pytest
import torch
from conftest import WORDS
from datasets import Dataset
from families import VOCABULARY, build
from oracle import compare_with_stock
from trl_runs import construct, train

import preftree
from preftree.models import refusals
from preftree.trainers import row_length

LIMIT = 40
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [2.0, 2.5, 4.0, 6.0],
    "original_max_position_embeddings": LIMIT,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
MODELS = {
    "longrope": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": LIMIT}),
    "dynamic": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
}
TOLERANCE = 1e-5


def model_of(kind, **settings):
    family, own = MODELS[kind]
    return build(family, own | settings)


def groups_of(seed, *lengths):
    """One tree for each ``(prompt, *responses)``."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length):
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    groups = []
    for prompt, *responses in lengths:
        shared = draw(prompt)
        groups.append(([shared + draw(length) for length in responses], [prompt] * len(responses)))
    return groups


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        ("longrope", [(20, 9, 20), (7, 3, 5, 2)]),  # all below the limit, one sequence of just so many
        ("longrope", [(30, 11, 25), (41, 1, 8)]),  # all above
        ("longrope", [(20, 9, 20), (30, 11, 25), (5, 3), (60, 7, 3, 2), (39, 1)]),  # some trees on either side
        ("dynamic", [(20, 9, 20), (7, 3, 5, 2)]),
    ],
)
def test_rows_are_exact(kind, lengths):
    logps, gradients = compare_with_stock(model_of(kind), groups_of(0, *lengths))
    assert logps <= TOLERANCE
    worst = max(gradients, key=gradients.get)
    assert gradients[worst] <= TOLERANCE, worst


def test_long_and_short_sequences_are_told_apart():
    """The tests above would not see it, were both sets of frequencies the same."""
    model = model_of("longrope")
    ids = torch.tensor([groups_of(0, (30, 5))[0][0][0]])
    longer = torch.cat([ids, ids[:, :10]], dim=1)
    alone, within = model(input_ids=ids).logits, model(input_ids=longer).logits[:, : ids.shape[1]]
    assert (alone - within).abs().max() > 1e-2


def test_a_tree_across_the_limit():
    model = preftree.prepare_model(model_of("longrope"))
    (group,) = groups_of(0, (30, 5, 20))
    tree = preftree.TokenTree.from_sequences(*group)
    other = preftree.TokenTree.from_sequences(*groups_of(1, (50, 5))[0])
    with pytest.raises(
        ValueError, match=r"sequences of 35 to 55 tokens share some, but with rope_type='longrope' .* at 40"
    ):
        preftree.sequence_logps(model, preftree.pack([other, tree])[0])
    logps, gradients = compare_with_stock(model_of("longrope"), [([sequence], [30]) for sequence in group[0]])
    assert max(logps, *gradients.values()) <= TOLERANCE
    row = preftree.pack([tree.unshared(), other])[0]
    expected = [preftree.sequence_logps(model, preftree.pack([each])[0]).logps for each in (tree.unshared(), other)]
    torch.testing.assert_close(preftree.sequence_logps(model, row).logps, torch.cat(expected))


def test_beyond_the_limit_of_dynamic_scaling():
    model = preftree.prepare_model(model_of("dynamic"))
    row = preftree.pack([preftree.TokenTree.from_sequences(*groups_of(0, (30, 11, 3))[0])])[0]
    with pytest.raises(ValueError, match=r"a sequence of 41 tokens: with rope_type='dynamic' .* keep sequences to 40"):
        preftree.sequence_logps(model, row)


def data_of(*lengths):
    """Pairs of words, of ``(prompt, chosen, rejected)`` tokens with the one that ends a response."""
    draw = random.Random(0)

    def text(length, first):
        return " ".join([first, *draw.choices(WORDS, k=length - 1)])

    return Dataset.from_list(
        [
            {
                "prompt": text(prompt, "the") + " ",
                "chosen": text(chosen - 1, "red"),
                "rejected": text(rejected - 1, "blue"),
            }
            for prompt, chosen, rejected in lengths
        ]
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_across_the_limit(tokenizer, checkpointing):
    """As TRL trains when each pair's sequences are batches of their own, which its padded batches are not."""
    data = data_of((20, 9, 20), (30, 5, 20), (30, 11, 25), (35, 6, 5), (5, 3, 4))
    model = model_of("longrope")
    stock = copy.deepcopy(model)
    settings = {"max_steps": 1, "per_device_train_batch_size": 5, "gradient_checkpointing": checkpointing}
    trainer = train(
        "preftree",
        lambda: model,
        data,
        trainer_args={"processing_class": tokenizer, "ref_model": copy.deepcopy(model)},
        **settings,
    )
    losses = []
    for example in trainer.train_dataset:
        margin = 0.0
        for sign, side in ((1, "chosen_ids"), (-1, "rejected_ids")):
            sequence, first = example["prompt_ids"] + example[side], len(example["prompt_ids"])
            ids = torch.tensor([sequence])
            log_p = stock(input_ids=ids).logits[0].log_softmax(-1)
            logp = log_p[torch.arange(first - 1, len(sequence) - 1), ids[0, first:]].sum()
            margin = margin + sign * (logp - logp.detach())
        losses.append(-torch.nn.functional.logsigmoid(trainer.args.beta * margin))
    torch.stack(losses).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(stock.parameters(), trainer.args.max_grad_norm)
    assert norm > 0
    for (name, mine), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        expected = theirs.detach() - trainer.args.learning_rate * theirs.grad
        assert (mine - expected).abs().max() <= TOLERANCE * theirs.grad.abs().max().clamp(min=1e-3), name
    assert trainer.computed["tokens"] == sum((49, 35 + 50, 66, 41 + 40, 12)) < trainer.computed["unshared_tokens"]


def test_what_does_not_fit_is_found_before_training(tokenizer):
    given = {"processing_class": tokenizer}
    data = data_of((20, 9, 20), (30, 5, 20))
    own = {"precompute_ref_log_probs": True}
    with pytest.raises(
        ValueError, match=r"row 1: with rope_type='dynamic' .* beyond 40 tokens .* this has 50: set max"
    ):
        construct("preftree", lambda: model_of("dynamic"), data, trainer_args=given, **own)
    trainer = construct("preftree", lambda: model_of("dynamic"), data, trainer_args=given, max_length=LIMIT, **own)
    assert len(trainer.train_dataset) == 2
    # Not shared, it is longer than its tree.
    with pytest.raises(ValueError, match="row 1: its 85 tokens do not fit into row_length=80"):
        construct("preftree", lambda: model_of("longrope"), data, trainer_args=given, own={"row_length": 80}, **own)


@pytest.mark.parametrize(("kind", "sequences"), [("longrope", 2), ("dynamic", 50)])
def test_rows_that_memory_is_tried_with_are_taken(kind, sequences):
    model = preftree.prepare_model(model_of(kind))
    row = row_length._row(1000, VOCABULARY, model._preftree.rotary_limit)
    assert (len(row), row.num_sequences) == (1000, sequences)
    assert row.num_tokens > 900
    assert preftree.sequence_logps(model, row).logps.isfinite().all()


def test_padded_batches_are_refused():
    with pytest.raises(NotImplementedError, match=r"'phi3'.* rope_type='longrope': .* the longest row of a batch"):
        preftree.share_prefixes(model_of("longrope"))


@pytest.mark.parametrize("change", ["limits", "within", "vision", "unknown"])
def test_frequencies_of_other_kinds_are_refused(change, monkeypatch):
    model = model_of("longrope")
    if change == "limits":
        model.config.rope_parameters = {"full_attention": LONGROPE, "sliding_attention": DYNAMIC}
    elif change == "within":
        model.model.layers[1].rotary_emb = copy.deepcopy(model.model.rotary_emb)
    elif change == "vision":
        model.config.vision_config = {}
    else:
        model.config.rope_parameters = LONGROPE | {"original_max_position_embeddings": None}
    setting, _ = refusals.find_refusal(model)
    assert setting.startswith("rope_type='")
    with pytest.raises(NotImplementedError, match=r"'phi3'.* rope_type='"):
        preftree.prepare_model(model)
