"""Tree attention under transformers' causal language models, by transformers' own registering mechanism."""

from preftree.models.prepare import PreparedModel, prepare_model, prepared_part

__all__ = ["PreparedModel", "prepare_model", "prepared_part"]
