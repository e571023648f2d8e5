"""The sampler of variants against the one of every coordinate system, diffusers' schedulers and closed forms."""

import pytest
import torch
from diffusers import DDIMScheduler
from scipy import stats

from companion.exact.chain import linear_schedule
from companion.exact.coordinates import guided_trajectories
from companion.exact.mixtures import GaussianMixture
from companion.exact.toys import Toy, toy
from companion.exact.variants import (
    RECTIFICATIONS,
    VARIANTS,
    ddim_ratios,
    guided_noise,
    guided_problem,
    surrounded,
    variant_samples,
    weaker,
)

SCHEDULE = linear_schedule(1000)
DATA = toy("anisotropic")
CONDITIONAL, REFERENCE = DATA.classes[0], DATA.unconditional


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("product", ["none", "jvp", "ones", "diagonal"])
def test_cfg_is_the_sampler_of_coordinates(product):
    ratios, start = ddim_ratios(SCHEDULE, 12), normal(20, 2)
    path = guided_trajectories(CONDITIONAL, REFERENCE, ratios, start, weight=2.0, product=product)
    # There the noise at the first level is σ times the start; the levels are so noisy that this hardly matters.
    sigma = ratios[0] / (1 + ratios[0] ** 2) ** 0.5
    found = variant_samples(CONDITIONAL, REFERENCE, ratios, sigma * start, weight=2.0, rectification=product)
    assert torch.allclose(found, path[-1], atol=1e-9)


def test_levels_and_steps_are_those_of_ddim():
    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
    )
    scheduler.set_timesteps(20)
    x = start = normal(5, 2)
    for timestep in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[timestep].double()
        own, reference = (data.noise(x, alpha_bar.sqrt(), (1 - alpha_bar).sqrt()) for data in (CONDITIONAL, REFERENCE))
        x = scheduler.step(own + 1.5 * (own - reference), timestep, x).prev_sample
    found = variant_samples(CONDITIONAL, REFERENCE, ddim_ratios(SCHEDULE, 20), start, weight=1.5)
    assert torch.allclose(found, x, atol=1e-4)  # the scheduler's levels are of float32


def test_no_guidance_is_the_same_for_all():
    ratios, start = ddim_ratios(SCHEDULE, 10), normal(8, 2)
    plain = variant_samples(CONDITIONAL, REFERENCE, ratios, start, weight=0.0)
    for variant in VARIANTS:
        # CFG++'s strength is no weight; rescaling changes nothing where there is nothing to rescale.
        if variant != "CFG++":
            same = variant_samples(CONDITIONAL, REFERENCE, ratios, start, variant=variant, weight=0.0)
            assert torch.allclose(same, plain), variant
    for rectification in RECTIFICATIONS:
        same = variant_samples(CONDITIONAL, REFERENCE, ratios, start, weight=0.0, rectification=rectification)
        assert torch.allclose(same, plain), rectification


def test_cfg_plus_plus_is_cfg_on_geometric_levels():
    ratios, start = [50 * 0.7**i for i in range(30)], normal(10, 2)
    strength, scale = 0.6, 0.6 / (1 - 0.7)
    found = variant_samples(CONDITIONAL, REFERENCE, ratios, start, variant="CFG++", weight=strength)
    x, (alpha, sigma) = start, (1 / (1 + 50**2) ** 0.5, 50 / (1 + 50**2) ** 0.5)
    for ratio, following in zip(ratios, [*ratios[1:], 0.0], strict=True):
        own, reference = CONDITIONAL.noise(x, alpha, sigma), REFERENCE.noise(x, alpha, sigma)
        weight = (scale if following else strength) - 1  # the last step goes to clean data, which have no noise
        noise = guided_noise("CFG", own, reference, x, weight=weight, ratio=ratio, following=following)
        clean = (x - sigma * noise) / alpha
        alpha, sigma = 1 / (1 + following**2) ** 0.5, following / (1 + following**2) ** 0.5
        x = alpha * clean + sigma * noise
    assert torch.allclose(found, x)


def test_on_a_line_projections_leave_nothing():
    """In one dimension every direction is along the prediction: APG and CFG-Zero* do not guide at all."""
    line = toy("shared_mode")
    ratios, start = ddim_ratios(SCHEDULE, 10), normal(6, 1)
    plain = variant_samples(line.classes[0], line.unconditional, ratios, start, weight=0.0)
    for variant in ("APG", "CFG-Zero*"):
        same = variant_samples(line.classes[0], line.unconditional, ratios, start, variant=variant, weight=3.0)
        assert torch.allclose(same, plain), variant


def test_surrounded_data_are_the_toy_and_noise_outside_it():
    wide, basis = surrounded(DATA, 6, 0.5)
    assert torch.allclose(basis.T @ basis, torch.eye(2, dtype=torch.float64))
    x = normal(30, 6)
    inside = x @ basis
    rest = (x.square().sum(dim=1) - inside.square().sum(dim=1)).sqrt()
    shared = stats.norm.logpdf(0, scale=0.5) * 4 - 0.5 * (rest / 0.5) ** 2
    assert torch.allclose(wide.classes[0].log_prob(x), CONDITIONAL.log_prob(inside) + shared)
    assert torch.allclose(wide.unconditional.log_prob(x), REFERENCE.log_prob(inside) + shared)
    # Standard guidance, and K times it, run inside the subspace as they do without what surrounds it.
    ratios = ddim_ratios(SCHEDULE, 8)
    for rectification in ("none", "jvp", "covariance"):
        options = {"weight": 2.0, "rectification": rectification}
        whole = variant_samples(wide.classes[0], wide.unconditional, ratios, x, **options)
        own = variant_samples(CONDITIONAL, REFERENCE, ratios, inside, **options)
        assert torch.allclose(whole @ basis, own, atol=1e-8), rectification


def test_with_more_dimensions_the_projection_leaves_more():
    """APG takes away the part along the prediction, which in many dimensions is mostly what the class leaves open."""
    shares = []
    for dimension in (2, 8, 64):
        wide, _ = surrounded(DATA, dimension, 0.5)
        x = wide.classes[0].sample(400, torch.Generator().manual_seed(0), 0.7, 0.7)
        own, reference = wide.classes[0].noise(x, 0.7, 0.7), wide.unconditional.noise(x, 0.7, 0.7)
        moved = guided_noise("APG", own, reference, x, weight=1.0, ratio=1.0, following=0.9) - own
        shares.append(float(moved.norm(dim=1).sum() / (own - reference).norm(dim=1).sum()))
    assert shares[0] < shares[1] < shares[2] and shares[2] > 0.9


def test_a_weaker_model_is_the_data_blurred():
    weak = weaker(CONDITIONAL, 0.3)
    x = normal(10, 2)
    assert torch.allclose(weak.log_prob(x), CONDITIONAL.log_prob(x, 1.0, 0.3))
    assert isinstance(weak, GaussianMixture)


def test_what_is_wrong_is_said():
    start = normal(2, 2)
    with pytest.raises(ValueError, match="variant must be one of CFG, interval, APG"):
        variant_samples(CONDITIONAL, REFERENCE, [1.0], start, variant="APG++", weight=1.0)
    with pytest.raises(ValueError, match="rectification must be one of none, jvp"):
        variant_samples(CONDITIONAL, REFERENCE, [1.0], start, weight=1.0, rectification="vjp")
    with pytest.raises(ValueError, match=r"ratios must fall and stay positive, got \[1.0, 2.0\]"):
        variant_samples(CONDITIONAL, REFERENCE, [1.0, 2.0], start, weight=1.0)
    with pytest.raises(ValueError, match="steps must be from 1 to 1000, got 0"):
        ddim_ratios(SCHEDULE, 0)
    with pytest.raises(ValueError, match="dimension must be at least the toy's 2, got 1"):
        surrounded(Toy("x", (CONDITIONAL,), REFERENCE), 1, 0.5)


@pytest.mark.parametrize("blur", [None, 0.3])
def test_a_problems_target_is_the_tilted_class(blur):
    """For two Gaussians of one covariance the target is a third: precisions and their means extrapolate."""
    first, second = (GaussianMixture.isotropic([1.0], [mean], 0.4) for mean in ([0.5, 0.2], [-0.3, 0.1]))
    data, weight = Toy("pair", (first,), second), 1.0
    problem = guided_problem(data, weight, 3000, blur=blur)
    mean = torch.tensor([1.3, 0.3]) if blur is None else torch.tensor([0.5, 0.2])
    variance = 0.16 if blur is None else 1 / (2 / 0.16 - 1 / 0.25)
    assert torch.allclose(problem.target.mean(dim=0), mean.double(), atol=0.03)
    assert torch.allclose(problem.target.var(dim=0), torch.full((2,), variance, dtype=torch.float64), rtol=0.06)
    wide = guided_problem(data, weight, 50, blur=blur, dimension=5)
    assert wide.start.shape == (50, 5) and wide.samples([3.0, 1.0], weight=1.0).shape == (50, 2)
    again = guided_problem(data, weight, 50, blur=blur)
    alone = variant_samples(wide.conditional, wide.reference, [3.0, 1.0], wide.start, weight=1.0) @ wide.basis
    assert torch.equal(wide.samples([3.0, 1.0], weight=1.0), alone)
    assert torch.allclose(again.samples([3.0, 1.0], weight=1.0), alone)  # one noise in the plane, whatever surrounds it
    assert torch.equal(again.target, guided_problem(data, weight, 50, blur=blur).target)
