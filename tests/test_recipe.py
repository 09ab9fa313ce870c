"""Recipes: options of other kinds than they can be are refused by name, before anything is made."""

import dataclasses
import os

import fuzz
import pytest
import trl
import yaml

from preftree import DPOConfig, cli, recipe

KINDS = (cli.TemplateArguments, DPOConfig, trl.ModelConfig, trl.DatasetMixtureConfig)

RIGHT = """
learning_rate: 1e-5
beta: 0.1
max_steps: 20
warmup_steps: 0.1
bf16: false
row_length: auto
loss_type: [sigmoid, sft]
loss_weights: [1.0, 0.5]
lora_target_modules: all-linear
save_strategy: "no"
logging_steps: 1
report_to: none
resume_from_checkpoint: true
max_length: null
gradient_checkpointing_kwargs: {use_reentrant: false}
model_init_kwargs: '{"dtype": "float32"}'
per_device_train_batch_size: "4"
an_option_that_is_none: {x: 1}
"""


def test_recipes_that_are_right():
    recipe.check(yaml.safe_load(RIGHT), KINDS)
    for kind in KINDS:  # what options are unless they are given
        defaults = {
            field.name: field.default for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING
        }
        recipe.check(defaults, [kind])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rate: fast", "option 'learning_rate' is 'fast' (str): it must be a number"),
        ("learning_rate: .nan", "option 'learning_rate' is nan (float): it must be a number"),
        ("max_steps: 3.5", "option 'max_steps' is 3.5 (float): it must be a whole number"),
        ("max_steps: true", "option 'max_steps' is True (bool): it must be a whole number"),
        ("beta: {x: 1}", "option 'beta' is {'x': 1} (dict): it must be a number"),
        ("bf16: 7", "option 'bf16' is 7 (int): it must be true or false"),
        ("save_strategy: no", "option 'save_strategy' is False (bool): it must be text, in quotes (YAML reads no"),
        ("dataset_num_proc: {}", "option 'dataset_num_proc' is {} (dict): it must be"),
        ("lora_target_modules: [1]", "option 'lora_target_modules' is [1] (list): it must be"),
        ("lr_scheduler_kwargs: [1]", "option 'lr_scheduler_kwargs' is [1] (list): it must be"),
        ("output_dir: 5", "option 'output_dir' is 5 (int): it must be"),
        ("loss_weights: 1", "option 'loss_weights' is 1 (int): it must be a list of a number"),
        ("gradient_accumulation_steps: 0", "gradient_accumulation_steps must be positive, got 0"),
        ("dataset_num_proc: 0", "dataset_num_proc must be positive, got 0"),
        ("loss_type: []", "loss_type names no loss"),
        ("model_name_or_path: x\nmodel_init_kwargs: x", "option 'model_init_kwargs' must be a mapping, not 'x'"),
        ("model_name_or_path: x\noutput_dir: ' '", "option 'output_dir' is empty: give a folder"),
        ('run_name: "a\\0b"', "option 'run_name' holds a character of number 0"),
        ("5: 6", "the name of an option must be text, not 5 (int)"),
        ("beta: 0.1\nbeta: 0.2", "not a recipe in plain YAML: 'beta' is there twice"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}", "not a recipe in plain YAML: 'a' is there twice"),
        (f"run_name: {'[' * 5000}", "lists or mappings in each other, too many to read"),
        ("accelerator_config: {x: 1}", "option 'accelerator_config' cannot be {'x': 1}: TypeError"),
        ("accelerator_config: gone.json", "option 'accelerator_config' cannot be 'gone.json': [Errno 2]"),
        ("lr_scheduler_kwargs: 'a=1'", "option 'lr_scheduler_kwargs' cannot be 'a=1': it must be a mapping"),
        (
            "parallelism_config: {tp_size: 2}",
            "option 'parallelism_config' is {'tp_size': 2} (dict): it must be left to",
        ),
        ("log_level: x", "option 'log_level' cannot be 'x': choose from detail, debug"),
        ("hub_strategy: x", "option 'hub_strategy' cannot be 'x': x is not a valid HubStrategy"),
        ("beta: 0.2\ntorch_compile_backend: x\nseed: 3", "option 'torch_compile_backend' cannot be 'x': choose from"),
        ("learning_rates: 1", "there is no option 'learning_rates'"),
        ("env: 3", "option 'env' must be a mapping, not 3"),
    ],
)
def test_what_is_wrong_is_named(line, message, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{line}\nuse_cpu: true\n" + ("" if line.startswith("bf16") else "bf16: false\n"))
    assert cli.main(["dpo", "--config", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--accelerator_config", "a.json", "--beta", "0.2"],
            "option 'accelerator_config' cannot be 'a.json': [Errno 2]",
        ),
        (["--beta", "0.2", "--accelerator_config=a.json"], "option 'accelerator_config' cannot be 'a.json': [Errno 2]"),
        (["--optim_args", "x"], "option 'optim_args' cannot be 'x': 'x' is not of the form name=value"),
        (["--beta", "0.2", "--config"], "--config: give the path of a recipe"),
    ],
)
def test_flags_that_are_wrong_are_named(flags, message, capsys):
    assert cli.main(["dpo", "--use_cpu", "true", "--bf16", "false", *flags]) == 2
    assert message in capsys.readouterr().err


def test_two_wrong_options_are_named_one_by_one(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("hub_strategy: x\nlog_level: y\nuse_cpu: true\nbf16: false\n")
    assert cli.main(["dpo", "--config", str(path)]) == 2
    first = capsys.readouterr().err
    path.write_text(path.read_text().replace("log_level: y\n" if "'log_level'" in first else "hub_strategy: x\n", ""))
    assert cli.main(["dpo", "--config", str(path)]) == 2
    second = capsys.readouterr().err
    assert {"log_level", "hub_strategy"} == {text.partition("'")[2].partition("'")[0] for text in (first, second)}


def test_variables_of_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PREFTREE_OF_A_TEST", "before")
    path = tmp_path / "recipe.yaml"
    path.write_text("env: {PREFTREE_OF_A_TEST: 5}\nuse_cpu: true\nbf16: false\n")
    assert cli.main(["dpo", "--config", str(path)]) == 2
    assert "no model: give --model_name_or_path" in capsys.readouterr().err
    assert os.environ["PREFTREE_OF_A_TEST"] == "5"


SETTINGS = {
    "optim_args": ({"optim_args": "a=1,b"}, "'b' is not of the form name=value"),
    "lr_scheduler_kwargs": ({"lr_scheduler_kwargs": {"x": 1}}, "unexpected keyword argument 'x'"),
    "gradient_checkpointing_kwargs": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"reentrant": False}},
        "'reentrant' is none of .*use_reentrant",
    ),
    "torch_compile_mode": ({"torch_compile_mode": "best"}, "choose from default"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_would_end_a_run_later_is_named_now(name):
    settings, why = SETTINGS[name]
    common = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
    with pytest.raises(ValueError, match=f"^option '{name}' cannot be .*{why}"):
        DPOConfig(**common, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"optim_args": "a=1, b=2"},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 50}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-9}},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 3}, "eval_strategy": "steps"},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile_mode": "max-autotune", "torch_compile_backend": "inductor"},
        {"learning_rate": 0.0, "lr_scheduler_kwargs": None},
    ],
    ids=str,
)
def test_settings_that_training_takes(settings):
    DPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **settings)


@pytest.mark.parametrize(("text", "what"), [("- 1\n- 2\n", "[1, 2] (list)"), ("", "empty"), ("dpo", "'dpo' (str)")])
def test_a_file_without_options(text, what, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert cli.main(["dpo", f"--config={path}"]) == 2
    assert f"{path} must hold options, 'name: value' each, not {what}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"model_init_kwargs": {"layers": 3}}, "option 'model_init_kwargs': the model takes no 'layers'"),
        ({"chat_template_path": "gone.jinja"}, "--chat_template_path gone.jinja: no such file"),
    ],
)
def test_what_goes_with_no_model_or_tokenizer(tmp_path, capsys, model_path, option, message):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"prompt": "the dog", "chosen": " runs", "rejected": " sleeps"}\n')
    settings = {"model_name_or_path": model_path, "dataset_name": str(rows), "use_cpu": True, "bf16": False}
    settings |= {"output_dir": str(tmp_path / "out")} | option
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert cli.main(["dpo", "--config", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_recipes_by_the_hundred(capsys):
    """(`python tests/fuzz.py --recipes 500` tries more.)"""
    counts = fuzz.run_recipes(25, seed=3)
    assert counts["crashed"] == counts["hung"] == counts["left something"] == 0
    assert counts["names an option"] >= counts["refused"] - 1 > 10
    assert counts["taken"] > 0
