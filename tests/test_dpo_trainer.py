"""`DPOTrainer` against TRL's: every loss and option, in one row and in several, metric by metric."""

import contextlib
import math

import pytest
import torch
import trl
from conftest import word_tokenizer
from families import EXACT, build
from preference_data import chat_pairs, dataset, text_pairs
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_runs import COMMON, differences, end_by_trl, losses, train

import preftree
from preftree.models import compiled, products
from preftree.objectives import DPO_LOSSES

SEVERAL_ROWS = {"row_length": 64}  # five pairs of up to 50 tokens: two rows or three


def assert_same(model_path, pairs, own=None, **settings):
    ours = train("preftree", model_path, dataset(pairs), own=own, **settings)
    metrics, parameters = differences(end_by_trl(model_path, pairs, **settings), ours)
    assert metrics <= 1e-5
    assert parameters <= 1e-5
    return ours


@pytest.mark.parametrize("own", [{}, SEVERAL_ROWS], ids=["one-row", "several-rows"])
@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_loss_types(model_path, loss_type, own):
    smoothing = 0.1 if loss_type in ("exo_pair", "robust", "aot", "aot_unpaired") else 0.0
    # Squared losses are large: steps that leave the parameters finite.
    rate = 1e-4 if loss_type in ("sppo_hard", "ipo") else 0.03
    # DiscoPOP divides by tau = 0.05, which would make rounding of the log-probabilities 20 beta times as large.
    beta = 0.05 if loss_type == "discopop" else 0.3
    settings = {"loss_type": loss_type, "label_smoothing": smoothing, "learning_rate": rate, "beta": beta}
    ours = assert_same(model_path, text_pairs(15), own=own, **settings)
    assert (ours.computed["rows"] > 3) == bool(own)


def test_equal_rewards_are_no_win(model_path):
    """Those of a policy that is its reference are all 0, and TRL counts none as right. (`differences` may leave that out.)"""
    ours = train("preftree", model_path, dataset(text_pairs(5)), max_steps=1)
    assert ours.state.log_history[0]["rewards/accuracies"] == 0.0


@pytest.mark.parametrize("own", [{}, SEVERAL_ROWS], ids=["one-row", "several-rows"])
@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"ld_alpha": 0.3},
        {"ld_alpha": 0.0, "precompute_ref_log_probs": True},
        {"use_weighting": True},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"precompute_ref_log_probs": True},
        {"max_length": 12},
        {"max_length": 12, "truncation_mode": "keep_end"},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
        {"loss_type": ["aot", "sft"], "loss_weights": [1.0, 0.5]},
        {"loss_type": ["aot_unpaired", "sft"], "ld_alpha": 0.5},
        {"include_num_input_tokens_seen": "all"},
        {"include_num_input_tokens_seen": "non_padding"},
        {"per_device_train_batch_size": 4, "max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 3},
        {"weight_decay": 0.1, "max_grad_norm": 0.1, "lr_scheduler_type": "linear", "warmup_steps": 1},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_options(model_path, settings, own):
    assert_same(model_path, text_pairs(15), own=own, **settings)


@pytest.fixture(scope="module")
def moe_path(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("tiny-moe")
    family, settings = EXACT["mixtral"]
    model = build(family, settings | {"vocab_size": len(tokenizer), "sliding_window": None, "eos_token_id": 1})
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("own", [{}, SEVERAL_ROWS], ids=["one-row", "several-rows"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"router_aux_loss_coef": 2.0},
        {"router_aux_loss_coef": 2.0, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"router_aux_loss_coef": 0.0},
        {"router_aux_loss_coef": 2.0, "loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5},
    ],
    ids=lambda settings: "-".join(settings) or "defaults",
)
def test_auxiliary_loss_of_a_mixture_of_experts(moe_path, settings, own):
    """Prompts are routed once here and twice in TRL; a row alone does not know how the others are routed."""
    ours = assert_same(moe_path, text_pairs(15), own=own, learning_rate=1e-3, **settings)
    assert ("aux_loss" in ours.state.log_history[0]) == (settings.get("router_aux_loss_coef") != 0.0)


def test_evaluation_has_the_auxiliary_loss(moe_path):
    runs = [
        train(kind, moe_path, dataset(text_pairs(5)), own=SEVERAL_ROWS, max_steps=1, learning_rate=1e-3)
        for kind in ("trl", "preftree")
    ]
    theirs, ours = (run.evaluate(dataset(text_pairs(7, seed=3))) for run in runs)
    assert ours["eval_aux_loss"] == pytest.approx(theirs["eval_aux_loss"], rel=1e-5)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("pairs", [text_pairs(10, explicit=False), chat_pairs(10)], ids=["implicit-prompt", "chat"])
def test_data_formats(model_path, pairs):
    assert_same(model_path, pairs, own=SEVERAL_ROWS)


def test_evaluation(model_path):
    held_out = dataset(text_pairs(7, seed=3))
    runs = [
        train(
            kind,
            model_path,
            dataset(text_pairs(15)),
            own=SEVERAL_ROWS,
            trainer_args={"eval_dataset": {"one": held_out, "two": dataset(text_pairs(3, seed=4))}},
            eval_strategy="steps",
            eval_steps=2,
        )
        for kind in ("trl", "preftree")
    ]
    metrics, _ = differences(*runs)
    assert metrics <= 1e-5
    values = [run.evaluate(held_out) for run in runs]
    for name, value in values[0].items():
        if "runtime" not in name and "per_second" not in name:
            assert value == pytest.approx(values[1][name], abs=1e-5, rel=1e-5), name


def test_compute_metrics_gets_logits(model_path):
    seen = {}

    def compute_metrics(prediction):
        seen.setdefault("shapes", []).append(prediction.predictions.shape)
        return {"mean": float(prediction.predictions[..., :5].mean())}

    runs = [
        train(
            kind,
            model_path,
            dataset(text_pairs(5)),
            trainer_args={"eval_dataset": dataset(text_pairs(4, seed=3)), "compute_metrics": compute_metrics},
            eval_strategy="steps",
            eval_steps=3,
        )
        for kind in ("trl", "preftree")
    ]
    assert differences(*runs)[0] <= 1e-5
    assert seen["shapes"][0] == seen["shapes"][1]


def test_loss_of_a_collated_batch_has_its_gradient(model_path):
    """`compute_loss` on what the collator gives, as a training loop of the user's calls it: all rows at once."""
    grads = []
    for kind, own in (("trl", {}), ("preftree", SEVERAL_ROWS)):
        trainer = train(kind, model_path, dataset(text_pairs(15)), own=own, loss_type=["aot", "sft"], max_steps=1)
        trainer.model.zero_grad()
        columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
        batch = trainer.data_collator([trainer.train_dataset.select_columns(columns)[i] for i in range(6)])
        trainer.compute_loss(trainer.model, batch).backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]))
    assert (grads[0] - grads[1]).abs().max() <= 1e-5 * grads[0].abs().max()


def test_predict_gives_logits(model_path):
    seen = []
    for kind in ("trl", "preftree"):
        trainer = train(kind, model_path, dataset(text_pairs(5)), max_steps=1)
        prediction = trainer.predict(trainer.train_dataset)
        seen.append((prediction.predictions, prediction.metrics["test_loss"]))
    assert seen[0][0] == pytest.approx(seen[1][0], abs=1e-4)
    assert seen[0][1] == pytest.approx(seen[1][1], abs=1e-5)


def test_peft_reference_is_the_adapter_switched_off(model_path):
    peft = pytest.importorskip("peft")

    def config():
        return peft.LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1, init_lora_weights="gaussian"
        )

    runs = [
        train(kind, model_path, dataset(text_pairs(15)), own=SEVERAL_ROWS, trainer_args={"peft_config": config})
        for kind in ("trl", "preftree")
    ]
    metrics, parameters = differences(*runs)
    assert metrics <= 1e-5
    assert parameters <= 1e-5
    assert losses(runs[0])[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(runs[0])[-1] != losses(runs[0])[0]


def test_peft_reference_is_the_adapter_it_started_from(model_path):
    peft = pytest.importorskip("peft")

    def model():
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), config)

    tokenizer = {"processing_class": word_tokenizer()}
    runs = [
        train(kind, model, dataset(text_pairs(15)), own=SEVERAL_ROWS, trainer_args=tokenizer)
        for kind in ("trl", "preftree")
    ]
    metrics, parameters = differences(*runs)
    assert metrics <= 1e-5
    assert parameters <= 1e-5


def test_reference_of_the_users(model_path):
    def reference():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_pretrained(model_path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    runs = [
        train(kind, model_path, dataset(text_pairs(15)), own=SEVERAL_ROWS, trainer_args={"ref_model": reference()})
        for kind in ("trl", "preftree")
    ]
    assert max(differences(*runs)) <= 1e-5
    assert abs(float(losses(runs[1])[0]) - math.log(2)) > 1e-3


def test_collator_of_the_users(model_path):
    # (Some are cut, but none so far that two responses are equal: which is preferred would be a matter of rounding.)
    collator = {"data_collator": DataCollatorForPreference(pad_token_id=0, max_length=30)}
    runs = [
        train(kind, model_path, dataset(text_pairs(15)), own=SEVERAL_ROWS, trainer_args=collator)
        for kind in ("trl", "preftree")
    ]
    assert max(differences(*runs)) <= 1e-5


def test_streamed_data(model_path):
    stream = dataset(text_pairs(15)).to_iterable_dataset()
    runs = [train(kind, model_path, stream, own=SEVERAL_ROWS) for kind in ("trl", "preftree")]
    assert max(differences(*runs)) <= 1e-5


def test_trl_config_is_taken_as_it_is(model_path, tmp_path):
    args = trl.DPOConfig(output_dir=str(tmp_path), **COMMON)
    trainer = preftree.DPOTrainer(model_path, args=args, train_dataset=dataset(text_pairs(15)))
    trainer.train()
    assert differences(train("trl", model_path, dataset(text_pairs(15))), trainer)[0] <= 1e-5


@pytest.mark.parametrize("row_length", [None, 56, 64, 200])
def test_first_loss_is_ln_2(model_path, row_length):
    trainer = train("preftree", model_path, dataset(text_pairs(15)), own={"row_length": row_length}, max_steps=1)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_unshared_baseline_is_the_same_training(model_path):
    shared = train("preftree", model_path, dataset(text_pairs(15)))
    alone = train("preftree", model_path, dataset(text_pairs(15)), own={"share_prefixes": False})
    assert max(differences(shared, alone)) <= 1e-5
    assert alone.computed["tokens"] == alone.computed["unshared_tokens"] == shared.computed["unshared_tokens"]
    assert shared.computed["tokens"] < alone.computed["tokens"]


def test_workers_and_pinning(model_path):
    runs = [
        train("preftree", model_path, dataset(text_pairs(15)), dataloader_num_workers=workers) for workers in (0, 2)
    ]
    assert max(differences(*runs)) == 0


def test_compiled_wrapper_changes_nothing(model_path):
    runs = [
        train("preftree", model_path, dataset(text_pairs(15)), own={"compile_layers": False}, torch_compile=compiled)
        for compiled in (False, True)
    ]
    assert max(differences(*runs)) <= 1e-6


def test_compiled_layers_change_nothing(model_path, monkeypatch):
    """Policy and reference run the same compiled code; rows of other lengths run it too."""
    monkeypatch.setattr(compiled, "_BACKEND", "aot_eager")
    torch._dynamo.reset()
    plain = train("preftree", model_path, dataset(text_pairs(15)), own=SEVERAL_ROWS)
    counters.clear()
    fast = train("preftree", model_path, dataset(text_pairs(15)), own=SEVERAL_ROWS | {"compile_layers": True})
    assert max(differences(plain, fast)) <= 1e-5
    compilations = counters["stats"]["unique_graphs"]
    train("preftree", model_path, dataset(text_pairs(15)), torch_compile=True)  # compiles layers too
    assert counters["stats"]["unique_graphs"] == compilations > 0


def test_rows_add_to_gradients_within_products(model_path, monkeypatch):
    monkeypatch.setattr(compiled, "_BACKEND", "aot_eager")
    torch._dynamo.reset()
    plain = train("preftree", model_path, dataset(text_pairs(15)), own=SEVERAL_ROWS)
    monkeypatch.setattr(products, "serves", lambda *operands: True)
    added, so_far = [], products.so_far
    monkeypatch.setattr(products, "so_far", lambda weights: added.append(so_far(weights)) or added[-1])
    monkeypatch.setattr(
        "preftree.models.prepared.adding_where_they_lie", lambda _: contextlib.nullcontext()
    )  # the layers' own alone
    fast = train("preftree", model_path, dataset(text_pairs(15)), own=SEVERAL_ROWS | {"compile_layers": True})
    assert max(differences(plain, fast)) <= 1e-5
    assert any(each is not None for each in added)


def test_bf16_autocast_reaches_policy_and_reference(model_path):
    """Equal weights in bf16 must still give ln 2: a reference outside autocast would not."""
    trainer = train("preftree", model_path, dataset(text_pairs(15)), own=SEVERAL_ROWS, bf16=True, max_steps=1)
    full = train("preftree", model_path, dataset(text_pairs(15)), own=SEVERAL_ROWS, max_steps=1)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.state.log_history[0]["logps/chosen"] != full.state.log_history[0]["logps/chosen"]


def test_saved_model_generates_the_same_in_plain_transformers(model_path, tmp_path):
    trainer = train("preftree", model_path, dataset(text_pairs(15)))
    trainer.save_model(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    trainer.model.eval()
    ids = torch.tensor([[6, 7, 8, 9], [10, 11, 12, 13]])
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(trainer.model.generate(ids, **arguments), loaded.generate(ids, **arguments))


@pytest.mark.parametrize("own", [{}, SEVERAL_ROWS], ids=["one-row", "several-rows"])
def test_resumed_run_ends_with_the_same_weights(model_path, tmp_path, own):
    settings = COMMON | own | {"max_steps": 6, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    settings |= {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "output_dir": str(tmp_path)}
    data = dataset(text_pairs(11))
    whole = preftree.DPOTrainer(model_path, args=preftree.DPOConfig(**settings), train_dataset=data)
    whole.train()
    resumed = preftree.DPOTrainer(model_path, args=preftree.DPOConfig(**settings), train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert whole.state.log_history[-2]["loss"] == resumed.state.log_history[-2]["loss"]


def test_compiled_layers_exclude_offloaded_activations():
    offloading = {"activation_offloading": True, "gradient_checkpointing": False, "bf16": False, "use_cpu": True}
    with pytest.raises(ValueError, match="compile_layers cannot be combined with activation_offloading"):
        preftree.DPOConfig(compile_layers=True, **offloading)
    assert preftree.DPOConfig(torch_compile=True, **offloading).compiles_layers is False
    assert preftree.DPOConfig(torch_compile=True, bf16=False, use_cpu=True).compiles_layers is True
    assert preftree.DPOConfig(bf16=False, use_cpu=True).compiles_layers is None


def test_activations_of_a_cpu_are_not_offloaded(model_path):
    args = preftree.DPOConfig(activation_offloading=True, gradient_checkpointing=False, bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="activation_offloading=True moves activations from a GPU"):
        preftree.DPOTrainer(model_path, args=args, train_dataset=dataset(text_pairs(4)))
