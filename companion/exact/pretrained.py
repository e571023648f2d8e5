"""Two small networks of a problem, conditional and unconditional, trained as the REG paper says and shipped.

`PAPER_1D` are those of the paper's 1D toy; the tree's are in `pretrained_2d`.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from companion.exact.chain import NoiseSchedule, Prediction, denoiser_prediction, linear_schedule, mixture_prediction
from companion.exact.mixtures import GaussianMixture
from companion.exact.networks import ToyDenoiser, ToyTraining, train_toy_denoiser
from companion.exact.toys import Toy, paper_1d
from companion.markdown import table

WEIGHTS = Path(__file__).parent / "weights"
SEEDS = {"conditional": 0, "unconditional": 1}
POINTS = 8000


@dataclass(frozen=True)
class ToyNetworks:
    """The networks of a toy: what they learn, and where they are.

    Args:
        folder: of the weights and their card.
        toy: its first class is what `conditional` learns, all of it what `unconditional` learns.
        schedule: they are trained at its levels.
        betas: the schedule in words, for the card.
        about: title and description of the card.
        retrain_by: the function that trains them again, for the card and for messages.
    """

    folder: Path
    toy: Toy
    schedule: NoiseSchedule
    betas: str
    about: str
    retrain_by: str

    @property
    def data(self) -> dict[str, GaussianMixture]:
        """What the two networks learn."""
        return {"conditional": self.toy.classes[0], "unconditional": self.toy.unconditional}

    def load(self, folder: Path | None = None) -> dict[str, ToyDenoiser]:
        """The networks `conditional` and `unconditional`, in float64 and evaluation mode.

        Args:
            folder: None is the package's own.

        Raises:
            FileNotFoundError: the folder lacks one of them.
        """
        networks, folder = {}, folder or self.folder
        for branch, mixture in self.data.items():
            file = folder / f"{branch}.safetensors"
            if not file.exists():
                raise FileNotFoundError(f"{file} does not exist: train it with {self.retrain_by}({str(folder)!r})")
            network = ToyDenoiser(mixture.dimension)
            network.load_state_dict(load_file(file))
            networks[branch] = network.double().eval().requires_grad_(False)
        return networks

    def retrain(self, folder: Path, training: ToyTraining | None = None) -> None:
        """Train both networks again, each from 8,000 points, and write them with their card.

        Args:
            training: None is the paper's recipe.
        """
        began, recipe = time.process_time(), training or ToyTraining()
        networks = {}
        for branch, mixture in self.data.items():
            points = mixture.sample(POINTS, torch.Generator().manual_seed(SEEDS[branch]))
            networks[branch] = train_toy_denoiser(points, self.schedule, SEEDS[branch], recipe)
        self.save(networks, folder, time.process_time() - began, recipe)

    def save(self, networks: Mapping[str, ToyDenoiser], folder: Path, seconds: float, training: ToyTraining) -> None:
        """Write the weights in float32, as they were trained, and the card.

        Args:
            seconds: of processor time that the training took.
        """
        folder.mkdir(parents=True, exist_ok=True)
        rows, steps = [], self.schedule.steps
        for branch, mixture in self.data.items():
            weights = {name: value.float().contiguous() for name, value in networks[branch].state_dict().items()}
            save_file(weights, folder / f"{branch}.safetensors")
            loss = excess_loss(denoiser_prediction(networks[branch], self.schedule), mixture, self.schedule)
            what = f"{branch}: mean squared distance to the ideal ε, 4,000 draws at each of {steps} t"
            rows.append((what, f"{loss:.5f}"))
        record = {
            "points": POINTS, "epochs": training.epochs, "batch_size": training.batch, "optimiser": "adamw",
            "learning_rate": training.learning_rate, "decay": "cosine to 0",
            "loss": "mean squared error of ε, uniform t", "steps": steps, "betas": self.betas, "width": 128,
            "residual_layers": 3, "seeds": SEEDS, "processor_seconds": round(seconds),
            "device": f"CPU, {torch.get_num_threads()} thread", "torch": torch.__version__,
        }  # fmt: skip
        (folder / "README.md").write_text(
            f"{self.about}\n\n## Figures\n\n{table(['what', 'measured'], rows)}\n\n"
            f"## How they were trained\n\n```json\n{json.dumps(record, indent=2, ensure_ascii=False)}\n```\n\n"
            f"`{self.retrain_by}(folder)` trains them again.\n\nLicence: MIT, like the package.\n"
        )


@torch.no_grad()
def excess_loss(network: Prediction, mixture: GaussianMixture, schedule: NoiseSchedule, draws: int = 4000) -> float:
    """`E ‖ε_θ - ε*‖²` averaged over t: the training loss above the least possible one, by Monte Carlo (seed 0)."""
    generator = torch.Generator().manual_seed(0)
    ideal, total = mixture_prediction(mixture, schedule), 0.0
    for t in range(1, schedule.steps + 1):
        x = mixture.sample(draws, generator, *schedule.level(t))
        total += float((network(x, t) - ideal(x, t)).square().sum(dim=1).mean()) / schedule.steps
    return total


PAPER_1D = ToyNetworks(
    WEIGHTS / "paper-1d",
    paper_1d(),
    linear_schedule(20),
    "1e-4 to 0.02, linear",
    "# paper-1d\n\n"
    "Noise predictions for the REG paper's 1D toy: `conditional` learns 0.5·N(0.5, 0.25²) + 0.5·N(1.5, 0.25²), "
    "`unconditional` learns 0.5·N(-1, 0.5²) + 0.5·N(1, 0.5²).\n`companion.exact.load_paper_1d()`.",
    "companion.exact.pretrained.retrain_paper_1d",
)
load_paper_1d = PAPER_1D.load
"""`ToyNetworks.load` of the networks of the paper's 1D toy."""
retrain_paper_1d = PAPER_1D.retrain
"""`ToyNetworks.retrain` of the networks of the paper's 1D toy."""
