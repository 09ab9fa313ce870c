"""Data sets through TRL's own preparation, checked before and after it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import ProcessorMixin, Trainer

from preftree.models.rotary import RotaryLimit
from preftree.trainers.checks import check_columns, check_example, check_numbers, check_raw
from preftree.trainers.columns import IMAGE_COLUMNS, PAIR_FIELDS, ROW, TEXT_FIELDS, columns_of, source_of
from preftree.trainers.groups import Layout
from preftree.trainers.image_checks import with_images
from preftree.trainers.ranked import flatten, regroup
from preftree.trainers.templates import refused_row
from preftree.trainers.token_checks import ExampleCheck, check_tokenised


class DataPreparation(Trainer):
    """Checks what TRL's trainer (the class that stands behind this one among the bases) tokenises, and what it gives.

    Class attributes:
        fields: columns of the raw data that an example is made of, beside the prompt.
        columns: numbers of an example that the objective needs.
        takes_ranked: whether the data may be ranked completions instead.
        extracts_prompt: whether, of data without a prompt, it is what the fields have in common at their start.
        takes_images: whether prompts may have images; these are read batch by batch, as TRL does it.
        cuts_at_max_length: whether TRL cuts what is longer (else it leaves it out).
    """

    fields: tuple[str, ...] = PAIR_FIELDS
    columns: tuple[str, ...] = ()
    takes_ranked = True
    extracts_prompt = True
    takes_images = False
    cuts_at_max_length = True
    _tokenizer: Any
    _vocabulary: int
    _rotary_limit: RotaryLimit | None = None
    _has_images = False

    if TYPE_CHECKING:  # what TRL's class behind this one has

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def layout(cls, args: Any) -> Layout:
        """How an example is read."""
        raise NotImplementedError

    @classmethod
    def text_fields(cls, columns: Iterable[str] | None, source: str) -> tuple[str, ...]:
        """The columns, beside the prompt, whose text or messages make an example of data with these columns.

        Raises:
            ValueError: if columns are missing or exclude each other, naming ``source``.
            NotImplementedError: for images, if the trainer takes none.
        """
        return check_columns(columns, source, cls.fields, cls.takes_ranked, cls.takes_images)

    @classmethod
    def tokenize(cls, dataset: Dataset, tokenizer: Any, args: Any, vocabulary: int) -> Dataset:
        """A data set checked and tokenised as for training, without a model.

        Raises:
            ValueError: for bad data, naming row and field.
            NotImplementedError: for images, whose tokens are found batch by batch.
        """
        if found := [name for name in IMAGE_COLUMNS if name in columns_of(dataset)]:
            raise NotImplementedError(f"column {found[0]!r}: tokens of images are not known before training")
        trainer = cls.__new__(cls)
        trainer._tokenizer, trainer._vocabulary = tokenizer, vocabulary
        return trainer._prepare_dataset(dataset, tokenizer, args, "train")

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        columns = columns_of(dataset)
        if any(name in columns for name in IMAGE_COLUMNS):
            return dataset if ROW in columns else self._with_images(dataset, processing_class, args, dataset_name)
        # TRL would leave out in silence what max_length leaves no completion of; the check says which and how many.
        unlimited = copy.copy(args)
        unlimited.max_length = None
        raw = self._raw(dataset, processing_class, args, dataset_name)
        source = source_of(dataset, dataset_name)
        with self._rows_named({source: raw}, processing_class):
            tokenised = super()._prepare_dataset(raw, processing_class, unlimited, dataset_name)
        return self._checked(tokenised, args, source, "completions" in columns_of(dataset))

    def _with_images(self, dataset, processing_class, args, dataset_name):
        source = source_of(dataset, dataset_name)
        fields = self.text_fields(columns_of(dataset), source)
        if not isinstance(processing_class, ProcessorMixin):
            raise ValueError(
                f"{source}: it has images, but processing_class is {type(processing_class).__name__}: pass the processor of a "
                "vision-language model"
            )
        chat_template = getattr(processing_class, "chat_template", None) is not None
        self._signature_columns = None  # more than those of a data set without images
        self._has_images = True
        return with_images(dataset, source, lambda example, where: check_example(example, where, chat_template, fields))

    @contextlib.contextmanager
    def _rows_named(self, datasets: Mapping[str, Any], processing_class: Any) -> Iterator[None]:
        """Within it, what a chat template raises for a row of these data sets is a `ValueError` that names source and row."""
        try:
            yield
        except Exception as error:
            for source, dataset in datasets.items():
                if not isinstance(dataset, Dataset):  # a stream's rows are tried when they are checked
                    continue
                fields = [name for name in columns_of(dataset) if name in TEXT_FIELDS and name != "prompt"]
                if (row := refused_row(dataset, fields, processing_class, error)) is not None:
                    raise ValueError(f"{source}, row {row}: the chat template: {error}") from error
            raise

    def _raw(self, dataset, processing_class, args, dataset_name):
        """The data set checked, in the form that TRL tokenises."""
        source = source_of(dataset, dataset_name)
        columns = columns_of(dataset)
        ties = getattr(args, "ties", "error")
        check_numbers(dataset, self.columns, source)
        fields = self.text_fields(columns, source)
        dataset = check_raw(dataset, source, processing_class, fields, ties, self.extracts_prompt)
        return flatten(dataset, ties) if "completions" in columns else dataset

    def _checked(self, dataset, args, source: str, ranked: bool):
        """The tokenised data set, checked."""
        layout = self.layout(args)
        check = ExampleCheck(
            source,
            vocabulary=self._vocabulary,
            layout=layout,
            row_length=args.given_row_length,
            overlong=args.overlong,
            share_prefixes=args.share_prefixes,
            cuts=self.cuts_at_max_length,
            rotary_limit=self._rotary_limit,
        )
        return check_tokenised(regroup(dataset, layout) if ranked else dataset, check)
