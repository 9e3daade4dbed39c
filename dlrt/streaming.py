"""PCA of data that move, with scikit-learn's interface: samples that come in, or a matrix that changes."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from dlrt.checks import check_tolerance
from dlrt.integrators import Residual, augmented_bug
from dlrt.lowrank import LowRank, rank_within, truncate, truncated_svd

Found = tuple[Tensor, Tensor, Tensor]  # mean (n,), singular values (r,), components V (n, r)
NOISE = 0.01  # where there is nothing to tell it by; from 0.003 to 0.1 gaps are filled about as well


class StreamingPCA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """PCA that `partial_fit(X)` updates, and that holds r (m + n) numbers. X (m, n) is, by `follow`,

    "samples": new rows. With every row that comes, older ones count `forgetting` times as much. Without
    truncation and missing entries it does not matter how rows are dealt out to calls (Brand 2006; Ross et al.
    2008).
    "frames": the whole matrix as it is now, of which an anchored step of augmented BUG is taken.
    "increments": what has changed in the matrix since the last call; the first one takes the matrix itself.

    n_components is the largest rank. tau is the relative error (Frobenius, about the mean) of what may be
    left out: of all samples so far, weighed by age, or of the matrix in each call, where what the bases of a
    step do not see comes on top. A component that can be told from others keeps its direction. NaN is a
    missing entry: the fit to the known ones of its row replaces it, and in a column's first call the mean of
    what is known of it; an increment that is missing is 0. Arrays give arrays; torch tensors give tensors on
    their device.
    """

    def __init__(
        self,
        n_components: int | None = None,
        *,
        tau: float | None = None,
        forgetting: float = 1.0,
        follow: Literal["samples", "frames", "increments"] = "samples",
    ) -> None:
        self.n_components = n_components
        self.tau = tau
        self.forgetting = forgetting
        self.follow = follow

    def fit(self, X: ArrayLike | Tensor, y: Any = None) -> StreamingPCA:
        """The PCA of X alone."""
        return self._whole_update(X, first=True)

    def partial_fit(self, X: ArrayLike | Tensor, y: Any = None) -> StreamingPCA:
        """Take new samples, the next frame, or the next increment."""
        return self._whole_update(X, first=not self.__sklearn_is_fitted__())

    def _whole_update(self, X: ArrayLike | Tensor, first: bool) -> StreamingPCA:
        """An update of which a failure leaves the model as it was."""
        before = dict(vars(self))
        try:
            return self._update(X, first)
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    def _update(self, X: ArrayLike | Tensor, first: bool) -> StreamingPCA:
        is_tensor = isinstance(X, Tensor)
        X = self._read(X, first)
        self._check(X, first)
        known = ~X.isnan()
        if first:
            self._follow, self.n_samples_seen_ = self.follow, 0
            self._weight = self._squares = self._total = self._lost = 0.0  # Σ w, w², w ‖x - mean‖², left out
            self._seen = known.new_zeros(X.shape[1])  # columns of which a value has come
            mean, sigma, V = X.new_zeros(X.shape[1]), X.new_zeros(0), X.new_zeros(X.shape[1], 0)
        else:
            mean, sigma, V = self._found(X)
        before = V
        if self.follow != "increments" or first:
            seen = known.any(dim=0)
            mean = torch.where(seen & ~self._seen.to(X.device), X.nanmean(dim=0), mean)
            self._seen = self._seen.to(X.device) | seen
            filled = mean if first else self._scores(X, mean, V) @ V.mT + mean
        else:
            filled = X.new_zeros(())
        update = self._append if self.follow == "samples" else self._step
        mean, sigma, V = update(torch.where(known, X, filled), mean, sigma, V)
        signs = _signs(V, before)
        V = V * signs
        if self.follow != "samples":
            self._U = self._U * signs

        degrees = self._degrees(X)
        left = max(self._total - float(sigma.double().square().sum()), 0.0)
        self.noise_variance_ = left / degrees / max(X.shape[1] - len(sigma), 1)
        self.n_components_ = self._n_features_out = len(sigma)
        found = {"mean_": mean, "singular_values_": sigma, "components_": V.mT.contiguous()}
        for name, value in (found | {"explained_variance_": sigma.square() / degrees}).items():
            setattr(self, name, value if is_tensor else value.numpy())
        return self

    def transform(self, X: ArrayLike | Tensor) -> np.ndarray | Tensor:
        """The scores (m, r) of rows X (m, n); where entries are missing, those that fit the known ones."""
        check_is_fitted(self)
        rows = self._read(X, False)
        mean, _, V = self._found(rows)
        scores = self._scores(rows, mean, V)
        return scores if isinstance(X, Tensor) else scores.numpy()

    def inverse_transform(self, X: ArrayLike | Tensor) -> np.ndarray | Tensor:
        """The rows (m, n) of scores X (m, r)."""
        check_is_fitted(self)
        scores = torch.as_tensor(X if isinstance(X, Tensor) else np.array(X, order="C"))
        if scores.is_complex() or not scores.isfinite().all():
            what = scores.dtype if scores.is_complex() else "NaN or infinity"
            raise ValueError(f"scores must be real and finite, got {what}")
        if scores.dim() != 2 or scores.shape[1] != self.n_components_:
            raise ValueError(
                f"scores must have the shape (rows, {self.n_components_}), got {tuple(scores.shape)}"
            )
        scores = scores.to(self._precision(scores))
        mean, _, V = self._found(scores)
        rows = scores @ V.mT + mean
        return rows if isinstance(X, Tensor) else rows.numpy()

    def _append(self, X: Tensor, mean: Tensor, sigma: Tensor, V: Tensor) -> Found:
        """The SVD about the new mean of rows of weight w beside σ Vᵀ, which stands for the older ones.

        The parts that successive SVDs drop are orthogonal, so their squares add up: `_lost` is their sum, and
        at most tau² of `_total`.
        """
        m, keep = len(X), self.forgetting ** len(X)
        w = self.forgetting ** torch.arange(m - 1, -1, -1, dtype=X.dtype, device=X.device)
        new, old = float(w.sum()), keep * self._weight
        new_mean = w @ X / new
        shift = (new_mean - mean) * (new * old / (new + old)) ** 0.5  # between the means of both
        rows = torch.cat([w.sqrt()[:, None] * (X - new_mean), shift[None]])
        self._check_size(rows)
        total, lost = keep * self._total + float(rows.double().square().sum()), keep * self._lost
        _, values, V = truncated_svd(torch.cat([keep**0.5 * sigma[:, None] * V.mT, rows]))
        largest = min(self.n_samples_seen_ + m, self.n_components or X.shape[1])
        if self.tau is not None:
            may_go = max(self.tau**2 * total - lost, 0.0) / max(total - lost, torch.finfo(X.dtype).tiny)
            largest = min(largest, max(1, rank_within(values, max(may_go**0.5, torch.finfo(X.dtype).eps))))
        self._total, self._lost = total, lost + float(values[largest:].double().square().sum())
        self._weight, self._squares = old + new, keep**2 * self._squares + float(w.square().sum())
        self.n_samples_seen_ += m
        return mean + (new_mean - mean) * (new / (new + old)), values[:largest], V[:, :largest]

    def _step(self, X: Tensor, mean: Tensor, sigma: Tensor, V: Tensor) -> Found:
        """The matrix after this step; its left basis is kept, too."""
        centre = X.mean(dim=0)
        X = X - centre
        self._check_size(X)
        largest = min(*X.shape, self.n_components or len(X))
        if not len(sigma):
            Y = LowRank.from_dense(X, largest, self.tau)
            self._weight = self._squares = float(len(X))
        else:
            Y = LowRank(self._U.to(X), sigma.diag(), V)
            F = X if self.follow == "increments" else Residual(X, Y)
            Y_hat = augmented_bug(Y, F)
            Y = truncate(Y_hat, self.tau, max_rank=largest)
        self._U = Y.U
        self.n_samples_seen_ = len(X)
        if self.follow == "increments" and len(sigma):  # of what Y lacks, they say nothing
            self._total += float(Y_hat.S.double().square().sum() - sigma.double().square().sum())
            return mean + centre, Y.S.diagonal(), Y.V
        self._total = float(X.double().square().sum())
        return centre, Y.S.diagonal(), Y.V

    def _degrees(self, X: Tensor) -> float:
        """By how much squares are divided for a variance: of weights that are all 1, one less than rows."""
        return max(self._weight - self._squares / self._weight, torch.finfo(X.dtype).tiny)

    def _found(self, X: Tensor) -> Found:
        """Mean, singular values and components as tensors like X."""
        found = self.mean_, self.singular_values_, self.components_.T
        return tuple(torch.as_tensor(value).to(X) for value in found)

    def _scores(self, X: Tensor, mean: Tensor, V: Tensor) -> Tensor:
        """V fitted to the known entries of each row, with as much trust as the variances deserve."""
        known, D = ~X.isnan(), X - mean
        scores = torch.where(known, D, 0.0) @ V
        deviation = torch.as_tensor(self.singular_values_).to(X)
        largest = float(deviation.max())
        if not largest:
            return torch.zeros_like(scores)
        noise = (self._noise(deviation) * self._degrees(X)) ** 0.5 / largest
        noise = max(noise**2, torch.finfo(X.dtype).eps)
        deviation = deviation / largest
        for i in (~known.all(dim=1)).nonzero().flatten().tolist():
            B = V[known[i]] * deviation
            gram = B.mT @ B
            gram.diagonal().add_(noise)
            scores[i] = deviation * torch.linalg.solve(gram, B.mT @ D[i, known[i]])
        return scores

    def _noise(self, sigma: Tensor) -> float:
        """The variance of noise in an entry; where nothing is left out, a share of that of the components.

        Else few rows, which their components fit whatever they are, would be taken at their word.
        """
        nothing_left_out = len(sigma) >= min(self.n_samples_seen_ - 1, self.n_features_in_)
        share = NOISE * float(sigma.double().square().mean()) / self._degrees(sigma)
        return max(self.noise_variance_, share * nothing_left_out)

    def _read(self, X: ArrayLike | Tensor, reset: bool) -> Tensor:
        """X as a tensor of single or double precision, at least the model's, finite but for NaN."""
        if np.ma.is_masked(X):
            raise ValueError("data must have NaN where entries are missing, got a mask: give X.filled(nan)")
        if not isinstance(X, Tensor):
            dtypes = [np.float64, np.float32]
            X = validate_data(self, X, reset=reset, dtype=dtypes, ensure_all_finite="allow-nan")
            X = torch.tensor(np.ascontiguousarray(X))
        else:
            if X.dim() != 2 or not X.numel():
                raise ValueError(f"data must be a matrix of samples x features, got {tuple(X.shape)}")
            if X.layout != torch.strided:
                raise ValueError(f"data must be dense, got {X.layout}: give X.to_dense()")
            if X.is_complex():
                raise ValueError(f"data must be real, got {X.dtype}: take real and imaginary parts apart")
            if X.isinf().any():
                row, column = X.isinf().nonzero()[0].tolist()
                raise ValueError(f"data must be finite or NaN, got infinity in row {row}, column {column}")
            if reset:
                self.n_features_in_ = X.shape[1]
                vars(self).pop("feature_names_in_", None)  # those of data before
            elif X.shape[1] != self.n_features_in_:
                raise ValueError(f"X has {X.shape[1]} features, but it was fitted with {self.n_features_in_}")
        return X.detach().to(self._precision(X, reset))

    def _precision(self, X: Tensor, reset: bool = False) -> torch.dtype:
        """float32 of float32, float64 of all else, and at least that of the model."""
        own = X.dtype if X.dtype == torch.float32 else torch.float64
        return own if reset else torch.promote_types(own, torch.as_tensor(self.components_).dtype)

    def _check(self, X: Tensor, first: bool) -> None:
        """Raise ValueError for parameters out of range, or a matrix that is not the one that is followed."""
        check_tolerance(self.tau)
        if self.follow not in ("samples", "frames", "increments"):
            raise ValueError(f'follow must be "samples", "frames" or "increments", got {self.follow!r}')
        number = isinstance(self.forgetting, Real) and not isinstance(self.forgetting, bool)
        if not (number and 0 < self.forgetting <= 1):
            raise ValueError(f"forgetting must lie in (0, 1], got {self.forgetting!r}: 1 never forgets")
        if self.follow != "samples" and self.forgetting != 1:
            raise ValueError(
                f"forgetting is for samples, got {self.forgetting!r} of {self.follow}: leave it 1"
            )
        whole = isinstance(self.n_components, Integral) and not isinstance(self.n_components, bool)
        if self.n_components is not None and not (whole and 1 <= self.n_components <= X.shape[1]):
            raise ValueError(
                f"n_components must be a whole number in [1, {X.shape[1]}], got {self.n_components!r}"
            )
        if not first and self.follow != self._follow:
            raise ValueError(
                f"follow must stay {self._follow!r}, got {self.follow!r}: call fit to begin anew"
            )
        if self.follow != "samples" and not first and len(X) != self.n_samples_seen_:
            seen = self.n_samples_seen_
            raise ValueError(f"{self.follow} must keep their {seen} rows, got {len(X)}: call fit for others")

    @staticmethod
    def _check_size(rows: Tensor) -> None:
        """Raise ValueError where the squares of centred data overflow."""
        if not math.isfinite(float(rows.square().sum())):
            most = float(rows.abs().max())
            raise ValueError(f"the squares of the data must be finite, got entries of {most:.2g}: scale them")

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "components_")

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _signs(V: Tensor, before: Tensor) -> Tensor:
    """1 or -1 for each column of V (n, r): it is to point as does the column before that is nearest to it.

    Where none is near its largest entry is to be positive, as PCA has it.
    """
    signs = V.gather(0, V.abs().argmax(dim=0)[None])[0].sign()
    if not before.shape[1]:
        return signs
    overlaps = before.mT @ V
    nearest = overlaps.gather(0, overlaps.abs().argmax(dim=0)[None])[0]
    return torch.where(nearest.abs() > 0.5, nearest.sign(), signs)
