"""Tiny modular pipelines: real blocks, with random networks of a few thousand weights or the exact mixture oracle."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.modular_pipelines import ModularPipeline, SequentialPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
    StableDiffusion3T2ICoreDenoiseStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import (
    StableDiffusionXLInputStep,
    StableDiffusionXLPrepareAdditionalConditioningStep,
    StableDiffusionXLPrepareLatentsStep,
    StableDiffusionXLSetTimestepsStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep
from torch import Tensor, nn

from companion.exact.mixtures import GaussianMixture
from tests.mixture_denoiser import MixtureDenoiser

WORDS, WIDTH, POOLED = 3, 8, 8


def _random(module: nn.Module, spread: float) -> nn.Module:
    """Normal weights everywhere: fresh networks end in zeros and would predict nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=spread, generator=generator)
    return module.eval().requires_grad_(False)


def tiny_unet(dtype: torch.dtype = torch.float64, **config: Any) -> UNet2DConditionModel:
    """SDXL's layout for 4x4x4 latents; `config` overrides its settings."""
    settings: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "sample_size": 4,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + POOLED,
        "use_linear_projection": True,
    }
    return _random(UNet2DConditionModel(**{**settings, **config}), 0.2).to(dtype)


def tiny_sd3_transformer(dtype: torch.dtype = torch.float64) -> SD3Transformer2DModel:
    """SD3's layout for 4x4x4 latents, of three joint blocks."""
    network = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=8,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=4,
    )
    return _random(network, 0.2).to(dtype)


def modular_sdxl(unet: nn.Module, scheduler: SchedulerMixin | None = None) -> ModularPipeline:
    """SDXL's text-to-image blocks between the text encoders and the decoder."""
    blocks = {
        "input": StableDiffusionXLInputStep(),
        "set_timesteps": StableDiffusionXLSetTimestepsStep(),
        "prepare_latents": StableDiffusionXLPrepareLatentsStep(),
        "prepare_add_cond": StableDiffusionXLPrepareAdditionalConditioningStep(),
        "denoise": StableDiffusionXLDenoiseStep(),
    }
    if not isinstance(unet, UNet2DConditionModel):
        del blocks["prepare_add_cond"]  # it measures the network's embedding layers
    scheduler = scheduler or DDIMScheduler(clip_sample=False, steps_offset=1)
    return assembled(SequentialPipelineBlocks.from_blocks_dict(blocks), unet=unet, scheduler=scheduler)


def modular_sd3(transformer: nn.Module, scheduler: SchedulerMixin | None = None) -> ModularPipeline:
    """SD3's text-to-image blocks between the text encoders and the decoder."""
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
    return assembled(StableDiffusion3T2ICoreDenoiseStep(), transformer=transformer, scheduler=scheduler)


def assembled(blocks: Any, **components: Any) -> ModularPipeline:
    """A pipeline of these blocks and components."""
    pipe = blocks.init_pipeline()
    pipe.update_components(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(batch: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Embeddings in the place of prompts."""
    generator = torch.Generator().manual_seed(1)
    words = 3 * torch.randn(2, batch, WORDS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    pooled = 3 * torch.randn(2, batch, POOLED, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "prompt_embeds": words[0],
        "negative_prompt_embeds": words[1],
        "pooled_prompt_embeds": pooled[0],
        "negative_pooled_prompt_embeds": pooled[1],
    }


def label_prompts(labels: list[int], null: int) -> dict[str, Tensor]:
    """Embeddings that name the oracle's classes in their first entry."""
    words = torch.zeros(2, len(labels), WORDS, WIDTH, dtype=torch.float64)
    words[0, :, 0, 0], words[1, :, 0, 0] = torch.tensor(labels, dtype=torch.float64), null
    pooled = torch.zeros(len(labels), POOLED, dtype=torch.float64)
    return {
        "prompt_embeds": words[0],
        "negative_prompt_embeds": words[1],
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": pooled,
    }


def oracle(levels: Any, prediction_type: str, shape: tuple[int, int, int] = (4, 2, 2)) -> MixtureDenoiser:
    """The ideal network for two classes of random Gaussian mixtures."""
    generator = torch.Generator().manual_seed(2)
    dimension = shape[0] * shape[1] * shape[2]
    mixtures = []
    for _ in range(2):
        means = torch.randn(3, dimension, generator=generator, dtype=torch.float64)
        factors = 0.4 * torch.randn(3, dimension, dimension, generator=generator, dtype=torch.float64)
        covariances = factors @ factors.mT + 0.05 * torch.eye(dimension, dtype=torch.float64)
        mixtures.append(GaussianMixture(torch.ones(3, dtype=torch.float64), means, covariances))
    network = MixtureDenoiser(mixtures, levels, prediction_type=prediction_type, sample_shape=shape)
    network.config.time_cond_proj_dim, network.config.patch_size = None, 1
    return network.eval()


class BlockNetwork(nn.Module):
    """The oracle of flow matching in the place of any transformer that a denoise block may call.

    Args:
        ideal: the oracle, in steps of 0 to 1000.
        condition: name of the argument whose first entry is the class.
        part: which part of dimension 1 of the input is latents: all of it, or the first or last `size`.
        size: how many those are.
        says_all: whether the output is about the rest of the input as well.
        listed: whether samples come and go in a list, as Z-Image's do, the output negated and time reversed.
        unit: what the block divides its scheduler's timesteps by.
    """

    dtype = torch.float64

    def __init__(
        self,
        ideal: MixtureDenoiser,
        condition: str = "encoder_hidden_states",
        part: str = "all",
        size: int = 0,
        says_all: bool = True,
        listed: bool = False,
        unit: float = 1.0,
    ) -> None:
        super().__init__()
        self.ideal, self.condition, self.listed, self.unit = ideal, condition, listed, unit
        self.part, self.size, self.says_all = part, size, says_all
        self.transformer_blocks = nn.ModuleList()
        self.config = SimpleNamespace(in_channels=1, patch_size=1, causal_condition=True)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        yield

    def latents(self, sample: Any) -> Tensor:
        """The latents in the network's input."""
        whole = torch.stack(sample).squeeze(2) if self.listed else sample
        return self._own(whole)

    def prediction(self, output: tuple[Any]) -> Tensor:
        """The velocity in the network's output."""
        if self.listed:
            return -torch.stack(output[0]).squeeze(2)
        return self._own(output[0]) if self.says_all else output[0]

    def _own(self, whole: Tensor) -> Tensor:
        return {"all": whole, "first": whole[:, : self.size], "last": whole[:, -self.size :]}[self.part]

    def forward(
        self,
        hidden_states: Any = None,
        timestep: Tensor | None = None,
        x: Any = None,
        t: Tensor | None = None,
        img_shapes: Any = None,
        return_dict: bool = False,
        **conditions: Any,
    ) -> tuple[Any]:
        sample = hidden_states if x is None else x
        time = 1000 * (1 - t) if timestep is None else self.unit * timestep
        z = self.latents(sample)
        time = time.reshape(len(z), -1)[:, 0]
        [output] = self.ideal(z, time, encoder_hidden_states=conditions[self.condition], return_dict=False)
        if self.listed:
            return ([-one for one in output.unsqueeze(2)],)
        if self.part == "all" or not self.says_all:
            return (output,)
        others = sample[:, self.size :] if self.part == "first" else sample[:, : -self.size]
        mixed = others.sin() + z.mean()  # the rest of the output means nothing, but depends on the latents
        return (torch.cat([output, mixed] if self.part == "first" else [mixed, output], dim=1),)


@dataclass
class Step:
    """What a pipeline did in one step: its denoiser's calls, in order, and what its scheduler was given."""

    calls: list[tuple[tuple, dict[str, Any], Any]] = field(default_factory=list)
    timestep: float = 0.0
    followed: Tensor | None = None

    def denoiser(self, network: nn.Module, call: int = 0) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """A call as a function of the network's sample, and that sample."""
        args, kwargs, _ = self.calls[call]
        name = None if args else "hidden_states"
        sample = args[0] if args else kwargs[name]

        def function(x: Tensor) -> Tensor:
            return network(x, *args[1:], **kwargs)[0] if args else network(**{**kwargs, name: x})[0]

        return function, sample

    def prediction(self, call: int) -> Tensor:
        return self.calls[call][2][0]


@contextmanager
def watched(pipe: ModularPipeline, network: nn.Module) -> Iterator[list[Step]]:
    """The steps of the pipeline's runs inside, seen from outside the guider."""
    steps, current = [], Step()
    step = pipe.scheduler.step

    def note_call(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        current.calls.append((args, dict(kwargs), output))

    def note_step(model_output: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal current
        current.timestep, current.followed = float(timestep), model_output
        steps.append(current)
        current = Step()
        return step(model_output, timestep, *args, **kwargs)

    handle = network.register_forward_hook(note_call, with_kwargs=True)
    pipe.scheduler.step = note_step
    try:
        yield steps
    finally:
        handle.remove()
        del pipe.scheduler.step
