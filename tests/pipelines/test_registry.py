"""Loading models by name, without a network."""

import time

import pytest
import torch
from diffusers import DDIMScheduler

import companion
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
    assert "'mini-dot' is not known" in message and all(name in message for name in companion.model_names())
    assert "is not known" in refused("./no/such/folder")
    assert "is not known" in refused("weights.safetensors")


def test_hub_name_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "model hub does not offer it: no connection" in refused("owner/model")


def test_a_folder_that_is_no_pipeline(tmp_path):
    assert "holds no diffusers pipeline: it has no model_index.json" in refused(tmp_path)
    (tmp_path / "model_index.json").write_text("{ not json")
    assert "cannot be loaded as a diffusers pipeline" in refused(tmp_path)
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
