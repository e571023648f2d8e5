"""Guidance methods on mixture data side by side: how far each direction is from the optimal one (the paper calls it
golden), and the chain it makes.

Scores are exact, so K of the conditional branch is a closed form and serves all products at once. It is symmetric: the
products `vjp`, `jvp` and `finite_difference` of `companion.guidance` are one and the same here, called `jvp`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from companion.deprecation import RenamedAttribute
from companion.exact.chain import FINEST, DDPMChain, NoiseSchedule, mixture_prediction
from companion.exact.directions import Field, direction_error, direction_field, win_ratio
from companion.exact.grids import Grid, evaluate
from companion.exact.mixtures import GaussianMixture
from companion.exact.rewards import Reward, classifier_free_reward, tilted_density
from companion.exact.sampling import energy_distance
from companion.exact.toys import Toy

METHODS = ("CFG", "ones", "diagonal", "jvp")
BANDS = ("noisy", "middle", "clean")
"""Thirds of the steps, in the order in which a sampler meets them."""
CHUNK = 1024
"""Points evaluated at a time: with a hundred Gaussians still small enough for the processor's cache."""


@dataclass(frozen=True)
class Comparison:
    """Every direction for one class of a toy at one weight; fields and densities for t = 0 … T on the grid.

    Attributes:
        data, label, weight: the problem; w is the paper's (0 is no guidance).
        grid: where the fields are known.
        reward: `[p(x|y)/p(x)]^w`.
        chain: unguided.
        fields: per method the shift that is added to the conditional prediction, w included.
        optimal: `-√(1-ᾱ_t) ∇ log E_t`.
        densities: `p(x_t|y)` of the data.
    """

    data: Toy
    label: int
    weight: float
    grid: Grid
    reward: Reward
    chain: DDPMChain
    fields: dict[str, Field]
    optimal: Field
    densities: Float[Tensor, "steps+1 *grid"]

    golden = RenamedAttribute("golden", "optimal")


def compare(
    data: Toy,
    weights: Sequence[float],
    grid: Grid,
    schedule: NoiseSchedule,
    *,
    label: int = 0,
    kinks: bool = False,
    finest: int = FINEST,
) -> list[Comparison]:
    """All directions on a grid, one comparison per weight; only the optimal one has to be computed for each.

    Args:
        weights: the paper's w.
        grid: fine enough for the data's narrowest Gaussian (`accuracy` tells); must hold the reward's largest values.
        kinks, finest: of `DDPMChain.optimum`.

    Raises:
        ValueError: no weights, or a label without data.
    """
    if not weights:
        raise ValueError("weights must hold at least one number, got none")
    if not 0 <= label < len(data.classes):
        raise ValueError(f"label must be in 0..{len(data.classes) - 1}, got {label}")
    conditional, unconditional = data.classes[label], data.unconditional
    chain = DDPMChain(mixture_prediction(conditional, schedule), schedule)
    unit = unit_fields(grid, conditional, unconditional, schedule)
    levels = [schedule.level(t) for t in range(schedule.steps + 1)]
    densities = torch.stack([evaluate(grid, partial(_density, conditional, level), chunk=CHUNK) for level in levels])
    comparisons = []
    for weight in weights:
        reward = classifier_free_reward(conditional, unconditional, weight)
        # The reward's largest value on the grid, and a little for what lies between its points.
        bound = float(evaluate(grid, reward).max()) + 0.1
        optimal = chain.optimum(grid, reward, bound=bound, kinks=kinks, finest=finest).direction
        fields = {name: weight * field for name, field in unit.items()}
        comparisons.append(Comparison(data, label, weight, grid, reward, chain, fields, optimal, densities))
    return comparisons


def unit_fields(
    grid: Grid, conditional: GaussianMixture, unconditional: GaussianMixture, schedule: NoiseSchedule
) -> dict[str, Field]:
    """`CFG` and the products of K without the weight, for t = 0 … T (zero at t = 0), with one K for all."""

    def directions(x: Float[Tensor, "batch dim"], t: int) -> Float[Tensor, "batch methods dim"]:
        level = schedule.level(t)
        delta = conditional.noise(x, *level) - unconditional.noise(x, *level)
        k = conditional.rectification_matrix(x, *level)
        return torch.stack([multiply(name, k, delta) for name in METHODS], dim=1)

    return dict(zip(METHODS, direction_field(grid, directions, schedule.steps, CHUNK).unbind(dim=-2), strict=True))


def target_density(comparison: Comparison, grid: Grid) -> Float[Tensor, "*grid"]:
    """The target `p(x_0|y) R_0(x_0) / Z` of the data on any grid."""
    return tilted_density(grid, comparison.data.classes[comparison.label], comparison.reward)


def band_means(per_step: Float[Tensor, " steps"]) -> dict[str, float]:
    """Means over thirds of t = 1 … T, by the names in `BANDS`, and over `all`.

    Raises:
        ValueError: fewer than three steps.
    """
    if len(per_step) < len(BANDS):
        raise ValueError(f"bands need at least {len(BANDS)} steps, got {len(per_step)}")
    parts = per_step.flip(0).tensor_split(len(BANDS))
    means = {name: float(part.mean()) for name, part in zip(BANDS, parts, strict=True)}
    return means | {"all": float(per_step.mean())}


def win_ratios(comparison: Comparison, method: str, *, weighted: bool) -> dict[str, float]:
    """Share of the grid (weighted: of the mass of `p(x_t|y)`) where a method is closer to the optimum than CFG, per
    band."""
    densities = comparison.densities if weighted else None
    return band_means(win_ratio(comparison.fields[method], comparison.fields["CFG"], comparison.optimal, densities))


def win_ratio_table(
    comparisons: Sequence[Comparison], methods: Sequence[str] = METHODS[1:]
) -> tuple[list[tuple[str, float, str]], Float[Tensor, "rows columns"]]:
    """Win ratios of many comparisons: a row for each (toy, weight, method); the columns are the bands and `all`, first
    uniform over the grid, then weighted by `p(x_t|y)`."""
    names, rows = [], []
    for comparison in comparisons:
        for method in methods:
            names.append((comparison.data.name, comparison.weight, method))
            ratios = [win_ratios(comparison, method, weighted=weighted) for weighted in (False, True)]
            rows.append([value for ratio in ratios for value in ratio.values()])
    return names, torch.tensor(rows, dtype=torch.float64)


def mean_errors(comparison: Comparison, method: str, *, weighted: bool) -> dict[str, float]:
    """Mean distance of a method's shift to the optimal one, in units of ε, per band."""
    densities = comparison.densities if weighted else None
    return band_means(direction_error(comparison.fields[method], comparison.optimal, densities))


def gains(field: Field, cfg: Field, densities: Float[Tensor, "steps+1 *grid"]) -> Float[Tensor, " steps"]:
    """How strongly a shift guides at t = 1 … T in multiples of CFG: the least-squares factor
    `E⟨field, cfg⟩ / E‖cfg‖²` over the densities; CFG itself has 1."""
    weights = densities[1:].clamp(min=0)
    shared = (weights * (field * cfg)[1:].sum(dim=-1)).flatten(1).sum(dim=1)
    return shared / (weights * cfg[1:].square().sum(dim=-1)).flatten(1).sum(dim=1)


def noise_floor(
    draw: Callable[[int], Float[Tensor, "count dim"]], count: int, *, pairs: int = 10
) -> tuple[float, float]:
    """Mean and largest energy distance between two independent draws of the same distribution, over several pairs.

    Raises:
        ValueError: no pairs.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    values = [energy_distance(draw(count), draw(count)) for _ in range(pairs)]
    return sum(values) / pairs, max(values)


def text_table(columns: Sequence[str], rows: Mapping[str, Sequence[float]], *, digits: int = 3) -> str:
    """Numbers under their columns' names, one named row each; what rounds to zero is printed without a sign.

    Raises:
        ValueError: a row has not one number per column.
    """
    for name, values in rows.items():
        if len(values) != len(columns):
            raise ValueError(f"row {name!r} must hold {len(columns)} numbers, one per column, got {len(values)}")
    first = max(map(len, rows), default=0)
    widths = [max(len(column), digits + 3) + 2 for column in columns]
    lines = [" " * first + "".join(f"{column:>{width}}" for column, width in zip(columns, widths, strict=True))]
    for name, values in rows.items():
        cells = [f"{round(value, digits) + 0.0:>{w}.{digits}f}" for value, w in zip(values, widths, strict=True)]
        lines.append(f"{name:<{first}}" + "".join(cells))
    return "\n".join(lines)


def _density(mixture: GaussianMixture, level: tuple[float, float], x: Tensor) -> Tensor:
    return mixture.log_prob(x, *level).exp()


def multiply(name: str, k: Float[Tensor, "batch dim dim"] | None, delta: Tensor) -> Float[Tensor, "batch dim"]:
    """A product of K with Δ by its name in `METHODS`; `CFG` is Δ itself."""
    if k is None or name == "CFG":
        return delta
    if name == "ones":
        return delta * k.sum(dim=1)
    if name == "diagonal":
        return delta * k.diagonal(dim1=1, dim2=2)
    return (k @ delta[..., None])[..., 0]
