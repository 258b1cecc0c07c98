"""Files that no crash can spoil: each appears under its name only when all of its bytes are on the disk."""

import contextlib
import hashlib
import io
import json
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import first_line

if TYPE_CHECKING:
    import pandas as pd


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


def read_json(path: Path, kind: type = dict) -> Any:
    """Return the object (or, by its type, the list) in a file, or raise a `RunError` that says what to do."""
    try:
        check_file(path)
        value = json.loads(path.read_text())
        if not isinstance(value, kind):
            raise ValueError(f"it holds a {type(value).__name__}, not a {kind.__name__}")
    except (ValueError, OSError, RecursionError) as error:
        why = first_line(error)
        raise RunError(f"{path} is damaged ({why}); delete it, or the whole run, and train again") from error
    return value


def check_file(path: Path):
    """Raise a ValueError unless a path leads to a regular file: a pipe would be waited for."""
    if not os.path.isfile(path):
        raise ValueError("it is no regular file")


def write_csv(table: "pd.DataFrame", path: Path, index: bool = False):
    """Write a table for programs; text that a spreadsheet would take for a formula gets an apostrophe before it."""

    def harmless(cell: Any) -> Any:
        return f"'{cell}" if isinstance(cell, str) and cell[:1] in tuple("=+-@\t\r") else cell

    table = table.map(harmless).rename(columns=harmless)
    table = table.rename(index=harmless) if index else table
    write_whole(path, table.to_csv(index=index, lineterminator="\n").encode())


def digest(data: bytes) -> str:
    """Return what a state's file is named by."""
    return hashlib.sha256(data).hexdigest()[:32]


def locked(path: Path) -> io.FileIO:
    """Return the file, locked for as long as this process has it open; a killed one gives it up at once."""
    file = io.FileIO(path, "a")
    with contextlib.suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RunBusy(f"another process is training in {path.parent}; wait for it, or stop it") from None
    _LOCKS.add(file)
    return file


# A lock is given up when the last process has closed it. What is forked, as loaders are, outlives a killed process by
# seconds; so it closes what it inherits.
_LOCKS: weakref.WeakSet[io.FileIO] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [file.close() for file in list(_LOCKS)])
