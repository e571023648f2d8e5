"""Every rule against a closed form, diffusers' own guider, or a limit in which it must equal another rule."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import guiders
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from scipy.stats import beta

from companion.exact import DDPMChain, linear_schedule, mixture_prediction
from companion.exact.covariance import covariance_direction
from companion.exact.toys import toy
from companion.guidance.parametrization import rectification_coefficients
from companion.guidance.rectification import rectify
from companion.ranking.problems import low_rank, perfect
from companion.ranking.rules import adaptive, projections, rectified, schedules
from companion.ranking.rules.catalogue import RULES
from companion.ranking.rules.whole_runs import WholeRun, feynman_kac, gibbs_like, rejected
from companion.ranking.sampler import FreshNoise, draw, noise_levels, schedule
from companion.ranking.step import NotAvailableError, Step
from tests.ranking.conftest import gaussian_problem

PLANE = perfect(toy("shared_blobs"), 2.0, "test")
MANY = perfect(low_rank(8, 1), 2.0, "test")
IN_DIFFUSERS = {"guidance_scale": 2.0, "use_original_formulation": True}


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_the_sampler_is_ddpm(step_of):
    steps = 25
    chain = DDPMChain(mixture_prediction(PLANE.conditional, schedule(steps)), schedule(steps))
    for index in (0, 10, 24):
        step = step_of(PLANE, index=index, steps=steps)
        close(step.advance(step.conditional), chain.mean(step.x, steps - index))
        assert step.noise_std == pytest.approx(chain.std(steps - index))
    assert schedule(50).betas.sum() == pytest.approx(linear_schedule(50, 0.001, 0.2).betas.sum())


def test_without_churn_the_sampler_is_ddim(step_of):
    step = step_of(PLANE, churn=0.0)
    expected = step.following.alpha * step.clean(step.conditional) + step.following.sigma * step.conditional
    close(step.advance(step.conditional), expected)
    assert step.noise_std == 0


def test_coordinates_go_there_and_back(step_of):
    step = step_of(PLANE)
    noise = step.conditional
    close(step.noise_of(step.clean(noise)), noise)
    close(step.noise_of_velocity(step.velocity(noise)), noise)
    moved = step_of(PLANE, seed=5)
    close(step.advance(step.from_point(moved.x, moved.conditional)), moved.advance(moved.conditional))


@pytest.mark.parametrize(
    "name", [n for n, r in RULES.items() if not r.whole and r.scaled and n not in ("β-CFG", "CFG++")]
)
def test_strength_zero_is_no_guidance(name, step_of):
    """Rules about the conditional prediction end there; those about the reference (β-CFG, CFG++) do not."""
    step = step_of(MANY if name != "covariance, matrix" else PLANE, weight=0.0, strength=0.0)
    if name == "autoguidance":
        step = step_of(gaussian_problem(), weight=0.0)
    if name == "foresight":  # its CFG++ has no step without a condition: at strength 0 the reference is left
        close(RULES[name].function(step), step.reference)
    elif name == "sliding-mode":  # the control acts at any weight
        close(adaptive.sliding_mode(step, gain=0.0), step.conditional)
    else:
        close(RULES[name].function(step), step.conditional)


def test_cfg_is_diffusers(step_of):
    step = step_of(MANY, weight=2.0)
    guider = guiders.ClassifierFreeGuidance(**IN_DIFFUSERS)
    close(schedules.cfg(step), guider.forward(step.conditional, step.reference).pred)
    assert step.evaluations == 2
    assert step_of(MANY).evaluations == 0


def test_rescaled_is_diffusers(step_of):
    step = step_of(MANY, weight=2.0)
    guider = guiders.ClassifierFreeGuidance(**IN_DIFFUSERS, guidance_rescale=0.7)
    close(schedules.rescaled_cfg(step), guider.forward(step.conditional, step.reference).pred)


def test_apg_is_diffusers_over_two_steps(step_of):
    memory, buffer = {}, MomentumBuffer(-0.5)
    for seed in (1, 2):
        step = step_of(MANY, weight=2.0, seed=seed, history=memory)
        clean = [step.clean(prediction) for prediction in (step.conditional, step.reference)]
        expected = normalized_guidance(*clean, 2.0, buffer, 0.0, 0.5, True)
        close(projections.apg(step, norm_threshold=0.5), step.noise_of(expected))


def test_zero_star_is_diffusers(step_of):
    step = step_of(MANY, weight=2.0)
    guider = guiders.ClassifierFreeZeroStarGuidance(**IN_DIFFUSERS, zero_init_steps=0)
    guider.set_state(step=3, num_inference_steps=20, timestep=torch.tensor(5))
    velocities = [step.velocity(prediction) for prediction in (step.conditional, step.reference)]
    close(projections.cfg_zero_star(step), step.noise_of_velocity(guider.forward(*velocities).pred), 1e-5)


def test_zero_star_does_not_move_the_flow_at_first(step_of):
    step = step_of(MANY, weight=2.0, index=0)
    (alpha, sigma), (after, remaining) = step.level, step.following
    noise = projections.cfg_zero_star(step)
    ddim = after * step.clean(noise) + remaining * noise
    close(ddim / (after + remaining), step.x / (alpha + sigma))


def test_tangential_is_diffusers(step_of):
    step = step_of(MANY, weight=2.0)
    guider = guiders.TangentialClassifierFreeGuidance(**IN_DIFFUSERS)
    close(projections.tangential(step), guider.forward(step.conditional, step.reference).pred, 1e-5)


def test_magnitude_aware_is_the_papers_factor(step_of):
    step = step_of(MANY, weight=2.0)
    c, u = step.velocity(step.conditional), step.velocity(step.reference)
    factor = 2 * (-8 * (c - u).norm(dim=1) / u.norm(dim=1)).exp()[:, None]
    close(projections.magnitude_aware(step), step.noise_of_velocity(c + factor * (c - u)))


def test_schedules_have_mean_w_and_their_ends(step_of):
    steps = 25
    for rule, middle in ((schedules.linear, 1.0), (schedules.cosine, 1.0)):
        shares = []
        for index in range(steps):
            step = step_of(MANY, weight=2.0, index=index, steps=steps)
            delta = step.delta
            shares.append(float(((rule(step) - step.conditional) * delta).sum() / (delta * delta).sum()))
        assert shares[0] == pytest.approx(0) and shares[-1] == pytest.approx(4)
        assert shares[12] == pytest.approx(2 * middle) and sum(shares) / steps == pytest.approx(2, rel=0.05)


def test_interval_guides_inside_and_saves_the_reference_outside(step_of):
    inside = step_of(MANY, index=12)
    close(schedules.interval(inside), schedules.cfg(inside))
    outside = step_of(MANY, index=0)
    close(schedules.interval(outside), outside.conditional)
    assert outside.evaluations == 1
    everywhere = partial(schedules.interval, low=0.0, high=math.inf)
    close(everywhere(outside), schedules.cfg(outside))


def test_cfg_plus_plus_makes_the_papers_step(step_of):
    """DDIM: the clean estimate of u + λΔ, the noise of u (the paper's algorithm 2)."""
    step = step_of(MANY, weight=4.0, churn=0.0)  # scale 5: λ = 0.4
    noise = step.reference + 0.4 * step.delta
    expected = step.following.alpha * step.clean(noise) + step.following.sigma * step.reference
    close(step.advance(schedules.cfg_plus_plus(step)), expected)


def test_beta_cfg_is_a_beta_density_times_a_unit_vector(step_of):
    step = step_of(MANY, weight=3.0, index=6)
    height = beta.pdf(6 / 24, 2, 2)
    expected = step.reference + 4 * height * step.delta / step.delta.norm(dim=1, keepdim=True)
    close(schedules.beta_cfg(step), expected)
    plain = step_of(MANY, weight=3.0)
    close(schedules.beta_cfg(plain, a=1, b=1, gamma=0), schedules.cfg(plain))


def test_power_law_with_power_zero_is_cfg_and_scales_with_the_scores(step_of):
    step = step_of(MANY, weight=2.0)
    close(projections.power_law(step, power=0.0), schedules.cfg(step))
    shift = projections.power_law(step) - step.conditional
    length = (step.delta / step.level.sigma).norm(dim=1)
    close(shift.norm(dim=1), 2 * step.level.sigma * length**1.9)


def test_angle_domain_turns_by_w_times_the_angle(step_of):
    """For clean estimates of one length, the result lies at the angle (1 + w) θ from x̂_u, as long as it is small."""
    step = step_of(PLANE, weight=0.7)
    angle = torch.linspace(0.05, 0.6, 40, dtype=torch.float64)
    unit = torch.stack([torch.ones(40), torch.zeros(40)], dim=1).double()
    turned = torch.stack([angle.cos(), angle.sin()], dim=1)
    step.shared |= {"conditional": step.noise_of(turned), "reference": step.noise_of(unit)}
    found = step.clean(projections.angle_domain(step))
    # the authors' formula: cos θ' c + sin θ' times the unit vector across u in the plane of both
    across = torch.tensor([0.0, 1.0], dtype=torch.float64)
    close(found, (0.7 * angle).cos()[:, None] * turned + (0.7 * angle).sin()[:, None] * across)
    assert (found.norm(dim=1) <= 2**0.5 + 1e-9).all()
    step.weight = 1e-6
    close(step.clean(projections.angle_domain(step)), turned, 1e-5)


def test_characteristic_guidance_is_exact_for_gaussians(step_of):
    """Its fixed point is K_c [K_u + w (K_u - K_c)]⁻¹ Δ, the formula of notebook 16."""
    problem = gaussian_problem()
    for index in (2, 12, 20):
        step = step_of(problem, weight=2.0, index=index)
        found = adaptive.characteristic(step, iterations=60, tolerance=1e-12, remembered=4)
        matrices = step.k_matrix("conditional"), step.k_matrix("reference")
        shift = covariance_direction(*matrices, step.delta, 2.0, floor=1e-12)
        close(found, step.conditional + 2 * shift, 1e-6)
        assert (shift - step.delta).norm() > 0.1 * step.delta.norm()


def test_characteristic_guidance_falls_back_on_cfg(step_of):
    step = step_of(PLANE, weight=2.0)
    close(adaptive.characteristic(step, iterations=0, tolerance=0.0), schedules.cfg(step))
    assert step.evaluations == 2


def test_foresight_without_a_plan_is_cfg_plus_plus(step_of, monkeypatch):
    monkeypatch.setattr(adaptive, "FORESIGHT", ())
    step = step_of(MANY, weight=11.5, churn=0.0)  # scale 12.5: λ = 1
    close(step.advance(adaptive.foresight(step)), step.advance(schedules.cfg_plus_plus(step)))


def test_foresight_keeps_points_on_which_both_branches_agree(step_of):
    """Where the condition says nothing a long step and back ends, to the steps' error, where it began."""
    problem = perfect(toy("isotropic"), 1.0, "test")
    agreeing = problem.__class__(**{**problem.__dict__, "reference": problem.conditional})
    errors = []
    for steps in (40, 160):
        step = step_of(agreeing, index=0, steps=steps, weight=3.0)
        there = adaptive._there_and_back(step, step.x, step.levels[2])
        errors.append(float((there - step.x).norm() / step.x.norm()))
    assert errors[1] < 0.5 * errors[0] < 0.05


def test_feedback_knows_the_likelihood_ratio(monkeypatch):
    """With temperature 1 and no offset its posterior is the log ratio of the two chains' path probabilities."""
    problem = gaussian_problem()
    levels = noise_levels(2000)
    memory, noise = {}, FreshNoise(0)
    monkeypatch.setattr(adaptive, "_tuned", lambda step, pi, t0, t1: (1.0, 0.0))
    x = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start = x
    for index in range(1900):
        step = Step(x, 0.0, 0.0, index, levels, problem, 1.0, memory)
        adaptive.feedback(step, pi=1 - 1e-12, largest=1e9, limit=math.inf)
        mean = step.advance(step.conditional)
        x = mean + step.noise_std * noise(index, mean)
    level = levels[1899]
    ratio = [
        problem.conditional.log_prob(z, *v) - problem.reference.log_prob(z, *v)
        for z, v in ((step.x, level), (start, levels[0]))
    ]
    found = memory["log_posterior"]
    expected = ratio[0] - ratio[1]
    assert float((found - expected).abs().mean()) < 0.12 < 0.5 < float(expected.std())


def test_feedback_starts_with_its_published_scale(step_of):
    step = step_of(MANY, strength=1.0)
    close(adaptive.feedback(step), step.conditional + (1 / 0.999 - 1) * step.delta)


def test_sliding_mode_is_the_authors_law_over_two_steps(step_of):
    memory, previous = {}, None
    for seed in (1, 2):
        step = step_of(MANY, weight=2.0, seed=seed, history=memory)
        error = step.velocity(step.conditional) - step.velocity(step.reference)
        previous = error if previous is None else previous
        surface = (error - previous) + 5.0 * previous
        previous = error - 0.2 * (2 * (surface > 0).double() - 1)
        close(adaptive.sliding_mode(step), step.noise_of_velocity(step.velocity(step.reference) + 3 * previous))
    plain = step_of(MANY, weight=2.0)
    close(adaptive.sliding_mode(plain, gain=0.0), schedules.cfg(plain))


@pytest.mark.parametrize("product", ["none", "ones", "diagonal", "vjp", "jvp", "finite_difference"])
def test_reg_is_the_packages_products(product, step_of):
    rules = {"none": schedules.cfg, "ones": rectified.reg_ones, "diagonal": rectified.reg_diagonal}
    step = step_of(MANY, weight=2.0)
    found = rules.get(product, rectified.reg)(step)
    result = rectify(
        lambda z: MANY.conditional.noise(z, *step.level),
        step.x,
        step.reference,
        rectification_coefficients("epsilon", *step.level),
        product=product,
        probes=None,
    )
    close(found, result.prediction + 2 * result.direction, 1e-6 if product == "finite_difference" else 1e-10)


def test_reuse_at_every_step_is_reg(step_of):
    step = step_of(MANY, weight=2.0)
    close(rectified.reg_reused(step, every=1), rectified.reg(step))


def test_reuse_pays_at_every_third_step():
    costs = []
    memory = {}
    for index in range(6):
        x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(index))
        step = Step(x, 1.0, 1.0, index, noise_levels(20), MANY, 1.0, memory)
        rectified.reg_reused(step)
        costs.append(step.evaluations)
    assert costs == [3, 2, 2, 3, 2, 2]


def test_covariance_is_exact_for_round_gaussians_and_its_matrix_for_all_that_are_wider(step_of):
    problem = gaussian_problem(2)
    step = step_of(problem, weight=2.0)
    matrices = step.k_matrix("conditional"), step.k_matrix("reference")
    exact = covariance_direction(*matrices, step.delta, 2.0, floor=1e-12)
    close(rectified.covariance_matrix(step), step.conditional + 2 * exact)
    line = step_of(perfect(toy("paper_1d"), 2.0, "test", contains=False), weight=2.0)
    k_c, k_u = line.k_matrix("conditional")[:, :, 0], line.k_matrix("reference")[:, :, 0]
    factor = k_c / (k_c + 3 * (k_u - k_c).clamp(min=0))
    close(rectified.covariance(line), line.conditional + 2 * factor * line.delta)


def test_autoguidance_is_cfg_with_the_weaker_model(step_of):
    step = step_of(gaussian_problem(), weight=2.0)
    close(schedules.autoguidance(step), schedules.cfg(step))
    with pytest.raises(NotAvailableError, match="has no weaker model"):
        schedules.autoguidance(step_of(MANY))


def test_the_optimal_direction_is_the_formula_for_gaussians(step_of):
    problem = gaussian_problem(1)
    step = step_of(problem, weight=1.0, index=12)
    k_c, k_u = step.k_matrix("conditional"), step.k_matrix("reference")
    exact = covariance_direction(k_c, k_u, step.delta, 1.0, floor=1e-12)
    close(schedules.optimal(step), step.conditional + exact, 1e-6)


def whole_run(problem, weight, count, *, steps=60, levels=None):
    noise = FreshNoise(3)
    run = lambda rule, levels, start, weight: draw("run", rule, problem, levels, start, noise, weight=weight)  # noqa: E731
    start = torch.randn(count, problem.dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return WholeRun(problem, levels or noise_levels(steps), weight, 1.0, start, noise, run)


def test_feynman_kac_and_rejection_move_the_right_mass():
    """shared_mode at w = 3: the target's mass on the right is known; CFG's formula alone misses it by more."""
    problem = perfect(toy("shared_mode"), 3.0, "test")
    grid = problem.grid(2001)
    exact = float(problem.density(grid)[grid.axes[0] > 0.6].sum() * grid.cell)
    for method in (feynman_kac, rejected):
        samples, cost = method(whole_run(problem, 3.0, 4000))
        assert float((samples[:, 0] > 0.6).double().mean()) == pytest.approx(exact, abs=0.03)
        assert cost > (100 if method is feynman_kac else 60 / 0.6)
    plain = problem.conditional.sample(4000, torch.Generator().manual_seed(0))
    assert float((plain[:, 0] > 0.6).double().mean()) < exact - 0.3


def test_whole_runs_without_weight_are_the_plain_sampler():
    problem = perfect(toy("shared_mode"), 3.0, "test")
    plain = problem.conditional
    for method in (feynman_kac, gibbs_like, rejected):
        samples, cost = method(whole_run(problem, 0.0, 4000))
        assert float(samples.mean()) == pytest.approx(float(plain.mean()[0]), abs=0.06)
        assert float(samples.std()) == pytest.approx(float(plain.covariance()[0, 0]) ** 0.5, rel=0.05)
        assert len(samples) == 4000 and cost >= 59


def test_gibbs_like_follows_its_authors_plan():
    seen = []

    def run(rule, levels, start, weight):
        seen.append((rule.__name__, len(levels) - 1, levels[0].ratio, weight))
        return start, 1.0

    problem = perfect(toy("shared_mode"), 3.0, "test")
    start = torch.zeros(10, 1, dtype=torch.float64)
    gibbs_like(WholeRun(problem, noise_levels(64), 3.0, 1.0, start, FreshNoise(0), run))
    assert [entry[:2] for entry in seen] == [("unguided", 24), ("cfg", 20), ("cfg", 20)]
    assert seen[1][2] == pytest.approx(2.0, rel=0.1) and seen[1][3] == 3.0


def test_every_rule_has_a_source_and_a_test():
    tested = Path(__file__).read_text()
    for rule in RULES.values():
        assert rule.source or rule.name == "none"
        name = rule.function.__name__
        assert name in tested or name == "unguided", name
