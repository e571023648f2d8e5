"""The problems of the quick and the full suite, in the order in which they are measured."""

from dataclasses import replace
from itertools import chain, zip_longest
from typing import Literal, get_args

from companion.arguments import check_choice
from companion.exact.toys import Toy, scattered, toy
from companion.ranking.imperfect import IMPERFECTIONS
from companion.ranking.problems import Problem, imperfect, low_rank, perfect

Suite = Literal["quick", "full"]
SUITES: tuple[Suite, ...] = get_args(Suite)

LINE, PLANE, MANY = "perfect, 1D", "perfect, 2D", "perfect, 8 to 128D"
SEPARATED = "perfect, separated classes"
UNCONDITIONAL, WEAKER = "imperfect, unconditional reference", "imperfect, weaker reference"
SITUATIONS = (LINE, PLANE, MANY, SEPARATED, UNCONDITIONAL, WEAKER)
"""The groups in which rules are compared. In separated classes the clean picture determines its class, so that R_0 is
constant on it and no guidance is the optimum."""


def suite_problems(suite: Suite) -> list[Problem]:
    """The problems of a suite: every situation early, so that a run cut short is still about all of them.

    Raises:
        ValueError: unknown suite.
    """
    check_choice("suite", suite, SUITES)
    groups = _quick() if suite == "quick" else _full()
    return [problem for problem in chain.from_iterable(zip_longest(*groups)) if problem is not None]


def _quick() -> list[list[Problem]]:
    return [
        [perfect(toy("shared_mode"), 1.0, LINE), perfect(_random_line(0, 0), 3.0, LINE)],
        [perfect(toy("shared_blobs"), 1.0, PLANE), perfect(toy("isotropic"), 3.0, PLANE)],
        [perfect(low_rank(8, 1), 3.0, MANY)],
        [perfect(toy("moons"), 1.0, SEPARATED)],
        [imperfect(_narrow(0), 1.0, "blurred", autoguided=False)],
        [imperfect(_narrow(0), 1.0, "blurred", autoguided=True)],
    ]


def _full() -> list[list[Problem]]:
    weights = (1.0, 3.0)
    line = [perfect(toy("shared_mode"), w, LINE) for w in weights]
    line += [perfect(toy("paper_1d"), w, LINE, contains=False) for w in weights]
    line += [perfect(_random_line(i // 2, 2 * (i % 2)), weights[i // 2 % 2], LINE) for i in range(40)]
    shapes = ("shared_blobs", "isotropic", "anisotropic")
    plane = [perfect(toy(name), w, PLANE) for name in shapes for w in weights]
    plane += [perfect(low_rank(2, i, shared=i % 2), weights[i // 2], PLANE) for i in range(4)]
    sizes = ((8, 1, 0, 1.0), (8, 3, 1, 3.0), (32, 4, 1, 3.0), (32, 2, 1, 1.0), (8, 5, 0, 3.0), (128, 9, 2, 1.0))
    many = [perfect(low_rank(size, seed, shared=shared), w, MANY) for size, seed, shared, w in sizes]
    alone = ("moons", "pinwheel", "circles", "spiral", "swiss_roll", "checkerboard")
    separated = [perfect(toy(name), weights[i % 2], SEPARATED) for i, name in enumerate(alone)]
    repairs = []
    for autoguided in (False, True):
        kinds = [kind for kind in IMPERFECTIONS if kind != "broadened"]  # the same as blurred on a line
        group = [imperfect(_narrow(i), weights[i % 2], kinds[i // 2 % 3], autoguided=autoguided) for i in range(12)]
        wide = [toy("isotropic"), toy("shared_blobs"), toy("anisotropic"), low_rank(2, 1), low_rank(32, 4, shared=1)]
        kinds = [*IMPERFECTIONS, "blurred"]
        group[2:2] = [imperfect(d, weights[i % 2], kinds[i], autoguided=autoguided) for i, d in enumerate(wide)]
        repairs.append(group)
    return [line, plane, many, separated, *repairs]


def _random_line(seed: int, shared: int) -> Toy:
    return replace(scattered(seed, shared=shared), name=f"scattered {seed}, {shared} shared")


def _narrow(seed: int) -> Toy:
    return replace(scattered(seed, shared=2 * (seed % 2), std=0.1), name=f"scattered {seed}, narrow")
