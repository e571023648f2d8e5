"""How far results on a grid can be trusted: against half its points, and against four times as many."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from companion.deprecation import RenamedAttribute
from companion.exact.chain import DDPMChain, LogReward
from companion.exact.directions import Field
from companion.exact.grids import Grid, interpolate


@dataclass(frozen=True)
class Accuracy:
    """Differences between a grid and one of half the points, at the finer grid's points.

    Attributes:
        grid, half: the two grids.
        log_expected: largest difference of log E_t over all t and points.
        optimal: RMS difference of the optimal direction over all t and points, relative to its RMS.
        optimal_per_step: the same for each t = 1 … T.
    """

    grid: Grid
    half: Grid
    log_expected: float
    optimal: float
    optimal_per_step: tuple[float, ...]

    golden = RenamedAttribute("golden", "optimal")
    golden_per_step = RenamedAttribute("golden_per_step", "optimal_per_step")


def accuracy(chain: DDPMChain, grid: Grid, log_reward: LogReward) -> Accuracy:
    """Grid halving: how far results move between half the points and all of them. The error of the full grid is
    smaller.
    """
    half = grid.with_points(*((points + 1) // 2 for points in grid.shape))
    (fine, optimal), (coarse, rough) = (chain.optimum(g, log_reward) for g in (grid, half))

    def onto(values: Float[Tensor, "steps+1 ..."]) -> Float[Tensor, "steps+1 ..."]:
        moved = interpolate(half, values.movedim(0, -1), grid.points)
        return moved.movedim(-1, 0).reshape(len(values), *grid.shape, *moved.shape[1:-1])

    error = (optimal - onto(rough)).square().flatten(1)[1:]
    scale = optimal[1:].square().mean().sqrt().clamp(min=1e-300)
    return Accuracy(
        grid,
        half,
        float((fine - onto(coarse)).abs().max()),
        float(error.mean().sqrt() / scale),
        tuple((error.mean(dim=1).sqrt() / scale).tolist()),
    )


def weighted_error(found: Field, exact: Field, densities: Float[Tensor, "steps+1 *grid"]) -> float:
    """Density-weighted relative error `√(Σ_t E‖found - exact‖² / Σ_t E‖exact‖²)` of a direction over t = 1 … T.

    Args:
        found, exact: on one grid.
        densities: of x_t there, such as `p(x_t|y)`; what lies where there are no samples does not count.
    """
    weights = densities[1:].clamp(min=0)
    weights = weights / weights.flatten(1).sum(dim=1).reshape(-1, *[1] * (weights.ndim - 1))
    error = (weights * (found - exact)[1:].square().sum(dim=-1)).sum()
    return float((error / (weights * exact[1:].square().sum(dim=-1)).sum().clamp(min=1e-300)).sqrt())


def optimum_error(
    chain: DDPMChain,
    grid: Grid,
    log_reward: LogReward,
    densities: Float[Tensor, "steps+1 *grid"],
    *,
    times: int = 4,
    **options: float,
) -> float:
    """`weighted_error` of the optimal direction on a grid against one `times` as fine, itself refined nowhere.

    Args:
        densities: of x_t on the grid.
        options: of `DDPMChain.optimum`, for both; `finest` for the grid's own.
    """
    found = chain.optimum(grid, log_reward, **options).direction  # type: ignore[arg-type]
    exact = chain.optimum(grid.refined(times), log_reward, **{**options, "finest": 0}).direction  # type: ignore[arg-type]
    for axis in range(1, grid.dimension + 1):
        exact = exact.index_select(axis, exact.new_tensor(range(0, exact.shape[axis], times)).long())
    return weighted_error(found, exact, densities)
