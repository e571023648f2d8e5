"""The loss as it is printed, its gradient and its minimisers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar

from companion.calibration.loss import calibrated_cross_entropy, confidence_and_correctness, smooth_calibration_loss


def draw(seed: int, samples: int = 30, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, classes, (samples,), generator=generator)


@given(seed=st.integers(0, 2**32), beta=st.floats(1e-6, 10), bins=st.integers(1, 20))
def test_the_printed_sum_over_bins_is_a_mean_over_samples(seed, beta, bins) -> None:
    logits, labels = draw(seed)
    total = 0.0
    probabilities = logits.softmax(1)
    for b in range(bins):
        for row, label in zip(probabilities, labels, strict=True):
            top = float(row.max())
            if b <= top * bins < b + 1 or (b == bins - 1 and top == 1):
                total += ((top - float(row.argmax() == label)) ** 2 + beta) ** 0.5
    assert float(smooth_calibration_loss(logits, labels, beta=beta)) == pytest.approx(total / len(labels), rel=1e-12)


@given(seed=st.integers(0, 2**32), beta=st.floats(1e-6, 10), bins=st.integers(1, 20))
def test_the_binned_form_against_a_loop(seed, beta, bins) -> None:
    logits, labels = draw(seed)
    confidence, correct = confidence_and_correctness(logits, labels)
    total = 0.0
    for b in range(bins):
        held = (confidence * bins).floor().clamp(max=bins - 1) == b
        if held.any():
            gap = float(confidence[held].mean() - correct[held].double().mean())
            total += float(held.double().mean()) * (gap**2 + beta) ** 0.5
    assert float(smooth_calibration_loss(logits, labels, beta=beta, bins=bins)) == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("bins", [None, 5])
def test_gradients_flow_through_confidences_only(bins) -> None:
    logits, labels = draw(0)
    assert torch.autograd.gradcheck(
        lambda z: smooth_calibration_loss(z, labels, beta=0.01, bins=bins), logits.clone().requires_grad_()
    )


def minimiser(accuracy: float, beta: float, bins: int | None) -> float:
    """The one confidence of a two-class classifier, right with `accuracy`, that the loss is smallest at."""
    labels = torch.arange(1000) >= 1000 * accuracy  # class 0 is right

    def loss(p: float) -> float:
        logits = torch.tensor([[p, 1 - p]], dtype=torch.float64).log().expand(1000, 2)
        return float(smooth_calibration_loss(logits, labels.long(), beta=beta, bins=bins))

    return minimize_scalar(loss, bounds=(0.501, 0.9999), method="bounded", options={"xatol": 1e-9}).x


@pytest.mark.parametrize("accuracy", [0.6, 0.7, 0.9])
@pytest.mark.parametrize("beta", [0.01, 1.0])
def test_the_printed_loss_is_smallest_above_the_accuracy_and_the_binned_one_at_it(accuracy, beta) -> None:
    solution = brentq(
        lambda p: (1 - accuracy) * p / (p**2 + beta) ** 0.5 - accuracy * (1 - p) / ((1 - p) ** 2 + beta) ** 0.5,
        0.5,
        1,
    )
    assert minimiser(accuracy, beta, None) == pytest.approx(solution, abs=1e-5)
    assert solution > accuracy + (0.05 if beta == 0.01 else 0.005)
    assert minimiser(accuracy, beta, 1) == pytest.approx(accuracy, abs=1e-4)
    assert minimiser(accuracy, 1e4, None) == pytest.approx(accuracy, abs=1e-3)


def test_cross_entropy_is_added() -> None:
    logits, labels = draw(1)
    plain = torch.nn.functional.cross_entropy(logits, labels)
    assert torch.equal(calibrated_cross_entropy(logits, labels, weight=0.0), plain)
    both = calibrated_cross_entropy(logits, labels, weight=2.0, beta=0.1)
    torch.testing.assert_close(both, plain + 2 * smooth_calibration_loss(logits, labels, beta=0.1))


def test_half_precision_logits_give_a_finite_loss_and_gradient() -> None:
    logits = torch.tensor([[100.0, -100.0], [-100.0, 100.0]], dtype=torch.float16, requires_grad=True)
    loss = calibrated_cross_entropy(logits, torch.tensor([0, 0]))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


def test_bad_input_is_refused() -> None:
    logits, labels = draw(0)
    for beta in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="beta must be positive"):
            smooth_calibration_loss(logits, labels, beta=beta)
    with pytest.raises(ValueError, match="bins must be at least 1, or None"):
        smooth_calibration_loss(logits, labels, bins=0)
    with pytest.raises(ValueError, match="at least one sample, got an empty batch"):
        smooth_calibration_loss(logits[:0], labels[:0])
    with pytest.raises(ValueError, match=r"one label each, got \(30, 4\) and \(29,\)"):
        smooth_calibration_loss(logits, labels[1:])
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        calibrated_cross_entropy(logits, labels, weight=-1)
