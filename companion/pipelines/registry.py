"""Models by name: the embedded ones, the published ones, local folders in diffusers' format, and the model hub's."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import AutoModelForImageClassification

from companion.errors import check_name
from companion.minis.shipping import SHARED_PARTS, WEIGHTS
from companion.pipelines.adm.loading import load_adm
from companion.pipelines.adm.pipeline import ADMPipeline
from companion.pipelines.adm.presets import ADM_PRESETS, ADMPreset
from companion.pipelines.edm2.loading import load_edm2
from companion.pipelines.edm2.pipeline import EDM2Pipeline
from companion.pipelines.edm2.presets import EDM2_PRESETS, EDM2Preset
from companion.pipelines.hub import hub_folder
from companion.pipelines.paper_models import PAPER_MODELS, PaperModel
from companion.pipelines.saved import checked_device, checked_dtype, load_model, load_pipeline, pipeline_index

PUBLISHED_MODELS: Mapping[str, PaperModel | EDM2Preset | ADMPreset] = MappingProxyType(
    {**PAPER_MODELS, **EDM2_PRESETS, **ADM_PRESETS}
)
"""All published models that `load` knows by name: the REG paper's, EDM2's and ADM's."""


def model_names() -> tuple[str, ...]:
    """Names of the embedded models."""
    return tuple(sorted(folder.parent.name for folder in WEIGHTS.glob("*/model_index.json")))


def load(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None
) -> DiffusionPipeline:
    """Load a diffusers pipeline, ready to call.

    Args:
        name: an embedded model (`model_names()`), a published one (`PUBLISHED_MODELS`; of the paper's, `call` and
            `interval` are its settings, and the paper's scheduler is set here), a local folder with a
            `model_index.json`, or a hub name "owner/model".
        device: where to put it.
        dtype: of its weights: a torch.dtype or its name, such as "bfloat16"; None is float32.

    Raises:
        ValueError: there is no such model or folder; the folder holds no pipeline, or a damaged or incomplete one; the
            hub cannot be reached (reported within seconds); the device does not exist; weights cannot have that dtype.
    """
    target, kind, text = checked_device(device), checked_dtype(dtype), str(check_name(name, "model"))
    model = PUBLISHED_MODELS.get(text)
    if isinstance(model, PaperModel):
        return _paper_model(model, target, kind)
    if isinstance(model, EDM2Preset):
        return load_edm2(text, device=target, dtype=kind)
    if isinstance(model, ADMPreset):
        return load_adm(text, device=target, dtype=kind)
    folder = _folder_of(text)
    pipe = load_pipeline(_pipeline_class(folder), folder, kind, **_shared_parts(folder, kind))
    return pipe.to(target)


def _pipeline_class(folder: Path) -> type[DiffusionPipeline]:
    """This package's own pipelines, which diffusers cannot find by name; for all others it knows best."""
    own = {"EDM2Pipeline": EDM2Pipeline, "ADMPipeline": ADMPipeline}
    name = pipeline_index(folder).get("_class_name")
    return own.get(name, DiffusionPipeline) if isinstance(name, str) else DiffusionPipeline


def _shared_parts(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """What is shipped once: the autoencoder of all models that work in its latents, and mini-adm's classifier."""
    if folder.parent != WEIGHTS:
        return {}
    loaders: dict[str, Any] = {"vae": AutoencoderKL, "classifier": AutoModelForImageClassification}
    index = pipeline_index(folder)
    return {
        part: load_model(loaders[part], WEIGHTS / name, dtype, part)
        for part, name in SHARED_PARTS.items()
        if index.get(part, [None])[0] and not (folder / part).is_dir()
    }


def _paper_model(model: PaperModel, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    if model.scheduler is None:
        return load_edm2(model.source.removeprefix("edm2:"), device=device, dtype=dtype)
    pipe = load(model.source, device=device, dtype=dtype)
    pipe.scheduler = getattr(diffusers, model.scheduler).from_config(pipe.scheduler.config)
    return pipe


def _folder_of(name: str) -> Path:
    """A local folder, or where a model of the hub's lies or was downloaded to."""
    if name in model_names():
        return WEIGHTS / name
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").exists():
            raise ValueError(f"folder {name!r} holds no diffusers pipeline: it has no model_index.json")
        return Path(name)
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name[0] in ".~" or name.endswith((".ckpt", ".pt", ".safetensors")):
        raise ValueError(
            f"model {name!r} is not known; embedded models: {', '.join(model_names())}; "
            f"published ones: {', '.join(PUBLISHED_MODELS)}; otherwise give a local folder or a hub name "
            '"owner/model"'
        )
    advice = f"give an embedded model ({', '.join(model_names())}), a local folder or another hub name"
    return hub_folder(name, "model", advice, needs="model_index.json", fetch=_download_pipeline)


def _download_pipeline(name: str) -> str:
    return DiffusionPipeline.download(name, trust_remote_code=False)
