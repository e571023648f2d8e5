"""How the text-conditional models are built and trained: mini-sd, mini-sd-v and mini-flow, on captioned scenes.

All learn on the latents of single-object scenes and drop their caption one time in ten for the empty one, which is what
their pipelines pass as negative prompt.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer, GlmConfig, GlmModel

from companion.minis.captions import CAPTION_TOKENS, caption_tokenizer, text_config
from companion.minis.latents import SceneWindow
from companion.minis.reading import WithReader, legible_reading_loss
from companion.minis.recipes import SCHEDULE
from companion.minis.scenes import SIZE
from companion.minis.training import TrainingConfig, noised, train
from companion.seeding import sample_seed

Prediction = Literal["epsilon", "v_prediction"]

DROPPED = 0.1  # share of captions replaced by the empty one

SD_TRAINING = {
    "epsilon": TrainingConfig(steps=3700, batch_size=64, learning_rate=2e-3, ema_decay=0.998, optimiser="muon"),
    "v_prediction": TrainingConfig(steps=1100, batch_size=64, learning_rate=1e-3, ema_decay=0.998, optimiser="muon"),
}
FLOW_TRAINING = TrainingConfig(steps=5400, batch_size=64, learning_rate=2e-3, ema_decay=0.998, optimiser="muon")

_WIDTH = 96


def build_unet() -> UNet2DConditionModel:
    """Text-conditional U-Net of 3.5 M parameters on 16x16x4 latents; attention at 8x8 and in the middle, at 4x4."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, _WIDTH, _WIDTH),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=_WIDTH,
        attention_head_dim=(2, 3, 3),  # these are numbers of heads, whatever the name says
        norm_num_groups=16,
        use_linear_projection=True,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text encoder, two layers of width 96."""
    return CLIPTextModel(text_config(tokenizer, _WIDTH))


class TextConditional(nn.Module):
    """A text encoder and a denoiser that reads its output, trained together."""

    def __init__(self, text_encoder: nn.Module, denoiser: WithReader) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.denoiser = denoiser


def caption_tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Int[Tensor, "captions tokens"]:
    """Token numbers as both pipelines make them of captions: 16 each, padded on the tokenizer's side."""
    padding = {"padding": "max_length", "max_length": CAPTION_TOKENS, "truncation": True}
    return tokenizer(captions, **padding, return_tensors="pt").input_ids


Batch = tuple[Float[Tensor, "b c h w"], Int[Tensor, "b tokens"], Float[Tensor, "b parameters"], torch.Generator]


def captioned_batches(window: SceneWindow, tokenizer: CLIPTokenizer, config: TrainingConfig) -> Callable[[int], Batch]:
    """A function from the step number to its batch: clean latents, caption tokens (one in ten is the empty prompt's),
    scene parameters, and the generator that drew them, for the noise.
    """

    def batch(step: int) -> Batch:
        generator = torch.Generator().manual_seed(sample_seed(config.seed, step))
        latents, scenes, parameters = window.batch(step, config.batch_size, generator)
        dropped = torch.rand(config.batch_size, generator=generator) < DROPPED
        captions = ["" if drop else one.caption for one, drop in zip(scenes, dropped.tolist(), strict=True)]
        return latents, caption_tokens(tokenizer, captions), parameters, generator

    return batch


def train_sd(
    folder: Path,
    autoencoder: AutoencoderKL,
    config: TrainingConfig | None = None,
    *,
    prediction: Prediction = "epsilon",
    start: StableDiffusionPipeline | None = None,
    window: SceneWindow | None = None,
) -> tuple[StableDiffusionPipeline, dict]:
    """Train mini-sd, or its v-prediction variant.

    The loss is the squared error of ε (or of v = α ε - σ x0) under min-SNR-5 weights (Hang et al. 2023), plus the
    reading of the scene's parameters off the middle tokens where the noise leaves them legible.

    Args:
        folder: checkpoints and log.
        prediction: what the U-Net predicts.
        start: a trained pipeline, of either prediction, to continue from; None trains from scratch.
        window: the scenes; None begins with the first.
    """
    config = config or SD_TRAINING[prediction]
    window = window or SceneWindow(autoencoder)
    tokenizer = caption_tokenizer()
    torch.manual_seed(config.seed)
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    if start is not None:
        unet.load_state_dict(start.unet.state_dict())
        text_encoder.load_state_dict(start.text_encoder.state_dict())
    model = TextConditional(text_encoder, WithReader(unet, "mid_block", _WIDTH))
    scheduler = DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction)
    alphas_cumprod = scheduler.alphas_cumprod
    batch = captioned_batches(window, tokenizer, config)

    def loss(step: int) -> Tensor:
        clean, tokens, parameters, generator = batch(step)
        noisy, timestep, noise, alpha_bar = noised(clean, alphas_cumprod, generator)
        snr = alpha_bar / (1 - alpha_bar)
        target, weight = noise, snr.clamp(max=5) / snr
        if prediction == "v_prediction":
            target = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean
            weight = snr.clamp(max=5) / (snr + 1)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel's backward pass is slower at these sizes
            prompt_embeds = model.text_encoder(tokens)[0]
            predicted, read = model.denoiser(noisy, timestep, encoder_hidden_states=prompt_embeds)
        denoising = weight * (predicted.float() - target) ** 2
        return denoising.mean() + legible_reading_loss(read, parameters, snr)

    record = {**train(model, loss, config, folder), "window": window.described}
    return sd_pipeline(unet, text_encoder, tokenizer, autoencoder, scheduler), record


def sd_pipeline(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    autoencoder: AutoencoderKL,
    scheduler: Any,
) -> StableDiffusionPipeline:
    """The pipeline around a trained U-Net; no safety checker, which would need a model larger than this one."""
    autoencoder.register_to_config(scaling_factor=1.0)  # its latents have unit variance already
    return StableDiffusionPipeline(
        autoencoder, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


def build_flow_transformer() -> CogView4Transformer2DModel:
    """CogView4's transformer in small: 64 image and 16 text tokens, width 192, five blocks; predicts a velocity.

    Blocks begin as the identity and the output at zero (adaLN-zero, Peebles & Xie 2023).
    """
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        num_attention_heads=3,
        attention_head_dim=64,
        text_embed_dim=_GLM_WIDTH,
        time_embed_dim=128,
        condition_dim=16,
        sample_size=SIZE // 4,
        rope_axes_dim=(16, 16),
    )
    silenced = [block.norm1.linear for block in transformer.transformer_blocks]
    for layer in (*silenced, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


_GLM_WIDTH = 128


def build_glm(tokenizer: CLIPTokenizer) -> GlmModel:
    """A GLM of two layers; the pipeline reads the last but one hidden state, the first layer's output."""
    config = GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=_GLM_WIDTH,
        intermediate_size=2 * _GLM_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=_GLM_WIDTH // 4,
        max_position_embeddings=1024,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.pad_token_id,
    )
    return GlmModel(config)


def picture_sizes(count: int) -> dict[str, Float[Tensor, "count 2"]]:
    """The sizes and crop that `CogView4Pipeline` passes to its transformer for pictures of its own size, uncropped."""
    size, corner = torch.full((count, 2), float(SIZE)), torch.zeros(count, 2)
    return {"original_size": size, "target_size": size, "crop_coords": corner}


def flow_timesteps(count: int, generator: torch.Generator) -> Float[Tensor, " count"]:
    """Whole timesteps from 1 to 1000, drawn logit-normally with mean 1 and standard deviation 1 (Esser et al. 2024).

    Three in four lie between 500 and 920, where shapes are decided.
    """
    return (1000 * torch.sigmoid(1 + torch.randn(count, generator=generator))).ceil()


def train_flow(
    folder: Path,
    autoencoder: AutoencoderKL,
    config: TrainingConfig = FLOW_TRAINING,
    *,
    start: CogView4Pipeline | None = None,
    window: SceneWindow | None = None,
) -> tuple[CogView4Pipeline, dict]:
    """Train mini-flow: x = (1 - σ) clean + σ noise, and the network predicts the velocity noise - clean.

    The timesteps t = 1000 σ are those of `flow_timesteps`. The reader joins as in the other models.

    Args:
        folder: checkpoints and log.
        start: a trained pipeline to continue from; None trains from scratch.
        window: the scenes; None begins with the first.
    """
    window = window or SceneWindow(autoencoder)
    tokenizer = caption_tokenizer(padding_side="left", longest=1024)
    torch.manual_seed(config.seed)
    transformer, text_encoder = build_flow_transformer(), build_glm(tokenizer)
    if start is not None:
        transformer.load_state_dict(start.transformer.state_dict())
        text_encoder.load_state_dict(start.text_encoder.state_dict())
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    model = TextConditional(text_encoder, WithReader(transformer, "transformer_blocks.2", width))
    scheduler = FlowMatchEulerDiscreteScheduler()  # unshifted: the pipeline passes its timesteps unshifted
    batch = captioned_batches(window, tokenizer, config)

    def loss(step: int) -> Tensor:
        clean, tokens, parameters, generator = batch(step)
        timestep = flow_timesteps(len(clean), generator)
        noise = torch.randn(clean.shape, generator=generator)
        sigma = (timestep / 1000).view(-1, 1, 1, 1)
        noisy = (1 - sigma) * clean + sigma * noise
        with sdpa_kernel(SDPBackend.MATH):
            prompt_embeds = model.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
            predicted, read = model.denoiser(
                hidden_states=noisy, encoder_hidden_states=prompt_embeds, timestep=timestep, **picture_sizes(len(clean))
            )
        velocity = (predicted.float() - (noise - clean)).square().mean()
        return velocity + legible_reading_loss(read, parameters, ((1 - sigma) / sigma).square())

    record = {**train(model, loss, config, folder), "window": window.described}
    autoencoder.register_to_config(scaling_factor=1.0)  # its latents have unit variance already
    return CogView4Pipeline(tokenizer, text_encoder, autoencoder, transformer, scheduler), record
