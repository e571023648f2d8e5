"""EDM2 pipelines from NVIDIA's checkpoints, from the cache of what was downloaded, and from saved folders."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from companion.errors import check_name
from companion.pipelines.edm2.checkpoint import EDM2Checkpoint, read_edm2_checkpoint
from companion.pipelines.edm2.pipeline import EDM2Pipeline
from companion.pipelines.edm2.presets import AUTOENCODER, CHECKPOINTS, EDM2Preset, edm2_preset
from companion.pipelines.hub import cache_folder, download_file, hub_folder
from companion.pipelines.saved import checked_device, checked_dtype, load_model, load_pipeline


def load_edm2(
    preset: str | None = None,
    source: str | Path | None = None,
    *,
    guide: str | Path | None = None,
    vae: AutoencoderKL | str | Path | None = AUTOENCODER,
    download: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
) -> EDM2Pipeline:
    """Load an EDM2 pipeline from NVIDIA's checkpoints, which are read without executing them.

    `load_edm2("edm2-img64-s", download=True)` once; afterwards the name alone. To convert files of one's own:
    `load_edm2(source="network.pkl", guide="other.pkl").save_pretrained("folder")`.

    Args:
        preset: one of `EDM2_PRESETS`; None needs a source.
        source: a `.pkl` file, a folder with the preset's, or a folder that a pipeline was saved in; None is the folder
            that the preset was downloaded to.
        guide: `.pkl` file of the reference network; None is the preset's, if it lies next to the source.
        vae: decoder of networks in latents: the autoencoder, its folder or its hub name; None leaves the pipeline with
            `output_type="latent"`. A saved pipeline has its own.
        download: whether to fetch what is missing: checkpoints (S: 0.6 GB, XXL: 3 GB) and the autoencoder.
        device: where to put it.
        dtype: of its weights: a torch.dtype or its name; None is float32.

    Raises:
        ValueError: an unknown preset, a source that holds no EDM2 networks, or a file is missing and cannot or may not
            be downloaded (reported within seconds).
    """
    known, kind, target = None if preset is None else edm2_preset(preset), checked_dtype(dtype), checked_device(device)
    if source is None:
        if preset is None or known is None:
            raise ValueError("load_edm2 needs a preset or a source, got neither")
        source = cache_folder("edm2") / preset
        if not (source / "model_index.json").is_file():
            if not download:
                raise ValueError(
                    f"EDM2 preset {preset!r} is not on this machine; load_edm2({preset!r}, download=True) fetches it "
                    f"to {source}, or give the folder of {known.network} and {known.guide} as source"
                )
            _download(known, source, vae)
    source = check_name(source, "source")
    if (source / "model_index.json").is_file():
        pipe = load_pipeline(EDM2Pipeline, source, kind)
    else:
        files = [source]
        if source.is_dir():
            if known is None:
                raise ValueError(f"folder {str(source)!r} holds no saved pipeline; name the preset that its files make")
            files = [source / known.network]
        guide_file = None if known is None else files[0].parent / known.guide
        if guide is not None:
            files.append(Path(guide))
        elif guide_file is not None and (guide_file.is_file() or source.is_dir()):
            files.append(guide_file)
        pipe = _assemble([read_edm2_checkpoint(file) for file in files], vae, download, kind)
    for network in (pipe.unet, pipe.guide):
        if network is not None:
            network.eval().requires_grad_(False).fold_weights()
    return pipe.to(target)


def _download(preset: EDM2Preset, folder: Path, vae: AutoencoderKL | str | Path | None) -> None:
    """Bring a preset's files and leave them as a saved pipeline, in their stored precision."""
    files = [download_file(name, folder.parent, CHECKPOINTS) for name in (preset.network, preset.guide)]
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    _assemble([read_edm2_checkpoint(file) for file in files], vae, True, None).save_pretrained(part)
    part.rename(folder)
    for file in files:
        file.unlink()


def _assemble(
    checkpoints: Sequence[EDM2Checkpoint],
    vae: AutoencoderKL | str | Path | None,
    download: bool,
    dtype: torch.dtype | None,
) -> EDM2Pipeline:
    """A pipeline of a network and perhaps its reference; dtype None keeps the stored precision."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        for name in ("sample_size", "in_channels"):
            if other.config[name] != first.config[name]:
                raise ValueError(
                    f"guide must have the network's {name}, {first.config[name]}, got {other.config[name]}"
                )
    networks = [checkpoint.network(dtype) for checkpoint in checkpoints]
    if first.latent_mean is None or first.latent_std is None:
        return EDM2Pipeline(networks[0], networks[1] if len(networks) > 1 else None)
    decoder = vae if vae is None or isinstance(vae, AutoencoderKL) else _autoencoder(str(vae), download)
    if decoder is not None and dtype is not None:
        decoder = decoder.to(dtype)
    return EDM2Pipeline(
        networks[0],
        networks[1] if len(networks) > 1 else None,
        vae=decoder,
        latent_mean=list(first.latent_mean),
        latent_std=list(first.latent_std),
    )


def _autoencoder(name: str, download: bool) -> AutoencoderKL:
    """From a folder, the hub's cache or, if allowed and there is a connection, the hub."""
    advice = "give its folder as vae, download=True where there is a connection, or vae=None for latents only"
    return load_model(AutoencoderKL, hub_folder(name, "autoencoder", advice, download=download), torch.float32, "vae")
