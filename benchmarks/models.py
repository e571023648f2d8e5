"""The paper's models with random weights: what rectification costs does not depend on the weights' values.

Diffusers' own classes (EDM2: this package's) in their published configurations, and made small for a CPU, for one
image; each says what it was scaled by.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from companion.networks.edm2 import EDM2UNet
from companion.pipelines.edm2.pipeline import EDM2Pipeline

SEED = 0


@dataclass(frozen=True)
class Model:
    """One of the paper's models, made small.

    Args:
        paper: its name in the paper's table.
        scaled: what differs from the published configuration.
        build: the pipeline with random weights.
        call: arguments of its call, three evaluations of the denoiser.
        published: the pipeline in its published size, with random weights.
        batch: the paper's, for time in the published size.
    """

    paper: str
    scaled: str
    build: Callable[[], DiffusionPipeline]
    call: dict[str, Any]
    published: Callable[[], DiffusionPipeline]
    batch: int


def _dit(heads: int = 4, layers: int = 7) -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(transformer, _autoencoder(), DDIMScheduler())


def _edm2(channels: int, in_channels: int, guide: int | None = None, per_head: int | None = None) -> EDM2Pipeline:
    def network(width: int, classes: int) -> EDM2UNet:
        return EDM2UNet(
            sample_size=64,
            in_channels=in_channels,
            num_classes=classes,
            model_channels=width,
            channels_per_head=per_head or width,
        )

    reference = None if guide is None else network(guide, 0)
    return EDM2Pipeline(network(channels, 1000), reference, null_labels=guide is None)


def _stable_diffusion(width: int, size: int, groups: int = 16, **config: Any) -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        norm_num_groups=groups,
        **config,
    )
    scheduler = DDIMScheduler(
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction" if "use_linear_projection" in config else "epsilon",
    )
    return StableDiffusionPipeline(
        vae=_autoencoder(),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl(
    width: int = 32, size: int = 48, groups: int = 16, heads: tuple[int, ...] = (2, 4, 8)
) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=groups,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=heads,
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return StableDiffusionXLPipeline(
        vae=_autoencoder(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def _stable_diffusion_3(heads: int = 4, layers: int = 4, size: int = 32, table: int = 32) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=size,
        num_attention_heads=heads,
        attention_head_dim=64,
        num_layers=layers,
        caption_projection_dim=64 * heads,
        pos_embed_max_size=table,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(latent_channels=16),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _autoencoder(latent_channels: int = 4) -> AutoencoderKL:
    """Small: decoding is no part of what is measured, but DiTPipeline always decodes."""
    return AutoencoderKL(
        latent_channels=latent_channels,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )


def _text(width: int, pooled: int | None = None) -> dict[str, Any]:
    """A prompt and a negative prompt as a text encoder would give them, and three steps."""
    generator = torch.Generator().manual_seed(SEED)

    def embedding(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    call: dict[str, Any] = {
        "prompt_embeds": embedding(1, 77, width),
        "negative_prompt_embeds": embedding(1, 77, width),
        "guidance_scale": 7.5,
        "num_inference_steps": 3,
        "output_type": "latent",
    }
    if pooled is not None:
        call |= {"pooled_prompt_embeds": embedding(1, pooled), "negative_pooled_prompt_embeds": embedding(1, pooled)}
    return call


# Heun's method evaluates the network 2N - 1 times.
_EDM2_CALL = {"class_labels": [7], "guidance_scale": 2.0, "num_inference_steps": 2, "output_type": "latent"}
_GUIDED = "; guided by the unconditional XS"

MODELS = (
    Model("EDM2-S 64", "width 1/6", lambda: _edm2(32, 3), _EDM2_CALL, lambda: _edm2(192, 3, per_head=64), 8),
    Model(
        "DiT-XL/2 256",
        "width 1/4, depth 1/4",
        _dit,
        {"class_labels": [7], "guidance_scale": 4.0, "num_inference_steps": 3, "output_type": "np"},
        lambda: _dit(16, 28),
        8,
    ),
    Model("EDM2-S 512", "width 1/6", lambda: _edm2(32, 4), _EDM2_CALL, lambda: _edm2(192, 4, per_head=64), 8),
    Model(
        "EDM2-S 512" + _GUIDED,
        "widths 1/6",
        lambda: _edm2(32, 4, guide=21),
        _EDM2_CALL,
        lambda: _edm2(192, 4, 128, 64),
        8,
    ),
    Model("EDM2-XXL 512", "width 1/8", lambda: _edm2(56, 4), _EDM2_CALL, lambda: _edm2(448, 4, per_head=64), 8),
    Model(
        "EDM2-XXL 512" + _GUIDED,
        "widths 1/8",
        lambda: _edm2(56, 4, guide=16),
        _EDM2_CALL,
        lambda: _edm2(448, 4, 128, 64),
        8,
    ),
    Model(
        "SD-V1.4 512",
        "width 3/20, latents 32 for 64",
        lambda: _stable_diffusion(48, 32, cross_attention_dim=768, attention_head_dim=8),
        _text(768),
        lambda: _stable_diffusion(320, 64, 32, cross_attention_dim=768, attention_head_dim=8),
        4,
    ),
    Model(
        "SD-V2.1 768",
        "width 3/20, latents 40 for 96",
        lambda: _stable_diffusion(
            48, 40, cross_attention_dim=1024, attention_head_dim=(3, 6, 12, 12), use_linear_projection=True
        ),
        _text(1024),
        lambda: _stable_diffusion(
            320, 96, 32, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        ),
        4,
    ),
    Model(
        "SD-XL 1024",
        "width 1/10, latents 48 for 128",
        _stable_diffusion_xl,
        _text(2048, 1280),
        lambda: _stable_diffusion_xl(320, 128, 32, (5, 10, 20)),
        2,
    ),
    Model(
        "SD3 1024",
        "width 1/6, depth 1/6, latents 32 for 128",
        _stable_diffusion_3,
        _text(4096, 2048),
        lambda: _stable_diffusion_3(24, 24, 128, 192),
        2,
    ),
)


def denoisers(pipe: DiffusionPipeline) -> list[nn.Module]:
    """The networks that guidance evaluates: the denoiser, and its guide if it has one."""
    parts = [getattr(pipe, name, None) for name in ("unet", "transformer", "guide")]
    return [part for part in parts if isinstance(part, nn.Module)]


def build(model: Model, device: torch.device | str = "cpu") -> DiffusionPipeline:
    """The pipeline with random weights, none of which asks for gradients: public code, where they do, costs more.

    On a GPU in its published size, elsewhere made small.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        pipe = model.published() if torch.device(device).type == "cuda" else model.build()
    pipe.set_progress_bar_config(disable=True)
    for network in denoisers(pipe):
        network.eval().requires_grad_(False)
    return pipe.to(device)
