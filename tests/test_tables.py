"""Gradients of embedding and head that are added where they lie, against autograd's own."""

import copy

import pytest
import torch
from families import exact_model
from torch import nn

import preftree
from preftree.models import products, tables

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TREES = [
    preftree.TokenTree.from_sequences(pair, [2, 2])
    for pair in ([[1, 2, 3, 4, 3], [1, 2, 3, 1]], [[6, 7, 8, 3], [6, 7, 0, 3, 3]], [[5, 0, 5], [5, 0, 6, 0]])
]


def model_of(tied, padding=None):
    model = exact_model("llama-tied" if tied else "llama")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.model.embed_tokens.padding_idx = padding
    return preftree.prepare_model(model)


def gradients(model, on=True):
    """Of rows that follow each other, by parameters."""
    with products.adding_to_gradients(on):
        for tree in TREES:
            preftree.sequence_logps(model, preftree.pack([tree])[0]).logps.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture
def sums(monkeypatch):
    """Sizes of the tables that gradients of what was read have been summed in."""
    sizes, own = [], tables._sums
    monkeypatch.setattr(
        tables, "_sums", lambda rows, ids, size, *given: sizes.append(size) or own(rows, ids, size, *given)
    )
    return sizes


@pytest.mark.parametrize("padding", [None, 0, 3])
@pytest.mark.parametrize("chunk", [1 << 26, 80], ids=["whole", "in chunks"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tables_add_to_gradients(tied, chunk, padding, sums, monkeypatch):
    monkeypatch.setattr("preftree.logprobs.LOGITS_PER_CHUNK", chunk)
    model = model_of(tied, padding)
    expected = gradients(copy.deepcopy(model), on=False)
    assert not sums
    got = gradients(model, on=True)
    # Whole tables only where there is none to add to.
    whole = sum(size == len(model.lm_head.weight) for size in sums)
    assert (len(sums), whole) == (len(TREES), 0 if tied else 1)
    where = {name: parameter.grad.data_ptr() for name, parameter in model.named_parameters() if len(parameter) == 131}
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6)
    twice = gradients(model, on=True)
    for name, place in where.items():
        assert twice[name].data_ptr() == place
    for name, grad in twice.items():
        torch.testing.assert_close(grad, 2 * expected[name], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])])
def test_rows_of_an_id_are_added_once(device):
    """Ids in any order, again and again: their rows are added up before they are rounded to the table's type."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (301,), generator=generator)
    rows, table = (torch.randn(size, 5, generator=generator).bfloat16() for size in (301, 11))
    for padding in (-1, 4):
        kept = ids != padding
        sums = torch.zeros(11, 5, dtype=torch.float64).index_add_(0, ids[kept], rows[kept].double())
        expected = (table.double() + sums.bfloat16().double()).bfloat16()
        got = table.to(device, copy=True)
        tables.add_rows(got, ids.to(device), rows.to(device), padding)
        torch.testing.assert_close(got.cpu(), expected, rtol=2**-7, atol=0)
        assert torch.equal(got[9:].cpu(), table[9:])
    nothing = table.to(device, copy=True)
    tables.add_rows(nothing, ids[:0].to(device), rows[:0].to(device))
    assert torch.equal(nothing.cpu(), table)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradients_that_somebody_watches_come_from_autograd(tied, kind):
    model = model_of(tied)
    expected = gradients(copy.deepcopy(model), on=False)
    seen = []
    weights = {model.lm_head.weight, model.model.embed_tokens.weight}
    for weight in weights:
        getattr(weight, kind)(lambda given: seen.append(given.shape))
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6)
    assert seen == [model.lm_head.weight.shape] * len(TREES) * len(weights)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradients_that_lie_otherwise_are_added_to(tied):
    """Column by column, as no product writes them: what is there before stays in the sum."""
    model = model_of(tied)
    expected = gradients(copy.deepcopy(model), on=False)
    weights = {"lm_head.weight": model.lm_head.weight, "model.embed_tokens.weight": model.model.embed_tokens.weight}
    for weight in weights.values():
        weight.grad = torch.ones(weight.shape[::-1]).t()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name] + (name in weights), rtol=1e-5, atol=1e-6)


class _Scaled(nn.Embedding):
    def forward(self, input):
        return 3 * super().forward(input)


def _forward_of_its_own(table):
    table.forward = lambda given: 2 * type(table).forward(table, given)
    return table


def changed(table, **attributes):
    for name, value in attributes.items():
        setattr(table, name, value)
    return table


@pytest.mark.parametrize(
    "make",
    [
        lambda: _Scaled(5, 3),
        lambda: _forward_of_its_own(nn.Embedding(5, 3)),
        lambda: changed(nn.Embedding(5, 3), max_norm=0.5),
        lambda: changed(nn.Embedding(5, 3), scale_grad_by_freq=True),
        lambda: changed(nn.Embedding(5, 3), sparse=True),
        lambda: nn.Embedding(5, 3).requires_grad_(False),
        lambda: nn.Linear(5, 3),
        lambda: nn.Linear(5, 3, bias=False).requires_grad_(False),
        lambda: _forward_of_its_own(nn.Linear(5, 3, bias=False)),
        lambda: None,
    ],
    ids=[
        "subclass",
        "own forward",
        "max_norm",
        "by frequency",
        "sparse",
        "frozen",
        "bias",
        "frozen head",
        "own head",
        "none",
    ],
)
def test_modules_of_another_kind_run_as_they_are(make):
    module = make()
    before = None if module is None else module.forward
    with products.adding_to_gradients(True), tables.adding_where_they_lie(module):
        assert (None if module is None else module.forward) == before


def test_only_gradients_that_are_added_need_it():
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    for module in (embedding, head):
        own = module.forward
        with tables.adding_where_they_lie(module):
            assert module.forward == own
        with products.adding_to_gradients(True):
            with torch.no_grad(), tables.adding_where_they_lie(module):
                assert module.forward == own
            with tables.adding_where_they_lie(module):
                assert module.forward != own
                with pytest.raises(TypeError, match="argument"):
                    module("no tokens", "nor hidden states")
        assert module.forward == own


def test_autocast_computes_the_head_s_product_as_ever():
    head, x = nn.Linear(3, 5, bias=False), torch.randn(2, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        head(x).sum().backward()
        expected, head.weight.grad = head.weight.grad, None
        with products.adding_to_gradients(True), tables.adding_where_they_lie(head):
            result = head(x)
            result.sum().backward()
    assert result.dtype == torch.bfloat16
    assert torch.equal(head.weight.grad, expected)
