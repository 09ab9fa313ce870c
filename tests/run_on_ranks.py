"""One training run on each rank of a launcher: `torchrun ... run_on_ranks.py KIND SETTINGS OUT`; rank 0 saves its end."""

import json
import sys

import conftest  # noqa: F401 (sets up the environment)
import torch
from preference_data import dataset, text_pairs
from trl_runs import end_of, train

if __name__ == "__main__":
    kind, settings, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    trainer = train(kind, settings.pop("model"), dataset(text_pairs(23)), **settings)
    if trainer.accelerator.is_main_process:
        torch.save(end_of(trainer) | {"rows": dict(getattr(trainer, "computed", {}))}, out)
