"""Feature networks, and the sets of pictures they look at: what is wrong with one is said before measuring."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from companion.evaluation.metrics.features import InceptionFeatures, RegressorFeatures, SceneFeatures, extract
from companion.evaluation.metrics.image_sets import captioned_files, open_images
from companion.evaluation.sampling.runs import sample
from companion.evaluation.sampling.settings import SamplingSettings
from companion.minis.classifier import load_classifier
from companion.minis.scene_regressor import load_regressor
from companion.minis.scenes import labels, render, scene
from tests.pipelines.tiny import tiny_dit


def scenes(number: int) -> np.ndarray:
    pictures = render([scene(31, i, 1) for i in range(number)])
    return ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def save(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
    return folder


def test_scene_features_are_the_classifiers():
    pixels, network = scenes(12), SceneFeatures()
    found = extract(network, iter([pixels[:5], pixels[5:]]))
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    evaluator = load_classifier()
    with torch.no_grad():
        assert torch.allclose(found.logits, evaluator(scaled), atol=1e-4)
        head = evaluator.network.classifier[-1]
        assert torch.allclose(found.features @ head.weight.T + head.bias, found.logits, atol=1e-4)
    assert found.features.shape == (12, network.dimensions) == (12, 128)
    assert (found.logits.argmax(dim=1) == labels([scene(31, i, 1) for i in range(12)])).float().mean() > 0.9
    with pytest.raises(ValueError, match="must be 3x64x64 for scene-classifier"):
        network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no pictures"):
        extract(network, iter([]))


def test_inception_is_an_extra_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r'need the extra: pip install -e "\.\[inception\]"'):
        InceptionFeatures()


def test_inception_gives_features_and_logits(monkeypatch):
    """With a module of the extra's form in its place: what is asked of it, and in which order its parts come back."""
    asked = []

    class Extractor(torch.nn.Module):
        def __init__(self, name: str, parts: list[str]) -> None:
            super().__init__()
            asked.append((name, parts))

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert images.dtype == torch.uint8
            return torch.zeros(len(images), 2048), torch.ones(len(images), 1008)

    module = type(sys)("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", type(sys)("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    network = InceptionFeatures()
    found = extract(network, iter([np.zeros((3, 8, 8, 3), np.uint8)]))
    assert asked == [("inception-v3-compat", ["2048", "logits_unbiased"])]
    assert found.features.shape == (3, network.dimensions) and found.logits.shape == (3, 1008)


def test_runs_folders_and_arrays_are_one(tmp_path):
    settings = SamplingSettings("tiny", 5, (1, 2), batch_size=2, steps=1)
    run = sample(tiny_dit(), settings, tmp_path / "run", progress=False)
    pixels = np.concatenate(list(open_images(run).batches()))
    np.savez(tmp_path / "adm.npz", arr_0=pixels)
    sets = [open_images(path) for path in (run, save(tmp_path / "files", pixels), tmp_path / "adm.npz")]
    assert [found.kind for found in sets] == ["run", "files", "array"]
    for found in sets:
        assert found.number == 5 and np.array_equal(np.concatenate(list(found.batches())), pixels)
        assert found.size in (None, (16, 16))
    with pytest.raises(ValueError, match="holds 5 pictures, and the metrics need at least 6"):
        open_images(run, at_least=6)


def test_what_is_wrong_with_pictures_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no pictures"):
        open_images(tmp_path / "empty")
    folder = save(tmp_path / "files", scenes(3))
    Image.new("RGB", (64, 32)).save(folder / "odd.jpg")
    with pytest.raises(ValueError, match=r"one size: .*odd\.jpg has 64x32 and .*000\.png 64x64"):
        open_images(folder)
    (folder / "odd.jpg").unlink()
    content = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"001\.png cannot be read as a picture"):
        open_images(folder)
    np.savez(tmp_path / "floats.npz", images=np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"floats\.npz must hold uint8 pictures .* got float64"):
        open_images(tmp_path / "floats.npz")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="holds mu, and no images or arr_0"):
        open_images(tmp_path / "other.npz")
    np.savez(tmp_path / "odd.npz", **{"\n\x1b[31m": np.zeros(3)})
    with pytest.raises(ValueError, match=r"holds \\n, and no images or arr_0"):
        open_images(tmp_path / "odd.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.npz cannot be read as a npz file"):
        open_images(tmp_path / "text.npz")


def test_captions_match_their_pictures(tmp_path):
    folder, file = save(tmp_path / "files", scenes(2)), tmp_path / "captions.txt"
    file.write_text("000.png\ta red star\n001.png\ta ring\n")
    assert captioned_files(file, folder) == [(folder / "000.png", "a red star"), (folder / "001.png", "a ring")]
    for content, words in (
        ("000.png\ta star\n", r"captions\.txt has no caption of .*001\.png"),
        ("000.png a star\n", r"captions\.txt, line 1, is not NAME<tab>CAPTION"),
        ("000.png\ta star\n\n", r"captions\.txt, line 2, is not NAME<tab>CAPTION"),
        ("000.png\ta star\n002.png\ta ring\n", r"line 2, has a caption of '002\.png', which is not in"),
        ("000.png\ta star\n000.png\ta ring\n", r"line 2, has a second caption of '000\.png'"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=words):
            captioned_files(file, folder)
    coco = tmp_path / "captions.json"
    images = [{"id": i, "file_name": f"00{i}.png"} for i in range(3)]
    said = [{"id": i, "image_id": i, "caption": "a star"} for i in range(3)]
    coco.write_text(json.dumps({"images": images, "annotations": said}))
    with pytest.raises(ValueError, match=r"captions\.json has a caption of '002\.png', which is not in"):
        captioned_files(coco, folder)


def test_regressor_features_are_the_regressors():
    pixels, network = scenes(6), RegressorFeatures()
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    found, regressor = network(images), load_regressor()
    assert found.features.shape == (6, network.dimensions) == (6, 136)
    guess = regressor(images.float() / 127.5 - 1)
    assert torch.allclose(found.logits, guess.shape, atol=1e-5)
    head = regressor.network.classifier[-1]
    light = (found.features @ head.weight.T + head.bias)[:, -10:-8]
    assert torch.allclose(torch.atan2(light[:, 0], light[:, 1]), guess.light, atol=1e-4)
    with pytest.raises(ValueError, match="must be 3x64x64 for scene-regressor"):
        network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
