"""Loading models by name, without a network."""

import inspect
import time

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

import companion
from companion.pipelines import registry
from companion.pipelines.edm2.pipeline import EDM2Pipeline
from tests.pipelines.tiny import tiny_dit


def test_local_folder_round_trip(tmp_path):
    pipe = tiny_dit(dtype=torch.float32)
    pipe.save_pretrained(tmp_path / "model")
    loaded = companion.load(tmp_path / "model")
    assert isinstance(loaded.scheduler, DDIMScheduler) and not loaded.transformer.training
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[name], value)
    assert companion.load(str(tmp_path / "model"), dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def refused(name: object, **options: object) -> str:
    started = time.monotonic()
    with pytest.raises(ValueError) as caught:
        companion.load(name, **options)
    assert time.monotonic() - started < 5
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_names_list_the_known_ones():
    message = refused("mini-dot")
    assert "'mini-dot' is not known" in message
    assert all(name in message for name in (*companion.model_names(), *companion.PAPER_MODELS))
    assert "is not known" in refused("./no/such/folder")
    assert "is not known" in refused("weights.safetensors")


def test_hub_name_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "'owner/model' is unavailable, no connection" in refused("owner/model")


def test_a_folder_that_is_no_pipeline(tmp_path):
    assert "holds no diffusers pipeline: it has no model_index.json" in refused(tmp_path)
    (tmp_path / "model_index.json").write_text("{ not json")
    assert "model_index.json, line 1, is damaged, it is not JSON" in refused(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    assert "cannot be loaded as a diffusers pipeline" in refused(tmp_path)
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}'
    )
    assert "cannot be loaded as a diffusers pipeline" in refused(tmp_path)


def test_a_device_that_is_not_there(tmp_path):
    tiny_dit(dtype=torch.float32).save_pretrained(tmp_path / "model")
    assert "device 'warp' is not available" in refused(tmp_path / "model", device="warp")
    if not torch.cuda.is_available():
        assert "device 'cuda' is not available" in refused(tmp_path / "model", device="cuda")


@pytest.mark.parametrize("name", ["dit-xl-2-256", "sd-v1-4", "sd-v2-1", "sd-xl", "sd-3", "sd-3.5-large"])
def test_paper_models_take_the_papers_scheduler(name, monkeypatch, tmp_path):
    """The hub replaced by a folder: what is asked of it, and what becomes of the pipeline."""
    model, asked = companion.PAPER_MODELS[name], []
    tiny_dit(DDIMScheduler(), dtype=torch.float32).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(registry, "hub_folder", lambda source, *_, **__: asked.append(source) or tmp_path / "model")
    pipe = companion.load(name)
    assert asked == [model.source]
    assert type(pipe.scheduler).__name__ == model.scheduler
    assert model.call["num_inference_steps"] == (250 if name.startswith("dit") else 50)


def test_paper_settings_are_arguments_of_their_pipelines():
    kinds = {"dit": "DiTPipeline", "sd-v": "StableDiffusionPipeline", "sd-xl": "StableDiffusionXLPipeline"}
    for model in companion.PAPER_MODELS.values():
        kind = next((kind for start, kind in kinds.items() if model.name.startswith(start)), "StableDiffusion3Pipeline")
        call = EDM2Pipeline.__call__ if model.scheduler is None else getattr(diffusers, kind).__call__
        assert set(model.call) <= set(inspect.signature(call).parameters)
    assert companion.PAPER_MODELS["dit-xl-2-256"].interval == companion.IntervalWeight(205, 502, unit="timestep")
    assert companion.PAPER_MODELS["edm2-s-512"].interval == companion.IntervalWeight(0.28, 2.90, unit="sigma")
