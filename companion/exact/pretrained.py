"""The networks of the REG paper's 1D toy, trained as it says and shipped: two MLPs, conditional and unconditional."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from companion.exact.chain import NoiseSchedule, Prediction, denoiser_prediction, linear_schedule, mixture_prediction
from companion.exact.mixtures import GaussianMixture
from companion.exact.networks import ToyDenoiser, ToyTraining, train_toy_denoiser
from companion.exact.toys import paper_1d

WEIGHTS = Path(__file__).parent / "weights" / "paper-1d"
SEEDS = {"conditional": 0, "unconditional": 1}
POINTS = 8000


def load_paper_1d(folder: Path = WEIGHTS) -> dict[str, ToyDenoiser]:
    """The networks `conditional` and `unconditional`, in float64 and evaluation mode.

    Raises:
        FileNotFoundError: the folder lacks one of them.
    """
    return load_branches(folder, 1, "companion.exact.pretrained.retrain_paper_1d")


def load_branches(folder: Path, dimension: int, retrain: str) -> dict[str, ToyDenoiser]:
    """The networks `conditional` and `unconditional` of a folder, in float64 and evaluation mode.

    Args:
        dimension: of their data.
        retrain: the function that trains them, for the error's text.

    Raises:
        FileNotFoundError: the folder lacks one of them.
    """
    networks = {}
    for branch in SEEDS:
        file = folder / f"{branch}.safetensors"
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist: train it with {retrain}({str(folder)!r})")
        network = ToyDenoiser(dimension)
        network.load_state_dict(load_file(file))
        networks[branch] = network.double().eval().requires_grad_(False)
    return networks


def paper_1d_data() -> dict[str, GaussianMixture]:
    """What the two networks learn."""
    data = paper_1d()
    return {"conditional": data.classes[0], "unconditional": data.unconditional}


def train_paper_1d(training: ToyTraining | None = None) -> dict[str, ToyDenoiser]:
    """Train both: 8,000 points each, 20 steps, β from 1e-4 to 0.02."""
    return train_branches(paper_1d_data(), linear_schedule(20), training)


def train_branches(
    data: Mapping[str, GaussianMixture], schedule: NoiseSchedule, training: ToyTraining | None = None
) -> dict[str, ToyDenoiser]:
    """A network for each branch, from 8,000 points of its mixture.

    Args:
        data: `conditional` and `unconditional`.
        training: None is the paper's recipe.
    """
    networks = {}
    for branch, mixture in data.items():
        points = mixture.sample(POINTS, torch.Generator().manual_seed(SEEDS[branch]))
        networks[branch] = train_toy_denoiser(points, schedule, SEEDS[branch], training)
    return networks


@torch.no_grad()
def excess_loss(network: Prediction, mixture: GaussianMixture, schedule: NoiseSchedule, draws: int = 4000) -> float:
    """`E ‖ε_θ - ε*‖²` averaged over t: the training loss above the least possible one, by Monte Carlo (seed 0)."""
    generator = torch.Generator().manual_seed(0)
    ideal, total = mixture_prediction(mixture, schedule), 0.0
    for t in range(1, schedule.steps + 1):
        x = mixture.sample(draws, generator, *schedule.level(t))
        total += float((network(x, t) - ideal(x, t)).square().sum(dim=1).mean()) / schedule.steps
    return total


def save_paper_1d(networks: dict[str, ToyDenoiser], folder: Path, seconds: float, training: ToyTraining) -> None:
    """Write the weights in float32, as they were trained, and the card."""
    about = (
        "# paper-1d\n\n"
        "Noise predictions for the REG paper's 1D toy: `conditional` learns 0.5·N(0.5, 0.25²) + 0.5·N(1.5, 0.25²), "
        "`unconditional` learns 0.5·N(-1, 0.5²) + 0.5·N(1, 0.5²).\n`companion.exact.load_paper_1d()`."
    )
    how = {"betas": "1e-4 to 0.02, linear", "retrain": "companion.exact.pretrained.retrain_paper_1d"}
    save_branches(networks, paper_1d_data(), linear_schedule(20), folder, seconds, training, about=about, **how)


def save_branches(
    networks: Mapping[str, ToyDenoiser],
    data: Mapping[str, GaussianMixture],
    schedule: NoiseSchedule,
    folder: Path,
    seconds: float,
    training: ToyTraining,
    *,
    about: str,
    betas: str,
    retrain: str,
) -> None:
    """Write the weights of both branches in float32, as they were trained, and their card.

    Args:
        data, schedule: what the networks learned.
        seconds: of processor time that the training took.
        about: title and description of the card.
        betas: of the schedule, in words.
        retrain: the function that trains them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, steps = [], schedule.steps
    for branch, mixture in data.items():
        weights = {name: value.float().contiguous() for name, value in networks[branch].state_dict().items()}
        save_file(weights, folder / f"{branch}.safetensors")
        loss = excess_loss(denoiser_prediction(networks[branch], schedule), mixture, schedule)
        rows.append(
            f"| {branch}: mean squared distance to the ideal ε, 4,000 draws at each of {steps} t | {loss:.5f} |"
        )
    record = {
        "points": POINTS, "epochs": training.epochs, "batch_size": training.batch, "optimiser": "adamw",
        "learning_rate": training.learning_rate, "decay": "cosine to 0", "loss": "mean squared error of ε, uniform t",
        "steps": steps, "betas": betas, "width": 128, "residual_layers": 3, "seeds": SEEDS,
        "processor_seconds": round(seconds), "device": f"CPU, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
    }  # fmt: skip
    (folder / "README.md").write_text(
        f"{about}\n\n## Figures\n\n| what | measured |\n|---|---|\n" + "\n".join(rows) + "\n\n"
        f"## How they were trained\n\n```json\n{json.dumps(record, indent=2, ensure_ascii=False)}\n```\n\n"
        f"`{retrain}(folder)` trains them again.\n\nLicence: MIT, like the package.\n"
    )


def retrain_paper_1d(folder: Path, training: ToyTraining | None = None) -> None:
    """Train both networks again, by default as the paper says, and write them with their card."""
    began, recipe = time.process_time(), training or ToyTraining()
    networks = train_paper_1d(recipe)
    save_paper_1d(networks, folder, time.process_time() - began, recipe)
