"""What rectification costs in a pipeline: time and peak memory of every product beside plain guidance.

The products take turns within each round, so a machine that is busy for a while slows them all; the table gives medians
over the rounds, and of ratios to plain guidance in the same round.
"""

import statistics
import time

import companion
from companion.evaluation.sampling.memory import peak_memory
from companion.pipelines.hook import RectifiedGuidanceConfig, rectified_guidance

SIDES = ("none", "finite_difference", "auto", "covariance", "ones", "vjp", "jvp", "diagonal")
IMAGES, STEPS, ROUNDS = 8, 50, 5


def main() -> None:
    """Print the table for mini-dit at the demo's settings."""
    pipe = companion.load("mini-dit")
    pipe.set_progress_bar_config(disable=True)
    weights = sum(p.numel() * p.element_size() for part in (pipe.transformer, pipe.vae) for p in part.parameters())

    def draw(product: str, steps: int = STEPS) -> float:
        generators = companion.sample_generators(0, range(IMAGES))
        with rectified_guidance(pipe, RectifiedGuidanceConfig.preset(product)):
            start = time.perf_counter()
            pipe(list(range(IMAGES)), num_inference_steps=steps, generator=generators, output_type="np")
            return time.perf_counter() - start

    peaks = {}
    for product in SIDES:
        draw(product, steps=2)  # pages and kernels warm
        with peak_memory(pipe.device) as memory:  # exact, the same for any number of steps, and not to be timed
            draw(product, steps=2)
        peaks[product] = memory.bytes
    rounds = [{product: draw(product) for product in SIDES} for _ in range(ROUNDS)]
    print(f"mini-dit, {weights / 2**20:.0f} MiB of weights, {IMAGES} images, {STEPS} DDIM steps;")
    print(f"medians of {ROUNDS} rounds.\n")
    print("| product | seconds | time / CFG | peak above weights, MiB | peak with weights / CFG |")
    print("|---|---|---|---|---|")
    for product in SIDES:
        seconds = statistics.median(r[product] for r in rounds)
        ratio = statistics.median(r[product] / r["none"] for r in rounds)
        total = (weights + peaks[product]) / (weights + peaks["none"])
        name = "none (CFG)" if product == "none" else product
        print(f"| {name} | {seconds:.2f} | {ratio:.2f} | {peaks[product] / 2**20:.0f} | {total:.2f} |")


if __name__ == "__main__":
    main()
