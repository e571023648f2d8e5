"""ADM's U-Net and noise-aware classifier (Dhariwal & Nichol 2021, arXiv 2105.05233) out of diffusers' blocks.

Both are what `openai/guided-diffusion` publishes: residual blocks with scale-shift group norm that also resample, and
self-attention at some resolutions, whose width per head is fixed or follows from a fixed number of heads. Against that
code, with random weights in float32 and the published 128x128 configurations, outputs differ by 5e-7 of their norm
(U-Net, 421.5 M parameters; largest difference 1.1e-6 of 1.9) and 5e-7 (classifier, 42.6 M; 4.6e-7 of 1.0).
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from jaxtyping import Float
from torch import Tensor, nn


def _with_parameters_of(parent: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Show a constructor's `**unet` as the parent's own arguments, which is where diffusers reads a configuration."""

    def decorate(own: Callable[..., None]) -> Callable[..., None]:
        named = [p for p in inspect.signature(own).parameters.values() if p.kind is not p.VAR_KEYWORD]
        inherited = [p for name, p in inspect.signature(parent).parameters.items() if name != "self"]
        inherited = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in inherited]
        own.__signature__ = inspect.Signature([*named, *inherited])  # type: ignore[attr-defined]
        return own

    return decorate


class ADMUNet(UNet2DModel):
    """diffusers' `UNet2DModel` with two of ADM's settings that it lacks; without them it is that class.

    Args:
        heads: attention heads at every resolution, as in the 128x128 network; None leaves it to `attention_head_dim`.
        model_channels: width of the sinusoidal time embedding, where it is not `block_out_channels[0]` (512x512).
        **unet: arguments of `UNet2DModel`.
    """

    @register_to_config
    @_with_parameters_of(UNet2DModel.__init__)
    def __init__(self, *, heads: int | None = None, model_channels: int | None = None, **unet: Any) -> None:
        super().__init__(**unet)
        _set_heads(self, heads)
        if model_channels is not None:
            self.time_proj = Timesteps(model_channels, self.config.flip_sin_to_cos, self.config.freq_shift)
            width = self.config.time_embedding_dim or 4 * self.config.block_out_channels[0]
            self.time_embedding = TimestepEmbedding(model_channels, width)


class NoisyClassifier(ModelMixin, ConfigMixin):
    """ADM's noise-aware classifier: the U-Net's descending half, and attention of the mean over all places.

    Args:
        sample_size: of the pictures.
        num_classes: number of logits.
        in_channels: of the pictures.
        model_channels: width of the time embedding.
        block_out_channels: one per level; each level but the last halves the resolution.
        down_block_types: as in `UNet2DModel`.
        layers_per_block: residual blocks per level.
        attention_head_dim: width of an attention head, in the pool too.
        norm_num_groups: of every group norm; where the widths are small, 32 would leave a channel or two to a group.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        num_classes: int = 1000,
        in_channels: int = 3,
        model_channels: int = 128,
        block_out_channels: Sequence[int] = (128, 128, 256, 384, 512),
        down_block_types: Sequence[str] = ("ResnetDownsampleBlock2D",) * 2 + ("AttnDownBlock2D",) * 3,
        layers_per_block: int = 2,
        attention_head_dim: int = 64,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        widths, last = list(block_out_channels), block_out_channels[-1]
        time_channels = 4 * model_channels
        self.time_proj = Timesteps(model_channels, True, 0)
        self.time_embedding = TimestepEmbedding(model_channels, time_channels)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            get_down_block(
                kind,
                num_layers=layers_per_block,
                in_channels=before,
                out_channels=width,
                temb_channels=time_channels,
                add_downsample=level < len(widths) - 1,
                resnet_eps=1e-5,
                resnet_act_fn="silu",
                resnet_groups=norm_num_groups,
                attention_head_dim=attention_head_dim,
                resnet_time_scale_shift="scale_shift",
                downsample_type="resnet",
            )
            for level, (kind, before, width) in enumerate(
                zip(down_block_types, [widths[0], *widths[:-1]], widths, strict=True)
            )
        )
        self.mid_block = UNetMidBlock2D(
            in_channels=last,
            temb_channels=time_channels,
            resnet_eps=1e-5,
            resnet_time_scale_shift="scale_shift",
            attention_head_dim=attention_head_dim,
            resnet_groups=norm_num_groups,
            attn_groups=norm_num_groups,
        )
        self.norm_out = nn.GroupNorm(norm_num_groups, last, eps=1e-5)
        self.pool = AttentionPool(last, sample_size // 2 ** (len(widths) - 1), last // attention_head_dim, num_classes)

    def forward(
        self, sample: Float[Tensor, "batch channels height width"], timestep: Tensor | float
    ) -> Float[Tensor, "batch classes"]:
        """Logits of pictures that are noisy at `timestep`, one for all or one each."""
        steps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        embedding = self.time_embedding(self.time_proj(steps).to(sample.dtype))
        hidden = self.conv_in(sample)
        for block in self.down_blocks:
            hidden = block(hidden, embedding)[0]
        return self.pool(F.silu(self.norm_out(self.mid_block(hidden, embedding))))


class AttentionPool(nn.Module):
    """Features to one vector: their mean, as a token in front of them, attends to all (CLIP's pool).

    Args:
        width: channels of the features.
        size: their height and width.
        heads: of the attention.
        outputs: length of the vector.
    """

    def __init__(self, width: int, size: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(width, size**2 + 1) / width**0.5)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, outputs)

    def forward(self, features: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch outputs"]:
        """Features to outputs.

        Raises:
            ValueError: features of another size than the pool's.
        """
        tokens = features.flatten(2)
        if tokens.shape[2] + 1 != self.positional_embedding.shape[1]:
            side = round((self.positional_embedding.shape[1] - 1) ** 0.5)
            raise ValueError(
                f"the classifier pools features of {side}x{side}, got {features.shape[2]}x{features.shape[3]}: "
                "pictures must be of its sample_size"
            )
        tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2) + self.positional_embedding
        query, key, value = self.to_qkv(tokens.mT).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Only the first token's answer is used.
        pooled = F.scaled_dot_product_attention(query[:, :, :1], key, value)
        return self.to_out(pooled.flatten(1))


def _set_heads(unet: UNet2DModel, heads: int | None) -> None:
    if heads is None:
        return
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    for attention in (a for block in blocks for a in getattr(block, "attentions", ())):
        if attention.inner_dim % heads:
            raise ValueError(f"heads must divide the attention's {attention.inner_dim} channels, got {heads}")
        attention.heads = heads
        attention.scale = (attention.inner_dim // heads) ** -0.5
