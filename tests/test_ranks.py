"""Several processes (gloo; DDP, FSDP2, DeepSpeed): as TRL's, and as one, also where ranks need different numbers of rows.

All runs of engines that get along are made one after the other by the same processes, whose start takes longer than they do.
"""

import shutil
from collections import defaultdict

import pytest
from conftest import word_tokenizer
from families import saved_model
from preference_data import dataset, ranked_texts, text_pairs
from run_on_ranks import launch_once, run
from trl_runs import differences, end_of, train

# How many examples are evaluated, and when.
EVALUATED = {"evaluated": 24, "eval_strategy": "steps", "eval_steps": 2}
# name: (engine, settings), two ranks against TRL's two.
AGAINST_TRL = {
    "accumulation": ("ddp", {"gradient_accumulation_steps": 2, "max_steps": 1}),
    "two-passes": ("ddp", {"loss_type": ["aot", "sft"], "gradient_checkpointing": True} | EVALUATED),
    # (Some of the last batch's examples are evaluated twice, and counted once.)
    "orpo": ("ddp", {"method": "ORPO", "learning_rate": 0.01} | EVALUATED | {"evaluated": 23}),
    # (The last step's metrics are logged at the end.)
    "kto": ("ddp", {"method": "KTO", "learning_rate": 0.01, "logging_steps": 2}),
    "cpo": ("ddp", {"method": "CPO", "learning_rate": 0.01}),
    "kto-cached": ("ddp", {"method": "KTO", "precompute_ref_log_probs": True, "learning_rate": 0.01}),
    "reward": ("ddp", {"method": "Reward", "learning_rate": 1e-3, "max_steps": 2}),
    "fsdp2-accumulation": ("fsdp2", {"gradient_accumulation_steps": 2, "max_steps": 1}),
    "fsdp2-two-passes": ("fsdp2", {"loss_type": ["aot", "sft"], "gradient_checkpointing": True}),
    "fsdp2-kto-cached": ("fsdp2", {"method": "KTO", "precompute_ref_log_probs": True, "learning_rate": 0.01}),
    "zero2-two-passes": ("zero2", {"loss_type": ["aot", "sft"], "gradient_checkpointing": True}),
    "zero3-accumulation": ("zero3", {"gradient_accumulation_steps": 2, "max_steps": 1}),
    "zero3-two-passes": ("zero3", {"loss_type": ["aot", "sft"], "gradient_checkpointing": True}),
    "zero3-kto-cached": ("zero3", {"method": "KTO", "precompute_ref_log_probs": True, "learning_rate": 0.01}),
}
# family: settings of ours alone.
IMAGES = {"qwen2_5_vl": {"gradient_checkpointing": True}, "llava": {}}
# Gradients are exchanged with every row.
SYNCED = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
# FSDP2: layers' weights stay whole between forward and backward passes; one rank loads them for all; layers are recomputed.
WHOLE = {"FSDP_RESHARD_AFTER_FORWARD": "false"}
LEAN = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
RECOMPUTED = {"FSDP_ACTIVATION_CHECKPOINTING": "true"}
# Each rank saves what it has; an optimizer with a state, whose steps do not jump from a gradient's rounding.
SHARDS = {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
SMOOTH = {"optim": "adamw_torch", "adam_epsilon": 1e-3}
# The head is called in parts, in evaluation, too, and saving shares out again what that has left whole.
IN_CHUNKS = {"chunks": True, "save_strategy": "steps", "save_steps": 2} | EVALUATED | {"evaluated": 16}
RANKED = {"method": "ORPO", "train_sampling_strategy": "sequential", "max_steps": 2}
# The reference follows the policy.
FOLLOWED = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
# name: (engine, ranks, examples, settings), against one process.
AGAINST_ONE = {
    "ddp-2": ("ddp", 2, 23, {"fused": True}),
    "reward-2": ("ddp", 2, 23, {"method": "Reward"}),
    "simpo-4": ("ddp", 4, 17, {"method": "CPO", "loss_type": "simpo", "cpo_alpha": 0.0}),
    "tpo-2": ("ddp", 2, 23, {"method": "TPO", "tpo_alpha": 0.0}),
    # One example is left for the last step's four ranks.
    "ddp-4": ("ddp", 4, 17, {"gradient_accumulation_steps": 2}),
    "fsdp2-2": ("fsdp2", 2, 17, {"loss_type": ["ipo"], "accelerator_config": SYNCED} | IN_CHUNKS),
    "fsdp2-whole-2": ("fsdp2", 2, 23, {"gradient_accumulation_steps": 2, "fused": True, "environment": WHOLE}),
    "fsdp2-4": ("fsdp2", 4, 23, {"precompute_ref_log_probs": True, "gradient_checkpointing": True}),
    "fsdp2-lean-2": ("fsdp2", 2, 17, {"environment": LEAN}),
    "fsdp2-recomputed-2": ("fsdp2", 2, 23, {"model": "llama-tied", "environment": RECOMPUTED, "chunks": True}),
    "fsdp2-followed-2": ("fsdp2", 2, 23, {"environment": WHOLE} | FOLLOWED),
    "fsdp2-hybrid-4": ("fsdp2", 4, 23, {"model": "llama-tied", "replicas": 2}),
    "zero1-2": ("zero1", 2, 23, {"gradient_accumulation_steps": 2}),
    "zero2-2": ("zero2", 2, 23, {"gradient_accumulation_steps": 2}),
    "zero3-2": ("zero3", 2, 23, {"precompute_ref_log_probs": True, "chunks": True}),
    # (Its norms of queries and keys see a rank's own heads.)
    "tp-2": ("tp", 2, 23, {"model": "qwen3", "gradient_accumulation_steps": 2}),
    "tp-2-checkpointing": ("tp", 2, 23, {"model": "qwen3", "gradient_checkpointing": True}),
}


def of_epochs(**settings):
    return {"learning_rate": 0.003, "beta": 0.1, "max_steps": -1, "num_train_epochs": 2} | settings


def against_one(path, folder, ranks, examples, **settings):
    """Settings of a run on several ranks, or on one."""
    if family := settings.pop("model", None):
        path = folder / family
        if not path.exists():
            saved_model(family, path, word_tokenizer())
    # (Rows between the first and the last add to gradients that DDP leaves alone.)
    own = {"row_length": 64, "compile_layers": True} if settings.get("fused") else {"row_length": 96}
    settings |= {"model": str(path), "own": own}
    settings |= dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 8 // ranks)
    settings = of_epochs(examples=examples, **settings)
    if settings.get("method") == "Reward":
        del settings["beta"]
    return settings


def together_with(engine):
    """What the engines are called whose runs the same processes make: DeepSpeed wants processes that it has set up."""
    return "zero" if engine.startswith("zero") else {"tp": "ddp"}.get(engine, engine)


def runs(model, folder):
    """Settings of all runs, by engines and ranks, and by kind of trainer and name; one saves checkpoints in the folder."""
    found = defaultdict(dict)

    def add(kind, engine, ranks, name, settings):
        found[together_with(engine), ranks][f"{kind} {name}"] = {"kind": kind, "engine": engine} | settings

    saved = {"output_dir": str(folder / "saved"), "save_strategy": "steps", "save_steps": 2}
    saved = of_epochs(model=model, per_device_train_batch_size=4, own={"row_length": 96}) | saved | {"max_steps": 2}
    add("preftree", "ddp", 2, "saved", saved)
    shared_out = saved | SMOOTH | {"output_dir": str(folder / "shared out"), "environment": SHARDS}
    add("preftree", "fsdp2", 2, "saved", shared_out)
    resumed = shared_out | of_epochs(examples=23, per_device_train_batch_size=2, save_strategy="no", resume=True)
    add("preftree", "fsdp2", 4, "resumed", resumed)
    for name, (engine, settings) in AGAINST_TRL.items():
        settings = settings | {"model": model, "per_device_train_batch_size": 4}
        # TRL's own cache fails there: each rank looks for it in a folder of its own.
        stock = {key: value for key, value in settings.items() if key != "precompute_ref_log_probs"}
        add("trl", engine, 2, name, stock)
        add("preftree", engine, 2, name, settings | {"own": {"row_length": 64}})
    ranked = RANKED | {"model": model, "ranked": True, "per_device_train_batch_size": 4}
    add("preftree", "ddp", 2, "ranked", ranked)
    for family, own in IMAGES.items():
        settings = {"images": family, "per_device_train_batch_size": 2, "learning_rate": 0.01}
        settings |= {"train_sampling_strategy": "sequential"}
        add("trl", "ddp", 2, family, settings)
        add("preftree", "ddp", 2, family, settings | own | {"own": {"row_length": 64}})
    for name, (engine, ranks, examples, settings) in AGAINST_ONE.items():
        # (Ranks that split a model have the same data.)
        shares = 1 if engine == "tp" else ranks
        add("preftree", engine, ranks, name, against_one(model, folder, shares, examples, **settings))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def end(model_path, folder):
    """Where a run ended: ``end(kind, engine, ranks, name)``."""
    every, ends = runs(model_path, folder), {}

    def of(kind, engine, ranks, name):
        if engine.startswith("zero"):
            pytest.importorskip("deepspeed")
            if shutil.which("c++") is None:
                pytest.skip("DeepSpeed compiles what its ranks meet by")
        key = (together_with(engine), ranks)
        if key == ("fsdp2", 4):  # goes on from what two ranks have saved
            of("preftree", engine, 2, "saved")
        return launch_once(ends, key, ranks, every[key])[f"{kind} {name}"]

    return of


def together(runs):
    """Names of runs; those of the same processes go to one worker, where these are started once."""
    groups = {name: together_with(engine) for name, (engine, *_) in runs.items()}
    return [pytest.param(name, marks=pytest.mark.xdist_group(group)) for name, group in groups.items()]


@pytest.mark.parametrize("name", together(AGAINST_TRL))
def test_two_ranks(end, name):
    engine, settings = AGAINST_TRL[name]
    theirs, ours = end("trl", engine, 2, name), end("preftree", engine, 2, name)
    metrics, weights = differences(theirs, ours, ("logits/",) if settings.get("method") in ("ORPO", "CPO") else ())
    assert metrics <= 1e-5
    assert weights <= 1e-5
    # Collectives inside the model (FSDP) want as many forward passes on every rank.
    first, second = ours["rows"]
    assert first == second > 3


@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("family", IMAGES)
def test_images_on_two_ranks(end, family):
    """Some batches of a rank have no images, some of both ranks: the tower's gradients are exchanged all the same."""
    assert max(differences(end("trl", "ddp", 2, family), end("preftree", "ddp", 2, family))) <= 1e-5


@pytest.mark.xdist_group("ddp")
def test_metrics_of_ranks_that_have_different_numbers_of_pairs(end, model_path):
    """Prompts have two or three completions, which make one or three pairs; the first step's weights are those of all."""
    data = dataset(ranked_texts(23))
    one = end_of(train("preftree", model_path, data, per_device_train_batch_size=8, **RANKED))["history"][0]
    two = end("preftree", "ddp", 2, "ranked")["history"][0]
    names = [name for name in one if name.startswith(("rewards/", "logps/", "logits/"))]
    assert len(names) == 8
    assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-5)


@pytest.mark.parametrize("name", together(AGAINST_ONE))
def test_the_number_of_ranks_changes_nothing(end, model_path, folder, name):
    """Not even where the last step has too few examples: none is repeated, and each counts the same."""
    engine, ranks, examples, settings = AGAINST_ONE[name]
    of_ranks = {key: settings[key] for key in ("fused", "environment", "replicas", "chunks") if key in settings}
    settings = {key: value for key, value in settings.items() if key not in of_ranks}
    one = end_of(run("preftree", against_one(model_path, folder, 1, examples, **settings)))
    several = end("preftree", engine, ranks, name)
    assert (several["added"] > 0) == of_ranks.get("fused", False)
    assert several["recomputed"] == (of_ranks.get("environment") == RECOMPUTED)
    losses = [[log["loss"] for log in each["history"] if "loss" in log] for each in (one, several)]
    assert len(losses[0]) == len(losses[1]) >= 4
    assert max(abs(a - b) / max(abs(a), 1) for a, b in zip(*losses, strict=True)) <= 1e-6
    # (The first step's rewards are zeros but for rounding, and so the larger one is chance.)
    metrics, weights = differences(one, several, ("rewards/accuracies",))
    assert metrics <= 1e-5
    assert weights <= 1e-6


def assert_goes_on(whole, resumed):
    """A run that was resumed after two steps of six ends as the whole one."""
    steps = [[log["step"] for log in end["history"] if "loss" in log] for end in (whole, resumed)]
    assert steps[0] == steps[1] == [1, 2, 3, 4, 5, 6]
    # (Of all steps, and counted since it went on.)
    metrics, weights = differences(whole, resumed, ("rewards/accuracies", "num_tokens", "train_loss"))
    assert metrics <= 1e-5
    assert weights <= 1e-6


@pytest.mark.xdist_group("ddp")
def test_one_process_goes_on_from_two(end, model_path, folder):
    """In the middle of an epoch, with the same pairs a step."""
    end("preftree", "ddp", 2, "saved")
    settings = of_epochs(per_device_train_batch_size=8)
    data = dataset(text_pairs(23))
    resumed = train("preftree", model_path, data, output_dir=str(folder / "saved"), resume=True, **settings)
    assert resumed.computed["examples"] == 2 * 23 - 2 * 8
    assert_goes_on(end_of(train("preftree", model_path, data, **settings)), end_of(resumed))


@pytest.mark.xdist_group("fsdp2")
def test_four_ranks_go_on_from_the_shares_of_two(end, model_path):
    data, settings = dataset(text_pairs(23)), of_epochs(per_device_train_batch_size=8, **SMOOTH)
    whole = end_of(train("preftree", model_path, data, **settings))
    resumed = end("preftree", "fsdp2", 4, "resumed")
    assert_goes_on(whole, resumed)
    assert resumed["rows"][0] < end("preftree", "fsdp2", 4, "fsdp2-hybrid-4")["rows"][0]  # which has made all steps
