"""Columns of preference data, and what messages call a data set."""

from __future__ import annotations

from datasets import Dataset, IterableDataset

# Rows keep the number they have in the user's data.
ROW = "preftree_row"
PAIR_FIELDS = ("chosen", "rejected")
# What may hold text or messages.
TEXT_FIELDS = ("prompt", *PAIR_FIELDS, "reference", "completion")
IMAGE_COLUMNS = ("image", "images")
# What a chat template is given beside messages.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# What trainers read besides text; other columns are left out, whatever they hold.
COLUMNS = (
    "completions",
    "scores",
    "ranks",
    "pair_weights",
    "label",
    "margin",
    *TEMPLATE_COLUMNS,
    *IMAGE_COLUMNS,
)


def source_of(dataset: Dataset | IterableDataset, name: str) -> str:
    """What messages call a data set."""
    file = dataset.info.dataset_name
    return f"{name} dataset ({file})" if file else f"{name} dataset"


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    return dataset.column_names or list(next(iter(dataset), {}))
