"""The census of model families, on a sample: what it finds exact, refused, wrong; the command line and its page."""

from dataclasses import replace

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from preftree import families
from preftree.attention import mask
from preftree.cli import main
from preftree.families import census
from preftree.models import mixers, twins
from preftree.models.path_batches import PathBatches

KNOWN = families.causal_families()
# Of each mechanism one; along paths, so many parts of how many.
EXACT = {
    "llama": (0, 0),
    "gemma2": (0, 0),
    "gpt_oss": (0, 0),
    "deepseek_v3": (0, 0),
    "bart": (0, 0),
    "gemma3": (0, 0),
    "mpt": (4, 4),
    "jamba": (2, 4),
    "qwen3_next": (3, 4),
    "glm_moe_dsa": (4, 4),
    "nemotron_h": (1, 2),
}


@pytest.mark.parametrize("family", EXACT)
def test_exact_families(family):
    found = families.examine(family, KNOWN[family])
    assert found.status == "exact", found
    assert (found.along_paths, found.mixing) == EXACT[family]
    # (These are the same to the last bit on some processors; that they are compared, the test of what is wrong shows.)
    assert 0 < found.logps <= 1e-5 or (family in ("llama", "gemma2") and found.logps == 0)
    assert 0 < found.gradients <= (1e-5 if found.rounding is None else 10 * found.rounding)


@pytest.mark.parametrize(("family", "reason"), [("xlstm", "attention_mask"), ("cpmant", "not causal")])
def test_refused_families(family, reason):
    found = families.examine(family, KNOWN[family])
    assert (found.status, found.logps) == ("refused", 0.0)
    assert reason in found.reason


def test_families_that_no_tiny_model_is_made_of():
    found = families.examine("musicgen", KNOWN["musicgen"])
    assert found.status == "not made"
    assert "text_encoder" in found.reason


def test_what_is_wrong_is_found_wrong(monkeypatch, capsys):
    """A mask that lets a response see its sibling, where no verification looks; the exit status says so."""
    monkeypatch.setattr("preftree.models.prepare.verify_on_tree", lambda prepared: None)
    monkeypatch.setattr(
        mask, "visible_nodes", lambda row, rule=mask.CAUSAL: torch.ones(len(row), len(row)).tril().bool()
    )
    monkeypatch.setattr("preftree.attention.dense.visible_nodes", mask.visible_nodes)
    monkeypatch.setattr("preftree.attention.choose_backend", lambda *args: "dense")
    found = families.examine("llama", KNOWN["llama"])
    assert found.status == "wrong"
    assert found.logps > 1e-3
    assert main(["families", "llama"]) == 1
    assert "0 of 1 exact (0 with parts along paths); 1 wrong" in capsys.readouterr().out


def test_gradients_alone_can_be_wrong(monkeypatch):
    """Paths that pass no gradient on: right values."""
    along = mixers._tensor_along
    monkeypatch.setattr(mixers, "_tensor_along", lambda given, *others: along(given.detach(), *others))
    found = families.examine("mamba", KNOWN["mamba"])
    assert found.status == "wrong"
    assert found.logps <= 1e-5 < found.gradients


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "llama4_text", "gpt_neo", "mixtral"])
def test_twins_are_as_special_as_their_family(family):
    """Windows and chunks that texts of the census reach across, experts to choose among, and no dropout."""
    longest = max(len(sequence) for sequences, _ in census._sequences() for sequence in sequences)
    model = twins.twin(getattr(transformers, KNOWN[family]), CONFIG_MAPPING[family])
    config = model.config
    for name in ("sliding_window", "attention_chunk_size", "window_size"):
        assert (getattr(config, name, None) or 1) < longest // 2
    assert sum(p.numel() for p in model.parameters()) < 1e6
    assert getattr(config, "num_local_experts", 4) == 4
    assert len(set(getattr(config, "layer_types", None) or [1])) >= (
        2 if family in ("gemma3_text", "llama4_text") else 1
    )
    other = twins.twin(getattr(transformers, KNOWN[family]), CONFIG_MAPPING[family], seed=1)
    same = twins.twin(getattr(transformers, KNOWN[family]), CONFIG_MAPPING[family])
    weights = [next(each.parameters()) for each in (model, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_command_line(tmp_path, capsys):
    page = tmp_path / "families.md"
    assert main(["families", "lfm2", "xlstm", "musicgen", "--out", str(page)]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 exact (1 with parts along paths); 1 refused, 1 not made" in out
    assert "2 of 4 parts along paths" in out
    written = page.read_text()
    assert "| lfm2 | Lfm2ForCausalLM | exact | " in written
    assert "1 of 2 exact" in written
    assert f"transformers {transformers.__version__}" in written
    assert main(["families", "lama"]) == 2
    assert "no causal language model of family lama" in capsys.readouterr().err


def test_paths_that_are_wrong_are_refused(monkeypatch):
    """State that leaks from one response to the next."""
    of = PathBatches._of.__func__

    def leaking(cls, row, shortest):
        paths = of(cls, row, shortest)
        return replace(paths, batches=tuple(replace(batch, local=batch.local.roll(1, 1)) for batch in paths.batches))

    monkeypatch.setattr(PathBatches, "_of", classmethod(leaking))
    found = families.examine("mamba", KNOWN["mamba"])
    assert found.status == "refused"
    assert "linear_attention" in found.reason
