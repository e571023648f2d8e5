"""Rules that watch the run: a posterior kept up to date, a control law, a point that is looked for first."""

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from companion.ranking.step import Level, Step


def feedback(
    step: Step, pi: float = 0.999, t0: float = 0.556, t1: float = 0.429, largest: float = 10.0, limit: float = 3.0
) -> Float[Tensor, "batch dim"]:
    """Feedback guidance (Koulischer et al. 2025) with its authors' best values for EDM2.

    A log posterior L of the condition is updated with every step the sample makes; the guidance scale is
    `e^L / (e^L - (1 - π))`, at most `largest`. It has no w: at strength k the scale's excess over 1 is k times that.
    """
    memory = step.memory
    if not memory:
        memory["log_posterior"] = torch.zeros(len(step.x), dtype=step.x.dtype)
    else:
        lowest = math.log((1 - pi) * largest / (largest - 1))
        moved = memory["log_posterior"] + _learned(step, *_tuned(step, pi, t0, t1))
        memory["log_posterior"] = moved.clamp(lowest, limit)
    share = memory["log_posterior"].exp()
    scale = share / (share - (1 - pi))
    memory["x"], memory["clean"] = step.x, (step.clean(step.conditional), step.clean(step.reference))
    return step.conditional + step.strength * (scale - 1)[:, None] * step.delta


def _learned(step: Step, temperature: float, offset: float) -> Float[Tensor, " batch"]:
    """How the log posterior changes with the step that led here, in variance-exploding coordinates."""
    before, now = step.levels[step.index - 1], step.level
    variance = _transition_variance(before, now)
    keep = now.ratio**2 / before.ratio**2
    was, here = step.memory["x"] / before.alpha, step.x / now.alpha
    distances = [(here - keep * was - (1 - keep) * clean).square().sum(dim=1) for clean in step.memory["clean"]]
    return temperature / (2 * variance) * (distances[1] - distances[0]) + offset


def _tuned(step: Step, pi: float, t0: float, t1: float) -> tuple[float, float]:
    """The authors' temperature and offset: without evidence the scale is 3 at the share t0 of the run, counted from
    clean; t1 is where evidence outweighs the offset."""
    offset = math.log((1 - pi) * 3 / 2) / ((1 - t0) * step.steps)
    variances = [_transition_variance(a, b) for a, b in zip(step.levels[:-1], step.levels[1:], strict=True)][::-1]
    low = int(t1 * step.steps)
    share = t1 * step.steps - low
    middle = (1 - share) * variances[low] + share * variances[min(low + 1, step.steps - 1)]
    return abs(2 * middle / 10 * offset), offset


def _transition_variance(before: Level, after: Level) -> float:
    """Of the ancestral step, in variance-exploding coordinates; 0 for the step to clean data."""
    return (before.ratio**2 - after.ratio**2) * after.ratio**2 / before.ratio**2


def sliding_mode(step: Step, decay: float = 5.0, gain: float = 0.2) -> Float[Tensor, "batch dim"]:
    """CFG-Ctrl's sliding-mode control (Wang et al. 2026) of flow velocities, with its recommended λ = 5 and k = 0.2.

    `e = c - u` is moved by `-k sign((e - e') + λ e')`, e' the moved error of the step before.
    """
    reference = step.velocity(step.reference)
    error = step.velocity(step.conditional) - reference
    previous = step.memory.get("error", error)
    error = error - gain * torch.sign(error - previous + decay * previous)
    step.memory["error"] = error
    return step.noise_of_velocity(reference + (1 + step.weight) * error)


def characteristic(
    step: Step, iterations: int = 10, tolerance: float = 1e-3, remembered: int = 2
) -> Float[Tensor, "batch dim"]:
    """Characteristic guidance (Zheng & Lan 2024): `(1+w) ε_c(x + w d) - w ε_u(x + (1+w) d)` with the d that solves
    `d = σ [ε_u(x + (1+w) d) - ε_c(x + w d)]`.

    The authors' Anderson acceleration, without their projection, which is for latent images. A sample that has not
    converged gets CFG, as theirs do.
    """
    w, sigma = step.weight, step.level.sigma
    x, conditional, reference = step.x, step.conditional, step.reference
    found = conditional + w * (conditional - reference)
    rows, d = torch.arange(len(x)), torch.zeros_like(x)
    points: list[Tensor] = []
    residuals: list[Tensor] = []
    for iteration in range(iterations + 1):
        residual = sigma * (reference - conditional) - d
        open_ = residual.square().mean(dim=1).sqrt() >= tolerance
        found[rows[~open_]] = ((1 + w) * conditional - w * reference)[~open_]
        if iteration == iterations or not open_.any():
            break
        rows = rows[open_]
        points = [point[open_] for point in (*points, d)][-remembered - 1 :]
        residuals = [value[open_] for value in (*residuals, residual)][-remembered - 1 :]
        d = _anderson(points, residuals)
        conditional = step.predict("conditional", x[rows] + w * d)
        reference = step.predict("reference", x[rows] + (1 + w) * d)
    return found


def _anderson(points: list[Tensor], residuals: list[Tensor]) -> Float[Tensor, "batch dim"]:
    """The next point of a fixed-point iteration: the combination of the last points with the smallest residual."""
    following = points[-1] + residuals[-1]
    if len(points) == 1:
        return following
    changes = torch.stack([b - a for a, b in pairwise(residuals)], dim=2)
    moves = torch.stack([b - a for a, b in pairwise(points)], dim=2)
    gram = changes.mT @ changes
    scale = gram.diagonal(dim1=1, dim2=2).sum(dim=1).clamp(min=1e-30)[:, None, None]
    gram = gram + 1e-10 * scale * torch.eye(gram.shape[1], dtype=gram.dtype)
    shares = torch.linalg.solve(gram, changes.mT @ residuals[-1][..., None])
    return following - ((moves + changes) @ shares)[..., 0]


FORESIGHT = ((0.0, 0.125, 2), (0.125, 0.125, 2), (0.375, 0.125, 1))
"""Foresight guidance's plan for 50 evaluations: at which share of the run, how far it looks, how often."""


def foresight(step: Step) -> Float[Tensor, "batch dim"]:
    """Foresight guidance (Wang et al. 2025): x is first moved to where both branches agree on the near future.

    At the planned steps: a long DDIM step with CFG at scale `1 + w` and back again without the condition, so many
    times; then, at every step, CFG++ with λ = 1 (times the strength).
    """
    x = step.x
    for start, reach, times in FORESIGHT:
        ahead = min(step.index + max(round(reach * step.steps), 1), step.steps - 1)
        if step.index == round(start * step.steps) and ahead > step.index:
            for _ in range(times):
                x = _there_and_back(step, x, step.levels[ahead])
    moved = x is not step.x
    reference = step.predict("reference", x) if moved else step.reference
    conditional = step.predict("conditional", x) if moved else step.conditional
    x = x - step.level.sigma * step.strength * (conditional - reference)
    return step.from_point(x, reference)


def _there_and_back(step: Step, x: Tensor, ahead: Level) -> Float[Tensor, "batch dim"]:
    """To a less noisy level with CFG, and back with the reference alone, by DDIM's step each."""
    here = step.level
    reference = step.predict("reference", x)
    noise = reference + (1 + step.weight) * (step.predict("conditional", x) - reference)
    there = ahead.alpha * (x - here.sigma * noise) / here.alpha + ahead.sigma * noise
    noise = step.predict("reference", there, ahead)
    return here.alpha * (there - ahead.sigma * noise) / ahead.alpha + here.sigma * noise
