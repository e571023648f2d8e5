"""Record the tiny components that diffusers' own tests build, as `companion/pipelines/tiny_components.json`.

`python -m tests.pipelines.record_components CHECKOUT`, CHECKOUT a clone of diffusers. Only configurations, shapes and
ranges are recorded. What its tests take from a hub (tokenizers, a tiny T5) is replaced by what is built here. Nothing
in that file is written by hand: what must be otherwise is in `tiny_variants.json`. Run it with `HF_HUB_OFFLINE=1`.
"""

import importlib
import inspect
import json
import sys
import types
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from companion.pipelines.support import support_table
from companion.pipelines.tiny_components import RECORDED, tiny_tokenizer

TINY_T5 = {
    "d_model": 32,
    "d_ff": 37,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 1103,
    "relative_attention_num_buckets": 8,
}
_UNRECORDED = ("generator", "output_type", "return_dict", "callback", "callback_on_step_end")


class _Tokenizer:
    """In the place of any tokenizer's class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return tiny_tokenizer(int(kwargs.get("model_max_length", 77)))

    from_pretrained = classmethod(lambda cls, *args, **kwargs: cls(**kwargs))


class _LongTokenizer(_Tokenizer):
    """For text encoders that are given long instructions, which take many characters."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return tiny_tokenizer(4096)


def stand_ins() -> None:
    """Let components that diffusers' tests load from a hub be built here."""

    for name in ("Auto", "CLIP", "T5", "Qwen2", "Gemma", "XLMRoberta", "Llama", "Roberta", "ByT5"):
        for ending in ("Tokenizer", "TokenizerFast"):
            setattr(transformers, name + ending, _Tokenizer)
    transformers.Qwen2Tokenizer = transformers.Qwen2TokenizerFast = _LongTokenizer
    transformers.PreTrainedTokenizerBase.from_pretrained = staticmethod(_Tokenizer)
    from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    ChatGLMTokenizer.from_pretrained = staticmethod(_Tokenizer)
    transformers.AutoConfig.from_pretrained = staticmethod(lambda *a, **k: transformers.T5Config(**TINY_T5))
    transformers.T5EncoderModel.from_pretrained = classmethod(
        lambda cls, *a, **k: cls(transformers.T5Config(**TINY_T5))
    )
    transformers.UMT5EncoderModel.from_pretrained = classmethod(
        lambda cls, *a, **k: cls(transformers.UMT5Config(**TINY_T5))
    )
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    transformers.BertModel.from_pretrained = classmethod(
        lambda cls, *a, **k: cls(transformers.BertConfig(**small, vocab_size=1124))
    )
    chat = {"num_layers": 1, "padded_vocab_size": 200, "hidden_size": 32, "ffn_hidden_size": 32, "kv_channels": 8}
    chat |= {
        "num_attention_heads": 4,
        "multi_query_group_num": 2,
        "multi_query_attention": True,
        "rmsnorm": True,
        "original_rope": True,
    }
    ChatGLMModel.from_pretrained = classmethod(lambda cls, *a, **k: cls(ChatGLMConfig(**chat)))
    heads = {**small, "hidden_size": 16, "num_key_value_heads": 2, "vocab_size": 200}
    transformers.LlamaForCausalLM.from_pretrained = classmethod(
        lambda cls, *a, **k: cls(transformers.LlamaConfig(**heads))
    )
    vision = {**small, "image_size": 30, "patch_size": 2}
    transformers.SiglipVisionModel.from_pretrained = classmethod(
        lambda cls, *a, **k: cls(transformers.SiglipVisionConfig(**vision))
    )
    for name in ("SiglipImageProcessor", "CLIPImageProcessor"):
        kind = getattr(transformers, name)
        kind.from_pretrained = classmethod(lambda cls, *a, **k: cls(size={"height": 30, "width": 30}))


def test_classes(checkout: Path) -> Iterator[type]:
    """The test classes of a checkout that build components."""
    sys.path.insert(0, str(checkout))
    for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        del sys.modules[name]  # this very package has the same name
    expand = types.SimpleNamespace(expand=lambda *args, **kwargs: lambda function: function)
    sys.modules["parameterized"] = types.ModuleType("parameterized")
    sys.modules["parameterized"].parameterized = expand  # type: ignore[attr-defined]
    sys.modules["requests_mock"] = MagicMock()
    for file in sorted((checkout / "tests" / "pipelines").rglob("test_*.py")):
        if "get_dummy_components" not in file.read_text() or "onnx" in file.name:
            continue
        try:
            module = importlib.import_module(".".join(file.relative_to(checkout).with_suffix("").parts))
        except (pytest.skip.Exception, ImportError) as reason:
            print(f"{file.name}: {reason}", file=sys.stderr)
            continue
        for kind in vars(module).values():
            if inspect.isclass(kind) and kind.__module__ == module.__name__ and hasattr(kind, "get_dummy_inputs"):
                yield kind


def component(value: Any) -> Any:
    """A component as JSON."""
    if isinstance(value, (list, tuple)):
        return [component(item) for item in value]
    if hasattr(value, "nets"):  # several control networks
        return [component(item) for item in value.nets]
    if type(value).__name__ == "IFWatermarker":
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind = f"{type(value).__module__}.{type(value).__name__}"
    if isinstance(value, transformers.PreTrainedTokenizerBase):
        return {"tokenizer": value.model_max_length}
    if isinstance(value, transformers.PreTrainedModel):
        config = type(value.config)
        return {
            "class": kind,
            "transformers": f"{config.__module__}.{config.__name__}",
            "config": plain(value.config.to_diff_dict()),
        }
    if isinstance(value, diffusers.ConfigMixin):
        usual = {name: given.default for name, given in inspect.signature(type(value).__init__).parameters.items()}
        config = {
            name: given
            for name, given in value.config.items()
            if not name.startswith("_") and plain(given) != plain(usual.get(name, value))
        }
        return {"class": kind, "config": plain(config)}
    if hasattr(value, "to_dict"):
        settings = {
            name: given for name, given in value.to_dict().items() if "type" not in name and "class" not in name
        }
        return {"class": kind, "processor": plain(settings)}
    raise TypeError(f"no record of a {kind}")


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def argument(value: Any) -> Any:
    """An argument of a call as JSON."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case tuple():
            return {"tuple": [argument(item) for item in value]}
        case list():
            return [argument(item) for item in value]
        case dict():
            return {key: argument(item) for key, item in value.items()}
        case Image.Image():
            return {"picture": list(value.size), "mode": value.mode}
        case np.ndarray():
            if value.dtype == np.uint8:
                return {"integers": list(value.shape), "high": 255, "dtype": "numpy"}
            return {"array": list(value.shape), "low": float(value.min()), "high": float(value.max())}
        case torch.Tensor() if value.numel() <= 64 and (
            not value.is_floating_point() or bool(((value == 0) | (value == 1)).all())
        ):
            return {"values": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
        case torch.Tensor() if value.is_floating_point():
            return {"tensor": list(value.shape), "low": float(value.min()), "high": float(value.max())}
        case torch.Tensor():
            kind = str(value.dtype).removeprefix("torch.")
            return {"integers": list(value.shape), "high": int(value.max()), "dtype": kind}
    raise TypeError(f"no record of a {type(value).__name__}")


def record(kind: type) -> dict[str, Any]:
    tester = kind()
    with suppress(pytest.skip.Exception):  # of deprecated pipelines
        getattr(tester, "setUp", lambda: None)()
    torch.manual_seed(0)
    components = {name: component(value) for name, value in tester.get_dummy_components().items()}
    given = inspect.signature(tester.get_dummy_inputs).parameters
    inputs = tester.get_dummy_inputs("cpu") if "device" in given else tester.get_dummy_inputs()
    arguments = {name: argument(value) for name, value in inputs.items() if name not in _UNRECORDED}
    return {"components": components, "arguments": arguments}


def main(checkout: Path) -> None:
    stand_ins()
    found: dict[str, Any] = {}
    supported = {row.name for row in support_table() if row.status == "supported"}
    for kind in test_classes(checkout):
        pipeline = getattr(kind, "pipeline_class", None)
        if not inspect.isclass(pipeline) or pipeline.__name__ not in supported:
            continue
        name = pipeline.__name__
        try:
            new = record(kind)
        except (Exception, pytest.skip.Exception) as error:
            print(f"{name} ({kind.__name__}): {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            continue
        if any(known == new for entry, known in found.items() if entry.split("/")[0] == name):
            continue
        if name in found:
            name = f"{name}/{kind.__name__.removesuffix('Tests').removesuffix('Fast')}"
        found[name] = new
        save(found)
    print(f"{len(found)} recorded, of {len({name.split('/')[0] for name in found})} classes")


def save(found: dict[str, Any]) -> None:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(found[name], sort_keys=True)}" for name in sorted(found))
    RECORDED.write_text("{\n" + lines + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
