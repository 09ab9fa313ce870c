"""Token statistics against a plain log-softmax over full logits; chunks, shared nodes, empty prompts."""

import pytest
import torch
from families import VOCABULARY, exact_model
from oracle import random_sequences, stock_logps

import preftree
from preftree import logprobs
from preftree.logprobs import sum_by_sequence
from preftree.models.replaced import hooked
from preftree.packing import empty_row


@pytest.fixture(scope="module")
def llama():
    return preftree.prepare_model(exact_model("llama"))


def rows_of(groups, spare=4):
    trees = [preftree.TokenTree.from_sequences(*group) for group in groups]
    return preftree.pack(trees, sum(len(tree) for tree in trees) + spare)[0]


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere2", "granite"])
def test_statistics_of_every_token(name):
    model = preftree.prepare_model(exact_model(name))
    groups = random_sequences(torch.Generator().manual_seed(7), VOCABULARY)
    out = preftree.sequence_logps(model, rows_of(groups), statistics=True)
    at = 0
    for sequences, prompts in groups:
        for sequence, prompt in zip(sequences, prompts, strict=True):
            first = max(prompt, 1)
            ids = torch.tensor(sequence)
            logits = model(ids[None]).logits[0, first - 1 : -1].double()
            log_p = logits.log_softmax(-1)
            here = slice(at, at + len(sequence) - first)
            at = here.stop
            close = {"rtol": 1e-5, "atol": 1e-5}
            targets = ids[first:]
            torch.testing.assert_close(out.token_logps[here].double(), log_p.gather(1, targets[:, None])[:, 0], **close)
            torch.testing.assert_close(out.entropy[here].double(), -(log_p.exp() * log_p).sum(-1), **close)
            torch.testing.assert_close(out.mean_logits[here].double(), logits.mean(-1), **close)
            torch.testing.assert_close(out.log_sum_sq_probs[here].double(), (2 * log_p).logsumexp(-1), **close)
            assert torch.equal(out.is_top1[here], logits.argmax(-1) == targets)
    assert at == out.token_logps.numel()
    assert not out.entropy.requires_grad


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_load_of_experts_counts_every_sequence(name):
    """Against the stock model's routers on each sequence alone: a shared token counts once for each sequence."""
    model = preftree.prepare_model(exact_model(name))
    groups = random_sequences(torch.Generator().manual_seed(7), VOCABULARY)
    out = preftree.sequence_logps(model, rows_of(groups), experts=True)
    counts, probs = torch.zeros_like(out.expert_counts), torch.zeros_like(out.expert_probs)
    for sequence in (sequence for sequences, _ in groups for sequence in sequences):
        for logits in model(torch.tensor([sequence]), output_router_logits=True).router_logits:
            p = logits.view(len(sequence), -1).softmax(-1)
            probs += p.sum(0)
            counts += torch.nn.functional.one_hot(p.topk(2).indices, p.shape[-1]).sum((0, 1))
    torch.testing.assert_close(out.expert_counts, counts)
    torch.testing.assert_close(out.expert_probs, probs)
    assert not out.expert_counts.requires_grad
    assert out.expert_probs.requires_grad


def test_load_of_experts_of_a_dense_model(llama):
    row = rows_of([([[3, 4, 5]], [1])])
    with pytest.raises(NotImplementedError, match="does not return its router logits"):
        preftree.sequence_logps(llama, row, experts=True)


def test_chunks_change_nothing(llama, monkeypatch):
    row = rows_of(random_sequences(torch.Generator().manual_seed(8), VOCABULARY))

    def run():
        llama.zero_grad()
        out = preftree.sequence_logps(llama, row, statistics=True)
        (out.logps * torch.arange(1, len(out.logps) + 1)).sum().backward()
        return [out.logps, out.entropy, out.is_top1, *[p.grad.clone() for p in llama.parameters()]]

    whole = run()
    monkeypatch.setattr("preftree.logprobs.LOGITS_PER_CHUNK", 5 * VOCABULARY)
    for one, other in zip(whole, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(one.double().abs().max()))


def test_head_never_sees_more_than_a_chunk(llama, monkeypatch):
    monkeypatch.setattr("preftree.logprobs.LOGITS_PER_CHUNK", 5 * VOCABULARY)
    sizes = []
    hook = llama.lm_head.register_forward_hook(lambda module, args, output: sizes.append(args[0].shape[1]))
    row = rows_of(random_sequences(torch.Generator().manual_seed(8), VOCABULARY))
    out = preftree.sequence_logps(llama, row)
    scored = row.scored_nodes.unique().numel()
    assert (sizes[0], max(sizes[1:]), sum(sizes)) == (5, 3, scored)
    # Only what was not kept is computed again.
    out.logps.sum().backward()
    hook.remove()
    assert sum(sizes) == 2 * scored - 5
    assert max(sizes[1:]) == 3


def test_first_response_token_is_scored_from_the_last_shared_token(llama):
    sequences = [[3, 4, 5, 6], [3, 4, 5, 7, 8], [3, 4, 9]]
    row = rows_of([(sequences, [2, 3, 2])])
    out = preftree.sequence_logps(llama, row)
    for index, (sequence, prompt) in enumerate(zip(sequences, [2, 3, 2], strict=True)):
        torch.testing.assert_close(out.logps[index], stock_logps(llama, sequence, prompt), rtol=1e-5, atol=1e-5)
    assert out.lengths.tolist() == [2, 2, 1]


def test_duplicates_and_prefixes_of_one_another(llama):
    sequences = [[3, 4, 5, 6], [3, 4, 5, 6], [3, 4, 5], [3]]
    out = preftree.sequence_logps(llama, rows_of([(sequences, [1, 2, 0, 0])]))
    for index, (sequence, prompt) in enumerate(zip(sequences, [1, 2, 0, 0], strict=True)):
        expected = stock_logps(llama, sequence, prompt)
        torch.testing.assert_close(out.logps[index], expected, rtol=1e-5, atol=1e-5)
    # The first token of a sequence has no prediction.
    assert out.lengths.tolist() == [3, 2, 2, 0]


def test_padding_is_neither_scored_nor_seen(llama):
    groups = random_sequences(torch.Generator().manual_seed(9), VOCABULARY)
    trees = [preftree.TokenTree.from_sequences(*group) for group in groups]
    size = sum(len(tree) for tree in trees)
    plain = preftree.sequence_logps(llama, preftree.pack(trees)[0]).logps
    for pad in (0, 17):
        padded = preftree.sequence_logps(llama, preftree.pack(trees, size + 31, pad_token_id=pad)[0]).logps
        torch.testing.assert_close(padded, plain, rtol=1e-6, atol=1e-6)


def test_row_without_sequences_gives_zero_gradients(llama):
    llama.zero_grad()
    out = preftree.sequence_logps(llama, empty_row(8), statistics=True)
    assert out.logps.shape == (0,)
    out.logps.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in llama.parameters())


@pytest.mark.parametrize("own", [0, 5, 9])
def test_the_head_is_called_as_often_as_on_the_rank_that_scores_most(llama, monkeypatch, own):
    """Each call is one that ranks make together, where weights are shared out: also with nothing left to score."""
    tokens = list(range(3, 4 + own))
    row = rows_of([([tokens], [1])]) if own else empty_row(8)
    plain = preftree.sequence_logps(llama, row, statistics=True)
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", 4 * VOCABULARY)
    calls, gradients = [], []
    for most in (0, 9, 13):
        row.most_predicted = most
        llama.zero_grad()
        with hooked([llama.get_output_embeddings().register_forward_hook(lambda *_: calls.append(None))]):
            out = preftree.sequence_logps(llama, row, statistics=True)
            forward = len(calls)
            out.logps.sum().backward()
        # Four tokens in the first call, and two in each further one, which the backward pass makes again.
        further = max(-(-(max(own, most) - 4) // 2), 0)
        assert (forward, len(calls)) == (1 + further, 1 + 2 * further)
        calls.clear()
        gradients.append([each.grad.clone() for each in llama.parameters()])
        for name, value in plain.items():
            torch.testing.assert_close(out[name], value)
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0])


def test_token_outside_the_vocabulary_is_named(llama):
    row = rows_of([([[3, 4, VOCABULARY + 2]], [1])])
    with pytest.raises(
        ValueError, match=f"token id {VOCABULARY + 2} is outside the model's vocabulary of {VOCABULARY}"
    ):
        preftree.sequence_logps(llama, row)


def test_model_that_is_not_prepared_is_prepared():
    model = exact_model("llama")
    out = preftree.sequence_logps(model, rows_of([([[3, 4, 5]], [1])]))
    torch.testing.assert_close(out.logps[0], stock_logps(model, [3, 4, 5], 1), rtol=1e-5, atol=1e-5)


def test_sums_by_sequence():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    sums = sum_by_sequence(values, torch.tensor([2, 0, 1, 1]))
    assert sums.tolist() == [3.0, 0.0, 3.0, 4.0]
    (sums * torch.tensor([1.0, 5.0, 2.0, 3.0])).sum().backward()
    assert values.grad.tolist() == [1.0, 1.0, 2.0, 3.0]
    assert torch.equal(sum_by_sequence(values, torch.tensor([2, 0, 1, 1]), longest=2), sums)
    assert sum_by_sequence(values[:0], torch.tensor([0, 0])).tolist() == [0.0, 0.0]
    assert sum_by_sequence(values[:0], torch.tensor([], dtype=torch.long)).tolist() == []
