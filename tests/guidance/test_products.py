"""The table of products: `apply_k` for a direction of its own, and that one row adds a product everywhere."""

import pytest
import torch

from companion import RectifiedGuidanceConfig, rectified_guidance
from companion.evaluation.sampling.evaluations import evaluations, scheduler_levels
from companion.guidance.products import PRODUCT_TABLE, PRODUCTS, Evaluation, ProductRow
from companion.guidance.rectification import apply_k, rectify
from companion.pipelines.configuration import check_preset
from tests.dense_products import products_of
from tests.guidance.test_rectification import COEFFICIENTS, NETWORK, dense_k, inputs
from tests.pipelines.test_hook import draw_dit
from tests.pipelines.tiny import tiny_dit


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("known", [False, True])
def test_apply_k_is_the_product_with_any_direction(product, known):
    x, direction = inputs(3)
    prediction = NETWORK(x).detach() if known else None
    result = apply_k(NETWORK, x, direction, COEFFICIENTS, product=product, prediction=prediction, probes=None)
    tolerance = 1e-6 if product == "finite_difference" else 1e-10
    expected = products_of(dense_k(x), direction)[product]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=10 * tolerance)
    assert not result.requires_grad and result.dtype == direction.dtype


@pytest.mark.parametrize("product", PRODUCTS)
def test_rectify_is_apply_k_with_the_guidance_direction(product):
    x, reference = inputs(4)
    prediction, direction = rectify(NETWORK, x, reference, COEFFICIENTS, product=product, probes=None)
    again = apply_k(NETWORK, x, prediction - reference, COEFFICIENTS, product=product, probes=None)
    torch.testing.assert_close(direction, again)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_row_says_what_its_product_costs(product):
    """Passes on top of the conditional and the reference prediction, counted at a network."""
    forward = backward = 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            nonlocal backward
            backward += 1
            return gradient

        @staticmethod
        def jvp(ctx, tangent):
            return tangent.clone()

    def network(z):
        nonlocal forward
        forward += 1
        return NETWORK(Counted.apply(z)) if z.requires_grad else NETWORK(z)

    x, reference = inputs()
    generator = torch.Generator().manual_seed(0)
    rectify(network, x, reference, COEFFICIENTS, product=product, probes=3, generator=generator)
    row = PRODUCT_TABLE[product]
    assert forward - 1 + backward == row.evaluations(probes=3)
    assert (backward > 0) == row.differentiates
    assert row.evaluations(None, dimensions=7) == (7 if product == "diagonal" else row.evaluations(3, 7))


def test_one_row_adds_a_product(monkeypatch):
    """A registered dummy is accepted, drawn with, counted and listed, with nothing else changed."""

    def half(evaluation: Evaluation, direction: torch.Tensor) -> torch.Tensor:
        return 0.5 * direction

    row = ProductRow("half", "half of it", "Δ/2", "nothing", 0, False, "#000000", half)
    monkeypatch.setitem(PRODUCT_TABLE, "half", row)
    pipe, steps = tiny_dit(), []
    config = RectifiedGuidanceConfig(product="half")
    with rectified_guidance(pipe, config, on_step=steps.append):
        drawn = draw_dit(pipe)
    with rectified_guidance(pipe, RectifiedGuidanceConfig(product="none", weight=0.5)):
        assert torch.allclose(drawn, draw_dit(pipe), atol=1e-10)
    levels = scheduler_levels(pipe.scheduler, len(steps))
    assert steps[-1].spent == evaluations(config, levels) == 2 * len(steps)
    assert check_preset("half") == "half" and config.row.label == "half of it"
    with pytest.raises(ValueError, match="finite_difference, half, got 'third'"):
        RectifiedGuidanceConfig(product="third")
