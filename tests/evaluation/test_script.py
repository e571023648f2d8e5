"""The script is run, and its pictures are compared with those it promises."""

import numpy as np
import pytest
import torch
from PIL import Image

from companion.evaluation.script import as_python
from companion.evaluation.side_by_side import Settings, compare
from companion.guidance.weights import ConstantWeight, IntervalWeight, LinearWeight, PowerCosineWeight
from companion.pipelines.registry import load
from tests.evaluation.scene_pipelines import save_scene_dit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_scene_dit(tmp_path_factory.mktemp("pipelines") / "scenes")


@pytest.mark.parametrize(
    "settings",
    [
        Settings([3, 4, 3], steps=5),
        Settings([0], steps=7, seed=12, guidance_scale=2.5, product="ones", scheduler="PNDMScheduler"),
        Settings([9, 1], steps=6, weight=IntervalWeight(205.0, 502.0), scheduler="UniPCMultistepScheduler"),
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
    told = as_python("mini-dit", pipe, Settings([3]), device="cuda:1", dtype=torch.bfloat16)
    assert 'companion.load("mini-dit", device="cuda:1", dtype=torch.bfloat16)' in told and "import torch\n" in told
    assert max(map(len, told.splitlines())) <= 120


def test_prompts_stay_what_they_are(tmp_path):
    from tests.evaluation.scene_pipelines import captioned_sd

    prompts = ['a "red" star', "it's a heart\\n", "{x}"]
    source = as_python("mini-sd", captioned_sd(tmp_path), Settings(prompts))
    scope: dict = {}
    exec(source[source.index("conditions = ") : source.index("\nfor side")], scope)
    assert scope["conditions"] == prompts
