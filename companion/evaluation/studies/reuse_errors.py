"""Methods that need less than one extra evaluation a step, compared where K is a closed form.

A way is a plan, which says at what steps `K Δ` is evaluated, and a rule, which says what is followed at the others. The
chain is deterministic (DDIM), so that a way's samples and the fully rectified ones are pairs from the same noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from companion.deprecation import renamed_names
from companion.exact.mixtures import GaussianMixture
from companion.exact.sampling import energy_distance
from companion.exact.toys import Toy
from companion.guidance.reuse import RectificationReuse


@dataclass(frozen=True)
class Evaluation:
    """What the last evaluation left: Δ, K Δ and log SNR = 2 log(α/σ)."""

    direction: Float[Tensor, "batch dim"]
    rectified: Float[Tensor, "batch dim"]
    log_snr: float


Rule = Callable[[Evaluation, Float[Tensor, "batch dim"], float], Float[Tensor, "batch dim"]]
"""(last evaluation, Δ now, log SNR now) -> what is followed."""

Plan = Callable[[int, list[float]], bool]
"""(step, log SNR of all steps) -> whether to evaluate there."""


def cfg(last: Evaluation, direction: Tensor, log_snr: float) -> Tensor:
    """Δ itself."""
    return direction


def repeated(last: Evaluation, direction: Tensor, log_snr: float) -> Tensor:
    """The last K Δ as it was."""
    return last.rectified


def elementwise(last: Evaluation, direction: Tensor, log_snr: float) -> Tensor:
    """Δ times the last K Δ over the last Δ, element by element, clamped to [0, 1]."""
    return direction * (last.rectified / last.direction).nan_to_num(0.0).clamp(0.0, 1.0)


def quotient(last: Evaluation, direction: Tensor, log_snr: float) -> Tensor:
    """ρ Δ, with the last Rayleigh quotient ρ = ⟨Δ, K Δ⟩ / ⟨Δ, Δ⟩."""
    return _rayleigh(last) * direction


def quotient_law(last: Evaluation, direction: Tensor, log_snr: float) -> Tensor:
    """ρ' Δ, with the quotient moved by the law of Gaussian data, logit ρ' = logit ρ + the change of log SNR."""
    inside = _rayleigh(last).clamp(1e-4, 1 - 1e-4)
    return torch.sigmoid(inside.logit() + log_snr - last.log_snr) * direction


def shipped(last: Evaluation, direction: Tensor, log_snr: float) -> Tensor:
    """`product="auto"`: the law, and the last K Δ for the part of Δ along the last one."""
    reuse = RectificationReuse()
    reuse.update(0, last.direction, last.rectified, last.log_snr)
    return reuse.reused(direction, log_snr)


RULES: dict[str, Rule] = {
    "Δ": cfg,
    "last KΔ": repeated,
    "elementwise": elementwise,
    "ρΔ": quotient,
    "ρΔ, law": quotient_law,
    "auto": shipped,
}


def every(count: int) -> Plan:
    """At every so many steps, from the first."""
    return lambda step, levels: step % count == 0


def third(which: int) -> Plan:
    """At all steps of the first (0), middle (1) or last (2) third, and nowhere else but at the first step."""
    return lambda step, levels: step == 0 or 3 * step // len(levels) == which


def even_in_log_snr(share: float) -> Plan:
    """At the first step, and where log SNR passes one of equally spaced marks, as many as that share of the steps."""

    def plan(step: int, levels: list[float]) -> bool:
        width = (levels[-1] - levels[0]) / max(1, round(share * len(levels)))
        return step == 0 or int((levels[step] - levels[0]) // width) > int((levels[step - 1] - levels[0]) // width)

    return plan


PLANS: dict[str, Plan] = {
    "every 2nd": every(2),
    "every 3rd": every(3),
    "every 5th": every(5),
    "even in log SNR": even_in_log_snr(1 / 3),
    "first third": third(0),
    "middle third": third(1),
    "last third": third(2),
}


@dataclass(frozen=True)
class ReuseResult:
    """Cost and error of one method.

    Attributes:
        share: of the steps at which K Δ was evaluated.
        direction: mean distance of what is followed to K Δ along the fully rectified chain; CFG has 1.
        samples: median distance of the samples to those of full rectification; CFG has 1.
        energy: energy distance of the samples to the target p · (p/p_u)^w.
    """

    share: float
    direction: float
    samples: float
    energy: float


def blobs(dimension: int) -> Toy:
    """Two classes of three Gaussians each with random, elongated covariances, in any dimension."""
    generator = torch.Generator().manual_seed(0)
    classes = []
    for _ in range(2):
        means = 1.5 * torch.randn(3, dimension, generator=generator, dtype=torch.float64) / math.sqrt(dimension) * 2
        axes = torch.linalg.qr(torch.randn(3, dimension, dimension, generator=generator, dtype=torch.float64))[0]
        stds = 0.1 + 0.7 * torch.rand(3, 1, dimension, generator=generator, dtype=torch.float64)
        classes.append(GaussianMixture([1.0, 1.0, 1.0], means, (axes * stds**2) @ axes.mT))
    both = GaussianMixture(
        torch.ones(6),
        torch.cat([c.means for c in classes]),
        torch.cat([c.covariances for c in classes]),
    )
    return Toy(f"{dimension}D", tuple(classes), both)


def noise_ratios(steps: int) -> list[float]:
    """σ/α of the steps, falling: Karras et al. 2022, eq. 5, with their ρ = 7."""
    powers = torch.linspace(30.0 ** (1 / 7), 0.02 ** (1 / 7), steps, dtype=torch.float64)
    return (powers**7).tolist()


def reuse_results(
    data: Toy, methods: dict[str, tuple[Plan, Rule]], *, steps: int = 30, count: int = 500
) -> dict[str, ReuseResult]:
    """Compare methods on the first class of a toy, `full` and `CFG` first.

    Args:
        methods: name -> (plan, rule).
        count: number of samples.
    """
    conditional, unconditional = data.classes[0], data.unconditional
    ratios = noise_ratios(steps)
    levels = [-2 * math.log(ratio) for ratio in ratios]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, conditional.dimension, dtype=torch.float64, generator=generator)
    target = target_draws(conditional, unconditional, 1.0, count, generator)

    def run(plan: Plan, rule: Rule, along: list[Tensor] | None = None) -> tuple[list[Tensor], list[float], int]:
        """States, mean error of the direction at each step, number of evaluations; `along` prescribes the states."""
        y, last, states, errors, evaluations = ratios[0] * noise, None, [], [], 0
        for step, (ratio, following) in enumerate(zip(ratios, [*ratios[1:], 0.0], strict=True)):
            y = y if along is None else along[step]
            states.append(y)
            c = conditional.posterior_mean(y, 1.0, ratio)
            delta = c - unconditional.posterior_mean(y, 1.0, ratio)
            wanted = (conditional.rectification_matrix(y, 1.0, ratio) @ delta[..., None])[..., 0]
            if last is None or plan(step, levels):
                followed, last, evaluations = wanted, Evaluation(delta, wanted, levels[step]), evaluations + 1
            else:
                followed = rule(last, delta, levels[step])
            errors.append(float((followed - wanted).norm(dim=1).mean()))
            clean = c + followed
            y = clean + (y - clean) * following / ratio
        return [*states, y], errors, evaluations

    full, _, _ = run(every(1), cfg)

    def never(step: int, levels: list[float]) -> bool:
        return False

    def measure(plan: Plan, rule: Rule) -> tuple[float, float, float, float]:
        states, _, evaluations = run(plan, rule)
        _, errors, _ = run(plan, rule, full)
        distance = float((states[-1] - full[-1]).norm(dim=1).median())
        return evaluations / steps, sum(errors), distance, energy_distance(states[-1], target)

    # CFG but for the first step, where K is nearly zero and so is what its rectification changes.
    _, base_error, base_distance, base_energy = measure(never, cfg)
    results = {
        "full": ReuseResult(1.0, 0.0, 0.0, energy_distance(full[-1], target)),
        "CFG": ReuseResult(0.0, 1.0, 1.0, base_energy),
    }
    for name, (plan, rule) in methods.items():
        share, error, distance, energy = measure(plan, rule)
        results[name] = ReuseResult(share, error / base_error, distance / base_distance, energy)
    return results


def _rayleigh(last: Evaluation) -> Float[Tensor, "batch 1"]:
    square = last.direction.square().sum(dim=1, keepdim=True).clamp(min=1e-300)
    return (last.direction * last.rectified).sum(dim=1, keepdim=True) / square


def target_draws(
    conditional: GaussianMixture, unconditional: GaussianMixture, weight: float, count: int, generator: torch.Generator
) -> Float[Tensor, "count dim"]:
    """Draws of p_c (p_c/p_u)^w by resampling forty times as many draws of p_c."""
    pool = conditional.sample(40 * count, generator)
    logs = weight * (conditional.log_prob(pool) - unconditional.log_prob(pool))
    chosen = torch.multinomial((logs - logs.max()).exp(), count, replacement=True, generator=generator)
    return pool[chosen]


__getattr__ = renamed_names(__name__, {"carry_results": "reuse_results", "CarryResult": "ReuseResult"})
