"""Pictures for the explorer that need no download: scenes, photographs of other packages, folders and uploads."""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ..data import IGNORE
from ..data.images import UNREADABLE
from ..data.scenes import DIFFICULTIES, Scenes
from ..data.segmentation import SegmentationFolder, open_folder
from .uploads import FORMATS, PictureError, read_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SHIPPED = {  # photographs that come with packages which a workbench has anyway: package, path inside it
    "a temple": ("sklearn", "datasets/images/china.jpg"),
    "a flower": ("sklearn", "datasets/images/flower.jpg"),
    "Grace Hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
}
SCENES_SHOWN = 48


class Shot(NamedTuple):
    """A picture of the size that a model takes, and what is known to be on it.

    Attributes:
        truth: The name of its class; empty where nobody knows.
        labels: The class of each pixel, int64 `[H, W]`, 255 to ignore; None where nobody knows.
        regions: Names of these classes.
    """

    name: str
    image: Image.Image
    truth: str = ""
    labels: np.ndarray | None = None
    regions: tuple[str, ...] = ()


class Source:
    """Pictures under names; `shot(name, size)` gives one as a model takes it."""

    def __init__(self, files: dict[str, Path | bytes]):
        self.files = files

    def names(self) -> list[str]:
        return list(self.files)

    def shot(self, name: str, size: tuple[int, int]) -> Shot:
        """The middle of the picture, as large as it goes, at this height and width."""
        return Shot(name, _fitted(self._read(name), size, Image.Resampling.BICUBIC))

    def _read(self, name: str) -> Image.Image:
        file = self.files[name]
        if isinstance(file, Path):
            try:
                file = file.read_bytes()
            except OSError as error:
                raise PictureError(f"{name} cannot be read: {error.strerror}") from error
        return read_picture(file, name)


class SceneSource(Source):
    """Validation scenes of one difficulty, made at the size that is asked for: resized, they would lose the class."""

    def __init__(self, difficulty: str):
        self.difficulty = difficulty
        labels = Scenes(SCENES_SHOWN, difficulty=difficulty, split="val").labels(range(SCENES_SHOWN))
        classes = DIFFICULTIES[difficulty].classes
        super().__init__({f"#{i} {classes[label]}": b"" for i, label in enumerate(labels)})

    def shot(self, name: str, size: tuple[int, int]) -> Shot:
        i = self.names().index(name)
        scenes = Scenes(i + 1, size, difficulty=self.difficulty, split="val")
        pixels, label = scenes[i]
        image = Image.fromarray((pixels * 64 + 128).byte().permute(1, 2, 0).numpy())
        labels = scenes.mask(i).astype(np.int64)
        return Shot(f"{self.difficulty} scene #{i}", image, scenes.classes[label], labels, tuple(scenes.regions))


class LabelledSource(Source):
    """The pictures of a folder that `segdata.open_folder` reads, those for validation first, with their label maps."""

    def __init__(self, root: Path, folder: SegmentationFolder):
        pairs = {p.relative_to(root).as_posix(): (p, labels) for p, labels in [*folder.val, *folder.train]}
        super().__init__({name: picture for name, (picture, _) in pairs.items()})
        self.maps = {name: labels for name, (_, labels) in pairs.items()}
        self.classes, self.meaning = tuple(folder.classes), folder.meaning

    def shot(self, name: str, size: tuple[int, int]) -> Shot:
        image, labels = self._read(name), self._labels(name)
        if labels.size != image.size:
            raise PictureError(
                f"{self.maps[name]} is {labels.size[0]} x {labels.size[1]} px, its picture {name} {image.size[0]} x "
                f"{image.size[1]}; a label map holds one number for each pixel of the upright picture"
            )
        seen = np.asarray(_fitted(labels, size, Image.Resampling.NEAREST), np.int64)
        return Shot(name, _fitted(image, size, Image.Resampling.BICUBIC), "", seen, self.classes)

    def _labels(self, name: str) -> Image.Image:
        """The classes of the pixels, of 8 bits."""
        path = self.maps[name]
        try:
            with Image.open(path) as image:
                values = np.asarray(image, np.int64)
        except UNREADABLE as error:
            raise PictureError(f"{path}, the label map of {name}, cannot be read: {error}") from error
        if values.ndim != 2:
            raise PictureError(f"{path} has colours; a label map holds one number for each pixel")
        codes = np.where((values >= 0) & (values <= IGNORE), self.meaning[values & IGNORE], -1)
        if (codes < 0).any():
            wrong = np.unique(values[codes < 0])[:8].tolist()
            raise PictureError(f"{path} holds the values {wrong}, which are none of its {len(self.classes)} classes")
        return Image.fromarray(codes.astype(np.uint8))


def sources() -> dict[str, Source]:
    """The pictures that are there without asking for any."""
    found = {f"scenes: {name}": SceneSource(name) for name in DIFFICULTIES}
    photographs = {}
    for title, (package, inside) in SHIPPED.items():
        spec = find_spec(package)  # finds the folder without importing the package
        path = Path(spec.submodule_search_locations[0]) / inside if spec else None
        if path and path.is_file():
            photographs[title] = path
    return found | ({"photographs": Source(photographs)} if photographs else {})


def folder_source(folder: str | Path) -> Source:
    """The pictures of a folder and of the folders in it; with label maps if they lie as `segdata.open_folder` says."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise PictureError(f"there is no folder {root}; name one that holds {', '.join(FORMATS)} files")
    try:
        return LabelledSource(root, open_folder(root))
    except (OSError, ValueError, KeyError, TypeError):  # in neither layout, or with a list of classes that is none
        files = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.suffix.lower() in SUFFIXES}
    if not files:
        raise PictureError(f"{root} holds no picture; looked for {', '.join(SUFFIXES)}")
    return Source(files)


def _fitted(image: Image.Image, size: tuple[int, int], how: Image.Resampling) -> Image.Image:
    return ImageOps.fit(image, size[::-1], how)
