"""EDM2's `.pkl` files: the published format is read, its code never runs, and anything else is refused."""

import functools
import http.server
import io
import os
import pickle
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import companion
from companion.networks.edm2 import EDM2UNet
from companion.pipelines.edm2 import loading
from companion.pipelines.edm2.checkpoint import read_edm2_checkpoint
from companion.pipelines.edm2.loading import load_edm2
from companion.pipelines.edm2.pipeline import EDM2Pipeline
from companion.pipelines.edm2.presets import EDM2_PRESETS, edm2_preset
from companion.pipelines.hub import download_file
from tests.networks.test_edm2 import TINY, tiny_unet
from tests.pipelines.tiny import tiny_autoencoder


class EasyDict(dict):
    """dnnlib's dictionary."""


class Persistent:
    """An instance of a class under torch_utils' `persistent_class`, as it pickles itself."""

    def __init__(self, class_name: str, state: dict, source: str = "raise SystemExit('executed')") -> None:
        self.class_name, self.state, self.source = class_name, state, source

    def __reduce__(self):
        meta = {
            "type": "class",
            "version": 6,
            "module_src": self.source,
            "class_name": self.class_name,
            "state": self.state,
        }
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


@pytest.fixture(autouse=True)
def published_modules(monkeypatch):
    name_published_modules(monkeypatch)


def name_published_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules that the published code pickles by name, for as long as a file is being written."""
    util, persistence = types.ModuleType("dnnlib.util"), types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the reader must not call into the published code")

    for module, value in ((util, EasyDict), (persistence, _reconstruct_persistent_obj)):
        value.__module__, value.__qualname__ = module.__name__, value.__name__
        setattr(module, value.__name__, value)
        monkeypatch.setitem(sys.modules, module.__name__.split(".")[0], types.ModuleType(module.__name__.split(".")[0]))
        monkeypatch.setitem(sys.modules, module.__name__, module)


def persistent(module: nn.Module, class_name: str | None = None, **extra) -> Persistent | nn.ModuleDict:
    """A module as the published code pickles it: its state, and its submodules likewise."""
    children = {name: None if child is None else persistent(child) for name, child in module._modules.items()}
    if isinstance(module, nn.ModuleDict):  # no class of theirs: pickled by torch's own name
        plain = nn.ModuleDict()
        plain._modules.update(children)
        return plain
    state = {**module.__dict__, "_modules": children, **extra}
    state.pop("_internal_dict", None)  # diffusers' configuration
    return Persistent(class_name or type(module).__name__, state)


def published(network: EDM2UNet, latents: bool = True, **changes) -> EasyDict:
    """The dictionary that the published training loop saves, float16 as there."""
    config = {**network.config}
    arguments = {
        "img_resolution": config["sample_size"],
        "img_channels": config["in_channels"],
        "label_dim": config["num_classes"],
        "dropout": 0.1,
        **{name: config[name] for name in TINY if name not in ("sample_size", "num_classes")},
    }
    half = EDM2UNet(**network.config)
    half.load_state_dict(network.state_dict())
    outer = nn.Module()
    outer.unet, outer.logvar_linear = half, nn.Linear(4, 1, bias=False)
    outer.half().eval().requires_grad_(False)
    ema = persistent(outer, "Precond", _init_args=(), _init_kwargs=EasyDict(arguments), use_fp16=True)
    std, mean = np.float32([4.17, 4.62, 3.71, 3.28]), np.float32([5.81, 3.25, 0.12, -2.15])
    scale = np.float32(0.5) / std
    encoder = Persistent("StandardRGBEncoder", {"_init_args": (), "_init_kwargs": {}})
    if latents:
        state = {"vae_name": "stabilityai/sd-vae-ft-mse", "scale": scale, "bias": -mean * scale, "batch_size": 8}
        encoder = Persistent("StabilityVAEEncoder", {**state, "_vae": None, "_init_args": (), "_init_kwargs": {}})
    loss = Persistent("EDM2Loss", {"P_mean": -0.4, "P_std": 1.0, "sigma_data": np.float64(0.5)})
    dataset = EasyDict(class_name="training.dataset.ImageFolderDataset", path="data.zip", use_labels=True)
    return EasyDict({"encoder": encoder, "dataset_kwargs": dataset, "loss_fn": loss, "ema": ema, **changes})


def write(path: Path, data, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    return path


def rounded(network: EDM2UNet) -> EDM2UNet:
    """The network with the values that float16 leaves of its weights."""
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.copy_(tensor.half())
    return network


class Hostile:
    """Creates a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """Where a hostile file would leave its trace; nothing may be there afterwards."""
    place = tmp_path / "executed"
    yield place
    assert not place.exists()


def refused(path: Path, message: str | None = None) -> str:
    with pytest.raises(ValueError, match=message) as caught:
        read_edm2_checkpoint(path)
    assert "\n" not in str(caught.value) and repr(str(path)) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("classes", [10, 0])
def test_a_published_file_becomes_the_same_network(tmp_path, protocol, classes):
    network = rounded(tiny_unet(0, torch.float32, num_classes=classes))
    checkpoint = read_edm2_checkpoint(write(tmp_path / "a.pkl", published(network), protocol))
    assert checkpoint.config["num_classes"] == classes and "dropout" not in checkpoint.config
    assert checkpoint.latent_mean == (5.81, 3.25, 0.12, -2.15) and checkpoint.latent_std == (4.17, 4.62, 3.71, 3.28)
    assert {value.dtype for value in checkpoint.state.values()} == {torch.float16}
    assert checkpoint.network().dtype == torch.float16
    read = checkpoint.network(torch.float32)
    assert not read.training and read.state_dict().keys() == network.state_dict().keys()
    x, labels = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 7])
    labels = labels if classes else None
    assert torch.equal(read(x, 0.7, labels).sample, network(x, 0.7, labels).sample)
    read.save_pretrained(tmp_path / "folder")
    again = EDM2UNet.from_pretrained(tmp_path / "folder")
    assert torch.equal(again(x, 0.7, labels).sample, network(x, 0.7, labels).sample)


def test_positional_arguments_are_read_too(tmp_path):
    data = published(tiny_unet(0, torch.float32))
    arguments = data["ema"].state["_init_kwargs"]
    data["ema"].state["_init_args"] = tuple(arguments.pop(n) for n in ("img_resolution", "img_channels", "label_dim"))
    data["ema"].state["_init_args"] += (False, 0.4)
    config = read_edm2_checkpoint(write(tmp_path / "a.pkl", data)).config
    assert (config["sample_size"], config["in_channels"], config["num_classes"]) == (8, 4, 10)
    assert config["sigma_data"] == 0.4


def test_code_inside_is_dropped_unseen(tmp_path, marker):
    data = published(tiny_unet(0, torch.float32))
    source = f"import os\nos.mkdir({str(marker)!r})\n"
    for thing in (data["ema"], data["encoder"], data["loss_fn"]):
        thing.source = source
    read_edm2_checkpoint(write(tmp_path / "a.pkl", data))


@pytest.mark.parametrize(
    "place", ["instead", "next to it", "in the network", "in its arguments", "in a tensor's hooks"]
)
def test_code_in_the_pickle_is_refused(tmp_path, marker, place):
    hostile = Hostile(marker)
    data = published(tiny_unet(0, torch.float32))
    match place:
        case "instead":
            data = hostile
        case "next to it":
            data["dataset_kwargs"]["path"] = hostile
        case "in the network":
            data["ema"].state["_modules"]["logvar_linear"] = hostile
        case "in its arguments":
            data["ema"].state["_init_kwargs"]["sigma_data"] = hostile
        case "in a tensor's hooks":
            data["ema"].state["_modules"]["unet"].state["_parameters"]["out_gain"] = Hooked(hostile)
    message = refused(write(tmp_path / "a.pkl", data), "is refused, and nothing in it was executed: it asks for")
    assert f"{os.mkdir.__module__}.mkdir" in message
    pickle.loads(pickle.dumps(hostile))
    marker.rmdir()  # it was there: what was refused above does run elsewhere


class Hooked:
    """A parameter with something in the place of its hooks."""

    def __init__(self, hooks) -> None:
        self.hooks = hooks

    def __reduce__(self):
        return torch._utils._rebuild_parameter, (torch.zeros(()), False, self.hooks)


class Storage:
    """In the place of a tensor's storage: whatever bytes are given."""

    def __init__(self, content) -> None:
        self.content = content

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.content,)


class Tensor:
    """A tensor over a given storage, with given numbers."""

    def __init__(self, storage, *numbers, state=None) -> None:
        self.arguments, self.state = (storage, *numbers, False, {}), state

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments, self.state


def saved(value, zipped: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def with_tensor(tensor) -> EasyDict:
    data = published(tiny_unet(0, torch.float32))
    data["ema"].state["_modules"]["unet"].state["_parameters"]["out_gain"] = tensor
    return data


@pytest.mark.parametrize("form", ["legacy", "zip", "pickle"])
def test_code_in_a_tensors_own_bytes_is_refused(tmp_path, marker, form):
    hostile = Hostile(marker)
    content = pickle.dumps(hostile) if form == "pickle" else saved(hostile, zipped=form == "zip")
    data = with_tensor(Tensor(Storage(content), 0, (), ()))
    refused(write(tmp_path / "a.pkl", data), "nothing in it was executed: a tensor's content is not plain numbers")


STORAGE = saved(torch.zeros(4, dtype=torch.float16)._typed_storage())


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Tensor(Storage("text"), 0, (), ()), "a tensor's content is not bytes"),
        (Tensor(Storage(b"text"), 0, (), ()), "a tensor's content is not plain numbers"),
        (Tensor(Storage(saved({"a": 1})), 0, (), ()), "a tensor's content is a dict, not a storage"),
        (Tensor(Storage(STORAGE), 0, (5,), (1,)), r"of size \(5,\) reaches beyond its storage of 4"),
        (Tensor(Storage(STORAGE), 3, (2, 2), (0, 1)), r"of size \(2, 2\) reaches beyond its storage of 4"),
        (Tensor(Storage(STORAGE), -1, (1,), (1,)), "offset, size and stride are"),
        (Tensor(Storage(STORAGE), 0, (2,), (1, 1)), "a tensor has no storage"),
        (Tensor(None, 0, (), ()), "a tensor has no storage"),
        (Tensor(Storage(STORAGE), 0, (), (), state=(1, 2)), "it gives state to an object that has none"),
    ],
)
def test_tensors_are_only_what_their_storage_holds(tmp_path, tensor, message):
    refused(write(tmp_path / "a.pkl", with_tensor(tensor)), message)


@pytest.mark.parametrize(
    "name",
    [
        *("builtins eval", "builtins exec", "builtins getattr", "builtins __import__", "os system", "posix system"),
        *("torch load", "torch.serialization load", "torch.hub load", "torch.jit load", "torch.storage torch.load"),
        *("torch_utils.persistence _src_to_module", "dnnlib.util EasyDict.__init__", "dnnlib.util open_url"),
        *("numpy load", "numpy.core.multiarray fromfile", "numpy._core.multiarray dtype", "subprocess Popen"),
        *("companion.pickles np", "functools partial", "copyreg _reconstructor", "pickle loads"),
    ],
)
def test_every_other_name_is_refused(tmp_path, name):
    module, attribute = name.split()
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x04c" + f"{module}\n{attribute}\n".encode() + b")R.")
    refused(
        path, "is refused, and nothing in it was executed: it asks for " + f"{module}.{attribute},".replace(".", r"\.")
    )


def test_a_file_cannot_change_what_the_next_one_finds(tmp_path):
    """State given to a class or function that the reader hands out, instead of to an instance."""
    for module, attribute in (("dnnlib.util", "EasyDict"), ("torch_utils.persistence", "_reconstruct_persistent_obj")):
        path = tmp_path / "a.pkl"
        path.write_bytes(b"\x80\x04c" + f"{module}\n{attribute}\n".encode() + b"}X\x03\x00\x00\x00getK\x01sb.")
        refused(path)
    assert read_edm2_checkpoint(write(tmp_path / "b.pkl", published(tiny_unet(0, torch.float32)))).state


def test_damaged_files_are_refused(tmp_path):
    whole = pickle.dumps(published(tiny_unet(0, torch.float32)), protocol=4)
    path = tmp_path / "a.pkl"
    for size in (0, 1, 2, 20, 1000, len(whole) // 2, len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, "is refused")
    for content in (
        b"<html>404</html>",
        b"\x80\x04K\x01.",
        b"PK\x03\x04 a zip",
        b"\x80\x04N\x85Q.",
        saved({"ema": 1}, True),
    ):
        path.write_bytes(content)
        refused(path)
    refused(tmp_path / "missing.pkl", "cannot be opened: No such file")
    refused(tmp_path, "cannot be opened: Is a directory")


def changed(change) -> EasyDict:
    data = published(tiny_unet(0, torch.float32))
    change(data, data["ema"].state, data["ema"].state["_modules"]["unet"].state)
    return data


def loop(data, state, unet) -> None:
    unet["_modules"]["again"] = data["ema"]


def twice(data, state, unet) -> None:
    unet["_modules"]["again"] = unet["_modules"]["out_conv"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, s, u: d.pop("ema"), 'it must be a dictionary with the network under "ema"'),
        (lambda d, s, u: d.update(ema={}), '"ema" must be of class Precond, got dict'),
        (lambda d, s, u: d.update(ema=d["loss_fn"]), '"ema" must be of class Precond, got EDM2Loss'),
        (lambda d, s, u: d.update(encoder=d["loss_fn"]), "its encoder must be a StandardRGBEncoder or"),
        (lambda d, s, u: d["encoder"].state.pop("scale"), "does not say how each of 4 channels of latents is scaled"),
        (
            lambda d, s, u: d["encoder"].state.update(scale=np.zeros(4)),
            "scales latents by a number that is not positive",
        ),
        (
            lambda d, s, u: d["encoder"].state.update(scale=np.array([None] * 4)),
            "an array of 'O8', which are not numbers",
        ),
        (lambda d, s, u: s.pop("_init_kwargs"), "it does not say with which arguments"),
        (lambda d, s, u: s["_init_kwargs"].pop("label_dim"), "was made without the argument 'label_dim'"),
        (
            lambda d, s, u: s["_init_kwargs"].update(experts=8),
            "with the argument 'experts', which EDM2's does not have",
        ),
        (lambda d, s, u: s["_init_kwargs"].update(num_blocks="3"), "'num_blocks' of its network is not a number"),
        (lambda d, s, u: s["_init_kwargs"].update(resample_filter=[1, 3, 3, 1]), r"the filter \[1, 3, 3, 1\]; only"),
        (lambda d, s, u: u.update(_modules=3), "its module 'unet' is not in a module's form"),
        (
            lambda d, s, u: u["_parameters"].update(out_gain=torch.ones([], dtype=torch.int64)),
            "unet.out_gain is not a tensor",
        ),
        (loop, r"its module 'unet\.again' is not in a module's form"),
        (twice, r"its module 'unet\.again' is not in a module's form"),
    ],
)
def test_files_without_an_edm2_network_are_refused(tmp_path, change, message):
    data = changed(change)
    path = write(tmp_path / "a.pkl", data)
    refused(path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, s, u: u["_parameters"].pop("out_gain"), "lacks the tensor 'out_gain' of the network"),
        (lambda d, s, u: u["_parameters"].update(extra=torch.ones(2)), "'extra' is no part of the network"),
        (
            lambda d, s, u: u["_parameters"].update(out_gain=torch.ones(2)),
            r"'out_gain' must be of shape \(\), got \(2,\)",
        ),
        (lambda d, s, u: s["_init_kwargs"].update(num_blocks=2), "must be of shape"),
        (lambda d, s, u: s["_init_kwargs"].update(channel_mult=5), "describes no EDM2 network"),
        (lambda d, s, u: s["_init_kwargs"].update(img_resolution=9), "describes no EDM2 network: sample_size must be"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
    checkpoint = read_edm2_checkpoint(write(tmp_path / "a.pkl", changed(change)))
    with pytest.raises(ValueError, match=message):
        checkpoint.network()


def draw(pipe: EDM2Pipeline, kind: str = "latent") -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    seeds = companion.sample_generators(0, range(2))
    return pipe(
        [3, 7],
        num_inference_steps=2,
        guidance_scale=2.0,
        guidance_interval=(0.1, 50.0),
        generator=seeds,
        output_type=kind,
    ).images


def networks() -> tuple[EDM2UNet, EDM2UNet]:
    return rounded(tiny_unet(0, torch.float32)), rounded(tiny_unet(1, torch.float32, num_classes=0, model_channels=8))


def test_pipelines_from_files_and_folders(tmp_path):
    preset, (network, guide) = edm2_preset("edm2-img512-s"), networks()
    expected = draw(EDM2Pipeline(network, guide))
    own = write(tmp_path / preset.network, published(network)), write(tmp_path / preset.guide, published(guide))
    vae = tiny_autoencoder()
    for pipe in (
        load_edm2("edm2-img512-s", tmp_path, vae=vae),
        load_edm2("edm2-img512-s", own[0], vae=None),  # its guide lies in the same folder
        load_edm2(source=own[0], guide=own[1], vae=None),
    ):
        assert torch.equal(draw(pipe), expected)
        assert (
            pipe.unet.config.folded and pipe.guide.config.folded and pipe.config.latent_std == [4.17, 4.62, 3.71, 3.28]
        )
    assert pipe.vae is None and load_edm2(source=own[0], vae=None).guide is None
    complete = load_edm2("edm2-img512-s", tmp_path, vae=vae)
    complete.save_pretrained(tmp_path / "folder")
    loaded = load_edm2(source=tmp_path / "folder")
    assert torch.equal(draw(loaded), expected)
    assert torch.allclose(draw(loaded, "pt"), draw(complete, "pt"), atol=1e-5)
    half = load_edm2("edm2-img512-s", tmp_path, vae=vae, dtype=torch.bfloat16)
    assert half.unet.dtype == half.guide.dtype == half.vae.dtype == torch.bfloat16
    assert (draw(half) - expected).norm() < 0.2 * expected.norm()


def test_networks_in_pixels_need_no_decoder(tmp_path):
    network = tiny_unet(0, torch.float32, in_channels=3)
    pipe = load_edm2(source=write(tmp_path / "a.pkl", published(network, latents=False)))
    assert pipe.vae is None
    pipe.set_progress_bar_config(disable=True)
    [picture] = pipe(1, num_inference_steps=1).images
    assert picture.size == (8, 8)


def test_errors_of_loading(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    network, _ = networks()
    path = write(tmp_path / "a.pkl", published(network))
    other = write(tmp_path / "b.pkl", published(tiny_unet(1, torch.float32, in_channels=3), latents=False))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{}")
    for call, message in (
        (lambda: load_edm2("edm2-s"), "EDM2 preset must be one of edm2-img64-s, edm2-img512-s, .*, got 'edm2-s'"),
        (lambda: load_edm2(), "needs a preset or a source, got neither"),
        (lambda: load_edm2("edm2-img64-s"), r"is not on this machine; load_edm2\('edm2-img64-s', download=True\)"),
        (lambda: load_edm2(source=tmp_path), "holds no saved pipeline; name the preset"),
        (lambda: load_edm2(source=tmp_path / "no.pkl"), "cannot be opened: No such file"),
        (lambda: load_edm2("edm2-img512-s", tmp_path), r"edm2-img512-s-2147483-0\.025\.pkl' cannot be opened"),
        (lambda: load_edm2(source=path, guide=other, vae=None), "guide must have the network's in_channels, 4, got 3"),
        (
            lambda: load_edm2(source=path, vae=str(tmp_path / "no")),
            r"autoencoder .* is unavailable.*vae=None for latents",
        ),
        (lambda: load_edm2(source=tmp_path / "broken"), "cannot be loaded as a diffusers pipeline"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "cache").exists()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/short"):  # promises more than it sends
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"half")
        else:
            super().do_GET()


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", tmp_path / "served"
        running.shutdown()
        thread.join(10)


def test_downloading_when_asked(tmp_path, monkeypatch, server):
    address, folder = server
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "CHECKPOINTS", address)
    preset, (network, guide) = edm2_preset("edm2-img512-s"), networks()
    write(folder / preset.network, published(network)), write(folder / preset.guide, published(guide))
    fetched = load_edm2("edm2-img512-s", vae=None, download=True)
    expected = draw(EDM2Pipeline(network, guide))
    assert torch.equal(draw(fetched), expected)
    for file in folder.iterdir():
        file.unlink()
    assert torch.equal(draw(load_edm2("edm2-img512-s", vae=None)), expected)  # from the cache, without asking
    names = {file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert not any(name.endswith((".pkl", ".part")) for name in names) and "model_index.json" in names


def test_what_cannot_be_downloaded(tmp_path, server):
    address, _ = server
    started = time.monotonic()
    for name, where, reason in (
        ("absent.pkl", address, "Not Found|File not found"),
        ("short.pkl", address, "IncompleteRead"),
        ("any.pkl", "http://127.0.0.1:9", "refused"),
    ):
        with pytest.raises(
            ValueError, match=f"{name} cannot be downloaded from .*({reason}).*give its folder as source"
        ):
            download_file(name, tmp_path / "into", where)
    assert time.monotonic() - started < 5 and not any((tmp_path / "into").iterdir())


def test_presets():
    for name, preset in EDM2_PRESETS.items():
        resolution = name.split("-")[1]
        size = name.split("-")[2]
        assert preset.network.startswith(f"edm2-{resolution}-{size}-") and preset.network.endswith(".pkl")
        assert preset.guide.startswith(f"edm2-{resolution}-") and preset.guide != preset.network
        assert ("uncond" in preset.guide) == ("classifier-free" in preset.note) and preset.guidance_scale > 1
        assert preset.latents == (resolution == "img512")
    assert EDM2_PRESETS["edm2-img512-s"].guidance_interval == (0.28, 2.90)
