"""The command line, in this process: a recipe in, a trained model and a report out; errors are one line."""

import json
import re

import pytest
import yaml
from datasets import Dataset, IterableDataset
from families import ALONG_PATHS, build
from preference_data import chat_pairs, text_pairs
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl_runs import COMMON, differences

from preftree import DPOTrainer, cli


@pytest.fixture
def recipe(tmp_path, model_path):
    for name, count in (("train", 12), ("test", 4)):
        rows = "".join(json.dumps(row) + "\n" for row in chat_pairs(count, seed=count))
        (tmp_path / f"{name}.jsonl").write_text(rows)
    settings = COMMON | {
        "model_name_or_path": model_path,
        "dataset_name": str(tmp_path),
        "output_dir": str(tmp_path / "out"),
        "eval_strategy": "steps",
        "eval_steps": 3,
        "per_device_train_batch_size": 3,
        "row_length": 128,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_dpo_trains_saves_and_reports(recipe, tmp_path, capsys):
    assert cli.main(["dpo", "--config", str(recipe), "--max_steps", "4"]) == 0
    out = tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).chat_template
    report = (out / "report.md").read_text()
    for expected in ("| rewards/margins |", "Held-out pairs", "tokens computed", "| steps | 4 |", "curves.png"):
        assert expected in report
    assert (out / "curves.png").exists()
    assert "report" in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(set(cli.METHODS) - {"dpo"}))
def test_every_method_trains_saves_and_reports(recipe, tmp_path, capsys, command):
    for name in ("train", "test"):
        rows = [json.loads(line) | {"margin": 0.5} for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        rows = [row | {"reference": row["chosen"][:1]} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = yaml.safe_load(recipe.read_text())
    if command == "reward":
        del settings["beta"]
    if command == "kto":
        settings["per_device_train_batch_size"] = 4
    recipe.write_text(yaml.safe_dump(settings))
    assert cli.main([command, "--config", str(recipe), "--max_steps", "3"]) == 0
    kind = AutoModelForSequenceClassification if command == "reward" else AutoModelForCausalLM
    kind.from_pretrained(tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text()
    for expected in (f"| method | {command} |", "Held-out pairs", "| steps | 3 |"):
        assert expected in report
    assert "| examples trained on | 0 |" not in report
    assert "margin" in capsys.readouterr().out


def test_simpo_is_cpo_without_likelihood_term(recipe):
    trainer = cli.run("simpo", ["--config", str(recipe), "--max_steps", "1"])
    assert (trainer.loss_type, trainer.cpo_alpha) == ("simpo", 0.0)
    assert trainer.state.log_history[-1]["train_loss"] > 0
    trainer = cli.run("simpo", ["--config", str(recipe), "--max_steps", "1", "--cpo_alpha", "0.5"])
    assert trainer.cpo_alpha == 0.5


def test_ranked_files(recipe, tmp_path, capsys):
    path = tmp_path / "ranked.jsonl"
    rows = [{"prompt": "the dog ", "completions": ["runs", "sings over", "sleeps"], "ranks": [2, 1, 3]}] * 6
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--config", str(recipe), "--dataset_name", str(path), "--eval_strategy", "no"]
    assert cli.main(["plan", *arguments]) == 0
    # Three pairs of 2 + 2 (or 3, with two words) tokens and two ends of text each, or one prompt and three responses.
    assert "tokens without sharing       156" in capsys.readouterr().out
    assert cli.main(["dpo", *arguments, "--max_steps", "2"]) == 0
    path.write_text(path.read_text() + json.dumps(rows[0] | {"ranks": [1, 1, 1]}) + "\n")
    assert cli.main(["dpo", *arguments]) == 2
    assert f"{path}, line 7, field 'ranks': all are 1" in capsys.readouterr().err


def test_a_stream_trains_as_its_files_do(recipe, tmp_path, capsys):
    """Whose rows are in two files; the plan reads all of them."""
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").unlink()
    for number, part in enumerate((lines[:7], lines[7:])):
        (tmp_path / f"train-{number:05}-of-00002.jsonl").write_text("".join(part))
    command = ["--config", str(recipe), "--max_steps", "4", "--train_sampling_strategy", "sequential"]
    ends = [
        cli.run("dpo", [*command, "--dataset_streaming", streaming, "--eval_strategy", evaluation])
        for streaming, evaluation in (("false", "no"), ("true", "steps"))
    ]
    ends[1].state.log_history = [log for log in ends[1].state.log_history if "eval_loss" not in log]
    assert [type(end.train_dataset) for end in ends] == [Dataset, IterableDataset]
    assert ends[0].state.global_step == 4
    assert max(differences(*ends)) == 0
    plans = []
    for streaming in ("false", "true"):
        capsys.readouterr()
        assert cli.main(["plan", "--config", str(recipe), "--dataset_streaming", streaming]) == 0
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1]
    assert re.search(r"^examples +12$", plans[0], re.MULTILINE)


def test_plan_needs_no_weights(recipe, tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    picture = tmp_path / "plan.png"
    assert cli.main(["plan", "--config", str(recipe), "--draw", str(picture)]) == 0
    out = capsys.readouterr().out
    for line in (
        "tokens without sharing",
        "tokens with sharing",
        "row_length",
        "expected speed-up",
        "tokens of a prompt",
    ):
        assert line in out
    assert picture.exists()
    assert (tmp_path / "plan-row.png").exists()
    assert "along each path" not in out


@pytest.mark.parametrize("name", ["mamba", "lfm2"])
def test_plan_says_what_is_not_shared(name, recipe, tmp_path, tokenizer, capsys):
    """Of models without any attention, too."""
    family, settings, _ = ALONG_PATHS[name]
    folder = tmp_path / name
    build(family, settings | {"vocab_size": len(tokenizer)}).config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert cli.main(["plan", "--config", str(recipe), "--model_name_or_path", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "expected speed-up" in out
    assert "parts of the layers run along each path, so that less is saved than this says (layer types" in out
    assert ("full attention  " in out) == (name == "lfm2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "none.jsonl"], "none.jsonl: no such file"),
        (["--loss_type", "sigmod"], "unknown loss_type 'sigmod'"),
        (["--row_length", "10"], "do not fit into row_length=10"),
        (["--resume_from_checkpoint", "true"], "there is no checkpoint"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_errors_are_one_line(recipe, capsys, arguments, message):
    assert cli.main(["dpo", "--config", str(recipe), *arguments]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("preftree dpo: ")
    assert message in last


def test_bad_row_is_named_before_a_model_is_loaded(recipe, tmp_path, capsys, monkeypatch):
    rows = text_pairs(3)
    del rows[1]["rejected"]
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(DPOTrainer, "__init__", refuse)
    assert cli.main(["dpo", "--config", str(recipe), "--dataset_name", str(path)]) == 2
    assert f"{path}, line 2, field 'rejected' is missing" in capsys.readouterr().err


def test_interrupted_run_resumes_to_the_same_weights(recipe, tmp_path, monkeypatch):
    settings = ["--max_steps", "5", "--optim", "adamw_torch", "--eval_strategy", "no"]
    assert cli.main(["dpo", "--config", str(recipe), *settings, "--output_dir", str(tmp_path / "whole")]) == 0

    class Interrupted(cli.Interrupt):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                self._handle()  # what Ctrl-C calls
            super().on_step_end(args, state, control, **kwargs)

    settings += ["--output_dir", str(tmp_path / "parts")]
    with monkeypatch.context() as patch:
        patch.setattr(cli, "Interrupt", Interrupted)
        assert cli.main(["dpo", "--config", str(recipe), *settings]) == 130
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert cli.main(["dpo", "--config", str(recipe), *settings, "--resume_from_checkpoint", "true"]) == 0
    whole, parts = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts"))
    assert whole == parts


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "preftree dpo" in capsys.readouterr().out
