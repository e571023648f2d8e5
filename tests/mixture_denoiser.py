"""The ideal network of class-conditional mixture data, called like a diffusers model: pipelines are checked with it."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from jaxtyping import Float, Int
from torch import Tensor, nn

from companion.exact.mixtures import GaussianMixture, Level, mixture_of
from companion.guidance.parametrization import PredictionType, check_prediction_type

Levels = Callable[[Float[Tensor, " batch"]], tuple[Level, Level]]
"""Timesteps -> (alpha, sigma), numbers or one per sample."""


class MixtureDenoiser(nn.Module):
    """The ideal network for class-conditional mixture data, called like a diffusers model.

    `denoiser(x, timestep, class_labels)` as `DiTTransformer2DModel`, `denoiser(x, timestep, encoder_hidden_states)` as
    `UNet2DConditionModel`, where the first entry of the first token is the label. x may have any shape after the
    batch: it is flattened to the mixtures' dimension. Computed in float64, returned in x's dtype; differentiable in
    both modes.

    Args:
        mixtures: the data of classes 0, 1, …
        levels: `alphas_cumprod` (VP; timesteps are indices into it), or a function timesteps -> (alpha, sigma) for any
            coordinates, e.g. `lambda t: (1.0, t)` for VE and `lambda t: (1 - t / 1000, t / 1000)` for diffusers' flows.
        prediction_type: "v_prediction" needs VP levels, "flow_prediction" needs `alpha = 1 - sigma`.
        unconditional: data of the null class; None mixes all classes equally.
        null_class: label of the null class; None is the number of classes. (`DiTPipeline` always asks for 1000.)
        sample_shape: (channels, height, width), published as `config` for the pipelines that read it there.

    Raises:
        ValueError: no mixtures, unknown prediction type, dimensions that disagree.
    """

    def __init__(
        self,
        mixtures: Sequence[GaussianMixture],
        levels: Float[Tensor, " steps"] | Levels,
        *,
        prediction_type: PredictionType = "epsilon",
        unconditional: GaussianMixture | None = None,
        null_class: int | None = None,
        sample_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.mixtures = tuple(mixtures)
        self.unconditional = mixture_of(self.mixtures) if unconditional is None else unconditional
        dimensions = {mixture.dimension for mixture in (*self.mixtures, self.unconditional)}
        if len(dimensions) != 1:
            raise ValueError(f"all mixtures must have one dimension, got {sorted(dimensions)}")
        if sample_shape is not None and sample_shape[0] * sample_shape[1] * sample_shape[2] not in dimensions:
            raise ValueError(f"sample_shape {sample_shape} does not multiply to the mixtures' dimension {dimensions}")
        self.levels = alphas_cumprod_levels(levels) if isinstance(levels, Tensor) else levels
        self.prediction_type = check_prediction_type(prediction_type)
        self.null_class = len(self.mixtures) if null_class is None else null_class
        channels, size = (sample_shape[0], sample_shape[2]) if sample_shape else (None, None)
        self.config = SimpleNamespace(
            in_channels=channels, out_channels=channels, sample_size=size, num_embeds_ada_norm=self.null_class
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    @property
    def device(self) -> torch.device:
        return self.unconditional.means.device

    def forward(
        self,
        hidden_states: Float[Tensor, "batch ..."] | None = None,
        timestep: Tensor | float = 0,
        class_labels: Int[Tensor, " batch"] | int | None = None,
        *,
        sample: Float[Tensor, "batch ..."] | None = None,
        encoder_hidden_states: Float[Tensor, "batch tokens width"] | None = None,
        return_dict: bool = True,
        **ignored: object,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The prediction for each sample of a batch.

        Raises:
            ValueError: no input, an unknown label, or levels that the prediction type does not allow.
        """
        x = sample if hidden_states is None else hidden_states
        if x is None:
            raise ValueError("pass the noisy batch as the first argument, hidden_states= or sample=")
        condition = class_labels if encoder_hidden_states is None else encoder_hidden_states
        flat = x.reshape(len(x), -1).to(torch.float64)
        alpha, sigma = self._level(timestep, flat)
        output = torch.zeros_like(flat)
        for mixture, chosen in self._branches(condition, len(x)):
            predicted = self._predict(mixture, flat[chosen], alpha[chosen], sigma[chosen])
            output = predicted if len(predicted) == len(x) else output.index_put((chosen,), predicted)
        output = output.reshape(x.shape).to(x.dtype)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def rectification_matrix(
        self, x: Float[Tensor, "batch ..."], timestep: Tensor | float, class_labels: Tensor | int | None = None
    ) -> Float[Tensor, "batch dim dim"]:
        """K of the conditional branch in closed form, x flattened; the same for every prediction type."""
        flat = x.reshape(len(x), -1).to(torch.float64)
        alpha, sigma = self._level(timestep, flat)
        result = flat.new_zeros(*flat.shape, flat.shape[1])
        for mixture, chosen in self._branches(class_labels, len(x)):
            result[chosen] = mixture.rectification_matrix(flat[chosen], alpha[chosen], sigma[chosen])
        return result

    def _level(self, timestep: Tensor | float, flat: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.as_tensor(timestep, device=flat.device).reshape(-1).expand(len(flat))
        alpha, sigma = (torch.as_tensor(v, dtype=torch.float64).expand(len(flat)) for v in self.levels(steps))
        if self.prediction_type == "v_prediction" and not torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha)):
            raise ValueError(
                "v_prediction needs levels with alpha² + sigma² = 1; use prediction_type='epsilon' or 'sample'"
            )
        if self.prediction_type == "flow_prediction" and not torch.allclose(alpha + sigma, torch.ones_like(alpha)):
            raise ValueError("flow_prediction needs levels with alpha = 1 - sigma; give levels=lambda t: (1 - t, t)")
        return alpha, sigma

    def _branches(self, condition: Tensor | int | None, batch: int) -> list[tuple[GaussianMixture, Tensor]]:
        """(mixture, indices of its samples), one entry per label in use."""
        if condition is None:
            condition = self.null_class
        labels = torch.as_tensor(condition)
        if labels.is_floating_point():
            labels = (labels[:, 0, 0] if labels.ndim == 3 else labels).round().long()
        labels = labels.reshape(-1).expand(batch)
        branches = []
        for label in labels.unique().tolist():
            if label != self.null_class and not 0 <= label < len(self.mixtures):
                raise ValueError(
                    f"class label {label} must be in 0..{len(self.mixtures) - 1} or the null class {self.null_class}"
                )
            mixture = self.unconditional if label == self.null_class else self.mixtures[label]
            branches.append((mixture, (labels == label).nonzero()[:, 0]))
        return branches

    def _predict(self, mixture: GaussianMixture, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        # Each from its own closed form: converting one into the other cancels digits at small sigma.
        match self.prediction_type:
            case "epsilon":
                return mixture.noise(x, alpha, sigma)
            case "sample":
                return mixture.posterior_mean(x, alpha, sigma)
            case "v_prediction":
                noise, clean = mixture.noise(x, alpha, sigma), mixture.posterior_mean(x, alpha, sigma)
                return alpha[:, None] * noise - sigma[:, None] * clean
            case "flow_prediction":
                return mixture.noise(x, alpha, sigma) - mixture.posterior_mean(x, alpha, sigma)


def alphas_cumprod_levels(alphas_cumprod: Float[Tensor, " steps"]) -> Levels:
    """VP levels `(√ᾱ, √(1-ᾱ))` of integer timesteps, as diffusers' schedulers store them."""
    table = alphas_cumprod.to(torch.float64)

    def levels(timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = table[timesteps.round().long()]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    return levels
