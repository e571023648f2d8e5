"""Gaussian mixtures: data whose noisy densities, scores, denoisers and posterior covariances are closed forms.

If `x_0 ~ Σ_k w_k N(m_k, C_k)` and `x = α x_0 + σ ε`, then `x ~ Σ_k w_k N(α m_k, α² C_k + σ² I)`. A covariance is stored
as its eigendecomposition `C_k = U_k diag(λ_k) U_kᵀ`, so every level costs one product with the U_k and divisions. All
in float64.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Level = float | Float[Tensor, "*batch"]


class GaussianMixture:
    """A mixture of Gaussians in any dimension; methods take the noise level (alpha, sigma), clean data by default.

    Args:
        weights: positive, any scale; stored normalised.
        means: one per component.
        covariances: symmetric positive semi-definite, one per component.

    Raises:
        ValueError: shapes disagree, a weight is not positive, a covariance is not symmetric positive semi-definite.
    """

    def __init__(
        self,
        weights: Float[Tensor, " components"] | Sequence[float],
        means: Float[Tensor, "components dim"] | Sequence[Sequence[float]],
        covariances: Float[Tensor, "components dim dim"],
    ) -> None:
        weights = torch.as_tensor(weights, dtype=torch.float64)
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.covariances = torch.as_tensor(covariances, dtype=torch.float64)
        if self.means.ndim != 2 or self.covariances.shape != (*self.means.shape, self.means.shape[1]):
            raise ValueError(
                f"means must be (components, dim) and covariances (components, dim, dim), "
                f"got {tuple(self.means.shape)} and {tuple(self.covariances.shape)}"
            )
        if weights.shape != self.means.shape[:1] or not (weights > 0).all():
            raise ValueError(f"weights must be {len(self.means)} positive numbers, got {weights.tolist()}")
        if not torch.allclose(self.covariances, self.covariances.mT):
            raise ValueError("covariances must be symmetric")
        self.weights = weights / weights.sum()
        eigenvalues, self._axes = torch.linalg.eigh(self.covariances)
        if (eigenvalues < -1e-12 * eigenvalues.abs().amax()).any():
            raise ValueError(f"covariances must be positive semi-definite, smallest eigenvalue {eigenvalues.min():.3g}")
        self._eigenvalues = eigenvalues.clamp(min=0)
        # One matrix product projects a sample on the axes of all components.
        self._flat_axes = self._axes.permute(1, 0, 2).reshape(self.dimension, -1)
        self._projected_means = torch.einsum("kd,kde->ke", self.means, self._axes)

    @classmethod
    def isotropic(
        cls,
        weights: Float[Tensor, " components"] | Sequence[float],
        means: Float[Tensor, "components dim"] | Sequence[Sequence[float]],
        stds: float | Float[Tensor, " components"] | Sequence[float],
    ) -> "GaussianMixture":
        """Components `N(m_k, std_k² I)`; one std for all or one each."""
        means = torch.as_tensor(means, dtype=torch.float64)
        stds = torch.as_tensor(stds, dtype=torch.float64).expand(len(means))
        return cls(weights, means, stds[:, None, None] ** 2 * torch.eye(means.shape[1], dtype=torch.float64))

    @property
    def components(self) -> int:
        return len(self.means)

    @property
    def dimension(self) -> int:
        return self.means.shape[1]

    def mean(self) -> Float[Tensor, " dim"]:
        """Mean of x_0."""
        return self.weights @ self.means

    def covariance(self) -> Float[Tensor, "dim dim"]:
        """Covariance of x_0."""
        centred = self.means - self.mean()
        return torch.einsum("k,kij->ij", self.weights, self.covariances + centred[:, :, None] * centred[:, None, :])

    def sample(
        self, count: int, generator: torch.Generator, alpha: float = 1.0, sigma: float = 0.0
    ) -> Float[Tensor, "count dim"]:
        """Independent draws of `α x_0 + σ ε`.

        Raises:
            ValueError: `count` is below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        normal = torch.randn(count, self.dimension, dtype=torch.float64, generator=generator)
        clean = self.means[chosen]
        clean = clean + torch.einsum("nde,ne->nd", self._axes[chosen], self._eigenvalues[chosen].sqrt() * normal)
        if sigma == 0:
            return alpha * clean
        return alpha * clean + sigma * torch.randn(clean.shape, dtype=torch.float64, generator=generator)

    def log_prob(
        self, x: Float[Tensor, "batch dim"], alpha: Level = 1.0, sigma: Level = 0.0
    ) -> Float[Tensor, " batch"]:
        """Log-density of `α x_0 + σ ε` at x."""
        joint = self._log_joint(*self._project(x, alpha, sigma))
        # exp(-700) is nothing beside 1; below -708 torch's exp takes thirty times as long.
        return joint.clamp(min=joint.amax(dim=1, keepdim=True) - 700).logsumexp(dim=1)

    def score(
        self, x: Float[Tensor, "batch dim"], alpha: Level = 1.0, sigma: Level = 0.0
    ) -> Float[Tensor, "batch dim"]:
        """Gradient of `log_prob` in x."""
        offsets, variances = self._project(x, alpha, sigma)
        return -self._average(offsets / variances, self._log_joint(offsets, variances).softmax(dim=1))

    def noise(self, x: Float[Tensor, "batch dim"], alpha: Level, sigma: Level) -> Float[Tensor, "batch dim"]:
        """The ideal noise prediction `E[ε | x] = -σ score(x)`."""
        return -_column(sigma, x) * self.score(x, alpha, sigma)

    def posterior_mean(self, x: Float[Tensor, "batch dim"], alpha: Level, sigma: Level) -> Float[Tensor, "batch dim"]:
        """The ideal clean estimate `x̂_0 = E[x_0 | x]`."""
        offsets, variances = self._project(x, alpha, sigma)
        shares = self._log_joint(offsets, variances).softmax(dim=1)
        gain = _column(alpha, x)[..., None] * self._eigenvalues / variances
        return shares @ self.means + self._average(gain * offsets, shares)

    def posterior_covariance(
        self, x: Float[Tensor, "batch dim"], alpha: Level, sigma: Level
    ) -> Float[Tensor, "batch dim dim"]:
        """`Cov[x_0 | x]`; symmetric and positive semi-definite."""
        shares, means, within = self._posteriors(x, alpha, sigma)
        centred = means - torch.einsum("nk,nkd->nd", shares, means)[:, None]
        within = torch.einsum("kde,nke,kfe->ndf", self._axes, shares[..., None] * within, self._axes)
        return within + torch.einsum("nk,nkd,nkf->ndf", shares, centred, centred)

    def rectification_matrix(
        self, x: Float[Tensor, "batch dim"], alpha: Level, sigma: Level
    ) -> Float[Tensor, "batch dim dim"]:
        """`K = α ∂x̂_0/∂x = (α²/σ²) Cov[x_0 | x]` (Tweedie's second-order formula); needs `sigma > 0`."""
        ratio = _column(alpha, x) / _column(sigma, x)
        return ratio[..., None] ** 2 * self.posterior_covariance(x, alpha, sigma)

    def rectification_product(
        self, x: Float[Tensor, "batch dim"], vector: Float[Tensor, "batch dim"], alpha: Level, sigma: Level
    ) -> Float[Tensor, "batch dim"]:
        """`K v` without forming K: a few products with the axes of the components, whatever the dimension."""
        shares, means, within = self._posteriors(x, alpha, sigma)
        scaled = within * (vector @ self._flat_axes).reshape(means.shape)
        centred = means - torch.einsum("nk,nkd->nd", shares, means)[:, None]
        along = shares * torch.einsum("nkd,nd->nk", centred, vector)
        product = self._average(scaled, shares) + torch.einsum("nk,nkd->nd", along, centred)
        return (_column(alpha, x) / _column(sigma, x)) ** 2 * product

    def rectification_diagonal(
        self, x: Float[Tensor, "batch dim"], alpha: Level, sigma: Level
    ) -> Float[Tensor, "batch dim"]:
        """The diagonal of K, without forming K."""
        shares, means, within = self._posteriors(x, alpha, sigma)
        centred = means - torch.einsum("nk,nkd->nd", shares, means)[:, None]
        diagonal = torch.einsum("nk,kde,nke->nd", shares, self._axes**2, within.expand_as(means))
        diagonal = diagonal + torch.einsum("nk,nkd->nd", shares, centred**2)
        return (_column(alpha, x) / _column(sigma, x)) ** 2 * diagonal

    def _posteriors(self, x: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor, Tensor]:
        """Each component's share of the posterior, its mean, and its variances along the component's axes."""
        offsets, variances = self._project(x, alpha, sigma)
        shares = self._log_joint(offsets, variances).softmax(dim=1)
        gain = _column(alpha, x)[..., None] * self._eigenvalues / variances
        means = self.means + torch.einsum("kde,nke->nkd", self._axes, gain * offsets)
        return shares, means, self._eigenvalues * _column(sigma, x)[..., None] ** 2 / variances

    def _project(self, x: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor]:
        """x - α m_k along each component's axes, and the variances there: broadcast to (batch, components, dim)."""
        if x.ndim != 2 or x.shape[1] != self.dimension:
            raise ValueError(f"x must be (batch, {self.dimension}), got {tuple(x.shape)}")
        alpha_, sigma_ = _column(alpha, x)[..., None], _column(sigma, x)[..., None]
        offsets = (x @ self._flat_axes).reshape(len(x), *self.means.shape) - alpha_ * self._projected_means
        return offsets, alpha_**2 * self._eigenvalues + sigma_**2

    def _log_joint(self, offsets: Tensor, variances: Tensor) -> Float[Tensor, "batch components"]:
        normaliser = (2 * torch.pi * variances).log().sum(dim=-1)
        squares = offsets**2 / variances
        # The same sum, but torch takes five times as long over so short an axis.
        distance = squares[..., 0] + squares[..., 1] if self.dimension == 2 else squares.sum(dim=-1)
        return self.weights.log() - 0.5 * (normaliser + distance)

    def _average(self, projected: Tensor, shares: Float[Tensor, "batch components"]) -> Float[Tensor, "batch dim"]:
        """Σ_k share_k U_k projected_k."""
        return (shares[..., None] * projected).reshape(len(shares), -1) @ self._flat_axes.T


def mixture_of(mixtures: Sequence[GaussianMixture]) -> GaussianMixture:
    """The mixture of mixtures, equally weighted: the unconditional data of a set of classes.

    Raises:
        ValueError: no mixtures.
    """
    if not mixtures:
        raise ValueError("mixtures must hold at least one GaussianMixture, got none")
    return GaussianMixture(
        torch.cat([mixture.weights for mixture in mixtures]),
        torch.cat([mixture.means for mixture in mixtures]),
        torch.cat([mixture.covariances for mixture in mixtures]),
    )


def _column(level: Level, x: Tensor) -> Tensor:
    """A level as a column that broadcasts against a (batch, …) tensor."""
    return torch.as_tensor(level, dtype=x.dtype, device=x.device).reshape(-1, 1)
