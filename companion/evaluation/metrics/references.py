"""The papers' reference pictures. Their files are checked before anything is sampled.

`python -m companion table imagenet --profile paper --data DIR` looks for one of these, by the pictures' size:

    DIR/VIRTUAL_imagenet256_labeled.npz   ADM's (github.com/openai/guided-diffusion, "evaluations"), for 256x256
    DIR/img64.pkl, DIR/img512.pkl         EDM2's (github.com/NVlabs/edm2, "dataset-refs"), for 64x64 and 512x512
    DIR/imagenet64, ...256, ...512        a folder of pictures of that size

`python -m companion table imagenet128 --profile paper --data DIR` looks for VIRTUAL_imagenet128_labeled.npz, or a
folder imagenet128. Precision and recall need the 10,000 pictures in ADM's files: a folder has too many, and EDM2's
files have none.

`python -m companion table coco --profile paper --data DIR` takes COCO-2017 as it is unpacked:

    DIR/val2017/*.jpg                     5,000 pictures
    DIR/annotations/captions_val2017.json their captions, of which each picture's first is drawn
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from companion.evaluation.metrics.evaluators import CaptionEvaluator, ClassEvaluator, Reference
from companion.evaluation.metrics.features import FeatureNetwork, extract
from companion.evaluation.metrics.image_sets import ImageSet, captioned_files, open_images, open_picture
from companion.evaluation.metrics.metrics import ClipNetwork
from companion.evaluation.metrics.reference_statistics import read_statistics, statistics_of
from companion.evaluation.sampling.folder import Pixels
from companion.files import read_arrays

COCO_SIZE = 512  # side of the square that a picture of COCO is cut and scaled to
_BATCH = 50
_STATISTICS = {
    64: ("img64.pkl", "img64.npz", "VIRTUAL_imagenet64_labeled.npz"),
    128: ("VIRTUAL_imagenet128_labeled.npz",),
    256: ("VIRTUAL_imagenet256_labeled.npz",),
    512: ("img512.pkl", "img512.npz", "VIRTUAL_imagenet512.npz"),
}


def imagenet_evaluator(network: FeatureNetwork, data: Path, size: int) -> ClassEvaluator:
    """FID and Inception score against ImageNet's statistics, or pictures, in a folder; precision and recall, see above.

    Raises:
        ValueError: the folder has neither; a picture cannot be read or has another size.
    """
    _check_folder(data)
    files = [data / name for name in _STATISTICS[size]]
    file = next((file for file in files if file.is_file()), None)
    if file is not None:
        statistics, name = read_statistics(file), file.name

        def from_file() -> Reference:
            return Reference(statistics, _features_of_pictures_in(file, network), {"statistics": name})

        return ClassEvaluator(network, from_file, {"reference": name}, names_classes=False)
    folder = data / f"imagenet{size}"
    if not folder.is_dir():
        raise ValueError(
            f"{data} holds no reference of {size}x{size} pictures: put {files[0].name}, or a folder {folder.name} of "
            "pictures, there"
        )
    pictures = open_images(folder, at_least=network.dimensions + 1)
    if pictures.size != (size, size):
        raise ValueError(f"the pictures in {folder} must be {size}x{size}, got {pictures.size}")

    def from_pictures() -> Reference:
        return Reference(statistics_of(extract(network, pictures.batches()).features), None, _counted(pictures))

    return ClassEvaluator(network, from_pictures, {"reference": _counted(pictures)}, names_classes=False)


def _features_of_pictures_in(file: Path, network: FeatureNetwork) -> Tensor | None:
    """Features of the pictures that ADM's files hold next to their statistics; None where there are none."""
    if file.suffix != ".npz":
        return None
    pictures = read_arrays(file, ("arr_0",), "statistics file").get("arr_0")
    if pictures is None:
        return None
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
        raise ValueError(f"statistics file {file} holds no pictures but {pictures.dtype} of shape {pictures.shape}")
    return extract(network, (pictures[first : first + _BATCH] for first in range(0, len(pictures), _BATCH))).features


def _counted(pictures: ImageSet) -> dict[str, object]:
    return {"folder": pictures.path.name, "pictures": pictures.number}


def coco_evaluator(network: FeatureNetwork, clip: ClipNetwork, data: Path, captions: int) -> CaptionEvaluator:
    """FID against all pictures of COCO-2017's validation set, and the CLIP score of so many of their captions.

    Pictures of the set have many sizes; each is cut to its central square and scaled to 512 pixels.

    Raises:
        ValueError: a file is missing, the captions do not match the pictures, there are fewer captions than asked for
            or too few pictures for the features, or a picture cannot be read; file and line are named.
    """
    _check_folder(data)
    folder = data / "val2017"
    if not folder.is_dir():
        raise ValueError(f"{data} holds no folder val2017 with COCO's pictures")
    places = (data / "annotations" / "captions_val2017.json", data / "captions_val2017.json")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(f"COCO's captions are missing: neither {places[0]} nor {places[1]} exists")
    pairs = captioned_files(file, folder)
    if len(pairs) < captions:
        raise ValueError(f"caption file {file} has captions of {len(pairs)} pictures, and {captions} are to be drawn")
    if len(pairs) <= network.dimensions:
        raise ValueError(
            f"{folder} holds {len(pairs)} pictures, and the metrics need at least {network.dimensions + 1}"
        )
    for picture, _ in pairs:
        central_square(picture, 8)
    pictures = [picture for picture, _ in pairs]

    def reference() -> Reference:
        features = extract(network, _squares(pictures)).features
        return Reference(statistics_of(features), None, {"coco": file.name, "pictures": len(pictures)})

    described = {"reference": file.name, "pictures": len(pictures), "square": COCO_SIZE}
    return CaptionEvaluator(network, clip, [caption for _, caption in pairs[:captions]], reference, described)


def _check_folder(data: Path) -> None:
    if not data.is_dir():
        raise ValueError(f"there is no reference folder {data}; give one with --data")


def central_square(file: Path, side: int) -> np.ndarray:
    """A picture's central square, scaled, uint8 (side, side, 3).

    Raises:
        ValueError: it cannot be read.
    """
    picture = open_picture(file)
    width, height = picture.size
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    square = picture.crop((left, top, left + short, top + short))
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


def _squares(files: Sequence[Path]) -> Iterator[Pixels]:
    for first in range(0, len(files), _BATCH):
        yield np.stack([central_square(file, COCO_SIZE) for file in files[first : first + _BATCH]])
