"""The script is run, and its pictures are compared with those it promises."""

import numpy as np
import pytest
import torch
from PIL import Image

from companion.evaluation.comparison.classifier_side_by_side import ClassifierSettings, with_classifier
from companion.evaluation.comparison.script import as_python, classifier_as_python
from companion.evaluation.comparison.side_by_side import Settings, compare
from companion.guidance.classifier.scores import ClassifierScore
from companion.guidance.weights import ConstantWeight, IntervalWeight, LinearWeight, PowerCosineWeight
from companion.pipelines.registry import load
from tests.evaluation.scene_pipelines import save_scene_dit, scene_adm, scene_resnet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_scene_dit(tmp_path_factory.mktemp("pipelines") / "scenes")


@pytest.mark.parametrize(
    "settings",
    [
        Settings([3, 4, 3], steps=5),
        Settings([0], steps=7, seed=12, guidance_scale=2.5, product="ones", scheduler="PNDMScheduler"),
        Settings(
            [9, 1], steps=6, weight=IntervalWeight(205.0, 502.0, unit="timestep"), scheduler="UniPCMultistepScheduler"
        ),
        Settings([2], steps=4, weight=LinearWeight(0.5, 2.0), product="diagonal"),
        Settings([2], steps=4, weight=PowerCosineWeight(2.0, 1.5), product="jvp", scheduler="DDIMScheduler"),
        Settings([2], steps=4, weight=ConstantWeight(0.5)),
    ],
    ids=lambda settings: f"{settings.product}-{type(settings.weight).__name__}",
)
def test_script_makes_exactly_these_pictures(folder, tmp_path, monkeypatch, settings):
    pipe = load(folder)
    source = as_python(str(folder), pipe, settings)
    made = compare(pipe, settings)
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "script", "exec"), {})
    for name, view in (("without", made.without), ("with", made.with_reg)):
        for index, image in enumerate(view.side.images):
            np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"{name}-{index}.png")), np.asarray(image))
    assert len(list(tmp_path.glob("*.png"))) == 2 * len(settings.conditions)


def test_script_says_device_and_dtype_only_where_they_are_not_the_default(folder):
    pipe = load(folder)
    plain = as_python("mini-dit", pipe, Settings([3, 4]))
    assert 'pipe = companion.load("mini-dit")\n' in plain and "import torch" not in plain and "# star, heart" in plain
    text = as_python("mini-dit", pipe, Settings([3]), device="cuda:1", dtype=torch.bfloat16)
    assert 'companion.load("mini-dit", device="cuda:1", dtype=torch.bfloat16)' in text and "import torch\n" in text
    assert max(map(len, text.splitlines())) <= 120


def test_prompts_stay_what_they_are(tmp_path):
    from tests.evaluation.scene_pipelines import captioned_sd

    prompts = ['a "red" star', "it's a heart\\n", "{x}"]
    source = as_python("mini-sd", captioned_sd(tmp_path), Settings(prompts))
    scope: dict = {}
    exec(source[source.index("conditions = ") : source.index("\nfor side")], scope)
    assert scope["conditions"] == prompts


@pytest.mark.parametrize(
    "settings",
    [
        ClassifierSettings([3, 4], steps=3, unconditional=True, gradient_at="clean"),
        ClassifierSettings(
            [9],
            "score",
            ClassifierScore(1.0, 0.5, "squared_hellinger", 0.7, 0.8, entropy=0.1),
            tilt=-0.2,
            classifier_scale=2.5,
            product="none",
            sampler="ddpm",
            steps=4,
            seed=3,
        ),
    ],
    ids=["rectification", "score"],
)
def test_scripts_of_classifier_guidance(tmp_path, monkeypatch, settings):
    scene_adm().save_pretrained(tmp_path / "adm")
    torch.manual_seed(1)
    scene_resnet().save_pretrained(tmp_path / "guide")
    own = load(tmp_path / "adm")
    other = with_classifier(own, type(own.classifier).from_pretrained(tmp_path / "guide").eval())
    drawn = []
    for number, (pipe, guide) in enumerate(((own, None), (other, str(tmp_path / "guide")))):
        source = classifier_as_python(str(tmp_path / "adm"), pipe, settings, classifier=guide)
        assert max(map(len, source.splitlines())) <= 120 + 2 * len(str(tmp_path))
        made = compare(pipe, settings)
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        exec(compile(source, "script", "exec"), {})
        assert len(list(folder.glob("*.png"))) == 2 * len(settings.conditions)
        for name, view in (("without", made.without), ("with", made.with_reg)):
            for index, image in enumerate(view.side.images):
                np.testing.assert_array_equal(np.asarray(Image.open(f"{name}-{index}.png")), np.asarray(image))
                drawn.append(np.asarray(image))
    assert len({picture.tobytes() for picture in drawn}) == len(drawn)  # methods and classifiers matter
