"""The command line: `preftree dpo` trains as `trl dpo` does, and so on; `preftree plan` says what sharing would save."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import IterableDataset, load_dataset
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from preftree import data, families, plan, recipe, report
from preftree.callbacks import Interrupt, Progress
from preftree.packing import pack
from preftree.plot import draw_lengths, lengths_as_text
from preftree.trainers.columns import IMAGE_COLUMNS, columns_of
from preftree.trainers.config import CPOConfig, DPOConfig, KTOConfig, ORPOConfig, RewardConfig, TPOConfig
from preftree.trainers.cpo import CPOTrainer
from preftree.trainers.dpo import DPOTrainer
from preftree.trainers.kto import KTOTrainer
from preftree.trainers.orpo import ORPOTrainer
from preftree.trainers.reward import RewardTrainer
from preftree.trainers.tpo import TPOTrainer
from preftree.tree import TokenTree
from preftree.version import __version__

logger = logging.getLogger(__name__)

EPILOG = """\
commands:
  dpo, orpo, cpo, simpo, tpo, kto, reward
         train by that method; takes what TRL's trainer takes, by the same names (`simpo` is `cpo` with --loss_type simpo
         --cpo_alpha 0)
  plan   read a recipe for dpo and say what sharing prefixes saves on its data; loads no weights
  families
         try each model family of the installed transformers, or those named, on a tiny random model of it: exact, or refused
         and why; --out FILE.md writes the table, exit status 1 says that one is wrong

All but families take --config recipe.yaml, and every field also as a flag. `preftree dpo --help` lists them.
"""


@dataclass(frozen=True)
class Method:
    """A training method of the command line; ``defaults`` differ from the config's own."""

    trainer: type[Any]
    config: type[Any]
    defaults: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "dpo": Method(DPOTrainer, DPOConfig),
    "orpo": Method(ORPOTrainer, ORPOConfig),
    "cpo": Method(CPOTrainer, CPOConfig),
    "simpo": Method(CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "tpo": Method(TPOTrainer, TPOConfig),
    "kto": Method(KTOTrainer, KTOConfig),
    "reward": Method(RewardTrainer, RewardConfig),
}


@dataclass
class ScriptArguments(trl.ScriptArguments):
    """TRL's script arguments; `dataset_name` may also be a local file or folder."""

    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Held-out data: a local file, or a data set's name (its `dataset_test_split`)."},
    )


@dataclass
class TemplateArguments(ScriptArguments):
    """For methods whose config has no chat template of its own."""

    chat_template_path: str | None = field(
        default=None, metadata={"help": "A Jinja chat template for a tokenizer that has none (or another one)."}
    )


@dataclass
class PlanArguments(TemplateArguments):
    """What `preftree plan` takes beyond."""

    draw: str | None = field(
        default=None,
        metadata={"help": "Where to write a picture of lengths and a packed row (PNG)."},
    )


def _parse(command: str, script: type[Any], method: Method, argv: Sequence[str]) -> Any:
    kinds: Any = (script, method.config, trl.ModelConfig, trl.DatasetMixtureConfig)
    options, flags = recipe.read(argv)
    recipe.check(options, kinds)
    environment = options.pop("env", {})
    if not isinstance(environment, dict):
        raise ValueError(f"option 'env' must be a mapping, not {environment!r}")
    os.environ.update({str(name): str(value) for name, value in environment.items()})

    def parse(options: dict[str, Any], flags: list[str]) -> Any:
        parser = trl.TrlParser(kinds, prog=f"preftree {command}")
        parser.set_defaults(**method.defaults)
        if unknown := parser.set_defaults_with_config(**options):
            raise ValueError(
                f"there is no option {unknown[0].removeprefix('--')!r} (preftree {command} --help lists them)"
            )
        return parser.parse_args_into_dataclasses(args=flags)

    try:
        return parse(options, flags)
    except Exception as error:
        if (found := recipe.blamed(error, parse, options, flags)) is error:
            raise
        raise found from error


def _load_datasets(script: Any, args: Any, mixture: Any, chat_template: bool, method: Method) -> tuple[Any, Any]:
    """Training and held-out data (None without evaluation), from local files, the Hub, or TRL's mixtures."""
    evaluate = args.eval_strategy != "no"
    if mixture.datasets:
        if script.dataset_name:
            logger.warning("both `datasets` and `dataset_name` are given: `dataset_name` is ignored, as `trl dpo` does")
        splits = trl.get_dataset(mixture)
        return splits[script.dataset_train_split], splits[script.dataset_test_split] if evaluate else None
    if not script.dataset_name:
        raise ValueError("no data: give --dataset_name (a local file, a folder, or a name on the Hub) or `datasets`")

    def load(name: str, split: str, only: bool) -> Any:
        if not data.is_local(name):
            return load_dataset(name, name=script.dataset_config, streaming=script.dataset_streaming, split=split)
        files = data.find_files(name)
        paths = next(iter(files.values())) if only and len(files) == 1 else files.get(split)
        if paths is None:
            raise ValueError(f"{name}: there is no file for split {split!r} (found: {', '.join(files)})")
        ties = getattr(args, "ties", "error")
        read = data.stream_pairs if script.dataset_streaming else data.load_pairs
        return read(paths, chat_template, method.trainer.text_fields, ties)

    train = load(script.dataset_name, script.dataset_train_split, only=True)
    if not evaluate:
        return train, None
    if script.eval_dataset_name:
        return train, load(script.eval_dataset_name, script.dataset_test_split, only=True)
    return train, load(script.dataset_name, script.dataset_test_split, only=False)


def _processing_class(kind: Any, script: Any, args: Any, model_args: trl.ModelConfig) -> Any:
    """The model's tokenizer or processor, as `AutoTokenizer` or `AutoProcessor` loads it."""
    if not model_args.model_name_or_path:
        raise ValueError("no model: give --model_name_or_path")
    tokenizer = kind.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
    )
    own = getattr(script, "chat_template_path", None)
    if own and not Path(own).is_file():
        raise FileNotFoundError(f"--chat_template_path {own}: no such file")
    path = own or getattr(args, "chat_template_path", None)  # (a reward model's may be another model's name)
    if path and Path(path).is_file():
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    return tokenizer


def _config(args: Any, model_args: Any) -> Any:
    return AutoConfig.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
    )


def run(command: str, argv: Sequence[str]) -> Any:
    """Train as the arguments say, save model, tokenizer and report; the trainer, or None if it was interrupted.

    Args:
        command: one of `METHODS`.

    Raises:
        ValueError, NotImplementedError, OSError: for bad input, before training.
    """
    method = METHODS[command]
    kind = ScriptArguments if method.config is RewardConfig else TemplateArguments
    script, args, model_args, mixture = _parse(command, kind, method, argv)
    if model_args.model_name_or_path is None:
        raise ValueError("no model: give --model_name_or_path")
    if not str(args.output_dir).strip():
        raise ValueError("option 'output_dir' is empty: give a folder for checkpoints, the model and the report")
    # What the model is loaded with, as `trl dpo` passes it on; the recipe's own model_init_kwargs win.
    loading = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    if isinstance(args.model_init_kwargs, str):
        raise ValueError(f"option 'model_init_kwargs' must be a mapping, not {args.model_init_kwargs!r}")
    args.model_init_kwargs = loading | (args.model_init_kwargs or {})
    processing_class = _processing_class(AutoTokenizer, script, args, model_args)
    # A vision-language model's template may be its processor's alone.
    has_template = processing_class.chat_template is not None or hasattr(_config(args, model_args), "vision_config")
    train, held_out = _load_datasets(script, args, mixture, has_template, method)
    if any(name in IMAGE_COLUMNS for name in columns_of(train)):
        processing_class = _processing_class(AutoProcessor, script, args, model_args)
    resume = _checkpoint(args)
    interrupt = Interrupt()
    quantization = trl.get_quantization_config(model_args)
    try:
        trainer = method.trainer(
            model=model_args.model_name_or_path,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=processing_class,
            peft_config=trl.get_peft_config(model_args),
            callbacks=[interrupt],
            **({} if quantization is None else {"quantization_config": quantization}),
        )
    except TypeError as error:  # how a model's class refuses what it does not know
        refused = str(error).partition("unexpected keyword argument '")[2].partition("'")[0]
        if refused not in args.model_init_kwargs:
            raise
        raise ValueError(f"option 'model_init_kwargs': the model takes no {refused!r} ({error})") from error
    interrupt.exchange = trainer.exchange
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress())
    if script.ignore_bias_buffers:  # DDP then leaves boolean buffers alone
        buffers = trainer.model.named_buffers()
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in buffers if buffer.dtype == torch.bool
        ]
    if held_out is not None and args.eval_on_start is False and resume is None:
        args.eval_on_start = True  # held-out pairs before training, to compare with
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - started
    if interrupt.asked:
        if trainer.accelerator.is_main_process:
            last = get_last_checkpoint(str(args.output_dir))
            print(f"stopped at step {trainer.state.global_step}; go on with --resume_from_checkpoint {last}")
        return None
    trainer.save_model(args.output_dir)
    if trainer.accelerator.is_main_process:
        settings = {
            "method": command,
            "model": model_args.model_name_or_path,
            "data": script.dataset_name,
            **{name: getattr(args, name) for name in ("loss_type", "beta") if hasattr(args, name)},
            "learning_rate": args.learning_rate,
            "examples a micro-batch": args.per_device_train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
            "row_length": args.row_length,
            "share_prefixes": args.share_prefixes,
            "steps": trainer.state.global_step,
        }
        path = report.write_report(
            Path(str(args.output_dir)), trainer.state.log_history, trainer.computed, settings, seconds
        )
        print(f"model and tokenizer saved to {args.output_dir}; report: {path}")
    # A launcher ends all processes when one of them fails, be it at its very end.
    trainer.accelerator.wait_for_everyone()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    return trainer


def _train(command: str, argv: Sequence[str]) -> int:
    trainer = run(command, argv)
    if trainer is None:
        return 130
    trainer.accelerator.end_training()  # closes trackers and the process group
    return 0


def _checkpoint(args: Any) -> str | bool | None:
    """The checkpoint to resume from; "true" means the last good one in output_dir."""
    asked = args.resume_from_checkpoint
    if asked is None or str(asked).lower() in ("", "false", "none"):
        return None
    if str(asked).lower() != "true":
        if not Path(asked).is_dir():
            raise FileNotFoundError(f"--resume_from_checkpoint {asked}: no such folder")
        return str(asked)
    if not Path(str(args.output_dir)).is_dir() or get_last_checkpoint(str(args.output_dir)) is None:
        raise FileNotFoundError(f"--resume_from_checkpoint true: there is no checkpoint in {args.output_dir}")
    return True


def _plan(command: str, argv: Sequence[str]) -> int:
    method = METHODS["dpo"]
    script, args, model_args, mixture = _parse(command, PlanArguments, method, argv)
    tokenizer = _processing_class(AutoTokenizer, script, args, model_args)
    config = _config(args, model_args)
    train, _ = _load_datasets(script, args, mixture, tokenizer.chat_template is not None, method)
    row_length, args.row_length = args.given_row_length, None
    dataset = DPOTrainer.tokenize(train, tokenizer, args, config.get_text_config().vocab_size)
    layout = DPOTrainer.layout(args)

    def tree_of(example: Any) -> TokenTree:
        return layout.group(example).tree()

    streamed = isinstance(dataset, IterableDataset)
    trees: plan.Trees = [tree_of(example) for example in dataset] if streamed else plan.TreesOf(dataset, tree_of)
    cost = plan.ModelCost.from_config(config)
    result = plan.make_plan(trees, args.per_device_train_batch_size, row_length, cost)
    size = args.per_device_train_batch_size
    batches = (trees[first : first + size] for first in range(0, min(len(trees), 32 * size), size))
    rows = [row for batch in batches for row in pack(batch, result.row_length)][:32]
    choices = plan.attention_choices(config, rows, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    lines = [*plan.describe(result), *((kind.replace("_", " "), choice) for kind, choice in choices.items())]
    for name, value in lines:
        print(f"{name:<28} {value}")
    if cost.along_paths is not None:
        print(f"parts of the layers run along each path, so that less is saved than this says ({cost.along_paths})")
    lengths = {"prompt": result.prompts, "response": result.responses, "pair, shared": result.trees}
    print(lengths_as_text({f"tokens of a {name}": values for name, values in lengths.items()}))
    if script.draw:
        print(f"lengths drawn to {draw_lengths(lengths, script.draw)}")
        mask = Path(script.draw).with_stem(Path(script.draw).stem + "-row")
        print(f"first row drawn to {rows[0].draw(mask, max_size=512)}")
    return 0


def _families(command: str, argv: Sequence[str]) -> int:
    known = families.causal_families()
    parser = argparse.ArgumentParser(prog=f"preftree {command}")
    parser.add_argument("family", nargs="*", help="`model_type`s; all of them without")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    parser.add_argument("--known", type=Path, help="JSON file for the families that are exact")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.family if name not in known]:
        raise ValueError(f"transformers has no causal language model of family {', '.join(unknown)}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    findings = []
    for family in options.family or known:
        found = families.examine(family, known[family])
        findings.append(found)
        errors = f"log-probs {found.logps:.0e}, gradients {found.gradients:.0e}"
        along = f", {found.along_paths} of {found.mixing} parts along paths" if found.along_paths else ""
        said = errors + along if found.status in ("exact", "wrong") else found.reason
        print(f"{family:<26} {found.status:<9} {said}", flush=True)
    print(families.summary(findings))
    if options.out:
        options.out.write_text(families.document(findings), encoding="utf-8")
        print(f"written to {options.out}")
    if options.known:
        options.known.write_text(families.exact_families(findings), encoding="utf-8")
    return int(any(found.status == "wrong" for found in findings))


COMMANDS = {**dict.fromkeys(METHODS, _train), "plan": _plan, "families": _families}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors in the input are one line on standard error and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="preftree",
        description="Exact prefix sharing for training language models on preference pairs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"preftree {__version__}")
    parser.add_argument("command", choices=COMMANDS, help="what to do")
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parser.parse_args(arguments[:1]).command
    try:
        return COMMANDS[command](command, arguments[1:])
    except pickle.UnpicklingError as error:
        what = "weights or a checkpoint hold pickled objects, which would run code of theirs: save them as safetensors"
        print(f"preftree {command}: {what} ({recipe.in_one_line(error)[:300]})", file=sys.stderr)
        return 2
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        print(f"preftree {command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
