"""Quantised bases with adapters: the stock quantised model on each sequence alone, and TRL's training."""

import pytest
import torch
from families import VOCABULARY, build
from oracle import compare_with_stock, random_sequences
from peft import LoraConfig, get_peft_model
from preference_data import dataset, text_pairs
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from trl_runs import differences, train

import preftree
from preftree.trainers.given_model import check_weights

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]),
]
KINDS = ["nf4", "nf4-twice", "fp4", "int8", "torchao-int8"]
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def settings_of(kind: str):
    if kind == "torchao-int8":
        quantization = pytest.importorskip("torchao.quantization")
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind[:3],
        bnb_4bit_use_double_quant=kind == "nf4-twice",
        bnb_4bit_compute_dtype=torch.float32,
    )


def adapters(**settings) -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "o_proj", "up_proj"], r=4, init_lora_weights=False, **settings)


@pytest.fixture
def load(tmp_path):
    def load(family, kind, device, **settings):
        build(family, SIZES | settings).save_pretrained(tmp_path)
        return AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=settings_of(kind), dtype=torch.float32, device_map=device
        )

    return load


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("family", "settings", "use_dora"),
    [("Llama", {}, False), ("Qwen3", {}, True), ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, False)],
)
@pytest.mark.filterwarnings("ignore:.* run along each path")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_adapters_on_a_quantised_base_are_exact(load, family, settings, use_dora, kind, device):
    if use_dora and kind == "int8":
        pytest.skip("bitsandbytes itself fails on such a model's copy")
    model = load(family, kind, device, **settings)
    assert model.is_quantized
    targets = {"target_modules": ["in_proj", "q_proj", "w1"]} if family == "Lfm2" else {}
    config = adapters(use_dora=use_dora)
    config.target_modules = set(targets.get("target_modules", config.target_modules))
    torch.manual_seed(0)
    # (On some CPUs the first evaluation packs 4-bit weights for good, rounded more coarsely.)
    model = get_peft_model(model, config).train()
    logps, gradients = compare_with_stock(model, random_sequences(torch.Generator().manual_seed(0), VOCABULARY))
    assert len(gradients) > 6
    # (int8 rounds activations to 8 bits and gradients to half precision: a difference in the last digit turns a step.)
    bound = 5e-2 if kind == "int8" else 1e-5
    assert logps <= bound
    worst = max(gradients, key=gradients.get)
    assert gradients[worst] <= bound, worst


def test_outliers_of_a_whole_batch_are_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    build("Llama", SIZES).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
    )
    with pytest.raises(NotImplementedError, match=r"llm_int8_threshold=6\.0: .* Load it with llm_int8_threshold=0\.0"):
        preftree.prepare_model(model)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_same_training_as_trl(load, kind, device, tokenizer):
    """With adapters, whose base is the reference."""
    given = {"processing_class": tokenizer, "peft_config": adapters}
    data = dataset(text_pairs(12))

    def model():
        torch.manual_seed(0)
        return load("Llama", kind, device, vocab_size=len(tokenizer), eos_token_id=1)

    theirs, ours = (
        train(kind_, model, data, trainer_args=given, max_steps=4, use_cpu=device == "cpu", learning_rate=1e-3)
        for kind_ in ("trl", "preftree")
    )
    trained = [
        {
            "history": run.state.log_history,
            "weights": {n: p.detach() for n, p in run.model.named_parameters() if "lora" in n},
        }
        for run in (theirs, ours)
    ]
    assert trained[0]["weights"]
    metrics, parameters = differences(*trained)
    # (TRL keeps adapters of bitsandbytes' 4-bit models in bfloat16, whose rounding a difference in the last digit turns.)
    bound = {"torchao-int8": 1e-4, "nf4": 1e-2, "int8": 5e-2}[kind]
    assert metrics <= bound
    assert parameters <= bound
    assert theirs.state.log_history[0]["grad_norm"] > 0


def test_damaged_scales_are_found(load):
    model = load("Llama", "torchao-int8", "cpu")
    check_weights(model, "model")
    model.model.layers[1].mlp.up_proj.weight.scale[3] = torch.nan
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN"):
        check_weights(model, "model")
