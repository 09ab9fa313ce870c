"""What TRL's own tests of these trainers cover, option by option, against TRL: data forms, PEFT, saved files, callbacks."""

import json
import os

import pytest
import torch
from conftest import word_tokenizer
from preference_data import chat_pairs, dataset, examples, text_pairs
from test_trainers import OVER_PADDING, RATES, settings_of
from transformers import AutoModelForCausalLM, TrainerCallback
from trl_runs import construct, differences, train

METHODS = ("DPO", "ORPO", "CPO", "TPO", "KTO", "Reward")
# ORPO's and CPO's trainers render chats before they tokenise, by other code.
STABLE = ("DPO", "TPO", "KTO", "Reward")


def settings(method, **changes):
    rates = RATES | {"DPO": 0.03}
    return {"learning_rate": rates[method], "per_device_train_batch_size": 6, "max_steps": 2} | changes


def both(method, model, data, trainer_args=None, own=None, **changes):
    return [
        train(
            kind, model, dataset(data), method=method, trainer_args=trainer_args, own=own, **settings(method, **changes)
        )
        for kind in ("trl", "preftree")
    ]


def assert_same(method, *args, tolerance=1e-5, **kwargs):
    runs = both(method, *args, **kwargs)
    assert max(differences(*runs, OVER_PADDING.get(method, ()))) <= tolerance
    return runs


# ------------------------------------------------------------------------------------------------------------------ data


TOOL_TEMPLATE = (
    "{% if tools %}<system> {{ tools | length }} {% for t in tools %}{{ t['function']['name'] }} {% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}> {% if m.tool_calls %}{{ m.tool_calls[0]['function']['name'] }} "
    "{% else %}{{ m['content'] }} {% endif %}{% if shout %}! {% endif %}{{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tool_tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer


def tool_pairs(count):
    tool = {"type": "function", "function": {"name": "river", "description": "old", "parameters": {"type": "object"}}}
    call = [{"type": "function", "function": {"name": "river", "arguments": {"where": "near"}}}]
    pairs = chat_pairs(count)
    for pair in pairs:
        pair["tools"] = json.dumps([tool])
        pair["chosen"] = [{"role": "assistant", "content": "", "tool_calls": call}]
        pair["rejected"][0]["tool_calls"] = None
    return pairs


@pytest.mark.parametrize("method", ["DPO", "KTO", "Reward"])
def test_tools(model_path, method):
    runs = assert_same(method, model_path, tool_pairs_for(method), trainer_args={"processing_class": tool_tokenizer()})
    column = {"KTO": "prompt_ids", "DPO": "prompt_ids"}.get(method, "chosen_ids")
    name = word_tokenizer().convert_tokens_to_ids("river")
    assert all(name in ids for ids in runs[1].train_dataset[column]), "the tools have not reached the template"


def tool_pairs_for(method):
    pairs = tool_pairs(12)
    if method != "KTO":
        return pairs
    tools = {json.dumps(pair["prompt"]): pair["tools"] for pair in pairs}
    return [row | {"tools": tools[json.dumps(row["prompt"])]} for row in examples("KTO", pairs)]


@pytest.mark.parametrize("method", STABLE)
def test_chat_template_kwargs(model_path, method):
    data = [example | {"chat_template_kwargs": {"shout": True}} for example in examples(method, chat_pairs(12))]
    runs = assert_same(method, model_path, data, trainer_args={"processing_class": tool_tokenizer()})
    column = "chosen_ids" if method != "KTO" else "completion_ids"
    shout = word_tokenizer().convert_tokens_to_ids("!")
    assert all(ids[-2] == shout for ids in runs[1].train_dataset[column])


@pytest.mark.parametrize("method", STABLE)
def test_padding_to_a_multiple(model_path, method):
    assert_same(method, model_path, examples(method, text_pairs(12)), pad_to_multiple_of=16)


@pytest.mark.parametrize("method", METHODS)
def test_processes_for_the_data(model_path, method):
    assert_same(method, model_path, examples(method, text_pairs(12)), dataset_num_proc=2, max_steps=1)


@pytest.mark.parametrize("method", ["DPO", "TPO", "KTO", "Reward"])
def test_several_evaluation_sets(model_path, method):
    held_out = {name: dataset(examples(method, text_pairs(5, seed=seed))) for name, seed in (("a", 3), ("b", 4))}
    runs = assert_same(
        method, model_path, examples(method, text_pairs(12)), trainer_args={"eval_dataset": held_out},
        eval_strategy="steps", eval_steps=1, eval_on_start=True,
    )  # fmt: skip
    assert {"eval_a_loss", "eval_b_loss"} <= {name for entry in runs[1].state.log_history for name in entry}


@pytest.mark.parametrize("method", ["DPO", "TPO", "KTO", "Reward"])
def test_evaluation_of_a_raw_data_set(model_path, method):
    held_out = dataset(examples(method, text_pairs(5, seed=3)))
    theirs, ours = (run.evaluate(held_out) for run in both(method, model_path, examples(method, text_pairs(12))))
    for name, value in theirs.items():
        if "runtime" not in name and "per_second" not in name:
            assert ours[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name


@pytest.mark.parametrize("method", ["DPO", "TPO", "KTO", "Reward"])
def test_compute_metrics_and_predict(model_path, method):
    shapes = {}

    def run(kind):
        def compute_metrics(prediction):
            shapes.setdefault(kind, []).append(prediction.predictions.shape)
            return {"mean": float(prediction.predictions.mean())}

        held_out = dataset(examples(method, text_pairs(4, seed=3)))
        trainer = train(
            kind, model_path, dataset(examples(method, text_pairs(12))), method=method,
            trainer_args={"eval_dataset": held_out, "compute_metrics": compute_metrics},
            **settings(method, eval_strategy="steps", eval_steps=2),
        )  # fmt: skip
        return trainer, trainer.predict(trainer.eval_dataset).predictions

    (theirs, predicted), (ours, mine) = run("trl"), run("preftree")
    assert shapes["trl"] == shapes["preftree"]
    # Logits at padding are anything; those of real tokens, and of rewards, are the same.
    assert mine == pytest.approx(predicted, abs=1e-3)
    assert differences(theirs, ours, ("mean",))[0] <= 1e-5


# ------------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("method", METHODS)
def test_weights_in_half_precision(model_path, method):
    """`model_init_kwargs` says bf16: both trainers then start from bf16's rounding of the same losses."""
    runs = both(
        method, model_path, examples(method, text_pairs(6)), max_steps=1, model_init_kwargs={"dtype": "bfloat16"}
    )
    assert {parameter.dtype for parameter in runs[1].model.parameters()} == {torch.bfloat16}
    theirs, ours = (run.state.log_history[0]["loss"] for run in runs)
    assert ours == pytest.approx(theirs, rel=2e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing(model_path, method, reentrant):
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert_same(method, model_path, examples(method, text_pairs(12)), own={"row_length": 80}, **kwargs)


def adapter(method, **kwargs):
    peft = pytest.importorskip("peft")
    task = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if method == "Reward" else {"task_type": "CAUSAL_LM"}
    return peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="gaussian", **task, **kwargs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "kwargs", [{"use_dora": True}, {"use_rslora": True, "lora_dropout": 0.1}], ids=lambda kwargs: next(iter(kwargs))
)
def test_kinds_of_adapters(model_path, method, kwargs):
    runs = assert_same(
        method, model_path, examples(method, text_pairs(12)), own={"row_length": 80},
        trainer_args={"peft_config": lambda: adapter(method, **kwargs)}, gradient_checkpointing=True,
    )  # fmt: skip
    trained = {name for name, parameter in runs[1].model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora" in name or "score" in name for name in trained)


@pytest.mark.parametrize("method", METHODS)
def test_adapter_in_bf16_autocast(model_path, method):
    trainer = train(
        "preftree", model_path, dataset(examples(method, text_pairs(12))), method=method,
        trainer_args={"peft_config": lambda: adapter(method)}, **settings(method, bf16=True, gradient_checkpointing=True),
    )  # fmt: skip
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_prompt_tuning_is_refused(model_path, method):
    peft = pytest.importorskip("peft")
    task = "SEQ_CLS" if method == "Reward" else "CAUSAL_LM"
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3)
    with pytest.raises(NotImplementedError, match="prepends virtual tokens"):
        construct(
            "preftree", model_path, dataset(examples(method, text_pairs(6))), method=method,
            trainer_args={"peft_config": lambda: config}, per_device_train_batch_size=6,
        )  # fmt: skip


# ------------------------------------------------------------------------------------- around the loop: files, callbacks


@pytest.mark.parametrize("method", METHODS)
def test_saved_files_and_tags(model_path, method):
    runs = both(method, model_path, examples(method, text_pairs(12)), save_strategy="steps", save_steps=1)
    found = []
    for run in runs:
        run.save_model()
        found.append({
            os.path.relpath(os.path.join(folder, name), run.args.output_dir)
            for folder, _, names in os.walk(run.args.output_dir)
            for name in names
        })  # fmt: skip
    own = {name for name in found[1] if name.endswith("/preftree_files.json")}  # of each checkpoint
    assert len(own) == 2
    assert found[0] == found[1] - own
    assert any(name.endswith("README.md") for name in found[1])
    assert set(runs[0].model.model_tags) == set(runs[1].model.model_tags)


@pytest.mark.parametrize("method", METHODS)
def test_callbacks_and_optimizers(model_path, method):
    class Recorder(TrainerCallback):
        def __init__(self):
            self.steps, self.logs = 0, []

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(set(logs))

    recorded = []
    for kind in ("trl", "preftree"):
        recorder = Recorder()
        trainer = construct(
            kind, model_path, dataset(examples(method, text_pairs(12))), method=method,
            trainer_args={"callbacks": [recorder]}, **settings(method),
        )  # fmt: skip
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.01, momentum=0.9)
        trainer.train()
        recorded.append((recorder.steps, recorder.logs))
    assert recorded[0] == recorded[1]


def test_model_object_with_its_own_reference(model_path):
    for method in ("DPO", "KTO"):
        runs = [
            train(
                kind, lambda: AutoModelForCausalLM.from_pretrained(model_path), dataset(examples(method, text_pairs(12))),
                method=method, **settings(method),
                trainer_args={
                    "ref_model": AutoModelForCausalLM.from_pretrained(model_path),
                    "processing_class": word_tokenizer(),
                },
            )
            for kind in ("trl", "preftree")
        ]  # fmt: skip
        assert max(differences(*runs)) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_remainder_of_an_epoch(model_path, method):
    """The last micro-batch and the last accumulation of an epoch are smaller."""
    assert_same(
        method, model_path, examples(method, text_pairs(10)), own={"row_length": 80}, max_steps=-1, num_train_epochs=2,
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip


def test_settings_are_those_of_the_other_file():
    assert {**settings_of("KTO"), "max_steps": 2} == settings("KTO")
