"""A stacked call's branches, evaluated on their own: what the whole batch gives for them, or nothing is cut."""

import pytest
import torch
from torch import Tensor

from companion.pipelines import denoiser_call
from companion.pipelines.denoiser_call import DenoiserCall, branches, inside, region_of, replaced, with_inside

FIRST, SECOND = slice(0, 3), slice(3, 6)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(denoiser_call, "_CUTS", {})


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halves(call: DenoiserCall) -> list[Tensor]:
    return [branch()[0] for branch in branches(call, SECOND, FIRST)]


def assert_right(call: DenoiserCall) -> None:
    whole = call()[0]
    for found, wanted in zip(halves(call), (whole[SECOND], whole[FIRST]), strict=True):
        assert torch.allclose(found, wanted)
    again = [branch.with_sample(2 * branch.sample)()[0] for branch in branches(call, SECOND, FIRST)]
    doubled = call.with_sample(2 * call.sample)()[0]
    assert torch.allclose(again[0], doubled[SECOND]) and torch.allclose(again[1], doubled[FIRST])


@pytest.mark.parametrize("layers", [5, 6, 12])
def test_a_batch_in_dimension_1_is_found(layers):
    """As HiDream's `encoder_hidden_states_llama3`, which is [layers, batch, tokens, width]."""

    def network(sample: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        weights = torch.linspace(1, 2, layers, dtype=torch.float64).view(-1, 1, 1)
        return (torch.tanh(sample * (weights * encoder_hidden_states).sum(0)),)

    call = DenoiserCall(network, (), {"sample": drawn(6, 4), "encoder_hidden_states": drawn(layers, 6, 4, seed=1)})
    assert_right(call)
    [cut] = denoiser_call._CUTS.values()
    assert cut == {".encoder_hidden_states"}


def test_what_cannot_be_cut_is_evaluated_whole():
    """A table of positions that happens to be as long as the batch, and is not named as one."""

    def network(sample: Tensor, places: Tensor, condition: Tensor) -> tuple[Tensor]:
        return (torch.tanh(sample * places.sum(0) + condition),)

    call = DenoiserCall(network, (drawn(6, 4), drawn(6, 4, seed=1)), {"condition": drawn(6, 4, seed=2)})
    assert_right(call)
    assert list(denoiser_call._CUTS.values()) == [None]


def test_branches_evaluated_whole_have_derivatives():
    def network(sample: Tensor, places: Tensor) -> tuple[Tensor]:
        return (torch.tanh(sample * places.sum(0) + sample.flip(1) * torch.arange(6.0).double().view(6, 1)),)

    call = DenoiserCall(network, (drawn(6, 4), drawn(6, 4, seed=1)), {})
    only, _ = branches(call, SECOND, FIRST)
    tangent = drawn(3, 4, seed=3)
    _, product = torch.func.jvp(lambda x: only.with_sample(x)()[0], (only.sample,), (tangent,))
    step = 1e-6
    ends = [only.with_sample(only.sample + sign * step * tangent)()[0] for sign in (1, -1)]
    assert torch.allclose(product, (ends[0] - ends[1]) / (2 * step), atol=1e-8)


def test_equal_branches_teach_nothing():
    """A negative prompt equal to the prompt agrees with any cut; the next call is compared again."""

    def network(sample: Tensor, table: Tensor) -> tuple[Tensor]:
        return (sample * table.sum(0),)

    half = drawn(3, 4)
    halves(DenoiserCall(network, (torch.cat([half, half]), torch.ones(6, 4).double()), {}))
    assert denoiser_call._CUTS == {}


def test_lists_that_a_network_empties_stay_whole():
    """HunyuanDiT pops its control network's residuals from the list it is given."""

    def network(sample: Tensor, residuals: list[Tensor]) -> tuple[Tensor]:
        return (torch.tanh(sample + residuals.pop() + residuals.pop()),)

    call = DenoiserCall(network, (drawn(6, 4),), {"residuals": [drawn(6, 4, seed=1), drawn(6, 4, seed=2)]})
    assert_right(call)


class Cache:
    """As GlmImage's cache of keys and values: the pipeline reads it in one branch and skips it in the other."""

    mode = "read"


def test_a_call_whose_cache_was_switched_does_not_repeat():
    """GlmImagePipeline with pictures: the conditional branch, evaluated after the switch, would be another."""

    def network(sample: Tensor, cache: Cache | None = None) -> tuple[Tensor]:
        return (sample.tanh() + (cache is not None and cache.mode == "read"),)

    cache = Cache()
    call = DenoiserCall(network, (drawn(2, 4),), {"cache": cache})
    output = call()
    assert call.has_state and call.repeats(output)
    cache.mode = "skip"
    assert not call.repeats(output)
    assert not DenoiserCall(network, (drawn(2, 4), None), {"scale": [1.0, {"of": "all"}]}).has_state


def test_latents_that_are_the_last_tokens():
    """Some pipelines put a condition's tokens before the latents; channels behind them are left alone as ever."""
    whole, latents = drawn(2, 5, 4), drawn(2, 3, 2, seed=1)
    region = region_of(whole, whole, latents, trailing=True)
    assert region == (-3, 2)
    assert torch.equal(inside(whole, region), whole[:, 2:, :2])
    wanted = whole.clone()
    wanted[:, 2:, :2] = latents
    assert torch.equal(replaced(whole, latents, region), wanted)
    assert torch.equal(with_inside(whole, latents, region), wanted)
    assert torch.autograd.gradcheck(lambda part: with_inside(whole, part, region), latents.requires_grad_())
