"""What a sampling run costs beside the bare pipeline on the same batches: throughput, for CFG and for REG.

Both draw the same samples from the same generators. The bare pipeline keeps nothing; the run checks, writes and records
every picture. They take turns within each round, so a machine that is busy for a while slows both. Processor time is
given beside the clock's: on a busy machine it is the steadier one, and counts the writing that the clock may not see.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import companion
from companion.evaluation.sampling.runs import sample
from companion.evaluation.sampling.settings import SamplingSettings
from companion.pipelines.hook import rectified_guidance

SAMPLES, BATCH, STEPS, ROUNDS = 32, 16, 10, 3

Seconds = tuple[float, float]


def main() -> None:
    """Print the table for mini-dit."""
    pipe = companion.load("mini-dit")
    pipe.set_progress_bar_config(disable=True)
    everyday = SamplingSettings(
        "mini-dit", SAMPLES, tuple(range(10)), batch_size=BATCH, steps=STEPS, guidance_scale=4.0, product="none"
    )

    def bare(settings: SamplingSettings, rectified: bool) -> Seconds:
        def draw() -> None:
            for first in settings.batches():
                indices = settings.samples(first)
                pipe(
                    [settings.condition(i) for i in indices],
                    guidance_scale=settings.guidance_scale,
                    num_inference_steps=settings.steps,
                    generator=companion.sample_generators(settings.seed, indices),
                )

        start = _now()
        if rectified:
            with rectified_guidance(pipe, settings.guidance):
                draw()
        else:
            draw()
        return _since(start)

    def run(settings: SamplingSettings) -> Seconds:
        with tempfile.TemporaryDirectory() as folder:
            start = _now()
            sample(pipe, settings, Path(folder) / "run", progress=False)
            return _since(start)

    print(f"mini-dit, {SAMPLES} images in batches of {BATCH}, {STEPS} DDIM steps; medians of {ROUNDS} rounds.\n")
    print("| guidance | format | bare pipeline, images/s | run, images/s | throughput / bare | by processor time |")
    print("|---|---|---|---|---|---|")
    for name, settings in (
        ("CFG", everyday),
        ("CFG", replace(everyday, image_format="npz")),
        ("REG, finite_difference", replace(everyday, product="finite_difference")),
    ):
        bare(replace(settings, num_samples=BATCH, steps=2), settings.product != "none")  # pages and kernels warm
        rounds = [(bare(settings, settings.product != "none"), run(settings)) for _ in range(ROUNDS)]
        without, within = (
            SAMPLES / statistics.median(seconds[0] for seconds in side) for side in zip(*rounds, strict=True)
        )
        clock, processor = (statistics.median(b[i] / r[i] for b, r in rounds) for i in (0, 1))
        row = f"{without:.1f} | {within:.1f} | {clock:.3f} | {processor:.3f}"
        print(f"| {name} | {settings.image_format} | {row} |", flush=True)


def _now() -> Seconds:
    return time.perf_counter(), time.process_time()


def _since(start: Seconds) -> Seconds:
    clock, processor = _now()
    return clock - start[0], processor - start[1]


if __name__ == "__main__":
    main()
