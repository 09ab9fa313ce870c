"""Whole runs against TRL: 20 steps, random pairs and real ones (`make test-convergence`)."""

import gzip
import json
import sys
from pathlib import Path

import pytest
from preference_data import dataset, text_pairs
from trl_runs import differences, train

pytestmark = pytest.mark.convergence

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
@pytest.mark.parametrize(("row_length", "rows"), [(None, 1), (120, 2), (52, 5)])
def test_twenty_steps(model_path, optimizer, row_length, rows):
    settings = {"max_steps": 20, "optim": optimizer, "learning_rate": 0.02 if optimizer == "sgd" else 1e-3}
    data = dataset(text_pairs(60))
    theirs = train("trl", model_path, data, **settings)
    ours = train("preftree", model_path, data, own={"row_length": row_length}, **settings)
    metrics, parameters = differences(theirs, ours)
    # AdamW divides by the gradient's size, which makes its rounding as large as the gradient where that is small.
    tolerance = 1e-5 if optimizer == "sgd" else 1e-4
    assert metrics <= tolerance
    assert parameters <= tolerance
    assert ours.computed["rows"] / 20 == pytest.approx(rows, rel=0.5)


@pytest.mark.skipif(
    not (SHARED / "hh_harmless_test.jsonl.gz").exists(), reason="the real preference data are not there"
)
@pytest.mark.parametrize("own", [{}, {"row_length": 640}], ids=["one-row", "several-rows"])
def test_real_pairs_on_smollm2(tmp_path, own):
    pytest.importorskip("gguf")
    sys.path.insert(0, str(ROOT / "examples"))
    from smollm2 import smollm2

    model = str(smollm2(ROOT / "build" / "smollm2"))
    with gzip.open(SHARED / "hh_harmless_test.jsonl.gz", "rt") as lines:
        pairs = [json.loads(line) for line in lines]
    pairs = [pair for pair in pairs if len(pair["chosen"]) < 700][:40]
    settings = {
        "max_steps": 20,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-4,
        "max_length": 256,
        "beta": 0.1,
    }
    theirs = train("trl", model, dataset(pairs), **settings)
    ours = train("preftree", model, dataset(pairs), own=own, **settings)
    metrics, parameters = differences(theirs, ours)
    assert metrics <= 1e-5
    assert parameters <= 1e-5
