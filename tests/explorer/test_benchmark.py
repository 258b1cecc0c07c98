"""The explorer's timing and its film run, on a small case, so that they stay as true as the page."""

import pytest
from helpers import gradient
from PIL import Image

from benchmarks import explorer, film


def test_a_small_case_is_timed(capsys, monkeypatch):
    monkeypatch.setattr(explorer, "CHROMIUM", None)
    found = explorer.main(["--only", "step", "--model", "vit_mini_patch8_64", "--steps", "3"])
    found |= explorer.main(["--only", "gallery", "--pictures", "40", "--sample", "3"])
    assert found["threshold_longest_ms"] >= found["threshold_step_ms"] > 0
    assert "gallery_sheet_ms" in found
    assert "threshold_step_ms" in capsys.readouterr().out


@pytest.mark.browser
@pytest.mark.skipif(explorer.CHROMIUM is None, reason="not installed: chromium")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_browser_is_timed_too():
    found = explorer.gallery(pictures=1000, sample=2)
    assert found["gallery_sort_ms"] > 0
    assert 0 < found["gallery_scroll_ms"] < 1000


def test_a_film_keeps_its_frames_and_their_times(tmp_path):
    pictures = [gradient(size=(60, 60)).rotate(90 * k) for k in range(3)]
    frames = [film.Frame(picture, 100 * (k + 1)) for k, picture in enumerate(pictures)]
    assert film.write_gif(frames, tmp_path / "film.gif") == (tmp_path / "film.gif").stat().st_size
    with Image.open(tmp_path / "film.gif") as whole:
        assert (whole.n_frames, whole.size, whole.info["loop"]) == (3, (60, 60), 0)
        for k in range(3):
            whole.seek(k)
            assert whole.info["duration"] == 100 * (k + 1)
