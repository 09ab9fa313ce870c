"""Every family of causal language models in transformers: exact, or refused and why."""

from __future__ import annotations

import copy
import json
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from preftree.logprobs import sequence_logps
from preftree.models.prepare import prepare_model, reason_of
from preftree.models.prepared import prepared_part
from preftree.models.twins import VOCABULARY, NotTiny, torch_code, twin
from preftree.packing import pack
from preftree.report import versions
from preftree.tree import TokenTree

# Relative errors of float32: of log-probabilities, and of each parameter's gradient to its largest entry.
TOLERANCE = 1e-5
# Gradients may differ by so many times what those of the stock model in a padded batch do, but not by more than the last.
_ROUNDING, _MOST_ROUNDING = 10.0, 2e-4
_PAGE = """\
# Model families

Written by `preftree families --out docs/families.md` (`make census`): {versions}; float32.

For each family that transformers has a causal language model for, a tiny random model (windows and chunks shorter than the
text, layers of each kind) computes log-probabilities and all gradients of nine sequences, three prompts with two to four
responses of which some begin alike, in one row of trees. It is compared with itself before it was prepared, on each sequence
alone. Largest relative differences: of sequences' log-probabilities; of gradients, to the parameter's largest entry.

- *exact*: within {tolerance:.0e}, or gradients within ten times what the stock model in a padded batch differs by ("rounding")
- *along paths*: so many of the parts that mix tokens run along each path of a row; their products with weights are shared, and
  all else
- *refused*: with this error; *fails*: with an error that is no refusal
- *not made*: the census has no tiny model of it; it is tried when a user prepares one

Models that take images are tried on text.

{summary}.

{table}"""
STATUSES = ("exact", "wrong", "refused", "fails", "not made")


@dataclass(frozen=True)
class Finding:
    """What came out of a family.

    Attributes:
        family: its `model_type`.
        model: the class's name.
        status: "exact"; "wrong", if log-probabilities or gradients differ; "refused", by an error that says why; "fails", by
            another error; "not made", if no tiny model can be made of it here.
        logps, gradients: largest relative differences to the stock model on each sequence alone, in float32.
        rounding: of gradients by the stock model itself, in one padded batch; None where they are within `TOLERANCE`.
        along_paths, mixing: parts that run along paths, of the parts that mix tokens (0 of 0 where all is attention).
        reason: of what is not exact.
    """

    family: str
    model: str
    status: str
    logps: float = 0.0
    gradients: float = 0.0
    rounding: float | None = None
    along_paths: int = 0
    mixing: int = 0
    reason: str = ""


def causal_families() -> dict[str, str]:
    """Each `model_type` that transformers has a causal language model for, with the class's name."""
    return dict(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))


def examine(family: str, model: str) -> Finding:
    """Compare a tiny random model of a family on a row of trees with itself, before it is prepared, on each sequence alone."""
    try:
        stock = twin(getattr(transformers, model), CONFIG_MAPPING[family])
    except NotTiny as error:
        return Finding(family, model, "not made", reason=str(error))
    rounding = None
    try:
        with torch_code():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                prepared = prepare_model(copy.deepcopy(stock))
            logps, gradients = differences(stock, prepared)
            exact = logps <= TOLERANCE and gradients <= TOLERANCE
            if not exact and logps <= TOLERANCE:
                rounding = _difference(_alone(stock).gradients, _padded(stock).gradients)
                exact = gradients <= min(_ROUNDING * rounding, _MOST_ROUNDING)
    except NotImplementedError as error:
        return Finding(family, model, "refused", reason=reason_of(error))
    except Exception as error:
        return Finding(family, model, "fails", reason=f"{type(error).__name__}: {' '.join(str(error).split())}")
    part = prepared_part(prepared)
    along = (len(part.along_paths), len(part.mixing)) if part is not None else (0, 0)
    return Finding(family, model, "exact" if exact else "wrong", logps, gradients, rounding, *along)


def differences(stock: torch.nn.Module, prepared: torch.nn.Module) -> tuple[float, float]:
    """Largest relative differences of a prepared model, on a row of trees, to the stock model on each sequence alone.

    Returns:
        Of log-probabilities, and of gradients.
    """
    alone, shared = _alone(stock), _shared(prepared)
    logps = float(((shared.logps - alone.logps).abs() / alone.logps.abs()).max())
    return logps, _difference(alone.gradients, shared.gradients)


def _sequences() -> list[tuple[list[list[int]], list[int]]]:
    """Three prompts with two to four responses, with (sequences, prompt lengths): longer than twins' windows, some alike."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    groups = []
    for prompt_length, lengths in ((17, (11, 6, 9)), (5, (4, 13)), (9, (3, 8, 1, 7))):
        prompt = draw(prompt_length)
        responses = [draw(length) for length in lengths]
        responses[1][:3] = responses[0][:3]
        groups.append(([prompt + response for response in responses], [prompt_length] * len(responses)))
    return groups


@dataclass(frozen=True)
class _Run:
    """Log-probabilities of all sequences, and gradients of their sum, weighted at random, by parameter."""

    logps: torch.Tensor
    gradients: dict[str, torch.Tensor]


def _backward(model: torch.nn.Module, logps: torch.Tensor) -> _Run:
    model.zero_grad()
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(1))
    (logps * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return _Run(logps.detach(), gradients)


def _scored(logits_TV: torch.Tensor, sequence: list[int], length: int) -> torch.Tensor:
    """Log-probability of what follows a sequence's prompt."""
    target = torch.tensor(sequence[length:])
    return logits_TV[length - 1 : len(sequence) - 1].log_softmax(-1).gather(1, target[:, None]).sum()


def _alone(stock: torch.nn.Module) -> _Run:
    """By the stock model, each sequence by itself."""
    logps = [
        _scored(stock(input_ids=torch.tensor([sequence]), use_cache=False).logits[0], sequence, length)
        for group in _sequences()
        for sequence, length in zip(*group, strict=True)
    ]
    return _backward(stock, torch.stack(logps))


def _padded(stock: torch.nn.Module) -> _Run:
    """By the stock model, all sequences in one batch."""
    sequences = [each for group in _sequences() for each in zip(*group, strict=True)]
    rows = [torch.tensor(sequence) for sequence, _ in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    logits = stock(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return _backward(stock, torch.stack([_scored(one, *each) for one, each in zip(logits, sequences, strict=True)]))


def _shared(prepared: torch.nn.Module) -> _Run:
    """By a prepared model, in one row of trees."""
    trees = [TokenTree.from_sequences(*group) for group in _sequences()]
    row = pack(trees, sum(map(len, trees)) + 7, pad_token_id=1)[0]
    return _backward(prepared, sequence_logps(prepared, row).logps[row.sequence_ids.argsort()])


def _difference(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> float:
    """Largest difference of any gradient, relative to its largest entry."""
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    worst = 0.0
    for name, gradient in theirs.items():
        # Keys' biases have a gradient of zero, that is, of rounding: hence the floor.
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        error = gradient - ours[name] if name in ours else gradient
        worst = max(worst, float(error.abs().max()) / scale)
    return worst


def exact_families(findings: Iterable[Finding]) -> str:
    """JSON for `selftest`: what the census has found exact, and of which release of transformers."""
    exact = [finding.family for finding in findings if finding.status == "exact"]
    return json.dumps({"transformers": transformers.__version__, "exact": exact}, indent=1) + "\n"


def summary(findings: Iterable[Finding]) -> str:
    """How many families are what."""
    findings = list(findings)
    counts = Counter(finding.status for finding in findings)
    made = len(findings) - counts["not made"]
    along = sum(finding.status == "exact" and finding.along_paths > 0 for finding in findings)
    others = ", ".join(f"{counts[status]} {status}" for status in STATUSES[1:] if counts[status])
    return f"{counts['exact']} of {made} exact ({along} with parts along paths); {others or 'no others'}"


def document(findings: Iterable[Finding]) -> str:
    """All findings as a page of Markdown."""
    findings = list(findings)
    head = ("family", "model", "found", "log-probs", "gradients", "rounding", "along paths", "")
    rows = [head, ("---",) * len(head)]
    for each in findings:
        errors = ("", "", "")
        if each.status in ("exact", "wrong"):
            rounding = "" if each.rounding is None else f"{each.rounding:.0e}"
            errors = (f"{each.logps:.0e}", f"{each.gradients:.0e}", rounding)
        along = f"{each.along_paths} of {each.mixing}" if each.along_paths else ""
        rows.append((each.family, each.model, each.status, *errors, along, each.reason.replace("|", "\\|")))
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return _PAGE.format(versions=versions(), summary=summary(findings), table=table, tolerance=TOLERANCE)
