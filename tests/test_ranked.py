"""Ranked responses as one tree: the same numbers as all their ordered pairs listed one by one, by TRL and from scratch."""

import copy
import itertools
import math
import random

import pytest
import torch
from conftest import word_tokenizer
from families import EXACT, build
from oracle import stock_logps
from preference_data import dataset, sentence, text_pairs
from transformers import AutoModelForCausalLM
from trl_runs import construct, differences, end_by_trl, train

from preftree.trainers.collator import TreeCollator
from preftree.trainers.groups import Layout

SEVERAL_ROWS = {"row_length": 100}
ONE_OR_MORE = pytest.mark.parametrize("own", [{}, SEVERAL_ROWS], ids=["one-row", "several-rows"])


def ranked_examples(count: int, responses=(4,), seed: int = 0, chat: bool = False, ranks: bool = False) -> list[dict]:
    """Prompts with ``responses`` responses each (in turn), scores in no order; some responses begin alike."""
    generator = random.Random(seed)
    result = []
    for index in range(count):
        size = responses[index % len(responses)]
        completions = [sentence(generator, 1, 9) for _ in range(size)]
        completions[1] = f"{completions[0]} {completions[1]}"
        prompt: object = sentence(generator, 4, 14) + " "
        if chat:
            prompt = [{"role": "user", "content": prompt}]
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        scores = generator.sample(range(1, 10), size)
        example = {"prompt": prompt, "completions": completions}
        if ranks:
            order = sorted(scores, reverse=True)
            example["ranks"] = [1 + order.index(score) for score in scores]
        else:
            example["scores"] = [score / 2 for score in scores]
        result.append(example)
    return result


def listed(examples: list[dict]) -> list[dict]:
    """All ordered pairs, one by one."""
    pairs = []
    for example in examples:
        scores = example.get("scores") or [-rank for rank in example["ranks"]]
        for (i, left), (j, right) in itertools.permutations(enumerate(example["completions"]), 2):
            if scores[i] > scores[j]:
                pairs.append({"prompt": example["prompt"], "chosen": left, "rejected": right})
    return pairs


def assert_as_listed(
    model, examples, prompts=2, pairs=12, own=None, except_for=(), method="DPO", tolerance=1e-5, **settings
):
    """Train on ranked examples, and TRL on their pairs: so many prompts a step here are so many pairs there."""
    settings = {"max_steps": 3, "learning_rate": 0.02} | settings
    ours = train(
        "preftree", model, dataset(examples), own=own, method=method,
        **(settings | {"per_device_train_batch_size": prompts, "train_sampling_strategy": "sequential"}),
    )  # fmt: skip
    alike = settings | {"per_device_train_batch_size": pairs, "train_sampling_strategy": "sequential"}
    theirs = end_by_trl(model, listed(examples), method, **alike)
    metrics, parameters = differences(theirs, ours, except_for)
    assert metrics <= tolerance
    assert parameters <= 1e-5
    return ours


@ONE_OR_MORE
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
        {"loss_type": "aot"},
        {"ld_alpha": 0.3},
        {"use_weighting": True},
        {"precompute_ref_log_probs": True},
        {"precompute_ref_log_probs": True, "ld_alpha": 0.3},
        {"max_length": 16},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "max_steps": 2},
    ],
    ids=lambda settings: "-".join(settings) or "defaults",
)
def test_dpo(model_path, settings, own):
    ours = assert_as_listed(model_path, ranked_examples(8), own=own, **settings)
    assert ours.computed["tokens"] < 0.5 * ours.computed["unshared_tokens"]


@ONE_OR_MORE
@pytest.mark.parametrize("method", ["ORPO", "CPO", "Reward"])
def test_other_trainers(model_path, method, own):
    except_for = {"Reward": ("reward",)}.get(
        method, ("logits/",)
    )  # min, max and mean over sequences listed once or thrice
    rate = 1e-3 if method == "Reward" else 0.02
    assert_as_listed(model_path, ranked_examples(8), own=own, method=method, except_for=except_for, learning_rate=rate)


def test_ranks_and_chats(model_path):
    assert_as_listed(model_path, ranked_examples(6, ranks=True), own=SEVERAL_ROWS)
    assert_as_listed(model_path, ranked_examples(6, chat=True), own=SEVERAL_ROWS)


@pytest.mark.parametrize("settings", [{}, {"precompute_ref_log_probs": True}], ids=["reference", "cached"])
def test_lists_of_different_lengths(model_path, settings):
    """1 + 3 pairs a step: every pair weighs the same, so a prompt with more responses weighs more."""
    assert_as_listed(model_path, ranked_examples(6, responses=(2, 3)), prompts=2, pairs=4, **settings)


def test_mixture_of_experts(tmp_path):
    """The routers see a response once; the auxiliary loss counts it in each of its pairs."""
    tokenizer = word_tokenizer()
    family, settings = EXACT["mixtral"]
    model = build(family, settings | {"vocab_size": len(tokenizer), "sliding_window": None, "eos_token_id": 1})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {"router_aux_loss_coef": 2.0, "learning_rate": 1e-3}
    assert_as_listed(str(tmp_path), ranked_examples(6, responses=(4, 3)), pairs=9, own=SEVERAL_ROWS, **settings)


def test_ultrafeedback_shaped(model_path, tmp_path):
    """Four responses, six pairs a prompt, the median lengths of UltraFeedback: 1,273 tokens instead of 4,908.

    (A sum of 288 log-probabilities is rounded to 6e-5 in fp32, by TRL and here: the model is one of little confidence, and
    beta TRL's own, or that alone would be more than 1e-5 in a loss. In the rewards, which no mean over losses evens out, it
    may be.)
    """
    model = AutoModelForCausalLM.from_pretrained(model_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    generator = random.Random(0)
    examples = [
        {
            "prompt": sentence(generator, 121, 121) + " ",
            "completions": [sentence(generator, 287, 287) for _ in range(4)],  # and the end of text
            "scores": generator.sample([1.0, 2.5, 3.0, 4.0, 5.0], 4),
        }
        for _ in range(2)
    ]
    settings = {"max_steps": 2, "beta": 0.1, "learning_rate": 1e-3}
    ours = assert_as_listed(str(tmp_path), examples, prompts=1, pairs=6, except_for=("rewards/",), **settings)
    assert ours.computed["unshared_tokens"] == 2 * 4908
    assert ours.computed["tokens"] <= 0.27 * ours.computed["unshared_tokens"]
    assert ours.computed["tokens"] == pytest.approx(2 * 1273, abs=8)  # a word that two responses begin with saves one


@pytest.mark.parametrize("settings", [{}, {"precompute_ref_log_probs": True}], ids=["reference", "cached"])
def test_pairs_of_one_prompt_merge_by_themselves(model_path, settings):
    """Wherever they stand in the batch; what the data say of a pair stays with it."""
    pairs = listed(ranked_examples(4))
    random.Random(0).shuffle(pairs)
    # In the same batches the cached values are those of training to the last bit, and the first accuracies 0.
    settings = settings | {"per_device_train_batch_size": 12, "max_steps": 2, "train_sampling_strategy": "sequential"}
    runs = [train(kind, model_path, dataset(pairs), **settings) for kind in ("trl", "preftree")]
    assert max(differences(*runs)) <= 1e-5
    alone = sum(len(Layout().group(example).tree()) for example in runs[1].train_dataset)
    assert runs[1].computed["tokens"] < 0.7 * alone


def test_margins_stay_with_pairs_that_merge(model_path):
    generator = random.Random(1)
    pairs = [pair | {"margin": generator.uniform(-2, 4)} for pair in listed(ranked_examples(4))]
    generator.shuffle(pairs)
    settings = {"per_device_train_batch_size": 12, "max_steps": 2, "learning_rate": 1e-3}
    runs = [train(kind, model_path, dataset(pairs), method="Reward", **settings) for kind in ("trl", "preftree")]
    assert max(differences(*runs)) <= 1e-5


def test_pairs_of_one_prompt_that_do_not_fit_together(model_path):
    """Merged as far as a row holds them, in several trees."""
    pairs = listed(ranked_examples(2, responses=(5,)))
    settings = {"per_device_train_batch_size": 20, "max_steps": 2}
    theirs = train("trl", model_path, dataset(pairs), **settings)
    longest = max(len(Layout().group(example).tree()) for example in theirs.train_dataset)
    ours = train("preftree", model_path, dataset(pairs), own={"row_length": longest + 2}, **settings)
    assert max(differences(theirs, ours)) <= 1e-5
    assert 2 * 2 < ours.computed["rows"] < 2 * 20


# ------------------------------------------------------------------------------------------ from scratch, by formulas


def scores_from_scratch(model_path, trainer):
    """For each of the trainer's examples: (scores, the stock model's log-probs of its responses, best first)."""
    model = AutoModelForCausalLM.from_pretrained(model_path)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    policy = AutoModelForCausalLM.from_pretrained(model_path)
    policy.load_state_dict(trainer.model.state_dict())
    result = []
    for example in trainer.train_dataset:
        both = [
            torch.stack([
                stock_logps(part, ids, length)
                for ids, length in zip(example["sequences"], example["prompt_lengths"], strict=True)
            ])
            for part in (policy, model)
        ]  # fmt: skip
        order = sorted(range(len(example["scores"])), key=lambda i: -example["scores"][i])
        result.append(([example["scores"][i] for i in order], (both[0] - both[1].detach())[order]))
    return policy, result


def compare_with_formula(model_path, trainer, formula):
    policy, lists = scores_from_scratch(model_path, trainer)
    expected = sum(formula(scores, ratio) for scores, ratio in lists) / len(lists)
    expected.backward()
    trainer.model.zero_grad()
    inputs = trainer.data_collator(list(trainer.train_dataset))
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model.train(), copy.copy(inputs))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    largest = max(float(parameter.grad.abs().max()) for parameter in policy.parameters())
    for (name, mine), (_, theirs) in zip(trainer.model.named_parameters(), policy.named_parameters(), strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 1e-5 * max(float(theirs.grad.abs().max()), 1e-3 * largest), name


def bradley_terry(better, worse):
    return -torch.nn.functional.logsigmoid(0.3 * (better - worse))


def by_prompt(scores, ratio):
    losses = [bradley_terry(ratio[i], ratio[j]) for i, j in itertools.combinations(range(len(scores)), 2)]
    return sum(losses) / len(losses)


def by_lambda(scores, ratio):
    total = 0.0
    for i, j in itertools.combinations(range(len(scores)), 2):
        gain = abs(2 ** scores[i] - 2 ** scores[j])
        discount = abs(1 / math.log2(2 + i) - 1 / math.log2(2 + j))
        total = total + gain * discount * bradley_terry(ratio[i], ratio[j])
    return total


def by_list(scores, ratio):
    """Plackett and Luce: the best is drawn of all, the second best of what is left, ..."""
    total = 0.0
    for k in range(len(scores)):
        chances = torch.exp(0.3 * ratio[k:])
        total = total - torch.log(chances[0] / chances.sum())
    return total


@ONE_OR_MORE
@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        ({"pair_weighting": "prompt"}, by_prompt),
        ({"pair_weighting": "lambda"}, by_lambda),
        ({"loss_type": "plackett_luce"}, by_list),
    ],
    ids=["prompt", "lambda", "plackett-luce"],
)
def test_weights_and_list_objective(model_path, settings, formula, own):
    examples = ranked_examples(5, responses=(4, 2, 3))
    trainer = construct("preftree", model_path, dataset(examples), own=own | settings, per_device_train_batch_size=5)
    compare_with_formula(model_path, trainer, formula)


@ONE_OR_MORE
def test_pairs_and_weights_of_the_users(model_path, own):
    """The best against each other one, the last of them for half, and a pair that counts for nothing."""
    examples = ranked_examples(5, responses=(4, 3))
    for example in examples:
        order = sorted(range(len(example["scores"])), key=lambda i: -example["scores"][i])
        example["pair_weights"] = [[order[0], index, 1.0] for index in order[1:-1]]
        example["pair_weights"] += [[order[0], order[-1], 0.5], [order[1], order[2], 0]]
    trainer = construct("preftree", model_path, dataset(examples), own=own, per_device_train_batch_size=5)
    pairs = sum(len(example["pair_weights"]) for example in examples)

    def formula(scores, ratio):
        losses = [bradley_terry(ratio[0], ratio[j]) for j in range(1, len(scores))]
        return (sum(losses[:-1]) + 0.5 * losses[-1]) * len(examples) / pairs

    compare_with_formula(model_path, trainer, formula)


@ONE_OR_MORE
def test_list_objective_trains(model_path, own):
    examples = ranked_examples(8)
    trainer = train(
        "preftree", model_path, dataset(examples), own=own | {"loss_type": "plackett_luce"}, max_steps=6,
        per_device_train_batch_size=8, learning_rate=0.01, eval_strategy="steps", eval_steps=6,
        trainer_args={"eval_dataset": dataset(ranked_examples(3, seed=1))},
    )  # fmt: skip
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert history[0]["loss"] == pytest.approx(math.log(24), abs=1e-5)  # four responses, all orders alike
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["rewards/margins"] > 0
    assert (
        trainer.computed["unshared_tokens"]
        < sum(len(ids) for example in trainer.train_dataset for ids in example["sequences"]) * 6 + 1
    )


@ONE_OR_MORE
def test_list_objective_of_pairs_is_dpo(model_path, own):
    pairs = dataset(text_pairs(12))
    ours = train("preftree", model_path, pairs, own=own | {"loss_type": "plackett_luce"})
    assert max(differences(train("trl", model_path, pairs), ours)) <= 1e-5


def test_equal_scores_can_be_dropped(model_path):
    examples = ranked_examples(4)
    for example in examples:
        example["scores"][2] = example["scores"][0]
    ours = train(
        "preftree", model_path, dataset(examples), own={"ties": "drop"}, max_steps=2, per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    theirs = train(
        "trl", model_path, dataset(listed(examples)), max_steps=2, per_device_train_batch_size=10,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    assert max(differences(theirs, ours)) <= 1e-5


def test_streamed(model_path):
    examples = ranked_examples(8)
    runs = [
        train("preftree", model_path, data, per_device_train_batch_size=2, train_sampling_strategy="sequential")
        for data in (dataset(examples), dataset(examples).to_iterable_dataset())
    ]
    assert max(differences(*runs)) <= 1e-6


def test_a_list_that_does_not_fit(model_path):
    examples = ranked_examples(3)
    examples[1]["completions"][2] = "the dog " * 60
    with pytest.raises(ValueError, match=r"train dataset, row 1: its \d+ tokens do not fit into row_length=100"):
        construct("preftree", model_path, dataset(examples), own=SEVERAL_ROWS)
    cut = construct("preftree", model_path, dataset(examples), own=SEVERAL_ROWS | {"overlong": "truncate"})
    assert all(len(Layout().group(example).tree()) <= 100 for example in cut.train_dataset)


def test_dialogue_turns_share_their_past():
    """A prompt that begins another one, and prompts with a long start in common, become one tree; others do not."""
    turn = {"prompt_ids": [1, 5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}
    later = {"prompt_ids": [1, 5, 6, 7, 8, 4, 4], "chosen_ids": [3], "rejected_ids": [2]}
    other = {"prompt_ids": [1, 6, 6], "chosen_ids": [3], "rejected_ids": [2]}
    long = [dict(other, prompt_ids=[3] * 140 + [last]) for last in (4, 5)]
    batch = TreeCollator(pad_token_id=0)([turn, other, later, *long])
    [row] = batch["rows"]
    assert row.num_tokens == (3 + 2 + 1) + (2 + 2) + (3 + 2) + (140 + 2 * 3)
    assert row.sequence_ids.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9]
    alone = TreeCollator(pad_token_id=0, share_prefixes=False)([turn, later, other])
    assert sum(row.num_tokens for row in alone["rows"]) == alone["num_tokens"] == 9 + 16 + 8
