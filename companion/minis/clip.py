"""mini-clip: pictures of scenes and their captions in one space (CLIP, Radford et al. 2021). It measures how
well a picture fits its caption.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModelWithProjection, ResNetForImageClassification

from companion.arguments import check_choice
from companion.minis.captions import CAPTION_TOKENS, caption_tokenizer, text_config
from companion.minis.classifier import small_resnet
from companion.minis.scenes import COLOURS, LARGE, MARGIN, RELATIONS, SHAPES, SIZE, TEXTURES, Scene, render, scene
from companion.minis.training import TrainingConfig, train
from companion.seeding import sample_generators, sample_seed

WEIGHTS = Path(__file__).parent / "weights" / "mini-clip"
ATTRIBUTES = ("colour", "shape", "size", "texture", "relation")
"""What a caption says of a scene; size only of one object, relation only of two."""

_DIMENSIONS = 64
_TRAINING_SEED = 3  # neither the generators' scenes nor the scene classifier's


class SceneTextModel(nn.Module):
    """An image and a text encoder that end in one space.

    Args:
        image_encoder: its "classes" are the dimensions of that space.
        text_encoder: ends in a projection to it.
    """

    def __init__(self, image_encoder: ResNetForImageClassification, text_encoder: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder

    def embed_images(self, images: Float[Tensor, "batch 3 64 64"]) -> Float[Tensor, "batch dimensions"]:
        """Embeddings, not of length 1, of pictures in [-1, 1]."""
        return self.image_encoder(images).logits

    def embed_captions(self, captions: Sequence[str]) -> Float[Tensor, "batch dimensions"]:
        """Embeddings, not of length 1, of captions; of longer texts the first 14 words."""
        padding = {"padding": "max_length", "max_length": CAPTION_TOKENS, "truncation": True}
        tokens = _tokenizer()(list(captions), **padding, return_tensors="pt").to(self.text_encoder.device)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel's backward pass is slower at these sizes
            return self.text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).text_embeds

    def save_pretrained(self, folder: Path) -> None:
        """Both encoders and the tokenizer, each in a folder of its own, in transformers' format."""
        parts = {"image_encoder": self.image_encoder, "text_encoder": self.text_encoder, "tokenizer": _tokenizer()}
        for name, part in parts.items():
            part.save_pretrained(folder / name)


_tokenizer = cache(caption_tokenizer)


def build_clip() -> SceneTextModel:
    """A ResNet for 64x64 pictures and CLIP's text encoder in small, 0.8 M parameters together; 64 dimensions."""
    text = text_config(_tokenizer(), _DIMENSIONS)
    return SceneTextModel(small_resnet(32, 64, 96, 128, num_labels=_DIMENSIONS), CLIPTextModelWithProjection(text))


def train_clip(folder: Path, config: TrainingConfig | None = None) -> tuple[SceneTextModel, dict]:
    """Train on fresh scenes, three of four of one object, the others of two.

    Half of each batch are the other half's scenes with one attribute changed, so that every caption has a near miss
    beside it. Captions that are equal are all right answers. Half of the pictures are blurred and all of them noised a
    little, as a decoder might. While it is trained, a head reads off the picture's features what is in it (as in
    `companion.minis.reading`; it is not shipped): colours teach themselves, shapes and textures need the hint.
    """
    config = config or TrainingConfig(
        steps=1300, batch_size=128, learning_rate=2e-3, weight_decay=1e-2, ema_decay=0.998
    )
    torch.manual_seed(config.seed)
    model = build_clip()
    reader = nn.Linear(model.image_encoder.config.hidden_sizes[-1], len(_NAMES))
    log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(sample_seed(config.seed, step))
        half = config.batch_size // 2
        drawn = [_scene(step * half + i) for i in range(half)]
        scenes = [*drawn, *(changed(s, _any(attributes_of(s), generator), generator) for s in drawn)]
        images = render(scenes)
        blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        soft = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(soft, blurred, images) + 0.05 * torch.randn(images.shape, generator=generator)
        captions = [s.caption for s in scenes]
        features = model.image_encoder.resnet(images).pooler_output
        pictures, words = model.image_encoder.classifier(features), model.embed_captions(captions)
        contrast = contrastive_loss(pictures, words, captions, log_scale.exp().clamp(max=100))
        read = F.binary_cross_entropy_with_logits(reader(features.flatten(1)).float(), _present(scenes))
        return contrast + 10 * read

    trained = nn.ModuleList([model, reader])
    trained.register_parameter("log_scale", log_scale)
    record = train(trained, loss, config, folder)
    return model, record


_NAMES = (*COLOURS, *SHAPES, *TEXTURES)


def _present(scenes: Sequence[Scene]) -> Float[Tensor, "batch names"]:
    """Which colours, shapes and textures each scene holds."""
    held = [{name for item in s.objects for name in (item.colour, item.shape, item.texture)} for s in scenes]
    return torch.tensor([[float(name in names) for name in _NAMES] for names in held])


def _scene(index: int) -> Scene:
    return scene(_TRAINING_SEED, index, 2 if index % 4 == 3 else 1)


def contrastive_loss(
    pictures: Float[Tensor, "batch dimensions"],
    words: Float[Tensor, "batch dimensions"],
    captions: Sequence[str],
    scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """CLIP's symmetric cross-entropy of the cosines times `scale`; pictures of one caption share its probability."""
    cosines = F.normalize(pictures.float(), dim=1) @ F.normalize(words.float(), dim=1).T
    number = {caption: place for place, caption in enumerate(dict.fromkeys(captions))}
    which = torch.tensor([number[caption] for caption in captions], device=cosines.device)
    right = (which.unsqueeze(0) == which.unsqueeze(1)).float()
    right = right / right.sum(dim=1, keepdim=True)
    return (F.cross_entropy(scale * cosines, right) + F.cross_entropy(scale * cosines.T, right)) / 2


def attributes_of(one: Scene) -> tuple[str, ...]:
    """Those of `ATTRIBUTES` that the scene's caption speaks of."""
    return tuple(name for name in ATTRIBUTES if name != ("size" if len(one.objects) == 2 else "relation"))


def changed(one: Scene, attribute: str, generator: torch.Generator) -> Scene:
    """The scene with one attribute of one of its objects changed, in the picture and so in the caption.

    A changed relation is the opposite one: the two objects change places.

    Raises:
        ValueError: the scene's caption says nothing of that attribute.
    """
    check_choice("attribute", attribute, attributes_of(one))
    if attribute == "relation":
        first, second = one.objects
        swapped = (replace(first, centre=second.centre), replace(second, centre=first.centre))
        # A larger object may now reach over the middle, or the edge, by as much as the radii differ: 3.5 pixels.
        opposite = RELATIONS[RELATIONS.index(one.relation or "") ^ 1]
        return replace(one, objects=swapped, relation=opposite)
    place = int(torch.randint(len(one.objects), (), generator=generator))
    item = one.objects[place]
    if attribute == "size":
        reach = float(torch.rand((), generator=generator))
        radius = 11 + 5 * reach if item.radius >= LARGE else 16 + 4 * reach
        low, high = radius + MARGIN, SIZE - radius - MARGIN
        x, y = (min(high, max(low, coordinate)) for coordinate in item.centre)
        new = replace(item, radius=radius, centre=(x, y))
    else:
        names = {"colour": tuple(COLOURS), "shape": SHAPES, "texture": TEXTURES}[attribute]
        name = _any([name for name in names if name != getattr(item, attribute)], generator)
        change: dict[str, Any] = {attribute: name}
        new = replace(item, **change)
    return replace(one, objects=tuple(new if i == place else kept for i, kept in enumerate(one.objects)))


def _any(names: Sequence[str], generator: torch.Generator) -> str:
    return names[int(torch.randint(len(names), (), generator=generator))]


@torch.no_grad()
def retrieved(model: SceneTextModel, scenes: Sequence[Scene]) -> float:
    """Share of the scenes' pictures that, among all their captions, fit their own best."""
    captions = [s.caption for s in scenes]
    fits = _cosines(model, scenes, list(dict.fromkeys(captions)))
    own = [list(dict.fromkeys(captions)).index(caption) for caption in captions]
    return float((fits.argmax(dim=1) == torch.tensor(own)).double().mean())


@torch.no_grad()
def told_apart(model: SceneTextModel, scenes: Sequence[Scene], attribute: str) -> float:
    """Share of the scenes' pictures that fit their caption better than it with that attribute changed."""
    wrong = [changed(s, attribute, generator).caption for s, generator in _with_generators(scenes, 0)]
    images = model.embed_images(render(scenes))
    right, other = (
        torch.cosine_similarity(images, model.embed_captions(captions))
        for captions in ([s.caption for s in scenes], wrong)
    )
    return float((right > other).double().mean())


@torch.no_grad()
def matched_and_mismatched(
    model: SceneTextModel, scenes: Sequence[Scene]
) -> tuple[Float[Tensor, " scenes"], Float[Tensor, " scenes"]]:
    """Cosines of the scenes' pictures with their own captions, and with the next scene's."""
    fits = _cosines(model, scenes, [s.caption for s in scenes])
    return fits.diagonal(), fits.roll(-1, dims=1).diagonal()


def _cosines(
    model: SceneTextModel, scenes: Sequence[Scene], captions: Sequence[str]
) -> Float[Tensor, "scenes captions"]:
    images = F.normalize(model.embed_images(render(scenes)), dim=1)
    return images @ F.normalize(model.embed_captions(captions), dim=1).T


def _with_generators(scenes: Sequence[Scene], seed: int) -> Iterator[tuple[Scene, torch.Generator]]:
    return zip(scenes, sample_generators(seed, range(len(scenes))), strict=True)


def load_clip(device: str | torch.device = "cpu", folder: Path = WEIGHTS) -> SceneTextModel:
    """The shipped model (or one trained anew, in `folder`), in eval mode, float32."""
    options = {"dtype": torch.float32, "local_files_only": True}
    image = ResNetForImageClassification.from_pretrained(folder / "image_encoder", **options)
    text = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", **options)
    return SceneTextModel(image, text).eval().to(device)
