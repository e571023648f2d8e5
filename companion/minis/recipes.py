"""How each embedded model is built and trained. `python -m companion train NAME` runs one of these."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from jaxtyping import Float
from torch import Tensor

from companion.minis.latents import TRAINING_SEED, SceneWindow
from companion.minis.reading import WithReader, legible_reading_loss
from companion.minis.scenes import SHAPES, SIZE, labels, render, scene
from companion.minis.training import TrainingConfig, noised, train
from companion.seeding import sample_seed


def build_autoencoder() -> AutoencoderKL:
    """f = 4 KL autoencoder: 64x64x3 to 16x16x4; no attention, few channels at full resolution, where the time goes."""
    channels = (32, 32, 96)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )


def edge_loss(predicted: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Tensor:
    """Mean absolute error of horizontal and vertical differences: it asks for sharp edges where L1 alone would blur."""
    error = predicted - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def train_autoencoder(folder: Path, config: TrainingConfig | None = None) -> tuple[AutoencoderKL, dict]:
    """Train the autoencoder on mixed scenes, a fresh batch of new scenes each step."""
    config = config or TrainingConfig(steps=4600, batch_size=16, learning_rate=2e-3, warmup=100)
    torch.manual_seed(config.seed)
    model = build_autoencoder()

    def loss(step: int) -> Tensor:
        first = step * config.batch_size
        images = render([scene(TRAINING_SEED, first + i) for i in range(config.batch_size)])
        posterior = model.encode(images).latent_dist
        noise = torch.Generator().manual_seed(sample_seed(config.seed, step))
        decoded = model.decode(posterior.sample(generator=noise)).sample.float()
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        error = F.l1_loss(decoded, images) + 2 * F.mse_loss(decoded, images) + 0.5 * edge_loss(decoded, images)
        return error + 1e-5 * divergence

    record = train(model, loss, config, folder)
    standardise_latents(model, render([scene(TRAINING_SEED, i) for i in range(512)]))
    return model, record


@torch.no_grad()
def standardise_latents(model: AutoencoderKL, images: Float[Tensor, "batch 3 height width"]) -> None:
    """Fold zero mean and unit variance of every latent channel into the 1x1 convolutions around the latents.

    Pipelines know one scaling factor for all channels; a diffusion model wants all of them at the noise's scale.
    Pictures decoded from the means are unchanged.
    """
    latents = model.encode(images).latent_dist.mean
    centre, spread = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    into, out = model.quant_conv, model.post_quant_conv
    into.bias[: len(centre)] -= centre
    into.bias[: len(centre)] /= spread
    into.weight[: len(centre)] /= spread.view(-1, 1, 1, 1)
    into.bias[len(centre) :] -= 2 * spread.log()
    out.bias += out.weight[:, :, 0, 0] @ centre
    out.weight *= spread.view(1, -1, 1, 1)


NULL_CLASS = 1000  # hard-coded in DiTPipeline
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
}


DIT_TRAINING = TrainingConfig(steps=10_500, batch_size=64, learning_rate=2e-3, ema_decay=0.9995, optimiser="muon")


def build_dit() -> DiTTransformer2DModel:
    """Class-conditional diffusion transformer on 16x16x4 latents: 64 tokens, width 192, six blocks; predicts ε."""
    return DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=64,
        num_layers=6,
        in_channels=4,
        out_channels=4,
        sample_size=SIZE // 4,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )


def train_dit(
    folder: Path,
    autoencoder: AutoencoderKL,
    config: TrainingConfig = DIT_TRAINING,
    *,
    start: DiTPipeline | None = None,
    window: SceneWindow | None = None,
) -> tuple[DiTPipeline, dict]:
    """Train mini-dit on latents of single-object scenes.

    The loss is ε's squared error under min-SNR-5 weights (Hang et al. 2023), plus the reading of the scene's
    parameters off the middle tokens where the noise leaves them legible.

    Args:
        folder: checkpoints and log.
        start: a trained pipeline to continue from; None trains from scratch.
        window: the scenes; None begins with the first.
    """
    window = window or SceneWindow(autoencoder)
    alphas_cumprod = DDPMScheduler(**SCHEDULE).alphas_cumprod
    torch.manual_seed(config.seed)
    transformer = build_dit()
    if start is not None:
        transformer.load_state_dict(start.transformer.state_dict())
    model = WithReader(transformer, "transformer_blocks.2", 3 * 64)
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0  # each block would drop the label on its own; conditions are dropped whole below

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(sample_seed(config.seed, step))
        clean, scenes, parameters = window.batch(step, config.batch_size, generator)
        noisy, timestep, noise, alpha_bar = noised(clean, alphas_cumprod, generator)
        dropped = torch.rand(config.batch_size, generator=generator) < 0.1
        class_labels = labels(scenes).masked_fill(dropped, NULL_CLASS)
        predicted, read = model(noisy, timestep=timestep, class_labels=class_labels)
        snr = alpha_bar / (1 - alpha_bar)
        denoising = snr.clamp(max=5) / snr * (predicted.float() - noise) ** 2
        return denoising.mean() + legible_reading_loss(read, parameters, snr)

    record = {**train(model, loss, config, folder), "window": window.described}
    return dit_pipeline(transformer, autoencoder), record


@torch.no_grad()
def dit_pipeline(transformer: DiTTransformer2DModel, autoencoder: AutoencoderKL) -> DiTPipeline:
    """The pipeline around a trained transformer: DDIM, the shapes' names as labels, zeros for classes it never saw."""
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.embedding_table.weight[len(SHAPES) : NULL_CLASS] = 0.0
    autoencoder.register_to_config(scaling_factor=1.0)  # its latents have unit variance already
    names = dict(enumerate(SHAPES))
    pipe = DiTPipeline(transformer, autoencoder, DDIMScheduler(**SCHEDULE, set_alpha_to_one=False), id2label=names)
    pipe.register_to_config(id2label=names)  # read from the saved configuration, but not written there by itself
    return pipe
