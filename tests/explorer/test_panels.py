"""What the explorer draws."""

import json

import numpy as np
import pytest
from helpers import COMMON, SEGMENTED, check_panels, gate_of, reduced, segmenter_of

from msvit.data import IGNORE
from msvit.explorer import drawing, export, panels
from msvit.explorer.models import LoadedModel
from msvit.explorer.panels import TOKEN_MAP_TITLE
from msvit.explorer.state import State, TokenMap, run_backbone, run_gate


def is_ink(panel, box):
    """Whether anything but the background is drawn in a box."""
    return len(np.unique(np.asarray(panel.crop(box)).reshape(-1, 3), axis=0)) > 1


def test_panels_have_one_width_and_show_the_state(gated):
    check_panels(gated, [*COMMON, "Class probabilities"])


def test_colours_grow_lighter_from_fine_to_coarse():
    colours = drawing.colours(np.linspace(0, 1, 64)).astype(int)
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()
    assert colours[0, 2] > 2 * colours[0, 0]
    assert colours[-1, 0] > 2 * colours[-1, 2]


def test_a_truth_of_other_classes_is_unknown():
    loaded = LoadedModel.of("other", segmenter_of(classes=[f"thing {k}" for k in range(10)]))
    gated = gate_of(loaded)
    assert gated.truth is None
    state = run_backbone(gated, 0.5)
    assert state.numbers()["accuracy"] is None
    assert "ground truth unknown" in export.caption(state)[0]
    panel = panels.PANELS["Error"].draw(state)
    assert is_ink(panel, (0, 200, 448, 260)), "it says why"


def test_panels_of_a_segmenter(segmenter):
    check_panels(gate_of(segmenter), [*COMMON, *SEGMENTED])


def test_label_maps_name_and_number_the_classes_seen():
    labels = np.zeros((64, 64), int)
    labels[:, 32:], labels[:8] = 3, IGNORE
    panel = panels.label_panel(labels, tuple("abcdef"))
    pixels = np.asarray(panel)
    colours = {tuple(c) for c in pixels[:448].reshape(-1, 3).tolist()}
    assert {panels.colour_of(0), panels.colour_of(3), panels.IGNORED_HATCH} <= colours
    assert not {panels.colour_of(k) for k in (1, 2, 4, 5)} & colours
    assert {tuple(c) for c in pixels[:50].reshape(-1, 3).tolist()} == {panels.IGNORED_FILL, panels.IGNORED_HATCH}
    assert is_ink(panel, (60, 230, 164, 280)), "a number on the left area"
    few = panels.label_panel(np.zeros((64, 64), int), tuple("abcdef"))
    assert panels.colour_of(3) in {tuple(c) for c in pixels[448:].reshape(-1, 3).tolist()}, "in the legend"
    assert panels.colour_of(3) not in {tuple(c) for c in np.asarray(few)[448:].reshape(-1, 3).tolist()}
    everything = panels.label_panel(np.arange(64 * 64).reshape(64, 64) % 150, tuple(map(str, range(150))))
    assert everything.height < 448 + 250, "a legend names some of very many classes"


def test_class_colours_differ():
    assert len({panels.colour_of(k) for k in range(28)}) == 28
    first = np.array([panels.colour_of(k) for k in range(10)], float)
    # As the two commonest kinds of colour-blindness see them (Viénot, Brettel and Mollon 1999, on linear light).
    linear = (first / 255) ** 2.2
    for rows in (((0.11238, 0.88762, 0), (0.11238, 0.88762, 0), (0.00401, -0.00401, 1)),
                 ((0.29275, 0.70725, 0), (0.29275, 0.70725, 0), (-0.02234, 0.02234, 1))):  # fmt: skip
        seen = 255 * (linear @ np.array(rows).T).clip(0, 1) ** (1 / 2.2)
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=2) + 1e3 * np.eye(10)
        assert distances.min() > 20


def test_the_error_panel_shows_what_is_wrong_and_leaves_ignored_pixels_alone(segmenter):
    gated = gate_of(segmenter)
    truth = gated.picture.labels.copy()
    truth[:16] = IGNORE
    gated = run_gate(segmenter, gated.picture._replace(labels=truth))
    state = run_backbone(gated, 0.5)
    wrong = (state.labels != truth) & (truth != IGNORE)
    shown = np.asarray(panels.PANELS["Error"].draw(state))[3:448:7, 3:448:7]
    assert wrong.any()
    assert np.array_equal((shown == panels.WRONG).all(2), wrong)
    assert {tuple(c) for c in shown[:16].reshape(-1, 3).tolist()} <= {panels.IGNORED_FILL, panels.IGNORED_HATCH}
    assert (shown == panels.NEAR_EDGE).all(2).any()
    assert state.score["accuracy"] == pytest.approx(1 - wrong.sum() / (truth != IGNORE).sum())
    blank = run_gate(segmenter, gated.picture._replace(labels=np.full_like(truth, IGNORE)))
    assert json.dumps(run_backbone(blank, 0.5).numbers(), allow_nan=False)
    assert export.as_png([run_backbone(blank, 0.5)])


def test_panels_of_a_model_with_a_reducer():
    check_panels(gate_of(reduced("evit")), [*COMMON, TOKEN_MAP_TITLE, "Class probabilities"])


def test_a_token_has_the_mean_colour_of_its_pixels_wherever_they_lie():
    state = run_backbone(gate_of(reduced("tome")), 1.0)
    where = np.zeros((8, 8), int)
    where[:, 4:], where[7, 7], where[0, 0] = 1, 0, -1
    state = State(**{**vars(state), "token_maps": (TokenMap(0, where, 2),)})
    panel = np.asarray(panels.token_map_panel(state))
    pixels, cells = np.asarray(state.gated.picture.image, float), where.repeat(8, 0).repeat(8, 1)
    assert np.array_equal(panel[28, 112], panel[420, 420]), "two patches of one token"
    for row, column in ((4, 2), (4, 6)):
        mean = pixels[cells == where[row, column]].mean(0)
        assert np.abs(panel[row * 56 + 28, column * 56 + 28] - mean).max() <= 1
    assert {tuple(c) for c in panel[4:50, 4:50].reshape(-1, 3).tolist()} == {panels.DROPPED_FILL, panels.DROPPED_HATCH}
    white = (panel[:448] == 255).all(2)
    assert white[100:300, 222:227].any(1).all(), "a border between the tokens"
    assert not white[100:300, 20:200].any(), "and none within one"


def test_a_segmenter_with_a_reducer():
    loaded = LoadedModel.of("both", segmenter_of(reducer="tome"))
    gated = gate_of(loaded)
    check_panels(gated, [*COMMON, TOKEN_MAP_TITLE, *SEGMENTED])
    assert export.as_svg([run_backbone(gated, 0.5)]).count("<image") == 8
