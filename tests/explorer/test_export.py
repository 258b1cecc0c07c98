"""The explorer's view as files and as text."""

from xml.etree import ElementTree

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


def test_names_from_anywhere_become_files(loaded, tmp_path):
    """A newline would be two lines of text, a control character no XML, and letters of three bytes too long a name."""
    gated = run_gate(loaded, Picture("a\nb\x1b[31m\udcff" + "界" * 110 + ".png", Image.new("RGB", (64, 64), GREY)))
    files = export.save([run_backbone(gated, 0.5)], tmp_path)
    assert [path.suffix for path in files] == [".png", ".svg", ".json"]
    ElementTree.parse(files[1])
    with pytest.raises(ValueError, match="name='../x' leads out of"):
        export.write_files(tmp_path, "../x", {"png": b""})


@pytest.mark.parametrize(("macs", "text"), [(1.2537e9, "1.25 GMACs"), (13.4e6, "13.4 MMACs")])
def test_macs_have_their_own_unit(macs, text):
    assert export.macs_text(macs) == text
