"""Parts of layers that run along paths: recurrences, convolutions, attention of families' own; against the stock model."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from families import ALONG_PATHS, VOCABULARY, build, exact_model
from oracle import compare_with_stock, random_row, random_sequences, stock_logps, walks_up
from preference_data import dataset, text_pairs
from torch.utils.flop_counter import FlopCounterMode
from trl_runs import differences, train

import preftree
from preftree.models import interface, mixers
from preftree.models.path_batches import BY_PLACE, PathBatches, Sequences, read
from preftree.packing import empty_row

TOLERANCE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:.* run along each path")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ALONG_PATHS)
def test_family_is_exact(name, seed):
    groups = random_sequences(torch.Generator().manual_seed(seed), VOCABULARY)
    model = exact_model(name)
    logps, gradients = compare_with_stock(model, groups)
    assert logps <= TOLERANCE
    worst = max(gradients, key=gradients.get)
    assert gradients[worst] <= TOLERANCE, worst
    prepared = model._preftree
    assert (len(prepared.along_paths), len(prepared.mixing)) == ALONG_PATHS[name][2]


# (Zamba2's layers hold layers: reentrant checkpoints within checkpoints, for which autograd raises an error.)
@pytest.mark.parametrize(
    ("name", "reentrant"),
    [
        *[
            (name, kind)
            for name in ("qwen3_5", "mamba", "gptj", "falcon-alibi", "glm_moe_dsa")
            for kind in (False, True)
        ],
        ("zamba2", False),
    ],
)
def test_activation_checkpointing_is_exact(name, reentrant):
    """Rows whose backward passes come after all forward passes: each layer that runs again finds its own."""
    model = exact_model(name).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    stock = copy.deepcopy(model)
    preftree.prepare_model(model)
    before = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    rows = []
    for seed in (3, 4):
        trees = [
            preftree.TokenTree.from_sequences(*group)
            for group in random_sequences(torch.Generator().manual_seed(seed), VOCABULARY)
        ]
        rows.append(preftree.pack(trees)[0])
    sum(preftree.sequence_logps(model, row).logps.sum() for row in rows).backward()
    plain = preftree.prepare_model(stock)
    stock.gradient_checkpointing_disable()
    sum(preftree.sequence_logps(plain, row).logps.sum() for row in rows).backward()
    assert [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()] == before
    for (name, mine), (_, theirs) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["qwen3_next", "gptj", "deepseek_v32", "llama4-temperature", "bloom"])
def test_ordinary_batches_run_as_before(name):
    stock = exact_model(name)
    model = copy.deepcopy(preftree.prepare_model(copy.deepcopy(stock)))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (3, 19), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    torch.testing.assert_close(model(**given).logits, stock(**given).logits, rtol=1e-5, atol=1e-5)


def test_what_does_not_mix_tokens_sees_each_once():
    model = preftree.prepare_model(exact_model("qwen3_5"))
    seen = {"mlp": [], "linear_attn": [], "self_attn": []}
    for name, module in model.named_modules():
        if (kind := name.rpartition(".")[2]) in seen:
            inner = module.in_proj_qkv if kind == "linear_attn" else module.q_proj if kind == "self_attn" else module
            inner.register_forward_hook(lambda m, args, out, kind=kind: seen[kind].append(args[0].shape[:2].numel()))
    prompt, responses = [5] * 20, [[6] * 4, [7] * 3]
    tree = preftree.TokenTree.from_sequences([prompt + response for response in responses], [20, 20])
    row = preftree.pack([tree], 30)[0]
    preftree.sequence_logps(model, row)
    assert seen == {"mlp": [30] * 3, "linear_attn": [2 * 24] * 2, "self_attn": [30]}


@pytest.mark.parametrize("name", ["lfm2", "bloom", "falcon-alibi", "openai-gpt"])
def test_products_are_computed_once_a_token(name):
    """Those of projections in parts along paths too, forward and backward."""
    model = preftree.prepare_model(exact_model(name))
    prompt, responses = [5] * 20, [[6] * 4, [7] * 3, [8] * 5]
    tree = preftree.TokenTree.from_sequences([prompt + response for response in responses], [20] * 3)
    counted = []
    for trees in ([tree], [preftree.TokenTree.from_sequences([[5] * 32], [20])]):
        row = preftree.pack(trees, 40)[0]
        assert row.num_tokens == 32
        with FlopCounterMode(display=False) as counter:
            model._preftree.hidden_states(row).sum().backward()
        operations = counter.get_flop_counts()["Global"]
        counted.append(operations[torch.ops.aten.mm] + operations.get(torch.ops.aten.addmm, 0))
    parts = model._preftree.along_paths
    weights = sum(p.numel() for part in parts for p in part.parameters() if p.ndim == 2)
    assert counted[0] == counted[1] > 6 * 32 * weights > 0


def test_products_of_what_has_been_changed_in_place():
    """What is known of a tensor's tokens no longer holds; and what is no product of tokens is left alone."""
    tree = preftree.TokenTree.from_sequences([[5, 6, 7, 8], [5, 6, 9]], [1, 1])
    (batch,) = PathBatches.of(preftree.pack([tree])[0]).batches
    weight, module = torch.randn(4, 3), torch.nn.Identity()
    sequences = Sequences(batch, module)
    tokens = torch.randn(5, 3)
    places = sequences.along(tokens)
    expected, other = (tokens @ weight.T)[batch.local], torch.randn(2, 7, 3)
    results = []
    with sequences:
        results.append(F.linear(places, weight))
        assert sequences.at_tokens(results[0]).shape == (5, 4)
        places *= 2
        results += [F.linear(places, weight), places @ weight.T, places[0] @ weight.T]
        results.append(torch.addmm(torch.zeros(4), places.flatten(0, 1), weight.T))
        assert not hasattr(module, BY_PLACE)
        results.append(F.linear(other, weight))
        assert getattr(module, BY_PLACE)
        results.append(F.linear(places, weight))
    right = [expected, *[2 * expected] * 2, 2 * expected[0], 2 * expected.flatten(0, 1), other @ weight.T, 2 * expected]
    for result, own in zip(results, right, strict=True):
        torch.testing.assert_close(result, own)


class _Product(torch.autograd.Function):
    """As libraries of quantised weights have them: multiplies where nothing is recorded."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, 1).T @ x.flatten(0, 1)


def test_products_within_autograd_functions_have_their_gradients():
    tree = preftree.TokenTree.from_sequences([[5, 6, 7, 8], [5, 6, 9]], [1, 1])
    (batch,) = PathBatches.of(preftree.pack([tree])[0]).batches
    first, second = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    tokens, weights = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    sequences = Sequences(batch, torch.nn.Identity())
    with sequences:
        result = sequences.at_tokens(F.linear(_Product.apply(sequences.along(tokens), first), second))
    got = torch.autograd.grad((result * weights).sum(), (tokens, first, second))
    right = torch.autograd.grad((tokens @ first.T @ second.T * weights).sum(), (tokens, first, second))
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("own", [{}, {"row_length": 64}], ids=["one-row", "several-rows"])
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", ["lfm2", "mamba", "falcon-alibi"])
def test_same_training_as_trl(name, settings, own, tmp_path, tokenizer):
    family, tiny, _ = ALONG_PATHS[name]
    model = build(family, tiny | {"vocab_size": len(tokenizer), "eos_token_id": 1})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    data = dataset(text_pairs(15))
    theirs, ours = (train(kind, str(tmp_path), data, own=own, **settings) for kind in ("trl", "preftree"))
    metrics, parameters = differences(theirs, ours)
    assert metrics <= 1e-5
    assert parameters <= 1e-5
    assert (ours.computed["rows"] > 3) == bool(own)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_paths_of_a_row(seed, together):
    row = random_row(seed, stretch=5)
    paths = PathBatches.of(row, together)
    assert PathBatches.of(row, together) is paths
    walks = [walk[::-1] for walk in walks_up(row)]
    real = range(row.num_tokens)
    leaves = [node for node in real if node not in set(row.parent.tolist())]
    last, trees = [], []
    for batch in paths.batches:
        nodes = batch.tokens[batch.local]
        roots = {}
        for path in nodes.tolist():
            walk = walks[path[-1]]
            assert path == walk + walk[-1:] * (len(path) - len(walk))
            last.append(path[-1])
            roots[path[0]] = max(roots.get(path[0], 0), len(walk))
        assert together or min(roots.values()) >= 0.75 * nodes.shape[1]
        trees += roots
        assert torch.equal(nodes.flatten()[batch.first], batch.tokens)
    assert sorted(last) == leaves
    assert len(trees) == len(set(trees))
    assert sorted(paths.tokens.tolist()) == list(real)
    assert len(paths.batches) == 1 or not together


@pytest.mark.parametrize("seed", range(4))
def test_gradients_through_paths(seed):
    """To places and back, against indexing; what padding holds has no gradient."""
    row = random_row(seed, stretch=5)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(row), 3, 2, dtype=torch.float64, generator=generator).requires_grad_()
    paths = PathBatches.of(row)
    loss = expected = 0.0
    for batch in paths.batches:
        nodes, (count, longest) = batch.tokens[batch.local], batch.local.shape
        weights = torch.randn(count, longest, 3, 2, dtype=torch.float64, generator=generator)
        places = batch.along(read(x, batch.tokens))
        torch.testing.assert_close(places, x[nodes], rtol=0, atol=0)
        loss = loss + (places * weights).sum() + (batch.at_tokens(places.flatten(0, 1)) ** 2).sum()
        weights = weights.where((nodes != nodes.roll(1, 1))[..., None, None], 0)  # (a path holds no token twice)
        expected = expected + (x[nodes] * weights).sum() + (x[batch.tokens] ** 2).sum()
    for found, right in zip(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    back = paths.back([x[batch.tokens] for batch in paths.batches])
    assert torch.equal(back[: row.num_tokens], x[: row.num_tokens])
    assert not back[row.num_tokens :].any()
    (gradient,) = torch.autograd.grad(back[row.num_tokens // 2].sum(), x)
    assert gradient.nonzero()[:, 0].unique().tolist() == [row.num_tokens // 2]


def test_parts_that_start_from_zeros_run_along_paths_too():
    """They mix nothing yet, and will when they have been trained."""
    model, weights = exact_model("lfm2"), {}
    for name, parameter in model.named_parameters():
        if name.endswith("conv.out_proj.weight"):
            weights[name] = parameter.detach().clone()
            parameter.data.zero_()
    assert len(weights) == 2
    preftree.prepare_model(model)
    assert len(model._preftree.along_paths) == 2
    model.load_state_dict(weights, strict=False)
    tree = preftree.TokenTree.from_sequences([[5, 6, 7, 8, 9], [5, 6, 7, 10, 11, 12]], [3, 3])
    logps = preftree.sequence_logps(model, preftree.pack([tree])[0]).logps
    expected = [stock_logps(exact_model("lfm2"), sequence, 3) for sequence in ([5, 6, 7, 8, 9], [5, 6, 7, 10, 11, 12])]
    torch.testing.assert_close(logps, torch.stack(expected))


def test_parts_that_others_have_replaced():
    """Whose forward pass would be lost: refused, and left as it is."""
    model = exact_model("lfm2")
    part = model.model.layers[0].conv
    part.forward = replaced = part.forward
    with pytest.raises(NotImplementedError, match="Lfm2ShortConv, which would run along paths, has been replaced"):
        preftree.prepare_model(model)
    assert vars(part)["forward"] == replaced
    assert "forward" not in vars(model.model.layers[2].conv)


def test_arguments_along_paths():
    """What is given for each token goes with the tokens, what is made by index is a sequence's."""
    tree = preftree.TokenTree.from_sequences([[5, 6, 7, 8], [5, 9]], [1, 1])
    row = preftree.pack([tree], 6)[0]
    (batch,) = PathBatches.of(row).batches
    nodes, length = batch.tokens[batch.local], 6
    assert nodes.tolist() == [[0, 1, 2, 3], [0, 4, 4, 4]]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    hidden, rotated, mask, slopes, wide = (
        draw(1, 6, 3),
        draw(1, 1, 6, 2),
        draw(1, 1, 6, 6),
        draw(4, 1, 6),
        draw(1, 4, 1, 6),
    )
    axes, index, other = torch.arange(18).view(3, 1, 6), draw(6, 5), draw(2, 7)
    given = {"hidden": hidden, "rotated": (rotated, [rotated]), "mask": mask, "slopes": slopes, "wide": wide}
    given |= {"axes": axes, "index": index, "other": other, "cache": None, "flag": True}
    along = mixers._along(given, Sequences(batch, torch.nn.Identity()), length)
    for p, path in enumerate(nodes.tolist()):
        for at, node in enumerate(path):
            assert torch.equal(along["hidden"][p, at], hidden[0, node])
            assert torch.equal(along["rotated"][0][p, 0, at], rotated[0, 0, node])
            assert torch.equal(along["rotated"][1][0], along["rotated"][0])
            assert torch.equal(along["axes"][:, p, at], axes[:, 0, node])
            for key in range(4):
                assert along["mask"][p, 0, at, key] == mask[0, 0, at, key]
        assert torch.equal(along["slopes"][4 * p : 4 * p + 4], slopes[:, :, :4])
        assert torch.equal(along["wide"][p], wide[0, :, :, :4])
    assert torch.equal(along["index"], index[:4])
    assert along["other"] is other
    assert (along["cache"], along["flag"]) == (None, True)
    assert along["slopes"].shape == (8, 1, 4)


def test_what_is_given_no_tokens_is_refused():
    """The last layer cut to some tokens, say: it would run on what is no sequence."""
    row = random_row(0)
    active = interface.ActiveRow(row, "dense")
    part = exact_model("lfm2").model.layers[0].conv
    with pytest.raises(NotImplementedError, match="Lfm2ShortConv is given nothing that a row's tokens have each"):
        mixers.along_paths(part, active, (torch.randn(1, len(row) - 1, 32),), {"past_key_values": None})


def test_row_of_padding_reaches_all_weights():
    model = preftree.prepare_model(exact_model("mamba"))
    row = empty_row(8, 0)
    model._preftree.hidden_states(row).sum().mul(0).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lm_head" not in name)


def test_refused_models_are_left_as_they_were(monkeypatch):
    """What has run along paths in vain."""
    monkeypatch.setattr(PathBatches, "of", classmethod(lambda cls, row, together=False: _shifted(cls._of(row, 0.75))))
    model = exact_model("qwen3_next")
    with pytest.raises(NotImplementedError, match=r"Qwen3NextForCausalLM .* layer types linear_attention"):
        preftree.prepare_model(model)
    assert all("forward" not in vars(module) for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


def _shifted(paths):
    return replace(paths, tokens=paths.tokens.roll(1))
