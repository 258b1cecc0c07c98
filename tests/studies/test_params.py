"""The notebooks' guard: papermill's strings, typing errors, impossible values."""

import inspect
from pathlib import Path

import pytest
from IPython.core.interactiveshell import InteractiveShell

from msvit.studies.params import ParameterError, guard, in_repo

ANNOTATIONS = {
    "gbas": bool,
    "seeds": int,
    "target": float,
    "budgets": list[float],
    "losses": list[str],
    "out": str,
    "loss_settings": dict,
    "weight": float | None,
}
DEFAULTS = {
    "gbas": True,
    "seeds": 1,
    "target": 0.6,
    "budgets": [0.5],
    "losses": ["gbas"],
    "out": "runs",
    "loss_settings": {},
    "weight": None,
}


def notebook(cell: str = "", **values):
    """A notebook's globals as papermill leaves them."""
    cells = ["", "gbas: bool = True"] + (["# Parameters\n" + cell] if cell else [])
    return {"__annotations__": ANNOTATIONS, "In": cells} | DEFAULTS | values


@pytest.mark.parametrize(
    ("name", "typed", "meant"),
    [
        ("gbas", "true", True),
        ("gbas", "false", False),
        ("gbas", "False", False),
        ("gbas", False, False),
        ("seeds", "3", 3),
        ("seeds", 3.0, 3),
        ("target", "0.6", 0.6),
        ("target", "1e-1", 0.1),
        ("target", 1, 1.0),
        ("budgets", "[0.5, 0.7]", [0.5, 0.7]),
        ("budgets", "[5e-1, 1]", [0.5, 1.0]),
        ("budgets", 0.7, [0.7]),
        ("losses", "[gbas, l0]", ["gbas", "l0"]),
        ("losses", "gbas", ["gbas"]),
        ("losses", "[gbas, none]", ["gbas", "none"]),
        ("losses", ["gbas", "none"], ["gbas", "none"]),
        ("out", "true", "true"),
        ("out", "123", "123"),
        ("loss_settings", "{sigma: 0.2}", {"sigma": 0.2}),
        ("weight", "none", None),
        ("weight", None, None),
        ("weight", "30", 30.0),
    ],
)
def test_strings_become_what_the_default_says(name, typed, meant):
    names = notebook(**{name: typed})
    guard(names)
    assert names[name] == meant
    assert type(names[name]) is type(meant)
    assert {k: names[k] for k in DEFAULTS if k != name} == {k: v for k, v in DEFAULTS.items() if k != name}


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("gbas", "maybe"),
        ("gbas", 1),
        ("gbas", None),
        ("seeds", "three"),
        ("seeds", 1.5),
        ("seeds", True),
        ("target", "high"),
        ("target", float("nan")),
        ("budgets", "[0.5, x]"),
        ("losses", [1]),
        ("loss_settings", "sigma"),
        ("out", 3),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name_and_value(name, typed):
    with pytest.raises(ParameterError, match=rf"{name}.*: expected "):
        guard(notebook(**{name: typed}))


@pytest.mark.parametrize(
    ("name", "typed", "expected"),
    [
        ("gbas", "maybe", "gbas='maybe': expected true or false"),
        ("seeds", "three", "seeds='three': expected a whole number"),
        ("budgets", "[0.5, x]", r"budgets\[1\]='x': expected a number"),
        ("loss_settings", "sigma", "loss_settings='sigma': expected a mapping such as"),
    ],
)
def test_messages_name_the_value_and_what_is_expected(name, typed, expected):
    with pytest.raises(ParameterError, match=expected):
        guard(notebook(**{name: typed}))


def test_paths_are_from_the_repository_root(tmp_path, monkeypatch):
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("MSVIT_HOME", str(tmp_path))
    assert in_repo("runs/x") == tmp_path / "runs" / "x", "of the tests"
    monkeypatch.delenv("MSVIT_HOME")
    assert in_repo("runs/x") == root / "runs" / "x"
    assert in_repo(str(root.parent / "elsewhere")) == root.parent / "elsewhere"


def test_unknown_names_that_papermill_injected_are_refused_with_the_nearest():
    with pytest.raises(ParameterError, match="no setting 'gbass'; the nearest is 'gbas'. It has: gbas, seeds"):
        guard(notebook("gbass = False\nseeds = 2\n", gbass=False))


def test_variables_of_later_cells_do_not_matter_when_the_guard_runs_again():
    guard(notebook(model="something", x=3))


@pytest.mark.parametrize(
    ("values", "rules", "match"),
    [
        ({"target": 1.5}, {"target": "(0, 1)"}, r"target=1\.5 lies outside \(0, 1\)"),
        ({"target": 0.0}, {"target": "(0, 1)"}, "outside"),
        ({"seeds": 0}, {"seeds": "[1, inf)"}, r"seeds=0 lies outside \[1, inf\)"),
        ({"budgets": [0.5, 2.0]}, {"budgets": "(0, 1)"}, r"budgets\[1\]=2\.0"),
        ({"budgets": []}, {"budgets": "(0, 1)"}, "empty list"),
        ({"losses": ["gbas", "gbsa"]}, {"losses": ("gbas", "l0")}, r"losses\[1\]='gbsa'.*nearest is 'gbas'"),
    ],
)
def test_impossible_values_are_refused(values, rules, match):
    with pytest.raises(ParameterError, match=match):
        guard(notebook(**values), **rules)


def test_rules_and_defaults_must_fit():
    with pytest.raises(ParameterError, match="rules for"):
        guard(notebook(), targets="(0, 1)")
    with pytest.raises(ParameterError, match="no annotated defaults"):
        guard({})
    guard(notebook(), target="(0, 1)", losses=("gbas",), seeds="[1, inf)", weight="[0, inf)")


def test_only_some_lists_may_be_empty():
    names = {"__annotations__": {"masks": list[str], "losses": list[str]}, "masks": [], "losses": ["gbas"]}
    guard(names, may_be_empty=["masks"], masks=("random",), losses=("gbas",))
    with pytest.raises(ParameterError, match="losses is an empty list; give at least one value"):
        guard(names | {"losses": []}, may_be_empty=["masks"], losses=("gbas",))
    with pytest.raises(ParameterError, match="masks"):
        guard(names | {"masks": ["rando"]}, may_be_empty=["masks"], masks=("random",))


def test_a_notebook_shows_the_sentence_alone():
    """It is what papermill prints at its end; IPython asks an error for its traceback by this name."""
    error = ParameterError("gbas='maybe': expected true or false")
    assert error._render_traceback_() == ["ParameterError: gbas='maybe': expected true or false"]
    assert "value._render_traceback_()" in inspect.getsource(InteractiveShell.showtraceback)
