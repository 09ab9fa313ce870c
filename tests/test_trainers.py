"""The other trainers against TRL's: losses, options and data formats, in one row and in several, metric by metric."""

import contextlib
import gc
import math
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import word_tokenizer
from families import EXACT, build
from preference_data import chat_pairs, dataset, examples, text_pairs
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl_runs import COMMON, classes, construct, differences, train

import preftree
from preftree.trainers import base
from preftree.trainers.garbage import ObjectsKept

SEVERAL_ROWS = {"row_length": 80}
ONE_OR_MORE = pytest.mark.parametrize("own", [{}, SEVERAL_ROWS], ids=["one-row", "several-rows"])
METHODS = ("ORPO", "CPO", "TPO", "KTO", "Reward")
# TRL's two trainers take these means over padding too: other numbers for every padding, so ours are of completions alone.
OVER_PADDING = {"ORPO": ("logits/",), "CPO": ("logits/",)}
# What the steps are long enough for to change the parameters, and short enough to leave them finite.
RATES = {"ORPO": 0.03, "CPO": 0.03, "TPO": 0.01, "KTO": 0.03, "Reward": 3e-3}


def settings_of(method: str, **settings) -> dict:
    return {"learning_rate": RATES[method], "per_device_train_batch_size": 6, "max_steps": 10} | settings


def assert_same(method, model, data, own=None, except_for=(), trainer_args=None, **settings):
    settings = settings_of(method, **settings)
    runs = [
        train(kind, model, dataset(data), own=own, method=method, trainer_args=trainer_args, **settings)
        for kind in ("trl", "preftree")
    ]
    metrics, parameters = differences(*runs, (*OVER_PADDING.get(method, ()), *except_for))
    assert metrics <= 1e-5
    assert parameters <= 1e-5
    return runs


@ONE_OR_MORE
@pytest.mark.parametrize("method", METHODS)
def test_ten_steps(model_path, method, own):
    _, ours = assert_same(method, model_path, examples(method, text_pairs(30)), own=own)
    assert (ours.computed["rows"] > 20) == bool(own)
    assert ours.computed["tokens"] < ours.computed["unshared_tokens"]
    before = dict(AutoModelForCausalLM.from_pretrained(model_path).named_parameters())
    moved = [
        (before[name] - after).abs().max() / before[name].abs().max()
        for name, after in ours.model.named_parameters()
        if name in before
    ]
    assert max(moved) > 1e-3, "the comparison needs steps that change something"


@pytest.mark.parametrize("method", METHODS)
def test_chats(model_path, method):
    assert_same(method, model_path, examples(method, chat_pairs(12)), own=SEVERAL_ROWS, max_steps=2)


@pytest.mark.parametrize("method", ["ORPO", "CPO", "Reward"])
def test_implicit_prompt(model_path, method):
    assert_same(method, model_path, text_pairs(12, explicit=False), own=SEVERAL_ROWS, max_steps=2)


OPTIONS = [
    ("ORPO", {"beta": 0.7}),
    ("ORPO", {"max_length": 30}),
    ("CPO", {"loss_type": "simpo"}),
    ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7, "label_smoothing": 0.1}),
    ("CPO", {"loss_type": "hinge", "beta": 0.02}),
    ("CPO", {"loss_type": "ipo", "learning_rate": 1e-3}),
    ("CPO", {"loss_type": "sigmoid", "label_smoothing": 0.2, "cpo_alpha": 0.5}),
    ("CPO", {"loss_type": "alphapo", "alpha": 0.2, "learning_rate": 3e-3}),
    ("CPO", {"loss_type": "simpo", "alpha": -0.3}),
    ("CPO", {"max_length": 30}),
    ("TPO", {"loss_type": "hinge"}),
    ("TPO", {"loss_type": "ipo", "learning_rate": 1e-4}),
    ("TPO", {"loss_type": "tpo-l", "tpo_l_gamma": 0.3, "label_smoothing": 0.1}),
    ("TPO", {"tpo_alpha": 0.0}),
    ("TPO", {"tpo_alpha": 0.4, "label_smoothing": 0.3}),
    ("TPO", {"max_length": 12, "truncation_mode": "keep_end"}),
    ("KTO", {"loss_type": "apo_zero_unpaired"}),
    ("KTO", {"desirable_weight": 1.5, "undesirable_weight": 0.5}),
    ("KTO", {"precompute_ref_log_probs": True}),
    ("KTO", {"precompute_ref_log_probs": True, "loss_type": "apo_zero_unpaired", "precompute_ref_batch_size": 4}),
    ("KTO", {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}),
    ("KTO", {"max_length": 17}),
    ("KTO", {"per_device_train_batch_size": 5}),
    ("Reward", {"center_rewards_coefficient": 0.3}),
    ("Reward", {"max_length": 24}),
    *((method, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}) for method in METHODS),
    *((method, {"optim": "adamw_torch", "learning_rate": 1e-4}) for method in METHODS),
]


@ONE_OR_MORE
@pytest.mark.parametrize(
    ("method", "settings"), OPTIONS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_options(model_path, method, settings, own):
    settings = {"max_steps": 3} | settings
    assert_same(method, model_path, examples(method, text_pairs(18)), own=own, **settings)


@ONE_OR_MORE
def test_margins_of_rewards(model_path, own):
    generator = random.Random(1)
    pairs = [pair | {"margin": generator.uniform(-1, 2)} for pair in text_pairs(18)]
    assert_same("Reward", model_path, pairs, own=own, max_steps=3)


def test_rewards_without_a_padding_token(model_path):
    """Padding is the end-of-text token then, so the reward is read before the final one."""

    def run(kind):
        tokenizer = word_tokenizer()
        tokenizer.pad_token = None
        arguments = {"processing_class": tokenizer}
        return train(
            kind, model_path, dataset(text_pairs(12)), method="Reward", trainer_args=arguments,
            **settings_of("Reward", max_steps=2),
        )  # fmt: skip

    assert max(differences(run("trl"), run("preftree"))) <= 1e-5


@ONE_OR_MORE
@pytest.mark.parametrize("method", METHODS)
def test_evaluation(model_path, method, own):
    held_out = dataset(examples(method, text_pairs(7, seed=3)))
    settings = settings_of(method, max_steps=2, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    runs = [
        train(
            kind, model_path, dataset(examples(method, text_pairs(12))), own=own, method=method,
            trainer_args={"eval_dataset": held_out}, **settings,
        )
        for kind in ("trl", "preftree")
    ]  # fmt: skip
    assert max(differences(*runs, OVER_PADDING.get(method, ()))) <= 1e-5
    assert any("eval_loss" in entry for entry in runs[1].state.log_history)


@pytest.mark.parametrize("method", METHODS)
def test_lora(model_path, method):
    peft = pytest.importorskip("peft")

    def config():
        task = (
            {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if method == "Reward" else {"task_type": "CAUSAL_LM"}
        )
        return peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="gaussian", **task)

    data = examples(method, text_pairs(12))
    assert_same(method, model_path, data, own=SEVERAL_ROWS, trainer_args={"peft_config": config}, max_steps=2)


@pytest.fixture(scope="module")
def moe_path(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("tiny-moe")
    family, settings = EXACT["mixtral"]
    settings = settings | {"vocab_size": len(tokenizer), "sliding_window": None, "eos_token_id": 1}
    settings |= {"output_router_logits": True, "router_aux_loss_coef": 2.0}
    build(family, settings).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@ONE_OR_MORE
@pytest.mark.parametrize("method", ["ORPO", "CPO", "KTO"])
def test_auxiliary_loss_of_a_mixture_of_experts(moe_path, method, own):
    """Prompts are routed once here; what is scored twice (ORPO's chosen sequences) must be counted once."""
    data = examples(method, text_pairs(12))
    assert_same(method, moe_path, data, own=own, max_steps=2, learning_rate=1e-3)


@pytest.mark.parametrize("method", ["KTO", "TPO", "Reward"])
def test_streamed_data(model_path, method):
    stream = dataset(examples(method, text_pairs(12))).to_iterable_dataset()
    own = {"keep_prompts_together": False} if method == "KTO" else {}
    runs = [
        train(kind, model_path, stream, own=own, method=method, **settings_of(method, max_steps=2))
        for kind in ("trl", "preftree")
    ]
    assert max(differences(*runs)) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_collator_of_the_users(model_path, method):
    """TRL's own, handed in: batches then come in its padded format."""
    collator = construct("trl", model_path, dataset(examples(method, text_pairs(6))), method=method).data_collator
    data = examples(method, text_pairs(12))
    arguments = {"data_collator": collator}
    # ORPO's and CPO's rows reach a collator cut already.
    limit = {"max_length": 30} if method in ("ORPO", "CPO") else {}
    assert_same(
        method,
        model_path,
        data,
        own=SEVERAL_ROWS,
        trainer_args=arguments,
        max_steps=2,
        remove_unused_columns=False,
        **limit,
    )


@pytest.mark.parametrize("method", METHODS)
def test_trl_config_is_taken_as_it_is(model_path, tmp_path, method):
    config, _ = classes("trl", method)
    common = {name: value for name, value in COMMON.items() if name != "beta" or method != "Reward"}
    args = config(str(tmp_path), **(common | settings_of(method, max_steps=1)))
    trainer = getattr(preftree, f"{method}Trainer")(
        model_path, args=args, train_dataset=dataset(examples(method, text_pairs(6)))
    )
    trainer.train()
    assert isinstance(trainer.args, getattr(preftree, f"{method}Config"))


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_ends_with_the_same_weights(model_path, tmp_path, method):
    data = dataset(examples(method, text_pairs(12)))
    settings = settings_of(method, max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch")
    config, trainer_class = classes("preftree", method)
    common = {name: value for name, value in COMMON.items() if name != "beta" or method != "Reward"}

    def run(**arguments):
        args = config(str(tmp_path), **(common | settings | SEVERAL_ROWS))
        trainer = trainer_class(model_path, args=args, train_dataset=data)
        trainer.train(**arguments)
        return trainer

    whole, resumed = run(), run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_saved_reward_model_scores_the_same_in_plain_transformers(model_path, tmp_path):
    trainer = train(
        "preftree", model_path, dataset(text_pairs(12)), method="Reward", **settings_of("Reward", max_steps=2)
    )
    trainer.save_model(str(tmp_path))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = torch.tensor([[6, 7, 8, 9], [10, 11, 12, 13]])
    assert torch.equal(trainer.model.eval()(ids).logits, loaded(ids).logits)


# ------------------------------------------------------------------------------------------------------------- KTO


def shuffled(rows: list[dict], seed: int = 2) -> list[dict]:
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    return rows


@pytest.mark.parametrize("form", ["pairs", "implicit-prompt", "shuffled"])
def test_answers_to_one_prompt_come_together(model_path, form):
    pairs = text_pairs(12, explicit=form != "implicit-prompt")
    rows = examples("KTO", text_pairs(12))
    data = shuffled(rows) if form == "shuffled" else pairs
    trainer = construct("preftree", model_path, dataset(data), method="KTO", per_device_train_batch_size=6)
    prompts = [tuple(ids) for ids in trainer.train_dataset["prompt_ids"]]
    assert all(prompts[i] == prompts[i + 1] for i in range(0, len(prompts), 2))
    assert len(set(prompts)) == 12
    together = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    assert sum(row.num_tokens for row in together["rows"]) < 0.8 * together["num_tokens"]


def test_answers_that_micro_batches_part(model_path, caplog):
    for size, told in ((6, False), (5, True)):
        caplog.clear()
        construct("preftree", model_path, dataset(text_pairs(12)), method="KTO", per_device_train_batch_size=size)
        assert ("2 prompts have answers in two micro-batches" in caplog.text) == told


def test_pairs_are_the_same_training_as_their_rows_one_by_one(model_path):
    settings = settings_of("KTO", max_steps=3)
    pairs = train("preftree", model_path, dataset(text_pairs(12)), method="KTO", **settings)
    rows = train("trl", model_path, dataset(examples("KTO", text_pairs(12))), method="KTO", **settings)
    assert max(differences(rows, pairs)) <= 1e-5


def test_streamed_pairs_become_single_answers(model_path):
    settings = settings_of("KTO", max_steps=3)
    runs = [
        train("preftree", model_path, data, method="KTO", **settings)
        for data in (dataset(text_pairs(12)), dataset(text_pairs(12)).to_iterable_dataset())
    ]
    assert max(differences(*runs)) <= 1e-6
    implicit = dataset(text_pairs(12, explicit=False)).to_iterable_dataset()
    train("preftree", model_path, implicit, method="KTO", **settings)


def test_trls_order_of_pairs_can_be_kept(model_path):
    settings = settings_of("KTO", max_steps=3)
    ours = train(
        "preftree", model_path, dataset(text_pairs(12)), own={"keep_prompts_together": False}, method="KTO", **settings
    )
    theirs = train("trl", model_path, dataset(text_pairs(12)), method="KTO", **settings)
    assert max(differences(theirs, ours)) <= 1e-5


def test_chosen_answers_alone(model_path):
    """A micro-batch without a rejected answer has no metrics of them."""
    rows = [
        {"prompt": p["prompt"], "completion": p[s], "label": True}
        for p in text_pairs(6)
        for s in ("chosen", "rejected")
    ]
    assert_same("KTO", model_path, rows, max_steps=2)


# ---------------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("method", METHODS)
def test_bf16_autocast(model_path, method):
    """bf16 autocast is on: the losses are those of TRL's within bf16's rounding, and not those of fp32."""
    data = dataset(examples(method, text_pairs(6)))
    settings = settings_of(method, max_steps=1)
    half = [
        train(kind, model_path, data, method=method, bf16=True, **settings).state.log_history[0]
        for kind in ("trl", "preftree")
    ]
    full = train("preftree", model_path, data, method=method, **settings).state.log_history[0]
    name = "mean_reward" if method == "Reward" else "logps/chosen"
    assert half[1][name] == pytest.approx(half[0][name], rel=2e-2, abs=2e-2)
    assert half[1][name] != full[name]
    assert math.isfinite(half[1]["loss"])


def test_trainers_have_trls_arguments():
    """Whatever TRL's constructors and configs take by name, ours take too."""
    for method in ("DPO", *METHODS):
        theirs, ours = classes("trl", method)[0], classes("preftree", method)[0]
        missing = set(theirs.__dataclass_fields__) - set(ours.__dataclass_fields__)
        assert not missing, (method, missing)
        for name, field in theirs.__dataclass_fields__.items():
            assert ours.__dataclass_fields__[name].default == field.default, (method, name)
        assert issubclass(classes("preftree", method)[1], classes("trl", method)[1])


def test_importing_is_quiet():
    """TRL warns when its experimental trainers are imported: users of the stable ones have not asked for these."""
    code = (
        "import warnings; warnings.simplefilter('always'); import preftree; preftree.DPOTrainer, preftree.ORPOTrainer"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRL_EXPERIMENTAL_SILENCE"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0
    assert "TRLExperimentalWarning" not in result.stderr


class Frozen(TrainerCallback):
    """How many objects collections leave out, after each step."""

    def __init__(self, fails=False):
        self.counts, self.fails = [], fails

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(gc.get_freeze_count())
        if self.fails:
            raise KeyboardInterrupt


def test_objects_of_the_first_step_are_no_garbage(model_path, monkeypatch):
    def counts(wanted=True, **options):
        callback, wants = Frozen(**options), []
        monkeypatch.setattr(base, "ObjectsKept", lambda given: wants.append(given) or ObjectsKept(wanted))
        with contextlib.suppress(KeyboardInterrupt):
            train("preftree", model_path, dataset(text_pairs(10)), trainer_args={"callbacks": [callback]})
        assert not any(wants)  # on a CPU
        return callback.counts

    gc.unfreeze()
    assert counts(wanted=False) == [0, 0, 0]
    first, *later = counts()
    assert first > 1000
    assert len(later) == 2
    assert all(0.9 * first < count <= first for count in later)  # some of them are given up since
    assert gc.get_freeze_count() == 0
    assert counts(fails=True)[0] > 1000
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        given = gc.get_freeze_count()
        assert all(0.9 * given < count <= given for count in [*counts(), gc.get_freeze_count()])
    finally:
        gc.unfreeze()
