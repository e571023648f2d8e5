"""Pictures and captions in one space, for the CLIP score: mini-clip for scenes, OpenAI's CLIP for the paper's."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from companion.errors import explained
from companion.minis import clip
from companion.minis.scenes import SIZE
from companion.pipelines.hub import hub_folder
from companion.pipelines.saved import load_model

PAPER_CLIP = "openai/clip-vit-base-patch16"


class SceneClip:
    """mini-clip: 64x64 pictures of scenes and their captions, 64 dimensions.

    Args:
        device: where it runs.
    """

    name = "mini-clip"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._model, self._device = clip.load_clip(device), torch.device(device)

    @torch.no_grad()
    def embed_images(self, images: UInt8[Tensor, "batch 3 64 64"]) -> Float[Tensor, "batch dimensions"]:
        """Embeddings, on the CPU, not of length 1.

        Raises:
            ValueError: pictures of another size.
        """
        if images.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"images must be 3x{SIZE}x{SIZE} for {self.name}, got {tuple(images.shape[1:])}")
        return self._model.embed_images(images.to(self._device).float() / 127.5 - 1).cpu()

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> Float[Tensor, "batch dimensions"]:
        """Embeddings, on the CPU, not of length 1; of more than 14 words the first count."""
        return self._model.embed_captions(captions).cpu()


class PaperClip:
    """A CLIP of transformers', with its own image processor; pictures of any size, captions of up to 77 tokens.

    Args:
        source: folder or hub name.
        device: where it runs.

    Raises:
        ValueError: it is unavailable, which without a connection is found out within seconds.
    """

    def __init__(self, source: str | Path = PAPER_CLIP, device: torch.device | str = "cpu") -> None:
        self.name = str(source)
        model, self._processor = _loaded(self.name)
        self._model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def embed_images(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dimensions"]:
        """Embeddings, on the CPU, not of length 1."""
        pictures = list(images.permute(0, 2, 3, 1).cpu().numpy())
        pixels = self._processor.image_processor(pictures, return_tensors="pt").pixel_values
        return self._model.get_image_features(pixels.to(self._model.device)).pooler_output.float().cpu()

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> Float[Tensor, "batch dimensions"]:
        """Embeddings, on the CPU, not of length 1; what is too long is cut off."""
        longest = self._model.config.text_config.max_position_embeddings
        padding = {"padding": True, "truncation": True, "max_length": longest}
        tokens = self._processor.tokenizer(list(captions), **padding, return_tensors="pt").to(self._model.device)
        return self._model.get_text_features(**tokens).pooler_output.float().cpu()


def _loaded(source: str) -> tuple[CLIPModel, CLIPProcessor]:
    folder = hub_folder(
        source,
        "CLIP",
        f"give {SceneClip.name} for scenes, the folder of a saved CLIPModel with its processor, or a hub name such as "
        f"{PAPER_CLIP} where there is a connection",
    )
    model = load_model(CLIPModel, folder, torch.float32, "CLIP")
    with explained(f"CLIP {source!r} cannot be loaded"):
        return model, CLIPProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
