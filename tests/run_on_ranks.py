"""One training run on each rank of a launcher: `torchrun ... run_on_ranks.py KIND SETTINGS OUT`; rank 0 saves its end."""

import json
import os
import sys

import conftest  # noqa: F401 (sets up the environment)
import torch
from preference_data import dataset, examples, text_pairs
from trl_runs import end_of, train

if __name__ == "__main__":
    kind, settings, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
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
