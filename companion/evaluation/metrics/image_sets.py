"""Sets of pictures to measure: a sampling run, a folder of image files, or an array in a npz file; checked when opened.

Everything wrong with a set is reported in one sentence that names the file, before anything is sampled or measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from companion.errors import check_name, explained, printable
from companion.evaluation.sampling.folder import MANIFEST, Pixels, read_batches, read_manifest
from companion.evaluation.sampling.settings import coco_captions
from companion.files import array_names, open_file, read_arrays, read_text

_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp"))
_BATCH = 100


@dataclass(frozen=True)
class ImageSet:
    """Pictures of one size.

    Args:
        path: a run's folder, a folder of image files, or a npz file.
        kind: which of them.
        number: of pictures.
        size: (width, height) in pixels; None for a run, whose pictures come from one pipeline call.
    """

    path: Path
    kind: Literal["run", "files", "array"]
    number: int
    size: tuple[int, int] | None

    def batches(self) -> Iterator[Pixels]:
        """The pictures in a fixed order: a run's samples, files by name.

        Raises:
            ValueError: a file is damaged; it is named.
        """
        if self.kind == "run":
            for images, _ in read_batches(self.path):
                yield images
        elif self.kind == "array":
            images = _array(self.path)
            for first in range(0, len(images), _BATCH):
                yield images[first : first + _BATCH]
        else:
            files = image_files(self.path)
            for first in range(0, len(files), _BATCH):
                yield np.stack([_pixels(file) for file in files[first : first + _BATCH]])


def open_images(path: Path, *, at_least: int = 1) -> ImageSet:
    """Open a set and check it: it exists, every picture can be read, all have one size, and there are enough.

    Args:
        path: see `ImageSet`. The npz files of ADM hold their pictures as `arr_0`.
        at_least: how many pictures the metrics need.

    Raises:
        ValueError: it is not; the message names the file.
    """
    found = _opened(path)
    if found.number < at_least:
        raise ValueError(f"{path} holds {found.number} pictures, and the metrics need at least {at_least}")
    return found


def _opened(path: Path) -> ImageSet:
    check_name(path, "set of pictures")
    if path.is_dir() and (path / MANIFEST).exists():
        return ImageSet(path, "run", int(read_manifest(path)["settings"]["num_samples"]), None)
    if path.is_dir():
        files = image_files(path)
        if not files:
            raise ValueError(f"folder {path} holds no pictures ({', '.join(sorted(_SUFFIXES))})")
        size, first = None, files[0]
        for file in files:
            height, width, _ = _pixels(file).shape
            if size is not None and (width, height) != size:
                raise ValueError(
                    f"pictures must have one size: {file} has {width}x{height} and {first} {size[0]}x{size[1]}"
                )
            size = (width, height)
        return ImageSet(path, "files", len(files), size)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a folder of pictures, a sampling run or a npz file")
    images = _array(path)
    return ImageSet(path, "array", len(images), (images.shape[2], images.shape[1]))


def _array(path: Path) -> Pixels:
    """The pictures of a npz file."""
    found = read_arrays(path, ("images", "arr_0"))
    if not found:
        held = printable(", ".join(array_names(path)))[:300]
        raise ValueError(f"{path} holds {held or 'nothing'}, and no images or arr_0")
    images = next(iter(found.values()))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"{path} must hold uint8 pictures of shape (number, height, width, 3), "
            f"got {images.dtype} of shape {images.shape}"
        )
    return images


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())


def open_picture(file: Path) -> Image.Image:
    """A picture in RGB.

    Raises:
        ValueError: it cannot be read; larger ones than Pillow takes for an attack are refused.
    """
    what = explained(f"{file} cannot be read as a picture")
    with open_file(file, "picture") as content, what, Image.open(content) as picture:
        return picture.convert("RGB")


def _pixels(file: Path) -> np.ndarray:
    return np.asarray(open_picture(file))


def captioned_files(captions: Path, folder: Path) -> list[tuple[Path, str]]:
    """(picture, caption) of COCO's caption file, or of a text file with `NAME<tab>CAPTION` lines.

    Raises:
        ValueError: a line is not of that form or names a picture that is not in the folder, a picture has two captions
            or none; file and line are named.
    """
    text = read_text(captions, "caption file")
    if captions.suffix == ".json":
        pairs = [(f"caption file {captions}", name, caption) for name, caption in coco_captions(captions, text)]
    else:
        pairs = []
        for number, row in enumerate(text.removesuffix("\n").split("\n"), start=1):
            name, tab, caption = row.partition("\t")
            if not (name.strip() and tab and caption.strip()):
                raise ValueError(f"caption file {captions}, line {number}, is not NAME<tab>CAPTION: {row[:60]!r}")
            check_name(name.strip(), f"caption file {captions}, line {number}: picture")
            pairs.append((f"caption file {captions}, line {number},", name.strip(), caption.strip()))
    known: dict[str, str] = {}
    for where, name, caption in pairs:
        if name in known:
            raise ValueError(f"{where} has a second caption of {name!r}")
        if not (folder / name).is_file():
            raise ValueError(f"{where} has a caption of {name!r}, which is not in {folder}")
        known[name] = caption
    for file in image_files(folder):
        if str(file.relative_to(folder)) not in known:
            raise ValueError(f"caption file {captions} has no caption of {file}")
    return [(folder / name, caption) for name, caption in known.items()]
