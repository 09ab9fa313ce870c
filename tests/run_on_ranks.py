"""Training runs on each of several ranks: `run_on_ranks.py RUNS OUT RANKS`, or by `torchrun` without RANKS; rank 0 saves
their ends.

On CPUs the ranks are forks of one process, which has imported everything once: that takes longer than some of their runs.
RUNS is JSON, ``{name: settings}``. Beside what `trl_runs.train` takes, settings hold the run's "kind" of trainer, its
"engine" ("ddp", "fsdp2", "zero1" to "zero3", "tp" or, without a launcher, "none") and perhaps variables of the environment.
Runs are on CPUs, unless settings say otherwise: accelerate, which takes FSDP on accelerators, is told that it may shard
there.
"""

import contextlib
import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
from unittest.mock import patch

import conftest  # noqa: F401 (sets up the environment)
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, DistributedType, PartialState
from datasets import Dataset
from preference_data import dataset, examples, ranked_texts, text_pairs
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.modeling_layers import GradientCheckpointingLayer
from trl_runs import end_of, train
from vision_families import build, pair, pairs

from preftree import logprobs
from preftree.models import compiled, products

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}

INSIDE = "_checkpoint_wrapped_module."  # of names of weights, where FSDP checkpoints a layer


def zero(stage):
    """DeepSpeed's settings. (Without its threshold, ZeRO-3 would leave so small weights whole.)"""
    sizes = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    stages = {"stage": stage, "stage3_param_persistence_threshold": 0}
    own = {"zero_optimization": stages, "zero_allow_untested_optimizer": True}
    return own | dict.fromkeys(sizes, "auto")


def whole(weight):
    """A weight put together by all ranks, if it is shared out."""
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(weight):
            return weight.detach().clone()
    return getattr(weight, "full_tensor", lambda: weight)().detach().cpu().clone()


def sharding_on_cpus():
    """While inside, accelerate shards there."""
    init = AcceleratorState.__init__

    def sharding(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    return patch.object(AcceleratorState, "__init__", sharding)


def launch(ranks, runs):
    """Make the runs, and what they left behind, by name; with None for ranks in one process that sees one GPU."""
    start, more, environment = [sys.executable], [], dict(os.environ)
    if ranks is None:
        environment["CUDA_VISIBLE_DEVICES"] = "0"
    elif not all(settings.get("use_cpu", True) for settings in runs.values()):
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    else:
        more = [str(ranks)]
        environment |= {"OMP_NUM_THREADS": "1"} | ({"DS_ACCELERATOR": "cpu"} if _deepspeed(runs) else {})
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "ends.pt")
        subprocess.run([*start, __file__, json.dumps(runs), out, *more], check=True, timeout=600, env=environment)
        return torch.load(out)


def launch_once(ends, key, *arguments):
    """What `launch` gives, which ``ends`` keeps by key; a launch that failed fails again without being tried."""
    if key not in ends:
        ends[key] = None
        ends[key] = launch(*arguments)
    if ends[key] is None:
        raise RuntimeError(f"the launch of {key} failed, see the first test that wanted it")
    return ends[key]


def _deepspeed(runs):
    return any(settings["engine"].startswith("zero") for settings in runs.values())


def run(kind, settings):
    """A trainer at its end."""
    if family := settings.pop("images", None):
        # Two batches of the first step, one without images; two without any; two more with some.
        data = [pair(90 + index, [], "the dog ?", "a cat", "a dog .") for index in range(6)] + pairs(6)
        order = [0, 1, 6, 7, 2, 3, 4, 5, 8, 2, 9, 10]
        processor, model = build(family)
        settings["trainer_args"] = {"processing_class": processor, "ref_model": copy.deepcopy(model)}
        return train(kind, lambda: model, Dataset.from_list([data[index] for index in order]), **settings)
    count = settings.pop("examples", 23)
    method = settings.get("method", "DPO")
    data = ranked_texts(count) if settings.pop("ranked", False) else examples(method, text_pairs(count))
    if replicas := settings.pop("replicas", None):  # of what ranks share out
        shares = int(os.environ["WORLD_SIZE"]) // replicas
        settings["parallelism_config"] = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shares)
    if evaluated := settings.pop("evaluated", None):
        settings["trainer_args"] = {"eval_dataset": dataset(examples(method, text_pairs(evaluated)))}
    with fused_products() if settings.pop("fused", False) else contextlib.nullcontext():
        return train(kind, settings.pop("model"), dataset(data), **settings)


class Counting:
    """A function, and how often it gave something."""

    def __init__(self, function):
        self.function, self.given = function, 0

    def __call__(self, *arguments):
        result = self.function(*arguments)
        self.given += result is not None
        return result


@contextlib.contextmanager
def logits_in_chunks():
    """While inside, the head is called for a few tokens at a time."""
    with patch.object(logprobs, "LOGITS_PER_CHUNK", 400), patch.object(logprobs, "_SHARE_OF_A_GPU", 1e-8):
        yield


@contextlib.contextmanager
def fused_products():
    """While inside, compiled layers fuse their products on CPUs, too, by formulas."""
    torch._dynamo.reset()
    with patch.object(products, "serves", lambda *operands: True), patch.object(compiled, "_BACKEND", "aot_eager"):
        yield
    torch._dynamo.reset()


@contextlib.contextmanager
def of_engine(engine, settings):
    """While inside, accelerate takes runs to an engine; gives settings with what that wants of them.

    The environment is what it was afterwards, also where transformers has written into it.
    """
    given = FSDP2 if engine == "fsdp2" else {}
    with contextlib.ExitStack() as inside:
        inside.enter_context(patch.dict(os.environ, given | settings.pop("environment", {})))
        if engine == "fsdp2" and settings.get("use_cpu", True):
            inside.enter_context(sharding_on_cpus())
        if engine.startswith("zero"):
            settings = settings | {"deepspeed": zero(int(engine[-1]))}
        if engine == "tp":
            split = {"tp_plan": "auto"}
            settings = settings | {"parallelism_config": ParallelismConfig(tp_size=2), "model_init_kwargs": split}
        yield settings
    if engine.startswith("zero"):
        unset_hf_deepspeed_config()


def end_on_ranks(kind, engine, settings):
    """What a run leaves behind on all ranks."""
    chunks = logits_in_chunks() if settings.pop("chunks", False) else contextlib.nullcontext()
    with chunks, patch.object(products, "so_far", Counting(products.so_far)) as so_far:
        trainer = run(kind, settings)
    assert isinstance(trainer.model_wrapped, FSDPModule) == (engine == "fsdp2")
    rows = torch.tensor([trainer.computed["rows"] if kind == "preftree" else 0], device=trainer.args.device)
    end = end_of(trainer) | {"rows": trainer.accelerator.gather(rows).tolist(), "added": so_far.given}
    layers = (part for part in trainer.model.modules() if isinstance(part, GradientCheckpointingLayer))
    end["compiled"] = all(hasattr(layer, "runs_rows_compiled") for layer in layers)
    weights = dict(trainer.model.named_parameters())
    end["recomputed"] = any(INSIDE in key for key in weights)
    end["weights"] = {key.replace(INSIDE, ""): whole(weight) for key, weight in weights.items()}
    return end


def make(runs, out):
    """One rank's part of all runs; ends the process."""
    if _deepspeed(runs):
        import deepspeed

        # (accelerate leaves that out on CPUs.)
        deepspeed.init_distributed("gloo")
    if not torch.cuda.is_available():  # accelerate knows them on accelerators alone, too
        ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    ends = {}
    for name, given in runs.items():
        kind, engine = given.pop("kind"), given.pop("engine")
        print(f"{kind} {engine}: {name}", flush=True)
        with of_engine(engine, given) as settings:
            ends[name] = end_on_ranks(kind, engine, settings)
            gc.collect()  # (what asks for DeepSpeed's settings finds those that anything still holds)
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(ends, out)
    # Leaving by the interpreter's own way, gloo's threads abort a rank now and then.
    PartialState().wait_for_everyone()
    sys.stderr.flush()
    os._exit(0)


def make_as_rank(rank, ranks, port, runs, out):
    of_all = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    # Ranks meet by the store that is there, as by torchrun's.
    of_all |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    own = {"RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in (of_all | own).items()}
    make(runs, out)


if __name__ == "__main__":
    runs, (out, *ranks) = json.loads(sys.argv[1]), sys.argv[2:]
    if not ranks:
        make(runs, out)
    (count,) = map(int, ranks)
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.start_processes(make_as_rank, (count, store.port, runs, out), count, start_method="fork")
