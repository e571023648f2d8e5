"""The default step of the finite difference lies near the best one, in every precision; what it costs to be wrong."""

import pytest
import torch

import companion
from companion.evaluation.studies.finite_difference import (
    PRECISIONS,
    DifferenceProblem,
    difference_errors,
    mixture_problem,
    pipeline_problems,
)
from companion.guidance.parametrization import KCoefficients

STEPS = [2.0**-power for power in range(1, 15)]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_default_step_is_near_the_best(precision):
    default, *others = difference_errors(
        mixture_problem(0.3), PRECISIONS[precision], [None, *STEPS]
    ).of_direction.tolist()
    assert default < BOUND[precision]
    assert default < 4 * min(others)


BOUND = {
    "fp32": 2e-3,
    "fp16": 0.07,
    "bf16": 0.25,
    "fp32 state, fp16 network": 0.07,
    "fp32 state, bf16 network": 0.25,
}


def test_a_trained_network_along_its_own_run():
    pipe = companion.load("mini-dit")
    pipe.set_progress_bar_config(disable=True)
    problems = pipeline_problems(pipe, [3, 7], companion.sample_generators(0, range(2)), steps=5, chosen=(0, 2, 4))
    for problem in problems:
        for name, precision in PRECISIONS.items():
            errors = difference_errors(problem, precision, [None, torch.finfo(torch.float32).eps ** 0.5])
            default, single = errors.of_direction.tolist()
            assert default < (0.005 if name == "fp32" else 0.15 if "fp16" in name else 0.45), (problem.name, name)
            if name == "fp32 state, bf16 network":
                assert single > 10 * default  # the step that the state's dtype alone would suggest


def test_errors_of_a_bent_line():
    """ε(x) = x²/2: a step h along Δ = 1 from x = 1 is wrong by h/2, K = 1 - σ x."""
    x = torch.ones(1, 1, dtype=torch.float64)
    problem = DifferenceProblem(
        "parabola", lambda weights, dtype: lambda z: z**2 / 2, x, x**2 / 2 - 1, KCoefficients(1.0, -0.5)
    )
    errors = difference_errors(problem, PRECISIONS["fp32"]._replace(state=torch.float64), [0.5, 0.25])
    assert errors.of_direction.tolist() == pytest.approx([0.125, 0.0625], rel=1e-5)
    assert errors.of_product.tolist() == pytest.approx([0.25, 0.125], rel=1e-5)
