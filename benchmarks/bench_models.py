"""What rectification costs on the paper's models: time and peak memory against CFG, for every product.

The models are those of `benchmarks.models`, for one image; the record says on how many threads, and the table what each
was scaled by. One whole call of the pipeline is timed, without a decoder. The methods take turns within each round, so
that a machine that is busy for a while slows them all.

`python -m benchmarks models` writes notebooks/results/runtime.json beside printing the table. On a GPU,
`python -m benchmarks.bench_models --device cuda` measures the published sizes at the paper's batch sizes (memory at
batch size 1, as the paper does) and writes runtime_cuda.json.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from benchmarks import methods
from benchmarks.methods import Method
from benchmarks.models import MODELS, SEED, Model, build, denoisers
from companion.evaluation.sampling.memory import peak_memory
from companion.files import write_json
from companion.provenance import provenance

RESULTS = Path(__file__).parent.parent / "notebooks" / "results" / "runtime.json"
METHODS: dict[str, Method] = {
    "none": methods.METHODS["CFG"],
    "published": methods.published,
    "finite_difference": methods.rectified(),
    "every=3": methods.rectified(every=3),
    **{product: methods.rectified(product=product) for product in ("ones", "vjp", "jvp")},
}
"""As `results/runtime.json` names them; notebook 07 has labels of its own. `published` is `ones` as the paper's code
does it: both branches in one graph. `auto` is not among them: what it skips depends on the network's values, and these
are random; `make bench` measures it."""
ROUNDS = 3


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


def draw(pipe: DiffusionPipeline, model: Model, method: str, batch: int = 1) -> float:
    """Seconds of one call of the pipeline."""
    device = pipe.device
    generator = torch.Generator().manual_seed(SEED)
    call = _batched(model.call, batch, device)
    with METHODS[method](pipe):
        _wait(device)
        start = time.perf_counter()
        pipe(**call, generator=generator)
        _wait(device)
        return time.perf_counter() - start


def measure(model: Model, rounds: int = ROUNDS, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Seconds and peak memory of every method on one model, and ratios to CFG."""
    pipe = build(model, device)
    large = torch.device(device).type == "cuda"
    batch = model.batch if large else 1
    weights = sum(p.numel() * p.element_size() for network in denoisers(pipe) for p in network.parameters())
    peaks = {}
    for method in METHODS:
        with peak_memory(device) as memory:  # exact; not to be timed, but it warms pages and kernels
            draw(pipe, model, method)
        peaks[method] = memory.bytes
        if large:
            draw(pipe, model, method, batch)  # warm at the batch size that is timed, too
    times = [{method: draw(pipe, model, method, batch) for method in METHODS} for _ in range(rounds)]
    return {
        "model": model.paper,
        "scaled": "published size" if large else model.scaled,
        "batch": batch,
        "weights_mib": weights / 2**20,
        "seconds": {method: statistics.median(r[method] for r in times) for method in METHODS},
        "time_ratio": {method: statistics.median(r[method] / r["none"] for r in times) for method in METHODS},
        "peak_mib": {method: peaks[method] / 2**20 for method in METHODS},
        "memory_ratio": {method: (weights + peaks[method]) / (weights + peaks["none"]) for method in METHODS},
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
    rectified = list(METHODS)[1:]
    print("time / CFG, and (weights + peak) / CFG's\n")
    print(f"| model | scaled by | CFG, s | {' | '.join(rectified)} |")
    print("|---" * (3 + len(rectified)) + "|")
    rows = []
    for model in MODELS:
        row = measure(model, device=device)
        rows.append(row)
        cells = [f"{row['time_ratio'][method]:.2f}, {row['memory_ratio'][method]:.2f}" for method in rectified]
        print(f"| {model.paper} | {row['scaled']} | {row['seconds']['none']:.2f} | {' | '.join(cells)} |", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    made = provenance(device, command=["python", "-m", *command])
    write_json(file, {"provenance": {**made, "seed": SEED, "rounds": ROUNDS}, "rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
