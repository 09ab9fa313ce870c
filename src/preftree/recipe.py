"""Recipes: that each option of a YAML file is of a kind that it can be, before anything is made of it."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from accelerate.parallelism_config import ParallelismConfig

# Of type text, and true or false all the same.
_TRUE_TOO = ("resume_from_checkpoint",)
# What argparse reads as true or false.
_TRUTH = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")


def read(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The options of the recipe that arguments name by ``--config``, none without one; and the other arguments.

    Raises:
        ValueError: for a file that is no recipe in plain YAML.
        OSError: for one that cannot be read.
    """
    path, flags, given = None, [], iter(argv)
    for argument in given:
        name, equals, value = argument.partition("=")
        if name != "--config":
            flags.append(argument)
        elif (path := value if equals else next(given, None)) is None:
            raise ValueError("--config: give the path of a recipe")
    if path is None:
        return {}, flags
    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: not a recipe in plain YAML: {in_one_line(error)}") from error
    except RecursionError as error:
        raise ValueError(f"--config: {path}: lists or mappings in each other, too many to read") from error
    if not isinstance(found, dict):
        raise ValueError(f"--config: {path} must hold options, 'name: value' each, not {_described(found)}")
    if names := [name for name in found if not isinstance(name, str)]:
        raise ValueError(f"--config: {path}: the name of an option must be text, not {_described(names[0])}")
    return found, flags


class _Loader(yaml.SafeLoader):
    """Plain YAML in which a mapping has each name once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        names = [key.value for key in keys]
        for number, key in enumerate(keys):
            if key.value in names[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
        return super().construct_mapping(node, deep)


def in_one_line(error: Exception) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())


def check(options: Mapping[Any, Any], kinds: Iterable[type[Any]]) -> None:
    """Raise `ValueError` naming the first option whose value is of a kind that it cannot be.

    Args:
        kinds: dataclasses whose fields the options are; names that are none of them are left to the parser.
    """
    hints: dict[str, Any] = {}
    for kind in kinds:
        known = get_type_hints(kind)
        hints |= {field.name: known[field.name] for field in dataclasses.fields(kind)}
    for name, value in options.items():
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"option {name!r} holds a character of number 0")
        if name not in hints or (name in _TRUE_TOO and isinstance(value, bool)) or _fits(value, hints[name]):
            continue
        hint = ", in quotes (YAML reads no, off, yes and on as true or false)" if isinstance(value, bool) else ""
        raise ValueError(f"option {name!r} is {_described(value)}: it must be {_expected(hints[name])}{hint}")


def blamed(
    error: Exception, parse: Callable[[dict[str, Any], list[str]], Any], options: dict[str, Any], flags: list[str]
) -> Exception:
    """What to raise in place of an error of ``parse(options, flags)``: a `ValueError` that names the option it is about.

    That is one without which there is no such error. If there is none, or a `ValueError` names it: the error itself.
    """
    names = [name for name, *_ in _each_left_out(options, flags)]
    if isinstance(error, ValueError) and any(name in str(error) for name in names):
        return error
    why = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
    for name, value, fewer, rest in _each_left_out(options, flags):
        try:
            parse(fewer, rest)
        except (Exception, SystemExit) as other:
            if (type(other), str(other)) == (type(error), str(error)):
                continue
        return ValueError(f"option {name!r} cannot be {value!r}: {why}")
    return error


def _each_left_out(options: dict[str, Any], flags: list[str]) -> Iterator[tuple[str, Any, dict[str, Any], list[str]]]:
    """Each option's name and value, and what is given beside it."""
    for name, value in options.items():
        yield name, value, {other: options[other] for other in options if other != name}, flags
    starts = [place for place, flag in enumerate(flags) if flag.startswith("--")]
    for start, end in pairwise([*starts, len(flags)]):
        name, equals, value = flags[start].lstrip("-").partition("=")
        yield name, value if equals else " ".join(flags[start + 1 : end]), options, flags[:start] + flags[end:]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from YAML can be what a hint says; text is read as argparse reads it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if origin in (list, tuple, set):
        each = inner[0] if inner else Any
        if isinstance(value, list):
            return all(_fits(part, each) for part in value)
        return isinstance(value, str) and each is str  # one name in place of several
    kind = origin or hint
    if kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool) or str(value).lower() in _TRUTH
    if kind in (int, float):
        return _is_number(value, kind)
    if kind is dict:
        return isinstance(value, (dict, str))
    if kind is str or (isinstance(kind, type) and issubclass(kind, Enum)):
        return isinstance(value, (str, Enum))
    return kind is not ParallelismConfig


def _is_number(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        return False
    return math.isfinite(number) and (kind is float or isinstance(value, str) or number == value)


def _expected(hint: Any) -> str:
    """In words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_expected(each) for each in inner))
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin in (list, tuple, set):
        return f"a list of {_expected(inner[0])}" if inner else "a list"
    names = {type(None): "empty", bool: "true or false", int: "a whole number", float: "a number", dict: "a mapping"}
    names[ParallelismConfig] = "left to `accelerate launch`"
    return names.get(origin or hint, "text")


def _described(value: Any) -> str:
    return "empty" if value is None else f"{value!r} ({type(value).__name__})"
