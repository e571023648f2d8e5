"""The demo's tab of classifier guidance through its API; the page itself is driven in test_browser.py."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError

from companion.evaluation.comparison.classifier_side_by_side import ClassifierSettings
from companion.evaluation.comparison.side_by_side import compare
from companion.guidance.classifier.scores import DIVERGENCES, ClassifierScore
from companion.guidance.rectification import PRODUCTS
from companion.minis.scenes import SHAPES
from companion.page import Models, build_page, serve
from companion.page.classifier_tab import DIVERGENCE_NAMES, NO_DIVERGENCE, PRODUCT_NAMES, read
from companion.page.models import embedded_names
from companion.pipelines.registry import WEIGHTS, load, model_names
from tests.evaluation.scene_pipelines import scene_adm, scene_dit, scene_resnet
from tests.page.test_page import OUTPUTS, free_port, pixels, statuses, wait_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    saved = tmp_path_factory.mktemp("pipelines") / "adm"
    scene_adm().save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def models(folder) -> Models:
    models = Models(str(folder), load(folder))
    models.distances = None
    models.evaluator = lambda images: torch.nn.functional.one_hot(torch.full((len(images),), 4), len(SHAPES)).float()
    return models


@pytest.fixture(scope="module")
def server(models) -> Iterator[Any]:
    page = serve(models, host="127.0.0.1", port=free_port())
    yield page
    page.close(verbose=False)


@pytest.fixture
def client(server) -> Client:
    return Client(server.local_url, verbose=False)


def generate(client: Client, **chosen: Any) -> dict[str, Any]:
    asked = {"classes": ["star", "heart"], "steps": 3, "pictures": 2} | chosen
    return dict(zip(OUTPUTS, client.predict(**asked, api_name="/generate_classifier_guided"), strict=False))


def test_every_divergence_and_product_can_be_chosen():
    assert set(DIVERGENCE_NAMES) == {NO_DIVERGENCE, *DIVERGENCES}
    assert set(PRODUCT_NAMES) == {*PRODUCTS, "auto"}


def test_both_sides_are_what_the_library_makes(client, folder):
    made = generate(
        client,
        pictures=3,
        compared="score",
        divergence="forward_kl",
        strength=0.5,
        smoothing=0.7,
        marginal_temperature=0.5,
        tilt=-0.2,
        classifier_scale=3,
        gradient_at="clean",
        product="vjp",
        sampler="ddpm",
        conditional=True,
        seed=7,
    )
    score = ClassifierScore(marginal_temperature=0.5, divergence="forward_kl", strength=0.5, smoothing=0.7)
    settings = ClassifierSettings([3, 4, 3], "score", score, 3.0, "clean", -0.2, "vjp", "ddpm", 3, seed=7)
    expected = compare(load(folder), settings)
    for name, view in (("without", expected.without), ("with_reg", expected.with_reg)):
        np.testing.assert_array_equal(pixels(made[name]), np.stack([np.asarray(image) for image in view.side.images]))
        assert made["report"][name]["seconds"] > 0 and made["report"][name]["peak_mebibytes"] > 0
        assert made["report"][name]["recognised"] == 1  # the classifier here sees hearts only
        assert [shown["caption"][0] for shown in made[name]] == ["✗", "✓", "✗"]
    assert "ClassifierScore(marginal_temperature=0.5" in made["script"]
    compile(made["script"], "script", "exec")


def test_another_classifier_can_be_named(client, tmp_path):
    torch.manual_seed(1)
    other = scene_resnet()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.save_pretrained(tmp_path)
    own, changed = generate(client, classifier="its own"), generate(client, classifier=str(tmp_path))
    assert not np.array_equal(pixels(own["without"]), pixels(changed["without"]))
    assert str(tmp_path) in changed["script"] and "off_the_shelf" not in own["script"]


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
        ({"pictures": None}, "pictures must be a whole number from 1 to 16, got nothing"),
        ({"joint_temperature": 0}, "τ1 must be a number from 0.01 to 100, got 0"),
        ({"marginal_temperature": "hot"}, "τ2 must be a number from 0.01 to 100, got 'hot'"),
        ({"divergence": "chi"}, "divergence must be one of none, reverse_kl"),
        ({"divergence": "reverse_kl", "smoothing": 1.5}, "smoothing ε must be a number from 0 to 1, got 1.5"),
        ({"divergence": "reverse_kl", "strength": -1}, "strength a must be a number from 0 to 1000, got -1"),
        ({"divergence": "forward_kl", "smoothing": 1}, "forward_kl is infinite at smoothing=1"),
        ({"tilt": ""}, "tilt must be a number from -100 to 100, got nothing"),
        ({"classifier_scale": "much"}, "classifier scale must be a number from 0 to 1000, got 'much'"),
        ({"gradient_at": "there"}, "gradient at must be one of as trained, noisy, clean"),
        ({"compared": "both"}, "compared must be one of rectification, score"),
        ({"compared": "score"}, "both sides are the same; choose a divergence"),
        ({"product": "none"}, "both sides are the same; choose a product"),
        ({"product": "covariance"}, "product must be one of auto, none, ones"),
        ({"sampler": "euler"}, "sampler must be one of ddpm, ddim, got 'euler'"),
        ({"classes": ["dragon"]}, "unknown class 'dragon': the model draws circle, square"),
        ({"classes": []}, "say what to draw"),
        ({"model": ""}, "choose a model"),
        ({"model": "/nowhere/at/all"}, "is not known"),
        ({"model": "mini-dit"}, "is not guided by a classifier: choose an ADM pipeline"),
        ({"classifier": "/nowhere/at/all"}, "classifier '/nowhere/at/all' is unavailable"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"classifier_scale": 1000, "gradient_at": "nowhere"}, "gradient at must be one of"),
    ],
)
def test_bad_input_gets_one_sentence(client, chosen, sentence):
    began = time.monotonic()
    with pytest.raises(AppError) as caught:
        generate(client, **chosen)
    assert time.monotonic() - began < 5
    said = str(caught.value)
    assert sentence in said and "\n" not in said and "Traceback" not in said


def test_both_tabs_share_the_machine_and_each_has_its_own_stop(server):
    one, other = (Client(server.local_url, verbose=False) for _ in range(2))
    long = one.submit(classes=["star"], steps=1000, pictures=16, api_name="/generate_classifier_guided")
    wait_for(lambda: any("Sampling without rectification" in said for said in statuses(long)))
    waiting = other.submit(model="mini-dit", classes=["star"], steps=2, pictures=1, api_name="/generate")
    wait_for(lambda: any("Waiting: one run is ahead of you" in said for said in statuses(waiting)))
    one.predict(api_name="/cancel")  # the other tab's
    assert not long.done()
    one.predict(api_name="/cancel_classifier_guided")
    wait_for(long.done)
    assert "Cancelled at step" in statuses(long)[-1] and "without rectification" in statuses(long)[-1]
    assert len(waiting.result(timeout=60)[1]) == 1


def test_models_go_to_the_tab_of_their_kind(models, folder):
    assert not set(models.names) & set(models.guided_names) and str(folder) == models.guided_first
    kinds = {
        name: json.loads((WEIGHTS / name / "model_index.json").read_text())["_class_name"] for name in model_names()
    }
    assert embedded_names(classifier_guided=True) == tuple(n for n, kind in kinds.items() if kind == "ADMPipeline")
    unguided = embedded_names(classifier_guided=False)
    assert set(unguided) == {n for n, kind in kinds.items() if kind != "ADMPipeline"} and unguided[0] == "mini-sd"
    with pytest.raises(ValueError, match="is guided by a classifier: choose it in the tab 'Classifier guidance'"):
        models.pipe(str(folder))


def test_a_page_for_strangers_offers_only_what_its_owner_chose(folder, tmp_path):
    models = Models(str(folder), load(folder), local_only=True)
    with pytest.raises(ValueError, match="is not offered on this page"):
        models.guided("owner/model")
    scene_resnet().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier .* is not offered on this page"):
        models.guided(str(folder), str(tmp_path))
    assert models.guided(str(folder)) is models.guided(str(folder))


def test_without_a_model_for_it_the_tab_is_there_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("companion.page.models.model_names", lambda: ("mini-dit",))
    models = Models("dit", scene_dit())
    assert models.guided_first is None
    build_page(models)
    made = {"compared": "score", "divergence": "none", "gradient_at": "as trained", "product": "vjp", "sampler": "ddim"}
    numbers = {"joint_temperature": 1, "marginal_temperature": 1, "tilt": 0, "classifier_scale": 1}
    counts = {"steps": 3, "pictures": 1, "seed": 0}
    asked = {"model": None, "classifier": None, "classes": ["star"], "conditional": False}
    with pytest.raises(ValueError, match="choose a model"):
        read(models, {**asked, **made, **numbers, **counts})
