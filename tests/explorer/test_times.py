"""Times of a model and of its dense one, side by side."""

import time

import pytest

from msvit.explorer import export
from msvit.explorer.state import run_backbone, with_times
from msvit.explorer.times import FEWEST_REPEATS, time_in_turns


def test_both_have_their_turn_and_the_first_calls_do_not_count():
    calls = []

    def work(name, seconds):
        first = name not in calls
        calls.append(name)
        time.sleep(0.05 if first else seconds)

    times = time_in_turns(lambda: work("gated", 0.004), lambda: work("dense", 0.001), patience=0.06)
    assert times.gated.high < 40
    assert times.gated.low <= times.gated.median <= times.gated.high
    assert 0 < times.gain < 1
    assert calls[:2] == ["gated", "dense"]
    assert calls.count("gated") == calls.count("dense") >= 1 + FEWEST_REPEATS
    pairs = [set(calls[i : i + 2]) for i in range(2, len(calls), 2)]
    assert all(pair == {"gated", "dense"} for pair in pairs)


def test_a_patience_that_is_over_ends_with_the_fewest_repeats():
    calls = []
    time_in_turns(lambda: calls.append(1), lambda: time.sleep(0.002), patience=0)
    assert len(calls) == 1 + FEWEST_REPEATS


@pytest.mark.parametrize(("patience", "most"), [(10.0, 42)])
def test_there_is_an_end_to_it(patience, most):
    calls = []
    time_in_turns(lambda: calls.append(1), lambda: None, patience)
    assert len(calls) == most


def test_the_view_says_what_was_measured(gated):
    bare = run_backbone(gated, 1.0)
    assert bare.numbers()["ms"] is None
    assert "ms, dense" not in export.figures_html(bare)
    state = with_times(run_backbone(gated, 0.5))
    n = state.numbers()
    assert 0 < n["ms_low"] <= n["ms"] <= n["ms_high"]
    assert (
        f"{n['ms']:.1f} ({n['ms_low']:.1f}–{n['ms_high']:.1f}) ms, dense {n['dense_ms']:.1f}"
        in export.caption(state)[1]
    )
    fewer = n["macs_share"] < 1
    assert (export.TOO_SMALL in export.figures_html(state)) == (fewer and n["dense_ms"] < n["ms"])
