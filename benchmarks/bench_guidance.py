"""What rectification costs in a pipeline: time and peak memory of every product beside plain guidance.

The products take turns within each round, so a machine that is busy for a while slows them all; the table gives medians
over the rounds, and of ratios to plain guidance in the same round.
"""

import statistics
import time

import companion
from companion.evaluation.memory import peak_memory
from companion.pipelines.hook import RectifiedGuidanceConfig, rectified_guidance

SIDES = ("none", "finite_difference", "ones", "vjp", "jvp", "diagonal")
IMAGES, STEPS, ROUNDS = 8, 50, 5


def main() -> None:
    """Print the table for mini-dit at the demo's settings."""
    pipe = companion.load("mini-dit")
    pipe.set_progress_bar_config(disable=True)
    weights = sum(p.numel() * p.element_size() for part in (pipe.transformer, pipe.vae) for p in part.parameters())

    def draw(product: str, steps: int = STEPS) -> tuple[float, float]:
        generators = companion.sample_generators(0, range(IMAGES))
        config = RectifiedGuidanceConfig(product=product)  # type: ignore[arg-type]
        with peak_memory(pipe.device) as memory, rectified_guidance(pipe, config):
            start = time.perf_counter()
            pipe(list(range(IMAGES)), num_inference_steps=steps, generator=generators, output_type="np")
            seconds = time.perf_counter() - start
        return seconds, memory.bytes

    for product in SIDES:
        draw(product, steps=2)  # pages and kernels warm
    rounds = [{product: draw(product) for product in SIDES} for _ in range(ROUNDS)]
    print(f"mini-dit, {weights / 2**20:.0f} MiB of weights, {IMAGES} images, {STEPS} DDIM steps;")
    print(f"medians of {ROUNDS} rounds.\n")
    print("| product | seconds | time / CFG | peak above weights, MiB | peak with weights / CFG |")
    print("|---|---|---|---|---|")
    for product in SIDES:
        seconds = statistics.median(r[product][0] for r in rounds)
        ratio = statistics.median(r[product][0] / r["none"][0] for r in rounds)
        peak = statistics.median(r[product][1] for r in rounds)
        memory = statistics.median((weights + r[product][1]) / (weights + r["none"][1]) for r in rounds)
        name = "none (CFG)" if product == "none" else product
        print(f"| {name} | {seconds:.2f} | {ratio:.2f} | {peak / 2**20:.0f} | {memory:.2f} |")


if __name__ == "__main__":
    main()
