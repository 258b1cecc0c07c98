"""Settings and command lines: a recipe that keeps what it was told, or one line that says why not."""

import contextlib
import io
import json

from hypothesis import given
from hypothesis import strategies as st

from msvit import cli
from msvit.training.recipe import FIELDS, Recipe, RecipeError, parse

names = st.sampled_from(sorted(FIELDS)) | st.text(max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=5), scalars, max_size=3)
typed = st.text(max_size=20) | st.sampled_from(
    ["nan", "inf", "-1", "1e999", "0x10", "true", "none", "[1,2]", "a=b c=[1"]
)


@given(st.dictionaries(names, values, max_size=4))
def test_a_recipe_says_what_it_was_told(settings):
    try:
        recipe = Recipe.from_dict(settings)
    except RecipeError:
        return
    stored = json.loads(json.dumps(recipe.to_dict(), allow_nan=False))
    assert Recipe.from_dict(stored) == recipe
    assert all(character.isprintable() and character != "/" for character in recipe.run_name)
    assert len(recipe.run_name) < 200
    assert len(recipe.run_name.encode()) < 256


@given(names, typed)
def test_what_is_typed_is_a_value_or_an_error(name, text):
    with contextlib.suppress(RecipeError):
        value = parse(name, text)
        assert Recipe.from_dict({name: value}).to_dict()[name] == value


words = st.sampled_from(["runs", "eval", "methods", "--json", "--version", "--macs", "--typo"]) | st.text(max_size=12)


@given(st.lists(words, max_size=4))
def test_a_command_line_has_an_exit_code(line):
    """Commands that train are left out: these are tried with their recipes above."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli.main(line)
        except SystemExit as ended:
            code = ended.code
    assert code in (0, 1, 2)
    assert "Traceback" not in said.getvalue()
