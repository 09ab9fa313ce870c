"""`benchmarks/paper_table.py` from one end to the other: two processes on CPUs, a tiny shape."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from preftree.plan import ModelCost

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "paper_table.py"


def test_two_processes_on_cpus(tmp_path):
    """More is compared than one GPU's share of operations: ratios stand beside the paper's, and how it scales."""
    small = ["--model", "tiny", "--tokens", "2000", "--trl-pairs", "1", "--steps", "1", "--only", "TLDR", "HH-RLHF"]
    command = [sys.executable, str(SCRIPT), "--gpus", "1", "2", "--project", "4", "--cpu", "--engine", "ddp", *small]
    command += ["--out", str(tmp_path)]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "paper_table_tiny_ddp_1_2_cpu.csv").read_text().splitlines()
    rows = list(csv.DictReader(lines[1:]))
    sides, names = ("trl", "packed", "preftree"), ("TLDR", "HH-RLHF")
    measured = [(gpus, side, name) for gpus in "12" for side in sides for name in names]
    assert [(row["gpus"], row["side"], row["case"]) for row in rows] == [
        *measured,
        *(("4", side, name) for name in names for side in sides),
    ]
    for row in rows:
        assert float(row["pairs_per_s"]) > 0
        assert (float(row["of_one_gpu"]) > 0) if row["gpus"] != "1" else not row["of_one_gpu"]
        assert row["engine"] == {"1": "", "2": "ddp", "4": "projection"}[row["gpus"]]
        # About 990 and 440 tokens a pair, each sequence by itself.
        assert row["pairs"] == {"TLDR": "2", "HH-RLHF": "5"}[row["case"]]
        if row["side"] == "preftree":
            assert float(row["over_packed"]) > 0
            assert float(row["over_trl"]) > 0
            assert float(row["paper"]) == {"TLDR": 1.35, "HH-RLHF": 1.41}[row["case"]]
            assert 1.2 < float(row["operations"]) < 1.9
        # Of two ranks' pairs, one's weigh more.
        if row["engine"] != "projection":
            assert (float(row["at_random"]) > 0) == (row["gpus"] == "2")


def test_what_earlier_calls_measured(monkeypatch, tmp_path, capsys):
    """Ratios, scaling and projections of two calls' rows, with nothing left to measure; other settings' are refused."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import paper_table
    import tables

    head = "qwen3-1.7b, ddp, 8 pairs a GPU and step, 4 steps, rows of 16384; a version, NVIDIA H200"
    for gpus, rate in ((1, 10.0), (2, 18.0)):
        row = {"case": "TLDR", "gpus": gpus, "engine": "ddp" if gpus > 1 else "", "pairs": 8}
        rows = [
            row
            | {"side": side, "pairs_per_s": rate * times, "tokens_per_s_per_gpu": 100 * rate * times / gpus}
            | {"tflops_per_gpu": flops * gpus**-0.2}
            for side, times, flops in (("packed", 1.0, 500.0), ("preftree", 1.5, 400.0))
        ]
        tables.write(rows, tmp_path / f"{gpus}.csv", head)

    def run(*more):
        given = ["--model", "qwen3-1.7b", "--engine", "ddp", "--pairs", "8", "--only", "TLDR", "--gpus", "1", "2"]
        given += ["--sides", "packed", "preftree", "--project", "8", "--out", str(tmp_path / "all"), *more]
        monkeypatch.setattr("sys.argv", ["paper_table.py", *given])
        paper_table.main()

    files = [str(tmp_path / "1.csv"), str(tmp_path / "2.csv")]
    run("--read", *files)
    told, rows = tables.read(tmp_path / "all" / "paper_table_qwen3-1.7b_ddp_1_2_h200.csv")
    assert told == head
    assert [(row["gpus"], row["side"]) for row in rows] == [
        (n, side) for n in (1, 2, 8) for side in ("packed", "preftree")
    ]
    assert rows[3]["over_packed"] == 1.5
    assert "0.900 of the tokens" in capsys.readouterr().out
    assert rows[3]["of_one_gpu"] == pytest.approx(2**-0.2, rel=1e-5)  # by operations: steps of two are other steps
    assert rows[5]["engine"] == "projection"
    assert rows[5]["over_packed"] == pytest.approx(rows[5]["pairs_per_s"] / rows[4]["pairs_per_s"], rel=1e-5)
    assert rows[5]["operations"] == rows[1]["operations"] != rows[3]["operations"]
    # What is measured once more takes the earlier row's place, and a file that projects is not taken for measured.
    again = [row | {"pairs_per_s": 30.0} for row in rows[:2]]
    tables.write(again, tmp_path / "again.csv", head)
    run("--read", str(tmp_path / "all" / "paper_table_qwen3-1.7b_ddp_1_2_h200.csv"), str(tmp_path / "again.csv"))
    _, merged = tables.read(tmp_path / "all" / "paper_table_qwen3-1.7b_ddp_1_2_h200.csv")
    assert [row["pairs_per_s"] for row in merged[:4]] == [30.0, 30.0, 18.0, 27.0]
    assert len(merged) == 6
    with pytest.raises(SystemExit, match="measured in another way"):
        run("--read", *files, "--steps", "5")
    tables.write(rows[:1], tmp_path / "other.csv", head.replace("a version", "another version"))
    with pytest.raises(SystemExit, match="on another machine"):
        run("--read", str(tmp_path / "other.csv"), *files)


def test_told_to_end(monkeypatch, tmp_path, capfd):
    """What a side had measured is written, its process ended, and no other side begun."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import paper_table
    import tables

    row = {"case": "TLDR", "side": "packed", "gpus": 1, "engine": "", "pairs": 8, "pairs_per_s": 2.0}
    row |= {"tokens_per_s_per_gpu": 10.0, "tflops_per_gpu": 1.0}
    # In place of Python: writes one distribution's row, tells that it has, and goes on.
    worker = tmp_path / "worker"
    worker.write_text(f"#!/bin/bash\necho '{json.dumps(row)}' > ${{@: -1}}\ntouch {tmp_path}/begun\nexec sleep 30\n")
    worker.chmod(0o755)
    monkeypatch.setattr(paper_table.sys, "executable", str(worker))
    given = ["--cpu", "--model", "tiny", "--pairs", "8", "--gpus", "1", "--sides", "packed", "preftree"]
    monkeypatch.setattr("sys.argv", ["paper_table.py", *given, "--only", "TLDR", "Capybara", "--out", str(tmp_path)])

    def end():
        while not (tmp_path / "begun").exists():
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=end)
    thread.start()
    try:
        paper_table.main()
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
    told = capfd.readouterr().err
    assert "Capybara, packed, 1 GPUs: interrupted" in told
    assert "preftree" not in told
    _, rows = tables.read(tmp_path / "paper_table_tiny_fsdp2_1_cpu.csv")
    assert rows == [{key: value for key, value in row.items() if value != ""}]


def test_kernels_of_a_step(monkeypatch):
    """Two steps' kernels by their names; what computes and what exchanges, each moment counted once."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from paper_table import busy_seconds
    from step import by_kernel

    spans = [("gemm", 0, 4), ("ncclGather", 2, 7), ("gemm", 8, 12), ("Memcpy DtoD", 11, 15), ("norm", 20, 21)]
    events = [
        SimpleNamespace(name=name, time_range=SimpleNamespace(start=start * 1e6, end=end * 1e6))
        for name, start, end in spans
    ]
    assert by_kernel(events, 2)[:2] == [
        {"kernel": "gemm", "ms": 4000.0, "calls": 1.0},
        {"kernel": "ncclGather", "ms": 2500.0, "calls": 0.5},
    ]
    assert busy_seconds(events, 1) == (9.0, 7 + 7 + 1)
    # Several ranks begin together behind the first exchange.
    assert busy_seconds(events, 2) == (5.0, 7 + 1)


def test_projection(monkeypatch, capsys):
    """By hand: two GPUs lose a tenth, nothing of it by imbalance; each of 8 receives 7/8 in place of 1/2."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from paper_table import compare
    from projection import efficiency, project
    from step import Case

    assert efficiency(0.9, 0.0, 0.0, 8) == pytest.approx(1 / (1 + 0.1 / 0.9 * 1.75))
    assert efficiency(0.9, 0.1, 0.3, 4) == pytest.approx(0.7)  # two lose by imbalance alone
    assert efficiency(1.02, 0.0, 0.0, 4) == 1.0  # what is faster by chance stays one GPU's

    def case_of(name, gpus):
        # TRL's ranks take pairs as they come, of 8 (32 a step) one has four long ones; by cost all have one.
        long, short = (100, 150, 150), (20, 10, 10)
        rest = (gpus - 1) * 4
        return Case(name, (((*[long] * 4, *[short] * rest) if gpus > 2 else (short,) * 8,)))

    def row(side, gpus, rate, of_one=None):
        found = {"case": "a", "side": side, "gpus": gpus, "engine": "", "pairs": 4, "pairs_per_s": rate * gpus}
        return found | {"tokens_per_s_per_gpu": 100 * rate, "tflops_per_gpu": 7 * rate, "of_one_gpu": of_one}

    sides = (("trl", 2.0), ("preftree", 6.0))
    rows = [each for side, rate in sides for each in (row(side, 1, rate), row(side, 2, 0.9 * rate, 0.9))]
    cost = ModelCost(per_token=1.0, per_scored=0.0, per_pair=0.0)
    theirs, ours = project([*rows, row("packed", 1, 3.0)], ["a"], case_of, 4, cost)  # packed: not on two
    # TRL, by tokens, each sequence by itself: its first rank has 4 * 500, the others 4 * 60.
    waits = 1 - (2000 + 3 * 240) / 4 / 2000
    share = (1 - waits) / (1 + 0.1 / 0.9 * 1.5)
    assert (theirs["side"], theirs["engine"]) == ("trl", "projection")
    assert theirs["pairs_per_s"] == pytest.approx(share * 4 * 2.0)
    # By cost each rank has a long pair (400) and three short ones (40).
    assert ours["pairs_per_s"] == pytest.approx(4 * 6.0 / (1 + 0.1 / 0.9 * 1.5))
    assert ours["imbalance"] == 0.0
    assert ours["tflops_per_gpu"] == pytest.approx(7 * 6.0 / (1 + 0.1 / 0.9 * 1.5))
    compare([theirs, ours], case_of, cost)
    assert ours["over_trl"] == pytest.approx(ours["pairs_per_s"] / theirs["pairs_per_s"])
    assert "over_packed" not in ours
    told = capsys.readouterr().out
    assert "a GPU of 4 would do" in told
    assert f"4 GPUs: preftree / trl {ours['over_trl']:.2f}x, a projection" in told
