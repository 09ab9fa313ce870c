"""One training run on each rank of a launcher: `torchrun ... run_on_ranks.py KIND SETTINGS OUT`; rank 0 saves its end."""

import copy
import json
import os
import sys

import conftest  # noqa: F401 (sets up the environment)
import torch
from datasets import Dataset
from preference_data import dataset, examples, text_pairs
from trl_runs import end_of, train
from vision_families import build, pair, pairs

if __name__ == "__main__":
    kind, settings, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    if family := settings.pop("images", None):
        # Two batches of the first step, one without images; two without any; two more with some..
        data = [pair(90 + index, [], "the dog ?", "a cat", "a dog .") for index in range(6)] + pairs(6)
        order = [0, 1, 6, 7, 2, 3, 4, 5, 8, 2, 9, 10]
        processor, model = build(family)
        settings["trainer_args"] = {"processing_class": processor, "ref_model": copy.deepcopy(model)}
        trainer = train(kind, lambda: model, Dataset.from_list([data[index] for index in order]), **settings)
    else:
        data = examples(settings.get("method", "DPO"), text_pairs(23))
        trainer = train(kind, settings.pop("model"), dataset(data), **settings)
    rows = torch.tensor([trainer.computed["rows"] if kind == "preftree" else 0])
    rows_of_ranks = trainer.accelerator.gather(rows).tolist()
    if trainer.accelerator.is_main_process:
        torch.save(end_of(trainer) | {"rows": rows_of_ranks}, out)
    # Leaving by the interpreter's own way, gloo's threads abort a rank now and then.
    trainer.accelerator.wait_for_everyone()
    sys.stderr.flush()
    os._exit(0)
