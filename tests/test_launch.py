"""What `examples/launch` starts: processes of one node and of several (Slurm's commands played), and accelerate's settings."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from preference_data import chat_pairs
from run_on_ranks import FSDP2
from safetensors.torch import load_file
from transformers import TrainerControl
from trl_runs import COMMON

from preftree import cli

LAUNCH = Path(__file__).parent.parent / "examples" / "launch"
BIN = Path(sys.executable).parent

# (The other nodes' tasks are started by the same command.)
SRUN = """#!/usr/bin/env bash
for node in $(seq "$SLURM_NNODES"); do "$@" & done
for job in $(jobs -p); do wait "$job" || exit 1; done
"""
SCONTROL = """#!/usr/bin/env bash
# (Whoever reads the first line alone is gone before the second.)
[ "$*" = "show hostnames here" ] && echo localhost && sleep 0.3 && echo elsewhere
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, model_path):
    folder = tmp_path_factory.mktemp("launch")
    rows = "".join(json.dumps(row) + "\n" for row in chat_pairs(14, seed=3))
    (folder / "train.jsonl").write_text(rows)
    settings = COMMON | {"model_name_or_path": model_path, "dataset_name": str(folder), "row_length": 128}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings | {"learning_rate": 0.003, "beta": 0.1, "max_steps": 4}))
    return path


@pytest.fixture(scope="module")
def alone(recipe):
    """Weights of one process that takes what two would."""
    out = recipe.parent / "alone"
    cli.run("dpo", ["--config", str(recipe), "--per_device_train_batch_size", "6", "--output_dir", str(out)])
    return load_file(out / "model.safetensors")


def free_port():
    with socket.socket() as meeting:
        meeting.bind(("localhost", 0))
        return meeting.getsockname()[1]


@pytest.mark.parametrize("script", ["node.sh", "slurm.sh"])
def test_two_processes_train_as_one(script, recipe, alone, tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{commands}:{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {"PROCESSES": "2"}
    if script == "slurm.sh":
        environment |= {"PROCESSES": "1", "PORT": str(free_port())}
        environment |= {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": str(os.getpid())}
    out = tmp_path / "out"
    training = ["dpo", "--config", str(recipe), "--per_device_train_batch_size", "3", "--output_dir", str(out)]
    done = subprocess.run(
        [LAUNCH / script, *training], env=environment, timeout=300, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    together = load_file(out / "model.safetensors")
    assert together.keys() == alone.keys()
    assert max(float((together[name] - alone[name]).abs().max()) for name in alone) <= 1e-6
    assert done.stdout.count("model and tokenizer saved") == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fsdp2", FSDP2 | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "ACCELERATE_MIXED_PRECISION": "bf16"}),
        ("zero3", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}),
    ],
)
def test_what_accelerate_makes_of_a_file(name, expected, tmp_path):
    script = tmp_path / "show.py"
    script.write_text(
        "import json, os\nif os.environ['RANK'] == '0':\n    print('SHOWN', json.dumps(dict(os.environ)))\n"
    )
    command = [BIN / "accelerate", "launch", "--config_file", LAUNCH / f"{name}.yaml", "--num_processes", "2", script]
    done = subprocess.run(command, timeout=200, capture_output=True, text=True, check=True)
    shown = json.loads(done.stdout.partition("SHOWN ")[2].splitlines()[0])
    assert {key: shown.get(key) for key in expected} == expected
    assert shown["WORLD_SIZE"] == "2"


def test_ranks_stop_after_the_same_step():
    """A signal reaches them in different ones: that one has been asked, all hear at its step's end."""
    interrupt, control, others = cli.Interrupt(), TrainerControl(), [False]
    interrupt.exchange = SimpleNamespace(gather=lambda own: torch.tensor([own, others]))
    interrupt.on_step_end(None, None, control)
    assert not control.should_save
    others = [True]
    interrupt.on_step_end(None, None, control)
    assert control.should_save
    assert control.should_training_stop
    assert interrupt.asked


LEAVES = """
import sys, time
from pathlib import Path
from preftree import cli

write = cli.report.write_report

def write_late(folder, *rest):
    time.sleep(2)
    return write(folder, *rest)

cli.report.write_report = write_late
code = cli.main(sys.argv[1:])
# In one piece, or two processes' lines get into each other.
print(f"LEFT {code} {(Path(sys.argv[-1]) / 'report.md').is_file()}\\n", end="", flush=True)
"""


def test_processes_leave_when_all_is_written(recipe, tmp_path):
    """One that aborts at its end (gloo's threads do that now and then) would have the launcher end the one that writes."""
    (tmp_path / "leaves.py").write_text(LEAVES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "leaves.py"), "dpo", "--config", str(recipe), "--per_device_train_batch_size", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "out")],
        env=environment,
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.count("LEFT 0 True") == 2, done.stdout[-500:] + done.stderr[-2000:]


ENDS = """
import atexit, os, sys, threading, time
from preftree import __main__, cli

class Late:
    def __del__(self, abort=os.abort):
        abort()

def command(name, arguments):
    atexit.register(print, "then exit functions")
    threading.Thread(target=lambda: (time.sleep(0.2), print("threads first"))).start()
    return int(arguments[0])

late = Late()
cli.COMMANDS["plan"] = command
__main__.start()
"""


@pytest.mark.parametrize(("ranks", "expected"), [(1, -signal.SIGABRT), (2, 3)])
def test_a_process_of_several_ends_before_its_interpreter(ranks, expected, tmp_path):
    """What gloo's threads do while the interpreter is taken apart, an object of the script's does here each time."""
    (tmp_path / "ends.py").write_text(ENDS)
    command = [sys.executable, str(tmp_path / "ends.py"), "plan", "3"]
    environment = os.environ | {"WORLD_SIZE": str(ranks)}
    done = subprocess.run(command, env=environment, timeout=100, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["threads first", "then exit functions"]
    assert done.returncode == expected
