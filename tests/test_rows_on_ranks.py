"""What ranks gather and exchange for a micro-batch of several rows."""

import contextlib
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate import DistributedType
from families import build
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trl.trainer import dpo_trainer

import preftree
from preftree.trainers.ranks import HostExchange, adds_in_place, to_be_continued, unchanged_since
from preftree.trainers.sharded_reference import sharded_by_layers


class Model(nn.Module):
    """An embedding, layers and a head that is not called, as of prepared models."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 7, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.norm(x) @ self.head.weight.T


def run_row(model, seed):
    ids = torch.randint(7, (4,), generator=torch.Generator().manual_seed(seed))
    model(ids).logsumexp(-1).sum().backward()


def counted(*names):
    """What FSDP2 calls, by its name in this PyTorch."""
    name = next(name for name in names if hasattr(distributed, name))
    return patch.object(distributed, name, wraps=getattr(distributed, name))


def micro_batch(model, synced, last_of_step=True):
    """Three rows, as `training_step` runs them; and how often ranks gathered weights and exchanged gradients."""
    state = SimpleNamespace(plugin_kwargs={"sync_each_batch": synced})
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP, gradient_state=state, sync_gradients=last_of_step
    )
    model.set_requires_gradient_sync(last_of_step or synced)  # as transformers' trainer has it
    with (
        counted("all_gather_single", "all_gather_into_tensor") as gathers,
        counted("reduce_scatter_single", "reduce_scatter_tensor") as exchanges,
    ):
        for number in range(3):
            with to_be_continued(accelerator, model) if number < 2 else contextlib.nullcontext():
                run_row(model, number)
    return [gathers.call_count, exchanges.call_count]


def on_a_rank(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for reshard in (True, False):
        for synced in (False, True):
            model = Model()
            for layer in model.layers:
                fully_shard(layer, reshard_after_forward=reshard)
            fully_shard([model.norm, model.head], reshard_after_forward=False)
            fully_shard(model)
            counts = micro_batch(model, synced)
            gradients = {name: each.grad.full_tensor() for name, each in model.named_parameters()}
            shared_out = all(isinstance(each, DTensor) for each in model.parameters())
            again = micro_batch(model, synced)
            found[reshard, synced] = {"counts": counts, "again": again, "gradients": gradients, "shared": shared_out}
            found[reshard, synced]["unfinished"] = micro_batch(model, synced, last_of_step=False)
    for changes in (False, True):
        found["reference", changes] = reference(rank, changes)
    found["numbers"] = numbers(rank)
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def reference(rank, changes):
    """One that the first rank alone has loaded, shared out as TRL's constructor has it; its parts, weights, and logits."""
    model = build("Llama", {})
    preftree.prepare_model(model, "dense")
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    ids = torch.arange(5)[None] + 3
    expected = model(ids).logits.detach()
    if rank:
        for each in model.parameters():
            each.data.zero_()
    plugin = SimpleNamespace(
        fsdp_version=2,
        cpu_ram_efficient_loading=True,
        reshard_after_forward=False,
        cpu_offload=OffloadPolicy(),
        mixed_precision_policy=None,
        ignored_modules=None,
    )
    accelerator = SimpleNamespace(device=torch.device("cpu"), state=SimpleNamespace(fsdp_plugin=plugin))
    stock = dpo_trainer.prepare_fsdp
    with sharded_by_layers(preftree.DPOTrainer, changes):
        model = dpo_trainer.prepare_fsdp(model, accelerator)
    with torch.no_grad():
        logits = model(ids).logits
    return {
        "parts": sum(isinstance(part, FSDPModule) for part in model.modules()),
        "layers": model.config.num_hidden_layers,
        "whole": not any(isinstance(each, DTensor) for each in model.parameters()),
        "logits": (logits, expected),
        "before": before,
        "after": {name: each.full_tensor() for name, each in model.state_dict().items()},
        "restored": dpo_trainer.prepare_fsdp is stock,
    }


def numbers(rank):
    """What ranks on GPUs, whose own collectives take no numbers of hosts, exchange; and how many groups are left of it."""
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cuda", rank), gather=None)
    hosts = HostExchange(accelerator, timeout=60)
    found = [hosts.gather([rank + 1, 2.5]), hosts.gather([2**53 - rank])]
    groups = hosts._groups
    before = len(groups)
    del hosts  # (as at the process's end, which a group's threads may spoil)
    return found, before, len(groups)


together = pytest.mark.xdist_group("rows on ranks")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_a_rank, (folder,), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    return second | {"numbers": [first["numbers"], second["numbers"]]}


@together
@pytest.mark.parametrize("synced", [False, True], ids=["added up", "exchanged"])
@pytest.mark.parametrize("reshard", [True, False], ids=["shared out", "whole"])
def test_what_stays_whole_is_gathered_once(found, reshard, synced):
    run = found[reshard, synced]
    # Three layers twice in each of three rows, or once; embedding and head once.
    gathered = 3 * 2 * 3 + 2 if reshard else 3 + 2
    assert run["counts"] == run["again"] == [gathered, 3 * 5 if synced else 5]
    assert run["unfinished"] == [gathered, 3 * 5 if synced else 0]
    assert run["shared"]
    plain = Model()
    for number in range(3):
        run_row(plain, number)
    for name, each in plain.named_parameters():
        torch.testing.assert_close(run["gradients"][name], each.grad)


@together
@pytest.mark.parametrize("changes", [False, True])
def test_a_reference_is_shared_out_by_layers(found, changes):
    """With the first rank's weights, and not left whole where they will change."""
    run = found["reference", changes]
    assert run["parts"] == run["layers"] + 1 > 3
    assert run["whole"] == (not changes)
    torch.testing.assert_close(*run["logits"])
    assert run["before"].keys() == run["after"].keys()
    assert all(torch.equal(run["before"][name], run["after"][name]) for name in run["before"])
    assert run["restored"]


@together
def test_hosts_of_gpus_exchange_numbers(found):
    for (first, second), before, left in found["numbers"]:
        assert first.tolist() == [[1, 2.5], [2, 2.5]]
        assert second.tolist() == [[2**53], [2**53 - 1]]
        assert (before, left) == (1, 0)


def test_hosts_without_an_interface_exchange_numbers_by_gpus(monkeypatch):
    monkeypatch.setattr(distributed, "new_group", lambda **_: (_ for _ in ()).throw(RuntimeError("no interface")))
    by_gpus = SimpleNamespace(num_processes=2, device=torch.device("cuda"), gather=lambda own: own.repeat(2, 1))
    monkeypatch.setattr(torch.Tensor, "to", lambda own, *_: own)
    hosts = HostExchange(by_gpus, timeout=60)
    assert [hosts.gather([3, 4]).tolist() for _ in range(2)] == [[[3, 4], [3, 4]]] * 2
    alone = HostExchange(SimpleNamespace(num_processes=1, device=torch.device("cpu")), timeout=60)
    assert alone.gather([3, 4]).tolist() == [[3, 4]]


class Sharded(FSDPModule, nn.Linear):
    """Tells what it is told to wait for."""

    def __init__(self):
        self.waits = []

    def __new__(cls, *_):
        return nn.Module.__new__(cls)

    def set_post_optim_event(self, event):
        self.waits.append(event)


def test_no_event_is_left_behind():
    """A later step's would be waited for in vain: weights have changed since."""
    model, reference = Sharded(), Sharded()
    with unchanged_since("event", model, None, nn.Linear(1, 1), reference):
        assert model.waits == reference.waits == ["event"]
    assert model.waits == reference.waits == ["event", None]
    with unchanged_since(None, model):
        pass
    assert len(model.waits) == 2


@pytest.mark.parametrize("last", [False, True])
def test_who_keeps_gradients(last):
    def adds(model, kind):
        return adds_in_place(SimpleNamespace(distributed_type=kind), model, last)

    averaged = DistributedDataParallel.__new__(DistributedDataParallel)
    assert adds(nn.Linear(1, 1), DistributedType.NO)
    assert adds(Sharded(), DistributedType.FSDP)
    assert adds(averaged, DistributedType.MULTI_GPU) == (not last)
    assert not adds(nn.Linear(1, 1), DistributedType.DEEPSPEED)
    assert not adds(nn.Linear(1, 1), DistributedType.MULTI_GPU)  # tensor parallelism
