"""Models by name: the embedded ones, the paper's, local folders in diffusers' format, and names on the model hub."""

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import AutoModelForImageClassification

from companion.minis.shipping import SHARED_PARTS
from companion.pipelines.paper_models import PAPER_MODELS, PaperModel

WEIGHTS = Path(__file__).parent.parent / "minis" / "weights"
_HUB_SECONDS = 3.0

# DiTPipeline expects numbers as keys of its class names, but its configuration is JSON, where keys are strings:
# diffusers reads them correctly, and complains of every such model.
logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(
    lambda record: not record.getMessage().startswith("Expected types for id2label")
)


def model_names() -> tuple[str, ...]:
    """Names of the embedded models."""
    return tuple(sorted(folder.parent.name for folder in WEIGHTS.glob("*/model_index.json")))


def load(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """A diffusers pipeline, ready to call.

    Args:
        name: an embedded model (`model_names()`), one of the paper's (`PAPER_MODELS`, whose `call` and `interval` are
            its settings; the paper's scheduler is set here), a local folder with a `model_index.json`, or a hub name
            "owner/model".
        device: where to put it.
        dtype: of its weights; None is float32.

    Raises:
        ValueError: there is no such model or folder, the folder holds no pipeline, the hub cannot be reached (found out
            within seconds), or the device does not exist.
    """
    target = _checked_device(device)
    if str(name) in PAPER_MODELS:
        return _paper_model(PAPER_MODELS[str(name)], target, dtype)
    source = _folder_of(str(name))
    try:
        shared = _shared_parts(Path(source), dtype or torch.float32)
        pipe = _pipeline_class(Path(source)).from_pretrained(source, dtype=dtype or torch.float32, **shared)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model {str(name)!r} cannot be loaded as a diffusers pipeline: {reason}") from error
    return pipe.to(target)


def _index(folder: Path) -> dict[str, Any]:
    """What a local folder's pipeline is made of; nothing for a hub name."""
    file = folder / "model_index.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _pipeline_class(folder: Path) -> type[DiffusionPipeline]:
    """This package's own pipelines, which diffusers cannot find by name; for all others it knows best."""
    name = _index(folder).get("_class_name")
    if name == "EDM2Pipeline":
        from companion.pipelines.edm2.pipeline import EDM2Pipeline

        return EDM2Pipeline
    if name == "ADMPipeline":
        from companion.pipelines.adm.pipeline import ADMPipeline

        return ADMPipeline
    return DiffusionPipeline


def _shared_parts(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """What is shipped once: the autoencoder of all models that work in its latents, and mini-adm's classifier."""
    loaders: dict[str, Any] = {"vae": AutoencoderKL, "classifier": AutoModelForImageClassification}
    return {
        part: loaders[part].from_pretrained(WEIGHTS / name, dtype=dtype, local_files_only=True).eval()
        for part, name in SHARED_PARTS.items()
        if folder.parent == WEIGHTS and _index(folder).get(part, [None])[0] and not (folder / part).is_dir()
    }


def _paper_model(model: PaperModel, device: torch.device, dtype: torch.dtype | None) -> DiffusionPipeline:
    if model.scheduler is None:
        from companion.pipelines.edm2.pipeline import load_edm2

        return load_edm2(model.source.removeprefix("edm2:"), device=device, dtype=dtype)
    pipe = load(model.source, device=device, dtype=dtype)
    pipe.scheduler = getattr(diffusers, model.scheduler).from_config(pipe.scheduler.config)
    return pipe


def _folder_of(name: str) -> str:
    """A local folder, or a hub name that can be had (from the cache or because the hub answers)."""
    if name in model_names():
        return str(WEIGHTS / name)
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise ValueError(f"folder {name!r} holds no diffusers pipeline: it has no model_index.json")
        return name
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name[0] in ".~" or name.endswith((".ckpt", ".pt", ".safetensors")):
        raise ValueError(
            f"model {name!r} is not known; embedded models: {', '.join(model_names())}; "
            f'the paper\'s: {", ".join(PAPER_MODELS)}; otherwise give a local folder or a hub name "owner/model"'
        )
    return _cached_or_reachable(name)


def _cached_or_reachable(name: str) -> str:
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "model_index.json"), str):
        return snapshot_download(name, local_files_only=True)
    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except Exception as error:  # whatever the network or the hub may raise, the answer is the same sentence
        raise ValueError(
            f"model {name!r} is neither an embedded model ({', '.join(model_names())}) nor a local folder, "
            f"and the model hub does not offer it: {_reason(error)}"
        ) from error
    return name


def _reason(error: Exception) -> str:
    kind = type(error).__name__
    known = {
        "RepositoryNotFoundError": "no such repository, or it is private",
        "GatedRepoError": "its licence must be accepted on its page first",
        "HFValidationError": "the name is not a valid hub name",
    }
    return known.get(kind, f"no connection ({kind})")


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f'device {str(device)!r} is not available here; use "cpu" or one that torch can see'
        ) from error
    return target
