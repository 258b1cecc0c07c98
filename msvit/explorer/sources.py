"""Pictures for the explorer that need no download: scenes, photographs of packages, folders and uploads."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ..data.decode import PICTURE_FORMATS, SUFFIXES, UNREADABLE, PictureError, check_regular, opened
from ..data.loaders import BUILT_IN, make
from ..data.segmentation import classes_of, open_folder
from .uploads import read_picture

PACKAGED = {  # photographs that come with this package and others which are installed anyway: package, path inside it
    "a cat": ("msvit", "explorer/photographs/cat.jpg"),
    "coffee": ("msvit", "explorer/photographs/coffee.jpg"),
    "an astronaut": ("msvit", "explorer/photographs/astronaut.jpg"),
    "a rocket": ("msvit", "explorer/photographs/rocket.jpg"),
    "a temple": ("sklearn", "datasets/images/china.jpg"),
    "a flower": ("sklearn", "datasets/images/flower.jpg"),
    "Grace Hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
}
MADE_SHOWN = 200
MOST_PICTURES = 10_000  # of a folder, and of a gallery
MOST_FILES = 200_000  # looked at in a folder
SIGN = 2_000  # files after which a sign of life is given


class Picture(NamedTuple):
    """A picture of the size that a model takes, and what is known of it.

    Attributes:
        truth: The name of its class; empty where it is unknown.
        labels: The class of each pixel, int64 `[H, W]`, 255 to ignore; None where they are unknown.
        regions: Names of these classes.
    """

    name: str
    image: Image.Image
    truth: str = ""
    labels: np.ndarray | None = None
    regions: tuple[str, ...] = ()


class PictureSource:
    """Pictures under names, from files or from their bytes; `note` says what was left out."""

    def __init__(self, files: dict[str, Path | bytes], note: str = ""):
        self.files, self.note = files, note

    def names(self) -> list[str]:
        return list(self.files)

    def picture(self, name: str, size: tuple[int, int]) -> Picture:
        """Return a picture at this height and width, cropped at its middle to their proportions."""
        return Picture(name, ImageOps.fit(self._read(name), size[::-1]))

    def _read(self, name: str) -> Image.Image:
        file = self.files[name]
        if isinstance(file, Path):
            try:
                check_regular(file, name)
                file = file.read_bytes()
            except OSError as error:
                raise PictureError(f"{name} cannot be read: {error.strerror}") from error
        return read_picture(file, name)


class BuiltInSource(PictureSource):
    """Built-in validation pictures, made at the size that is asked for: resized, they would lose the class."""

    def __init__(self, data: str):
        self.data = data
        made = make(data, MADE_SHOWN, 128, split="val")
        super().__init__({f"#{i} {made.classes[k]}": b"" for i, k in enumerate(made.labels(range(MADE_SHOWN)))})

    def picture(self, name: str, size: tuple[int, int]) -> Picture:
        """Return the picture, drawn at this height and width."""
        i = self.names().index(name)
        made = make(self.data, i + 1, size, split="val")
        pixels, label = made[i]
        image = Image.fromarray((pixels * 64 + 128).byte().permute(1, 2, 0).numpy())
        labels = made.mask(i).astype(np.int64)
        return Picture(f"{self.data} #{i}", image, made.classes[label], labels, tuple(made.regions))


class LabelledSource(PictureSource):
    """The pictures of a folder that `open_folder` reads, those for validation first, with their label maps."""

    def __init__(self, root: Path):
        folder = open_folder(root)
        self.maps = dict([*folder.val, *folder.train])
        super().__init__({picture.relative_to(root).as_posix(): picture for picture in self.maps})
        self.classes, self.meaning = tuple(folder.classes), folder.meaning

    def picture(self, name: str, size: tuple[int, int]) -> Picture:
        """Return a picture and its label map, both at this height and width."""
        image, path = self._read(name), self.maps[self.files[name]]
        try:
            with opened(path) as label_map:
                codes = classes_of(np.asarray(label_map, np.int64), self.meaning, image, name, str(path))
        except UNREADABLE as error:
            raise PictureError(f"{path}, the label map of {name}, cannot be read: {error}") from error
        labels = ImageOps.fit(Image.fromarray(codes), size[::-1], Image.Resampling.NEAREST)
        fitted = ImageOps.fit(image, size[::-1])
        return Picture(name, fitted, labels=np.asarray(labels, np.int64), regions=self.classes)


def built_in_sources() -> dict[str, PictureSource]:
    """Return the sources that need no folder and no upload."""
    found = {name.replace(":", ": "): BuiltInSource(name) for name in BUILT_IN}
    photographs = {}
    for title, (package, inside) in PACKAGED.items():
        spec = find_spec(package)  # finds the folder without importing the package
        if spec and (path := Path(spec.submodule_search_locations[0]) / inside).is_file():
            photographs[title] = path
    return found | {"photographs": PictureSource(photographs)}


def folder_source(folder: str | Path, tell: Callable[[int, int], None] = lambda found, seen: None) -> PictureSource:
    """Return the pictures of a folder and of the folders in it, with label maps if `open_folder` finds them.

    Without label maps it ends after MOST_PICTURES pictures or MOST_FILES files.

    Args:
        tell: Called now and then with how many pictures are found, among how many files.
    """
    root = Path(os.path.expanduser(folder))
    if not os.path.isdir(root):
        raise PictureError(f"there is no folder {root}; name one that holds {', '.join(PICTURE_FORMATS)} files")
    try:
        return LabelledSource(root)
    except (OSError, ValueError):  # in neither layout, or with a list of classes that is none
        files, note = _pictures_below(root, tell)
    if not files:
        among = f" among its first {MOST_FILES:,} files; name a folder in it" if note else ""
        raise PictureError(f"{root} holds no picture{among}; known suffixes are {', '.join(SUFFIXES)}")
    return PictureSource(files, note)


def _pictures_below(root: Path, tell: Callable[[int, int], None]) -> tuple[dict[str, Path], str]:
    """Return the pictures that are found first below a folder, by name, and a note if there may be more."""
    found, note = [], ""
    for seen, entry in enumerate(_files_below(root)):
        if len(found) == MOST_PICTURES or seen == MOST_FILES:
            note = f"{root} holds more files: these are {len(found):,} pictures among {seen:,}"
            break
        if entry.name.lower().endswith(SUFFIXES):
            found.append(Path(entry.path))
        if (seen + 1) % SIGN == 0:
            tell(len(found), seen + 1)
    return {path.relative_to(root).as_posix(): path for path in sorted(found)}, note


def _files_below(root: Path) -> Iterator[os.DirEntry]:
    """Yield what is no folder, in a folder and in those below it; links to folders are not followed."""
    folders = [root]
    while folders:
        with suppress(OSError), os.scandir(folders.pop()) as entries:  # one that may not be read is left out
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                else:
                    yield entry
