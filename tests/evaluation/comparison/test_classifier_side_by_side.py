"""Both sides of a comparison of classifier guidance against plain calls of the pipeline."""

import numpy as np
import pytest
import torch
from PIL import Image

import companion
from companion.evaluation.comparison.classifier_side_by_side import ClassifierSettings, with_classifier
from companion.evaluation.comparison.side_by_side import compare
from companion.guidance.classifier.scores import ClassifierScore
from companion.minis.classifier import load_classifier
from companion.minis.scenes import SHAPES, labels, render, scene
from companion.pipelines.adm.pipeline import ADMPipeline
from companion.pipelines.capabilities import class_names, class_number
from tests.evaluation.scene_pipelines import scene_adm, scene_dit, scene_resnet

JENSEN_SHANNON = ClassifierScore(marginal_temperature=0.5, divergence="jensen_shannon", strength=2.0, smoothing=0.8)


@pytest.fixture(scope="module")
def pipe():
    pipe = scene_adm()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, product: str, seed: int = 0, **call) -> np.ndarray:
    with companion.rectified_guidance(pipe, companion.RectifiedGuidanceConfig(product=product)):
        return pipe([3, 4, 3], generator=companion.sample_generators(seed, range(3)), output_type="np", **call).images


def pictures(view) -> np.ndarray:
    return np.stack([np.asarray(image) for image in view.side.images])


@pytest.mark.parametrize("compared", ["rectification", "score"])
def test_each_side_is_a_call_of_the_pipeline(pipe, compared):
    settings = ClassifierSettings(
        [3, 4, 3], compared, JENSEN_SHANNON, 3.0, "clean", -0.2, "vjp", "ddpm", 4, unconditional=True, seed=5
    )
    call = {
        "num_inference_steps": 4,
        "sampler": "ddpm",
        "classifier_scale": 3.0,
        "gradient_at": "clean",
        "unconditional": True,
        "seed": 5,
    }
    plain = {"score": ClassifierScore()} if compared == "score" else {"score": JENSEN_SHANNON, "tilt": -0.2}
    expected = [
        drawn(pipe, "vjp" if compared == "score" else "none", **plain, **call),
        drawn(pipe, "vjp", score=JENSEN_SHANNON, tilt=-0.2, **call),
    ]
    states = []
    made = compare(pipe, settings, on_progress=states.append)
    for view, images in zip((made.without, made.with_reg), expected, strict=True):
        np.testing.assert_array_equal(pictures(view), (images * 255).round().astype(np.uint8))
        assert view.side.peak_bytes > 0 and view.side.seconds > 0 and view.total == 4
    assert not np.array_equal(*(pictures(view) for view in (made.without, made.with_reg)))
    previews = [state.with_reg.images for state in states if state.with_reg.step == 3]
    assert previews and all(image.size == (32, 32) for image in previews[0])
    assert pipe._rectification is None and type(pipe.scheduler).__name__ == "DDPMScheduler"


def test_the_evaluator_knows_half_size_scenes():
    """Verdicts on enlarged pictures: the shipped classifier still tells the shapes apart."""
    chosen = [scene(55, i, 1) for i in range(60)]
    small = torch.nn.functional.avg_pool2d(render(chosen), 2)

    class Painter(ADMPipeline):
        def __call__(self, class_labels, **others):
            pixels = ((small[: len(class_labels)].permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
            return type("Output", (), {"images": [Image.fromarray(picture) for picture in pixels]})

    own = scene_adm()
    painter = Painter(own.unet, own.classifier, own.scheduler, null_class=10)
    settings = ClassifierSettings(labels(chosen).tolist(), steps=1)
    found = compare(painter, settings, evaluator=load_classifier()).without.side
    assert found.recognised >= 54


def test_a_classifier_without_names_keeps_the_models():
    own = scene_adm()
    guide = scene_resnet()
    guide.config.id2label = {i: f"LABEL_{i}" for i in range(10)}
    guided = with_classifier(own, guide)
    assert tuple(class_names(guided).values()) == SHAPES == tuple(class_names(own).values())
    assert class_number(guided, "star") == 3 == class_number(guided, "3") and own.classifier is not guide
    nameless = ADMPipeline(own.unet, guide, own.scheduler, null_class=10)
    assert class_names(nameless) == {i: str(i) for i in range(10)}


def test_a_run_that_diverges_says_so(pipe):
    with pytest.raises(ValueError, match="the sampling diverged at step 1 of 2"):
        compare(pipe, ClassifierSettings([0], classifier_scale=1e300, steps=2, product="vjp"))
    assert pipe._rectification is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"conditions": []}, "conditions must hold at least one class"),
        ({"compared": "both"}, "compared must be one of rectification, score, got 'both'"),
        ({"classifier_scale": -1.0}, "classifier_scale must be a number of at least 0, got -1.0"),
        ({"tilt": float("nan")}, "tilt must be a number"),
        ({"steps": 0}, "steps must be an integer from 1 to 1000, got 0"),
        ({"product": "mean"}, "product must be one of"),
        ({"product": "covariance"}, "use another product"),
        ({"product": "none"}, "both sides are the same; choose a product"),
        ({"compared": "score"}, "both sides are the same; choose a divergence"),
        ({"seed": -1}, "seed must"),
    ],
)
def test_settings_are_checked(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ClassifierSettings(**{"conditions": [0], **options})


def test_pipelines_are_checked(pipe):
    settings = ClassifierSettings([0], unconditional=True)
    with pytest.raises(ValueError, match="DiTPipeline is not guided by a classifier"):
        settings.check(scene_dit())
    with pytest.raises(ValueError, match="has no classifier"):
        settings.check(ADMPipeline(pipe.unet, None, pipe.scheduler, null_class=10))
    with pytest.raises(ValueError, match="the classifier must have 10 classes, as many as the network, but it has 7"):
        settings.check(with_classifier(pipe, scene_resnet(7)))
    with pytest.raises(ValueError, match="unknown class '10': the model draws circle, square"):
        ClassifierSettings([10]).check(pipe)
    with pytest.raises(ValueError, match="unconditional must be off"):
        settings.check(ADMPipeline(pipe.unet, scene_resnet(11), pipe.scheduler))
    settings.check(pipe)
