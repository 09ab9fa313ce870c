"""What the trainer refuses before any training, with the row and the field."""

import pytest
import torch
import trl
from conftest import word_tokenizer
from preference_data import chat_pairs, dataset, text_pairs
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl_runs import COMMON, classes

import preftree


def make(model, pairs, tmp_path, processing_class=None, method="DPO", trainer_args=None, **settings):
    config, trainer_class = classes("preftree", method)
    common = {name: value for name, value in COMMON.items() if name != "beta" or method != "Reward"}
    args = config(output_dir=str(tmp_path), **(common | settings))
    return trainer_class(
        model,
        args=args,
        train_dataset=dataset(pairs),
        processing_class=processing_class or word_tokenizer(),
        **(trainer_args or {}),
    )


def with_row(**changes):
    pairs = text_pairs(4)
    pairs[2] |= changes
    return pairs


def chat(text):
    return [{"role": "user", "content": text}]


NO_PROMPT = r"train dataset, row 0, field 'prompt': empty: there is no such column, and .*do not start alike"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (with_row(chosen=""), r"train dataset, row 2, field 'chosen': empty"),
        (with_row(prompt=""), r"train dataset, row 2, field 'prompt': empty"),
        (with_row(rejected=None), r"train dataset, row 2, field 'rejected' is missing"),
        ([{"prompt": "a", "good": "b"}], r"train dataset: there is no column 'chosen'"),
        ([{"chosen": "the dog", "rejected": "a cat"}], NO_PROMPT),
        # (Of these TRL would take all but the last character of chosen for a prompt.)
        ([{"chosen": "the dog ", "rejected": "a cat"}], NO_PROMPT),
        ([{"chosen": chat("the dog"), "rejected": chat("a cat")}], NO_PROMPT),
        ([{"chosen": chat("the dog"), "rejected": chat("the dog")}], NO_PROMPT),
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


def test_images_need_a_processor(model_path, tmp_path):
    pairs = [pair | {"image": "x"} for pair in text_pairs(2)]
    with pytest.raises(ValueError, match=r"it has images, but processing_class is .*: pass the processor"):
        make(model_path, pairs, tmp_path)


# -------------------------------------------------------------------------------------------------- trainers beside DPO


@pytest.mark.parametrize("method", ["ORPO", "CPO", "TPO", "Reward"])
def test_a_reference_that_nothing_compares_with(model_path, tmp_path, method):
    reference = AutoModelForCausalLM.from_pretrained(model_path)
    with pytest.raises(ValueError, match=f"{method}Trainer compares with no reference: leave ref_model out"):
        make(model_path, text_pairs(4), tmp_path, method=method, trainer_args={"ref_model": reference})


@pytest.mark.parametrize("method", ["DPO", "KTO"])
def test_no_reference_to_compare_with(model_path, tmp_path, method):
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(model_path, name_or_path=""))
    model.config._name_or_path = ""
    with pytest.raises(ValueError, match=r"compares with a reference, and there is none.*Pass ref_model"):
        make(model, text_pairs(4), tmp_path, method=method)
    make(model, text_pairs(4), tmp_path, method=method, precompute_ref_log_probs=True)


@pytest.mark.parametrize("method", ["ORPO", "CPO", "TPO", "KTO", "Reward"])
def test_bad_data_of_other_trainers(model_path, tmp_path, method):
    def data(**changes):
        return [pair | {"reference": "the dog"} for pair in with_row(**changes)]

    with pytest.raises(ValueError, match="train dataset, row 2, field 'chosen': empty"):
        make(model_path, data(chosen=""), tmp_path, method=method)
    with pytest.raises(ValueError, match="train dataset, row 2, field 'rejected' is missing"):
        make(model_path, data(rejected=None), tmp_path, method=method)
    with pytest.raises(ValueError, match=r"train dataset: there is no column 'rejected'"):
        make(model_path, [{"prompt": "a", "chosen": "b", "reference": "c"}], tmp_path, method=method)
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(ValueError, match=r"row \d+, field '\w+': token id \d+ is outside the model's vocabulary"):
        make(model_path, data(chosen="a zebra"), tmp_path, tokenizer, method=method)


@pytest.mark.parametrize("method", ["ORPO", "CPO", "TPO", "KTO"])
def test_a_prompt_that_is_not_there(model_path, tmp_path, method):
    with pytest.raises(ValueError, match=NO_PROMPT):
        make(model_path, [{"chosen": "the dog ", "rejected": "a cat", "reference": "a"}], tmp_path, method=method)


def test_a_stream_without_prompts(model_path, tmp_path):
    stream = dataset([{"chosen": "the dog ", "rejected": "a cat"}]).to_iterable_dataset()
    config, trainer_class = classes("preftree", "DPO")
    args = config(str(tmp_path), **(COMMON | {"max_steps": 1}))
    with pytest.raises(ValueError, match=NO_PROMPT):
        trainer_class(model_path, args=args, train_dataset=stream, processing_class=word_tokenizer())


def test_rewards_need_no_prompt(model_path, tmp_path):
    pairs = [{"chosen": "the dog", "rejected": "a cat"}, {"chosen": chat("a dog"), "rejected": chat("a cat")}]
    for pair in pairs:
        assert len(make(model_path, [pair], tmp_path, method="Reward").train_dataset) == 1


def test_a_gold_answer_to_something_else(model_path, tmp_path):
    rows = [{"chosen": "the dog a", "rejected": "the dog the", "reference": "a cat"}]
    with pytest.raises(
        ValueError, match=r"row 0, field 'reference': it does not start with .* \('the dog'\): give a col"
    ):
        make(model_path, rows, tmp_path, method="TPO")


def test_config_of_another_trainer(model_path, tmp_path):
    for args in (
        trl.KTOConfig(str(tmp_path), use_cpu=True, bf16=False),
        preftree.KTOConfig(str(tmp_path), use_cpu=True, bf16=False),
    ):
        with pytest.raises(TypeError, match=r"args must be a DPOConfig \(preftree's or TRL's\), got KTOConfig"):
            preftree.DPOTrainer(model_path, args=args, train_dataset=dataset(text_pairs(4)))


@pytest.mark.parametrize("method", ["ORPO", "CPO"])
def test_streams_that_trl_does_not_take(model_path, tmp_path, method):
    config, trainer_class = classes("preftree", method)
    args = config(str(tmp_path), **(COMMON))
    stream = dataset(text_pairs(4)).to_iterable_dataset()
    with pytest.raises(
        ValueError, match=r"train_dataset: this trainer takes a datasets.Dataset, .* not IterableDataset"
    ):
        trainer_class(model_path, args=args, train_dataset=stream)
    with pytest.raises(ValueError, match=r"eval_dataset: this trainer takes a datasets.Dataset, .* not dict"):
        trainer_class(model_path, args=args, train_dataset=dataset(text_pairs(4)), eval_dataset={"a": stream})
    with pytest.raises(ValueError, match=f"{method}Trainer needs args: a {method}Config"):
        trainer_class(model_path, train_dataset=stream)
    with pytest.raises(NotImplementedError, match="model_init: give the model itself"):
        trainer_class(args=args, train_dataset=stream, model_init=lambda: None)


def test_gold_answer_is_missing(model_path, tmp_path):
    with pytest.raises(ValueError, match="there is no column 'reference'"):
        make(model_path, text_pairs(4), tmp_path, method="TPO")


@pytest.mark.parametrize("method", ["ORPO", "CPO"])
def test_prompt_that_leaves_no_completion(model_path, tmp_path, caplog, method):
    """TRL goes on with an empty completion there, whose mean log-probability is 0/0."""
    trainer = make(model_path, with_row(prompt="the dog " * 40), tmp_path, method=method, max_length=60)
    assert len(trainer.train_dataset) == 3
    assert "in 1 examples the prompt alone fills max_length=60" in caplog.text
    assert trainer.args.max_length == trainer.max_length == 60


@pytest.mark.parametrize("margin", [None, float("nan"), float("inf")])
def test_margins_that_are_no_numbers(model_path, tmp_path, margin):
    pairs = [pair | {"margin": 1.0} for pair in text_pairs(4)]
    pairs[3]["margin"] = margin
    with pytest.raises(ValueError, match=r"train dataset, row 3, field 'margin': \w+ is not a finite number"):
        make(model_path, pairs, tmp_path, method="Reward")


def test_rewards_of_long_pairs_are_left_out_and_counted(model_path, tmp_path, caplog):
    pairs = with_row(rejected="the dog " * 40)
    assert len(make(model_path, pairs, tmp_path, method="Reward", max_length=60).train_dataset) == 3
    assert "1 examples were too long and are left out" in caplog.text
    cut = make(model_path, pairs, tmp_path, method="Reward", max_length=60, overlong="truncate")
    assert len(cut.train_dataset) == 4
    assert max(int(row.sequence_lengths.max()) for row in cut.data_collator(list(cut.train_dataset))["rows"]) == 60


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("DPO", {"loss_type": "exo_pair"}, "'exo_pair' needs 0 < label_smoothing < 1, got 0"),
        ("DPO", {"loss_type": "robust", "label_smoothing": 0.5}, "'robust' needs 0 <= label_smoothing < 0.5, got 0.5"),
        (
            "DPO",
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
            "Got 1 weights for 2 loss types",
        ),
        (
            "DPO",
            {"f_divergence_type": "js_divergence", "loss_type": "apo_zero"},
            "'js_divergence' cannot be combined with",
        ),
        ("DPO", {"f_divergence_type": "kl"}, "unknown f_divergence_type 'kl'"),
        (
            "DPO",
            {"use_weighting": True, "loss_type": "aot"},
            "use_weighting=True cannot be combined with loss_type aot",
        ),
        ("DPO", {"pair_weighting": "lambda", "loss_type": "aot"}, "pair_weighting='lambda' cannot be combined with"),
        ("DPO", {"pair_weighting": "lamda"}, "unknown pair_weighting 'lamda'"),
        ("DPO", {"ties": "keep"}, "unknown ties 'keep'"),
        ("DPO", {"loss_type": ["plackett_luce", "sft"]}, "cannot be mixed with losses of pairs"),
        ("DPO", {"loss_type": "plackett_luce", "ld_alpha": 0.5}, "ld_alpha=0.5 is about pairs"),
        ("DPO", {"loss_type": "plackett_luce", "ties": "drop"}, "ties='drop' is about pairs"),
        ("CPO", {"loss_type": "simpoo"}, "unknown loss_type 'simpoo'"),
        ("TPO", {"loss_type": "simpo"}, "unknown loss_type 'simpo'"),
        ("KTO", {"loss_type": "bco"}, "unknown loss_type 'bco'"),
        ("Reward", {"row_length": 0}, "row_length must be positive"),
    ],
)
def test_bad_settings_of_each_trainer(tmp_path, method, settings, message):
    config, _ = classes("preftree", method)
    with pytest.raises(ValueError, match=message):
        config(str(tmp_path), use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize(
    ("method", "settings", "trainer_args", "message"),
    [
        ("DPO", {"sync_ref_model": True, "precompute_ref_log_probs": True}, {}, "precompute_ref_log_probs=True"),
        ("DPO", {"router_aux_loss_coef": 0.5}, {}, "not a Mixture-of-Experts"),
        ("KTO", {"sync_ref_model": True, "precompute_ref_log_probs": True}, {}, "precompute_ref_log_probs=True"),
        ("KTO", {"train_sampling_strategy": "random"}, {}, "sequential"),
        ("KTO", {"per_device_train_batch_size": 1}, {}, "batch size must be > 1"),
        ("ORPO", {"generate_during_eval": True}, {}, "Weights and Biases or Comet"),
    ],
)
def test_options_that_trl_forbids(model_path, tmp_path, method, settings, trainer_args, message):
    with pytest.raises(ValueError, match=message):
        make(model_path, text_pairs(4), tmp_path, method=method, trainer_args=trainer_args, **settings)


def test_sync_with_an_adapter(model_path, tmp_path):
    peft = pytest.importorskip("peft")
    for method in ("DPO", "KTO"):
        arguments = {"peft_config": peft.LoraConfig(target_modules=["q_proj"])}
        with pytest.raises(NotImplementedError, match="sync_ref_model"):
            make(model_path, text_pairs(4), tmp_path, method=method, trainer_args=arguments, sync_ref_model=True)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("DPO", {"label_smoothing": 0.1}, "label_smoothing=0.1 has no effect: loss_type sigmoid does not read it"),
        ("DPO", {"discopop_tau": 0.1}, "discopop_tau=0.1 has no effect"),
        ("DPO", {"f_alpha_divergence_coef": 0.7}, "f_alpha_divergence_coef=0.7 has no effect: f_divergence_type is"),
        ("DPO", {"ref_model_sync_steps": 7}, "ref_model_sync_steps=7 has no effect: sync_ref_model is off"),
        ("DPO", {"ref_logps_cache_dir": "x"}, "ref_logps_cache_dir='x' has no effect: precompute_ref_log_probs is off"),
        ("DPO", {"pair_weighting": "prompt"}, "pair_weighting has no effect: the data are not ranked"),
        ("CPO", {"simpo_gamma": 0.3}, "simpo_gamma=0.3 has no effect: loss_type sigmoid"),
        ("CPO", {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1 has no effect"),
        ("TPO", {"tpo_l_gamma": 0.3}, "tpo_l_gamma=0.3 has no effect"),
        ("KTO", {"precompute_ref_batch_size": 3}, "precompute_ref_batch_size=3 has no effect"),
    ],
)
def test_options_without_effect_are_told_once(model_path, tmp_path, method, settings, message):
    pairs = [pair | {"reference": "the dog"} for pair in text_pairs(4)]
    with pytest.warns(UserWarning, match=message) as warned:
        make(model_path, pairs, tmp_path, method=method, **settings)
    assert sum("has no effect" in str(warning.message) for warning in warned) == 1


# --------------------------------------------------------------------------------------------------------- ranked data


def ranked(**changes):
    rows = [
        {"prompt": "the dog", "completions": ["runs", "sings over", "sleeps"], "scores": [1.0, 3.0, 2.0]}
        for _ in range(4)
    ]
    if "pair_weights" in changes:
        rows = [row | {"pair_weights": [[1, 0, 1.0]]} for row in rows]
    rows[2] |= changes
    return rows


@pytest.mark.parametrize("method", ["DPO", "ORPO", "Reward"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [1.0, 2.0]}, r"row 2, field 'scores': 2 values for 3 completions"),
        ({"scores": None}, r"row 2, field 'scores': no values for 3 completions"),
        ({"scores": [1.0, float("nan"), 2.0]}, r"row 2, field 'scores', value 1: nan is not a finite number"),
        ({"scores": [1.0, None, 2.0]}, r"row 2, field 'scores', value 1: None is not a finite number"),
        ({"scores": [2.0, 2.0, 2.0]}, r"row 2, field 'scores': all are 2.0, so nothing is better"),
        ({"scores": [2.0, 1.0, 2.0]}, r"row 2, field 'scores': equal values .*ties='drop'"),
        ({"completions": ["runs"], "scores": [1.0]}, r"row 2, field 'completions': 1 completion"),
        ({"completions": ["runs", "", "x"]}, r"row 2, field 'completions\[1\]': empty"),
        ({"pair_weights": []}, r"row 2, field 'pair_weights': must be a list"),
        ({"pair_weights": [[1, 0]]}, r"row 2, field 'pair_weights', pair 0: \[.*\] is not \[better, worse, weight\]"),
        ({"pair_weights": [[1, 0, 1], [3, 0, 1]]}, r"row 2, .* pair 1: 3.* must be indices of 3 completions"),
        ({"pair_weights": [[1, 0, -1]]}, r"row 2, .* pair 0: weight -1.* is not a number of at least 0"),
        ({"pair_weights": [[0, 1, 1]]}, r"row 2, .* pair 0: completion 0 is not scored above 1"),
    ],
)
def test_bad_ranked_data(model_path, tmp_path, method, changes, message):
    with pytest.raises(ValueError, match=message):
        make(model_path, ranked(**changes), tmp_path, method=method)


def test_columns_of_ranked_data(model_path, tmp_path):
    without = [{name: value for name, value in row.items() if name != "scores"} for row in ranked()]
    with pytest.raises(ValueError, match="need a column 'scores' or 'ranks', but there are neither"):
        make(model_path, without, tmp_path)
    with pytest.raises(ValueError, match="need a column 'scores' or 'ranks', but there are both"):
        make(model_path, [row | {"ranks": [1, 2, 3]} for row in ranked()], tmp_path)
    with pytest.raises(ValueError, match="takes no ranked data"):
        make(model_path, ranked(), tmp_path, method="KTO")
    with pytest.raises(ValueError, match="column 'margin' is about one pair"):
        make(model_path, [row | {"margin": 1.0} for row in ranked()], tmp_path, method="Reward")
    with pytest.raises(ValueError, match="compute_metrics is given the logits of pairs"):
        make(model_path, ranked(), tmp_path, trainer_args={"compute_metrics": lambda _: {}})
    with pytest.raises(ValueError, match="generate_during_eval=True takes prompts from pairs"):
        make(model_path, ranked(), tmp_path, method="ORPO", generate_during_eval=True)
    weighted = [row | {"pair_weights": [[1, 0, 1.0]]} for row in ranked()]
    with pytest.raises(ValueError, match="'pair_weights' cannot be combined with pair_weighting='prompt'"):
        make(model_path, weighted, tmp_path, pair_weighting="prompt")
    with pytest.raises(ValueError, match="'pair_weights' cannot be combined with a list objective"):
        make(model_path, weighted, tmp_path, loss_type="plackett_luce")
    with pytest.raises(ValueError, match="'pair_weights' weighs the pairs of ranked completions, and there are none"):
        make(model_path, [pair | {"pair_weights": [[1, 0, 1.0]]} for pair in text_pairs(3)], tmp_path)
    with pytest.raises(ValueError, match=r"row 0, field 'scores': .*100"):
        make(model_path, [row | {"scores": [1.0, 500.0, 2.0]} for row in ranked()], tmp_path, pair_weighting="lambda")


# ------------------------------------------------------------------------------------------------------------- KTO


def test_answers_that_stand_alone(model_path, tmp_path):
    rows = [
        {"prompt": pair["prompt"], "completion": pair["chosen"], "label": index % 2 == 0}
        for index, pair in enumerate(text_pairs(6))
    ]
    rows.append({"prompt": rows[0]["prompt"], "completion": "sings", "label": False})
    with pytest.raises(ValueError, match=r"row 1, field 'prompt': it has a single answer, as have 5 of 6 prompts"):
        make(model_path, rows, tmp_path, method="KTO")
    make(model_path, rows, tmp_path, method="KTO", keep_prompts_together=False).train()


def test_labels(model_path, tmp_path):
    rows = [{"prompt": "the dog", "completion": text, "label": label} for text, label in (("runs", 1), ("sings", 3))]
    with pytest.raises(ValueError, match="row 1, field 'label': 3 is neither true nor false"):
        make(model_path, rows, tmp_path, method="KTO")
    with pytest.raises(ValueError, match="there is no column 'label'"):
        make(model_path, [{"prompt": "a", "completion": "b"}], tmp_path, method="KTO")
