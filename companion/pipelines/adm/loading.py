"""ADM pipelines from OpenAI's checkpoints, from saved folders, and the embedded one with a classifier of choice."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import nn

from companion.errors import check_name
from companion.minis.shipping import WEIGHTS
from companion.pipelines.adm.checkpoint import classifier_from_checkpoint, read_adm_checkpoint, unet_from_checkpoint
from companion.pipelines.adm.classifier import (
    EMBEDDED_NOISY,
    IMAGENET_MEAN,
    IMAGENET_SIZE,
    IMAGENET_STD,
    is_noise_aware,
    off_the_shelf_classifier,
)
from companion.pipelines.adm.pipeline import ADMPipeline
from companion.pipelines.adm.presets import CHECKPOINTS, NOISY, ADMPreset, adm_preset
from companion.pipelines.hub import cache_folder, download_file
from companion.pipelines.saved import checked_device, checked_dtype, load_pipeline

MINI_ADM = "mini-adm"


def load_adm(
    preset: str | None = None,
    source: str | Path | None = None,
    *,
    classifier: nn.Module | str | Path | None = NOISY,
    imagenet_input: bool = False,
    download: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
) -> ADMPipeline:
    """Load an ADM pipeline from OpenAI's checkpoints, which are read as plain tensors.

    `load_adm("adm-imagenet-128", "folder/with/the/files")`; with another guide
    `load_adm("adm-imagenet-128", "folder", classifier="microsoft/resnet-50")`. The embedded one:
    `load_adm("mini-adm")`, or `load_adm("mini-adm", classifier="mini-adm-resnet")`. To convert once:
    `load_adm(...).save_pretrained("saved")`, and then `load_adm(source="saved")`.

    Args:
        preset: one of `ADM_PRESETS`, or "mini-adm"; None needs a saved pipeline as source.
        source: the diffusion network's `.pt` file, a folder that holds it under its published name, or a folder that a
            pipeline was saved in; None is the folder that downloads go to.
        classifier: "noise-aware", the preset's own, by the source; an off-the-shelf one, its folder or its hub name
            (see `off_the_shelf_classifier`); one of `EMBEDDED_CLASSIFIERS`; or None.
        imagenet_input: resize to 224 and normalise for the off-the-shelf classifier, as those are trained; without, it
            sees x̂_0 as it is, as in the published rows.
        download: whether to fetch what is missing (the 128x128 network has 1.7 GB).
        device: where to put it.
        dtype: of its weights: a torch.dtype or its name; None is float32.

    Raises:
        ValueError: an unknown preset, a source that holds no ADM network, or a file is missing and cannot or may not be
            downloaded (reported within seconds).
    """
    folder = None if source is None else check_name(source, "source")
    dtype, target = checked_dtype(dtype), checked_device(device)
    if preset == MINI_ADM:
        return _embedded(classifier, dtype).to(target)
    if folder is not None and (folder / "model_index.json").is_file():
        pipe = load_pipeline(ADMPipeline, folder, dtype)
        for network in (pipe.unet, pipe.classifier):
            if network is not None:
                network.requires_grad_(False)
        return pipe.to(target)
    if preset is None:
        raise ValueError("load_adm needs a preset, or the folder of a saved pipeline as source; got neither")
    known = adm_preset(preset)
    folder = cache_folder("adm") if folder is None else folder
    file, folder = (folder, folder.parent) if folder.suffix == ".pt" else (folder / known.diffusion_file, folder)
    unet = unet_from_checkpoint(read_adm_checkpoint(_present(file, preset, download)), known.unet, dtype=dtype)
    guide: nn.Module | None
    if classifier is None or isinstance(classifier, nn.Module):
        guide = classifier
    elif classifier == NOISY:
        guide = _noise_aware(known, preset, folder, download, dtype)
    else:
        guide = off_the_shelf_classifier(classifier, download=download, dtype=dtype)
    prepared = imagenet_input and guide is not None and not is_noise_aware(guide)
    variance = "learned_range" if known.unet.learned_variance else "fixed_large"
    scheduler = DDPMScheduler(
        beta_schedule=known.schedule, variance_type=variance, timestep_spacing="linspace", clip_sample=True
    )
    pipe = ADMPipeline(
        unet,
        guide,
        scheduler,
        classifier_size=IMAGENET_SIZE if prepared else None,
        classifier_mean=list(IMAGENET_MEAN) if prepared else None,
        classifier_std=list(IMAGENET_STD) if prepared else None,
    )
    return pipe.to(target)


def _embedded(classifier: nn.Module | str | Path | None, dtype: torch.dtype) -> ADMPipeline:
    """mini-adm with the classifier that is asked for."""
    if isinstance(classifier, (str, Path)):
        name = EMBEDDED_NOISY if classifier == NOISY else classifier
        classifier = off_the_shelf_classifier(name, dtype=dtype)
    pipe = load_pipeline(ADMPipeline, WEIGHTS / MINI_ADM, dtype, classifier=None)
    pipe.register_modules(classifier=classifier)
    return pipe


def _noise_aware(known: ADMPreset, preset: str, folder: Path, download: bool, dtype: torch.dtype) -> nn.Module | None:
    """The preset's own classifier; None for a preset without one."""
    if known.classifier_file is None or known.classifier is None:
        return None
    file = _present(folder / known.classifier_file, preset, download)
    return classifier_from_checkpoint(read_adm_checkpoint(file), known.classifier, dtype=dtype)


def _present(file: Path, preset: str, download: bool) -> Path:
    if file.is_file():
        return file
    if not download:
        raise ValueError(
            f"{file.name} of ADM preset {preset!r} is not in {str(file.parent)!r}; "
            f"load_adm({preset!r}, download=True) fetches it, or give its folder as source"
        )
    return download_file(file.name, file.parent, CHECKPOINTS)
