"""Optimal directions: exact on a grid against Monte Carlo in the same run, and how the exact ones' cost grows.

`python -m benchmarks exact`, or this file by itself. One CPU run of about two minutes.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from companion.exact import (
    DDPMChain,
    Grid,
    accuracy,
    classifier_free_reward,
    denoiser_prediction,
    linear_schedule,
    mixture_prediction,
    monte_carlo_optimum,
    toy,
    train_toy_denoiser,
)
from companion.exact.networks import ToyTraining


def timed(function: Callable[[], Any], repeats: int = 1) -> tuple[Any, float]:
    """A result and the best of the wall-clock times, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return result, min(times)


def optimal(chain: DDPMChain, grid: Grid, reward: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The optimal direction at all levels."""
    return chain.optimal_direction(grid, chain.expected_reward(grid, reward))


def against_monte_carlo(network: bool) -> list[str]:
    """A table row: 1,000 points x 20 steps of the REG paper's 1D setting, w = 1, on its grid [-1, 2].

    Through the network, rollouts start from every tenth point and their time is multiplied by ten.
    """
    data, schedule = toy("paper_1d"), linear_schedule(20)
    prediction = mixture_prediction(data.classes[0], schedule)
    if network:
        # The cost does not depend on how well it is trained, so a tenth of the paper's epochs will do.
        points = data.classes[0].sample(8000, torch.Generator().manual_seed(0))
        model = train_toy_denoiser(points, schedule, 0, ToyTraining(epochs=20))
        prediction = denoiser_prediction(model, schedule)
    reward = classifier_free_reward(data.classes[0], data.unconditional, 1.0)
    chain, grid = DDPMChain(prediction, schedule), Grid.line(-1, 2, 1000)
    exact, seconds = timed(lambda: optimal(chain, grid, reward), 3)
    fine = Grid.line(-1, 2, 3997)
    truth = optimal(DDPMChain(prediction, schedule, nodes=128), fine, reward)[:, ::4]
    generator = torch.Generator().manual_seed(0)
    every = 10 if network else 1

    def rollouts() -> torch.Tensor:
        return torch.stack(
            [monte_carlo_optimum(chain, grid.points[::every], t, reward, generator).direction for t in range(1, 21)]
        )

    sampled, slow = timed(rollouts)
    slow *= every
    scale = truth[1:].square().mean().sqrt()
    gaps = exact[1:] - truth[1:], sampled - truth[1:, ::every]
    errors = [float(gap.square().mean().sqrt() / scale) for gap in gaps]
    kind = "the toy network" if network else "exact scores"
    return [kind, f"{seconds:.3f}", f"{slow:.1f}", f"{slow / seconds:,.0f}", f"{errors[0]:.1e}", f"{errors[1]:.1e}"]


def growth() -> list[list[str]]:
    """Table rows: seconds by dimension, points and steps, w = 1, exact scores."""
    rows = []
    sizes = [(1, points, steps) for points, steps in ((500, 20), (1000, 20), (2000, 20), (4000, 20), (1000, 40))]
    sizes += [(2, points, steps) for points, steps in ((64, 25), (128, 25), (256, 25), (256, 50))]
    for dimension, points, steps in sizes:
        data = toy("paper_1d" if dimension == 1 else "eight_gaussians")
        schedule = linear_schedule(steps, 1e-4, 0.02 if dimension == 1 else 0.1)
        chain = DDPMChain(mixture_prediction(data.classes[0], schedule), schedule)
        reward = classifier_free_reward(data.classes[0], data.unconditional, 1.0)
        grid = data.grid(points)
        _, seconds = timed(partial(optimal, chain, grid, reward), 2)
        wide = data.grid(points, margin=3)
        _, push = timed(partial(chain.push_forward, wide))
        halving = accuracy(chain, grid, reward).optimal
        size = f"{points}" if dimension == 1 else f"{points}²"
        rows.append([f"{dimension}", size, f"{steps}", f"{seconds:.2f}", f"{push:.2f}", f"{halving:.1e}"])
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def main() -> None:
    """Print both tables."""
    print("Optimal direction, 1D, 1,000 points x 20 steps; Monte Carlo with 100 rollouts and backpropagation.")
    print("Errors are RMS, relative to the optimal direction's RMS, against four times the points and quadrature")
    print("nodes. Through the network, rollouts start from every tenth point and their time is multiplied by ten.\n")
    header = ["chain", "exact, s", "Monte Carlo, s", "times faster", "error, exact", "error, Monte Carlo"]
    print(table(header, [against_monte_carlo(network) for network in (False, True)]), flush=True)
    print("\nCost is linear in points and steps and, in 2D, in points per axis squared; `halving` is the relative RMS")
    print("change of the optimal direction from half the points per axis (its error is smaller).\n")
    print(table(["dimension", "points", "steps", "optimal, s", "push forward, s", "halving"], growth()))


if __name__ == "__main__":
    main()
