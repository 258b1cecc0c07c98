"""The explorer's view as files and as text."""

import pytest
from PIL import Image

from msvit.explorer import drawing, export
from msvit.explorer.sources import Picture
from msvit.explorer.state import run_backbone, run_gate

GREY = (120, 130, 140)


def test_a_file_says_what_the_screen_says(gated, tmp_path):
    states = [run_backbone(gated, 0.3), run_backbone(gated, 0.7)]
    files = {path.suffix: path for path in export.save(states, tmp_path / "new", "two")}
    assert files.keys() == {".png", ".svg", ".json"}
    with Image.open(files[".png"]) as picture:
        assert picture.width > 5 * drawing.PANEL_WIDTH
    text = files[".svg"].read_text()
    for state in states:
        assert f"{state.tokens} of 65 tokens" in text
        assert f">{state.tokens}</b> of 65 tokens" in export.figures_html(state)
    assert text.count("<image") == 10


def test_names_cannot_carry_html(loaded):
    gated = run_gate(loaded, Picture("<img src=x onerror=alert(1)>.png", Image.new("RGB", (64, 64), GREY)))
    state = run_backbone(gated, 0.5)
    assert "<img" not in export.figures_html(state)
    assert "<img" not in export.as_svg([state])


@pytest.mark.parametrize(("macs", "text"), [(1.2537e9, "1.25 GMACs"), (13.4e6, "13.4 MMACs")])
def test_macs_have_their_own_unit(macs, text):
    assert export.macs_text(macs) == text
