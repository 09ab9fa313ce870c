"""`share_prefixes` under loops that know nothing of it: the stock model's numbers at all tokens, prefixes computed once."""

import contextlib
import copy
import warnings
from types import MethodType

import pytest
import torch
from families import ALONG_PATHS, VOCABULARY, build, exact_model, refused_model
from oracle import random_sequences
from preference_data import dataset, text_pairs
from trl_runs import differences, train

import preftree

TOLERANCE = 1e-5
WITHOUT = "without prefix sharing"


def padded(sequences, side):
    """``(input_ids, attention_mask)`` [B, L], three columns longer than the longest sequence."""
    length = max(map(len, sequences)) + 3
    ids, mask = torch.zeros(2, len(sequences), length, dtype=torch.long)
    for index, sequence in enumerate(sequences):
        here = slice(length - len(sequence), length) if side == "left" else slice(0, len(sequence))
        ids[index, here] = torch.tensor(sequence)
        mask[index, here] = 1
    return ids, mask


def preference_sequences(seed=0):
    """Four pairs of two prompts, the chosen ones first; the last chosen is a prefix of its rejected one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    prompts = [draw(9), draw(6)]
    chosen, rejected = [], []
    for index, (one, other) in enumerate(((4, 7), (5, 5), (8, 2), (3, 6))):
        prompt, response = prompts[index // 2], draw(one)
        chosen.append(prompt + response)
        rejected.append(prompt + (response + draw(2) if index == 3 else draw(other)))
    return chosen + rejected, [len(prompts[i // 2 % 2]) for i in range(8)]


def distinct_prefixes(ids, mask, by_padding=False):
    """Tokens that have to be computed, counted from the batch; ``by_padding`` tells differently padded rows apart."""
    prefixes = set()
    for row, real in zip(ids, mask.bool(), strict=True):
        sequence = tuple(row[real].tolist())
        padding = int(real.int().argmax()) if by_padding else 0
        prefixes |= {(padding, sequence[:stop]) for stop in range(1, len(sequence) + 1)}
    return len(prefixes)


@contextlib.contextmanager
def counted_tokens(model):
    """A list that gets the tokens of each call of the first decoder layer."""
    counts = []
    layer = next(part for name, part in model.named_modules() if name.endswith(("layers.0", ".h.0")))

    def count(module, args, kwargs):
        hidden_BLH = args[0] if args else kwargs["hidden_states"]
        counts.append(hidden_BLH.shape[0] * hidden_BLH.shape[1])

    hook = layer.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        hook.remove()


@contextlib.contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{WITHOUT}")
        yield


def dpo_losses(policy, reference, ids, mask, prompt_lengths, beta=0.3):
    """DPO as a script of one's own has it: padded batch, logits, log_softmax, gather. Loss of each pair."""
    start = mask.int().argmax(1)
    behind = torch.arange(ids.shape[1]) - start[:, None]
    scored = (mask.bool() & (behind >= torch.tensor(prompt_lengths)[:, None]))[:, 1:]

    def logps(model):
        log_p = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        return (log_p.gather(-1, ids[:, 1:, None])[..., 0] * scored).sum(1)

    with torch.no_grad():
        base = logps(reference)
    margin = logps(policy) - base
    chosen, rejected = margin.chunk(2)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected))


def gradient_differences(model, stock):
    """As in `oracle.compare_with_stock`: by parameter, relative to its largest entry."""
    largest = max(p.grad.abs().max().item() for p in stock.parameters() if p.grad is not None)
    result = {}
    for (name, mine), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            scale = max(theirs.grad.abs().max().item(), 1e-3 * largest)
            result[name] = (mine.grad - theirs.grad).abs().max().item() / scale
    return result


def compare_dpo(model, reference, side, by_padding=False):
    """The same DPO step with and without sharing: losses, all gradients, and that the tokens were computed once."""
    stock, stock_reference = copy.deepcopy((model, reference))
    sequences, prompt_lengths = preference_sequences()
    ids, mask = padded(sequences, side)
    expected = dpo_losses(stock, stock_reference, ids, mask, prompt_lengths)
    expected.sum().backward()
    with no_warnings(), preftree.share_prefixes(model), preftree.share_prefixes(reference):
        with counted_tokens(model) as counts:
            losses = dpo_losses(model, reference, ids, mask, prompt_lengths)
        assert counts == [distinct_prefixes(ids, mask, by_padding)]
        losses.sum().backward()  # (which runs checkpointed layers again)
    torch.testing.assert_close(losses, expected, rtol=TOLERANCE, atol=TOLERANCE)
    gradients = gradient_differences(model, stock)
    assert max(gradients.values()) <= TOLERANCE, max(gradients, key=gradients.get)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "name",
    ["llama", "mistral-window", "gemma2", "gpt2", "gpt_neox", "opt", "mixtral", "deepseek_v3", "llama4-chunks"],
)
def test_a_dpo_loop_of_ones_own(name, side):
    absolute = name == "gpt2" and side == "left"
    compare_dpo(exact_model(name).train(), exact_model(name, seed=1), side, by_padding=absolute)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_dpo_loop_with_activation_checkpointing(name):
    model = exact_model(name).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids, mask = padded(preference_sequences()[0], "left")
    calls = []
    with preftree.share_prefixes(model):
        hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        model(input_ids=ids, attention_mask=mask).logits.sum().backward()
    assert len(calls) == 2  # forward, and again in the backward pass
    hook.remove()
    model.zero_grad()
    compare_dpo(model, exact_model(name, seed=1), "left")


@pytest.mark.parametrize("wrapped_later", [False, True])
def test_dpo_loop_with_lora(wrapped_later):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    base = exact_model("llama")
    if wrapped_later:
        stock = peft.get_peft_model(copy.deepcopy(base), config)
        preftree.share_prefixes(base)
        model = peft.get_peft_model(base, config)
        model.load_state_dict(stock.state_dict())
        ids, mask = padded(preference_sequences()[0], "right")
        with no_warnings(), counted_tokens(model) as counts:
            assert_same_tokens(model(ids, attention_mask=mask).logits, stock(ids, attention_mask=mask).logits, mask)
        assert counts == [distinct_prefixes(ids, mask)]
    else:
        compare_dpo(peft.get_peft_model(base, config), exact_model("llama", seed=1), "right")


def assert_same_tokens(got_BLX, expected_BLX, mask_BL):
    assert got_BLX.shape == expected_BLX.shape
    real = mask_BL.bool()
    torch.testing.assert_close(got_BLX[real], expected_BLX[real], rtol=1e-4, atol=1e-5)


@pytest.fixture(params=["left", "right"])
def batch(request):
    ids, mask = padded(preference_sequences(seed=2)[0], request.param)
    return {"input_ids": ids, "attention_mask": mask}


def shared_and_stock(name, **loading):
    model = exact_model(name, **loading)
    stock = copy.deepcopy(model)
    return model, stock, preftree.share_prefixes(model)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_outputs_are_those_of_the_stock_model(name, batch):
    model, stock, _ = shared_and_stock(name)
    mask = batch["attention_mask"]
    with no_warnings():
        given, expected = model.base_model(**batch), stock.base_model(**batch)
        assert type(given) is type(expected)
        assert given.past_key_values is None
        assert_same_tokens(given.last_hidden_state, expected.last_hidden_state, mask)
        assert not given.last_hidden_state[mask == 0].any()
        outputs = []
        hook = model.base_model.register_forward_hook(lambda module, args, output: outputs.append(output))
        positional = model.base_model(batch["input_ids"], attention_mask=mask)[0]
        hook.remove()
        assert torch.equal(positional, given.last_hidden_state)
        # Others' hooks see the call that was made, not the row.
        assert [output.last_hidden_state.shape[:2] for output in outputs] == [mask.shape]
        assert_same_tokens(
            model(**batch, logits_to_keep=5).logits, stock(**batch, logits_to_keep=5).logits, mask[:, -5:]
        )
        keep = torch.tensor([2, 11, 13])
        assert_same_tokens(
            model(**batch, logits_to_keep=keep).logits, stock(**batch, logits_to_keep=keep).logits, mask[:, keep]
        )
        unpadded = batch["input_ids"][:2, 8:14]
        torch.testing.assert_close(model(unpadded).logits, stock(unpadded).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_labels(name, batch):
    model, stock, _ = shared_and_stock(name)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    predicted = torch.cat((torch.zeros_like(mask[:, :1]), mask[:, :-1]), dim=1)
    labels = ids.masked_fill((mask * predicted) == 0, -100)
    with no_warnings(), counted_tokens(model) as counts:
        given = model(**batch, labels=labels, num_items_in_batch=torch.tensor(70))
        expected = stock(**batch, labels=labels, num_items_in_batch=torch.tensor(70))
    assert counts[0] < mask.sum()
    torch.testing.assert_close(given.loss, expected.loss, rtol=TOLERANCE, atol=0)
    assert_same_tokens(given.logits, expected.logits, mask)


def test_labels_predicted_at_padding_are_scored_as_the_stock_model_does():
    """The first token of a left-padded row is predicted at padding, where a row of trees has nothing."""
    model, stock, _ = shared_and_stock("llama")
    ids, mask = padded(preference_sequences()[0], "left")
    labels = ids.masked_fill(mask == 0, -100)
    with pytest.warns(UserWarning, match="predicted at padding"):
        given = model(input_ids=ids, attention_mask=mask, labels=labels)
    assert torch.equal(given.loss, stock(input_ids=ids, attention_mask=mask, labels=labels).loss)
    with counted_tokens(model) as counts:  # and only this call
        model(input_ids=ids, attention_mask=mask)
    assert counts == [distinct_prefixes(ids, mask)]


@pytest.mark.parametrize("head_first", [False, True])
def test_fused_head_of_trl(head_first):
    from trl.trainer.utils import add_fused_lm_head

    model = exact_model("gemma2")
    stock = copy.deepcopy(model)
    add_fused_lm_head(stock, outputs=("log_probs", "entropy"))
    if head_first:
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    handle = preftree.share_prefixes(model)
    if not head_first:
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids, mask = padded(preference_sequences()[0], "right")
    call = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    expected = stock(**call, fused_lm_head=True)
    expected.loss.backward()
    with no_warnings(), counted_tokens(model) as counts:
        given = model(**call, fused_lm_head=True)
        given.loss.backward()
    assert counts == [distinct_prefixes(ids, mask)]
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(given[name], expected[name], rtol=TOLERANCE, atol=TOLERANCE)
    assert max(gradient_differences(model, stock).values()) <= TOLERANCE
    # TRL's forward stays when ours goes, whichever came first.
    handle.undo()
    for fused in (False, True):
        assert torch.equal(model(**call, fused_lm_head=fused).loss, stock(**call, fused_lm_head=fused).loss)


def test_random_batches_of_every_shape():
    model, stock, _ = shared_and_stock("qwen3")
    for seed in range(6):
        groups = random_sequences(torch.Generator().manual_seed(seed), VOCABULARY, trees=4)
        for side in ("left", "right"):
            ids, mask = padded([sequence for group in groups for sequence in group[0]], side)
            with no_warnings(), counted_tokens(model) as counts:
                given = model(input_ids=ids, attention_mask=mask).logits
            assert_same_tokens(given, stock(input_ids=ids, attention_mask=mask).logits, mask)
            assert counts == [distinct_prefixes(ids, mask)]


def grouped_completions():
    """Two prompts padded on the left, three completions each padded on the right, as online trainers have them."""
    sequences, prompt_lengths = preference_sequences()
    width = max(prompt_lengths) + 2
    ids, mask = torch.zeros(2, len(sequences), width + 9, dtype=torch.long)
    for index, (sequence, length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        here = slice(width - length, width - length + len(sequence))
        ids[index, here], mask[index, here] = torch.tensor(sequence), 1
    return ids, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equally_padded_prompts_are_shared_where_positions_are_absolute(dtype):
    model = exact_model("gpt2").to(dtype)
    stock = copy.deepcopy(model)
    ids, mask = grouped_completions()
    with no_warnings(), preftree.share_prefixes(model), counted_tokens(model) as counts:
        given = model(input_ids=ids, attention_mask=mask).logits
    assert counts == [distinct_prefixes(ids, mask)]
    expected = stock(input_ids=ids, attention_mask=mask).logits
    error = ((given - expected).abs().amax(-1) * mask).max() / expected.abs().max()
    assert error <= (1e-5 if dtype == torch.float32 else 0.03)


def test_half_precision_keeps_the_stock_positions():
    """Rounding hides there whether moving a sequence matters: rows that are padded differently are kept apart."""
    model = exact_model("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(1e-6)
    model.to(torch.bfloat16)
    ids, mask = padded(preference_sequences()[0], "left")
    with preftree.share_prefixes(model), counted_tokens(model) as counts:
        model(input_ids=ids, attention_mask=mask)
    assert counts == [distinct_prefixes(ids, mask, by_padding=True)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_positions_that_the_caller_gives(name):
    model, stock, _ = shared_and_stock(name)
    relative = name == "llama"
    ids, mask = padded(preference_sequences()[0], "left")
    from_mask = (mask.cumsum(1) - 1).clamp(min=0)
    offset = torch.arange(len(ids))[:, None] // 2
    for position_ids, tells_apart in (
        (from_mask, 0 * offset),  # what generation and many trainers give
        (from_mask + 11, 0 * offset),
        (from_mask + offset, offset),
        (torch.arange(ids.shape[1])[None] + 3, mask.argmax(1)[:, None]),
    ):
        call = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
        with no_warnings(), counted_tokens(model) as counts:
            given = model(**call).logits
        assert_same_tokens(given, stock(**call).logits, mask)
        groups = [tells_apart[:, 0] == value for value in tells_apart.unique()]
        apart = sum(distinct_prefixes(ids[rows], mask[rows]) for rows in groups)
        assert counts == [distinct_prefixes(ids, mask) if relative else apart]


def test_moving_a_sequence_is_trusted_no_farther_than_it_was_tried():
    model, stock, _ = shared_and_stock("llama")
    ids, mask = padded(preference_sequences()[0], "left")
    position_ids = torch.arange(ids.shape[1])[None] + 64 - ids.shape[1] + 1  # the model has 64 positions
    call = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
    with counted_tokens(model) as counts:
        given = model(**call).logits
    assert_same_tokens(given, stock(**call).logits, mask)
    assert counts == [distinct_prefixes(ids, mask, by_padding=True)]


def unshareable(name):
    ids, mask = padded(preference_sequences()[0], "right")
    plain = {"input_ids": ids, "attention_mask": mask}
    model = exact_model({"token_type_ids": "gpt2", "output_router_logits": "mixtral"}.get(name, "llama"))
    if name == "inputs_embeds":
        return model, {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    if name == "attention_mask is no mask":
        visible = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        return model, {"input_ids": ids, "attention_mask": visible.expand(len(ids), 1, -1, -1)}
    if name == "padding between":
        mask[1, 4] = 0
        return model, plain
    if name == "attention_mask leaves no token":
        return model, plain | {"attention_mask": torch.zeros_like(mask)}
    if name == "position_ids":
        return model, {"input_ids": ids, "position_ids": torch.arange(ids.shape[1]).expand(ids.shape) % 7}
    if name == "token_type_ids":
        return model, plain | {"token_type_ids": torch.ones_like(ids)}
    if name == "is_causal":
        return model, plain | {"is_causal": False}
    return model, plain | {name: True}


@pytest.mark.parametrize(
    "name",
    [
        "inputs_embeds",
        "attention_mask is no mask",
        "padding between",
        "attention_mask leaves no token",
        "position_ids",
        "token_type_ids",
        "is_causal",
        "output_hidden_states",
        "output_router_logits",
    ],
)
def test_what_cannot_be_shared_runs_as_stock_and_says_so_once(name):
    model, call = unshareable(name)
    stock = copy.deepcopy(model)
    preftree.share_prefixes(model)
    with pytest.warns(UserWarning, match=f"{WITHOUT}.*{name}"):
        given = model(**call)
    with no_warnings():
        again = model(**call)
    expected = stock(**call)
    assert given.keys() == again.keys()
    assert torch.equal(given.logits, expected.logits)
    if name == "output_hidden_states":
        assert all(map(torch.equal, given.hidden_states, expected.hidden_states))
    if name == "output_router_logits":
        assert torch.equal(given.aux_loss, expected.aux_loss)


def test_settings_in_the_config_count_as_arguments():
    model, stock, _ = shared_and_stock("llama")
    ids, mask = padded(preference_sequences()[0], "right")
    for part in (model, stock):
        part.config.output_hidden_states = True
    with pytest.warns(UserWarning, match="output_hidden_states"):
        given = model(input_ids=ids, attention_mask=mask)
    assert torch.equal(given.hidden_states[1], stock(input_ids=ids, attention_mask=mask).hidden_states[1])
    with no_warnings(), counted_tokens(model) as counts:
        model(input_ids=ids, attention_mask=mask, output_hidden_states=False)
    assert counts == [distinct_prefixes(ids, mask)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window"])
def test_generation_is_unchanged(name):
    model, stock, _ = shared_and_stock(name)
    ids, mask = padded(preference_sequences()[0], "left")
    for options in ({"do_sample": False}, {"num_beams": 2}, {"do_sample": False, "use_cache": False}):
        options = {"attention_mask": mask, "max_new_tokens": 7, **options}
        with no_warnings():
            assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))
    cached = model(input_ids=ids, attention_mask=mask, use_cache=True)
    assert cached.past_key_values.get_seq_length() == ids.shape[1]


def attributes(model):
    return {name: set(vars(part)) for name, part in model.named_modules()}


@pytest.mark.parametrize(("name", "implementation"), [("llama", "eager"), ("llama", "sdpa"), ("gemma2", "eager")])
def test_undo_gives_the_stock_model_back(name, implementation):
    model = exact_model(name, attn_implementation=implementation)
    before, weights = attributes(model), {name: value.clone() for name, value in model.state_dict().items()}
    ids, mask = padded(preference_sequences()[0], "left")
    expected = model(input_ids=ids, attention_mask=mask).logits
    handle = preftree.share_prefixes(model)
    assert model.state_dict().keys() == weights.keys()
    handle.undo()
    with pytest.raises(KeyError, match="from the block"), preftree.share_prefixes(model):
        raise KeyError("from the block")
    handle.undo()
    assert attributes(model) == before
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.base_model)
    assert model.config._attn_implementation == model.base_model.config._attn_implementation == implementation
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)


def test_a_prepared_model_stays_prepared():
    model = preftree.prepare_model(exact_model("llama"), backend="dense")
    forward, before = model.forward, attributes(model)
    ids, mask = padded(preference_sequences()[0], "left")
    sequences, prompt_lengths = preference_sequences()
    row = preftree.pack([preftree.TokenTree.from_sequences(sequences, prompt_lengths)])[0]
    expected = preftree.sequence_logps(model, row).logps
    with no_warnings(), preftree.share_prefixes(model), counted_tokens(model) as counts:
        model(input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(preftree.sequence_logps(model, row).logps, expected)
    assert counts == [len(row), len(row)]
    assert (model.forward, attributes(model)) == (forward, before)
    torch.testing.assert_close(preftree.sequence_logps(model, row).logps, expected)
    # A model that is prepared while it shares stays prepared, too.
    later = exact_model("llama")
    with no_warnings(), preftree.share_prefixes(later):
        preftree.prepare_model(later)
    assert not later._preftree.along_paths
    torch.testing.assert_close(preftree.sequence_logps(later, row).logps, expected)
    assert torch.equal(later(ids).logits, exact_model("llama")(ids).logits)


@pytest.mark.filterwarnings("ignore:.* run along each path")
@pytest.mark.parametrize("name", ["nemotron_h", "gptj", "bloom"])
def test_parts_along_paths(name):
    """Shared, prepared while it shares, and shared while it is prepared; given back as it was."""
    model, stock = exact_model(name).train(), exact_model(name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    before, attention = attributes(model), model.config._attn_implementation
    sequences, prompt_lengths = preference_sequences()
    ids, mask = padded(sequences, "right")
    expected = stock(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    expected.square().sum().backward()
    theirs = {key: p.grad for key, p in stock.named_parameters() if p.grad is not None}
    row = preftree.pack([preftree.TokenTree.from_sequences(sequences, prompt_lengths)])[0]

    def check():
        model.zero_grad()
        with no_warnings():
            logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        logits.square().sum().backward()
        largest = max(gradient.abs().max() for gradient in theirs.values())
        for key, gradient in theirs.items():
            torch.testing.assert_close(
                model.get_parameter(key).grad, gradient, rtol=1e-4, atol=1e-5 * float(largest), msg=key
            )

    with preftree.share_prefixes(model):
        check()
    assert (attributes(model), model.config._attn_implementation) == (before, attention)
    with preftree.share_prefixes(model):
        preftree.prepare_model(model)
        found = preftree.sequence_logps(model, row).logps
        check()
    parts = len(model._preftree.along_paths)
    assert parts == ALONG_PATHS[name][2][0]
    with preftree.share_prefixes(model), counted_tokens(model) as counts:
        check()
        torch.testing.assert_close(preftree.sequence_logps(model, row).logps, found)
    assert counts[0] == len(row) < mask.sum()
    assert sum("forward" in vars(part) for part in model.modules()) == parts + 1
    check()


def test_sharing_ends_with_the_last_handle():
    model = exact_model("llama")
    before = attributes(model)
    ids, mask = padded(preference_sequences()[0], "right")

    def shares():
        with counted_tokens(model) as counts:
            model(input_ids=ids, attention_mask=mask)
        return counts == [distinct_prefixes(ids, mask)]

    outer = preftree.share_prefixes(model, backend="dense")
    with preftree.share_prefixes(model):
        outer.undo()
        outer.undo()
        assert shares()
        with pytest.raises(ValueError, match="backend 'dense' already"):
            preftree.share_prefixes(model, backend="varlen")
    assert not shares()
    assert attributes(model) == before
    with preftree.share_prefixes(model, backend="varlen"):
        assert shares()


def test_a_copy_shares_with_its_own_weights():
    model = exact_model("llama")
    before = attributes(model)
    handle = preftree.share_prefixes(model)
    twin, twin_handle = copy.deepcopy((model, handle))
    ids, mask = padded(preference_sequences()[0], "left")
    expected = model(input_ids=ids, attention_mask=mask).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with counted_tokens(twin) as counts:
        assert torch.equal(twin(input_ids=ids, attention_mask=mask).logits, expected)
    assert counts == [distinct_prefixes(ids, mask)]
    handle.undo()
    with counted_tokens(twin) as counts:
        twin(input_ids=ids, attention_mask=mask)
    assert counts == [distinct_prefixes(ids, mask)]
    twin_handle.undo()
    assert attributes(twin) == before
    assert_same_tokens(twin(input_ids=ids, attention_mask=mask).logits, expected, mask)


def test_a_forward_wrapped_since_outlives_undo():
    """As accelerate does for mixed precision: it takes the function out of the bound method and binds it again."""
    model, stock, handle = shared_and_stock("llama")
    function = model.forward.__func__
    model.forward = MethodType(lambda self, *args, **kwargs: function(self, *args, **kwargs), model)
    ids, mask = padded(preference_sequences()[0], "left")
    expected = stock(input_ids=ids, attention_mask=mask).logits
    for shares in (True, False, True, False):
        with counted_tokens(model) as counts:
            assert_same_tokens(model(input_ids=ids, attention_mask=mask).logits, expected, mask)
        assert counts == [distinct_prefixes(ids, mask) if shares else ids.numel()]
        if shares:
            handle.undo()
        else:
            handle = preftree.share_prefixes(model)


@pytest.mark.usefixtures("group_of_one")
def test_wrapped_by_ddp():
    model, stock, _ = shared_and_stock("llama")
    ids, mask = padded(preference_sequences()[0], "left")
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    with no_warnings(), counted_tokens(model) as counts:
        given = wrapped(input_ids=ids, attention_mask=mask).logits
        (given * mask[..., None]).square().mean().backward()
    assert counts == [distinct_prefixes(ids, mask)]
    expected = stock(input_ids=ids, attention_mask=mask).logits
    assert_same_tokens(given, expected, mask)
    (expected * mask[..., None]).square().mean().backward()
    assert max(gradient_differences(model, stock).values()) <= TOLERANCE


def test_refused_models_are_left_alone():
    for name in ("dropout", "router-noise", "xlm", "bert-encoder"):
        make, expected = refused_model(name)
        model = make()
        before, attention = attributes(model), model.config._attn_implementation
        with pytest.raises(NotImplementedError, match=expected):
            preftree.share_prefixes(model)
        assert attributes(model) == before
        assert model.config._attn_implementation == attention
    with pytest.raises(TypeError, match="Linear"):
        preftree.share_prefixes(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown attention backend"):
        preftree.share_prefixes(exact_model("llama"), backend="fastest")


def test_bad_batches():
    model, _, _ = shared_and_stock("llama")
    ids, mask = padded(preference_sequences()[0], "left")
    with pytest.raises(ValueError, match=r"attention_mask has shape \[8, 16\], input_ids have \[8, 19\]"):
        model(input_ids=ids, attention_mask=mask[:, 3:])
    for token in (VOCABULARY, -1):
        ids[2, -4] = token
        with pytest.raises(ValueError, match=rf"input_ids\[2, 15\] is {token}, outside .* {VOCABULARY}"):
            model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_without_a_token_give_zeros(name):
    model, stock, _ = shared_and_stock(name)
    ids, mask = padded(preference_sequences()[0], "left")
    mask[3] = 0
    with no_warnings():
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert not hidden[3].any()
    assert_same_tokens(hidden, stock.base_model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)


def test_noise_that_is_switched_on_later_is_not_shared():
    peft = pytest.importorskip("peft")
    base = exact_model("llama")
    preftree.share_prefixes(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    ids, mask = padded(preference_sequences()[0], "right")
    with no_warnings(), counted_tokens(model) as counts:
        model.eval()(input_ids=ids, attention_mask=mask)
    assert counts == [distinct_prefixes(ids, mask)]
    with pytest.warns(UserWarning, match="dropout"), counted_tokens(model) as counts:
        model.train()(input_ids=ids, attention_mask=mask)
    assert counts == [ids.numel()]
    noisy = exact_model("llama").train()
    preftree.share_prefixes(noisy)
    noisy.get_input_embeddings().neftune_noise_alpha = 5.0
    with pytest.warns(UserWarning, match="NEFTune"):
        noisy(input_ids=ids, attention_mask=mask)


def test_left_padding_that_is_counted_in_another_way_is_not_shared():
    """A backbone that numbers left-padded rows neither by the row nor by the mask, but from two on."""
    model = exact_model("gpt2")
    stock_forward = type(model.transformer).forward

    def from_two(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        if position_ids is None and attention_mask is not None and not attention_mask.all():
            position_ids = (attention_mask.cumsum(1) + 1).clamp(min=0)
        return stock_forward(
            self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )

    model.transformer.forward = MethodType(from_two, model.transformer)
    stock = copy.deepcopy(model)
    preftree.share_prefixes(model)
    ids, mask = padded(preference_sequences()[0], "left")
    with pytest.warns(UserWarning, match="pads on the left"):
        given = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(given, stock(input_ids=ids, attention_mask=mask).logits)


def test_stock_dpo_trainer_of_trl(tokenizer):
    def small():
        sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
        return build("Llama", sizes | {"max_position_embeddings": 256})

    pairs = dataset(text_pairs(10, explicit=True))
    runs = []
    for shared in (False, True):
        model, reference = small(), small()
        if shared:
            preftree.share_prefixes(model)
            preftree.share_prefixes(reference)
        args = {"processing_class": tokenizer, "ref_model": reference}
        with no_warnings(), counted_tokens(model) as counts:
            runs.append((train("trl", lambda model=model: model, pairs, trainer_args=args, max_steps=2), counts))
    (stock, stock_counts), (sharing, counts) = runs
    assert len(counts) == len(stock_counts) == 2
    assert sum(counts) < 0.7 * sum(stock_counts)
    metrics, parameters = differences(sharing, stock)
    assert metrics <= 1e-4
    assert parameters <= 1e-4
