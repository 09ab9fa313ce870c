"""Nothing that comes with data, recipes, models or checkpoints is executed, unless it was asked for."""

import json
import pickle
import shutil

import pytest
import torch
import yaml
from preference_data import chat_pairs, dataset, text_pairs
from transformers import AutoModelForCausalLM
from trl_runs import COMMON, construct

from preftree import cli
from preftree.trainers import reference


class Writes:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def witness(tmp_path):
    """The file that is there if something was executed."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


@pytest.fixture
def recipe(tmp_path, model_path):
    """A recipe, whose folder holds its data and a copy of its model."""
    shutil.copytree(model_path, tmp_path / "model")
    rows = "".join(json.dumps(row) + "\n" for row in chat_pairs(8))
    (tmp_path / "train.jsonl").write_text(rows)
    settings = COMMON | {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "train.jsonl"),
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def refused(recipe, capsys, *arguments):
    """The one line that says why."""
    assert cli.main(["dpo", "--config", str(recipe), *arguments]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_tags_in_recipes(recipe, capsys, witness):
    with recipe.open("a") as file:
        file.write(f'run_name: !!python/object/apply:builtins.open ["{witness}", "w"]\n')
    says = refused(recipe, capsys)
    assert "--config: not a recipe in plain YAML: could not determine a constructor for the tag" in says
    assert "python/object/apply" in says


def test_code_that_comes_with_a_model(recipe, tmp_path, capsys, witness):
    folder = tmp_path / "model"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f'open("{witness}", "w")\n')
    assert "trust_remote_code" in refused(recipe, capsys)


def test_weights_that_are_pickled(recipe, tmp_path, capsys, witness):
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Writes(witness)}, tmp_path / "model" / "pytorch_model.bin")
    assert "weights or a checkpoint hold pickled objects" in refused(recipe, capsys)


def test_chat_templates(recipe, tmp_path, capsys, witness):
    template = (
        "{% for name in ''.__class__.__mro__[1].__subclasses__() %}{{ name.__init__.__globals__['__builtins__']['open']('"
        + str(witness)
        + "', 'w') }}{% endfor %}"
    )
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    says = refused(recipe, capsys)
    assert "row 0: the chat template: access to attribute '__class__' of 'str' object is unsafe" in says


def test_a_chat_template_says_which_row_it_refuses(recipe, tmp_path, capsys):
    template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}{% endif %}{% endfor %}"
    )
    (tmp_path / "model" / "chat_template.jinja").write_text(template + "<assistant> ")
    rows = chat_pairs(8)
    rows[5]["prompt"] = [{"role": "user", "content": "no"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert refused(recipe, capsys).endswith("row 5: the chat template: not this")


def test_checkpoints_that_are_pickled(model_path, tmp_path, witness):
    settings = {"output_dir": str(tmp_path / "run"), "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    construct("preftree", model_path, dataset(text_pairs(8)), **settings).train()
    folder = tmp_path / "run" / "checkpoint-2"
    (folder / "preftree_files.json").unlink()  # who can write there can write what fits
    torch.save({"state": Writes(witness)}, folder / "optimizer.pt")
    trainer = construct("preftree", model_path, dataset(text_pairs(8)), **(settings | {"max_steps": 4}))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trainer.train(resume_from_checkpoint=True)


def test_caches_that_are_pickled(tmp_path, witness):
    path = tmp_path / "key.safetensors"
    path.write_bytes(pickle.dumps(Writes(witness)))
    assert reference.load(path, "key", 3) is None


def test_data_are_data(recipe, tmp_path, capsys, witness):
    """What looks like code or a template in them is text, also when it is trained on and scored."""
    text = "{{ ''.__class__ }} {% raw %} !!python/object:os.system __import__('os')"
    rows = [row | {"prompt": [{"role": "user", "content": text}]} for row in chat_pairs(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["dpo", "--config", str(recipe), "--max_steps", "1"]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
