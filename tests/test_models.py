"""A prepared model stays the model it was: ordinary batches, generation, saving, copies, adapters, autocast."""

import copy
import json

import pytest
import torch
from families import EXACT, VOCABULARY, build, exact_model
from oracle import compare_with_stock, random_sequences, stock_logps
from transformers import AutoModelForCausalLM

import preftree
from preftree.models import prepared_part


def small_row():
    groups = random_sequences(torch.Generator().manual_seed(0), VOCABULARY)
    trees = [preftree.TokenTree.from_sequences(*group) for group in groups]
    return preftree.pack(trees, sum(len(tree) for tree in trees) + 3)[0]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2", "gpt_oss"])
def test_ordinary_batches_and_generation_are_unchanged(name, implementation):
    if name == "gpt_oss" and implementation == "sdpa":
        pytest.skip("the stock family does not offer sdpa")
    model = exact_model(name, attn_implementation=implementation)
    stock = copy.deepcopy(model)
    preftree.prepare_model(model)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for batch in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        assert torch.equal(model(**batch).logits, stock(**batch).logits)
        labelled = model(**batch, labels=ids)
        assert torch.equal(labelled.loss, stock(**batch, labels=ids).loss)
    generate = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    assert torch.equal(model.generate(ids, **generate), stock.generate(ids, **generate))


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "gpt_neox"])
def test_what_it_saves_loads_in_plain_transformers(name, tmp_path):
    model = preftree.prepare_model(exact_model(name))
    model.save_pretrained(tmp_path)
    assert "preftree" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert "preftree" not in loaded.config._attn_implementation
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_copy_runs_its_own_weights():
    model = preftree.prepare_model(exact_model("llama"))
    row = small_row()
    before = preftree.sequence_logps(model, row).logps
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(preftree.sequence_logps(twin, row).logps, before)
    assert not torch.allclose(preftree.sequence_logps(model, row).logps, before)


def test_preparing_twice_only_changes_the_backend():
    model = preftree.prepare_model(exact_model("llama"))
    forward = model.forward
    assert preftree.prepare_model(model, backend="dense") is model
    assert prepared_part(model).backend == "dense"
    assert model.forward == forward


def test_forward_of_others_is_kept():
    """TRL and accelerate replace `forward` on the instance, before or after."""
    model = exact_model("llama")
    calls = []
    stock = model.forward

    def counting(*args, **kwargs):
        calls.append(1)
        return stock(*args, **kwargs)

    model.forward = counting
    preftree.prepare_model(model)
    calls.clear()
    model(torch.tensor([[3, 4]]))
    assert calls == [1]


def test_verification_leaves_modes_and_gradients_alone():
    model = exact_model("llama").train()
    state = torch.random.get_rng_state()
    preftree.prepare_model(model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_not_a_transformers_model():
    with pytest.raises(TypeError, match="Linear"):
        preftree.prepare_model(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown attention backend"):
        preftree.prepare_model(exact_model("llama"), backend="fastest")


def test_weights_that_are_not_finite():
    model = exact_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        preftree.prepare_model(model)


def test_rows_longer_than_the_models_positions():
    """64 positions, and a row of several hundred tokens: nothing may be indexed by the row."""
    groups = [group for seed in range(6) for group in random_sequences(torch.Generator().manual_seed(seed), VOCABULARY)]
    for name in ("gpt2", "llama", "opt"):
        logps, gradients = compare_with_stock(exact_model(name), groups)
        assert logps <= 1e-5, name
        assert max(gradients.values()) <= 1e-5, name


def test_double_precision_is_double():
    groups = random_sequences(torch.Generator().manual_seed(0), VOCABULARY)
    model = preftree.prepare_model(exact_model("qwen3").double(), backend="dense")
    trees = [preftree.TokenTree.from_sequences(*group) for group in groups]
    row = preftree.pack(trees)[0]
    prepared = prepared_part(model)
    hidden = prepared.hidden_states(row)
    assert hidden.dtype == torch.float64
    sequence = groups[0][0][0]
    alone = model.model(torch.tensor([sequence])).last_hidden_state[0]
    torch.testing.assert_close(
        hidden[row.parent[row.scored_nodes[0]]], alone[groups[0][1][0] - 1], rtol=1e-10, atol=1e-12
    )


def test_bf16_is_no_farther_from_fp32_than_the_stock_model_is():
    groups = random_sequences(torch.Generator().manual_seed(1), VOCABULARY, trees=8)
    full = exact_model("llama")
    half = copy.deepcopy(full).to(torch.bfloat16)
    stock = copy.deepcopy(half)
    sequences = [(s, p) for group in groups for s, p in zip(*group, strict=True)]
    truth = torch.stack([stock_logps(full, *one) for one in sequences])
    by_stock = torch.stack([stock_logps(stock, *one) for one in sequences])
    row = preftree.pack([preftree.TokenTree.from_sequences(*group) for group in groups])[0]
    shared = preftree.sequence_logps(preftree.prepare_model(half), row).logps
    assert shared.dtype == torch.float32
    assert (shared - truth).norm() <= 1.5 * (by_stock - truth).norm()


def test_autocast_reaches_the_whole_row():
    model = preftree.prepare_model(exact_model("llama"))
    row = small_row()
    with torch.autocast("cpu", torch.bfloat16):
        out = preftree.sequence_logps(model, row)
    exact = preftree.sequence_logps(model, row)
    assert out.logps.dtype == torch.float32
    assert not torch.equal(out.logps, exact.logps)
    torch.testing.assert_close(out.logps, exact.logps, rtol=0.05, atol=0.5)


@pytest.mark.filterwarnings("ignore:.* run along each path")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", ["q_proj", "v_proj", "up_proj"]), ("qwen3_5", ["in_proj_qkv", "out_proj", "q_proj", "up_proj"])],
)
def test_peft_adapter_on_and_off(name, targets, dora):
    peft = pytest.importorskip("peft")
    groups = random_sequences(torch.Generator().manual_seed(0), VOCABULARY)
    base = exact_model(name)
    config = peft.LoraConfig(r=3, target_modules=targets, use_dora=dora, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    logps, gradients = compare_with_stock(model, groups)
    assert logps <= 1e-5
    assert max(gradients.values()) <= 1e-5
    row = small_row()
    with model.disable_adapter():
        off = preftree.sequence_logps(model, row).logps
    torch.testing.assert_close(off, preftree.sequence_logps(preftree.prepare_model(base), row).logps)
    assert not torch.allclose(off, preftree.sequence_logps(model, row).logps)


def test_peft_that_prepends_virtual_tokens_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(exact_model("llama"), config)
    with pytest.raises(NotImplementedError, match="virtual tokens"):
        preftree.prepare_model(model)


def test_peft_that_acts_from_a_token_on_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    model = peft.get_peft_model(exact_model("llama"), config)
    with pytest.raises(NotImplementedError, match="alora_invocation_tokens"):
        preftree.prepare_model(model)


def test_wrapped_model_is_called_through_its_wrapper():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
            self.calls = 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    inner = preftree.prepare_model(exact_model("llama"))
    wrapped = Wrapper(inner)
    row = small_row()
    torch.testing.assert_close(preftree.sequence_logps(wrapped, row).logps, preftree.sequence_logps(inner, row).logps)
    assert wrapped.calls == 1


def test_model_refused_late_names_the_layer():
    """Dropout that is switched on after preparing is refused in the forward pass."""
    model = preftree.prepare_model(exact_model("llama")).train()
    model.model.layers[0].self_attn.attention_dropout = 0.2
    with pytest.raises(NotImplementedError, match=r"LlamaAttention asks for attention dropout 0\.2"):
        preftree.sequence_logps(model, small_row())


def test_families_cover_what_the_readme_promises():
    promised = (
        "llama mistral qwen2 qwen3 gemma2 gemma3 phi3 olmo2 gpt2 gpt_neox cohere2 mixtral qwen3_moe gpt_oss deepseek_v3"
    )
    for family in promised.split():
        assert any(name.startswith(family) for name in EXACT), family


def test_windows_are_shorter_than_the_text():
    """The window must change the numbers here, or its tests would say nothing."""
    family, settings = EXACT["mistral-window"]
    wide = build(family, settings | {"sliding_window": 60})
    narrow = build(family, settings)
    ids = torch.arange(3, 33)[None]
    assert not torch.allclose(wide(ids).logits, narrow(ids).logits)
