"""How good and how varied samples are: FID, Inception score, precision and recall, agreement with what was asked for.

Every figure comes with a 95 % interval for a new run of as many samples, the reference staying what it is. FID and the
Inception score are biased in small samples, and a resample holds fewer different pictures than the sample: percentiles
of resampled values would lie away from the figure. So the interval is the figure ± 1.96 standard deviations of the
resampled values, or of the figure's linear expansion in the sample (the infinitesimal jackknife, Efron 1982).
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import scipy.stats
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from companion.evaluation.metrics.figures import Figure
from companion.evaluation.metrics.reference_statistics import GaussianStatistics, statistics_of
from companion.seeding import sample_generators

RESAMPLES = 200
_NORMAL = 1.959963984540054


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """`|μ_1 - μ_2|² + tr(Σ_1 + Σ_2 - 2 (Σ_1 Σ_2)^½)` (Heusel et al. 2017), by the eigenvalues of Σ_1^½ Σ_2 Σ_1^½.

    Raises:
        ValueError: the statistics have different dimensions.
    """
    if len(first.mean) != len(second.mean):
        raise ValueError(
            f"both statistics must be of the same features, got {len(first.mean)} and {len(second.mean)} dimensions"
        )
    return _distance_to(second, matrix_root(second.covariance), first.mean, first.covariance)


def _distance_to(second: GaussianStatistics, root: Tensor, mean: Tensor, covariance: Tensor) -> float:
    overlap = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    traces = covariance.trace() + second.covariance.trace()
    return max(0.0, float((mean - second.mean).square().sum() + traces - 2 * overlap))


def matrix_root(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def fid(
    features: Float[Tensor, "samples dimensions"],
    reference: GaussianStatistics,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Figure:
    """Fréchet distance of the samples' features to the reference's.

    Args:
        features: of the samples.
        reference: of a data set, or read from a file.
        resamples: of the bootstrap; 0 takes the infinitesimal jackknife, one pass, for thousands of dimensions.
        seed: of the bootstrap.

    Raises:
        ValueError: no more samples than dimensions: their covariance would be singular.
    """
    number, dimensions = features.shape
    if number <= dimensions:
        raise ValueError(f"FID needs more pictures than features, got {number} pictures and {dimensions} features")
    own = statistics_of(features)
    value = frechet_distance(own, reference)
    if resamples == 0:
        spread = float(frechet_influence(features, reference).std()) / math.sqrt(number)
        return _around(value, spread, "infinitesimal jackknife", number)
    root, centred = matrix_root(reference.covariance), features.double().cpu() - own.mean

    def resampled(counts: Tensor) -> float:
        shift = counts @ centred / number
        second = (centred * counts.unsqueeze(1)).T @ centred
        covariance = (second - number * torch.outer(shift, shift)) / (number - 1)
        return _distance_to(reference, root, own.mean + shift, covariance)

    return _bootstrap(value, resampled, number, resamples, seed)


def frechet_influence(
    features: Float[Tensor, "samples dimensions"], reference: GaussianStatistics
) -> Float[Tensor, " samples"]:
    """How much more weight on each sample would change the Fréchet distance: `2 δ·y + yᵀ (I - T) y`, less its mean.

    y is the sample's deviation from the mean, δ the means' difference, and T the linear map that transports the one
    Gaussian's covariance to the other's; the quadratic term carries the covariance's n / (n - 1).
    """
    own = statistics_of(features)
    root = matrix_root(reference.covariance)
    values, vectors = torch.linalg.eigh(root @ own.covariance @ root)
    keep = values > values.max() * 1e-12
    inverse = torch.where(keep, values.clamp(min=1e-300).rsqrt(), torch.zeros_like(values))
    transport = root @ ((vectors * inverse) @ vectors.T) @ root
    centred = features.double().cpu() - own.mean
    quadratic = (centred.square()).sum(dim=1) - ((centred @ transport) * centred).sum(dim=1)
    influence = 2 * centred @ (own.mean - reference.mean) + quadratic * len(features) / (len(features) - 1)
    return influence - influence.mean()


def frechet_values(
    features: Float[Tensor, "samples dimensions"], reference: GaussianStatistics
) -> Float[Tensor, " samples"]:
    """A value for each sample whose mean is the Fréchet distance, and whose scatter is its influences'."""
    return frechet_distance(statistics_of(features), reference) + frechet_influence(features, reference)


def inception_values(logits: Float[Tensor, "samples classes"]) -> Float[Tensor, " samples"]:
    """A value for each sample whose mean is the Inception score (of one part), and whose scatter is its influences':
    `IS (1 + KL(p(y|x_i) ‖ p(y)) - log IS)`."""
    logarithms = logits.double().cpu().log_softmax(dim=1)
    chances = logarithms.exp()
    divergence = (chances * (logarithms - chances.mean(dim=0).log())).sum(dim=1)
    return divergence.mean().exp() * (1 + divergence - divergence.mean())


def inception_score(logits: Float[Tensor, "samples classes"], *, splits: int = 1, resamples: int = RESAMPLES) -> Figure:
    """`exp E KL(p(y|x) ‖ p(y))` (Salimans et al. 2016), the mean over as many parts of equal size as there are splits.

    Args:
        logits: of the samples, in their order.
        splits: 10 in the literature, for 50,000 samples; a part should hold thousands.
        resamples: of the bootstrap, within each part.

    Raises:
        ValueError: fewer than two samples in a part.
    """
    if splits < 1 or len(logits) < 2 * splits:
        raise ValueError(f"the Inception score needs 2 pictures in each of {splits} parts, got {len(logits)} in all")
    logarithms = logits.double().cpu().log_softmax(dim=1)
    parts = logarithms.chunk(splits)

    def score(counts: Sequence[Tensor]) -> float:
        scores = []
        for part, weight in zip(parts, counts, strict=True):
            share = weight / weight.sum()
            chances = part.exp()
            marginal = share @ chances
            entropy = torch.special.entr(marginal).sum()
            scores.append(float((share @ (chances * part).sum(dim=1) + entropy).exp()))
        return sum(scores) / len(scores)

    value = score([torch.ones(len(part), dtype=torch.float64) for part in parts])
    drawn = [
        score([_counts(len(part), generator) for part in parts]) for generator in sample_generators(0, range(resamples))
    ]
    return _around(value, float(torch.tensor(drawn).std()), f"bootstrap, {resamples} resamples", len(logits))


def precision_recall(
    real: Float[Tensor, "real dimensions"], generated: Float[Tensor, "generated dimensions"], *, neighbours: int = 3
) -> tuple[Figure, Figure]:
    """Improved precision and recall (Kynkäänniemi et al. 2019): the share of each set inside the other's manifold.

    A set's manifold is the union of balls around its members that reach to their k-th nearest neighbour in the set.
    Intervals are Wilson's, for the pictures that are tested; the manifold is taken as it is.

    Raises:
        ValueError: a set has no more members than there are neighbours, or the dimensions differ.
    """
    precise, recalled = inside_manifolds(real, generated, neighbours=neighbours)
    return share(precise), share(recalled)


def inside_manifolds(
    real: Float[Tensor, "real dimensions"], generated: Float[Tensor, "generated dimensions"], *, neighbours: int = 3
) -> tuple[Bool[Tensor, " generated"], Bool[Tensor, " real"]]:
    """Which generated pictures lie in the real ones' manifold, and which real ones in the generated ones'.

    Raises:
        ValueError: as `precision_recall`.
    """
    if neighbours < 1 or min(len(real), len(generated)) <= neighbours:
        raise ValueError(
            f"precision and recall need more than {neighbours} pictures in each set, got {len(real)} real and "
            f"{len(generated)} generated"
        )
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"both sets must have the same features, got {real.shape[1]} and {generated.shape[1]}")
    precise = _inside(generated, real, _radii(real, neighbours))
    return precise, _inside(real, generated, _radii(generated, neighbours))


_CHUNK = 1000


def _radii(members: Tensor, neighbours: int) -> Tensor:
    """Distance of every member to its k-th nearest other."""
    found = []
    for first in range(0, len(members), _CHUNK):
        distances = _distances(members[first : first + _CHUNK], members)
        rows = torch.arange(len(distances))
        distances[rows, first + rows] = -1.0  # itself, whatever the rounding
        found.append(distances.kthvalue(neighbours + 1, dim=1).values)
    return torch.cat(found)


def _inside(points: Tensor, members: Tensor, radii: Tensor) -> Bool[Tensor, " points"]:
    return torch.cat([(_distances(part, members) <= radii).any(dim=1) for part in points.split(_CHUNK)])


def _distances(first: Tensor, second: Tensor) -> Tensor:
    # Not by matrix products: their cancellation would move pictures across the edges of balls.
    return torch.cdist(first.double(), second.double(), compute_mode="donot_use_mm_for_euclid_dist")


def share(right: Bool[Tensor, " samples"]) -> Figure:
    """A share (0 to 1) with Wilson's interval.

    Raises:
        ValueError: no samples.
    """
    if not len(right):
        raise ValueError("a share needs at least one sample")
    count = int(right.sum())
    ends = scipy.stats.binomtest(count, len(right)).proportion_ci(0.95, method="wilson")
    value = count / len(right)
    return Figure(value, min(float(ends.low), value), max(float(ends.high), value), "Wilson", len(right))


def class_agreement(logits: Float[Tensor, "samples classes"], asked: Int[Tensor, " samples"]) -> Figure:
    """Share of samples in which a classifier sees first the class that was asked for.

    Raises:
        ValueError: not one class per sample, or a class the classifier does not know.
    """
    if len(logits) != len(asked) or not len(asked):
        raise ValueError(f"asked must name one class per sample, got {len(asked)} for {len(logits)} samples")
    if int(asked.min()) < 0 or int(asked.max()) >= logits.shape[1]:
        raise ValueError(f"asked must be from 0 to {logits.shape[1] - 1}, got {int(asked.min())} to {int(asked.max())}")
    return share(logits.cpu().argmax(dim=1) == asked.cpu())


class ClipNetwork(Protocol):
    """Pictures and captions in one space; `name` goes into the provenance. Embeddings need not be of length 1."""

    name: str

    def embed_images(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dimensions"]: ...

    def embed_captions(self, captions: Sequence[str]) -> Float[Tensor, "batch dimensions"]: ...


def clip_score(images: Float[Tensor, "samples dimensions"], captions: Float[Tensor, "samples dimensions"]) -> Figure:
    """The mean of `clip_values` (Hessel et al. 2021, on CLIP's own scale), with a t interval.

    Raises:
        ValueError: not one caption per picture, or fewer than two.
    """
    if images.shape != captions.shape or len(images) < 2:
        raise ValueError(
            f"there must be one caption per picture, at least 2, got embeddings of shapes {tuple(images.shape)} and "
            f"{tuple(captions.shape)}"
        )
    scores = clip_values(images, captions)
    half = scipy.stats.t.ppf(0.975, len(scores) - 1) * float(scores.std()) / math.sqrt(len(scores))
    value = float(scores.mean())
    return Figure(value, value - half, value + half, "t", len(scores))


def clip_values(
    images: Float[Tensor, "samples dimensions"], captions: Float[Tensor, "samples dimensions"]
) -> Float[Tensor, " samples"]:
    """`100 max(cos(image, caption), 0)` of every picture."""
    return 100 * torch.cosine_similarity(images.double(), captions.double(), dim=1).clamp(min=0)


def _bootstrap(value: float, resampled: Callable[[Tensor], float], number: int, resamples: int, seed: int) -> Figure:
    drawn = [resampled(_counts(number, generator)) for generator in sample_generators(seed, range(resamples))]
    return _around(value, float(torch.tensor(drawn).std()), f"bootstrap, {resamples} resamples", number)


def _counts(number: int, generator: torch.Generator) -> Float[Tensor, " samples"]:
    """How often each sample is in a resample of as many."""
    return torch.randint(number, (number,), generator=generator).bincount(minlength=number).double()


def _around(value: float, spread: float, method: str, samples: int) -> Figure:
    return Figure(value, value - _NORMAL * spread, value + _NORMAL * spread, method, samples)
