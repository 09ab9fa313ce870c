"""Tree attention under transformers' causal language models, by transformers' own registering mechanism."""

from preftree.models.prepare import prepare_model, ready_to_run
from preftree.models.prepared import PreparedModel, prepared_part

__all__ = ["PreparedModel", "prepare_model", "prepared_part", "ready_to_run"]
