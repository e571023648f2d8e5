"""Tiny random pipelines: real diffusers classes, a few thousand weights."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)


def _random(module: torch.nn.Module, spread: float) -> torch.nn.Module:
    """Normal weights everywhere: fresh DiT and U-Net blocks end in zeros and would predict nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=spread, generator=generator)
    return module.eval().requires_grad_(False)


def tiny_autoencoder() -> AutoencoderKL:
    return _random(
        AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
        ),
        0.1,
    )


def tiny_dit(scheduler: SchedulerMixin | None = None, dtype: torch.dtype = torch.float64, **config: int) -> DiTPipeline:
    """An 8x8x4 class-conditional pipeline; `config` overrides the transformer's settings."""
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    }
    transformer = _random(DiTTransformer2DModel(**{**settings, **config}), 0.15)
    pipe = DiTPipeline(transformer, tiny_autoencoder(), scheduler or DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def tiny_sd(scheduler: SchedulerMixin | None = None, dtype: torch.dtype = torch.float64) -> StableDiffusionPipeline:
    """An 8x8x4 text-conditional pipeline without a text encoder: call it with `prompts()`."""
    unet = _random(
        UNet2DConditionModel(
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=12,
            attention_head_dim=4,
            sample_size=8,
        ),
        0.2,
    )
    pipe = StableDiffusionPipeline(
        vae=tiny_autoencoder(),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler or DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def prompts(batch: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Embeddings in the place of prompts."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randn(2, batch, 5, 12, generator=generator, dtype=torch.float64).to(dtype)
    words = 4 * words
    return {"prompt_embeds": words[0], "negative_prompt_embeds": words[1]}
