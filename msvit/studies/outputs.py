"""The folder of a study's tables and figures: what its last run made and this one does not is removed.

`begin(folder)` before the first file is written, `finish(folder)` after the last. Files that other hands have put there
stay, and so does everything if the study fails in between.
"""

import json
import time
from pathlib import Path

MADE = ".made.json"
SUFFIXES_MADE = (".png", ".svg", ".pdf", ".csv", ".md", ".tex", ".json", ".html")


def begin(folder: Path) -> Path:
    """Make the folder, note the time, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MADE).write_text(json.dumps(_noted(folder) | {"began": time.time_ns()}))
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
    (folder / MADE).write_text(json.dumps({"began": noted["began"], "files": made}))
    return stale


def _noted(folder: Path) -> dict:
    path = folder / MADE
    return json.loads(path.read_text()) if path.exists() else {"began": 0, "files": []}
