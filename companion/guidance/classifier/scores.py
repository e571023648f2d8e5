"""Classifier guidance: scores of a classifier's logits, and their gradients in closed form.

A classifier gives logits f_i(x) of N classes, p(i|x) = softmax(f)_i, on noisy x_t or on a clean estimate x̂_0. Guidance
towards class y adds scale · ∇_x S to the score of the data, with (Javid et al. 2025; temperatures: Ma et al. 2024)

    S = τ1 f_y - log Σ_i exp(τ2 f_i)  -  a D_f(q_y ‖ p)  +  φ(H(p)),        D_f(q ‖ p) = Σ_i q_i f(p_i/q_i),

q_y(i) = (1-ε)/N + ε 1[i = y] and H the entropy. p in D_f and H is the classifier's own, untempered. The gradient with
respect to the logits is a closed form; from there to x is one vector-Jacobian product of the classifier:

    ∂S/∂f_i = τ1 1[i = y] - τ2 softmax(τ2 f)_i - a (w_i - p_i Σ_j w_j) - φ'(H) p_i (log p_i + H),   w = p f'(p/q).

| divergence | f(t) | D_f(q ‖ p) | w (Proposition 2) |
|---|---|---|---|
| `reverse_kl` | -log t | KL(q ‖ p) | -q |
| `forward_kl` | t log t | KL(p ‖ q) | p (log(p/q) + 1) |
| `jensen_shannon` | ½ [t log t - (t+1) log((t+1)/2)] | ½ KL(p ‖ m) + ½ KL(q ‖ m), m = (p+q)/2 | ½ p log(p/m) |
| `squared_hellinger` | ½ (√t - 1)² | 1 - Σ √(p q) | ½ (p - √(p q)) |

Everything is computed from log p in float32 at least, so half-precision logits of any size are safe; no p log p is ever
formed at p = 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

DivergenceName = Literal["reverse_kl", "forward_kl", "jensen_shannon", "squared_hellinger"]
DIVERGENCES: tuple[DivergenceName, ...] = get_args(DivergenceName)

Generator = Callable[[Float[Tensor, "..."]], Float[Tensor, "..."]]
"""f of an f-divergence: convex, f(1) = 0, elementwise, made of torch operations."""

Classifier = Callable[[Float[Tensor, "batch ..."]], Float[Tensor, "batch classes"]]
"""Images (noisy at one level, or clean) -> logits; samples are independent."""

Labels = int | Int[Tensor, " batch"]


def _check_smoothing(smoothing: float) -> None:
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing (ε) must be in [0, 1], got {smoothing}")


def check_divergence(divergence: DivergenceName | Generator, smoothing: float) -> None:
    """Refuse a divergence that is unknown, not zero at p = q, or infinite for the smoothing.

    Raises:
        ValueError: it is.
    """
    if not callable(divergence) and divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, or a function f, got {divergence!r}")
    if smoothing == 1 and divergence == "forward_kl":
        raise ValueError(
            "forward_kl is infinite at smoothing=1, where q has no mass off the label; take smoothing below 1"
        )
    if callable(divergence):
        if smoothing == 1:
            raise ValueError(
                "a divergence given as a function needs smoothing below 1: at 1, q has no mass off the label and f "
                "would be evaluated at infinity"
            )
        at_one = float(divergence(torch.ones(1, dtype=torch.float64)))
        if not abs(at_one) < 1e-9:
            raise ValueError(f"a divergence's f must be 0 at t = 1, so that D is 0 at p = q; got f(1) = {at_one}")


@dataclass(frozen=True)
class ClassifierScore:
    """The score whose gradient guides the sampling; the default is plain classifier guidance, log p(y|x).

    Args:
        joint_temperature: τ1, positive; multiplies the logit of the label.
        marginal_temperature: τ2, positive; multiplies the logits in the normaliser. Below τ1 it keeps pushing where
            the classifier is certain (Ma et al. 2024: 1 and 0.5).
        divergence: one of `DIVERGENCES`, or f itself as a function of tensors (differentiated by `torch.func`,
            evaluated in float64).
        strength: a, at least 0, of the divergence; at 0 it is not computed.
        smoothing: ε in [0, 1] of the target q: 1 puts all mass on the label, 0 spreads it evenly. At 1 the classes
            without mass in q contribute the limit p lim f(t)/t: 0 for `reverse_kl`, ½ log 2 · p and ½ p for
            `jensen_shannon` and `squared_hellinger`; `forward_kl` is infinite there.
        entropy: a_H, at least 0: with `adaptive_entropy` φ(H) = a_H (H - H²/(2 log N)), else φ(H) = a_H H.
        adaptive_entropy: whether the coefficient of ∇H adapts: φ'(H) = a_H (1 - H/log N) is a_H where the classifier is
            certain and fades to 0 where it is undecided and more entropy would only undo guidance. This choice is the
            package's own.
        classes: the number of classes of the diffusion model; a classifier with another number is refused.

    Raises:
        ValueError: a value is outside its range, f(1) is not 0, or the divergence is infinite at `smoothing=1`.
    """

    joint_temperature: float = 1.0
    marginal_temperature: float = 1.0
    divergence: DivergenceName | Generator = "reverse_kl"
    strength: float = 0.0
    smoothing: float = 0.9
    entropy: float = 0.0
    adaptive_entropy: bool = True
    classes: int | None = None

    def __post_init__(self) -> None:
        for name in ("joint_temperature", "marginal_temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        for name in ("strength", "entropy"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number, at least 0, got {value}")
        if self.classes is not None and self.classes < 2:
            raise ValueError(f"classes must be at least 2, got {self.classes}")
        _check_smoothing(self.smoothing)
        if self.strength > 0:
            check_divergence(self.divergence, self.smoothing)


class ScoreWithGradient(NamedTuple):
    """S per sample, in float32 at least, and its gradient, in the dtype and shape of what it was differentiated by."""

    score: Float[Tensor, " batch"]
    gradient: Float[Tensor, "batch ..."]


PLAIN = ClassifierScore()
"""log p(y|x), as in Dhariwal & Nichol 2021."""


def smoothed_target(
    labels: Labels, classes: int, smoothing: float, *, batch: int | None = None
) -> Float[Tensor, "batch classes"]:
    """q_y(i) = (1-ε)/N + ε 1[i = y], one row per label; rows sum to 1.

    Args:
        labels: one per sample, or one number for all of `batch`.
        classes: N, at least 2.
        smoothing: ε in [0, 1].

    Raises:
        ValueError: ε outside [0, 1], a label out of range, fewer than two classes.
    """
    _check_smoothing(smoothing)
    count = batch if batch is not None else (len(labels) if isinstance(labels, Tensor) and labels.ndim else 1)
    chosen = _chosen(labels, count, classes, labels.device if isinstance(labels, Tensor) else torch.device("cpu"))
    return _two_valued(chosen, classes, *_target_values(classes, smoothing), torch.float64)


def divergence_value(
    logits: Float[Tensor, "batch classes"],
    labels: Labels,
    divergence: DivergenceName | Generator,
    smoothing: float,
) -> Float[Tensor, " batch"]:
    """D_f(q_y ‖ softmax(logits)) per sample, differentiable, in float32 at least.

    Raises:
        ValueError: ε outside [0, 1], a label out of range, an unknown or infinite divergence.
    """
    _check_smoothing(smoothing)
    check_divergence(divergence, smoothing)
    chosen = _chosen_for(logits, labels)
    return _divergence(_log_softmax(logits), chosen, divergence, smoothing)[0]


def divergence_weights(
    logits: Float[Tensor, "batch classes"],
    labels: Labels,
    divergence: DivergenceName | Generator,
    smoothing: float,
) -> Float[Tensor, "batch classes"]:
    """w_f(q_i, p_i) = p_i f'(p_i/q_i) of Proposition 2, in float32 at least: ∂D/∂f_i = w_i - p_i Σ_j w_j.

    Raises:
        ValueError: as `divergence_value`.
    """
    _check_smoothing(smoothing)
    check_divergence(divergence, smoothing)
    chosen = _chosen_for(logits, labels)
    with torch.no_grad():
        return _divergence(_log_softmax(logits), chosen, divergence, smoothing)[1]


def score_logits(
    logits: Float[Tensor, "batch classes"], labels: Labels, config: ClassifierScore = PLAIN
) -> Float[Tensor, " batch"]:
    """S per sample, in float32 at least; differentiable by autograd (`score_gradient` needs no graph).

    Raises:
        ValueError: logits that are not (batch, classes), another number of classes than `config.classes`, a label out
            of range.
    """
    chosen = _chosen_for(logits, labels, config.classes)
    wide = _wide(logits)
    score = _tempered(wide, chosen, config)
    if config.strength > 0 or config.entropy > 0:
        log_p = wide.log_softmax(dim=1)
        if config.strength > 0:
            score = score - config.strength * _divergence(log_p, chosen, config.divergence, config.smoothing)[0]
        if config.entropy > 0:
            entropy = -(log_p.exp() * log_p).sum(dim=1)
            correction = entropy / (2 * math.log(logits.shape[1])) if config.adaptive_entropy else 0.0
            score = score + config.entropy * entropy * (1 - correction)
    return score


@torch.no_grad()
def score_gradient(
    logits: Float[Tensor, "batch classes"], labels: Labels, config: ClassifierScore = PLAIN
) -> ScoreWithGradient:
    """S per sample and ∂S/∂f_i in closed form, without a graph through the logits.

    With `strength` and `entropy` 0 and both temperatures 1 this is bit for bit what autograd makes of
    `logits.log_softmax(1)[label]` (of `logits.float()` for half precision), whatever ε.

    Returns:
        The gradient has the logits' dtype: pass it to `torch.autograd.grad(logits, x, gradient)`.

    Raises:
        ValueError: as `score_logits`.
    """
    chosen = _chosen_for(logits, labels, config.classes)
    wide = _wide(logits)
    # τ1 1[i = y] - τ2 softmax(τ2 f) by log_softmax's own backward kernel: written out it differs in the last bit.
    with torch.enable_grad():
        leaf = wide.detach().requires_grad_()
        tempered = _tempered(leaf, chosen, config)
        [gradient] = torch.autograd.grad(tempered.sum(), leaf)
    score = tempered.detach()
    if config.strength > 0 or config.entropy > 0:
        log_p = wide.log_softmax(dim=1)
        p = log_p.exp()
        if config.strength > 0:
            value, weights = _divergence(log_p, chosen, config.divergence, config.smoothing)
            score = score - config.strength * value
            gradient -= config.strength * (weights - p * weights.sum(dim=1, keepdim=True))
        if config.entropy > 0:
            entropy = -(p * log_p).sum(dim=1)
            share = entropy / math.log(logits.shape[1]) if config.adaptive_entropy else torch.zeros_like(entropy)
            score = score + config.entropy * entropy * (1 - share / 2)
            gradient -= config.entropy * (1 - share)[:, None] * p * (log_p + entropy[:, None])
    return ScoreWithGradient(score, gradient.to(logits.dtype))


def classifier_gradient(
    classifier: Classifier, x: Float[Tensor, "batch ..."], labels: Labels, config: ClassifierScore = PLAIN
) -> ScoreWithGradient:
    """S and ∇_x S: one forward and one backward pass of the classifier.

    Args:
        classifier: logits at one noise level, or of clean estimates.
        x: its input.

    Raises:
        ValueError: as `score_logits`, or logits that do not depend on x differentiably.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = classifier(leaf)
        if not logits.requires_grad:
            raise ValueError("classifier guidance differentiates the classifier, but its logits do not depend on x")
        score, slope = score_gradient(logits.detach(), labels, config)
        [gradient] = torch.autograd.grad(logits, leaf, slope)
    return ScoreWithGradient(score, gradient)


def tilted_mean(scores: Float[Tensor, " batch"], tilt: float) -> Float[Tensor, ""]:
    """`S_t = (1/t) log((1/N) Σ_i exp(t S_i))` in float64; its gradient in S_i is `tilted_weights`.

    Args:
        scores: of a batch, log p(y_i|x_i) in the paper.
        tilt: t, any sign: towards the largest score for t > 0, the smallest for t < 0; 0 is the plain mean, the limit.

    Raises:
        ValueError: t is not finite, or there are no scores.
    """
    _check_tilt(scores, tilt)
    wide = scores.to(torch.float64)
    spread = float((wide.max() - wide.min()).detach())
    if abs(tilt) * spread < 1e-8:
        return wide.mean() + 0.5 * tilt * wide.var(correction=0)
    # Measured from the score that dominates, no exponential exceeds 1; expm1 keeps the digits of a small t.
    top = (wide.max() if tilt > 0 else wide.min()).detach()
    return top + torch.expm1(tilt * (wide - top)).mean().log1p() / tilt


def tilted_weights(scores: Float[Tensor, " batch"], tilt: float) -> Float[Tensor, " batch"]:
    """`softmax_i(t S_i)`: what each sample's gradient is multiplied with; sums to 1, 1/N each for t = 0.

    Times N it leaves the batch's total guidance as it is. Raises as `tilted_mean`.
    """
    _check_tilt(scores, tilt)
    wide = scores.to(torch.float64)
    # Differences first: t S overflows nowhere then, and equal scores give equal weights exactly.
    top = wide.max() if tilt > 0 else wide.min()
    return (tilt * (wide - top)).softmax(dim=0).to(scores.dtype)


def sine_variance(variances: Float[Tensor, " steps"], gamma: float = 0.3) -> Float[Tensor, " steps"]:
    """The variances that a step's gradient is multiplied with: `Σ_t + γ max(Σ) sin(π t/T)` (Ma et al. 2024).

    Classifier guidance moves a DDPM step's mean by `Σ_t ∇S`; Σ_t is small except in noise, and the sine gives the
    middle of the chain a share. The noise that the step adds keeps its own variance.

    Args:
        variances: of the kernels, t = 1 … T in order; non-negative.
        gamma: γ, at least 0; the published value is 0.3.

    Raises:
        ValueError: γ is negative or not finite, or a variance is negative.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma must be a finite number, at least 0, got {gamma}")
    if variances.ndim != 1 or not len(variances) or not (variances >= 0).all():
        raise ValueError(f"variances must be one non-negative number per step, got {variances.tolist()}")
    steps = len(variances)
    t = torch.arange(1, steps + 1, dtype=variances.dtype, device=variances.device)
    return variances + gamma * variances.max() * (math.pi * t / steps).sin().clamp(min=0)


def _divergence(
    log_p: Float[Tensor, "batch classes"],
    chosen: Int[Tensor, "batch 1"],
    divergence: DivergenceName | Generator,
    smoothing: float,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch classes"]]:
    """(D_f, w_f); D_f is differentiable in log p."""
    classes = log_p.shape[1]
    off, on = _target_values(classes, smoothing)
    q = _two_valued(chosen, classes, off, on, log_p.dtype)
    # Where q is 0 its logarithm only ever meets a factor 0: any finite number will do.
    log_off, log_on = (math.log(value) if value > 0 else 0.0 for value in (off, on))
    log_q = _two_valued(chosen, classes, log_off, log_on, log_p.dtype)
    p = log_p.exp()
    match divergence:
        case "reverse_kl":
            return (q * (log_q - log_p)).sum(dim=1), -q
        case "forward_kl":
            ratio = log_p - log_q
            return (p * ratio).sum(dim=1), p * (ratio + 1)
        case "jensen_shannon":
            mixed = torch.where(q > 0, torch.logaddexp(log_p, log_q), log_p) - math.log(2)
            value = 0.5 * (p * (log_p - mixed) + q * (log_q - mixed)).sum(dim=1)
            return value, 0.5 * p * (log_p - mixed)
        case "squared_hellinger":
            middle = torch.where(q > 0, (0.5 * (log_p + log_q)).exp(), 0.0)
            # 1 - Σ √(pq) written as a sum of squares, which cancels nothing near p = q.
            root = torch.where(q > 0, (0.5 * log_q).exp(), 0.0)
            value = 0.5 * ((0.5 * log_p).exp() - root).square().sum(dim=1)
            return value, 0.5 * (p - middle)
    return _from_function(log_p, log_q, divergence)


def _from_function(
    log_p: Float[Tensor, "batch classes"], log_q: Float[Tensor, "batch classes"], f: Generator
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch classes"]]:
    """(D_f, w_f) for any f, in float64, where a ratio of e^-700 is still a number."""
    wide_p, wide_q = log_p.to(torch.float64), log_q.to(torch.float64)
    ratio, q = (wide_p - wide_q).clamp(min=-700).exp(), wide_q.exp()
    value = (q * f(ratio)).sum(dim=1)
    plain = ratio.detach()
    # f acts on each element alone: pulling ones back gives f' at every element.
    slope = torch.func.vjp(f, plain)[1](torch.ones_like(plain))[0]
    return value.to(log_p.dtype), (q * plain * slope).to(log_p.dtype)


def _tempered(
    wide: Float[Tensor, "batch classes"], chosen: Int[Tensor, "batch 1"], config: ClassifierScore
) -> Float[Tensor, " batch"]:
    """τ1 f_y - log Σ exp(τ2 f), as log softmax(τ2 f)_y + (τ1 - τ2) f_y; equal temperatures need no second term."""
    tau = config.marginal_temperature
    normalised = (tau * wide).log_softmax(dim=1).gather(1, chosen)
    if config.joint_temperature != tau:
        normalised = normalised + (config.joint_temperature - tau) * wide.gather(1, chosen)
    return normalised[:, 0]


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _log_softmax(logits: Tensor) -> Tensor:
    return _wide(logits).log_softmax(dim=1)


def _target_values(classes: int, smoothing: float) -> tuple[float, float]:
    """q off the label and on it."""
    return (1 - smoothing) / classes, (1 - smoothing) / classes + smoothing


def _two_valued(chosen: Int[Tensor, "batch 1"], classes: int, off: float, on: float, dtype: torch.dtype) -> Tensor:
    rows = torch.full((len(chosen), classes), off, dtype=dtype, device=chosen.device)
    return rows.scatter_(1, chosen, on)


def _chosen_for(logits: Tensor, labels: Labels, classes: int | None = None) -> Int[Tensor, "batch 1"]:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be (batch, classes) with at least 2 classes, got shape {tuple(logits.shape)}")
    if classes is not None and logits.shape[1] != classes:
        raise ValueError(
            f"the classifier must have {classes} classes, as many as the labels count, got {logits.shape[1]} logits"
        )
    return _chosen(labels, len(logits), logits.shape[1], logits.device)


def _chosen(labels: Labels, batch: int, classes: int, device: torch.device) -> Int[Tensor, "batch 1"]:
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes}")
    wanted = torch.as_tensor(labels, device=device)
    if wanted.is_floating_point() or wanted.ndim > 1 or (wanted.ndim == 1 and len(wanted) != batch):
        raise ValueError(
            f"labels must be one integer, or {batch} of them, got {wanted.dtype} of shape {tuple(wanted.shape)}"
        )
    outside = wanted.reshape(-1)[(wanted.reshape(-1) < 0) | (wanted.reshape(-1) >= classes)]
    if len(outside):
        raise ValueError(f"labels must be in 0..{classes - 1}, one of the classifier's classes, got {int(outside[0])}")
    return wanted.long().reshape(-1, 1).expand(batch, 1)


def _check_tilt(scores: Tensor, tilt: float) -> None:
    if not math.isfinite(tilt):
        raise ValueError(f"tilt (t) must be a finite number, got {tilt}")
    if scores.ndim != 1 or len(scores) < 1:
        raise ValueError(f"scores must be one number per sample, at least one, got shape {tuple(scores.shape)}")
