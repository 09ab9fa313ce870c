"""DPO on prompts with images: the training that TRL's `DPOTrainer` does, images looked at once for each tree."""

import copy
import json

import pytest
import torch
import yaml
from accelerate import DistributedType
from conftest import word_tokenizer
from datasets import Dataset, Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl_runs import COMMON, differences, losses, train
from vision_families import build, images_seen, pair, pairs, picture

import preftree
from preftree import cli
from preftree.models import prepared_part

STEPS = {"max_steps": 20, "learning_rate": 0.01}


def run(kind, family, examples, own=None, reference=True, model=None, arguments=None, **settings):
    """A run of either trainer, and how many images its policy looked at in training."""
    processor, built = build(family)
    model = built if model is None else model
    given = {"processing_class": processor, **({"ref_model": copy.deepcopy(built)} if reference else {})}
    seen = images_seen(built)
    trainer = train(
        kind,
        lambda: model,
        Dataset.from_list(examples),
        own=own,
        trainer_args=given | (arguments or {}),
        **(STEPS | settings),
    )
    return trainer, seen


def compare(one, other):
    """Largest difference of a logged metric and of a parameter; that of keys' biases, which have no gradient, left out."""
    metrics, _ = differences(one, other)
    worst = 0.0
    for (name, left), (_, right) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        if not name.endswith("k_proj.bias"):
            worst = max(worst, float((left - right).detach().abs().max() / left.detach().abs().max()))
    return metrics, worst


@pytest.mark.parametrize("own", [{}, {"row_length": 256}], ids=["one-row", "several-rows"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "llava"])
def test_twenty_steps_are_trls(family, own):
    examples = pairs(12)
    (stock, looked), (trainer, seen) = (run(kind, family, examples, own=own) for kind in ("trl", "preftree"))
    assert (losses(stock) - losses(trainer)).abs().max() <= 1e-4
    assert max(compare(stock, trainer)) <= 1e-4
    assert float(losses(trainer).min()) < 0.65  # it learns
    assert 2 * sum(seen) == sum(looked)
    assert trainer.computed["tokens"] < trainer.computed["unshared_tokens"]


@pytest.mark.parametrize("family", ["qwen3_vl", "idefics3", "llava_next"])
def test_a_few_steps_of_others_are_trls(family):
    runs = [run(kind, family, pairs(7), max_steps=4)[0] for kind in ("trl", "preftree")]
    assert max(compare(*runs)) <= 1e-4


def test_checkpointing_accumulation_and_examples_without_images():
    examples = [*pairs(8), pair(3, [], "the dog ?", "a cat", "a dog .")]
    settings = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    runs = [
        run(kind, "qwen2_vl", examples, own={"row_length": 128}, max_steps=4, **settings)[0]
        for kind in ("trl", "preftree")
    ]
    assert max(compare(*runs)) <= 1e-4


def test_evaluation_is_trls():
    held_out = Dataset.from_list(pairs(5))
    runs = [
        run(kind, "gemma3", pairs(6), max_steps=2, arguments={"eval_dataset": held_out})[0]
        for kind in ("trl", "preftree")
    ]
    logs = [trainer.evaluate() for trainer in runs]
    again = runs[1].evaluate(Dataset.from_list(pairs(5)))
    for name, value in logs[0].items():
        if not any(part in name for part in ("runtime", "per_second")):
            assert logs[1][name] == pytest.approx(value, abs=1e-4), name
            assert again[name] == pytest.approx(value, abs=1e-4), name


def test_logits_for_compute_metrics():
    given = []

    def keep(prediction):
        given.append(prediction.predictions.shape)
        return {}

    arguments = {"eval_dataset": Dataset.from_list(pairs(4)), "compute_metrics": keep}
    for kind in ("trl", "preftree"):
        trainer, _ = run(kind, "qwen2_vl", pairs(6), max_steps=1, arguments=arguments)
        trainer.evaluate()
    assert given[0] == given[1]


def test_adapter_off_is_the_reference():
    peft = pytest.importorskip("peft")

    def adapted(built):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(built, config)

    runs = [
        run(kind, "qwen2_5_vl", pairs(6), reference=False, model=adapted(build("qwen2_5_vl")[1]), max_steps=4)[0]
        for kind in ("trl", "preftree")
    ]
    assert max(compare(*runs)) <= 1e-4


def test_reference_is_cached_by_images_and_words(monkeypatch):
    plain, _ = run("preftree", "qwen2_5_vl", pairs(7), max_steps=4)
    passes = []
    stock = preftree.DPOTrainer._run_reference
    monkeypatch.setattr(
        preftree.DPOTrainer, "_run_reference", lambda self, *given: passes.append(1) or stock(self, *given)
    )
    settings = {"reference": False, "max_steps": 4, "precompute_ref_log_probs": True}
    cached, _ = run("preftree", "qwen2_5_vl", pairs(7), **settings)
    assert max(compare(plain, cached)) <= 1e-5
    run("preftree", "qwen2_5_vl", pairs(7), **settings)
    assert len(passes) == 1
    others = pairs(7)
    others[3]["images"] = [picture(99, image.height, image.width) for image in others[3]["images"]]
    run("preftree", "qwen2_5_vl", others, **settings)
    assert len(passes) == 2


def test_streamed_images_and_one_column():
    examples = [{**example, "image": example["images"][0]} for example in pairs(6)]
    for example in examples:
        del example["images"]
    stream = Dataset.from_list(examples).to_iterable_dataset()
    processor, model = build("llava")
    given = {"processing_class": processor, "ref_model": copy.deepcopy(model)}
    runs = [
        train(kind, lambda: copy.deepcopy(model), stream, trainer_args=dict(given), max_steps=2)
        for kind in ("trl", "preftree")
    ]
    assert max(compare(*runs)) <= 1e-4


def test_truncation_is_trls():
    runs = [run(kind, "llava", pairs(6), max_steps=2, max_length=45)[0] for kind in ("trl", "preftree")]
    assert max(compare(*runs)) <= 1e-4
    longer, _ = run("preftree", "llava", pairs(6), max_steps=2)
    assert longer.state.log_history[0]["logps/chosen"] != runs[1].state.log_history[0]["logps/chosen"]


# ------------------------------------------------------------------------------------------------------- refusals


def trainer_of(examples, family="llava", trainer="DPO", **settings):
    processor, model = build(family)
    arguments = settings.pop("arguments", {})
    dataset = examples if isinstance(examples, Dataset) else Dataset.from_list(examples)
    config = getattr(preftree, f"{trainer}Config")(output_dir="unused", **(COMMON | settings))
    given = {"processing_class": processor} | ({"ref_model": copy.deepcopy(model)} if trainer == "DPO" else {})
    return getattr(preftree, f"{trainer}Trainer")(model, args=config, train_dataset=dataset, **(given | arguments))


def test_max_length_through_an_image():
    with pytest.raises(ValueError, match=r"row \d: max_length=20 cuts through its images, whose"):
        trainer_of(pairs(5), max_length=20).train()
    with pytest.raises(ValueError, match=r"row \d: \d+ tokens are more than max_length=20"):
        trainer_of(pairs(5), max_length=20, overlong="error").train()


def test_row_length_below_an_example():
    with pytest.raises(ValueError, match=r"row \d: its \d+ tokens do not fit into row_length=20"):
        trainer_of(pairs(5), row_length=20).train()


def change(**fields):
    examples = pairs(4)
    examples[2] = {**examples[2], **fields}
    return examples


PART = {"type": "text", "text": "what"}


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (change(images=None), "row 2, column 'images': it is missing"),
        (
            [
                {**each, "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, PART]}]}
                for each in pairs(4)
            ],
            r"row 0, column 'images': 2 images, but the prompt has 1 places for them",
        ),
        (
            [
                {**each, "chosen": [{"role": "assistant", "content": [{"type": "image", "text": None}, PART]}]}
                for each in [{**each, "rejected": [{"role": "assistant", "content": [PART]}]} for each in pairs(4)]
            ],
            "row 0, field 'chosen': it has a place for an image, but images belong into the prompt",
        ),
        (change(chosen=[]), "row 2, field 'chosen': empty"),
        ([{**each, "image": each["images"][0]} for each in pairs(4)], "columns 'image' and 'images'"),
    ],
    ids=["none", "places", "in-answer", "text", "both"],
)
def test_bad_rows_are_named(examples, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(examples)


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize(
    ("family", "token"),
    [("llava", "<image>"), ("gemma3", "<img>"), ("qwen2_vl", "<|image_pad|>"), ("idefics3", "<image>")],
)
def test_words_that_stand_for_images(images, family, token):
    example = pair(0, [(16, 16)] * images, "the cat", f"a dog {token} .", "a bird")
    with pytest.raises(ValueError, match=r"row 0(, its images)?: .*image"):
        trainer_of([example], family).train()


def test_a_chat_template_says_which_row_it_refuses():
    processor, model = build("llava")
    refusal = "{% if messages[0].content[-1].text == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    processor.chat_template = refusal + processor.chat_template
    examples = [*pairs(2), pair(9, [(16, 16)], "no", "a", "a cat")]
    settings = {"per_device_train_batch_size": 3, "max_steps": 1}
    with pytest.raises(ValueError, match="row 2: the chat template: not this"):
        run("preftree", "llava", examples, model=model, arguments={"processing_class": processor}, **settings)


def test_files_that_are_not_there():
    dataset = Dataset.from_list(pairs(3)).remove_columns("images").add_column("image", ["a.png", "b.png", "c.png"])
    with pytest.raises(ValueError, match=r"row 0, column 'image': there is no file a\.png"):
        trainer_of(dataset)
    words = Dataset.from_list(pairs(3)).remove_columns("images")
    with pytest.raises(ValueError, match="row 0, column 'images', image 1: it is missing"):
        trainer_of(words.add_column("images", [[__file__, None]] * 3))
    with pytest.raises(ValueError, match=r"column 'image': its values .* are no images"):
        trainer_of(words.add_column("image", [1, 2, 3]))


def test_what_images_exclude():
    with pytest.raises(ValueError, match="truncation_mode='keep_end' would cut off images"):
        trainer_of(pairs(3), truncation_mode="keep_end")
    with pytest.raises(NotImplementedError, match="row_length='auto' does not know what memory images take"):
        trainer_of(pairs(3), row_length="auto")
    with pytest.raises(NotImplementedError, match="overlong='drop'"):
        trainer_of(pairs(3), overlong="drop")
    processor, _ = build("llava")
    own = {"data_collator": DataCollatorForVisionPreference(processor)}
    with pytest.raises(NotImplementedError, match="data_collator: images are collated by this trainer"):
        trainer_of(pairs(3), arguments=own)
    with pytest.raises(ValueError, match=r"has images, but processing_class is .*: pass the processor"):
        trainer_of(pairs(3), arguments={"processing_class": word_tokenizer()})
    ranked = [{**each, "completions": [each["chosen"], each["rejected"]], "scores": [1.0, 0.0]} for each in pairs(3)]
    with pytest.raises(NotImplementedError, match="columns 'completions' and 'images'"):
        trainer_of(ranked)


def test_rows_of_ranks_are_alike_in_images(monkeypatch):
    """Those with images last, ones without sequences where a rank has fewer; where weights are shared out, or an error."""
    text = [pair(90 + index, [], "the dog ?", "a cat", "a dog .") for index in range(4)]
    trainer = trainer_of([*pairs(1), *text], row_length=56)
    inputs = trainer.data_collator([trainer.train_dataset[index] for index in range(5)])
    batch = trainer._micro_batch(inputs)
    assert [row.images is not None for row in batch.rows] == [True, False]
    prepared = prepared_part(trainer.model)
    preftree.sequence_logps(trainer.model, batch.rows[0].without_sequences())
    assert prepared.try_images is not None  # no sequence has been compared with the stock model's
    loss = trainer._loss(batch, trainer._run(trainer.model, batch))
    assert prepared.try_images is None

    def of_two(*other):
        monkeypatch.setattr(type(trainer.args), "world_size", 2)
        # The other rank has as many pairs.
        monkeypatch.setattr(trainer.exchange, "gather", lambda own: torch.tensor([own, [*other, *own[2:]]]).double())
        return trainer._micro_batch(inputs)

    batch = of_two(3, 2)
    assert [row.images is not None for row in batch.rows] == [False] * 3 + [True] * 2
    assert [row.num_sequences for row in batch.rows] == [0, 0, 8, 2, 0]
    assert len(batch.rows[-1].images.sets) == 1
    torch.testing.assert_close(trainer._loss(batch, trainer._run(trainer.model, batch)), loss)
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", DistributedType.FSDP)
    assert len(of_two(1, 1).rows) == 2
    with pytest.raises(NotImplementedError, match="a rank's batch has images and another's has none: with FSDP"):
        of_two(2, 0)


@pytest.mark.parametrize("trainer", ["ORPO", "CPO", "TPO", "KTO", "Reward"])
def test_other_trainers_take_no_images(trainer):
    examples = [{**each, "reference": each["chosen"]} for each in pairs(3)]
    settings = {"beta": 0.1} if trainer not in ("Reward",) else {}
    config = {name: value for name, value in COMMON.items() if name != "beta"} | settings
    processor, model = build("llava")
    args = getattr(preftree, f"{trainer}Config")(output_dir="unused", **config)
    with pytest.raises(NotImplementedError, match="column 'images': this trainer takes no images"):
        getattr(preftree, f"{trainer}Trainer")(
            model, args=args, train_dataset=Dataset.from_list(examples), processing_class=processor
        )


def test_a_collator_of_the_users_with_images_unseen_before():
    processor, _ = build("llava")
    words = [{name: each[name] for name in ("prompt", "chosen", "rejected")} for each in pairs(3)]
    trainer = trainer_of(words)
    batch = DataCollatorForVisionPreference(processor)(pairs(2))
    with pytest.raises(NotImplementedError, match="data_collator gives 'pixel_values' of a whole batch"):
        trainer.compute_loss(trainer.model, dict(batch))
    assert prepared_part(trainer.model).try_images is not None


# ---------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("form", ["paths", "bytes"])
def test_command_line_takes_image_files(tmp_path, capsys, form):
    processor, model = build("llava")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    examples = [{**each, "images": each["images"][:1]} for each in pairs(6)]
    if form == "paths":
        (tmp_path / "pictures").mkdir()
        for index, example in enumerate(examples):
            example.pop("images")[0].save(tmp_path / "pictures" / f"{index}.png")
            example["image"] = f"pictures/{index}.png"
        data = tmp_path / "train.jsonl"
        data.write_text("".join(json.dumps(example) + "\n" for example in examples))
    else:
        data = tmp_path / "train.parquet"
        Dataset.from_list(examples).to_parquet(data)
    out = tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    settings = {"model_name_or_path": str(tmp_path / "model"), "dataset_name": str(data), "output_dir": str(out)}
    recipe.write_text(yaml.safe_dump(COMMON | settings | {"max_steps": 2}))
    assert cli.main(["dpo", "--config", str(recipe)]) == 0
    assert "report" in capsys.readouterr().out
    AutoModelForImageTextToText.from_pretrained(out)
    assert AutoProcessor.from_pretrained(out).image_token == "<image>"
    by_hand = train(
        "preftree",
        lambda: model,
        Dataset.from_list([{**each, "images": pairs(6)[index]["images"][:1]} for index, each in enumerate(examples)])
        .remove_columns("image" if form == "paths" else [])
        .cast_column("images", [Image()]),
        trainer_args={"processing_class": processor, "ref_model": copy.deepcopy(model)},
        max_steps=2,
    )
    saved = AutoModelForImageTextToText.from_pretrained(out)
    for left, right in zip(saved.parameters(), by_hand.model.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-6)
    assert cli.main(["plan", "--config", str(recipe)]) != 0
    assert "tokens of images are not known before training" in capsys.readouterr().err
