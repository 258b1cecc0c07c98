"""Folders of classes, ROOT/{train,val}/CLASS/picture: a label is the name of a folder, and a picture is there once."""

import os
from collections.abc import Iterable
from pathlib import Path

from .decode import SUFFIXES


def check_class_folders(parts: Iterable[Path]):
    """Raise a ValueError unless each picture lies directly in the folder of its class, and in no other.

    Pictures and whole classes may be links, to places outside of the data set. Folders within classes are not followed:
    a link there would multiply pictures, take validation into training, or go in a circle.
    """
    home: dict[str, Path] = {}  # where a class really is -> its folder
    links: list[Path] = []
    for part in parts:
        for folder in sorted(entry for entry in part.iterdir() if entry.is_dir()):
            if (other := home.setdefault(os.path.realpath(folder), folder)) != folder:
                raise ValueError(f"{folder} and {other} are the same folder; remove the link")
            links += _pictures_behind_links(part, folder)
    for link in links:
        if os.path.dirname(os.path.realpath(link)) in home:
            raise ValueError(f"{link} is a link to {os.path.realpath(link)}, which is a picture already; remove it")


def check_tar(part: Path, names: Iterable[str]):
    """Raise a ValueError unless all pictures of a tar, by their names, lie at CLASS/picture of one folder."""
    homes = sorted({os.path.dirname(os.path.dirname(os.path.normpath(name))) for name in names})
    if len(homes) > 1:
        raise ValueError(
            f"{part}: every picture needs to lie directly in the folder of its class, and these in one folder; there "
            f"are classes in {homes[0] or '.'!r} and in {homes[1]!r}"
        )


def _pictures_behind_links(part: Path, folder: Path) -> list[Path]:
    """Return the links in a class that are called like pictures; raise if the class has pictures at other depths."""
    links = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and (entry.is_symlink() or _holds_something(entry.path)):
                raise ValueError(
                    f"{part}: every CLASS in {part.name}/CLASS/ needs pictures directly in its folder; this does not "
                    f"hold for {entry.name!r} in {folder.name!r}, a {'link to a ' * entry.is_symlink()}folder"
                )
            if entry.is_symlink() and _is_picture(entry.name):
                links.append(Path(entry.path))
    return links


def _holds_something(folder: str) -> bool:
    """Return whether there are pictures below, or links to folders, which timm would follow."""
    for here, folders, files in os.walk(folder):
        if any(map(_is_picture, files)) or any(os.path.islink(os.path.join(here, name)) for name in folders):
            return True
    return False


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES
