"""`python -m companion sample`: draw many samples of any model into a folder, on any number of processes."""

import argparse
from pathlib import Path
from typing import get_args

from diffusers import DiffusionPipeline

from companion.cli.processes import device_of, exit_status, processes
from companion.evaluation.sampling.runs import sample
from companion.evaluation.sampling.settings import (
    Format,
    SamplingSettings,
    check_sampling,
    conditions_for,
    model_defaults,
    with_scheduler,
)
from companion.guidance.weights import WEIGHT_SYNTAX
from companion.pipelines.configuration import PRESETS
from companion.pipelines.edm2.settings import Reference
from companion.pipelines.registry import load
from companion.pipelines.saved import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m companion sample`."""
    add = parser.add_argument
    add("--model", required=True, help="an embedded model, one of the paper's models, a local folder, or owner/model")
    add("--num-samples", type=int, required=True, metavar="N")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the run; a stopped run is continued")
    add("--batch-size", type=int, default=50, metavar="B", help="samples in each batch; default: 50")
    add("--steps", type=int, metavar="S", help="sampler steps; default: the paper's, else the pipeline's")
    add("--seed", type=int, default=0, metavar="K", help="default: 0; sample i draws from the generator (K, i)")
    add(
        "--guidance-scale",
        type=float,
        metavar="G",
        help="1 + w, as in diffusers; default: the paper's, else the pipeline's",
    )
    add("--weight", default="constant", metavar="SCHEDULE", help=f"weight over time: {WEIGHT_SYNTAX}")
    add(
        "--product",
        choices=PRESETS,
        default="finite_difference",
        help="none is CFG; default: finite_difference",
    )
    add(
        "--reference",
        choices=get_args(Reference),
        help="EDM2's reference branch; default: its guide network if it has one",
    )
    add("--scheduler", metavar="CLASS", help="diffusers' class name; default: the model's own")
    add("--classes", metavar="A,B,...", help="names or numbers, drawn in turn; default: all")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one prompt on each line, drawn in turn; or COCO's captions (.json)",
    )
    add("--format", choices=get_args(Format), default="png", help="PNGs, or one npz file for each batch; default: png")
    add("--device", help='"cpu", "cuda", ...; default: what accelerate finds')
    add("--dtype", choices=tuple(DTYPES), default="float32", help="dtype of the weights; default: float32")


def run(options: argparse.Namespace) -> int:
    """`python -m companion sample`; the exit status. Errors are one line on the standard error."""
    state = processes(options.device)

    def work() -> str:
        pipe = load(options.model, device=device_of(state, options.device), dtype=DTYPES[options.dtype])
        settings = settings_from(options, pipe)
        check_sampling(pipe, settings)
        return f"written: {sample(with_scheduler(pipe, settings.scheduler), settings, options.out)}"

    return exit_status(state, work, "stopped; the same command goes on where it was")


def settings_from(options: argparse.Namespace, pipe: DiffusionPipeline) -> SamplingSettings:
    """The command line's settings, with the model's own where none are given.

    Raises:
        ValueError: see `SamplingSettings` and `conditions_for`.
    """
    own = model_defaults(options.model, pipe)
    return SamplingSettings(
        model=options.model,
        num_samples=options.num_samples,
        conditions=conditions_for(pipe, classes=options.classes, prompts=options.prompts),
        batch_size=options.batch_size,
        steps=own["steps"] if options.steps is None else options.steps,
        seed=options.seed,
        guidance_scale=own["guidance_scale"] if options.guidance_scale is None else options.guidance_scale,
        weight=options.weight,
        product=options.product,
        scheduler=options.scheduler,
        call=own["call"] if options.reference is None else own["call"] | {"guidance_reference": options.reference},
        image_format=options.format,
    )
