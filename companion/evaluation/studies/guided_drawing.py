"""Pictures by Stable Diffusion under a guider of Modular Diffusers, which has blocks for larger models only.

The loop is that of a modular pipeline's denoise block: the guider prepares the branches and the denoiser, and combines
their predictions. So a guider can be compared, alone and rectified, on a model of this package.
"""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

from companion.seeding import sample_generators


@torch.no_grad()
def draw_with_guider(
    pipe: StableDiffusionPipeline,
    guider: BaseGuidance,
    captions: Sequence[str],
    *,
    num_inference_steps: int = 50,
    seed: int = 0,
    batch_size: int = 50,
) -> Float[Tensor, "samples 3 height width"]:
    """Pictures in [-1, 1] of the captions; sample i draws from the generator (seed, i), as `companion.minis.drawing`.

    Args:
        pipe: its own guidance is not used, and deterministic samplers only are (DDIM, DPM-Solver++, Euler).
        guider: of diffusers, or `companion.RectifiedGradientGuidance` with the pipeline's scheduler.
        captions: one a picture.

    Raises:
        ValueError: no captions.
    """
    if len(captions) == 0:
        raise ValueError("captions must hold at least one caption, one for each picture")
    pictures = []
    for first in range(0, len(captions), batch_size):
        batch = list(captions[first : first + batch_size])
        generators = sample_generators(seed, range(first, first + len(batch)))
        pictures.append(_draw(pipe, guider, batch, num_inference_steps, generators))
    return torch.cat(pictures)


def _draw(
    pipe: StableDiffusionPipeline,
    guider: BaseGuidance,
    captions: list[str],
    steps: int,
    generators: list[torch.Generator],
) -> Float[Tensor, "batch 3 height width"]:
    device, dtype = pipe.unet.device, pipe.unet.dtype
    prompt_embeds, negative_prompt_embeds = pipe.encode_prompt(captions, device, 1, True)
    pipe.scheduler.set_timesteps(steps, device=device)
    size = pipe.unet.config.sample_size
    shape = (len(captions), pipe.unet.config.in_channels, size, size)
    noise = randn_tensor(shape, generator=generators, device=device, dtype=dtype)
    latents = noise * pipe.scheduler.init_noise_sigma
    for index, timestep in enumerate(pipe.scheduler.timesteps):
        fed = pipe.scheduler.scale_model_input(latents, timestep)
        guider.set_state(step=index, num_inference_steps=steps, timestep=timestep)
        branches = guider.prepare_inputs({"encoder_hidden_states": (prompt_embeds, negative_prompt_embeds)})
        for branch in branches:
            guider.prepare_models(pipe.unet)
            branch.noise_pred = pipe.unet(
                fed, timestep, encoder_hidden_states=branch.encoder_hidden_states, return_dict=False
            )[0]
            guider.cleanup_models(pipe.unet)
        latents = pipe.scheduler.step(guider(branches)[0], timestep, latents).prev_sample
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return decoded.clamp(-1, 1).cpu()
