"""OpenAI's checkpoints against a reference that evaluates the published format by its own names, tensor by tensor."""

import math
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from companion.networks.adm import ADMUNet, NoisyClassifier
from companion.pipelines.adm.checkpoint import (
    ADMArchitecture,
    classifier_from_checkpoint,
    read_adm_checkpoint,
    unet_from_checkpoint,
)
from companion.pipelines.adm.presets import ADM_PRESETS, adm_preset

TINY = ADMArchitecture(16, 32, (1, 2), 1, classes=5, attention_resolutions=(8,), head_channels=16)
VARIANTS = {
    "plain": TINY,
    "new order": replace(TINY, new_attention_order=True),
    "heads": replace(TINY, heads=4),
    "unconditional": replace(TINY, classes=None, learned_variance=False),
    "half width": replace(TINY, model_channels=64, channel_mult=(0.5, 1)),
    "deep": replace(TINY, layers=2, attention_resolutions=(16, 8)),
}


class Published(dict):
    """A state dict in the published format; evaluating it for the first time makes its tensors."""

    def __init__(self, architecture: ADMArchitecture, seed: int = 0) -> None:
        super().__init__()
        self.architecture, self.generator = architecture, torch.Generator().manual_seed(seed)

    def tensor(self, name: str, *shape: int) -> Tensor:
        if name not in self:
            drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
            self[name] = 0.5 + 0.2 * drawn if len(shape) == 1 else drawn / math.sqrt(math.prod(shape[1:]))
        assert self[name].shape == shape
        return self[name]

    def layer(self, name: str, x: Tensor, out: int, *kernel: int) -> Tensor:
        weight = self.tensor(f"{name}.weight", out, x.shape[1], *kernel)
        bias = self.tensor(f"{name}.bias", out)
        match len(kernel):
            case 0:
                return F.linear(x, weight, bias)
            case 1:
                return F.conv1d(x, weight, bias)
        return F.conv2d(x, weight, bias, padding=kernel[0] // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (self.tensor(f"{name}.{kind}", x.shape[1]) for kind in ("weight", "bias"))
        return F.group_norm(x, 32, weight, bias)

    def residual(self, name: str, x: Tensor, embedding: Tensor, out: int, change: str = "") -> Tensor:
        def resized(h: Tensor) -> Tensor:
            if change == "up":
                return F.interpolate(h, scale_factor=2, mode="nearest")
            return F.avg_pool2d(h, 2) if change == "down" else h

        h = self.layer(f"{name}.in_layers.2", resized(F.silu(self.norm(f"{name}.in_layers.0", x))), out, 3, 3)
        scale, shift = self.layer(f"{name}.emb_layers.1", F.silu(embedding), 2 * out)[:, :, None, None].chunk(2, dim=1)
        h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        h = self.layer(f"{name}.out_layers.3", F.silu(h), out, 3, 3)
        x = resized(x)
        return h + (x if x.shape[1] == out else self.layer(f"{name}.skip_connection", x, out, 1, 1))

    def attention(self, name: str, x: Tensor) -> Tensor:
        channels = x.shape[1]
        heads = self.architecture.heads or channels // self.architecture.head_channels
        rows = self.layer(f"{name}.qkv", self.norm(f"{name}.norm", x).flatten(2), 3 * channels, 1)
        attended = _attend(rows, heads, self.architecture.new_attention_order)
        return x + self.layer(f"{name}.proj_out", attended, channels, 1).reshape(x.shape)

    def descend(self, x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        a = self.architecture
        half = a.model_channels // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        embedding = torch.cat([angles.cos(), angles.sin()], dim=1).double()
        embedding = self.layer("time_embed.0", embedding, 4 * a.model_channels)
        embedding = self.layer("time_embed.2", F.silu(embedding), 4 * a.model_channels)
        if y is not None:
            embedding = embedding + self.tensor("label_emb.weight", a.classes, 4 * a.model_channels)[y]
        skips = [self.layer("input_blocks.0.0", x, a.widths[0], 3, 3)]
        for level, width in enumerate(a.widths):
            for _ in range(a.layers):
                h = self.residual(f"input_blocks.{len(skips)}.0", skips[-1], embedding, width)
                skips.append(self.attention(f"input_blocks.{len(skips)}.1", h) if a.attended[level] else h)
            if level < len(a.widths) - 1:
                skips.append(self.residual(f"input_blocks.{len(skips)}.0", skips[-1], embedding, width, "down"))
        h = self.residual("middle_block.0", skips[-1], embedding, a.widths[-1])
        h = self.residual("middle_block.2", self.attention("middle_block.1", h), embedding, a.widths[-1])
        return h, embedding, skips

    def unet(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        a = self.architecture
        h, embedding, skips = self.descend(x, t, y)
        n = 0
        for level in reversed(range(len(a.widths))):
            for layer in range(a.layers + 1):
                h = torch.cat([h, skips.pop()], dim=1)
                h = self.residual(f"output_blocks.{n}.0", h, embedding, a.widths[level])
                h = self.attention(f"output_blocks.{n}.1", h) if a.attended[level] else h
                if level and layer == a.layers:
                    place = f"output_blocks.{n}.{2 if a.attended[level] else 1}"
                    h = self.residual(place, h, embedding, a.widths[level], "up")
                n += 1
        assert not skips
        return self.layer("out.2", F.silu(self.norm("out.0", h)), 6 if a.learned_variance else 3, 3, 3)

    def classifier(self, x: Tensor, t: Tensor) -> Tensor:
        h = F.silu(self.norm("out.0", self.descend(x, t, None)[0])).flatten(2)
        h = torch.cat([h.mean(dim=2, keepdim=True), h], dim=2)
        width = h.shape[1]
        h = h + self.tensor("out.2.positional_embedding", width, h.shape[2])
        rows = self.layer("out.2.qkv_proj", h, 3 * width, 1)
        pooled = _attend(rows, width // self.architecture.head_channels, new_order=True)
        return self.layer("out.2.c_proj", pooled, self.architecture.classes, 1)[:, :, 0]


def _attend(rows: Tensor, heads: int, new_order: bool) -> Tensor:
    batch, channels, places = rows.shape
    if new_order:
        q, k, v = rows.reshape(batch, 3, heads, -1, places).unbind(1)
    else:
        q, k, v = rows.reshape(batch, heads, 3, -1, places).unbind(2)
    weights = torch.einsum("bhct,bhcs->bhts", q, k).div(math.sqrt(q.shape[2])).softmax(dim=-1)
    return torch.einsum("bhts,bhcs->bhct", weights, v).reshape(batch, channels // 3, places)


def inputs(architecture: ADMArchitecture) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    size = architecture.image_size
    x = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    return x, torch.tensor([3, 871]), None if architecture.classes is None else torch.tensor([0, 4])


def published_unet(architecture: ADMArchitecture = TINY) -> Published:
    state = Published(architecture)
    state.unet(*inputs(architecture))
    return state


def published_classifier(architecture: ADMArchitecture = TINY) -> Published:
    state = Published(architecture, seed=1)
    state.classifier(*inputs(architecture)[:2])
    return state


@pytest.mark.parametrize("architecture", VARIANTS.values(), ids=VARIANTS)
def test_unet_is_the_published_one(architecture, tmp_path):
    state = published_unet(architecture)
    torch.save(dict(state), tmp_path / "diffusion.pt")
    unet = unet_from_checkpoint(read_adm_checkpoint(tmp_path / "diffusion.pt"), architecture, dtype=torch.float64)
    x, t, y = inputs(architecture)
    expected = state.unet(x, t, y)
    got = unet(x, t, class_labels=y).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    assert sum(p.numel() for p in unet.parameters()) == sum(value.numel() for value in state.values())
    assert not unet.training and not any(p.requires_grad for p in unet.parameters())


@pytest.mark.parametrize("name", ["plain", "half width", "deep"])
def test_classifier_is_the_published_one(name, tmp_path):
    architecture = VARIANTS[name]
    state = published_classifier(architecture)
    torch.save(dict(state), tmp_path / "classifier.pt")
    read = read_adm_checkpoint(tmp_path / "classifier.pt")
    classifier = classifier_from_checkpoint(read, architecture, dtype=torch.float64)
    x, t, _ = inputs(architecture)
    expected = state.classifier(x, t)
    assert expected.shape == (2, 5) and expected.std() > 0.1
    torch.testing.assert_close(classifier(x, t), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(classifier(x[:1], 3), expected[:1], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="pools features of 8x8, got 4x4"):
        classifier(x[:, :, :8, :8], 3)


def test_what_the_file_does_not_say_matters():
    """Number of heads and order of rows: the tensors fit either way, the outputs do not."""
    state, (x, t, y) = published_unet(), inputs(TINY)
    expected = state.unet(x, t, y)
    for other in (VARIANTS["new order"], VARIANTS["heads"], replace(TINY, heads=1)):
        wrong = unet_from_checkpoint(state, other, dtype=torch.float64)(x, t, class_labels=y).sample
        different = not torch.allclose(wrong, expected, atol=1e-3)
        # Four heads of 64 channels are sixteen wide: the same network.
        assert different is not (other.heads == 4)


def test_networks_are_saved_with_what_makes_them(tmp_path):
    architecture = replace(VARIANTS["half width"], heads=4)
    x, t, y = inputs(architecture)
    unet = unet_from_checkpoint(published_unet(architecture), architecture, dtype=torch.float64)
    unet.save_pretrained(tmp_path / "unet")
    again = ADMUNet.from_pretrained(tmp_path / "unet", dtype=torch.float64)
    torch.testing.assert_close(
        again(x, t, class_labels=y).sample, unet(x, t, class_labels=y).sample, rtol=0, atol=1e-12
    )
    classifier = classifier_from_checkpoint(published_classifier(), TINY, dtype=torch.float64)
    classifier.save_pretrained(tmp_path / "classifier")
    again = NoisyClassifier.from_pretrained(tmp_path / "classifier", dtype=torch.float64)
    torch.testing.assert_close(again(x, t), classifier(x, t), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("adm-imagenet-64", 296), ("adm-imagenet-128", 422), ("adm-imagenet-256", 554), ("adm-imagenet-512", 559)],
)
def test_presets_have_the_published_sizes(name, millions):
    """Parameters as in the paper's table of hyperparameters."""
    with torch.device("meta"):
        unet = ADMUNet(**ADM_PRESETS[name].unet.unet_config())
        classifier = NoisyClassifier(**ADM_PRESETS[name].classifier.classifier_config())
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6) == millions
    assert classifier.config.num_classes == unet.config.num_class_embeds == 1000
    with pytest.raises(ValueError, match="adm-imagenet-128"):
        adm_preset("adm-imagenet-32")


def broken(state: dict, change: str) -> dict:
    state = dict(state)
    match change:
        case "lacks":
            del state["input_blocks.3.1.qkv.weight"]
        case "more":
            state["output_blocks.9.0.in_layers.0.weight"] = torch.zeros(32)
        case "shape":
            state["label_emb.weight"] = torch.zeros(7, 128)
        case "rows":
            state["middle_block.1.qkv.weight"] = torch.zeros(190, 64, 1)
    return state


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("lacks", r"lacks the tensor 'input_blocks.3.1.qkv.weight' of the 16x16 U-Net with 5 classes"),
        ("more", r"'output_blocks.9.0.in_layers.0.weight' is no part of the 16x16 U-Net"),
        ("shape", r"'label_emb.weight' is of shape \(7, 128\).* needs \(5, 128\)"),
        ("rows", r"'middle_block.1.qkv.weight' of 190 rows"),
    ],
)
def test_a_checkpoint_of_another_network_is_named(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        unet_from_checkpoint(broken(published_unet(), change), TINY)


def test_unet_and_classifier_are_not_confused():
    with pytest.raises(ValueError, match="no part of the 16x16 classifier"):
        classifier_from_checkpoint(published_unet(), TINY)
    with pytest.raises(ValueError, match="16x16 U-Net with 5 classes"):
        unet_from_checkpoint(published_classifier(), TINY)
    with pytest.raises(ValueError, match=r"'label_emb\.weight' is no part of the 16x16 U-Net that"):
        unet_from_checkpoint(published_unet(), replace(TINY, classes=None))
    with pytest.raises(ValueError, match="a classifier needs classes"):
        classifier_from_checkpoint(published_classifier(), replace(TINY, classes=None))


class _Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_hostile_damaged_and_foreign_files(tmp_path):
    touched, file = tmp_path / "touched", tmp_path / "file.pt"

    def refused(sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence) as caught:
            read_adm_checkpoint(file)
        assert "file.pt" in str(caught.value) and "\n" not in str(caught.value)

    refused("cannot be opened")
    file.write_bytes(pickle.dumps(_Hostile(touched)))
    refused("not a file of plain tensors")
    torch.save({"time_embed.0.weight": _Hostile(touched)}, file)
    refused("not a file of plain tensors")
    assert not touched.exists()
    file.write_bytes(b"no checkpoint at all")
    refused("not a file of plain tensors")
    torch.save(dict(published_unet()), file)
    file.write_bytes(file.read_bytes()[:5000])
    refused("not a file of plain tensors")
    for content in (
        [torch.zeros(2)],
        {"model": {"a": torch.zeros(2)}},
        {},
        {"step": torch.tensor(3)},
        {1: torch.zeros(2)},
        {"a": torch.zeros(2, device="meta")},
        {"a": torch.zeros(2, 2).to_sparse()},
        {"a": torch.zeros(4, 4).to_sparse_csr()},
        {"a": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)},
    ):
        torch.save(content, file)
        refused("must hold dense floating-point tensors by their names")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:  # 200 MB in 200 kB
        archive.writestr("archive/data.pkl", bytes(200_000_000))
    refused("would unpack to 200,000,000 bytes")
    file.unlink()
    os.mkfifo(file)
    refused("is a pipe, socket or device")
    file.unlink()
    file.mkdir()
    refused("cannot be opened")


def test_a_refusal_has_none_of_pytorchs_advice(tmp_path):
    torch.save({"a": _Hostile(tmp_path / "touched")}, tmp_path / "file.pt")
    with pytest.raises(ValueError) as caught:
        read_adm_checkpoint(tmp_path / "file.pt")
    said = str(caught.value)
    assert "weights_only" not in said and "\x1b" not in said and said.endswith("it holds more than tensors")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_size": 15}, "image_size must be divisible"),
        ({"channel_mult": ()}, r"channel_mult must be 1 to 16 numbers, got \(\)"),
        ({"model_channels": 48}, "48 channels cannot be divided"),
        ({"head_channels": 0}, "head_channels must be an integer from 1"),
        ({"heads": 0}, "heads must be an integer from 1"),
        ({"layers": 10**9}, "layers must be an integer from 1"),
        ({"channel_mult": (1, -1)}, "channel_mult must be from 0.015625 to 1024, got -1"),
        ({"heads": 7}, "64 channels cannot be divided"),
    ],
)
def test_impossible_architectures(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(TINY, **change)
