"""What a denoiser's output says about the clean sample, and how that fixes the rectification matrix K.

Noisy samples are `x = α x_0 + σ ε`, always in the coordinates the network itself is fed: variance preserving
(VP, α² + σ² = 1), variance exploding (VE, EDM; α = 1) or flow matching (α = 1 - σ). Prediction types carry
diffusers' names.

For every prediction type the clean estimate x̂_0 is affine in (x, output), hence
`K = α ∂x̂_0/∂x = a I + b ∂output/∂x` with two numbers a, b per noise level; and since at fixed x all output spaces are
affine images of one another, the same K acts on a guidance direction in any of them.
"""

from typing import Literal, NamedTuple, cast, get_args

from jaxtyping import Float
from torch import Tensor

from companion.arguments import check_choice

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)

Level = float | Float[Tensor, "..."]


class KCoefficients(NamedTuple):
    """The two numbers of `K = identity · I + jacobian · ∂output/∂x`: floats, or tensors that broadcast to a sample."""

    identity: Level
    jacobian: Level


def check_prediction_type(prediction_type: str) -> PredictionType:
    """The prediction type itself.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    return cast(PredictionType, prediction_type)


def rectification_coefficients(prediction_type: PredictionType, alpha: Level, sigma: Level) -> KCoefficients:
    """Coefficients of K for a network fed `x = alpha x_0 + sigma ε`.

    | output | x̂_0 | K |
    |---|---|---|
    | ε | (x - σ ε)/α | I - σ ∂ε/∂x |
    | x_0 | D | α ∂D/∂x |
    | v = α ε - σ x_0 (VP) | α x - σ v | α² I - α σ ∂v/∂x |
    | u = ε - x_0 (α = 1 - σ) | x - σ u | α I - α σ ∂u/∂x |

    Args:
        prediction_type: what the network predicts, in diffusers' words.
        alpha, sigma: the level in the network's own input coordinates. A sampler in VE coordinates that feeds the
            network `x/√(1+σ²)` (diffusers' Euler, Heun, LMS, ...) needs `alpha = 1/√(1+σ²)` and `sigma = σ/√(1+σ²)`.

    Raises:
        ValueError: unknown prediction type.
    """
    match check_prediction_type(prediction_type):
        case "epsilon":
            return KCoefficients(1.0, -sigma)
        case "sample":
            return KCoefficients(0.0, alpha)
        case "v_prediction":
            return KCoefficients(alpha * alpha, -alpha * sigma)
        case "flow_prediction":
            return KCoefficients(alpha, -alpha * sigma)


def clean_from_output(
    prediction_type: PredictionType, output: Float[Tensor, "..."], x: Float[Tensor, "..."], alpha: Level, sigma: Level
) -> Float[Tensor, "..."]:
    """The estimate x̂_0 that a network's output stands for (table above).

    Raises:
        ValueError: unknown prediction type.
    """
    match check_prediction_type(prediction_type):
        case "epsilon":
            return (x - sigma * output) / alpha
        case "sample":
            return output
        case "v_prediction":
            return alpha * x - sigma * output
        case "flow_prediction":
            return x - sigma * output


def output_from_clean(
    prediction_type: PredictionType, clean: Float[Tensor, "..."], x: Float[Tensor, "..."], alpha: Level, sigma: Level
) -> Float[Tensor, "..."]:
    """The output that stands for an estimate x̂_0; inverse of `clean_from_output` for `sigma > 0`.

    Raises:
        ValueError: unknown prediction type.
    """
    match check_prediction_type(prediction_type):
        case "epsilon":
            return (x - alpha * clean) / sigma
        case "sample":
            return clean
        case "v_prediction":
            return (alpha * x - clean) / sigma
        case "flow_prediction":
            return (x - clean) / sigma


def convert_output(
    output: Float[Tensor, "..."],
    x: Float[Tensor, "..."],
    alpha: Level,
    sigma: Level,
    *,
    source: PredictionType,
    target: PredictionType,
) -> Float[Tensor, "..."]:
    """A network's output in another parametrization, at the same x and level (`sigma > 0`).

    Raises:
        ValueError: unknown prediction type.
    """
    if check_prediction_type(source) == check_prediction_type(target):
        return output
    return output_from_clean(target, clean_from_output(source, output, x, alpha, sigma), x, alpha, sigma)
