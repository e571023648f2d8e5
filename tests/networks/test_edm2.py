"""EDM2's network: what its preconditioning and its magnitude-preserving layers promise, on random weights."""

import math

import pytest
import torch
from torch import Tensor

from companion.networks.edm2 import Block, EDM2UNet, MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalise

TINY = {
    "sample_size": 8,
    "num_classes": 10,
    "model_channels": 16,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "channels_per_head": 8,
}


def tiny_unet(seed: int = 0, dtype: torch.dtype = torch.float64, **config) -> EDM2UNet:
    """Random weights of any magnitude; gains, which start at 0, are 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = EDM2UNet(**{**TINY, **config})
        for name, parameter in network.named_parameters():
            parameter.data = torch.ones([]) if name.endswith("gain") else 3 * parameter.data
    return network.eval().requires_grad_(False).to(dtype)


def noisy(sigma: float, batch: int = 2, dtype: torch.dtype = torch.float64, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, batch, 4, size, size, generator=generator, dtype=torch.float64)
    return (0.5 * clean + sigma * noise).to(dtype)


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


LABELS = torch.tensor([3, 7])


@pytest.mark.parametrize("sigma", [1e-4, 0.002, 0.5, 80.0, 1e4])
def test_preconditioning(sigma):
    network, x, seen = tiny_unet(), noisy(sigma), {}
    network.enc["8x8_conv"].register_forward_pre_hook(lambda module, inputs: seen.update(into=inputs[0]))
    network.out_conv.register_forward_hook(lambda module, inputs, output: seen.update(out=output))
    denoised = network(x, sigma, LABELS).sample
    assert rms(seen["into"]) == pytest.approx(1, abs=0.1)  # whatever σ is
    assert torch.equal(seen["into"][:, -1], torch.ones(2, 8, 8, dtype=torch.float64))
    signal = 0.5**2 / (0.5**2 + sigma**2)  # of x's variance
    c_out = (1 / sigma**2 + 1 / 0.5**2) ** -0.5  # posterior deviation of Gaussian data: the smaller of the two wins
    assert torch.allclose(denoised, signal * x + c_out * seen["out"], rtol=1e-12)
    if sigma < 1e-3:
        assert (denoised - x).norm() < 2 * sigma / 0.5 * x.norm()
    if sigma > 1e3:
        assert torch.allclose(denoised, 0.5 * seen["out"], atol=1e-3)


def test_gaussian_data_is_denoised_exactly_by_a_silent_network():
    network = EDM2UNet(**TINY).eval()  # its output gain starts at 0
    x = noisy(2.0, dtype=torch.float32)
    assert torch.allclose(network(x, 2.0, LABELS).sample, x * 0.25 / 4.25)


def test_layers_preserve_magnitude():
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 64, 32, 8, 8, generator=generator)
    for balance in (0.0, 0.3, 0.5, 1.0):
        assert rms(mp_sum(a, b, balance)) == pytest.approx(1, abs=0.01)
        assert rms(mp_cat(a, b[:, :8], balance)) == pytest.approx(1, abs=0.01)
    both = mp_cat(a, b[:, :8], 0.5)
    assert both[:, :32].square().sum() == pytest.approx(float(both[:, 32:].square().sum()), rel=0.02)
    assert rms(mp_silu(a)) == pytest.approx(1, abs=0.01)
    assert torch.allclose(normalise(5 * a, dim=1).square().mean(dim=1), torch.ones(64, 8, 8), atol=1e-3)
    assert normalise(torch.zeros(2, 3), dim=1).isfinite().all()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert rms(MPFourier(4096)(torch.linspace(-2, 2, 9))) == pytest.approx(1, abs=0.02)
        assert rms(MPConv(32, 48, 3)(a)) == pytest.approx(1, abs=0.1)  # zeros beyond the border take a part
        assert rms(MPConv(32, 48, 0)(a[:, :, 0, 0])) == pytest.approx(1, abs=0.1)


def test_activations_keep_unit_magnitude_through_the_whole_network():
    network = tiny_unet(dtype=torch.float32, sample_size=16, model_channels=64, channels_per_head=64)
    sizes = {}
    for name, module in network.named_modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda m, inputs, output, name=name: sizes.update({name: rms(output)}))
    network(noisy(1.0, batch=4, dtype=torch.float32, size=16), 1.0, torch.arange(4))
    assert len(sizes) == 10
    # Decoder blocks have no pixel norm: with magnitudes drifting by a factor a block they would leave this band.
    assert all(0.8 < size < 1.25 for size in sizes.values()), sizes


def test_only_the_direction_of_weights_matters():
    network, x = tiny_unet(), noisy(0.7)
    before = network(x, 0.7, LABELS).sample
    for name, parameter in network.named_parameters():
        if not name.endswith("gain"):
            parameter.mul_(20.0)
    after = network(x, 0.7, LABELS).sample
    assert (after - before).norm() < 1e-3 * before.norm()  # up to the 1e-4 added to the norm
    assert not torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_folded_weights_give_the_same_bits_and_survive_saving(tmp_path, dtype):
    network, x = tiny_unet(dtype=dtype), noisy(0.7, dtype=torch.float32)
    plain = network(x, 0.7, LABELS).sample
    assert plain.dtype == torch.float32 and plain.isfinite().all()
    network.save_pretrained(tmp_path / "plain")
    folded = network.fold_weights()
    assert torch.equal(folded(x, 0.7, LABELS).sample, plain)
    assert torch.equal(folded.fold_weights()(x, 0.7, LABELS).sample, plain)  # folding twice is folding once
    folded.save_pretrained(tmp_path / "folded")
    for name in ("plain", "folded"):
        assert (tmp_path / name / "diffusion_pytorch_model.safetensors").is_file()
        loaded = EDM2UNet.from_pretrained(tmp_path / name, dtype=dtype)
        assert loaded.config.folded == (name == "folded") and not loaded.training
        assert torch.equal(loaded(x, 0.7, LABELS).sample, plain)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.06)])
def test_lower_precision_follows_float64(dtype, tolerance):
    x = noisy(0.7)
    exact, rounded = tiny_unet()(x, 0.7, LABELS).sample, tiny_unet(dtype=dtype)(x, 0.7, LABELS).sample
    assert rounded.dtype == torch.float64 and (exact - rounded).norm() < tolerance * exact.norm()


def test_labels_and_levels():
    network, x = tiny_unet(), noisy(0.7)
    by_number = network(x, 0.7, LABELS).sample
    weights = torch.eye(10, dtype=torch.float64)[LABELS]
    assert torch.equal(network(x, 0.7, weights).sample, by_number)
    [as_tuple] = network(x, torch.tensor(0.7, dtype=torch.float64), LABELS, return_dict=False)
    assert torch.equal(as_tuple, by_number)
    null = network(x, 0.7).sample
    assert torch.allclose(network(x, 0.7, torch.zeros(2, 10)).sample, null, atol=1e-12)
    assert not torch.allclose(null, by_number, atol=1e-3)
    mixed = network(x, torch.tensor([0.7, 3.0], dtype=torch.float64), LABELS).sample
    assert torch.allclose(mixed[:1], network(x[:1], 0.7, LABELS[:1]).sample, atol=1e-12)
    assert torch.allclose(mixed[1:], network(x[1:], 3.0, LABELS[1:]).sample, atol=1e-12)
    unconditional = tiny_unet(num_classes=0)
    assert unconditional(x, 0.7).sample.shape == x.shape
    with pytest.raises(ValueError, match=r"class_labels must be None: .* without classes"):
        unconditional(x, 0.7, LABELS)
    with pytest.raises(ValueError, match=r"class_labels must be \(batch,\) integers or \(batch, 10\) weights"):
        network(x, 0.7, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="sample_size must be a multiple of 2, got 9"):
        EDM2UNet(**{**TINY, "sample_size": 9})


def test_derivatives_of_both_modes_agree():
    network, x = tiny_unet(), noisy(0.7)
    generator = torch.Generator().manual_seed(4)
    u, v = torch.randn(2, *x.shape, generator=generator, dtype=torch.float64)

    def denoise(z: Tensor) -> Tensor:
        return network(z, 0.7, LABELS).sample

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        forward = torch.func.jvp(denoise, (x,), (u,))[1]
    backward = torch.func.vjp(denoise, x)[1](v)[0]
    assert float((v * forward).sum()) == pytest.approx(float((backward * u).sum()), rel=1e-9)
    central = (denoise(x + 1e-5 * u) - denoise(x - 1e-5 * u)) / 2e-5
    assert torch.allclose(central, forward, atol=1e-7)


@pytest.mark.parametrize(
    ("channels", "millions"), [(128, 125), (192, 280), (256, 498), (320, 777), (384, 1119), (448, 1523)]
)
def test_published_sizes(channels, millions):
    """Parameters of XS to XXL (Karras et al. 2024, table 2)."""
    with torch.device("meta"):
        network = EDM2UNet(model_channels=channels)
    assert math.isclose(sum(p.numel() for p in network.parameters()) / 1e6, millions, rel_tol=0.01)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channels_per_head": 0}, "channels_per_head must be an integer from 1 to 65,536, got 0"),
        ({"channel_mult": []}, r"channel_mult must name 1 to 16 levels, got \[\]"),
        ({"channel_mult": [1, 0]}, r"channel_mult\[1\] must be an integer"),
        ({"num_blocks": 10**7}, "num_blocks must be an integer from 1 to 65,536, got 10000000"),
        ({"sample_size": -8}, "sample_size must be an integer"),
        ({"model_channels": 2.5}, r"model_channels must be an integer from 1 to 65,536, got 2\.5"),
    ],
)
def test_impossible_networks(change, words):
    with pytest.raises(ValueError, match=words):
        EDM2UNet(**{**TINY, **change})
