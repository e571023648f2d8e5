"""Two small networks for the tree, conditional and unconditional, and every guidance direction that they make.

The REG paper's Figure 2 and Table 1 compare the directions of a small network. The sources at hand do not describe that
network or its data, so these take the recipe that they give for one dimension (`companion.exact.networks`) to the tree,
at a schedule that ends in noise.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from companion.exact.chain import DDPMChain, NoiseSchedule, Prediction, linear_schedule
from companion.exact.comparison import METHODS, Comparison, multiply
from companion.exact.covariance import jacobian_matrix
from companion.exact.directions import direction_field
from companion.exact.grids import Grid, evaluate
from companion.exact.pretrained import WEIGHTS, ToyNetworks
from companion.exact.rewards import classifier_free_reward
from companion.exact.toys import tree

STEPS = 25


def tree_schedule() -> NoiseSchedule:
    """What the networks were trained at: 25 steps, β from 1e-3 to 0.36; at its end the data are noise."""
    return linear_schedule(STEPS, 1e-3, 9 / STEPS)


TREE = ToyNetworks(
    WEIGHTS / "tree-2d",
    tree(),
    tree_schedule(),
    "1e-3 to 0.36, linear",
    "# tree-2d\n\n"
    "Noise predictions for `companion.exact.toy('tree')`: `conditional` learns class 0, `unconditional` both."
    "\n`companion.exact.pretrained_2d.load_tree()`; notebook 05 compares their directions.",
    "companion.exact.pretrained_2d.retrain_tree",
)
load_tree = TREE.load
"""`ToyNetworks.load` of the tree's networks."""
retrain_tree = TREE.retrain
"""`ToyNetworks.retrain` of the tree's networks."""


def network_shift(
    branches: dict[str, Prediction], name: str, schedule: NoiseSchedule, x: Float[Tensor, "batch dim"], t: int
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
    """The conditional prediction and a method's direction (`METHODS`), K by backpropagation; no weight."""
    prediction = branches["conditional"](x, t)
    delta = prediction - branches["unconditional"](x, t)
    k = None if name == "CFG" else jacobian_matrix(branches["conditional"], x, t, schedule)
    return prediction.detach(), multiply(name, k, delta).detach()


def network_comparison(branches: dict[str, Prediction], weight: float, grid: Grid, *, finest: int = 0) -> Comparison:
    """The tree's directions as the networks make them, and the optimal one of the chain that they make.

    The reward is the data's own `[p(x_0|y)/p(x_0)]^w`. Reported densities are the data's.

    Args:
        branches: predictions `conditional` and `unconditional`.
        weight: the paper's w.
        finest: of `DDPMChain.optimum`.
    """
    data, schedule = tree(), tree_schedule()
    reward = classifier_free_reward(data.classes[0], data.unconditional, weight)
    chain = DDPMChain(branches["conditional"], schedule)

    def directions(x: Float[Tensor, "batch dim"], t: int) -> Float[Tensor, "batch methods dim"]:
        k = jacobian_matrix(branches["conditional"], x, t, schedule)
        _, delta = network_shift(branches, "CFG", schedule, x, t)
        return weight * torch.stack([multiply(name, k, delta) for name in METHODS], dim=1)

    bound = float(evaluate(grid, reward).max()) + 0.1
    levels = [schedule.level(t) for t in range(schedule.steps + 1)]
    densities = [data.classes[0].log_prob(grid.points, *level).exp().reshape(grid.shape) for level in levels]
    return Comparison(
        data,
        0,
        weight,
        grid,
        reward,
        chain,
        dict(zip(METHODS, direction_field(grid, directions, schedule.steps).unbind(dim=-2), strict=True)),
        chain.optimum(grid, reward, bound=bound, finest=finest).direction,
        torch.stack(densities),
    )


def network_chains(branches: dict[str, Prediction], comparison: Comparison) -> dict[str, DDPMChain]:
    """The chain of each method by name, `unguided` first, `optimal` last, as the networks make them."""
    chain = comparison.chain

    def prediction(name: str, x: Float[Tensor, "batch dim"], t: int) -> Float[Tensor, "batch dim"]:
        noise, shift = network_shift(branches, name, chain.schedule, x, t)
        return noise + comparison.weight * shift

    guided = {name: chain.with_prediction(partial(prediction, name)) for name in METHODS}
    optimal = chain.with_prediction(chain.optimal_prediction(comparison.grid, comparison.optimal))
    return {"unguided": chain, **guided, "optimal": optimal}
