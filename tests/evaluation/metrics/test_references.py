"""The papers' references in files: everything wrong with them is said before sampling, with file and line."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from companion.evaluation.metrics import references
from companion.evaluation.metrics.evaluators import Evaluator
from companion.evaluation.metrics.features import Features, extract
from companion.evaluation.metrics.metrics import clip_score, precision_recall
from companion.evaluation.metrics.reference_statistics import statistics_of
from companion.evaluation.metrics.references import central_square, coco_evaluator, imagenet_evaluator
from companion.evaluation.sampling.folder import read_batches
from companion.evaluation.studies.guidance_rows import Row
from companion.evaluation.studies.guidance_table import GuidancePlan
from companion.evaluation.tables.engine import RunOptions, run_table
from companion.evaluation.tables.results import Cell
from tests.evaluation.scene_pipelines import captioned_sd, scene_dit


class Colours:
    """Mean colour, and four logits made of it."""

    name, dimensions = "colours", 3

    def __call__(self, images: Tensor) -> Features:
        means = images.float().mean(dim=(2, 3)) / 255
        return Features(means, torch.cat([means, means[:, :1] * 3], dim=1))


class Clip:
    """Embeddings in three dimensions: mean colour; letters r, g, b of a caption."""

    name = "letters"

    def embed_images(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))

    def embed_captions(self, captions: list[str]) -> Tensor:
        return torch.tensor([[1.0 + caption.count(letter) for letter in "rgb"] for caption in captions])


SIZES = [(40, 30), (30, 30), (24, 50), (33, 31), (64, 64)]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Five pictures of many sizes, each with two captions."""
    folder = tmp_path / "coco"
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    noise = np.random.default_rng(0)
    images, annotations = [], []
    for i, (width, height) in enumerate(SIZES):
        pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "val2017" / f"{i:012d}.png")
        images.append({"id": i, "file_name": f"{i:012d}.png"})
        annotations += [{"id": 10 * i + k, "image_id": i, "caption": f"{'rgb'[i % 3] * k} thing"} for k in (2, 1)]
    described = {"images": images, "annotations": annotations}
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(described, indent=1))
    return folder


def measured(evaluator: Evaluator, pipe: DiffusionPipeline, out: Path, **sizes: int) -> Cell:
    """A table of one cell, drawn by the pipeline."""
    row = Row("model", "vanilla", "constant", "none", 2.0, 2)
    plan = GuidancePlan(rows=(row,), evaluators=lambda plan: lambda model: evaluator, load=lambda name: pipe, **sizes)
    [cell] = run_table(plan, RunOptions(out, progress=False, keep_samples=True))
    return cell


def test_coco(coco, tmp_path):
    evaluator = coco_evaluator(Colours(), Clip(), coco, 5)
    evaluator.check()
    pipe = captioned_sd(tmp_path / "sd")
    captions = evaluator.conditions(pipe)
    assert captions == ("r thing", "g thing", "b thing", "r thing", "g thing")  # each picture's first, by number
    cell = measured(evaluator, pipe, tmp_path / "out", num_samples=5, batch_size=2)
    assert set(cell.figures) == {"fid", "clip_score"} and cell.settings["clip"] == "letters"
    assert cell.provenance["reference"] == {"coco": "captions_val2017.json", "pictures": 5}
    shards = sorted((tmp_path / "out" / "samples").glob("*/shards/*.npz"))
    drawn = torch.from_numpy(np.concatenate([np.load(shard)["images"] for shard in shards])).permute(0, 3, 1, 2)
    said = Clip().embed_captions(list(captions))
    assert cell.figures["clip_score"].value == pytest.approx(clip_score(Clip().embed_images(drawn), said).value)


def test_the_central_square(tmp_path):
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40, 0], pixels[:, 40:, 1] = 255, 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    square = central_square(tmp_path / "wide.png", 10)
    assert square.shape == (10, 10, 3) and (square == [255, 0, 0]).all()


def spoil(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def spoiled(coco: Path) -> None:
        file = coco / "annotations" / "captions_val2017.json"
        described = json.loads(file.read_text())
        change(described)
        file.write_text(json.dumps(described))

    return spoiled


def broken_json(coco: Path) -> None:
    file = coco / "annotations" / "captions_val2017.json"
    file.write_text(file.read_text().replace('"annotations": [', '"annotations": {', 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda coco: coco.rename(coco.parent / "gone"), "there is no reference folder .*coco; give one with --data"),
        (lambda coco: (coco / "val2017").rename(coco / "x"), "coco holds no folder val2017"),
        (lambda coco: (coco / "annotations").rename(coco / "x"), "captions are missing: neither .*captions_val2017"),
        (broken_json, r"captions_val2017.json, line \d+, is damaged, it is not JSON"),
        (spoil(lambda d: d["annotations"].pop(0) and d["annotations"].pop(0)), "has no caption of image 0"),
        (spoil(lambda d: d["images"][4].update(file_name="z.png")), "caption of 'z.png', which is not in .*val2017"),
        (spoil(lambda d: (d["images"].pop(), d["annotations"].pop(), d["annotations"].pop())),
         "has no caption of .*000000000004.png"),
        (lambda coco: (coco / "val2017" / "000000000003.png").write_bytes(b"no picture"),
         "000000000003.png cannot be read as a picture"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_coco(coco, damage, message):
    damage(coco)
    with pytest.raises(ValueError, match=message):
        coco_evaluator(Colours(), Clip(), coco, 5)


def test_too_few(coco):
    with pytest.raises(ValueError, match="has captions of 5 pictures, and 6 are to be drawn"):
        coco_evaluator(Colours(), Clip(), coco, 6)
    network = Colours()
    network.dimensions = 5
    with pytest.raises(ValueError, match=r"val2017 holds 5 pictures, and the metrics need at least 6"):
        coco_evaluator(network, Clip(), coco, 5)


def pictures(folder: Path, count: int, side: int = 64) -> Path:
    folder.mkdir(parents=True)
    noise = np.random.default_rng(1)
    for i in range(count):
        Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_precision_and_recall_against_the_pictures_with_adms_statistics(tmp_path):
    taken = np.random.default_rng(2).integers(0, 256, (120, 8, 8, 3), dtype=np.uint8)
    expected = extract(Colours(), [taken]).features
    statistics = statistics_of(expected)
    file = tmp_path / "VIRTUAL_imagenet128_labeled.npz"
    np.savez(file, arr_0=taken, mu=statistics.mean.numpy(), sigma=statistics.covariance.numpy())
    evaluator = imagenet_evaluator(Colours(), tmp_path, 128)
    cell = measured(evaluator, scene_dit(), tmp_path / "out", num_samples=6, batch_size=3)
    assert set(cell.figures) == {"fid", "inception_score", "precision", "recall"}
    folder = tmp_path / "out" / "samples" / cell.name
    drawn = extract(Colours(), [images for images, _ in read_batches(folder)]).features
    found = [cell.figures[name].value for name in ("precision", "recall")]
    assert found == [figure.value for figure in precision_recall(expected, drawn, neighbours=3)]


def test_imagenet_in_pictures_and_in_statistics(tmp_path):
    folder = pictures(tmp_path / "imagenet64", 6)
    evaluator = imagenet_evaluator(Colours(), tmp_path, 64)
    evaluator.check()
    assert evaluator.described["reference"] == {"folder": "imagenet64", "pictures": 6}
    taken = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.iterdir())])
    expected = statistics_of(extract(Colours(), [taken]).features)
    assert evaluator.reference() == {"folder": "imagenet64", "pictures": 6}
    np.savez(tmp_path / "img64.npz", mu=expected.mean.numpy(), sigma=expected.covariance.numpy())
    other = imagenet_evaluator(Colours(), tmp_path, 64)
    other.check()
    assert other.described["reference"] == "img64.npz"  # a file comes before the pictures
    figures = []
    pipe = scene_dit()
    for number, measured_by in enumerate((evaluator, other)):
        cell = measured(measured_by, pipe, tmp_path / str(number), num_samples=6, batch_size=3)
        assert set(cell.figures) == {"fid", "inception_score"}
        figures.append(cell.figures["fid"].value)
    assert figures[0] == pytest.approx(figures[1], rel=1e-9)


def test_what_is_wrong_with_imagenet(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no reference of 256x256 pictures: put VIRTUAL_imagenet256_labeled"):
        imagenet_evaluator(Colours(), tmp_path / "empty", 256)
    folder = pictures(tmp_path / "few" / "imagenet64", 3)
    with pytest.raises(ValueError, match="imagenet64 holds 3 pictures, and the metrics need at least 4"):
        imagenet_evaluator(Colours(), tmp_path / "few", 64)
    for i in range(3, 6):
        Image.new("RGB", (64, 64)).save(folder / f"{i}.png")
    Image.new("RGB", (64, 60)).save(folder / "6.png")
    with pytest.raises(ValueError, match=r"must have one size: .*6.png has 64x60"):
        imagenet_evaluator(Colours(), tmp_path / "few", 64)
    pictures(tmp_path / "small" / "imagenet64", 5, 32)
    with pytest.raises(ValueError, match=re.escape("imagenet64 must be 64x64, got (32, 32)")):
        imagenet_evaluator(Colours(), tmp_path / "small", 64)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "img64.pkl").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"img64\.pkl cannot be read"):
        imagenet_evaluator(Colours(), tmp_path / "damaged", 64)


def test_a_reference_of_another_network_is_refused_before_sampling(tmp_path, monkeypatch):
    np.savez(tmp_path / "img64.npz", mu=np.zeros(2), sigma=np.eye(2))
    evaluator = imagenet_evaluator(Colours(), tmp_path, 64)
    with pytest.raises(ValueError, match=r"2 features, and colours has 3: .*img64.npz"):
        measured(evaluator, scene_dit(), tmp_path / "out", num_samples=6)
    assert not (tmp_path / "out").exists()


def test_the_files_are_described_for_people():
    for name in {name for names in references._STATISTICS.values() for name in names[:1]} | {"captions_val2017.json"}:
        assert name in references.__doc__
