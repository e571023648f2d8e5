"""Every product against the dense Jacobian of a small nonlinear network, sample by sample."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from companion.guidance.parametrization import KCoefficients, rectification_coefficients
from companion.guidance.rectification import PRODUCTS, check_product, rectify
from tests.dense_products import products_of

BATCH, SHAPE = 3, (2, 3, 3)
SIZE = 18
COEFFICIENTS = rectification_coefficients("epsilon", 0.6, 0.8)


class Network(nn.Module):
    """Convolution, attention over places and a gate: nonlinear, samples independent, no symmetry in its Jacobian."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 2, 3, padding=1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.mix(x)
        tokens = hidden.flatten(2).mT.unsqueeze(1)
        attended = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.out(torch.tanh(hidden) + attended.squeeze(1).mT.view_as(hidden))


NETWORK = Network().double()


def inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x, reference = torch.randn(2, BATCH, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype), reference.to(dtype)


def dense_k(x: Tensor, coefficients: KCoefficients = COEFFICIENTS) -> Tensor:
    """K of each sample, (batch, SIZE, SIZE)."""
    return torch.stack(
        [
            coefficients.identity * torch.eye(SIZE, dtype=torch.float64)
            + coefficients.jacobian
            * torch.autograd.functional.jacobian(lambda z: NETWORK(z.unsqueeze(0)).squeeze(0), sample).view(SIZE, SIZE)
            for sample in x
        ]
    )


TOLERANCE = dict.fromkeys(PRODUCTS, 1e-10) | {"finite_difference": 1e-6}


@given(seed=st.integers(min_value=0, max_value=2**32), angle=st.floats(min_value=0.05, max_value=1.5))
@settings(max_examples=10)
def test_products_agree_with_the_dense_jacobian(seed: int, angle: float) -> None:
    x, reference = inputs(seed)
    sigma = torch.tensor(angle, dtype=torch.float64).sin().item()
    coefficients = rectification_coefficients("v_prediction", (1 - sigma**2) ** 0.5, sigma)
    output = NETWORK(x).detach()
    for product, want in products_of(dense_k(x, coefficients), output - reference).items():
        prediction, direction = rectify(NETWORK, x, reference, coefficients, product=product, probes=None)
        assert not prediction.requires_grad and not direction.requires_grad
        torch.testing.assert_close(prediction, output, rtol=1e-12, atol=1e-12)
        tolerance = {"rtol": TOLERANCE[product], "atol": 10 * TOLERANCE[product]}
        torch.testing.assert_close(direction, want, **tolerance, msg=lambda text, name=product: f"{name}: {text}")


def test_ones_is_equation_21_written_out() -> None:
    """ε̄ = ε_c + w (ε_c - ε_u) ⊙ (1 - √(1-ᾱ) ∂(1ᵀ ε_c)/∂x)."""
    x, reference = inputs()
    leaf = x.clone().requires_grad_()
    output = NETWORK(leaf)
    [gradient] = torch.autograd.grad(output.sum(), leaf)
    want = (output.detach() - reference) * (1 - 0.8 * gradient)
    torch.testing.assert_close(rectify(NETWORK, x, reference, COEFFICIENTS, product="ones").direction, want)


def test_a_product_sees_only_its_own_sample() -> None:
    x, reference = inputs()
    for product in PRODUCTS:
        together = rectify(NETWORK, x, reference, COEFFICIENTS, product=product, probes=None).direction
        alone = [
            rectify(NETWORK, x[i : i + 1], reference[i : i + 1], COEFFICIENTS, product=product, probes=None).direction
            for i in range(BATCH)
        ]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("product", PRODUCTS)
@given(scale=st.floats(min_value=-100, max_value=100))
@settings(max_examples=10)
def test_products_are_linear_in_the_direction(product: str, scale: float) -> None:
    x, _ = inputs()
    output = NETWORK(x).detach()
    one, other = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def rectified(direction: Tensor) -> Tensor:
        return rectify(NETWORK, x, output - direction, COEFFICIENTS, product=product, probes=None).direction

    combined = rectified(scale * one + other)
    torch.testing.assert_close(
        combined, scale * rectified(one) + rectified(other), rtol=1e-5, atol=1e-5 * (1 + abs(scale))
    )


@pytest.mark.parametrize("product", PRODUCTS)
def test_no_direction_stays_none(product: str) -> None:
    x, _ = inputs()
    direction = rectify(NETWORK, x, NETWORK(x).detach(), COEFFICIENTS, product=product, probes=None).direction
    assert torch.isfinite(direction).all()
    assert direction.abs().max() < 1e-6


def test_one_vanishing_direction_leaves_the_other_samples_alone() -> None:
    x, reference = inputs()
    reference[1] = NETWORK(x).detach()[1]
    got = rectify(NETWORK, x, reference, COEFFICIENTS, product="finite_difference").direction
    want = products_of(dense_k(x), NETWORK(x).detach() - reference)["jvp"]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("product", ["jvp", "finite_difference", "none"])
def test_a_known_prediction_saves_the_evaluation(product: str) -> None:
    x, reference = inputs()
    calls = 0

    def counted(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return NETWORK(z)

    fresh = rectify(counted, x, reference, COEFFICIENTS, product=product, probes=None)
    without = calls
    known = rectify(counted, x, reference, COEFFICIENTS, product=product, probes=None, prediction=fresh.prediction)
    assert calls - without == without - 1
    assert torch.equal(known.direction, fresh.direction)


def test_the_surrounding_gradient_mode_makes_no_difference() -> None:
    x, reference = inputs()
    for product in PRODUCTS:
        inside = rectify(NETWORK, x, reference, COEFFICIENTS, product=product, probes=None).direction.detach()
        with torch.no_grad():
            outside = rectify(NETWORK, x, reference, COEFFICIENTS, product=product, probes=None).direction
        torch.testing.assert_close(inside, outside, rtol=1e-12, atol=1e-12)
        assert not x.requires_grad
        assert all(parameter.grad is None for parameter in NETWORK.parameters())


def test_finite_difference_builds_no_graph_under_no_grad() -> None:
    x, reference = inputs()
    graphs = []
    with torch.no_grad():
        rectify(lambda z: graphs.append(torch.is_grad_enabled()) or NETWORK(z), x, reference, COEFFICIENTS)
    assert graphs == [False, False]


def test_hutchinson_is_unbiased_and_converges_at_the_monte_carlo_rate() -> None:
    x, reference = inputs()
    k = dense_k(x)
    want = products_of(k, NETWORK(x).detach() - reference)["diagonal"]

    def error(probes: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        options = {"product": "diagonal", "probes": probes, "generator": generator}
        return rectify(NETWORK, x, reference, COEFFICIENTS, **options).direction - want

    # v ⊙ Kᵀv = diag K + Σ_{j≠i} v_i v_j K_ji with independent signs v: unbiased, and the variance of one probe is the
    # squared norm of K's column without the diagonal.
    off = k - torch.diag_embed(k.diagonal(dim1=1, dim2=2))
    direction = (NETWORK(x).detach() - reference).reshape(BATCH, -1)
    deviation = direction.abs() * off.square().sum(dim=1).sqrt()
    for probes in (1, 16):
        errors = torch.stack([error(probes, seed) for seed in range(100)]).view(100, BATCH, -1)
        standard = deviation / probes**0.5
        assert (errors.mean(dim=0).abs() < 5 * standard / 10).all()
        ratio = errors.square().mean(dim=0).sqrt() / standard
        assert 0.9 < ratio.mean() < 1.1


def test_probes_repeat_with_their_generator() -> None:
    x, reference = inputs()

    def direction(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return rectify(NETWORK, x, reference, COEFFICIENTS, product="diagonal", probes=2, generator=generator).direction

    assert torch.equal(direction(1), direction(1))
    assert not torch.equal(direction(1), direction(2))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 5e-3), (torch.bfloat16, 0.15)])
def test_dtypes(product: str, dtype: torch.dtype, tolerance: float) -> None:
    """The dtype does not change; the relative error is the dtype's own, against float64."""
    x, reference = inputs(dtype=dtype)
    network = Network().to(dtype)
    prediction, direction = rectify(network, x, reference, COEFFICIENTS, product=product, probes=None)
    assert prediction.dtype == direction.dtype == dtype
    want = products_of(dense_k(x.double()), NETWORK(x.double()).detach() - reference.double())[product]
    assert (direction.double() - want).norm() < tolerance * want.norm()


def test_half_precision_does_not_overflow() -> None:
    """The squared norm of a half-precision image exceeds 65,504, float16's largest number."""
    x = torch.full((2, 3, 16, 16), 20.0, dtype=torch.float16)
    direction = rectify(lambda z: 0.5 * z, x, torch.zeros_like(x), KCoefficients(1.0, -0.8)).direction
    torch.testing.assert_close(direction, torch.full_like(x, 10 * (1 - 0.8 * 0.5)), rtol=0.05, atol=0.05)


HALVES = [(torch.float16, 0.04), (torch.bfloat16, 0.12)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), *HALVES])
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
def test_a_network_in_lower_precision_than_its_input(dtype: torch.dtype, tolerance: float, state: torch.dtype) -> None:
    """The step follows the network, whose digits show in its output; the state's own step would be lost in rounding."""
    x, reference = inputs(dtype=state)
    network = Network().to(dtype)

    def mixed(z: Tensor) -> Tensor:
        return network(z.to(dtype)).to(state)

    def error(step: float | None) -> float:
        found = rectify(mixed, x, reference, COEFFICIENTS, relative_step=step)
        with torch.no_grad():
            exact = Network().to(dtype).double()
            delta = found.prediction.double() - reference.double()
            at_x = exact(x.double())
        want = rectify(exact, x.double(), at_x - delta, COEFFICIENTS, product="jvp").direction
        assert found.direction.dtype == state
        return float((found.direction.double() - want).norm() / want.norm())

    assert error(None) < tolerance
    if dtype != state:
        assert error(torch.finfo(state).eps ** 0.5) > 5 * error(None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(seed=st.integers(min_value=0, max_value=2**32), step=st.floats(min_value=2e-3, max_value=0.3))
@settings(max_examples=25)
def test_the_difference_divides_by_the_step_that_rounding_left(dtype: torch.dtype, seed: int, step: float) -> None:
    """For a multiple of the identity, evaluated exactly, K Δ has its length along Δ however x is rounded."""
    x, reference = inputs(seed, dtype)
    found = rectify(lambda z: 0.5 * z.float(), x, reference.float(), KCoefficients(0.0, 1.0), relative_step=step)
    delta = (0.5 * x.float() - reference.float()).flatten(1)
    along = (found.direction.flatten(1) * delta).sum(dim=1) / delta.square().sum(dim=1)
    torch.testing.assert_close(along, torch.full((BATCH,), 0.5), rtol=1e-4, atol=0)


def test_half_precision_at_the_ends_of_its_range() -> None:
    """Δ beyond float16's largest number, Δ among its smallest, no Δ, and no x: K Δ is finite, and right."""
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5)).half()
    wide = rectify(lambda z: 4e4 * z, x, -4e4 * x, KCoefficients(0.0, 0.25 / 4e4)).direction
    torch.testing.assert_close(wide.float(), 2e4 * x.float(), rtol=0.1, atol=300)
    coefficients = KCoefficients(0.0, 0.25)
    small = rectify(lambda z: 0.5 * z, x, 0.5 * x - 2e-7, coefficients).direction
    assert small.isfinite().all()
    nothing = rectify(lambda z: 0.5 * z, x, 0.5 * x, coefficients).direction
    assert torch.equal(nothing, torch.zeros_like(x))
    origin = torch.zeros_like(x)
    at_origin = rectify(lambda z: 0.5 * z, origin, -x, coefficients).direction
    torch.testing.assert_close(at_origin, 0.125 * x, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("shape", [(4,), (2, 5), (1, 2, 3, 4, 5)])
def test_any_shape_with_a_batch_dimension(shape: tuple[int, ...]) -> None:
    """An elementwise denoiser has a diagonal K, so all products agree with its derivative."""
    x, reference = torch.randn(2, *shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for product in PRODUCTS:
        direction = rectify(torch.sin, x, reference, COEFFICIENTS, product=product, probes=None).direction
        k = 1.0 if product == "none" else 1 - 0.8 * x.cos()
        torch.testing.assert_close(direction, k * (x.sin() - reference), rtol=1e-6, atol=1e-6)


def test_the_step_of_the_finite_difference_can_be_chosen() -> None:
    x, reference = inputs()
    want = products_of(dense_k(x), NETWORK(x).detach() - reference)["jvp"]

    def error(step: float) -> float:
        return (rectify(NETWORK, x, reference, COEFFICIENTS, relative_step=step).direction - want).norm().item()

    # A one-sided difference is of first order: a tenth of the step, a tenth of the error.
    assert error(1e-3) / error(1e-4) == pytest.approx(10, rel=0.1)
    assert error(1e-4) / error(1e-5) == pytest.approx(10, rel=0.1)


def test_bad_arguments_are_refused_by_name() -> None:
    x, reference = inputs()

    def call(**options: object) -> None:
        rectify(NETWORK, x, reference, COEFFICIENTS, **options)

    listed = "product must be one of none, ones, diagonal, vjp, jvp, finite_difference, got 'grad'"
    with pytest.raises(ValueError, match=listed):
        check_product("grad")
    with pytest.raises(ValueError, match=listed):
        call(product="grad")
    with pytest.raises(
        ValueError, match="probes must be an integer of at least 1, or None for the exact diagonal, got 0"
    ):
        call(product="diagonal", probes=0, generator=torch.Generator())
    with pytest.raises(ValueError, match="probes need a generator"):
        call(product="diagonal", probes=1)
    for step in (0.0, -1e-3, float("nan")):
        with pytest.raises(ValueError, match="relative_step must be positive"):
            call(relative_step=step)
    with pytest.raises(ValueError, match='product="ones" differentiates the denoiser'):
        rectify(lambda z: torch.ones_like(z), x, reference, COEFFICIENTS, product="ones")


def test_finite_difference_near_the_origin_in_one_dimension():
    """A step of x's own size would be lost in rounding where x is nearly 0."""
    x = torch.tensor([[-1.7e-16], [1e-9], [0.0], [0.5]], dtype=torch.float64)
    coefficients = rectification_coefficients("epsilon", 0.6, 0.8)
    reference = torch.full_like(x, 0.3)
    denoiser = lambda z: torch.tanh(2 * z + 0.1)  # noqa: E731
    directions = [
        rectify(denoiser, x, reference, coefficients, product=product, probes=None).direction
        for product in ("jvp", "finite_difference")
    ]
    assert torch.allclose(*directions, rtol=1e-6)


class TokensFirst(nn.Module):
    """Normalises a transposed view of its tokens, as the attention of diffusers' autoencoders and U-Nets does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.GroupNorm(2, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.mix(x.permute(0, 2, 3, 1)).flatten(1, 2)
        return self.norm(tokens.transpose(1, 2)).reshape(x.shape)


@pytest.mark.parametrize("network", [nn.GroupNorm(2, 4), TokensFirst()])
@pytest.mark.parametrize("strided", ["neither", "input", "direction", "both"])
def test_forward_mode_takes_any_strides(network, strided):
    """PyTorch's forward-mode group_norm reshapes by view, which channels-last inputs and tangents do not allow."""
    x, reference = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    network = network.double()
    if strided in ("input", "both"):
        x = x.to(memory_format=torch.channels_last)
    if strided in ("direction", "both"):
        reference = reference.to(memory_format=torch.channels_last)
    rectified = rectify(network, x, reference, COEFFICIENTS, product="jvp").direction
    delta = network(x).detach() - reference
    dense = torch.func.vmap(torch.func.jacrev(lambda point: network(point[None])[0]))(x.contiguous())
    want = COEFFICIENTS.identity * delta.flatten(1) + COEFFICIENTS.jacobian * torch.einsum(
        "bij,bj->bi", dense.reshape(len(x), delta[0].numel(), -1), delta.flatten(1)
    )
    assert torch.allclose(rectified.flatten(1), want, atol=1e-10)
