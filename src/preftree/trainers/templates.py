"""What a chat template makes of an example, and what it cannot take."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import ProcessorMixin
from trl import maybe_apply_chat_template
from trl.data_utils import prepare_multimodal_messages

from preftree.trainers.columns import ROW


def _rendered(example: Mapping[str, Any], fields: Sequence[str], processing_class: Any) -> list[str]:
    """The text of an example's prompt, if it has one, and of each of these fields behind it, as TRL asks for them.

    Text that is no chat is left out. Raises what the template raises.
    """
    tools = example.get("tools")
    given = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
    given |= example.get("chat_template_kwargs") or {}

    def text(conversation: list[Any], **more: Any) -> str:
        if isinstance(processing_class, ProcessorMixin):
            conversation = prepare_multimodal_messages(conversation)
        return processing_class.apply_chat_template(conversation, tokenize=False, **more, **given)

    prompt = example.get("prompt")
    texts = [text(prompt, add_generation_prompt=True)] if isinstance(prompt, list) else []
    return texts + [text((prompt or []) + example[name]) for name in fields if isinstance(example[name], list)]


def render(example: Mapping[str, Any], where: str, fields: Sequence[str], processing_class: Any) -> list[str]:
    """The text of a chat: of its prompt, if it has one, and of each of these fields behind it. No text for what is no chat.

    Raises:
        ValueError: naming ``where``, for whatever the chat template raises.
    """
    try:
        return _rendered(example, fields, processing_class)
    except Exception as error:
        raise ValueError(f"{where}: the chat template: {error}") from error


def refused_row(
    dataset: Iterable[Mapping[str, Any]], fields: Sequence[str], processing_class: Any, error: Exception
) -> int | None:
    """The first row for which the chat template raises this error, by its number in the user's data; None if there is none."""
    if "apply_chat_template" not in "".join(traceback.format_exception(error)):  # (also of another process)
        return None
    for row, example in enumerate(dataset):
        try:
            _rendered(example, fields, processing_class)
            maybe_apply_chat_template(dict(example), processing_class)
        except Exception as found:
            if type(found) is type(error):
                return example.get(ROW, row)
    return None


def check_parts(example: Mapping[str, Any], where: str, fields: Sequence[str], processing_class: Any) -> None:
    """That messages in parts hold text alone, and that the chat template writes it out.

    Many templates put a message's content into the text as it is: of a list of parts that would be Python's notation.

    Raises:
        ValueError: naming ``where``, field, message and part.
    """
    parts = []
    for name in ("prompt", *fields):
        messages = example.get(name)
        for number, message in enumerate(messages if isinstance(messages, list) else ()):
            content = message.get("content")
            for place, part in enumerate(content if isinstance(content, list) else ()):
                what = f"{where}, field {name!r}, message {number}, part {place}"
                if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise ValueError(f"{what}: must be {{'type': 'text', 'text': ...}}, not {str(part)[:80]}")
                parts.append((what, part))
    if not parts:
        return
    texts = render(example, where, fields, processing_class)
    for what, part in parts:
        if not any(part["text"].strip() in text for text in texts) or any(str(part) in text for text in texts):
            raise ValueError(
                f"{what}: the chat template does not write out the text of parts: give 'content' as a string, or a template "
                "that takes parts"
            )
