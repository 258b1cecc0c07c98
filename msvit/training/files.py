"""Files that no crash can spoil: each appears under its name only when all of its bytes are on the disk."""

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any


class RunError(RuntimeError):
    """A run that cannot be started, continued or read."""


class RunBusy(RunError):
    """A run that another process is training."""


class RunWarning(UserWarning):
    """A damaged file of a run that could be done without."""


def write_whole(path: Path, data: bytes):
    """Write a whole file or none."""
    part = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":  # the rename is on the disk only when the folder is
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def read_json(path: Path) -> Any:
    """Return what is in a file, or raise a `RunError` that says what to do."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); delete it, or the whole run, and train again") from error


def digest(data: bytes) -> str:
    """Return what a state's file is named by."""
    return hashlib.sha256(data).hexdigest()[:32]


def locked(path: Path) -> io.BufferedWriter:
    """Return the file, locked for as long as it is open; a killed process gives it up."""
    file = path.open("ab")
    with contextlib.suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RunBusy(f"another process is training in {path.parent}; wait for it, or stop it") from None
    return file
