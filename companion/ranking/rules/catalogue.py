"""Every rule of the ranking by its name, with its source and what it can be run on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from companion.ranking.problems import Problem
from companion.ranking.rules import adaptive, projections, rectified, schedules, whole_runs


@dataclass(frozen=True)
class Rule:
    """A guidance rule.

    Attributes:
        name: as shown.
        source: paper, by its arXiv number where there is one.
        function: of one `Step`, or for `whole` of one `WholeRun`.
        whole: the method runs the sampler itself.
        settings: further versions of the function, among which only the oracle chooses.
        smallest, largest: dimensions in which it is defined and affordable.
        scaled: strength changes it; False for no guidance.
        needs_weaker, needs_class: problems it can be run on: those with a weaker model, those whose reference
            contains the class.
        networks: the only networks that it is for; None for both.
        on_a_line: the rule that it is in one dimension, if it is one there.
        note: what a reader should know.
    """

    name: str
    source: str
    function: Callable[..., Any]
    whole: bool = False
    settings: tuple[Callable[..., Any], ...] = ()
    smallest: int = 1
    largest: int | None = None
    scaled: bool = True
    needs_weaker: bool = False
    needs_class: bool = False
    networks: str | None = None
    on_a_line: str | None = None
    note: str = ""

    def applies(self, problem: Problem) -> bool:
        """Whether it can be run on a problem."""
        if problem.dimension < self.smallest or (self.largest is not None and problem.dimension > self.largest):
            return False
        if self.networks is not None and problem.networks != self.networks:
            return False
        return not (self.needs_weaker and problem.weaker is None) and not (self.needs_class and problem.prior is None)


INTERVALS = ((0.2, 1.5), (0.2, 5.8), (0.56, 1.5))
"""σ/α between which the oracle's interval guidance may guide, in addition to the published one."""

_RULES = (
    Rule("none", "", schedules.unguided, scaled=False),
    Rule("CFG", "2207.12598", schedules.cfg),
    Rule("CFG, linear", "2404.13040", schedules.linear),
    Rule("CFG, cosine", "2404.13040", schedules.cosine),
    Rule(
        "interval",
        "2404.07724",
        schedules.interval,
        settings=tuple(partial(schedules.interval, low=low, high=high) for low, high in INTERVALS),
        note="published interval of EDM2-S-512, scaled to these data; the oracle also chooses among three others",
    ),
    Rule("rescaled", "2305.08891", schedules.rescaled_cfg, smallest=2),
    Rule(
        "APG",
        "2410.02416",
        projections.apg,
        smallest=2,
        on_a_line="none",
        note="on a line its projection leaves nothing",
    ),
    Rule("CFG-Zero*", "2503.18886", projections.cfg_zero_star),
    Rule("CFG++", "2406.08070", schedules.cfg_plus_plus),
    Rule("tangential", "2503.18137", projections.tangential, smallest=2, on_a_line="CFG"),
    Rule("power-law", "2502.07849", projections.power_law),
    Rule("feedback", "2506.06085", adaptive.feedback, note="has no w: the strength scales its guidance scale less 1"),
    Rule("characteristic", "2312.07586", adaptive.characteristic, note="without the projection for latent images"),
    Rule("angle-domain", "2506.11039", projections.angle_domain, smallest=2),
    Rule(
        "β-CFG",
        "2502.10574",
        schedules.beta_cfg,
        smallest=2,
        note="divides Δ by its norm, so that its w belongs to one size of sample; on a line nothing but a sign is left",
    ),
    Rule("foresight", "2510.21512", adaptive.foresight),
    Rule("sliding-mode", "2603.03281", adaptive.sliding_mode),
    Rule("magnitude-aware", "2508.03442", projections.magnitude_aware),
    Rule("Gibbs-like", "2505.21101", whole_runs.gibbs_like, whole=True),
    Rule("autoguidance", "2406.02507", schedules.autoguidance, needs_weaker=True),
    Rule("REG", "2501.18865", rectified.reg, note="KΔ: vjp, jvp and finite_difference are one for exact scores"),
    Rule("REG, ones", "2501.18865", rectified.reg_ones, smallest=2, on_a_line="REG"),
    Rule("REG, diagonal", "2501.18865", rectified.reg_diagonal, smallest=2, on_a_line="REG"),
    Rule("REG, every 3rd", "this package", rectified.reg_reused),
    Rule("covariance", "this package", rectified.covariance),
    Rule(
        "covariance, matrix", "this package", rectified.covariance_matrix, smallest=2, largest=8, on_a_line="covariance"
    ),
    Rule("Feynman-Kac SMC", "2503.02819", whole_runs.feynman_kac, whole=True, note="samples are not independent"),
    Rule(
        "optimal direction",
        "Theorem 4.1 of 2501.18865",
        schedules.optimal,
        largest=1,
        scaled=False,
        note="no method: the target's own noise prediction, by quadrature; its remaining error is the steps'",
    ),
    Rule("rejection", "exact for p(y|x_0)^w", whole_runs.rejected, whole=True, needs_class=True, networks="perfect"),
)
RULES: dict[str, Rule] = {rule.name: rule for rule in _RULES}
"""In the order of the tables."""
