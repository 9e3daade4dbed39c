"""PCA of data that move, with scikit-learn's interface: samples that come in, or a matrix that changes."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from dlrt.checks import check_precision, check_tolerance
from dlrt.integrators import Residual, augmented_bug
from dlrt.lowrank import LowRank, truncated_svd


class StreamingPCA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """PCA that `partial_fit(X)` updates, and that holds r (m + n) numbers. X (m, n) is, by `follow`,

    "samples": new rows. With every row that comes, older ones count `forgetting` times as much; without
    truncation it does not matter how rows are dealt out to calls (Brand 2006; Ross et al. 2008).
    "frames": the whole matrix as it is now, of which an anchored step of augmented BUG is taken.
    "increments": what has changed in the matrix since the last call; the first one takes the matrix itself.

    n_components is the largest rank, tau the relative tolerance (Frobenius) to which a call truncates. NaN is
    a missing entry: the fit to the known ones of its row replaces it, and in the first call the mean of its
    column; an increment that is missing is 0. Arrays give arrays; torch tensors give tensors on their device.
    """

    def __init__(self, n_components=None, *, tau=None, forgetting=1.0, follow="samples"):
        self.n_components = n_components
        self.tau = tau
        self.forgetting = forgetting
        self.follow = follow

    def fit(self, X, y=None):
        """The PCA of X alone."""
        vars(self).pop("components_", None)
        return self.partial_fit(X)

    def partial_fit(self, X, y=None):
        """Take new samples, the next frame, or the next increment."""
        first, is_tensor = not hasattr(self, "components_"), isinstance(X, Tensor)
        X = self._read(X, first)
        self._check(X, first)
        if first:
            self._weight = self._squares = self._total = 0.0  # Σ w, Σ w², Σ w ‖x - mean‖²
            self.n_samples_seen_ = 0
            mean, sigma, V = X.new_zeros(X.shape[1]), X.new_zeros(0), X.new_zeros(X.shape[1], 0)
            filled = X.nanmean(dim=0).nan_to_num()
        else:
            found = self.mean_, self.singular_values_, self.components_.T
            mean, sigma, V = map(torch.as_tensor, found)
            filled = X.new_zeros(()) if self.follow == "increments" else self._scores(X) @ V.mT + mean
        X = torch.where(X.isnan(), filled, X)
        update = self._append if self.follow == "samples" else self._move
        mean, sigma, V = update(X, mean, sigma, V)

        degrees = max(self._weight - self._squares / self._weight, torch.finfo(X.dtype).tiny)
        left = max(self._total - float(sigma.square().sum()), 0.0)
        self.noise_variance_ = left / degrees / max(X.shape[1] - len(sigma), 1)
        self.n_components_ = self._n_features_out = len(sigma)
        found = {"mean_": mean, "singular_values_": sigma, "components_": V.mT.contiguous()}
        for name, value in (found | {"explained_variance_": sigma.square() / degrees}).items():
            setattr(self, name, value if is_tensor else value.numpy())
        return self

    def transform(self, X):
        """The scores (m, r) of rows X (m, n); where entries are missing, those that fit the known ones."""
        check_is_fitted(self)
        scores = self._scores(self._read(X, False))
        return scores if isinstance(X, Tensor) else scores.numpy()

    def inverse_transform(self, X):
        """The rows (m, n) of scores X (m, r)."""
        check_is_fitted(self)
        return X @ self.components_ + self.mean_

    def _append(self, X, mean, sigma, V):
        """The SVD about the new mean of rows of weight w beside σ Vᵀ, which stands for the older ones."""
        m, keep = len(X), self.forgetting ** len(X)
        w = self.forgetting ** torch.arange(m - 1, -1, -1, dtype=X.dtype, device=X.device)
        new, old = float(w.sum()), keep * self._weight
        new_mean = w @ X / new
        shift = (new_mean - mean) * (new * old / (new + old)) ** 0.5  # between the means of both
        rows = torch.cat([w.sqrt()[:, None] * (X - new_mean), shift[None]])
        self._total = keep * self._total + float(rows.square().sum())
        self._weight, self._squares = old + new, keep**2 * self._squares + float(w.square().sum())
        self.n_samples_seen_ += m
        largest = min(self.n_samples_seen_, self.n_components or X.shape[1])
        rows = torch.cat([keep**0.5 * sigma[:, None] * V.mT, rows])
        _, sigma, V = truncated_svd(rows, self.tau, max_rank=largest)
        return mean + (new_mean - mean) * (new / (new + old)), sigma, V

    def _move(self, X, mean, sigma, V):
        """The matrix after this step; its left basis is kept, too."""
        centre = X.mean(dim=0)
        X = X - centre
        largest = min(*X.shape, self.n_components or len(X))
        if not len(sigma):
            Y = LowRank.from_dense(X, largest, self.tau)
            self._weight = self._squares = float(len(X))
        else:
            Y = LowRank(torch.as_tensor(self._U), sigma.diag(), V)
            F = X if self.follow == "increments" else Residual(X, Y)
            Y = augmented_bug(Y, F, tau=self.tau, max_rank=largest)
        self._U, before, sigma = Y.U, sigma, Y.S.diagonal()
        self.n_samples_seen_ = len(X)
        if self.follow == "increments" and len(before):  # of what Y lacks, they say nothing
            self._total += float(sigma.square().sum() - before.square().sum())
            return mean + centre, sigma, Y.V
        self._total = float(X.square().sum())
        return centre, sigma, Y.V

    def _scores(self, X):
        """V fitted to the known entries of each row, with as much trust as the variances deserve."""
        V, D = torch.as_tensor(self.components_).mT, X - torch.as_tensor(self.mean_)
        known = ~X.isnan()
        scores = torch.where(known, D, 0.0) @ V
        deviation = torch.as_tensor(self.explained_variance_).sqrt()
        info = torch.finfo(X.dtype)
        noise = max(self.noise_variance_, info.eps * float(deviation.max()) ** 2, info.tiny)
        for i in (~known.all(dim=1)).nonzero().flatten().tolist():
            B = V[known[i]] * deviation
            gram = B.mT @ B
            gram.diagonal().add_(noise)
            scores[i] = deviation * torch.linalg.solve(gram, B.mT @ D[i, known[i]])
        return scores

    def _read(self, X, reset):
        """X as a tensor of single or double precision, finite but for NaN."""
        if not isinstance(X, Tensor):
            dtypes = [np.float64, np.float32]
            return torch.tensor(
                validate_data(self, X, reset=reset, dtype=dtypes, ensure_all_finite="allow-nan")
            )
        check_precision("data", X)
        if X.dim() != 2 or not X.numel() or X.isinf().any():
            raise ValueError(f"data must be a finite matrix of samples x features, got {tuple(X.shape)}")
        if reset:
            self.n_features_in_ = X.shape[1]
        elif X.shape[1] != self.n_features_in_:
            raise ValueError(f"X has {X.shape[1]} features, but it was fitted with {self.n_features_in_}")
        return X.detach()

    def _check(self, X, first):
        """Raise ValueError for parameters out of range, or a matrix that is not the one that is followed."""
        check_tolerance(self.tau)
        if self.follow not in ("samples", "frames", "increments"):
            raise ValueError(f'follow must be "samples", "frames" or "increments", got {self.follow!r}')
        if not 0 < self.forgetting <= 1:
            raise ValueError(f"forgetting must lie in (0, 1], got {self.forgetting}: 1 never forgets")
        if self.n_components is not None and not 1 <= self.n_components <= X.shape[1]:
            raise ValueError(f"n_components must lie in [1, {X.shape[1]}], got {self.n_components}")
        if self.follow != "samples" and not first and len(X) != self.n_samples_seen_:
            seen = self.n_samples_seen_
            raise ValueError(f"{self.follow} must keep their {seen} rows, got {len(X)}: call fit for others")

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
