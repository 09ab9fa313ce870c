"""Tree attention under transformers' causal language models, by transformers' own registering mechanism."""

from preftree.models.prepare import prepare_model
from preftree.models.prepared import PreparedModel, prepared_part

__all__ = ["PreparedModel", "prepare_model", "prepared_part"]
