"""Folders of saved models that are damaged, incomplete or hostile: one sentence each, and no code of theirs runs."""

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import companion
from companion.evaluation.metrics.clip_score import PaperClip
from companion.minis.shipping import WEIGHTS
from companion.pipelines.adm.classifier import off_the_shelf_classifier
from companion.pipelines.saved import checked_device, checked_dtype
from tests.pipelines.tiny import tiny_dit


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_dit(dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def setting(place: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / place
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        file = next((folder / "transformer").glob("*.safetensors"))
        held = load_file(file)
        change(held)
        save_file(held, file)

    return changed


def weights(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        file = next((folder / "transformer").glob("*.safetensors"))
        file.write_bytes(content(file.read_bytes()))

    return write


def replaced(place: str, text: str | bytes) -> Callable[[Path], None]:
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / place).write_bytes(content) and None


def fifo(place: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / place).unlink()
        os.mkfifo(folder / place)

    return change


class Executed:
    def __reduce__(self):
        return os.mkdir, ("/tmp/never",)


def only_pickle(folder: Path) -> None:
    next((folder / "transformer").glob("*.safetensors")).unlink()
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Executed()))


def first(held: dict) -> str:
    return sorted(name for name in held if name.startswith("transformer_blocks"))[0]


BROKEN: dict[str, Callable[[Path], object]] = {
    "a tensor is missing": tensors(lambda held: held.pop(first(held))),
    "a tensor has another shape": tensors(lambda held: held.update({first(held): torch.ones(3)})),
    "all tensors are missing": tensors(lambda held: (held.clear(), held.update(x=torch.ones(1)))),
    "weights are cut short": weights(lambda content: content[: len(content) // 2]),
    "weights are empty": weights(lambda content: b""),
    "a header longer than the file": weights(lambda content: b"\xff" * 7 + b"\x00" + content[8:]),
    "a header that is no JSON": weights(lambda content: content[:8] + b"[" * 64 + content[72:]),
    "a header nested deeply": weights(lambda content: (9000).to_bytes(8, "little") + b"[" * 9000 + content),
    "weights are a web page": weights(lambda content: b"<html>404</html>"),
    "no weights": lambda folder: next((folder / "transformer").glob("*.safetensors")).unlink(),
    "weights that are a program": only_pickle,
    "no transformer": lambda folder: shutil.rmtree(folder / "transformer"),
    "no scheduler": lambda folder: shutil.rmtree(folder / "scheduler"),
    "a null transformer": setting("model_index.json", transformer=None),
    "a transformer of nulls": setting("model_index.json", transformer=[None, None]),
    "a transformer that is a number": setting("model_index.json", transformer=3),
    "an unknown class": setting("model_index.json", transformer=["diffusers", "NoSuchModel"]),
    "a class that is no model": setting("model_index.json", transformer=["diffusers", "logging"]),
    "a library of its own": setting("model_index.json", transformer=["antigravity", "Model"]),
    "an unknown pipeline": setting("model_index.json", _class_name="NoSuchPipeline"),
    "a pipeline that is a number": setting("model_index.json", _class_name=5),
    "a pipeline that is a list": setting("model_index.json", _class_name=["pipeline", "Custom"]),
    "patch_size 0": setting("transformer/config.json", patch_size=0),
    "no heads": setting("transformer/config.json", num_attention_heads=0),
    "negative width": setting("transformer/config.json", attention_head_dim=-4),
    "ten million layers": setting("transformer/config.json", num_layers=10**7),
    "a width of a billion": setting("transformer/config.json", attention_head_dim=10**9),
    "pictures of a billion": setting("transformer/config.json", sample_size=10**9),
    "a text for a number": setting("transformer/config.json", num_layers="two"),
    "a null for a number": setting("transformer/config.json", num_layers=None),
    "an infinite number": replaced("transformer/config.json", '{"num_layers": Infinity}'),
    "a configuration that is a list": replaced("transformer/config.json", "[1, 2]"),
    "a configuration nested deeply": replaced("transformer/config.json", "[" * 100_000),
    "a configuration that is no text": replaced("transformer/config.json", b"\xff\xfe\x00"),
    "an index nested deeply": replaced("model_index.json", '{"a":' * 5000),
    "an index that is a list": replaced("model_index.json", "[]"),
    "an index that is a pipe": fifo("model_index.json"),
    "a configuration that is a pipe": fifo("transformer/config.json"),
    "a scheduler without steps": setting("scheduler/scheduler_config.json", num_train_timesteps=0),
    "a scheduler of a billion steps": setting("scheduler/scheduler_config.json", num_train_timesteps=10**9),
    "a scheduler of text": setting("scheduler/scheduler_config.json", beta_schedule="no such schedule"),
    "a broken scheduler": replaced("scheduler/scheduler_config.json", "{"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_broken_folders_are_one_sentence(folder, damage):
    BROKEN[damage](folder)
    began = time.monotonic()
    with pytest.raises(ValueError) as caught:
        companion.load(folder)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message and len(message) < 800
    assert time.monotonic() - began < 5
    assert not Path("/tmp/never").exists()


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_every_missing_tensor_is_an_error(tmp_path, part):
    """transformers fills it with random numbers and warns; diffusers' networks are no better."""
    folder = Path(shutil.copytree(WEIGHTS / "mini-sd", tmp_path / "model"))
    shutil.copytree(WEIGHTS / "autoencoder", folder / "vae")
    companion.load(folder)
    file = next((folder / part).glob("*.safetensors"))
    held = load_file(file)
    save_file(dict(list(held.items())[:3]), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{part} .*its weights lack the tensor .* and {len(held) - 4} more"):
        companion.load(folder)


def test_a_sharded_or_older_folder_still_loads(saved, tmp_path):
    """Weights in several files, and in PyTorch's own format."""
    pipe = companion.load(saved)
    pipe.transformer.save_pretrained(tmp_path / "shards" / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "shards" / "transformer").glob("*.safetensors"))) > 1
    for name in ("shards", "bin"):
        shutil.copytree(saved, tmp_path / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        for part in (saved / "vae").glob("*.safetensors"):
            shutil.copy(part, tmp_path / name / "vae")
    torch.save(pipe.transformer.state_dict(), tmp_path / "bin" / "transformer" / "diffusion_pytorch_model.bin")
    for name in ("shards", "bin"):
        found = companion.load(tmp_path / name).transformer.state_dict()
        assert all(torch.equal(found[key], value) for key, value in pipe.transformer.state_dict().items())


def test_nobody_is_asked_whether_to_run_a_folders_code(tmp_path, monkeypatch):
    """transformers asks on standard input whether to run it; whoever answers here says yes."""
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "y")
    executed = tmp_path / "executed"
    for name in ("configuration_own.py", "modeling_own.py"):
        (tmp_path / name).write_text(f"import os\nos.mkdir({str(executed)!r})\n")
    own = {"AutoConfig": "configuration_own.Config", "AutoModelForImageClassification": "modeling_own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": ["modeling_own", "Pipe"], "unet": ["modeling_own", "Model"]})
    )
    for load in (off_the_shelf_classifier, companion.load, PaperClip):
        with pytest.raises(ValueError) as refused:
            load(str(tmp_path))
        assert "\n" not in str(refused.value)
    assert not questions and not executed.exists()


def test_classifiers_are_looked_through_too(tmp_path):
    folder = Path(shutil.copytree(WEIGHTS / "mini-adm-resnet", tmp_path / "classifier"))
    assert off_the_shelf_classifier(folder).training is False
    file = next(folder.glob("*.safetensors"))
    save_file(dict(list(load_file(file).items())[:2]), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"classifier .* cannot be loaded: its weights lack the tensor"):
        off_the_shelf_classifier(folder)


def test_dtypes_by_name_and_by_torchs(folder):
    assert companion.load(folder, dtype="bfloat16").transformer.dtype == torch.bfloat16
    assert checked_dtype(None) == checked_dtype("torch.float32") == checked_dtype(torch.float32) == torch.float32
    for wrong in ("bfloat17", torch.int8, 16, "", torch.complex64, float):
        with pytest.raises(ValueError, match=r"dtype must be one of float32, .*, got"):
            checked_dtype(wrong)


@pytest.mark.parametrize("device", ["warp", "cpu:cpu", "meta", "", "cuda:999", None, [], "cpu\x1b[31m", 99])
def test_devices_that_hold_no_numbers(device):
    with pytest.raises(ValueError, match=r"device .* is not available here") as caught:
        checked_device(device)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
