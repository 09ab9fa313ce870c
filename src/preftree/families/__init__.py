"""Which of transformers' model families preftree trains exactly, tried on tiny random models of each."""

from preftree.families.census import Finding, causal_families, document, exact_families, examine, summary

__all__ = ["Finding", "causal_families", "document", "exact_families", "examine", "summary"]
