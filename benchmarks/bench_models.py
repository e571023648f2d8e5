"""What rectification costs on the paper's models: time and peak memory beside plain guidance, for every product.

Cost does not depend on the weights' values, so real architectures with random weights measure it. The models are
diffusers' own classes (EDM2: this package's) in their published configurations, narrower and at smaller sizes, for one
image on one thread; the table says what each was scaled by. One whole call of the pipeline is timed, without a decoder.
The ways take turns within each round, so that a machine that is busy for a while slows them all.

`python -m benchmarks models` writes notebooks/results/runtime.json beside printing the table. On a GPU,
`python -m benchmarks.bench_models --device cuda` measures the published sizes at the paper's batch sizes (memory at
batch size 1, as the paper does) and writes runtime_cuda.json.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from companion.evaluation.sampling.memory import peak_memory
from companion.files import write_json
from companion.networks.edm2 import EDM2UNet
from companion.pipelines.edm2.pipeline import EDM2Pipeline
from companion.pipelines.hook import RectifiedGuidanceConfig, rectified_guidance
from companion.provenance import provenance

RESULTS = Path(__file__).parent.parent / "notebooks" / "results" / "runtime.json"
WAYS = ("none", "published", "finite_difference", "auto", "ones", "vjp", "jvp")
"""`published` is `ones` as the paper's code does it: both branches in one graph."""
ROUNDS, SEED = 3, 0


@dataclass(frozen=True)
class Model:
    """One of the paper's models, made small.

    Args:
        paper: its name in the paper's table.
        scaled: what differs from the published configuration.
        build: the pipeline with random weights.
        call: arguments of its call, three evaluations of the denoiser.
        published: the pipeline in its published size, with random weights.
        batch: the paper's, for time in the published size.
    """

    paper: str
    scaled: str
    build: Callable[[], DiffusionPipeline]
    call: dict[str, Any]
    published: Callable[[], DiffusionPipeline]
    batch: int


def _dit(heads: int = 4, layers: int = 7) -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(transformer, _autoencoder(), DDIMScheduler())


def _edm2(channels: int, in_channels: int, guide: int | None = None, per_head: int | None = None) -> EDM2Pipeline:
    def network(width: int, classes: int) -> EDM2UNet:
        return EDM2UNet(
            sample_size=64,
            in_channels=in_channels,
            num_classes=classes,
            model_channels=width,
            channels_per_head=per_head or width,
        )

    reference = None if guide is None else network(guide, 0)
    return EDM2Pipeline(network(channels, 1000), reference, null_labels=guide is None)


def _stable_diffusion(width: int, size: int, groups: int = 16, **config: Any) -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        norm_num_groups=groups,
        **config,
    )
    scheduler = DDIMScheduler(
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction" if "use_linear_projection" in config else "epsilon",
    )
    return StableDiffusionPipeline(
        vae=_autoencoder(),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl(
    width: int = 32, size: int = 48, groups: int = 16, heads: tuple[int, ...] = (2, 4, 8)
) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=groups,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=heads,
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return StableDiffusionXLPipeline(
        vae=_autoencoder(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def _autoencoder() -> AutoencoderKL:
    """Small: decoding is no part of what is measured, but DiTPipeline always decodes."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )


def _text(width: int, pooled: int | None = None) -> dict[str, Any]:
    """A prompt and a negative prompt as a text encoder would give them, and three steps."""
    generator = torch.Generator().manual_seed(SEED)

    def embedding(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    call: dict[str, Any] = {
        "prompt_embeds": embedding(1, 77, width),
        "negative_prompt_embeds": embedding(1, 77, width),
        "guidance_scale": 7.5,
        "num_inference_steps": 3,
        "output_type": "latent",
    }
    if pooled is not None:
        call |= {"pooled_prompt_embeds": embedding(1, pooled), "negative_pooled_prompt_embeds": embedding(1, pooled)}
    return call


# Heun's method evaluates the network 2N - 1 times.
_EDM2_CALL = {"class_labels": [7], "guidance_scale": 2.0, "num_inference_steps": 2, "output_type": "latent"}
_GUIDED = "; guided by the unconditional XS"

MODELS = (
    Model("EDM2-S 64", "width 1/6", lambda: _edm2(32, 3), _EDM2_CALL, lambda: _edm2(192, 3, per_head=64), 8),
    Model(
        "DiT-XL/2 256",
        "width 1/4, depth 1/4",
        _dit,
        {"class_labels": [7], "guidance_scale": 4.0, "num_inference_steps": 3, "output_type": "np"},
        lambda: _dit(16, 28),
        8,
    ),
    Model("EDM2-S 512", "width 1/6", lambda: _edm2(32, 4), _EDM2_CALL, lambda: _edm2(192, 4, per_head=64), 8),
    Model(
        "EDM2-S 512" + _GUIDED,
        "widths 1/6",
        lambda: _edm2(32, 4, guide=21),
        _EDM2_CALL,
        lambda: _edm2(192, 4, 128, 64),
        8,
    ),
    Model("EDM2-XXL 512", "width 1/8", lambda: _edm2(56, 4), _EDM2_CALL, lambda: _edm2(448, 4, per_head=64), 8),
    Model(
        "EDM2-XXL 512" + _GUIDED,
        "widths 1/8",
        lambda: _edm2(56, 4, guide=16),
        _EDM2_CALL,
        lambda: _edm2(448, 4, 128, 64),
        8,
    ),
    Model(
        "SD-V1.4 512",
        "width 3/20, latents 32 for 64",
        lambda: _stable_diffusion(48, 32, cross_attention_dim=768, attention_head_dim=8),
        _text(768),
        lambda: _stable_diffusion(320, 64, 32, cross_attention_dim=768, attention_head_dim=8),
        4,
    ),
    Model(
        "SD-V2.1 768",
        "width 3/20, latents 40 for 96",
        lambda: _stable_diffusion(
            48, 40, cross_attention_dim=1024, attention_head_dim=(3, 6, 12, 12), use_linear_projection=True
        ),
        _text(1024),
        lambda: _stable_diffusion(
            320, 96, 32, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        ),
        4,
    ),
    Model(
        "SD-XL 1024",
        "width 1/10, latents 48 for 128",
        _stable_diffusion_xl,
        _text(2048, 1280),
        lambda: _stable_diffusion_xl(320, 128, 32, (5, 10, 20)),
        2,
    ),
)


def denoisers(pipe: DiffusionPipeline) -> list[nn.Module]:
    """The networks that guidance evaluates: the denoiser, and its guide if it has one."""
    parts = [getattr(pipe, name, None) for name in ("unet", "transformer", "guide")]
    return [part for part in parts if isinstance(part, nn.Module)]


@contextmanager
def published(pipe: DiffusionPipeline) -> Iterator[None]:
    """The paper's `ones` as its code does it, at its cost: the branches run with gradients on, their graph is kept
    until the sum of the conditional output is differentiated with respect to the network's input."""
    kept: list[Tensor] = []

    def wrapped(forward: Callable[..., Any], is_guide: bool) -> Callable[..., Any]:
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            name = next((n for n in ("hidden_states", "sample") if n in kwargs), None)
            x = (args[0] if name is None else kwargs[name]).detach().requires_grad_()
            args, kwargs = ((x, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: x})
            with torch.enable_grad():
                output = forward(*args, **kwargs)
                value = output if isinstance(output, Tensor) else output[0]
                if isinstance(pipe, EDM2Pipeline) and (is_guide or _no_labels(args, kwargs)):
                    kept[:] = [value]  # the reference branch: its graph lives until the conditional one's is done with
                    return value.detach()
                rows = len(x)
                if isinstance(pipe, EDM2Pipeline):
                    mine = slice(0, rows)
                else:  # DiT stacks the conditional branch first
                    first = isinstance(pipe, DiTPipeline)
                    mine = slice(0, rows // 2) if first else slice(rows // 2, rows)
                [gradient] = torch.autograd.grad(value[mine, : x.shape[1]].sum(), x)
            value = value.detach().clone()
            value[mine, : x.shape[1]] *= 1 - 0.1 * gradient[mine]  # the values do not matter here, the work does
            kept.clear()
            if isinstance(output, (Tensor, tuple)):
                return value if isinstance(output, Tensor) else (value,)
            output.sample = value
            return output

        return evaluate

    networks = denoisers(pipe)
    originals = [network.forward for network in networks]
    for network, forward in zip(networks, originals, strict=True):
        network.forward = wrapped(forward, network is getattr(pipe, "guide", None))
    try:
        yield
    finally:
        for network in networks:
            del network.forward


def _no_labels(args: tuple, kwargs: dict[str, Any]) -> bool:
    labels = kwargs["class_labels"] if "class_labels" in kwargs else args[2] if len(args) > 2 else None
    return labels is None


def _batched(call: dict[str, Any], batch: int, device: torch.device) -> dict[str, Any]:
    """The arguments of a call for one sample, for several."""
    call = {name: value * batch if name == "class_labels" else value for name, value in call.items()}
    return {
        name: value.to(device).repeat_interleave(batch, dim=0) if torch.is_tensor(value) else value
        for name, value in call.items()
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draw(pipe: DiffusionPipeline, model: Model, way: str, batch: int = 1) -> float:
    """Seconds of one call of the pipeline."""
    device = pipe.device
    generator = torch.Generator().manual_seed(SEED)
    guided = (
        published(pipe)
        if way == "published"
        else nullcontext()
        if way == "none"
        else rectified_guidance(pipe, RectifiedGuidanceConfig.preset(way))
    )
    call = _batched(model.call, batch, device)
    with guided:
        _wait(device)
        start = time.perf_counter()
        pipe(**call, generator=generator)
        _wait(device)
        return time.perf_counter() - start


def rows_evaluated(pipe: DiffusionPipeline, model: Model, way: str) -> int:
    """How many inputs the networks were given in one call, a stacked batch counting as two."""
    rows = 0

    def count(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal rows
        x: Tensor = args[0] if args else kwargs["hidden_states"] if "hidden_states" in kwargs else kwargs["sample"]
        rows += len(x)

    handles = [network.register_forward_pre_hook(count, with_kwargs=True) for network in denoisers(pipe)]
    draw(pipe, model, way)
    for handle in handles:
        handle.remove()
    return rows


def build(model: Model, device: torch.device | str = "cpu") -> DiffusionPipeline:
    """The pipeline with random weights, none of which asks for gradients: public code, where they do, costs more.

    On a GPU in its published size, elsewhere made small.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        pipe = model.published() if torch.device(device).type == "cuda" else model.build()
    pipe.set_progress_bar_config(disable=True)
    for network in denoisers(pipe):
        network.eval().requires_grad_(False)
    return pipe.to(device)


def measure(model: Model, rounds: int = ROUNDS, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Seconds and peak memory of every way on one model, and ratios to plain guidance."""
    pipe = build(model, device)
    large = torch.device(device).type == "cuda"
    batch = model.batch if large else 1
    weights = sum(p.numel() * p.element_size() for network in denoisers(pipe) for p in network.parameters())
    peaks = {}
    for way in WAYS:
        with peak_memory(device) as memory:  # exact; not to be timed, but it warms pages and kernels
            draw(pipe, model, way)
        peaks[way] = memory.bytes
        if large:
            draw(pipe, model, way, batch)  # warm at the batch size that is timed, too
    times = [{way: draw(pipe, model, way, batch) for way in WAYS} for _ in range(rounds)]
    return {
        "model": model.paper,
        "scaled": "published size" if large else model.scaled,
        "batch": batch,
        "weights_mib": weights / 2**20,
        "seconds": {way: statistics.median(r[way] for r in times) for way in WAYS},
        "time_ratio": {way: statistics.median(r[way] / r["none"] for r in times) for way in WAYS},
        "peak_mib": {way: peaks[way] / 2**20 for way in WAYS},
        "memory_ratio": {way: (weights + peaks[way]) / (weights + peaks["none"]) for way in WAYS},
    }


def main(arguments: Sequence[str] = ()) -> None:
    """Measure all models, print the table, write the file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_models", description="Cost on the paper's models."
    )
    parser.add_argument("--device", default="cpu", help="cuda measures the published sizes; default: cpu, made small")
    device = torch.device(parser.parse_args(list(arguments)).device)
    file = RESULTS if device.type == "cpu" else RESULTS.with_stem(f"runtime_{device.type}")
    command = ["benchmarks", "models"] if device.type == "cpu" else ["benchmarks.bench_models", f"--device={device}"]
    ways = WAYS[1:]
    print("time / CFG, and (weights + peak) / CFG's\n")
    print(f"| model | scaled by | CFG, s | {' | '.join(ways)} |")
    print("|---" * (3 + len(ways)) + "|")
    rows = []
    for model in MODELS:
        row = measure(model, device=device)
        rows.append(row)
        cells = [f"{row['time_ratio'][way]:.2f}, {row['memory_ratio'][way]:.2f}" for way in ways]
        print(f"| {model.paper} | {row['scaled']} | {row['seconds']['none']:.2f} | {' | '.join(cells)} |", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    made = provenance(device, command=["python", "-m", *command])
    write_json(file, {"provenance": {**made, "seed": SEED, "rounds": ROUNDS}, "rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
