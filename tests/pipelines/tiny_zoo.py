"""Tiny random pipelines of many families: real diffusers classes and configurations, a few thousand weights each.

Every resident says in words of its own what its pipeline does with the two branches: which part of the network's
output is the prediction, its sign, its noise level, and what reaches the scheduler. `test_zoo.py` compares that with
what rectified guidance made of the pipeline. Prompts are random embeddings, pictures random latents; nothing is encoded
or decoded unless the pipeline insists.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from tests.pipelines.tiny import _random, prompts, tiny_autoencoder, tiny_dit, tiny_sd

Schedule = Literal["preserving", "exploding", "flow"]


def _same(prediction: Tensor) -> Tensor:
    return prediction


def _as_guided(guided: Tensor, conditional: Tensor) -> Tensor:
    return guided


@dataclass(frozen=True)
class Tiny:
    """A pipeline that can be called, and what is known about its guidance.

    Args:
        pipe: the pipeline.
        denoiser: the network that is called first.
        arguments: of the call, without those for guidance.
        guided, unguided: the arguments that turn guidance on and off.
        weight: w of `c + w (c - u)` under `guided`.
        schedule: `preserving`: ᾱ at the timestep; `exploding`: z = x/√(1+σ²); `flow`: z = (1 - σ) x_0 + σ ε.
        sign: -1 where the scheduler is given minus the network's output.
        inverted: whether a flow's schedule counts up to the picture, its network predicting x_0 - ε.
        part: the leading part of the network's output, and input, that belongs to the sampler.
        arranged: from the network's layout to the scheduler's.
        shown: from what the scheduler is given to the sampler's part of it.
        rescaled: what becomes of the guided prediction, given the conditional one as well.
        precision: in which the network computes; most transformers normalise in float32 whatever their weights are.
        tolerance: relative, of a direction found by finite steps where `precision` is float32.
        used: 0 where the pipeline does not guide an entry of the prediction, else 1.
    """

    pipe: DiffusionPipeline
    denoiser: nn.Module
    arguments: dict[str, Any]
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 3.0})
    unguided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    weight: float | Tensor = 2.0
    schedule: Schedule = "preserving"
    prediction_type: str = "epsilon"
    sign: int = 1
    inverted: bool = False
    part: Callable[[Tensor], Tensor] = _same
    arranged: Callable[[Tensor], Tensor] = _same
    shown: Callable[[Tensor], Tensor] = _same
    rescaled: Callable[[Tensor, Tensor], Tensor] = _as_guided
    precision: torch.dtype = torch.float64
    used: float | Tensor = 1.0
    tolerance: float = 1e-2


RESIDENTS: dict[str, Callable[[], Tiny]] = {}
TESTED: dict[str, str] = {}
NOT_RUN = {"KolorsPipeline": "needs sentencepiece"}


def resident(name: str, note: str) -> Callable[[Callable[[], Tiny]], Callable[[], Tiny]]:
    """Enter the function that builds a pipeline; `name` is the class's, with `/variant` behind it for more than one."""

    def enter(build: Callable[[], Tiny]) -> Callable[[], Tiny]:
        RESIDENTS[name] = build
        cls = name.split("/")[0]
        TESTED[cls] = f"{TESTED[cls]}; {note}" if cls in TESTED else note
        return build

    return enter


def normal(*shape: int, seed: int = 1, spread: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def embeddings(*shape: int, spread: float = 2.0) -> dict[str, Tensor]:
    """`prompt_embeds` and `negative_prompt_embeds`."""
    return {
        "prompt_embeds": normal(*shape, seed=1, spread=spread),
        "negative_prompt_embeds": normal(*shape, seed=2, spread=spread),
    }


def pooled(*shape: int, spread: float = 2.0) -> dict[str, Tensor]:
    return {
        "pooled_prompt_embeds": normal(*shape, seed=3, spread=spread),
        "negative_pooled_prompt_embeds": normal(*shape, seed=4, spread=spread),
    }


def masks(*shape: int, dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
    mask = torch.ones(*shape, dtype=dtype)
    return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.clone()}


def assembled(name: str, dtype: torch.dtype = torch.float64, **components: Any) -> DiffusionPipeline:
    """The pipeline of that name; components of its constructor that are not given are None."""
    cls = getattr(diffusers, name)
    given = inspect.signature(cls.__init__).parameters
    absent = {
        key: None
        for key, parameter in given.items()
        if key not in ("self", "args", "kwargs") and parameter.default is inspect.Parameter.empty
    }
    if "requires_safety_checker" in given:
        components["requires_safety_checker"] = False
    pipe = cls(**{**absent, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def network(name: str, spread: float = 0.2, **config: Any) -> nn.Module:
    return _random(getattr(diffusers, name)(**config), spread)


def ddim(**config: Any) -> DDIMScheduler:
    return DDIMScheduler(**{"clip_sample": False, "steps_offset": 1, **config})


def unet(**config: Any) -> nn.Module:
    settings = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "sample_size": 8,
    }
    return network("UNet2DConditionModel", **{**settings, **config})


SMALL = {"height": 64, "width": 64}  # 8x8 latents at the factor 8 of pipelines without an autoencoder

ALONE = {"negative_prompt": None}  # where it is "" by default, which embeddings may not accompany


@resident("StableDiffusionPipeline", "ε, DDIM, float64")
def stable_diffusion() -> Tiny:
    pipe = tiny_sd()
    return Tiny(pipe, pipe.unet, {**prompts(), "height": 16, "width": 16})


@resident("DiTPipeline", "class labels, learned variance, float64")
def dit() -> Tiny:
    pipe = tiny_dit(out_channels=8)
    arguments = {"class_labels": [3, 7], "output_type": "pt"}
    return Tiny(pipe, pipe.transformer, arguments, part=lambda output: output[:, :4], shown=lambda given: given[:2])


# ------------------------------------------------------------------------------------- U-Nets of Stable Diffusion's kin


@resident("StableDiffusionImg2ImgPipeline", "starts in the middle of the schedule")
def img2img() -> Tiny:
    pipe = assembled("StableDiffusionImg2ImgPipeline", unet=unet(), scheduler=ddim())
    arguments = {**prompts(), "image": normal(2, 4, 8, 8, seed=5), "strength": 0.5, "num_inference_steps": 4}
    return Tiny(pipe, pipe.unet, arguments)


@resident("StableDiffusionInpaintPipeline/4", "4 channels")
def inpaint() -> Tiny:
    pipe = assembled("StableDiffusionInpaintPipeline", unet=unet(), vae=tiny_autoencoder(), scheduler=ddim())
    return Tiny(pipe, pipe.unet, {**prompts(), **_picture_and_mask()})


@resident("StableDiffusionInpaintPipeline/9", "9 channels: mask and picture behind the latents")
def inpaint_9() -> Tiny:
    network = unet(in_channels=9)
    pipe = assembled("StableDiffusionInpaintPipeline", unet=network, vae=tiny_autoencoder(), scheduler=ddim())
    return Tiny(pipe, pipe.unet, {**prompts(), **_picture_and_mask()})


def _picture_and_mask() -> dict[str, Any]:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    picture = normal(1, 3, 16, 16, seed=5, spread=0.3, dtype=torch.float32).clamp(-1, 1)
    return {"image": picture, "mask_image": mask, "strength": 1.0, "height": 16, "width": 16}


@resident("StableDiffusionControlNetPipeline", "a control network next to the U-Net")
def controlnet() -> Tiny:
    control = network(
        "ControlNetModel",
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(4, 8, 8, 8),
    )
    pipe = assembled("StableDiffusionControlNetPipeline", unet=unet(), controlnet=control, scheduler=ddim())
    return Tiny(pipe, pipe.unet, {**prompts(), "image": normal(1, 3, 64, 64, seed=5), **SMALL})


def unet_xl(**config: Any) -> nn.Module:
    return unet(
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
        **config,
    )


@resident("StableDiffusionXLPipeline", "ε, Euler, time ids and pooled embeddings")
def xl() -> Tiny:
    pipe = assembled("StableDiffusionXLPipeline", unet=unet_xl(), vae=tiny_autoencoder(), scheduler=euler())
    return Tiny(pipe, pipe.unet, {**prompts(), **pooled(2, 10), "height": 16, "width": 16}, schedule="exploding")


@resident("StableDiffusionXLImg2ImgPipeline", "ε, Euler, starts in the middle of the schedule")
def xl_img2img() -> Tiny:
    pipe = assembled("StableDiffusionXLImg2ImgPipeline", unet=unet_xl(), vae=tiny_autoencoder(), scheduler=euler())
    start = {"image": normal(2, 4, 8, 8, seed=5), "strength": 0.75, "num_inference_steps": 4}
    return Tiny(pipe, pipe.unet, {**prompts(), **pooled(2, 10), **start}, schedule="exploding")


@resident("StableDiffusionXLInpaintPipeline", "9 channels, Euler")
def xl_inpaint() -> Tiny:
    parts = {"unet": unet_xl(in_channels=9), "vae": tiny_autoencoder(), "scheduler": euler()}
    pipe = assembled("StableDiffusionXLInpaintPipeline", **parts)
    return Tiny(pipe, pipe.unet, {**prompts(), **pooled(2, 10), **_picture_and_mask()}, schedule="exploding")


def euler(**config: Any) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**{"beta_schedule": "scaled_linear", "steps_offset": 1, **config})


def _three(output: Tensor) -> Tensor:
    return output[:, :3]


@resident("IFPipeline", "pixels, learned variance, DDPM with a seeded generator")
def deepfloyd() -> Tiny:
    from diffusers import DDPMScheduler

    pipe = assembled(
        "IFPipeline",
        unet=unet(in_channels=3, out_channels=6),
        scheduler=DDPMScheduler(variance_type="learned_range", clip_sample=False),
    )
    arguments = {**prompts(), "height": 8, "width": 8, "output_type": "pt", "clean_caption": False}
    return Tiny(pipe, pipe.unet, arguments, part=_three, shown=_three)


@resident("KandinskyV22Pipeline", "image embeddings, learned variance")
def kandinsky22() -> Tiny:
    pipe = assembled(
        "KandinskyV22Pipeline",
        unet=unet(
            out_channels=8,
            addition_embed_type="image",
            encoder_hid_dim=10,
            encoder_hid_dim_type="image_proj",
            resnet_time_scale_shift="scale_shift",
        ),
        scheduler=ddim(),
        movq=network(
            "VQModel",
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            latent_channels=4,
        ),
    )
    images = {"image_embeds": normal(2, 10, spread=2.0), "negative_image_embeds": normal(2, 10, seed=2, spread=2.0)}
    arguments = {**images, "height": 32, "width": 32}
    return Tiny(pipe, pipe.unet, arguments, part=lambda output: output[:, :4])


@resident("Kandinsky3Pipeline", "attention masks, c + s (c - u)")
def kandinsky3() -> Tiny:
    pipe = assembled(
        "Kandinsky3Pipeline",
        unet=network(
            "Kandinsky3UNet",
            in_channels=4,
            time_embedding_dim=4,
            groups=2,
            attention_head_dim=4,
            layers_per_block=2,
            block_out_channels=(8, 16),
            cross_attention_dim=4,
            encoder_hid_dim=12,
        ),
        scheduler=ddim(),
        movq=tiny_autoencoder(),
    )
    mask = torch.ones(2, 5)
    arguments = {**prompts(), "attention_mask": mask, "negative_attention_mask": mask.clone(), **SMALL}
    return Tiny(pipe, pipe.unet, arguments, weight=3.0)


# -------------------------------------------------------------------------------------------------- image transformers


def flow(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**config)


FLOW: dict[str, Any] = {"schedule": "flow", "prediction_type": "flow_prediction"}
INSIDE: dict[str, Any] = {"precision": torch.float32}


def sd3_transformer() -> nn.Module:
    return network(
        "SD3Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )


@resident("StableDiffusion3Pipeline", "flow matching, pooled embeddings")
def sd3() -> Tiny:
    pipe = assembled("StableDiffusion3Pipeline", transformer=sd3_transformer(), scheduler=flow(shift=3.0))
    return Tiny(pipe, pipe.transformer, {**prompts(), **pooled(2, 10), **SMALL}, **FLOW)


@resident("StableDiffusion3Img2ImgPipeline", "flow matching, starts in the middle of the schedule")
def sd3_img2img() -> Tiny:
    parts = {"transformer": sd3_transformer(), "vae": tiny_autoencoder(), "scheduler": flow(shift=3.0)}
    pipe = assembled("StableDiffusion3Img2ImgPipeline", **parts)
    start = {"image": normal(2, 4, 8, 8, seed=5), "strength": 0.5, "num_inference_steps": 4}
    size = {"height": 16, "width": 16}
    return Tiny(pipe, pipe.transformer, {**prompts(), **pooled(2, 10), **start, **size}, **FLOW)


def pixart_transformer() -> nn.Module:
    return network(
        "PixArtTransformer2DModel",
        0.15,
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=12,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )


def _pixart(name: str) -> Tiny:
    pipe = assembled(name, transformer=pixart_transformer(), scheduler=ddim())
    arguments = {**prompts(), **masks(2, 5), **SMALL, **ALONE, "use_resolution_binning": False}
    return Tiny(pipe, pipe.transformer, arguments, part=lambda output: output[:, :4])


@resident("PixArtAlphaPipeline", "learned variance, attention masks")
def pixart_alpha() -> Tiny:
    return _pixart("PixArtAlphaPipeline")


@resident("PixArtSigmaPipeline", "learned variance, attention masks")
def pixart_sigma() -> Tiny:
    return _pixart("PixArtSigmaPipeline")


@resident("HunyuanDiTPipeline", "v, learned variance, two text encoders")
def hunyuan_dit() -> Tiny:
    transformer = network(
        "HunyuanDiT2DModel",
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=12,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        hidden_size=16,
        text_len=5,
        text_len_t5=6,
        activation_fn="gelu-approximate",
    )
    pipe = assembled("HunyuanDiTPipeline", transformer=transformer, scheduler=ddim(prediction_type="v_prediction"))
    arguments = {
        **embeddings(2, 5, 12),
        **masks(2, 5),
        "prompt_embeds_2": normal(2, 6, 16, seed=6),
        "negative_prompt_embeds_2": normal(2, 6, 16, seed=7),
        "prompt_attention_mask_2": torch.ones(2, 6, dtype=torch.int64),
        "negative_prompt_attention_mask_2": torch.ones(2, 6, dtype=torch.int64),
        "use_resolution_binning": False,
        **SMALL,
    }
    part = {"part": lambda output: output[:, :4], "prediction_type": "v_prediction"}
    return Tiny(pipe, pipe.transformer, arguments, **part, **INSIDE)


@resident("CogView3PlusPipeline", "v, sizes as conditions")
def cogview3() -> Tiny:
    transformer = network(
        "CogView3PlusTransformer2DModel",
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=12,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    from diffusers import CogVideoXDDIMScheduler

    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    pipe = assembled("CogView3PlusPipeline", transformer=transformer, scheduler=scheduler)
    return Tiny(pipe, pipe.transformer, {**prompts(), **SMALL}, prediction_type="v_prediction")


def cogview4_transformer() -> nn.Module:
    return network(
        "CogView4Transformer2DModel",
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=12,
        time_embed_dim=8,
        condition_dim=4,
    )


@resident("CogView4Pipeline", "flow matching, one call per branch")
def cogview4() -> Tiny:
    scheduler = flow(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    pipe = assembled("CogView4Pipeline", transformer=cogview4_transformer(), scheduler=scheduler)
    return Tiny(pipe, pipe.transformer, {**prompts(), **SMALL}, **FLOW, **INSIDE)


@resident("AuraFlowPipeline", "flow matching")
def aura_flow() -> Tiny:
    transformer = network(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=12,
        out_channels=4,
        pos_embed_max_size=64,
    )
    pipe = assembled("AuraFlowPipeline", transformer=transformer, scheduler=flow(shift=1.7))
    return Tiny(pipe, pipe.transformer, {**prompts(), **masks(2, 5), **SMALL}, **FLOW, **INSIDE)


@resident("SanaPipeline", "flow matching, linear attention")
def sana() -> Tiny:
    transformer = network(
        "SanaTransformer2DModel",
        0.1,  # more, and the divisors of its linear attention come near 0
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=12,
        sample_size=8,
    )
    pipe = assembled("SanaPipeline", transformer=transformer, scheduler=flow(shift=3.0))
    arguments = {**prompts(), **masks(2, 5), "height": 256, "width": 256, **ALONE, "use_resolution_binning": False}
    # Its linear attention has ReLUs, whose kinks lie between a finite step's ends.
    return Tiny(pipe, pipe.transformer, arguments, **FLOW, **INSIDE, tolerance=0.2)


@resident("LuminaPipeline", "flow matching, output negated, three of four channels guided")
def lumina() -> Tiny:
    transformer = network(
        "LuminaNextDiT2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        norm_eps=1e-5,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=12,
        scaling_factor=1.0,
    )
    pipe = assembled("LuminaPipeline", transformer=transformer, scheduler=flow())
    arguments = {**prompts(), **masks(2, 5), **SMALL}
    used = torch.tensor([1.0, 1.0, 1.0, 0.0]).view(4, 1, 1)
    part = {"part": lambda output: output[:, :4], "sign": -1, "used": used}
    return Tiny(pipe, pipe.transformer, arguments, **FLOW, **INSIDE, **part)


@resident("Lumina2Pipeline", "flow matching, one call per branch, output negated")
def lumina2() -> Tiny:
    transformer = network(
        "Lumina2Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=12,
    )
    pipe = assembled("Lumina2Pipeline", transformer=transformer, scheduler=flow())
    arguments = {**prompts(), **masks(2, 5), **SMALL, "cfg_normalization": False}
    return Tiny(pipe, pipe.transformer, arguments, **FLOW, **INSIDE, sign=-1)


def z_image_transformer() -> nn.Module:
    return network(
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )


@resident("ZImagePipeline", "flow matching, lists of samples, output negated, c + s (c - u)")
def z_image() -> Tiny:
    pipe = assembled("ZImagePipeline", transformer=z_image_transformer(), scheduler=flow())
    words = {name: list(value) for name, value in prompts().items()}
    settings = {"weight": 3.0, "unguided": {"guidance_scale": 0.0}, "sign": -1}
    arranged = {"part": lambda output: output, "arranged": lambda output: output.squeeze(2)}
    return Tiny(pipe, pipe.transformer, {**words, **SMALL}, **FLOW, **INSIDE, **settings, **arranged)


def qwen_transformer() -> nn.Module:
    return network(
        "QwenImageTransformer2DModel",
        0.2,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )


TRUE_CFG: dict[str, Any] = {"guided": {"true_cfg_scale": 3.0}, "unguided": {"true_cfg_scale": 1.0}}


def _embeds_mask() -> dict[str, Tensor]:
    mask = torch.ones(2, 5, dtype=torch.int64)
    return {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask.clone()}


def same_norm(guided: Tensor, conditional: Tensor) -> Tensor:
    """Every token as long as the conditional branch's."""
    return guided * conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)


@resident("QwenImagePipeline", "flow matching, one call per branch, packed latents")
def qwen() -> Tiny:
    pipe = assembled("QwenImagePipeline", transformer=qwen_transformer(), scheduler=flow(use_dynamic_shifting=True))
    return Tiny(
        pipe,
        pipe.transformer,
        {**prompts(), **_embeds_mask(), **SMALL},
        **FLOW,
        **INSIDE,
        **TRUE_CFG,
        rescaled=same_norm,
    )


@resident("FluxPipeline", "flow matching, true_cfg_scale, one call per branch")
def flux() -> Tiny:
    transformer = network(
        "FluxTransformer2DModel",
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=[4, 2, 2],
    )
    pipe = assembled("FluxPipeline", transformer=transformer, scheduler=flow())
    return Tiny(pipe, pipe.transformer, {**prompts(), **pooled(2, 10), **SMALL}, **FLOW, **INSIDE, **TRUE_CFG)


@resident("ChromaPipeline", "flow matching, one call per branch, attention masks")
def chroma() -> Tiny:
    transformer = network(
        "ChromaTransformer2DModel",
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=[4, 2, 2],
        approximator_hidden_dim=16,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    pipe = assembled("ChromaPipeline", transformer=transformer, scheduler=flow())
    return Tiny(pipe, pipe.transformer, {**prompts(), **masks(2, 5, dtype=torch.bool), **SMALL}, **FLOW, **INSIDE)


# ----------------------------------------------------------------------------------------------------- video and audio


def wan_transformer() -> nn.Module:
    return network(
        "WanTransformer3DModel",
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


@resident("WanPipeline", "flow matching, one call per branch")
def wan() -> Tiny:
    pipe = assembled("WanPipeline", transformer=wan_transformer(), scheduler=flow(shift=3.0))
    return Tiny(pipe, pipe.transformer, {**prompts(), **SMALL, "num_frames": 5}, **FLOW, **INSIDE)


@resident("WanPipeline/2", "two networks, high and low noise")
def wan_2() -> Tiny:
    networks = {"transformer": wan_transformer(), "transformer_2": wan_transformer()}
    pipe = assembled("WanPipeline", **networks, scheduler=flow(shift=1.0), boundary_ratio=0.4)
    return Tiny(pipe, pipe.transformer, {**prompts(), **SMALL, "num_frames": 5}, **FLOW, **INSIDE)


@resident("LTXPipeline", "flow matching, packed latents")
def ltx() -> Tiny:
    transformer = network(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=12,
    )
    pipe = assembled("LTXPipeline", transformer=transformer, scheduler=flow())
    arguments = {**prompts(), **masks(2, 5), "height": 128, "width": 128, "num_frames": 9}
    return Tiny(pipe, pipe.transformer, arguments, **FLOW, **INSIDE)


@resident("MochiPipeline", "flow matching with its schedule inverted")
def mochi() -> Tiny:
    transformer = network(
        "MochiTransformer3DModel",
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=8,
        in_channels=4,
        qk_norm="rms_norm",
        text_embed_dim=16,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )
    pipe = assembled("MochiPipeline", transformer=transformer, scheduler=flow(invert_sigmas=True))
    arguments = {**embeddings(2, 5, 16), **masks(2, 5, dtype=torch.bool), **SMALL, "num_frames": 7}
    return Tiny(pipe, pipe.transformer, arguments, **FLOW, **INSIDE, inverted=True)


@resident("HunyuanVideoPipeline", "flow matching, true_cfg_scale, one call per branch")
def hunyuan_video() -> Tiny:
    transformer = network(
        "HunyuanVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=12,
        pooled_projection_dim=10,
        rope_axes_dim=(2, 4, 4),
    )
    pipe = assembled("HunyuanVideoPipeline", transformer=transformer, scheduler=flow())
    arguments = {**prompts(), **pooled(2, 10), **masks(2, 5), "height": 32, "width": 32, "num_frames": 5}
    return Tiny(pipe, pipe.transformer, arguments, **FLOW, **INSIDE, **TRUE_CFG)


@resident("CogVideoXPipeline", "v, latents with frames before channels")
def cogvideox() -> Tiny:
    transformer = network(
        "CogVideoXTransformer3DModel",
        0.4,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=12,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=5,
    )
    from diffusers import CogVideoXDDIMScheduler

    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    pipe = assembled("CogVideoXPipeline", transformer=transformer, scheduler=scheduler)
    arguments = {**prompts(), "height": 32, "width": 32, "num_frames": 5}
    return Tiny(pipe, pipe.transformer, arguments, prediction_type="v_prediction", **INSIDE)


@resident("LattePipeline", "learned variance")
def latte() -> Tiny:
    transformer = network(
        "LatteTransformer3DModel",
        0.15,
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=12,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=3,
    )
    pipe = assembled("LattePipeline", transformer=transformer, scheduler=ddim())
    arguments = {**prompts(), **SMALL, "video_length": 3, **ALONE, "mask_feature": False}
    return Tiny(pipe, pipe.transformer, arguments, part=lambda output: output[:, :4])


@resident("AnimateDiffPipeline", "a motion adapter; prompts repeated for the frames")
def animatediff() -> Tiny:
    motion = network(
        "MotionAdapter",
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
    )
    pipe = assembled("AnimateDiffPipeline", unet=unet(), motion_adapter=motion, scheduler=ddim())
    _random(pipe.unet, 0.2)
    return Tiny(pipe, pipe.unet, {**prompts(), **SMALL, "num_frames": 3})


@resident("TextToVideoSDPipeline", "frames joined to the batch for the scheduler")
def text_to_video() -> Tiny:
    settings = {
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "norm_num_groups": 2,
    }
    pipe = assembled("TextToVideoSDPipeline", unet=network("UNet3DConditionModel", **settings), scheduler=ddim())

    def arranged(video: Tensor) -> Tensor:
        return video.transpose(1, 2).flatten(0, 1)

    return Tiny(pipe, pipe.unet, {**prompts(), **SMALL, "num_frames": 3}, arranged=arranged)


@resident("StableVideoDiffusionPipeline", "v, Euler with continuous timesteps, a scale for every frame")
def stable_video() -> Tiny:
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    vision = CLIPVisionConfig(
        hidden_size=8,
        projection_dim=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        intermediate_size=8,
        patch_size=4,
    )
    pipe = assembled(
        "StableVideoDiffusionPipeline",
        unet=network(
            "UNetSpatioTemporalConditionModel",
            block_out_channels=(32, 32),
            layers_per_block=1,
            sample_size=8,
            in_channels=8,
            out_channels=4,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=12,
            num_attention_heads=2,
            projection_class_embeddings_input_dim=12,
            addition_time_embed_dim=4,
        ),
        vae=network(
            "AutoencoderKLTemporalDecoder",
            block_out_channels=(32,),
            down_block_types=("DownEncoderBlock2D",),
            layers_per_block=1,
            latent_channels=4,
            force_upcast=False,
        ),
        image_encoder=_random(CLIPVisionModelWithProjection(vision), 0.2),
        feature_extractor=CLIPImageProcessorPil(crop_size=16, size=16),
        scheduler=euler(
            prediction_type="v_prediction",
            timestep_type="continuous",
            sigma_min=0.002,
            sigma_max=700.0,
            use_karras_sigmas=True,
        ),
    )
    frames = torch.linspace(1.0, 2.0, 3, dtype=torch.float64).view(1, 3, 1, 1, 1)
    arguments = {
        "image": normal(1, 3, 8, 8, seed=5, spread=0.2).add(0.5).clamp(0, 1),
        "num_frames": 3,
        "height": 8,
        "width": 8,
        "fps": 6,
    }
    guided = {"min_guidance_scale": 2.0, "max_guidance_scale": 3.0}
    unguided = {"min_guidance_scale": 1.0, "max_guidance_scale": 1.0}
    kind: dict[str, Any] = {"schedule": "exploding", "prediction_type": "v_prediction"}
    return Tiny(pipe, pipe.unet, arguments, guided, unguided, frames, **kind)


@resident("StableAudioPipeline", "v, the preconditioned EDM scheduler, sound")
def stable_audio() -> Tiny:
    from diffusers import EDMDPMSolverMultistepScheduler
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    pipe = assembled(
        "StableAudioPipeline",
        transformer=network(
            "StableAudioDiTModel",
            sample_size=8,
            in_channels=3,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            out_channels=3,
            cross_attention_dim=8,
            time_proj_dim=8,
            global_states_input_dim=16,
            cross_attention_input_dim=8,
        ),
        projection_model=_random(
            StableAudioProjectionModel(text_encoder_dim=8, conditioning_dim=8, min_value=0, max_value=32), 0.5
        ),
        vae=network(
            "AutoencoderOobleck",
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=3,
            decoder_input_channels=3,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=4,
        ),
        scheduler=EDMDPMSolverMultistepScheduler(
            sigma_data=1.0, prediction_type="v_prediction", final_sigmas_type="sigma_min"
        ),
    )
    arguments = {**embeddings(2, 5, 8), "audio_end_in_s": 3.0}
    return Tiny(pipe, pipe.transformer, arguments, schedule="exploding", prediction_type="v_prediction", **INSIDE)
