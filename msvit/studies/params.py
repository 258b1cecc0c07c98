"""The guard of every notebook: parameters mean what was typed, or the notebook stops before it trains anything.

papermill passes `-p gbas false` as the string 'false', which is truthy, and lets `-p gbass 1` go by with a log line.
So the cell after the one tagged `parameters` calls `guard(globals())`: the annotations of that cell say which
parameters there are and of what type, the cell that papermill injects says what was asked for.
"""

import ast
import os
import types
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from ..checks import in_interval, known_settings, one_of

TYPES_IN_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping such as {sigma: 0.1}",
}


class ParameterError(ValueError):
    """A parameter that does not exist, or a value it cannot have."""

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook and papermill show: the sentence alone, first and last; IPython asks by this name."""
        return [f"{type(self).__name__}: {self}"]


def in_repo(path: str) -> Path:
    """Return a relative path from the repository's root, or from the working folder where there is no repository.

    With the variable MSVIT_HOME in the environment, as the tests set it, from that folder.
    """
    root = Path(__file__).resolve().parents[2]
    home = os.environ.get("MSVIT_HOME") or (root if (root / "notebooks").is_dir() else Path.cwd())
    return Path(home) / path


def guard(names: MutableMapping[str, Any], may_be_empty: Iterable[str] = (), **rules: str | Iterable) -> None:
    """Convert the parameters in a notebook's globals in place, or raise a ParameterError.

    Args:
        names: `globals()` of the notebook, right after its cell of annotated defaults.
        may_be_empty: Lists with a rule that may have no value at all.
        rules: For a parameter, the interval it lies in (such as "(0, 1)"), or the values it may have; for a list,
            what each of its elements must fulfil.
    """
    kinds = {name: kind for name, kind in names.get("__annotations__", {}).items() if not name.startswith("_")}
    if not kinds:
        raise ParameterError("no annotated defaults found; call guard(globals()) after the cell tagged `parameters`")
    if stray := set(rules) - set(kinds):
        raise ParameterError(f"rules for {sorted(stray)}, but the notebook's parameters are {', '.join(kinds)}")
    known_settings("this notebook", dict.fromkeys(injected(names.get("In", []))), kinds, ParameterError)
    for name, kind in kinds.items():
        names[name] = convert(name, names[name], kind)
        if names[name] or name not in may_be_empty:
            check(name, names[name], rules.get(name))


def injected(cells: list[str]) -> list[str]:
    """Return the names that papermill assigned, from the sources of the cells run so far."""
    source = next((cell for cell in reversed(cells) if cell.startswith("# Parameters")), "")
    return [target.id for s in ast.parse(source).body if isinstance(s, ast.Assign) for target in s.targets]


def convert(name: str, value: Any, kind: Any) -> Any:
    """Return the value as the parameter's type has it."""
    allowed = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    kind = next(k for k in allowed if k is not types.NoneType)
    outer, inner = get_origin(kind) or kind, get_args(kind)
    meant = _read(value) if isinstance(value, str) and outer is not str else value
    if meant is None and types.NoneType in allowed:
        return None
    if outer is list:
        items = meant if isinstance(meant, list | tuple) else [meant]
        return [convert(f"{name}[{i}]", item, inner[0]) for i, item in enumerate(items)] if inner else list(items)
    if outer is float and type(meant) is int:
        meant = float(meant)
    if outer is int and type(meant) is float and meant.is_integer():
        meant = int(meant)
    if type(meant) is not outer or meant != meant:
        raise ParameterError(f"{name}={value!r}: expected {TYPES_IN_WORDS.get(outer, outer.__name__)}")
    return meant


def _read(text: str) -> Any:
    """Return what a typed string means: true, 0.6, 1e-3, [0.5, 0.7], {sigma: 0.1}, none."""
    if text.strip().lower() in ("none", "null", ""):
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):  # YAML 1.1 takes 1e-3 for text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def check(name: str, value: Any, rule: str | Iterable | None) -> None:
    """Raise unless the value, or each element of a list, lies in the rule's interval or is one of its values."""
    if rule is None or value is None:
        return
    if isinstance(value, list):
        if not value:
            raise ParameterError(f"{name} is an empty list; give at least one value")
        for i, item in enumerate(value):
            check(f"{name}[{i}]", item, rule)
    elif isinstance(rule, str):
        in_interval(name, value, rule, ParameterError)
    else:
        one_of(name, value, rule, ParameterError)
