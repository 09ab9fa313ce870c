"""`benchmarks/paper_table.py` from one end to the other: two processes on CPUs, a tiny shape."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "paper_table.py"


def test_two_processes_on_cpus(tmp_path):
    """More is compared than one GPU's share of operations: ratios stand beside the paper's, and how it scales."""
    small = ["--model", "tiny", "--pairs", "2", "--trl-pairs", "1", "--steps", "1", "--only", "TLDR"]
    command = [
        sys.executable,
        str(SCRIPT),
        "--gpus",
        "1",
        "2",
        "--cpu",
        "--engine",
        "ddp",
        *small,
        "--out",
        str(tmp_path),
    ]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "paper_table_tiny_ddp_1_2_cpu.csv").read_text().splitlines()
    rows = list(csv.DictReader(lines[1:]))
    assert [(row["side"], row["gpus"]) for row in rows] == [
        (side, n) for n in "12" for side in ("trl", "packed", "preftree")
    ]
    for row in rows:
        assert float(row["pairs_per_s"]) > 0
        assert (float(row["of_one_gpu"]) > 0) if row["gpus"] == "2" else not row["of_one_gpu"]
        if row["side"] == "preftree":
            assert float(row["over_packed"]) > 0
            assert float(row["over_trl"]) > 0
            assert float(row["paper"]) == 1.35
            assert 1.6 < float(row["operations"]) < 1.9
    # Of two ranks' pairs, one's weigh more.
    assert float(rows[-1]["at_random"]) > 0 == float(rows[0]["at_random"])
