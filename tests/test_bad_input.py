"""What the trainer refuses before any training, with the row and the field."""

import pytest
import torch
import trl
from conftest import word_tokenizer
from preference_data import chat_pairs, dataset, text_pairs
from transformers import AutoModelForCausalLM
from trl_runs import COMMON

import preftree


def make(model, pairs, tmp_path, processing_class=None, **settings):
    args = preftree.DPOConfig(output_dir=str(tmp_path), **(COMMON | settings))
    return preftree.DPOTrainer(
        model, args=args, train_dataset=dataset(pairs), processing_class=processing_class or word_tokenizer()
    )


def with_row(**changes):
    pairs = text_pairs(4)
    pairs[2] |= changes
    return pairs


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (with_row(chosen=""), r"train dataset, row 2, field 'chosen': empty"),
        (with_row(prompt=""), r"train dataset, row 2, field 'prompt': empty"),
        (with_row(rejected=None), r"train dataset, row 2, field 'rejected' is missing"),
        ([{"prompt": "a", "good": "b"}], r"train dataset: there is no column 'chosen'"),
        ([{"chosen": "the dog", "rejected": "a cat"}], r"row 0, field 'prompt': empty .*do not start alike"),
    ],
)
def test_bad_data(model_path, tmp_path, pairs, message):
    with pytest.raises(ValueError, match=message):
        make(model_path, pairs, tmp_path)


def test_no_chat_template(model_path, tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="row 0: the data are chats, but the tokenizer has no chat template"):
        make(model_path, chat_pairs(3), tmp_path, tokenizer)


def test_token_outside_the_vocabulary(model_path, tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(ValueError, match=r"row 2, field 'chosen': token id \d+ is outside the model's vocabulary"):
        make(model_path, with_row(chosen="a zebra"), tmp_path, tokenizer)


def test_equal_responses_are_counted(model_path, tmp_path, caplog):
    make(model_path, with_row(chosen="a cat", rejected="a cat"), tmp_path)
    assert "chosen and rejected are equal in 1 examples" in caplog.text


def test_pair_longer_than_the_row(model_path, tmp_path):
    pairs = with_row(prompt="the dog " * 30)
    with pytest.raises(ValueError, match=r"row 2: its \d+ tokens do not fit into row_length=60.*overlong"):
        make(model_path, pairs, tmp_path, row_length=60)
    dropped = make(model_path, pairs, tmp_path, row_length=60, overlong="drop")
    assert len(dropped.train_dataset) == 3
    pairs = with_row(rejected="the dog " * 40)
    cut = make(model_path, pairs, tmp_path, row_length=60, overlong="truncate")
    assert len(cut.train_dataset) == 4
    cut.train()


@pytest.mark.parametrize("limit", [{"row_length": 60, "overlong": "drop"}, {"max_length": 31}], ids=["row", "prompt"])
def test_streamed_pair_that_is_too_long_is_left_out(model_path, tmp_path, limit):
    args = preftree.DPOConfig(output_dir=str(tmp_path), **(COMMON | limit))
    stream = dataset(with_row(prompt="the dog " * 30)).to_iterable_dataset()
    trainer = preftree.DPOTrainer(model_path, args=args, train_dataset=stream, processing_class=word_tokenizer())
    assert [len(example["prompt_ids"]) < 60 for example in trainer.train_dataset] == [True] * 3


def test_pair_longer_than_the_row_when_nothing_is_shared(model_path, tmp_path):
    pairs = with_row(prompt="the dog " * 20)
    assert len(make(model_path, pairs, tmp_path, row_length=80).train_dataset) == 4
    with pytest.raises(ValueError, match=r"row 2: its \d+ tokens do not fit into row_length=80"):
        make(model_path, pairs, tmp_path, row_length=80, share_prefixes=False)


def test_pair_longer_than_max_length(model_path, tmp_path):
    pairs = with_row(rejected="the dog " * 40)
    assert len(make(model_path, pairs, tmp_path, max_length=60).train_dataset) == 4  # cut, as TRL does
    assert len(make(model_path, pairs, tmp_path, max_length=60, overlong="drop").train_dataset) == 3
    with pytest.raises(ValueError, match=r"row 2: \d+ tokens are more than max_length=60"):
        make(model_path, pairs, tmp_path, max_length=60, overlong="error")


def test_prompt_that_fills_max_length(model_path, tmp_path, caplog):
    pairs = with_row(prompt="the dog " * 40)
    for overlong in (None, "truncate"):
        caplog.clear()
        assert len(make(model_path, pairs, tmp_path, max_length=60, overlong=overlong).train_dataset) == 3
        assert "in 1 examples the prompt alone fills max_length=60" in caplog.text
    assert len(make(model_path, pairs, tmp_path, max_length=60, overlong="drop").train_dataset) == 3
    with pytest.raises(ValueError, match=r"row 2: \d+ tokens are more than max_length=60"):
        make(model_path, pairs, tmp_path, max_length=60, overlong="error")
    # Cutting the prompt's beginning leaves the completion.
    assert len(make(model_path, pairs, tmp_path, max_length=60, truncation_mode="keep_end").train_dataset) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "sigmod"}, "unknown loss_type 'sigmod'"),
        ({"row_length": 0}, "row_length must be positive"),
        ({"overlong": "cut"}, "unknown overlong 'cut'"),
        ({"attention_backend": "fast"}, "unknown attention_backend 'fast'"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        preftree.DPOConfig(output_dir=str(tmp_path), **(COMMON | settings))


def test_bad_settings_of_trls_own_config(model_path, tmp_path):
    args = trl.DPOConfig(str(tmp_path), **(COMMON | {"loss_type": "sigmod"}))
    with pytest.raises(ValueError, match="unknown loss_type 'sigmod'"):
        preftree.DPOTrainer(model_path, args=args, train_dataset=dataset(text_pairs(4)))


def test_weights_that_are_not_finite(model_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"model: parameter 'model.layers.1.mlp.up_proj.weight' holds NaN"):
        make(model, text_pairs(4), tmp_path)


def test_dropout_that_is_kept(model_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_path, attention_dropout=0.1)
    with pytest.raises(ValueError, match="disable_dropout=False"):
        make(model, text_pairs(4), tmp_path, disable_dropout=False)


def test_noise_on_embeddings_is_refused(model_path, tmp_path):
    with pytest.raises(NotImplementedError, match=r"neftune_noise_alpha=5\.0: a shared prefix would get one noise"):
        make(model_path, text_pairs(4), tmp_path, neftune_noise_alpha=5.0)


def test_images_are_refused(model_path, tmp_path):
    pairs = [pair | {"image": "x"} for pair in text_pairs(2)]
    with pytest.raises(NotImplementedError, match="images are not supported"):
        make(model_path, pairs, tmp_path)
