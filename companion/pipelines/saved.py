"""Saved models in folders: looked through before they are loaded, and complete or refused.

diffusers and transformers fill a tensor that a file lacks with random numbers and warn; here that is an error. Weights
are safetensors, or PyTorch files of tensors alone. No code of a folder's is run and nobody is asked whether to run it.
"""

import importlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin

from companion.arguments import shortened
from companion.errors import explained
from companion.files import read_json, tensor_header

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
_OWN_NETWORKS = ("companion.networks.adm", "companion.networks.edm2")
_COUNTS = re.compile(r"(layers|blocks|depths?|layers_per_block)$")  # settings that say how often something is built
_LARGEST = 1 << 24  # of any whole number in a configuration; vocabularies have 2^18
_SAFE = {"local_files_only": True}
_NO_CODE = {"trust_remote_code": False}


def checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A dtype that weights can have; None is float32.

    Raises:
        ValueError: it is none of `DTYPES`.
    """
    if dtype is None:
        return torch.float32
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, as torch's or by name, got {shortened(dtype)}")
    return found


def checked_device(device: str | torch.device) -> torch.device:
    """A device that tensors can be on.

    Raises:
        ValueError: it is not here, or holds no numbers ("meta").
    """
    try:
        target = torch.device(device)
        torch.ones(1, device=target).item()
    except Exception as error:  # each backend has an error of its own
        raise ValueError(
            f'device {shortened(str(device))} is not available here; use "cpu" or one that torch can see'
        ) from error
    return target


def load_model(kind: Any, folder: Path, dtype: torch.dtype, what: str) -> Any:
    """A model of diffusers' or transformers' from its folder, in eval mode, with every tensor from the file.

    Args:
        kind: its class, or one of transformers' auto classes.
        what: for the message.

    Raises:
        ValueError: the folder is damaged, or its weights lack a tensor of the model or hold one of another shape.
    """
    with explained(f"{what} {str(folder)!r} cannot be loaded"):
        check_config(folder)
        options = _SAFE if isinstance(kind, type) and issubclass(kind, ModelMixin) else _SAFE | _NO_CODE
        model, info = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
        missing = sorted(map(str, info["missing_keys"]))
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"its weights lack the tensor {missing[0]!r}{more}")
        if info["mismatched_keys"]:
            name, *_ = sorted(info["mismatched_keys"])[0]
            raise ValueError(f"its tensor {name!r} is not of the shape that its configuration says")
        return model.eval()


def load_pipeline(kind: type[DiffusionPipeline], folder: Path, dtype: torch.dtype, **parts: Any) -> DiffusionPipeline:
    """A pipeline from its folder.

    Args:
        kind: its class, or `DiffusionPipeline` to take what its index says.
        **parts: components that are there already, by name.

    Raises:
        ValueError: the folder holds no pipeline, or one of its parts is missing, damaged or incomplete.
    """
    with explained(f"model {str(folder)!r} cannot be loaded as a diffusers pipeline"):
        for name, part in pipeline_index(folder).items():
            if name not in parts and isinstance(part, list) and len(part) == 2:
                model = _model_class(folder / name, *part)
                if model is not None:
                    parts[name] = load_model(model, folder / name, dtype, name)
                elif (folder / name / "scheduler_config.json").exists():
                    _check_scheduler(folder / name)
        with _without_label_warning():
            pipe = kind.from_pretrained(folder, dtype=dtype, **_SAFE, **_NO_CODE, **parts)
        absent = [name for name, part in pipe.components.items() if part is None]
        absent = [name for name in absent if name not in pipe._optional_components]
        if absent:
            raise ValueError(f"it has no {absent[0]}")
        return pipe


@contextmanager
def _without_label_warning() -> Iterator[None]:
    """DiTPipeline expects numbers as keys of its class names, but its configuration is JSON, where keys are strings:
    diffusers reads them correctly, and complains of every such model.
    """
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Expected types for id2label")

    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def pipeline_index(folder: Path) -> dict[str, Any]:
    """What a folder's pipeline is made of.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    found = read_json(folder / "model_index.json", "index")
    if not isinstance(found, dict):
        raise ValueError(f"index {folder / 'model_index.json'} is damaged: it names no parts")
    return found


def _model_class(folder: Path, library: Any, name: Any) -> Any:
    """The class of a part that holds weights; None for tokenizers, schedulers, absent parts and mere settings.

    Raises:
        ValueError: the index names a library that is not diffusers' or transformers': importing it would run it.
    """
    if library in ("diffusers", "transformers", *_OWN_NETWORKS):
        module = {"diffusers": diffusers, "transformers": transformers}.get(library) or importlib.import_module(library)
        found = getattr(module, str(name), None)
        if found is None:
            raise ValueError(f"{library} has no class {name!r}")
        holds_weights = isinstance(found, type) and issubclass(found, (ModelMixin, transformers.PreTrainedModel))
        return found if holds_weights else None
    if folder.is_dir() and not (isinstance(library, str) and hasattr(diffusers.pipelines, library)):
        raise ValueError(f"its index names {library}.{name}, which is neither diffusers' nor transformers'")
    return None


def check_config(folder: Path) -> None:
    """Compare a model's configuration with its weights before anything of that size is built.

    Raises:
        ValueError: there is no configuration, a number in it is absurd, or it asks for more layers than there are
            tensors.
    """
    config = read_json(folder / "config.json", "configuration")
    if not isinstance(config, dict):
        raise ValueError(f"configuration {folder / 'config.json'} is damaged: it holds no settings")
    files = list(folder.glob("*.safetensors"))
    tensors = sum(len(tensor_header(file)) for file in files) if files else 100_000
    for name, value in _numbers(config):
        if abs(value) > _LARGEST and not name.endswith("_id"):
            raise ValueError(f"its configuration sets {name} to {value}")
        if _COUNTS.search(name) and value > tensors:
            raise ValueError(f"its configuration sets {name} to {value}, and its weights are {tensors} tensors")


def _check_scheduler(folder: Path) -> None:
    config = read_json(folder / "scheduler_config.json", "configuration")
    steps = config.get("num_train_timesteps", 1) if isinstance(config, dict) else None
    if not isinstance(steps, int) or not 1 <= steps <= 100_000:
        raise ValueError(f"its scheduler's num_train_timesteps must be from 1 to 100,000, got {steps!r}")


def _numbers(settings: Any, name: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from _numbers(value, key)
    elif isinstance(settings, list):
        for value in settings:
            yield from _numbers(value, name)
    elif isinstance(settings, int):
        yield name, settings
