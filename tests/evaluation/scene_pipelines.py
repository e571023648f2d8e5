"""Random pipelines of the embedded models' shape: 64x64 pictures of the ten shapes from 16x16x4 latents."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from companion.minis.scenes import SHAPES
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
