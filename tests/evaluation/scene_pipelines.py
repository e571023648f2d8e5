"""Random pipelines of the embedded models' shape: 64x64 pictures of ten shapes from latents, or 32x32 of pixels."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, ResNetConfig, ResNetForImageClassification

from companion.minis.scenes import SHAPES
from companion.pipelines.adm.pipeline import ADMPipeline
from tests.pipelines.tiny import tiny_sd


def scene_dit() -> DiTPipeline:
    """Class-conditional; every picture differs from every other, and both sides of a pair differ."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        in_channels=4,
        out_channels=4,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=64,
    )
    generator = torch.Generator().manual_seed(0)
    for module, spread in ((transformer, 0.15), (autoencoder, 0.1)):
        for parameter in module.eval().requires_grad_(False).parameters():
            torch.nn.init.normal_(parameter, std=spread, generator=generator)
    return DiTPipeline(transformer, autoencoder, DDIMScheduler(clip_sample=False), id2label=dict(enumerate(SHAPES)))


def save_scene_dit(folder: Path) -> Path:
    """The same as a folder; diffusers does not save the names of the classes itself."""
    scene_dit().save_pretrained(folder)
    index = folder / "model_index.json"
    described = json.loads(index.read_text()) | {"id2label": {str(i): name for i, name in enumerate(SHAPES)}}
    index.write_text(json.dumps(described))
    return folder


def scene_adm() -> ADMPipeline:
    """Pixels under a classifier's guidance, with a learned variance and a null class."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=6,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=len(SHAPES) + 1,
    )
    guide = scene_resnet()
    generator = torch.Generator().manual_seed(0)
    for module, spread in ((unet, 0.15), (guide, 0.3)):
        for parameter in module.eval().requires_grad_(False).parameters():
            torch.nn.init.normal_(parameter, std=spread, generator=generator)
    scheduler = DDPMScheduler(variance_type="learned_range")
    return ADMPipeline(unet, guide, scheduler, null_class=len(SHAPES))


def scene_resnet(classes: int = len(SHAPES)) -> ResNetForImageClassification:
    """A random classifier of the shapes."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=classes,
        id2label=dict(enumerate((*SHAPES, *map(str, range(classes)))[:classes])),
    )
    return ResNetForImageClassification(config).eval()


def captioned_sd(folder: Path) -> StableDiffusionPipeline:
    """Text-conditional, with a tokenizer that knows letters only; 16x16 pictures."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=32)
    torch.manual_seed(0)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=12,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    pipe = tiny_sd(dtype=torch.float32)
    pipe.register_modules(text_encoder=encoder.eval(), tokenizer=tokenizer)
    return pipe
