"""The explorer's timing runs, on a small case, so that it stays as true as the page."""

from benchmarks import explorer


def test_a_small_case_is_timed(capsys):
    found = explorer.main(["--only", "step", "--model", "vit_mini_patch8_64", "--steps", "3"])
    found |= explorer.main(["--only", "gallery", "--pictures", "40", "--sample", "3"])
    assert found["threshold_longest_ms"] >= found["threshold_step_ms"] > 0
    assert "gallery_sheet_ms" in found
    assert "threshold_step_ms" in capsys.readouterr().out
