"""Settings: fields that say what they mean and which values they may have, and how a typed value is read."""

import ast
import dataclasses
import math
import re
import types
from typing import Any, get_args

from ..checks import hint, inside


class RecipeError(ValueError):
    """A setting that does not exist, or a value that it cannot have."""


def setting(default: Any, about: str, within: str = "", choices: tuple[str, ...] = (), flat: str = "") -> Any:
    """Return a field: what it means, the interval or the names it is confined to, and its flat name if another."""
    mutable = isinstance(default, dict | list)
    make = {"default_factory": lambda: type(default)(default)} if mutable else {"default": default}
    return dataclasses.field(**make, metadata={"about": about, "within": within, "choices": choices, "flat": flat})


class Checked:
    """A group of settings whose values are checked when it is made."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))


def parsed(field: dataclasses.Field, text: str) -> Any:
    """Return the value that was typed for a setting, read by the setting's type."""
    kind, value, name = _kind(field), text, _name(field)
    if kind is dict:
        pairs = [pair.partition("=") for pair in re.findall(r"(?:\[[^]]*]|[^\s,])+", text)]
        if bad := next((key + equals + value for key, equals, value in pairs if not (key and value)), None):
            raise RecipeError(f"{name}={text!r}: {bad!r} is no name=value; write it as sigma=0.1 layers=[3,6]")
        value = {key: _literal(value) for key, _, value in pairs}
    elif kind is list and not text.strip().startswith("["):
        value = _literal(f"[{text}]")
    elif kind is not str:
        value = _literal(text)
    return checked(field, value)


def _literal(text: str) -> Any:
    """Return a number, a list of numbers, true, false or none; what is none of these stays text."""
    word = text.strip()
    if word.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[word.lower()]
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return text
    numbers = value if isinstance(value, list) else [value]
    return value if all(isinstance(number, int | float) for number in numbers) else text


def _name(field: dataclasses.Field) -> str:
    return field.metadata["flat"] or field.name


def _kind(field: dataclasses.Field) -> type:
    """Return the field's type, without the None that it may also be."""
    return get_args(field.type)[0] if isinstance(field.type, types.UnionType) else field.type


def expected(field: dataclasses.Field) -> str:
    """Return what a setting may be, in words."""
    kind, within, choices = _kind(field), field.metadata["within"], field.metadata["choices"]
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    words[dict] = "name=value pairs, with numbers that are finite"
    words[list] = "numbers, as in 1,2,4"
    some = " or ".join(choices) if choices else words[kind] + (f" in {within}" if within else "")
    return some if kind is field.type else f"{some}, or none"


def checked(field: dataclasses.Field, value: Any) -> Any:
    """Return the value if the field may have it; a whole number where a number is meant becomes a float."""
    kind, within, choices = _kind(field), field.metadata["within"], field.metadata["choices"]
    if value is None and kind is not field.type:
        return None
    if kind is float and type(value) is int:
        value = float(value)
    good = type(value) is kind and (not choices or value in choices)
    if kind is list and good:
        good = all(type(v) in (int, float) and (not within or inside(v, within)) for v in value)
    elif good and within:
        good = inside(value, within)
    if kind is dict and good:
        good = all(isinstance(k, str) and isinstance(v, str | int | float | list | None) for k, v in value.items())
        numbers = [n for v in value.values() for n in (v if isinstance(v, list) else [v]) if isinstance(n, float)]
        good = good and all(map(math.isfinite, numbers))
    if not good:
        kind_of = "" if type(value) in (kind, str) else f" ({type(value).__name__})"
        raise RecipeError(f"{_name(field)}={value!r}{kind_of}: expected {expected(field)}{hint(value, choices)}")
    return kind(value) if kind in (dict, list) else value
