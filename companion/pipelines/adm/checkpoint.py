"""OpenAI's ADM checkpoints (`.pt`), read as plain tensors and brought into diffusers' form.

A checkpoint is a state dict and nothing else. The caller therefore says which network it belongs to
(`ADMArchitecture`), and every name and shape in the file must then agree with it. Two things leave no trace in the
file: the number of attention heads, and whether an attention's rows are ordered (head, qkv, channel), the older way, or
(qkv, head, channel); those are part of the architecture.
"""

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from companion.arguments import check_integer, check_number, shortened
from companion.errors import explained
from companion.files import check_archive, open_file
from companion.networks.adm import ADMUNet, NoisyClassifier

State = dict[str, Tensor]


@dataclass(frozen=True)
class ADMArchitecture:
    """What the published scripts take as flags; the same for U-Net and classifier.

    Args:
        image_size: height and width of the pictures.
        model_channels: base width.
        channel_mult: width of each level in units of the base; each level but the last halves the resolution.
        layers: residual blocks per level.
        classes: of the labels, or of the classifier's logits; None is an unconditional U-Net.
        attention_resolutions: at which sizes of the features there is attention.
        heads: attention heads everywhere; None is as many as `head_channels` gives.
        head_channels: width of a head.
        new_attention_order: rows of an attention are (qkv, head, channel).
        learned_variance: the U-Net has as many outputs again, for the variance.
        in_channels: of the pictures.

    Raises:
        ValueError: widths that group norm or attention cannot divide, or no level.
    """

    image_size: int
    model_channels: int
    channel_mult: tuple[float, ...]
    layers: int
    classes: int | None = 1000
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    heads: int | None = None
    head_channels: int = 64
    new_attention_order: bool = False
    learned_variance: bool = True
    in_channels: int = 3

    def __post_init__(self) -> None:
        for name in ("image_size", "model_channels", "layers", "head_channels", "in_channels"):
            check_integer(name, getattr(self, name), 1, 1 << 16)
        if self.heads is not None:
            check_integer("heads", self.heads, 1, 1 << 16)
        if not isinstance(self.channel_mult, (tuple, list)) or not 1 <= len(self.channel_mult) <= 16:
            raise ValueError(f"channel_mult must be 1 to 16 numbers, got {shortened(self.channel_mult)}")
        for mult in self.channel_mult:
            check_number("channel_mult", mult, 1 / 64, 1 << 10)
        if self.image_size % 2 ** (len(self.channel_mult) - 1):
            raise ValueError(
                f"image_size must be divisible by 2 as often as there are levels below the first, got "
                f"{self.image_size} and {len(self.channel_mult)} levels"
            )
        for width, attended in zip(self.widths, self.attended, strict=True):
            parts = self.heads or self.head_channels
            if width % 32 or ((attended or width == self.widths[-1]) and width % parts):
                raise ValueError(
                    f"a level of {width} channels cannot be divided into 32 groups and its attention heads"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(mult * self.model_channels) for mult in self.channel_mult)

    @property
    def attended(self) -> tuple[bool, ...]:
        """Whether each level has attention."""
        return tuple(self.image_size >> level in self.attention_resolutions for level in range(len(self.channel_mult)))

    def _down_block_types(self) -> tuple[str, ...]:
        return tuple("AttnDownBlock2D" if attended else "ResnetDownsampleBlock2D" for attended in self.attended)

    def unet_config(self) -> dict[str, Any]:
        """Arguments of `ADMUNet`."""
        up = ("AttnUpBlock2D" if attended else "ResnetUpsampleBlock2D" for attended in reversed(self.attended))
        return {
            "sample_size": self.image_size,
            "in_channels": self.in_channels,
            "out_channels": self.in_channels * (2 if self.learned_variance else 1),
            "block_out_channels": self.widths,
            "down_block_types": self._down_block_types(),
            "up_block_types": tuple(up),
            "layers_per_block": self.layers,
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "norm_num_groups": 32,
            "attn_norm_num_groups": 32,
            "attention_head_dim": None if self.heads else self.head_channels,
            "num_class_embeds": self.classes,
            "time_embedding_dim": 4 * self.model_channels,
            "heads": self.heads,
            "model_channels": None if self.widths[0] == self.model_channels else self.model_channels,
        }

    def classifier_config(self) -> dict[str, Any]:
        """Arguments of `NoisyClassifier`.

        Raises:
            ValueError: no classes, or a fixed number of heads, which no published classifier has.
        """
        if self.classes is None or self.heads is not None:
            raise ValueError("a classifier needs classes, and heads of fixed width (heads=None)")
        return {
            "sample_size": self.image_size,
            "num_classes": self.classes,
            "in_channels": self.in_channels,
            "model_channels": self.model_channels,
            "block_out_channels": self.widths,
            "down_block_types": self._down_block_types(),
            "layers_per_block": self.layers,
            "attention_head_dim": self.head_channels,
        }


def read_adm_checkpoint(path: str | Path) -> State:
    """The tensors of a `.pt` file; nothing in it is executed.

    Raises:
        ValueError: there is no such file, torch refuses it as anything but plain tensors, or it is no state dict.
    """
    what = f"checkpoint {str(path)!r}"
    with open_file(path, "checkpoint") as file, explained(f"{what} is not a file of plain tensors"):
        if zipfile.is_zipfile(file):
            check_archive(file)
        state = torch.load(path, map_location="cpu", weights_only=True)
    named = isinstance(state, dict) and bool(state) and all(isinstance(name, str) for name in state)
    if not named or not all(_is_plain(value) for value in state.values()):
        raise ValueError(f"{what} must hold dense floating-point tensors by their names, a state dict; it does not")
    return dict(state)


def _is_plain(value: Any) -> bool:
    """Whether it holds numbers: no tensor without data ("meta"), no sparse or quantised one."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return plain and value.is_floating_point() and value.itemsize > 1


def unet_from_checkpoint(
    state: Mapping[str, Tensor], architecture: ADMArchitecture, *, dtype: torch.dtype = torch.float32
) -> ADMUNet:
    """The U-Net in eval mode with a checkpoint's weights.

    Raises:
        ValueError: the tensors are not those of the architecture; the first difference is named.
    """
    with torch.device("meta"):
        unet = ADMUNet(**architecture.unet_config())
    return _loaded(unet, state, _unet_places(architecture), architecture, dtype)


def classifier_from_checkpoint(
    state: Mapping[str, Tensor], architecture: ADMArchitecture, *, dtype: torch.dtype = torch.float32
) -> NoisyClassifier:
    """The noise-aware classifier in eval mode with a checkpoint's weights.

    Raises:
        ValueError: the tensors are not those of the architecture; the first difference is named.
    """
    with torch.device("meta"):
        classifier = NoisyClassifier(**architecture.classifier_config())
    return _loaded(classifier, state, _classifier_places(architecture), architecture, dtype)


_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_TIME = [("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2")]


def _residual(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{theirs}.{a}", f"{ours}.{b}") for a, b in _RESIDUAL.items())


def _attention(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    yield f"{theirs}.norm", f"{ours}.group_norm"
    yield f"{theirs}.qkv", f"{ours}.to_qkv"
    yield f"{theirs}.proj_out", f"{ours}.to_out.0"


def _descent(architecture: ADMArchitecture) -> Iterator[tuple[str, str]]:
    """(their module, ours) from the picture to the middle; both number their blocks in the order of evaluation."""
    yield from _TIME
    yield "input_blocks.0.0", "conv_in"
    n = 1
    for level, attended in enumerate(architecture.attended):
        for layer in range(architecture.layers):
            yield from _residual(f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{layer}")
            if attended:
                yield from _attention(f"input_blocks.{n}.1", f"down_blocks.{level}.attentions.{layer}")
            n += 1
        if level < len(architecture.attended) - 1:
            yield from _residual(f"input_blocks.{n}.0", f"down_blocks.{level}.downsamplers.0")
            n += 1
    yield from _residual("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0")
    yield from _residual("middle_block.2", "mid_block.resnets.1")


def _unet_places(architecture: ADMArchitecture) -> Iterator[tuple[str, str]]:
    yield from _descent(architecture)
    yield "label_emb", "class_embedding"
    n = 0
    for level, attended in enumerate(reversed(architecture.attended)):
        for layer in range(architecture.layers + 1):
            yield from _residual(f"output_blocks.{n}.0", f"up_blocks.{level}.resnets.{layer}")
            if attended:
                yield from _attention(f"output_blocks.{n}.1", f"up_blocks.{level}.attentions.{layer}")
            if layer == architecture.layers and level < len(architecture.attended) - 1:
                yield from _residual(f"output_blocks.{n}.{1 + attended}", f"up_blocks.{level}.upsamplers.0")
            n += 1
    yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"


def _classifier_places(architecture: ADMArchitecture) -> Iterator[tuple[str, str]]:
    yield from _descent(architecture)
    yield "out.0", "norm_out"
    yield "out.2.qkv_proj", "pool.to_qkv"
    yield "out.2.c_proj", "pool.to_out"
    yield "out.2", "pool"  # the positional embedding


def _loaded(
    network: Any,
    state: Mapping[str, Tensor],
    places: Iterator[tuple[str, str]],
    architecture: ADMArchitecture,
    dtype: torch.dtype,
) -> Any:
    """The network with the checkpoint's tensors, once every name and shape was found to agree."""
    expected: dict[str, Tensor] = network.state_dict()
    ours_by_theirs = dict(places)
    converted: State = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        ours = ours_by_theirs.get(module)
        if ours is None:
            raise ValueError(f"the checkpoint's tensor {name!r} is no part of the {_named(network, architecture)}")
        for place, part in _parts(f"{ours}.{kind}", name, value, expected, architecture):
            if place not in expected:
                raise ValueError(f"the checkpoint's tensor {name!r} is no part of the {_named(network, architecture)}")
            if part.shape != expected[place].shape:
                raise ValueError(
                    f"the checkpoint's tensor {name!r} is of shape {tuple(value.shape)}, which is not that of the "
                    f"{_named(network, architecture)}: {place} needs {tuple(expected[place].shape)}"
                )
            # A clone, because a part of a tensor would keep the whole of it.
            converted[place] = part.to(dtype).clone()
    theirs_by_ours = {ours: theirs for theirs, ours in ours_by_theirs.items()}
    for place in expected:
        if place not in converted:
            module, _, kind = place.rpartition(".")
            module = module.replace(".to_q", ".to_qkv") if module not in theirs_by_ours else module
            theirs = theirs_by_ours.get(module.replace(".to_k", ".to_qkv").replace(".to_v", ".to_qkv"), "")
            named = f"{theirs}.{kind}" if theirs else place
            raise ValueError(f"the checkpoint lacks the tensor {named!r} of the {_named(network, architecture)}")
    network.load_state_dict(converted, assign=True)
    return network.eval().requires_grad_(False)


def _parts(
    place: str, name: str, value: Tensor, expected: Mapping[str, Tensor], architecture: ADMArchitecture
) -> Iterator[tuple[str, Tensor]]:
    """A tensor at its place here; attention's is cut into three, and 1x1 convolutions over places are matrices."""
    if value.ndim == 3 and value.shape[2] == 1:
        value = value[:, :, 0]
    if ".to_qkv." not in place or place in expected:
        yield place, value
        return
    channels = value.shape[0] // 3
    heads = architecture.heads or channels // architecture.head_channels
    if value.shape[0] % 3 or heads < 1 or channels % heads:
        raise ValueError(
            f"the checkpoint's tensor {name!r} of {value.shape[0]} rows is not that of the network's heads"
        )
    if architecture.new_attention_order:
        rows = value.unflatten(0, (3, channels)).unbind(0)
    else:
        split = value.unflatten(0, (heads, 3, channels // heads)).transpose(0, 1)
        rows = split.flatten(1, 2).unbind(0)
    for letter, part in zip("qkv", rows, strict=True):
        yield place.replace(".to_qkv.", f".to_{letter}."), part


def _named(network: nn.Module, architecture: ADMArchitecture) -> str:
    kind = "classifier" if isinstance(network, NoisyClassifier) else "U-Net"
    conditional = "" if architecture.classes is None else f" with {architecture.classes} classes"
    return f"{architecture.image_size}x{architecture.image_size} {kind}{conditional} that was asked for"
