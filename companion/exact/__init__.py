"""Ground truth in 1D and 2D: mixtures, chains on a grid, the optimal direction (the paper calls it golden), and what
standard guidance leaves out."""

from companion.extras import need

need("tables", __name__)

from companion.deprecation import renamed_names
from companion.exact.accuracy import Accuracy, accuracy, optimum_error, weighted_error
from companion.exact.bounds import (
    DefectBound,
    ExtrapolationError,
    TiltedMoments,
    defect_bound,
    extrapolation_error,
    tilted_moments,
)
from companion.exact.chain import (
    DDPMChain,
    NoiseSchedule,
    Optimum,
    Prediction,
    denoiser_prediction,
    linear_schedule,
    mixture_prediction,
    standard_normal,
    tilted_marginals,
)
from companion.exact.covariance import ESTIMATES, Estimate, covariance_direction, jacobian_matrix
from companion.exact.densities import kl, mass, moments, normalise, sample_density, total_variation, wasserstein1
from companion.exact.directions import (
    Direction,
    ErrorSplit,
    cfg_direction,
    direction_error,
    direction_field,
    error_split,
    guided,
    rectified_direction,
    reward_direction,
    split_sizes,
    win_ratio,
)
from companion.exact.grids import Grid, evaluate, gradient, interpolate, log_blur
from companion.exact.marginal_scaling import implied_reward, reward_levels
from companion.exact.mixtures import GaussianMixture, mixture_of
from companion.exact.monte_carlo import MonteCarloOptimum, monte_carlo_optimum
from companion.exact.networks import ToyDenoiser, ToyTraining, train_toy_denoiser
from companion.exact.pretrained import excess_loss, load_paper_1d
from companion.exact.rewards import (
    Reward,
    callable_reward,
    classifier_free_reward,
)
from companion.exact.sampling import (
    Interval,
    ancestral_samples,
    energy_distance,
    energy_distance_difference,
    energy_distance_interval,
    seed_interval,
)
from companion.exact.toys import TOYS, Toy, toy

__getattr__ = renamed_names(
    __name__,
    {
        "MonteCarloGolden": "MonteCarloOptimum",
        "everyday_direction": "cfg_direction",
        "monte_carlo_golden": "monte_carlo_optimum",
    },
)
