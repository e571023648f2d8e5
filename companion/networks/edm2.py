"""The network of EDM2: a magnitude-preserving U-Net with EDM's preconditioning, for sampling.

Every layer keeps the expected magnitude of its input, so that neither activations nor weights drift in training (Karras
et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696, configuration G;
equation numbers are that paper's). What belongs to training alone is left out: dropout, forced weight normalisation
and the head that estimates the loss's uncertainty. Parameters are named as in the published checkpoints. With the same
random weights it and the published network (github.com/NVlabs/edm2) agree to 3e-6 of F's norm in float32 and 4e-14 in
float64, at σ from 0.002 to 80.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from jaxtyping import Float, Int
from torch import Tensor, nn

from companion.arguments import check_integer

# E[silu(n)²]^½ of a unit normal n, to the three digits that the published networks were trained with.
_SILU_MAGNITUDE = 0.596


def normalise(x: Float[Tensor, "..."], dim: int | Sequence[int]) -> Float[Tensor, "..."]:
    """x at unit root mean square over `dim`; 1e-4 keeps zeros finite. Sums are taken in float32 at least."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=_wide(x.dtype))
    return x / (1e-4 + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Magnitude-preserving SiLU (eq. 81)."""
    return F.silu(x) / _SILU_MAGNITUDE


def mp_sum(a: Float[Tensor, "..."], b: Float[Tensor, "..."], balance: float = 0.5) -> Float[Tensor, "..."]:
    """Magnitude-preserving sum (eq. 88): `balance` 0 is a, 1 is b."""
    return a.lerp(b, balance) / math.hypot(1 - balance, balance)


def mp_cat(
    a: Float[Tensor, "batch c1 height width"], b: Float[Tensor, "batch c2 height width"], balance: float = 0.5
) -> Float[Tensor, "batch c1+c2 height width"]:
    """Magnitude-preserving concatenation (eq. 103): each part contributes by `balance`, not by its channels."""
    first, second = a.shape[1], b.shape[1]
    scale = math.sqrt(first + second) / math.hypot(1 - balance, balance)
    return torch.cat([scale * (1 - balance) / math.sqrt(first) * a, scale * balance / math.sqrt(second) * b], dim=1)


class MPFourier(nn.Module):
    """Magnitude-preserving Fourier features (eq. 75) of a number per sample."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x: Float[Tensor, " batch"]) -> Float[Tensor, "batch channels"]:
        angles = torch.outer(x, self.freqs.to(x.dtype)) + self.phases.to(x.dtype)
        return angles.cos() * math.sqrt(2)


class MPConv(nn.Module):
    """Magnitude-preserving convolution, or linear layer where `kernel` is 0 (eq. 47).

    Each output's weights are brought to unit norm on the fly (eq. 66), unless `folded` says that they were once and
    for all.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *([kernel, kernel] if kernel else [])))
        self.folded = False

    def effective_weight(self, gain: float | Tensor = 1.0) -> Float[Tensor, "outputs ..."]:
        """The weights that are applied, in float32 at least."""
        weight = self.weight.to(_wide(self.weight.dtype))
        fan_in = weight[0].numel()
        return normalise(weight, dim=tuple(range(1, weight.ndim))) * (gain / math.sqrt(fan_in))

    def forward(self, x: Float[Tensor, "batch inputs ..."], gain: float | Tensor = 1.0) -> Tensor:
        weight = self.weight if self.folded else self.effective_weight(gain)
        weight = weight.to(x.dtype)
        if weight.ndim == 2:
            return x @ weight.T
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class Block(nn.Module):
    """Block of the encoder or decoder, with self-attention where `heads` is not 0 (figure 21).

    Args:
        inputs, outputs, embedding: numbers of channels.
        decoder: whether the pixel norm is left out and the skip's convolution comes after the residual branch.
        resample: "down" halves the resolution by averaging, "up" doubles it by repetition, "keep" does neither.
        heads: of the attention; 0 is none.
        res_balance, attn_balance: shares of the residual branch and of the attention in their sums.
        clip: largest absolute activation passed on.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        *,
        decoder: bool,
        resample: str = "keep",
        heads: int = 0,
        res_balance: float,
        attn_balance: float,
        clip: float | None,
    ) -> None:
        super().__init__()
        self.outputs, self.decoder, self.resample, self.heads = outputs, decoder, resample, heads
        self.res_balance, self.attn_balance, self.clip = res_balance, attn_balance, clip
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(inputs if decoder else outputs, outputs, 3)
        self.emb_linear = MPConv(embedding, outputs, 0)
        self.conv_res1 = MPConv(outputs, outputs, 3)
        self.conv_skip = MPConv(inputs, outputs, 1) if inputs != outputs else None
        self.attn_qkv = MPConv(outputs, 3 * outputs, 1) if heads else None
        self.attn_proj = MPConv(outputs, outputs, 1) if heads else None

    def forward(
        self, x: Float[Tensor, "batch inputs height width"], embedding: Float[Tensor, "#batch embedding"]
    ) -> Float[Tensor, "batch outputs height2 width2"]:
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if not self.decoder:
            x = normalise(self._skip(x), dim=1)
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(embedding, gain=self.emb_gain) + 1
        y = self.conv_res1(mp_silu(y * scale[:, :, None, None].to(y.dtype)))
        x = mp_sum(self._skip(x) if self.decoder else x, y, self.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            x = mp_sum(x, self.attn_proj(self._attend(self.attn_qkv(x))), self.attn_balance)
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def _skip(self, x: Tensor) -> Tensor:
        return x if self.conv_skip is None else self.conv_skip(x)

    def _attend(self, qkv: Float[Tensor, "batch c3 height width"]) -> Float[Tensor, "batch c height width"]:
        """Cosine attention: queries, keys and values are pixel-normalised per head (section 2.2)."""
        batch, _, height, width = qkv.shape
        parts = normalise(qkv.reshape(batch, self.heads, -1, 3, height * width), dim=2)
        q, k, v = (part.mT for part in parts.unbind(3))
        return F.scaled_dot_product_attention(q, k, v).mT.reshape(batch, -1, height, width)


class EDM2UNet(ModelMixin, ConfigMixin):
    """EDM2's denoiser D(x; σ, label): estimates x_0 from x = x_0 + σ n ("sample" prediction at α = 1).

    `D = c_skip x + c_out F(c_in x, ¼ ln σ)` with EDM's coefficients (Karras et al. 2022, table 1), so that F's input
    and its training target have unit variance at every σ.

    Args:
        sample_size: height and width, a multiple of 2^(levels - 1).
        in_channels: 3 for pixels, 4 for the autoencoder's latents.
        num_classes: of the labels; 0 is an unconditional network.
        model_channels: channels of the first level; 128, 192, 256, 320, 384, 448 in XS, S, M, L, XL, XXL.
        channel_mult: channels of each level, in units of `model_channels`.
        channel_mult_noise, channel_mult_emb: channels of the noise features and of the embedding in the same unit;
            None takes the first level's and the widest level's.
        num_blocks: blocks of each level.
        attn_resolutions: heights at which blocks have self-attention.
        channels_per_head: of the attention.
        label_balance: share of the label in the embedding, from 0 to 1.
        concat_balance: share of the skip connections in the decoder's concatenations, from 0 to 1.
        res_balance, attn_balance, clip_act: see `Block`.
        sigma_data: standard deviation of x_0.
        folded: whether the convolutions' weights are stored normalised (see `fold_weights`).

    Raises:
        ValueError: a size or a number of channels or blocks is not positive, there are no levels, or the sample size
            cannot be halved often enough.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 4,
        num_classes: int = 1000,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        channels_per_head: int = 64,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
        sigma_data: float = 0.5,
        folded: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"sample_size": sample_size, "in_channels": in_channels, "model_channels": model_channels}
        _check_sizes({**sizes, "channels_per_head": channels_per_head, "num_blocks": num_blocks}, channel_mult)
        widths = [model_channels * mult for mult in channel_mult]
        noise = widths[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        embedding = max(widths) if channel_mult_emb is None else model_channels * channel_mult_emb
        block = partial(Block, embedding=embedding, res_balance=res_balance, attn_balance=attn_balance, clip=clip_act)
        levels = []
        for level, width in enumerate(widths):
            size = sample_size >> level
            levels.append((f"{size}x{size}", width, width // channels_per_head if size in attn_resolutions else 0))

        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise)
        self.emb_noise = MPConv(noise, embedding, 0)
        self.emb_label = MPConv(num_classes, embedding, 0) if num_classes else None

        self.enc = nn.ModuleDict()
        current = in_channels + 1  # a channel of ones stands in for biases
        skips = []
        for level, (name, width, heads) in enumerate(levels):
            if level == 0:
                self.enc[f"{name}_conv"] = MPConv(current, width, 3)
                current = width
            else:
                self.enc[f"{name}_down"] = block(current, current, decoder=False, resample="down")
            skips.append(current)
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = block(current, width, decoder=False, heads=heads)
                current = width
                skips.append(current)

        self.dec = nn.ModuleDict()
        for level, (name, width, heads) in reversed(list(enumerate(levels))):
            if level == len(widths) - 1:
                self.dec[f"{name}_in0"] = block(current, current, decoder=True, heads=current // channels_per_head)
                self.dec[f"{name}_in1"] = block(current, current, decoder=True)
            else:
                self.dec[f"{name}_up"] = block(current, current, decoder=True, resample="up")
            for i in range(num_blocks + 1):
                self.dec[f"{name}_block{i}"] = block(current + skips.pop(), width, decoder=True, heads=heads)
                current = width
        self.out_conv = MPConv(current, in_channels, 3)
        if folded:
            for layer in self._foldable():
                layer.folded = True

    def forward(
        self,
        sample: Float[Tensor, "batch channels height width"],
        timestep: float | Float[Tensor, "*batch"],
        class_labels: Int[Tensor, " batch"] | Float[Tensor, "batch classes"] | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """The estimate D(x; σ, label) of x_0, in the sample's dtype; the layers run in the network's own.

        Args:
            sample: x, the noisy batch.
            timestep: σ, one for all or one per sample.
            class_labels: classes from 0, or rows of class weights; None is the null label, all weights 0, on which a
                network with label dropout is unconditional.
            return_dict: whether the result is a `UNet2DOutput` or a tuple.

        Raises:
            ValueError: labels for a network without classes, or of a shape that is neither of the two.
        """
        wide = _wide(sample.dtype)
        x = sample.to(wide)
        sigma = torch.as_tensor(timestep, dtype=wide, device=x.device).reshape(-1, 1, 1, 1)
        data = self.config.sigma_data
        size = (sigma**2 + data**2).sqrt()
        c_skip, c_out, c_in = (data / size) ** 2, sigma * data / size, 1 / size
        embedding = self._embedding(sigma.flatten().log() / 4, class_labels)
        denoised = c_skip * x + c_out * self._raw((c_in * x).to(self.dtype), embedding).to(wide)
        denoised = denoised.to(sample.dtype)
        return UNet2DOutput(sample=denoised) if return_dict else (denoised,)

    def fold_weights(self) -> "EDM2UNet":
        """Normalise the convolutions' weights once instead of in every call: the same outputs, bit for bit, sooner.

        The network stays folded when it is saved. Small layers whose weights are not applied in the network's own
        dtype keep their on-the-fly form.
        """
        for layer in self._foldable():
            if not layer.folded:
                layer.weight.data = layer.effective_weight().detach().to(layer.weight.dtype)
                layer.folded = True
        self.register_to_config(folded=True)
        return self

    def _foldable(self) -> list[MPConv]:
        return [m for m in self.modules() if isinstance(m, MPConv) and m.weight.ndim == 4 and m is not self.out_conv]

    def _embedding(self, noise: Float[Tensor, "*batch"], class_labels: Tensor | None) -> Float[Tensor, "#batch c"]:
        noise = noise.to(_wide(self.dtype))
        embedding = self.emb_noise(self.emb_fourier(noise))
        if self.emb_label is None:
            if class_labels is not None:
                raise ValueError("class_labels must be None: this network was trained without classes (num_classes=0)")
            return mp_silu(embedding)
        classes = self.config.num_classes
        if class_labels is None:
            weights = embedding.new_zeros(1, classes)
        elif class_labels.ndim == 1 and not class_labels.is_floating_point():
            weights = F.one_hot(class_labels.to(embedding.device), classes).to(embedding)
        elif class_labels.ndim == 2 and class_labels.shape[1] == classes:
            weights = class_labels.to(embedding)
        else:
            raise ValueError(
                f"class_labels must be (batch,) integers or (batch, {classes}) weights, "
                f"got {class_labels.dtype} of shape {tuple(class_labels.shape)}"
            )
        label = self.emb_label(weights * math.sqrt(classes))
        return mp_silu(mp_sum(embedding, label, self.config.label_balance))

    def _raw(self, x: Tensor, embedding: Tensor) -> Tensor:
        """F, the U-Net inside the preconditioning."""
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("_conv") else layer(x, embedding)
            skips.append(x)
        for name, layer in self.dec.items():
            if "_block" in name:
                x = mp_cat(x, skips.pop(), self.config.concat_balance)
            x = layer(x, embedding)
        return self.out_conv(x, gain=self.out_gain)


def _check_sizes(sizes: Mapping[str, int], channel_mult: Sequence[int]) -> None:
    for name, value in {**sizes, **{f"channel_mult[{i}]": mult for i, mult in enumerate(channel_mult)}}.items():
        check_integer(name, value, 1, 1 << 16)
    if not 1 <= len(channel_mult) <= 16:
        raise ValueError(f"channel_mult must name 1 to 16 levels, got {channel_mult}")
    if sizes["sample_size"] % 2 ** (len(channel_mult) - 1):
        raise ValueError(
            f"sample_size must be a multiple of {2 ** (len(channel_mult) - 1)}, got {sizes['sample_size']}"
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
