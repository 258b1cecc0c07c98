"""The folder of a study's tables and figures: what its last run made and this one does not is removed.

`begin(folder)` before the first file is written, `finish(folder)` after the last. Files that other hands have put there
stay, and so does everything if the study fails in between.
"""

import json
import time
from pathlib import Path

from ..training.files import RunError, read_json, write_whole

MADE = ".made.json"
SUFFIXES_MADE = (".png", ".svg", ".pdf", ".csv", ".md", ".tex", ".json", ".html")


def begin(folder: Path) -> Path:
    """Make the folder, note the time, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _note(folder, _noted(folder) | {"began": time.time_ns()})
    return folder


def finish(folder: Path) -> list[str]:
    """Remove what only the run before has made, and return its names."""
    noted = _noted(folder)
    there = {path.relative_to(folder).as_posix(): path for kind in SUFFIXES_MADE for path in folder.rglob(f"*{kind}")}
    made = sorted(
        name for name, path in there.items() if path.stat().st_mtime_ns >= noted["began"] and path.name != MADE
    )
    stale = sorted((there.keys() & noted["files"]) - set(made))
    for name in stale:
        there[name].unlink()
    _note(folder, {"began": noted["began"], "files": made})
    return stale


def _note(folder: Path, what: dict):
    write_whole(folder / MADE, json.dumps(what).encode())


def _noted(folder: Path) -> dict:
    """Return what the run before has noted; nothing if that cannot be read, so that nothing is removed."""
    try:
        found = read_json(folder / MADE)
    except RunError:
        found = {}
    began, files = found.get("began"), found.get("files")
    return {
        "began": began if isinstance(began, int) else 0,
        "files": [name for name in files if isinstance(name, str)] if isinstance(files, list) else [],
    }
