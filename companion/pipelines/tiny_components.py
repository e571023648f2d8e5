"""Tiny pipelines with random weights, rebuilt from recorded configurations.

`tiny_components.json` holds the configuration of every component and the arguments of one call, for as many pipeline
classes as diffusers itself tests with tiny components (recorded by `tests/pipelines/record_components.py`). A tokenizer
there stands for one that reads characters, a picture or an embedding for random numbers of its size and range.
`tiny_variants.json` adds classes that diffusers does not test, as changes of those that it does.
"""

import importlib
import inspect
import json
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerFast

RECORDED = Path(__file__).with_suffix(".json")
VARIANTS = RECORDED.with_name("tiny_variants.json")
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>")


@cache
def recorded() -> Mapping[str, Mapping[str, Any]]:
    """Components and arguments by pipeline class; a second configuration of a class has `/` and its name behind."""
    found = json.loads(RECORDED.read_text(encoding="utf-8"))
    for name, changes in json.loads(VARIANTS.read_text(encoding="utf-8")).items():
        found[name] = _changed(changes, found)
    return found


def _changed(changes: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Another entry (`like`) with other `components` and `arguments`, and no arguments of the names in `without`.

    A component may itself be `like` one, of this entry or `Class.name` of another, with changes of its `config`. A
    `module` is where the class is, if diffusers offers it only with a library that this call of it does not use.
    """
    base = known[changes["like"]] if "like" in changes else {"components": {}, "arguments": {}}
    components = dict(base["components"])
    for key, record in changes.get("components", {}).items():
        components[key] = _changed_component(record, base["components"], known)
    arguments = {**base["arguments"], **changes.get("arguments", {})}
    unwanted = changes.get("without", [])
    module = {"module": changes["module"]} if "module" in changes else {}
    return {"components": components, "arguments": {k: v for k, v in arguments.items() if k not in unwanted}, **module}


def _changed_component(record: Any, own: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    if not (isinstance(record, dict) and "like" in record):
        return record
    entry, _, key = record["like"].rpartition(".")
    base = known[entry]["components"][key] if entry else own[key]
    changed = {**base, **{kind: value for kind, value in record.items() if kind not in ("like", "config")}}
    if "config" in record:
        changed["config"] = {**base["config"], **record["config"]}
    return changed


def tiny_pipeline(name: str) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """A pipeline with small random weights, and arguments for one call without a generator.

    Raises:
        KeyError: nothing is recorded under this name.
        AttributeError: the installed diffusers has no such pipeline or component.
    """
    record = recorded()[name]
    own = name.split("/")[0]
    pipeline = _class(f"{record['module']}.{own}") if "module" in record else getattr(diffusers, own)
    torch.manual_seed(0)
    components = {key: _component(value) for key, value in record["components"].items()}
    accepted = inspect.signature(pipeline.__init__).parameters
    components = {key: value for key, value in components.items() if key in accepted}
    pipe = pipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):  # some pipelines make a network of what they are given
            component.eval()
    arguments = {key: _argument(value, key, torch.float32) for key, value in record["arguments"].items()}
    return pipe.to(torch.float32), arguments


def _component(record: Any) -> Any:
    if isinstance(record, list):
        return [_component(item) for item in record]
    if not isinstance(record, dict):
        return record
    if "tokenizer" in record:
        return tiny_tokenizer(record["tokenizer"])
    if "texts" in record:
        return _TextProcessor(tiny_tokenizer(record["texts"]))
    kind = _class(record["class"])
    if "transformers" in record:
        config: PretrainedConfig = _class(record["transformers"]).from_dict(record["config"])
        return _awake(kind(config))
    if "processor" in record:
        return kind(**record["processor"])
    built = kind.from_config(record["config"])
    return _awake(built) if isinstance(built, nn.Module) else built


class _TextProcessor:
    """In the place of a processor of texts and pictures: the texts alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        return self.tokenizer.apply_chat_template([conversation], **kwargs)

    def __call__(self, text: list[str], **kwargs: Any) -> Any:
        return self.tokenizer(text, **kwargs)


def _class(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def _awake(module: nn.Module) -> nn.Module:
    """Weights that begin at zero are drawn anew: fresh blocks end in zeros and would predict nothing."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.5 * parameter[0].numel() ** -0.5)
    return module.eval().requires_grad_(False)


def tiny_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of printable characters."""
    vocabulary = {token: place for place, token in enumerate((*_SPECIAL, *map(chr, range(32, 127))))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        model_max_length=max_length,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


def _argument(record: Any, name: str, dtype: torch.dtype) -> Any:
    """A recorded argument; random numbers depend on its name and place alone."""
    if isinstance(record, list):
        return [_argument(item, f"{name}.{place}", dtype) for place, item in enumerate(record)]
    if not isinstance(record, dict):
        return record
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    match record:
        case {"picture": [width, height], "mode": mode}:
            channels = len(Image.new(mode, (1, 1)).getbands())
            shape = (height, width, channels) if channels > 1 else (height, width)
            values = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).numpy()
            return Image.fromarray(values, mode)
        case {"values": values, "dtype": kind}:
            return torch.tensor(values, dtype=getattr(torch, kind))
        case {"tensor": shape, "low": low, "high": high}:
            return _random(shape, low, high, generator, dtype)
        case {"array": shape, "low": low, "high": high}:
            return _random(shape, low, high, generator, torch.float32).numpy()
        case {"integers": shape, "high": high, "dtype": kind}:
            whole = torch.randint(0, high + 1, shape, generator=generator)
            return whole.to(getattr(torch, kind)) if kind != "numpy" else whole.numpy().astype(np.uint8)
        case {"tuple": items}:
            return tuple(_argument(item, f"{name}.{place}", dtype) for place, item in enumerate(items))
    return {key: _argument(value, f"{name}.{key}", dtype) for key, value in record.items()}


def _random(shape: list[int], low: float, high: float, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return (low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)).to(dtype)
