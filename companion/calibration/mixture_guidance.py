"""Classifier guidance of exact mixture data: what a score generates, with its precision and recall.

The diffusion model is the ideal unconditional one of a mixture of classes; the classifier is Bayes' own of clean
points, or of noisy ones, made over- or underconfident at will. So whatever a chain gets wrong is the guidance's doing.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from companion.arguments import check_choice
from companion.exact.chain import DDPMChain, NoiseSchedule, Prediction
from companion.exact.grids import Grid
from companion.exact.mixtures import GaussianMixture, mixture_of
from companion.exact.sampling import Interval, seed_interval
from companion.exact.toys import Toy
from companion.guidance.classifier.rectified import rectified_classifier_gradient
from companion.guidance.classifier.scores import PLAIN, Classifier, ClassifierScore, classifier_gradient, tilted_weights
from companion.seeding import sample_generators, sample_seed

ClassifierKind = Literal["noisy", "clean", "rectified"]
CLASSIFIERS: tuple[ClassifierKind, ...] = get_args(ClassifierKind)


@dataclass(frozen=True)
class ClassifierGuidance:
    """How a chain is guided towards a class.

    Args:
        score: what is climbed.
        scale: multiplies ∇S; 1 with the plain score and a `noisy` classifier samples the class itself.
        classifier: `noisy`: a noise-aware one at x_t; `clean`: one of clean points, whose gradient at x̂_0 is taken for
            the one at x_t (Ma et al. 2024, K = I); `rectified`: the same with the chain rule, Kᵀg/α.
        sharpness: multiplies the classifier's logits; above 1 it is overconfident.
        tilt: t of the weights `N softmax_i(t S_i)` within a batch of N.
        batch: N of tilted guidance; consecutive samples share a batch, the last one may be smaller.

    Raises:
        ValueError: an unknown classifier, a sharpness that is not positive, or an empty batch.
    """

    score: ClassifierScore = field(default=PLAIN)
    scale: float = 1.0
    classifier: ClassifierKind = "clean"
    sharpness: float = 1.0
    tilt: float = 0.0
    batch: int = 16

    def __post_init__(self) -> None:
        check_choice("classifier", self.classifier, CLASSIFIERS)
        if not self.sharpness > 0:
            raise ValueError(f"sharpness must be positive, got {self.sharpness}")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")


class Fidelity(NamedTuple):
    """Shares, 0 to 1: of what is generated where the target is, of the target where something is generated, and of
    the mass that is in its right mode."""

    precision: float
    recall: float
    balance: float


def ring_of_classes() -> Toy:
    """Eight Gaussians on a circle, four classes of two opposite modes that hold 0.65 and 0.35 of it; neighbours are of
    other classes and touch."""
    angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    centres = 1.5 * torch.stack([angle.cos(), angle.sin()], dim=1)
    classes = tuple(GaussianMixture.isotropic([0.65, 0.35], centres[[k, k + 4]], 0.3) for k in range(4))
    return Toy("ring_of_classes", classes, mixture_of(classes), low=-3.5, high=3.5)


def unit_gaussian_logits(centres: Float[Tensor, "classes dim"]) -> Classifier:
    """Proposition 3's classifier: `f_k(x) = -½ ‖x - μ_k‖²`, Bayes' own for unit Gaussians of equal weight."""
    return lambda x: -0.5 * (x[:, None] - centres).square().sum(dim=2)


def unit_gaussian_force(
    x: Float[Tensor, "batch dim"], centres: Float[Tensor, "classes dim"], label: int, config: ClassifierScore
) -> Float[Tensor, "batch dim"]:
    """Proposition 3 in full: ∇S of the reverse-KL score for that classifier, from the positions alone,

        τ1 (μ_y - x) - τ2 Σ_i p_{τ2}(i) (μ_i - x) + a [Σ_i q_i (μ_i - x) - Σ_i p_i (μ_i - x)].

    Raises:
        ValueError: another divergence, or an entropy term.
    """
    if config.entropy != 0 or (config.strength > 0 and config.divergence != "reverse_kl"):
        raise ValueError("Proposition 3's force is that of the reverse-KL score without entropy regularisation")
    towards = centres - x[:, None]
    distances = towards.square().sum(dim=2)
    tempered, plain = ((-0.5 * tau * distances).softmax(dim=1) for tau in (config.marginal_temperature, 1.0))
    q = torch.full((len(centres),), (1 - config.smoothing) / len(centres), dtype=x.dtype)
    q[label] += config.smoothing
    force = config.joint_temperature * towards[:, label]
    force = force - config.marginal_temperature * (tempered[..., None] * towards).sum(dim=1)
    return force + config.strength * ((q - plain)[..., None] * towards).sum(dim=1)


def bayes_logits(
    classes: tuple[GaussianMixture, ...], alpha: float = 1.0, sigma: float = 0.0, *, sharpness: float = 1.0
) -> Classifier:
    """`sharpness · log p(x_t | i)`: Bayes' logits for equal priors at a noise level, clean by default."""
    return lambda x: sharpness * torch.stack([mixture.log_prob(x, alpha, sigma) for mixture in classes], dim=1)


def classifier_guided(data: Toy, label: int, guidance: ClassifierGuidance, schedule: NoiseSchedule) -> Prediction:
    """`ε̄ = ε - σ · scale · ∇S`: the unconditional noise prediction, guided towards a class."""
    unconditional, classes = data.unconditional, data.classes

    def prediction(x: Float[Tensor, "batch dim"], t: int) -> Float[Tensor, "batch dim"]:
        alpha, sigma = schedule.level(t)
        if guidance.classifier == "noisy":
            classifier = bayes_logits(classes, alpha, sigma, sharpness=guidance.sharpness)
            noise = unconditional.noise(x, alpha, sigma)
            score, gradient = classifier_gradient(classifier, x, label, guidance.score)
        else:
            classifier = bayes_logits(classes, sharpness=guidance.sharpness)
            rectified = guidance.classifier == "rectified"
            found = rectified_classifier_gradient(
                lambda z: unconditional.noise(z, alpha, sigma), classifier, x, label, alpha=alpha, sigma=sigma,
                config=guidance.score, product="vjp" if rectified else "none",
            )  # fmt: skip
            noise, score = found.prediction, found.score
            gradient = found.gradient if rectified else found.clean_gradient
        if guidance.tilt != 0:
            groups = score.split(guidance.batch)
            weights = torch.cat([len(part) * tilted_weights(part, guidance.tilt) for part in groups])
            gradient = weights[:, None] * gradient
        return noise - sigma * guidance.scale * gradient

    return prediction


@dataclass(frozen=True)
class GradientErrors:
    """Three gradients at one noise level, averaged over p(x_t): `optimal`, ∇log p(y|x_t); `clean`, g at x̂_0; and
    `rectified`, Kᵀg/α.

    Attributes:
        sizes: mean norms.
        errors: mean distances to `optimal`, in units of its mean norm.
        chain_rule: largest difference of `rectified`, by automatic differentiation, from the closed form of K.
    """

    sizes: dict[str, float]
    errors: dict[str, float]
    chain_rule: float


def gradient_errors(data: Toy, label: int, schedule: NoiseSchedule, t: int, *, count: int = 2000) -> GradientErrors:
    """The plain score's gradients at step t.

    Args:
        count: points x_t.
    """
    alpha, sigma = schedule.level(t)
    unconditional = data.unconditional
    x = unconditional.sample(count, torch.Generator().manual_seed(t), alpha, sigma)
    optimal = classifier_gradient(bayes_logits(data.classes, alpha, sigma), x, label).gradient
    found = rectified_classifier_gradient(
        lambda z: unconditional.noise(z, alpha, sigma), bayes_logits(data.classes), x, label, alpha=alpha, sigma=sigma
    )
    k = unconditional.rectification_matrix(x, alpha, sigma)
    closed = (k.mT @ found.clean_gradient[..., None])[..., 0] / alpha
    fields = {"optimal": optimal, "clean": found.clean_gradient, "rectified": found.gradient}
    sizes = {name: float(field.norm(dim=1).mean()) for name, field in fields.items()}
    errors = {n: float((f - optimal).norm(dim=1).mean()) / sizes["optimal"] for n, f in fields.items()}
    return GradientErrors(sizes, errors, float((found.gradient - closed).abs().max()))


def high_density_level(mixture: GaussianMixture, grid: Grid, share: float = 0.95) -> float:
    """The log-density above which a given share of the mixture's mass lies: the edge of the smallest region of that
    mass.

    Args:
        grid: holds the mixture, with many points to a component's width.

    Raises:
        ValueError: a share outside (0, 1), or a grid that misses more than 1 % of the mass.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1), got {share}")
    logs = mixture.log_prob(grid.points).sort(descending=True).values
    held = logs.exp().cumsum(0) * grid.cell
    if abs(float(held[-1]) - 1) > 0.01:
        raise ValueError(
            f"the grid {grid.describe()} holds {float(held[-1]):.3f} of the mixture's mass: widen or refine it"
        )
    return float(logs[int(torch.searchsorted(held, share))])


def fidelity(
    samples: Float[Tensor, "count dim"],
    target: GaussianMixture,
    draws: Float[Tensor, "many dim"],
    level: float,
    *,
    neighbours: int = 3,
) -> Fidelity:
    """Precision, recall and balance of samples against a mixture that is known.

    Precision is the share of samples where the target's log-density exceeds `level` (`high_density_level`): exact, 0.95
    for a perfect sampler if the level is that of 0.95. Recall is Kynkäänniemi et al.'s (2019): the share of the
    target's draws within some sample's distance to its k-th neighbour among the samples; far samples have wide reach,
    so it flatters those. Balance is `Σ_m min(share_m, weight_m)` over the target's components, each sample counted for
    its most probable one: it sees modes that are starved but not empty, which recall does not.

    Raises:
        ValueError: not more samples than neighbours.
    """
    if not 1 <= neighbours < len(samples):
        raise ValueError(f"neighbours must be in 1..{len(samples) - 1} for {len(samples)} samples, got {neighbours}")
    precision = float((target.log_prob(samples) > level).double().mean())
    radii = torch.cdist(samples, samples).kthvalue(neighbours + 1, dim=1).values
    recall = float((torch.cdist(draws, samples) <= radii).any(dim=1).double().mean())
    chosen = component_log_joint(target, samples).argmax(dim=1)
    shares = torch.bincount(chosen, minlength=target.components) / len(samples)
    return Fidelity(precision, recall, float(torch.minimum(shares, target.weights).sum()))


def component_log_joint(mixture: GaussianMixture, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch components"]:
    """log w_k + log N(x; m_k, C_k) of every component."""
    parts = [
        GaussianMixture([1.0], mixture.means[k : k + 1], mixture.covariances[k : k + 1]).log_prob(x)
        for k in range(mixture.components)
    ]
    return torch.stack(parts, dim=1) + mixture.weights.log()


def measured_fidelity(
    data: Toy, label: int, guidance: ClassifierGuidance, schedule: NoiseSchedule, *, seeds: int = 4, count: int = 400
) -> dict[str, Interval]:
    """What the guided chain generates, per measure of `Fidelity` the mean of independent runs with its 95 % interval.

    Args:
        seeds: runs, at least 2; the same seed draws the same noise for every guidance.
        count: samples a run; recall compares them with as many draws of the target.

    Raises:
        ValueError: fewer than two seeds, or as `fidelity`.
    """
    target = data.classes[label]
    level = high_density_level(target, data.grid(301))
    draws = target.sample(count, torch.Generator().manual_seed(sample_seed(0, 2**20)))
    generators = sample_generators(0, range(seeds))
    chain = DDPMChain(classifier_guided(data, label, guidance, schedule), schedule)
    # All runs side by side, each with noise of its own: one pass through the chain instead of several.
    x = torch.cat([torch.randn(count, 2, dtype=torch.float64, generator=g) for g in generators])
    for t in range(chain.steps, 0, -1):
        noise = torch.cat([torch.randn(count, 2, dtype=torch.float64, generator=g) for g in generators])
        x = chain.mean(x, t).detach() + chain.std(t) * noise
    found = [fidelity(part, target, draws, level) for part in x.split(count)]
    return {name: seed_interval([getattr(each, name) for each in found]) for name in Fidelity._fields}
