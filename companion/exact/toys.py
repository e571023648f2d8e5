"""Toy data as Gaussian mixtures, so that scores, optimal gradients and targets are exact.

Every 2D set is scaled to about unit size (variance-preserving chains end in N(0, I)) and split into classes; the
unconditional data mix all classes equally unless stated otherwise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from companion.arguments import check_choice
from companion.exact.grids import Grid
from companion.exact.mixtures import GaussianMixture, mixture_of


@dataclass(frozen=True)
class Toy:
    """Class-conditional data and a region that holds them.

    Attributes:
        name: as in `TOYS`.
        classes: one mixture per class.
        unconditional: the reference of classifier-free guidance.
        low, high: ends of an axis that holds the clean data with room around them.
    """

    name: str
    classes: tuple[GaussianMixture, ...]
    unconditional: GaussianMixture
    low: float = -3.0
    high: float = 3.0

    def grid(self, points: int, margin: float = 0.0) -> Grid:
        """A grid over that region, widened by `margin` on each side (3 holds N(0, I) to 1e-6 as well)."""
        low, high = self.low - margin, self.high + margin
        return Grid.line(low, high, points) if self.classes[0].dimension == 1 else Grid.square(low, high, points)


def toy(name: str) -> Toy:
    """A toy by its name.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    check_choice("toy", name, TOYS)
    return TOYS[name]()


def paper_1d() -> Toy:
    """The REG paper's 1D setting: two narrow conditional modes, two broad unconditional ones (Figures 1 and 5)."""
    conditional = GaussianMixture.isotropic([0.5, 0.5], [[0.5], [1.5]], 0.25)
    unconditional = GaussianMixture.isotropic([0.5, 0.5], [[-1.0], [1.0]], 0.5)
    return Toy("paper_1d", (conditional,), unconditional)


def shared_mode() -> Toy:
    """1D: a mode of its own on the right and, on the left, one shared with another class. Guidance must move mass from
    the left to the right: `R_0` differs by `3^w` between them."""
    conditional = GaussianMixture.isotropic([0.5, 0.5], [[-0.6], [1.8]], 0.25)
    other = GaussianMixture.isotropic([1.0], [[-0.6]], 0.25)
    return Toy("shared_mode", (conditional, other), mixture_of([conditional, other]))


def shared_blobs() -> Toy:
    """`shared_mode` in the plane: a round blob of its own on the right and two shared with the other class."""
    common = [[-0.9, 0.8], [-0.7, -1.0]]
    first = GaussianMixture.isotropic([0.4, 0.3, 0.3], [[1.2, 0.2], *common], 0.3)
    other = GaussianMixture.isotropic([0.5, 0.5], common, 0.3)
    return Toy("shared_blobs", (first, other), mixture_of([first, other]))


def scattered(seed: int, *, shared: int = 0, std: float = 0.25) -> Toy:
    """A random 1D problem: two classes of three Gaussians each, uniform in [-1.8, 1.8], of unequal weights.

    Args:
        seed: another number, another problem.
        shared: how many of the first class's Gaussians the second class has too, 0 to 3: guidance moves mass away from
            them.
        std: of every Gaussian.

    Raises:
        ValueError: `shared` outside 0..3.
    """
    if not 0 <= shared <= 3:
        raise ValueError(f"shared must be in 0..3, got {shared}")
    generator = torch.Generator().manual_seed(seed)
    means = 3.6 * torch.rand(2, 3, 1, generator=generator, dtype=torch.float64) - 1.8
    weights = torch.rand(2, 3, generator=generator, dtype=torch.float64) + 0.2
    means[1, :shared] = means[0, :shared]
    classes = tuple(GaussianMixture.isotropic(weights[i], means[i], std) for i in range(2))
    return Toy(f"scattered {seed}", classes, mixture_of(classes))


def isotropic() -> Toy:
    """Round blobs, three to a class, sharing the plane."""
    stds = 0.3
    first = GaussianMixture.isotropic([0.5, 0.3, 0.2], [[-1.0, 0.0], [0.6, 0.9], [0.8, -0.9]], stds)
    second = GaussianMixture.isotropic([0.4, 0.4, 0.2], [[1.0, 0.1], [-0.5, 1.0], [-0.7, -1.0]], stds)
    return Toy("isotropic", (first, second), mixture_of([first, second]))


def anisotropic() -> Toy:
    """Elongated Gaussians, each class rotated its own way, so that K is far from diagonal."""

    def rotated(degrees: float) -> Tensor:
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
        return turn @ torch.diag(torch.tensor([0.7, 0.12], dtype=torch.float64) ** 2) @ turn.T

    first = GaussianMixture([0.6, 0.4], [[-0.4, 0.3], [0.6, -0.5]], torch.stack([rotated(45), rotated(30)]))
    second = GaussianMixture([0.5, 0.5], [[0.4, 0.5], [-0.5, -0.6]], torch.stack([rotated(-50), rotated(-35)]))
    return Toy("anisotropic", (first, second), mixture_of([first, second]))


def spiral() -> Toy:
    """Two interleaved spiral arms, one to a class."""
    turns = torch.linspace(0.15, 1.0, 28, dtype=torch.float64)
    arm = 1.7 * turns[:, None] * _circle(2 * math.pi * 1.4 * turns)
    return _curves("spiral", [arm, -arm], 0.09)


def moons() -> Toy:
    """Two moons, one to a class."""
    angle = torch.linspace(0, math.pi, 20, dtype=torch.float64)
    upper = _circle(angle) - torch.tensor([0.5, 0.25])
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1) - torch.tensor([0.5, 0.25])
    return _curves("moons", [1.2 * upper, 1.2 * lower], 0.12)


def circles() -> Toy:
    """Two concentric circles, one to a class."""
    inner, outer = (
        radius * _circle(torch.arange(n, dtype=torch.float64) * (2 * math.pi / n))
        for radius, n in ((0.7, 20), (1.6, 40))
    )
    return _curves("circles", [inner, outer], 0.1)


def swiss_roll() -> Toy:
    """One roll; its inner and outer turns are the classes."""
    turns = torch.linspace(1.5 * math.pi, 4.5 * math.pi, 60, dtype=torch.float64)
    roll = turns[:, None] * _circle(turns) / (2.6 * math.pi)
    return _curves("swiss_roll", [roll[:30], roll[30:]], 0.08)


def checkerboard() -> Toy:
    """A 4 x 4 board's dark squares as lattices of small Gaussians; left and right half are the classes."""
    side, count = 0.9, 5
    step = side / count
    lattice = (torch.arange(count, dtype=torch.float64) + 0.5) * step
    tile = torch.cartesian_prod(lattice, lattice)
    halves: list[list[Tensor]] = [[], []]
    for i in range(4):
        for j in range(4):
            if (i + j) % 2 == 0:
                halves[i // 2].append(tile + side * torch.tensor([i - 2.0, j - 2.0]))
    return _curves("checkerboard", [torch.cat(half) for half in halves], 0.55 * step)


def pinwheel() -> Toy:
    """Five bent arms of elongated Gaussians, one to a class."""
    arms = []
    for arm in range(5):
        radius = torch.linspace(0.45, 1.9, 9, dtype=torch.float64)
        angle = 2 * math.pi * arm / 5 + 0.55 * radius
        outward, across = _circle(angle), _circle(angle + math.pi / 2)
        covariances = 0.13**2 * _outer(outward) + ((0.05 + 0.08 * radius)[:, None, None]) ** 2 * _outer(across)
        arms.append(GaussianMixture(torch.ones(9), radius[:, None] * outward, covariances))
    return Toy("pinwheel", tuple(arms), mixture_of(arms))


def eight_gaussians() -> Toy:
    """Eight Gaussians on a circle, alternately of two classes."""
    ring = 1.6 * _circle(torch.arange(8, dtype=torch.float64) * math.pi / 4)
    return _curves("eight_gaussians", [ring[::2], ring[1::2]], 0.16)


def tree() -> Toy:
    """Two fractal trees that branch four times, as in Karras et al. 2024: fine structure inside every class."""
    classes = []
    for direction in (math.radians(50), math.radians(230)):
        means, covariances, weights = [], [], []
        # (start, angle, length, width) of every twig; children are shorter and turn away to both sides.
        twigs = [(torch.zeros(2, dtype=torch.float64), direction, 0.8, 0.09)]
        for depth in range(5):
            grown = []
            for start, angle, length, width in twigs:
                along = _circle(torch.tensor([angle], dtype=torch.float64))[0]
                end = start + length * along
                for place in (0.17, 0.5, 0.83):
                    means.append(start + place * (end - start))
                    covariances.append((length / 5) ** 2 * torch.outer(along, along) + width**2 * torch.eye(2))
                    weights.append(0.5**depth)
                grown += [(end, angle + turn, 0.66 * length, 0.8 * width) for turn in (-0.55, 0.65)]
            twigs = grown
        classes.append(GaussianMixture(weights, torch.stack(means).tolist(), torch.stack(covariances)))
    return Toy("tree", tuple(classes), mixture_of(classes))


def snowflake() -> Toy:
    """Koch curves of the second order: a flake and, turned by 60 degrees and smaller, another inside it."""

    def koch(corners: Tensor) -> Tensor:
        for _ in range(2):
            a, b = corners, corners.roll(-1, 0)
            third = (b - a) / 3
            outward = torch.stack([third[:, 1], -third[:, 0]], dim=1) * math.sqrt(3) / 2
            corners = torch.stack([a, a + third, a + 1.5 * third + outward, a + 2 * third], dim=1).reshape(-1, 2)
        return corners

    corners = _circle(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64) * 2 * math.pi / 3 + math.pi / 2)
    outer = koch(1.8 * corners)
    # Two Gaussians to an edge draw the line without beads.
    outer = torch.stack([outer, 0.5 * (outer + outer.roll(-1, 0))], dim=1).reshape(-1, 2)
    return _curves("snowflake", [outer, -0.55 * outer], 0.06)


def _curves(name: str, curves: list[Float[Tensor, "points 2"]], std: float) -> Toy:
    """One class per curve: equal round Gaussians along it."""
    classes = tuple(GaussianMixture.isotropic(torch.ones(len(curve)), curve, std) for curve in curves)
    return Toy(name, classes, mixture_of(classes))


def _circle(angle: Float[Tensor, " points"]) -> Float[Tensor, "points 2"]:
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _outer(vectors: Float[Tensor, "points 2"]) -> Float[Tensor, "points 2 2"]:
    return vectors[:, :, None] * vectors[:, None, :]


TOYS: dict[str, Callable[[], Toy]] = {
    function.__name__: function
    for function in (
        paper_1d,
        shared_mode,
        shared_blobs,
        isotropic,
        anisotropic,
        spiral,
        tree,
        snowflake,
        moons,
        circles,
        swiss_roll,
        checkerboard,
        pinwheel,
        eight_gaussians,
    )
}
"""Every toy by its name; `paper_1d` and `shared_mode` are 1D."""
