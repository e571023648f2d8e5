"""How a trained model goes into the package: half-precision safetensors in diffusers' folder format,
and a model card.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from companion.files import read_json, write_text
from companion.markdown import table

WEIGHTS = Path(__file__).parent / "weights"


def weights_digest(*names: str, folder: Path = WEIGHTS) -> str:
    """SHA-256 of the weights of these models, all files together."""
    digest = hashlib.sha256()
    for name in names:
        for file in sorted((folder / name).rglob("*.safetensors")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


class Saveable(Protocol):
    """A pipeline or model of diffusers or transformers."""

    def to(self, dtype: torch.dtype) -> Any: ...

    def save_pretrained(self, folder: Path) -> Any: ...


SHARED_PARTS: Mapping[str, str] = {"vae": "autoencoder", "classifier": "mini-adm-resnet"}
"""Parts of pipelines that are models of their own: each is shipped once and inserted when a pipeline is loaded."""


def _leave_out_shared_parts(target: Path) -> None:
    for part, name in SHARED_PARTS.items():
        for ours in (target / part).glob("*.safetensors"):
            shared = WEIGHTS / name / ours.name
            if shared.is_file() and ours.read_bytes() == shared.read_bytes():
                shutil.rmtree(target / part)


def ship(
    model: Saveable, name: str, text: str, record: Mapping[str, Any], figures: Mapping[str, Any], folder: Path = WEIGHTS
) -> Path:
    """Write `folder/name` with the weights in float16 and a README.md; returns that folder.

    Args:
        model: converted to float16 in place.
        name: of the model and its folder.
        text: what the model is, how to load it.
        record: recipe, seed, hardware, time (from `companion.minis.training.train`).
        figures: what was measured with it, each with its unit or number of samples in its key.
    """
    target = folder / name
    model.to(torch.float16).save_pretrained(target)
    _leave_out_shared_parts(target)
    for file in target.rglob("*.json"):  # where the model was loaded from is nobody else's business
        settings = read_json(file)
        if isinstance(settings, dict) and settings.pop("_name_or_path", None) is not None:
            write_text(file, json.dumps(settings, indent=2) + "\n")
    weights = sum(file.stat().st_size for file in target.rglob("*.safetensors"))
    figures = {**figures, "size of the weights": f"{weights / 1e6:.1f} MB, float16"}
    recipe = json.dumps(dict(record), indent=2)
    write_text(
        target / "README.md",
        f"# {name}\n\n{text.strip()}\n\n## Figures\n\n{table(['what', 'measured'], figures.items())}\n\n"
        f"## How it was trained\n\n```json\n{recipe}\n```\n\nLicence: MIT, like the package.\n",
    )
    return target
