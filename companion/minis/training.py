"""A training loop that survives a kill: every embedded model is trained by it.

All that a step depends on (weights, optimiser, averaged weights, step count, seed) is in one checkpoint file, replaced
atomically; data are drawn by step number, never from a stream, so a resumed run sees the batches an uninterrupted one
would.
"""

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.training_utils import EMAModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from companion.arguments import check_integer, check_number
from companion.files import whole_file

Loss = Callable[[int], Tensor]

_in_block = re.compile(r"^(?!.*embedding).*(block|\.(enc|dec)\.)")  # by the names of diffusers and of EDM2


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast to train.

    Args:
        steps: optimiser steps in all, at least 1.
        batch_size: samples a step, at least 1.
        learning_rate: peak; warmed up linearly over `warmup` steps, then decayed to zero along a half cosine.
        optimiser: `adamw`, or `muon` for the matrices and convolution kernels inside a network's blocks (Jordan et al.
            2024, at AdamW's step size: Liu et al. 2025) with AdamW for everything else.
        ema_decay: of the averaged weights, in [0, 1); the averaged weights are what is shipped.
        seed: of the weights' initialisation and of the data.
        checkpoint_seconds: wall-clock time between checkpoints.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 200
    weight_decay: float = 0.0
    optimiser: str = "adamw"
    ema_decay: float = 0.999
    seed: int = 0
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            check_integer(name, getattr(self, name), 1, 10**9)
        check_number("learning_rate", self.learning_rate, 0.0, 10.0)
        if self.optimiser not in ("adamw", "muon"):
            raise ValueError(f"optimiser must be adamw or muon, got {self.optimiser!r}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Noised(NamedTuple):
    """Pictures or latents in the noise of a timestep each: `√ᾱ clean + √(1-ᾱ) noise`; ᾱ broadcasts against them."""

    noisy: Float[Tensor, "batch ..."]
    timestep: Int[Tensor, " batch"]
    noise: Float[Tensor, "batch ..."]
    alpha_bar: Float[Tensor, "batch ..."]


def noised(
    clean: Float[Tensor, "batch ..."], alphas_cumprod: Float[Tensor, " steps"], generator: torch.Generator
) -> Noised:
    """What denoisers and noise-aware classifiers learn from: timesteps drawn uniformly, and then the noise."""
    timestep = torch.randint(len(alphas_cumprod), (len(clean),), generator=generator)
    alpha_bar = alphas_cumprod.to(clean)[timestep].view(-1, *(1,) * (clean.ndim - 1))
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    return Noised(
        alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise, timestep.to(clean.device), noise, alpha_bar
    )


def train(
    model: nn.Module,
    loss: Loss,
    config: TrainingConfig,
    folder: Path,
    *,
    until: Callable[[], bool] = lambda: False,
) -> dict:
    """Train `model` in place, leave the averaged weights in it; continue where a killed run of these settings stopped.

    Args:
        model: whatever `loss` computes with. It computes under bfloat16 autocast, on a CPU only where that is faster.
        loss: maps the step number to a scalar; must draw all its randomness from that number.
        config: training settings.
        folder: receives `checkpoint.pt` and `log.jsonl`.
        until: asked after every step; True stops early (the checkpoint is written first).

    Returns:
        What a model card needs: steps, seconds (summed over all runs), final loss, hardware, settings.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    run = _Run(model, config, folder / "checkpoint.pt", device)
    model.train()
    saved = time.monotonic()
    recent: list[float] = []
    with (
        tqdm(total=config.steps, initial=run.step, desc=folder.name, mininterval=5) as bar,
        (folder / "log.jsonl").open("a") as log,
    ):
        while run.step < config.steps:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=run.autocast):
                value = loss(run.step)
            run.update(value, config.rate(run.step))
            recent.append(float(value.detach()))
            bar.update()
            if run.step % 100 == 0:
                mean = sum(recent) / len(recent)
                bar.set_postfix(loss=f"{mean:.4f}")
                log.write(json.dumps({"step": run.step, "loss": round(mean, 6), "seconds": round(run.seconds)}) + "\n")
                log.flush()
                recent.clear()
            stop = until()
            if stop or run.step == config.steps or time.monotonic() - saved > config.checkpoint_seconds:
                run.save()
                saved = time.monotonic()
            if stop:
                break
    run.average.copy_to(model.parameters())
    model.eval()
    record = {"steps": run.step, "seconds": round(run.seconds), "settings": asdict(config), "bfloat16": run.autocast}
    return {**record, **machine(device)}


class _Run:
    """All that a step depends on, read from the checkpoint where there is one."""

    def __init__(self, model: nn.Module, config: TrainingConfig, path: Path, device: torch.device) -> None:
        self._model, self._settings, self._path = model, asdict(config), path
        self._optimisers = _optimisers(model, config)
        self.average = EMAModel(model.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=3 / 4)
        self.step, self._spent, self._began = 0, 0.0, time.monotonic()
        if not path.exists():
            self.autocast = device.type != "cpu" or bfloat16_is_faster()
            return
        state = torch.load(path, map_location=device, weights_only=True)
        if state["settings"] != self._settings:
            raise ValueError(
                f"{path.parent} holds a run with other settings: {state['settings']}; choose another folder"
            )
        model.load_state_dict(state["model"])
        for optimiser, stored in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(stored)
        self.average.load_state_dict(state["average"])
        self.step, self._spent = state["step"], state["seconds"]
        self.autocast = state.get("autocast", True)  # measured once, so that a resumed run computes as it began

    @property
    def seconds(self) -> float:
        """Of training, all sessions together."""
        return self._spent + time.monotonic() - self._began

    def update(self, loss: Tensor, rate: float) -> None:
        """One step of the optimisers and of the averaged weights."""
        for group in (group for optimiser in self._optimisers for group in optimiser.param_groups):
            group["lr"] = rate
        self._model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for optimiser in self._optimisers:
            optimiser.step()
        self.average.step(self._model.parameters())
        self.step += 1

    def save(self) -> None:
        """Replace the checkpoint atomically."""
        state = {
            "model": self._model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self._optimisers],
            "average": self.average.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "settings": self._settings,
            "autocast": self.autocast,
        }
        with whole_file(self._path) as file:
            torch.save(state, file)


def bfloat16_is_faster() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones. Not all do, whatever their flags say."""
    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        tokens, weight = torch.ones(4096, 192, dtype=dtype), torch.ones(192, 768, dtype=dtype)
        tokens @ weight  # the first call also prepares its kernel
        began = time.perf_counter()
        for _ in range(10):
            tokens @ weight
        seconds.append(time.perf_counter() - began)
    return seconds[0] < seconds[1]


def _optimisers(model: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    rate, decay = config.learning_rate, config.weight_decay
    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if config.optimiser == "muon" and parameter.ndim in (2, 4) and _in_block.search(name)
    ]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    result: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=decay)]
    if matrices:
        result.append(_KernelMuon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return result


class _KernelMuon(torch.optim.Muon):
    """Muon that takes a convolution's kernel as the matrix from its inputs (channels x height x width) to its outputs.

    It steps views, which share their memory with the parameters.
    """

    def __init__(self, parameters: list[nn.Parameter], **settings: Any) -> None:
        self._parameters = parameters
        self._views = [nn.Parameter(parameter.data.view(len(parameter), -1)) for parameter in parameters]
        super().__init__(self._views, **settings)

    def step(self, closure: Any = None) -> Any:
        for view, parameter in zip(self._views, self._parameters, strict=True):
            view.grad = None if parameter.grad is None else parameter.grad.reshape(view.shape)
        return super().step(closure)


def machine(device: torch.device) -> dict[str, str | int]:
    """The hardware and versions behind a measurement."""
    import diffusers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "diffusers": diffusers.__version__}
