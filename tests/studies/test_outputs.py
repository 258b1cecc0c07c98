"""A study's folder holds what its last run made, and what others put there."""

import os

from msvit.studies.outputs import MADE, begin, finish


def study(folder, *names):
    begin(folder)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    return finish(folder)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_figures_that_a_study_no_longer_makes_go(tmp_path):
    out = tmp_path / "deep/out"
    assert study(out, "a.png", "tables/b.csv") == []
    assert study(out, "a.png", "c.svg") == ["tables/b.csv"]
    assert names(out) == [".made.json", "a.png", "c.svg"]


def test_what_others_put_there_stays(tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "old.png").write_text("from before")
    os.utime(tmp_path / "notes.md", (1, 1))
    os.utime(tmp_path / "old.png", (1, 1))
    study(tmp_path, "a.png")
    (tmp_path / "later.txt").write_text("mine")
    assert study(tmp_path, "b.png") == ["a.png"]
    assert names(tmp_path) == [".made.json", "b.png", "later.txt", "notes.md", "old.png"]


def test_a_study_that_failed_removes_nothing(tmp_path):
    study(tmp_path, "a.png", "b.png")
    begin(tmp_path)
    (tmp_path / "b.png").write_text("y")
    assert names(tmp_path) == [".made.json", "a.png", "b.png"]
    assert study(tmp_path, "b.png") == ["a.png"]


def test_a_note_that_a_crash_has_torn_removes_nothing(tmp_path):
    for torn in ("", '{"began": 1, "fil', "[]", '{"files": 3}', '{"files": [3, "a.png"], "began": 0}'):
        study(tmp_path, "a.png")
        (tmp_path / MADE).write_text(torn)
        assert study(tmp_path, "b.png") in ([], ["a.png"])
        assert (tmp_path / "b.png").exists()
