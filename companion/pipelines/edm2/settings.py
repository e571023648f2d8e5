"""The numbers of one call of `EDM2Pipeline`, checked."""

from dataclasses import dataclass
from typing import Literal, get_args

from companion.arguments import check_choice, check_integer, check_number, shortened
from companion.pipelines.call_arguments import OutputType
from companion.pipelines.edm2.sampler import MOST_STEPS, Churn, karras_levels

Interval = tuple[float, float]
Reference = Literal["guide", "null_label"]


@dataclass(frozen=True)
class EDM2Settings:
    """How a call samples and guides.

    Args:
        steps: N of the sampler, which evaluates D 2N - 1 times; 1 to 10,000.
        guidance_scale: s of `D_reference + s (D - D_reference)`, the paper's "guidance"; 1 evaluates no reference.
        interval: the σ, ends included, between which there is guidance (Kynkäänniemi et al. 2024); each evaluation uses
            its own σ. None is everywhere.
        reference: "guide", autoguidance or EDM2's guidance; "null_label", classifier-free guidance by the network
            itself; None is the guide if the pipeline has one, else the null label.
        sigma_min, sigma_max, rho: the noise levels (see `karras_levels`).
        churn: of the stochastic sampler; amount 0 is the deterministic one.
        output_type: what is returned.

    Raises:
        ValueError: an argument is out of its range.
    """

    steps: int
    guidance_scale: float
    interval: Interval | None
    reference: Reference | None
    sigma_min: float
    sigma_max: float
    rho: float
    churn: Churn
    output_type: OutputType

    def __post_init__(self) -> None:
        check_integer("num_inference_steps", self.steps, 1, MOST_STEPS)
        check_number("guidance_scale", self.guidance_scale)
        check_choice("guidance_reference", self.reference, get_args(Reference), optional=True)
        check_choice("output_type", self.output_type, get_args(OutputType))
        if self.interval is not None:
            check_interval(self.interval)
        _ = self.levels

    @property
    def levels(self) -> tuple[float, ...]:
        """The σ of the steps, and a final 0."""
        return karras_levels(self.steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)

    def guides_at(self, sigma: float) -> bool:
        """Whether there is guidance at a noise level."""
        inside = self.interval is None or self.interval[0] <= sigma <= self.interval[1]
        return self.guidance_scale != 1 and inside


def check_interval(interval: Interval) -> None:
    """Raises:
    ValueError: it is no pair of σ, the lower one first.
    """
    pair = isinstance(interval, (tuple, list)) and len(interval) == 2
    if not pair or not all(isinstance(end, (int, float)) for end in interval) or not interval[0] <= interval[1]:
        raise ValueError(
            f"guidance_interval must be (low, high), low <= high, in units of σ, got {shortened(interval)}"
        )
