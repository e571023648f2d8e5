"""Gradient norms along a run, against finite differences of the score itself."""

import pytest
import torch

from companion.evaluation.studies.gradient_norms import (
    Gradients,
    estimates,
    gradients_along,
    k_error,
    norm_summary,
    visited_states,
)
from companion.guidance.classifier.scores import ClassifierScore, score_logits
from tests.pipelines.adm.test_pipeline import BayesClean, BayesNoisy, mixture_pipe

LABELS = torch.tensor([0, 1, 1])
WAYS = {"plain": ClassifierScore(), "tempered": ClassifierScore(marginal_temperature=0.5)}


def visited(kind):
    # Two classes' mixture as network, without a label; its null class is their mixture.
    pipe = mixture_pipe(kind, conditional=True)
    states = visited_states(pipe, LABELS, steps=6, every=2, unconditional=True, classifier_scale=0.5, clip_sample=False)
    return pipe, states


@pytest.mark.parametrize("kind", [BayesClean, BayesNoisy])
def test_norms_are_those_of_the_score_by_finite_differences(kind):
    pipe, states = visited(kind)
    assert [state.index for state in states] == [0, 2, 4]
    found = gradients_along(pipe, states, LABELS, {name: (pipe.classifier, score) for name, score in WAYS.items()})
    assert found["plain"].timesteps == tuple(int(state.timestep) for state in states)
    null = torch.full_like(LABELS, pipe.config.null_class)
    generator = torch.Generator().manual_seed(0)
    for name, score in WAYS.items():
        got = found[name]
        for row, state in enumerate(states):

            def clean(x, state=state):
                return state.level.clean(pipe.unet(x, state.timestep, class_labels=null, return_dict=False)[0], x)

            def value(x, state=state, score=score):
                """S at x_t, or at x̂_0 as the classifier sees it."""
                inputs = (x, int(state.timestep)) if kind is BayesNoisy else (x,)
                return score_logits(pipe.classifier(*inputs), LABELS, score)

            place = state.sample if kind is BayesNoisy else clean(state.sample).clamp(-1, 1)
            slope = torch.autograd.grad(value(place.requires_grad_()).sum(), place)[0].detach()
            torch.testing.assert_close(got.norm[row], slope.flatten(1).norm(dim=1))
            # Kᵀg by its inner products with random directions: ⟨Kᵀg, d⟩ = ⟨g, K d⟩, K d by differences of x̂_0.
            direction = torch.randn(state.sample.shape, generator=generator, dtype=torch.float64)
            pushed = (clean(state.sample + 1e-5 * direction) - clean(state.sample - 1e-5 * direction)) / 2e-5
            x = state.sample.detach().requires_grad_()
            [through_k] = torch.autograd.grad((clean(x) * slope).sum(), x)
            inner = (through_k * direction).flatten(1).sum(dim=1)
            torch.testing.assert_close(inner, (slope * pushed).flatten(1).sum(dim=1).detach(), rtol=1e-4, atol=1e-7)
            scale = state.level.alpha if kind is BayesNoisy else 1.0
            torch.testing.assert_close(got.through[row], scale * through_k.flatten(1).norm(dim=1))
            expected = torch.nn.functional.cosine_similarity(slope.flatten(1), through_k.flatten(1))
            torch.testing.assert_close(got.cosine[row], expected)
            p = pipe.classifier(*((place, int(state.timestep)) if kind is BayesNoisy else (place,))).softmax(dim=1)
            torch.testing.assert_close(got.confidence[row], p.amax(dim=1).detach())
            torch.testing.assert_close(got.label[row], p[torch.arange(3), LABELS].detach())


def test_states_are_those_of_a_plain_run():
    pipe, states = visited(BayesNoisy)
    again = visited_states(pipe, LABELS, steps=6, unconditional=True, classifier_scale=0.5, clip_sample=False)
    assert len(again) == 6 and torch.equal(again[2].sample, states[1].sample)
    other = visited_states(pipe, LABELS, steps=6, seed=1, unconditional=True, classifier_scale=0.5, clip_sample=False)
    assert not torch.equal(other[0].sample, again[0].sample)


def test_estimates_are_posterior_means():
    pipe = mixture_pipe(conditional=True)
    pictures = torch.randn(4, 3, 2, 2, dtype=torch.float64) / 4
    got = estimates(pipe, pictures, 500, torch.Generator().manual_seed(1))
    alpha_bar = float(pipe.scheduler.alphas_cumprod[500])
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    noisy = alpha_bar**0.5 * pictures + (1 - alpha_bar) ** 0.5 * noise
    oracle = mixture_pipe()  # without classes
    epsilon = oracle.unet(noisy, 500, return_dict=False)[0]
    torch.testing.assert_close(got, ((noisy - (1 - alpha_bar) ** 0.5 * epsilon) / alpha_bar**0.5).clamp(-1, 1))


def test_an_exact_network_s_k_is_symmetric_and_has_no_negative_direction():
    pipe, states = visited(BayesClean)
    found = k_error(pipe, states, LABELS, pipe.classifier)
    gradients = gradients_along(pipe, states, LABELS, {"raw": (pipe.classifier, ClassifierScore())})["raw"]
    assert found.timesteps == gradients.timesteps
    assert (found.along >= 0).all() and (found.asymmetry < 1e-5).all()
    alpha = torch.tensor([state.level.alpha for state in states], dtype=torch.float64)
    expected = gradients.cosine * alpha[:, None] * gradients.through / gradients.norm  # ⟨g, Kᵀg⟩ / ‖g‖²
    torch.testing.assert_close(found.along, expected, rtol=1e-4, atol=1e-9)


def test_a_network_that_is_no_gradient_is_noticed():
    pipe, states = visited(BayesClean)
    exact = pipe.unet.forward

    def sheared(x, *args, **kwargs):  # a Jacobian that is not symmetric
        output = exact(x, *args, **kwargs)[0]
        return (output + 0.3 * x.cumsum(dim=-1),)

    pipe.unet.forward = sheared
    assert (k_error(pipe, states, LABELS, pipe.classifier).asymmetry > 1e-3).any()


def test_the_summary_counts_vanished_gradients():
    norm = torch.tensor([[4.0, 2.0], [8.0, 6.0], [0.05, 3.0]], dtype=torch.float64)
    found = norm_summary({"raw": Gradients((2, 1, 0), norm, norm, norm, norm, norm)})
    first, largest, last, gone, low, high = found["raw"]
    assert (first, largest, gone) == (2.0, 6.0, 0.5)  # torch's median is the lower of two
    assert last == 0.05 and low < 0.5 < high
