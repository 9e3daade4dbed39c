"""StreamingPCA: scikit-learn's interface, and PCA itself wherever that can be had from what it is given."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA, IncrementalPCA
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_estimator

from dlrt import StreamingPCA

FOLLOW = ("samples", "frames", "increments")


def data(rows=60, columns=12, rank=None, seed=0):
    """A matrix with a mean and falling singular values, or of that rank."""
    rng = np.random.default_rng(seed)
    rank = rank or columns
    X = rng.normal(size=(rows, rank)) * 2.0 ** -np.arange(rank) @ rng.normal(size=(rank, columns))
    return X + rng.normal(size=columns)


def turning(steps=30, rank=3):
    """Frames of that rank about a mean, that turn and drift."""
    rng = np.random.default_rng(1)
    A, mean, R = data(rank=rank), rng.normal(size=12), rng.normal(size=(12, 12)) / 40
    turn = torch.matrix_exp(torch.from_numpy(R - R.T)).numpy()
    frames = [A]
    for _ in range(steps):
        frames.append(frames[-1] @ turn + 0.1 * mean)
    return frames


def following(model, frames):
    """The model after all frames, or after the increments between them."""
    model.fit(frames[0])
    for before, now in pairwise(frames):
        model.partial_fit(now - before if model.follow == "increments" else now)
    return model


def restored(model, X):
    return model.inverse_transform(model.transform(X))


@pytest.mark.parametrize(
    "model",
    [
        StreamingPCA(2),
        StreamingPCA(tau=0.1, forgetting=0.9),
        *(StreamingPCA(2, follow=f) for f in FOLLOW[1:]),
    ],
    ids=str,
)
def test_it_is_an_estimator_of_scikit_learn(model):
    check_estimator(model, on_skip=None)


@pytest.mark.parametrize("follow", FOLLOW)
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["arrays", "tensors"])
def test_what_it_finds_at_first_is_pca(follow, kind):
    X = data()
    model, pca = StreamingPCA(4, follow=follow).fit(kind(X)), PCA(4).fit(X)
    found = model.mean_, model.explained_variance_, model.singular_values_, restored(model, kind(X))
    assert all(type(value) is type(kind(X)) for value in found)
    found += (model.components_, model.transform(kind(X)))
    expected = pca.mean_, pca.explained_variance_, pca.singular_values_, restored(pca, X)
    expected += (pca.components_, pca.transform(X))
    for value, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, right, atol=1e-12)
    assert np.isclose(model.noise_variance_, pca.noise_variance_)


@pytest.mark.parametrize("forgetting", [1.0, 0.9])
@pytest.mark.parametrize("batch", [1, 7, 60])
def test_samples_may_be_dealt_out_to_calls_at_will(forgetting, batch):
    """The mean and the covariance are those of NumPy with weights, and older rows weigh less."""
    X = data()
    model = StreamingPCA(forgetting=forgetting)
    for start in range(0, len(X), batch):
        model.partial_fit(X[start : start + batch])
    weights = forgetting ** np.arange(len(X) - 1, -1, -1.0)
    covariance = model.components_.T * model.explained_variance_ @ model.components_
    np.testing.assert_allclose(model.mean_, np.average(X, axis=0, weights=weights), atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(X.T, aweights=weights), atol=1e-12)


def test_without_forgetting_it_is_incremental_pca():
    X = data()
    model, other = StreamingPCA(3), IncrementalPCA(3)
    for start in range(0, len(X), 10):
        model.partial_fit(X[start : start + 10])
        other.partial_fit(X[start : start + 10])
    np.testing.assert_allclose(restored(model, X), restored(other, X), atol=1e-10)
    np.testing.assert_allclose(model.explained_variance_, other.explained_variance_, rtol=1e-10)
    np.testing.assert_allclose(np.abs(np.sum(model.components_ * other.components_, axis=1)), 1)


@pytest.mark.parametrize("follow", FOLLOW)
def test_it_is_exact_where_the_data_have_the_rank(follow):
    """Samples whose subspace stays, and a matrix whose subspaces turn."""
    frames = [data(rank=3)] * 3 if follow == "samples" else turning()
    forgetting = 0.9 if follow == "samples" else 1.0
    model = following(StreamingPCA(3, follow=follow, forgetting=forgetting), frames)
    np.testing.assert_allclose(restored(model, frames[-1]), frames[-1], atol=1e-9)
    if follow != "samples":
        np.testing.assert_allclose(model.mean_, frames[-1].mean(0), atol=1e-9)


@pytest.mark.parametrize("follow", FOLLOW)
def test_components_and_scores_do_not_change_sign_from_call_to_call(follow):
    frames = [A + data(seed=5) / 100 for A in turning(30)]
    model = StreamingPCA(3, follow=follow).fit(frames[0])
    for last, now in pairwise(frames):
        before = model.components_
        model.partial_fit(now - last if follow == "increments" else now)
        assert (np.sum(before * model.components_, axis=1) > 0).all()


@pytest.mark.parametrize("tau", [None, 0.3])
def test_what_truncation_drops_of_increments_counts_as_noise(tau):
    """The sum of squares grows by all that a step sees of the matrix, whatever is kept of it."""
    model = StreamingPCA(3, tau=tau, follow="increments").fit(data())

    def squares():
        noise = model.noise_variance_ * 59 * (12 - model.n_components_)
        return noise + np.sum(model.singular_values_**2)

    for seed in range(1, 6):
        step = data(seed=seed) / 10
        F, U, sigma, Vt = step - step.mean(0), model._U.numpy(), model.singular_values_, model.components_
        U_hat, V_hat = (np.linalg.qr(np.hstack(pair)).Q for pair in ((U, F @ Vt.T), (Vt.T, F.T @ U)))
        grown = np.sum((U_hat.T @ (U * sigma @ Vt + F) @ V_hat) ** 2) - np.sum(sigma**2)
        before = squares()
        model.partial_fit(step)
        assert np.isclose(squares() - before, grown)


def test_frames_are_followed_near_the_best_and_increments_drift():
    frames = [A + data(seed=5) / 20 for A in turning(60)]
    errors = {}
    for follow in FOLLOW[1:]:
        model = following(StreamingPCA(3, follow=follow), frames)
        errors[follow] = np.linalg.norm(restored(model, frames[-1]) - frames[-1])
    best = np.linalg.norm(restored(PCA(3).fit(frames[-1]), frames[-1]) - frames[-1])
    assert errors["frames"] <= 1.01 * best
    assert errors["increments"] > errors["frames"]


def test_the_rank_follows_the_tolerance():
    model, few = StreamingPCA(tau=1e-8, follow="frames"), turning(3, rank=2)
    for X, rank in [(few[0], 2), (few[1], 2), (turning(1, rank=4)[0], 4), (few[2], 2)]:
        for _ in range(3):
            model.partial_fit(X)
        assert model.n_components_ == rank


@pytest.mark.parametrize("follow", ["samples", "frames"])
def test_missing_entries_of_data_of_low_rank_are_found(follow):
    """Though nothing is whole, not even at first: a third of all entries is hidden, others in each call."""
    frames, rng = [data(rank=3)] * 20 if follow == "samples" else turning(20), np.random.default_rng(2)
    hidden = [rng.random(A.shape) < 0.3 for A in frames]
    holed = [np.where(hide, np.nan, A) for hide, A in zip(hidden, frames, strict=True)]
    model = following(StreamingPCA(3, follow=follow), holed)
    errors = (restored(model, holed[-1]) - frames[-1])[hidden[-1]]
    assert np.linalg.norm(errors) <= 0.2 * np.linalg.norm((frames[-1] - frames[-1].mean(0))[hidden[-1]])


@pytest.mark.parametrize("n_components", [None, 6])
def test_gaps_are_not_filled_with_more_than_the_data_have(n_components):
    """Row by row, when the first few rows would fit whatever is known of the next."""
    shares = []
    for seed in range(20):
        X, hidden = data(40, seed=seed), np.random.default_rng(seed).random((40, 12)) < 0.2
        model = StreamingPCA(n_components)
        for row in np.where(hidden, np.nan, X):
            model.partial_fit(row[None])
        assert 0.6 < model.explained_variance_[0] / PCA().fit(X).explained_variance_[0] < 1.2
        errors = (restored(model, np.where(hidden, np.nan, X)) - X)[hidden]
        shares.append(np.linalg.norm(errors) / np.linalg.norm((X - X.mean(axis=0))[hidden]))
    assert np.median(shares) < 0.4


def test_an_increment_that_is_missing_is_none():
    A, step = data(), np.where(np.arange(12) < 6, np.nan, 0.1 * data(seed=3))
    models = [StreamingPCA(3, follow="increments").fit(A) for _ in range(2)]
    models[0].partial_fit(step)
    models[1].partial_fit(np.nan_to_num(step))
    np.testing.assert_array_equal(*(model.components_ for model in models))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 13}, r"n_components must be a whole number in \[1, 12\], got 13"),
        ({"n_components": 2.0}, r"n_components must be a whole number in \[1, 12\], got 2.0"),
        ({"n_components": "mle"}, r"n_components must be a whole number in \[1, 12\], got 'mle'"),
        ({"forgetting": None}, r"forgetting must lie in \(0, 1\], got None"),
        ({"tau": 1.5}, "tau"),
        ({"forgetting": 0.0}, "forgetting must lie in"),
        ({"forgetting": 0.9, "follow": "frames"}, "forgetting is for samples, got 0.9 of frames"),
        ({"follow": "rows"}, 'follow must be "samples"'),
    ],
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        StreamingPCA(**options).fit(data())


def test_data_that_do_not_fit_are_named():
    model = StreamingPCA(2, follow="frames").fit(data())
    with pytest.raises(ValueError, match="must keep their 60 rows, got 59"):
        model.partial_fit(data()[1:])
    with pytest.raises(ValueError, match="12"):
        model.partial_fit(torch.from_numpy(data(columns=11)))
    with pytest.raises(ValueError, match="finite or NaN, got infinity in row 0, column 0"):
        model.partial_fit(torch.full((60, 12), torch.inf))
    with pytest.raises(ValueError, match="data must be real, got torch"):
        model.partial_fit(torch.zeros(60, 12, dtype=torch.complex64))
    with pytest.raises(ValueError, match="data must be dense, got"):
        model.partial_fit(torch.zeros(60, 12).to_sparse())
    with pytest.raises(ValueError, match="NaN where entries are missing, got a mask"):
        model.partial_fit(np.ma.masked_less(data(), 0))
    for scores in (data(columns=3), data()[0], torch.zeros(4, 1)):
        with pytest.raises(ValueError, match=r"scores must have the shape \(rows, 2\), got"):
            model.inverse_transform(scores)
    for scores in (torch.zeros(4, 2, dtype=torch.complex64), np.full((4, 2), np.nan)):
        with pytest.raises(ValueError, match="scores must be real and finite"):
            model.inverse_transform(scores)
    with pytest.raises(ValueError, match="squares of the data must be finite"):
        StreamingPCA(2).fit(np.float32(1e20) * data().astype(np.float32))


def test_names_of_features_go_with_the_data_they_were_of():
    model = StreamingPCA(2).fit(pd.DataFrame(data(), columns=list("abcdefghijkl")))
    assert not hasattr(model.fit(torch.from_numpy(data(columns=4))), "feature_names_in_")


@pytest.mark.parametrize(
    ("call", "change", "X"),
    [
        ("fit", {"n_components": 2.5}, data(columns=11)),
        ("fit", {}, np.full((3, 12), np.inf)),
        ("fit", {}, 1e160 * data()),
        ("partial_fit", {"n_components": 2.5}, data()),
        ("partial_fit", {"follow": "frames"}, data()),
        ("partial_fit", {}, np.full((3, 12), np.inf)),
        ("partial_fit", {}, 1e160 * data()),
        ("partial_fit", {}, data(columns=11)),
    ],
)
def test_a_call_that_fails_leaves_the_model_as_it_was(call, change, X):
    whole = data(120)
    model, other = (StreamingPCA(3).fit(whole[:60]) for _ in range(2))
    model.set_params(**change)
    with pytest.raises(ValueError, match=r"n_components|follow must stay 'samples'|infinity|finite|features"):
        getattr(model, call)(X)
    for each in (model.set_params(n_components=3, follow="samples"), other):
        each.partial_fit(whole[60:])
    np.testing.assert_array_equal(model.components_, other.components_)


def test_a_model_whose_first_fit_failed_is_not_fitted():
    model = StreamingPCA(0)
    with pytest.raises(ValueError, match="n_components"):
        model.fit(data())
    with pytest.raises(NotFittedError):
        model.transform(data())


def test_without_variance_nothing_is_made_of_a_row_with_gaps():
    model = StreamingPCA(1).fit(np.tile(data()[:1], (2, 1)))
    holed = np.where(np.arange(12) < 6, np.nan, 2 * data()[:1])
    np.testing.assert_array_equal(model.transform(holed), 0)


def test_any_kind_of_number_and_layout_is_read():
    """float32 where all of it is; else float64, as scikit-learn has it."""
    X = np.round(8 * data())
    expected = StreamingPCA(3).fit(X)
    kinds = [X[::-1, ::-1][::-1, ::-1], X.astype(int), np.asfortranarray(X), X.tolist()]
    kinds += [torch.from_numpy(X).int(), torch.from_numpy(X).half(), torch.from_numpy(X).bfloat16()]
    for kind in kinds:
        model = StreamingPCA(3).fit(kind)
        np.testing.assert_allclose(model.components_, expected.components_, atol=1e-12)
    single = StreamingPCA(3).fit(X.astype(np.float32))
    assert single.transform(X.astype(np.float32)).dtype == np.float32
    for kind in (X[::-1], torch.from_numpy(X).flip(0)):
        np.testing.assert_allclose(single.transform(kind), expected.transform(X)[::-1], atol=1e-4)
    np.testing.assert_allclose(single.partial_fit(X).mean_, X.mean(axis=0), atol=1e-5)
    scores = expected.transform(X)
    for kind in (np.asarray, torch.from_numpy):
        assert type(expected.inverse_transform(kind(scores))) is type(kind(scores))


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_what_is_left_out_of_all_samples_is_within_the_tolerance(rows):
    """However they are dealt out, also where a direction comes up in small parts."""
    rng = np.random.default_rng(0)
    X = data(300, 20)
    X[150:] += 0.05 * np.outer(rng.normal(size=150), rng.normal(size=20))
    model = StreamingPCA(tau=0.1)
    for start in range(0, len(X), rows):
        model.partial_fit(X[start : start + rows])
    error = np.linalg.norm(restored(model, X) - X) / np.linalg.norm(X - X.mean(axis=0))
    assert error <= 0.1 * (1 + 1e-9)
    fewest = PCA(0.99).fit(X).n_components_
    assert fewest <= model.n_components_ <= fewest + 3


def test_what_is_missing_at_first_says_nothing_of_the_mean():
    """Rows come one by one, far from zero, and no column is in all of them."""
    X, rng = data(400, rank=3) + 100, np.random.default_rng(3)
    hidden = rng.random(X.shape) < 0.2
    hidden[0, :3] = True
    model = StreamingPCA(3)
    for row in np.where(hidden, np.nan, X):
        model.partial_fit(row[None])
    errors = (restored(model, np.where(hidden, np.nan, X)) - X)[hidden]
    assert np.linalg.norm(errors) <= 0.2 * np.linalg.norm((X - X.mean(axis=0))[hidden])


def test_squares_that_vanish_are_no_variance():
    X = 1e-170 * data()
    X[0, 0] = np.nan
    assert np.isfinite(StreamingPCA(3).fit(X).transform(X)).all()


@pytest.mark.parametrize("scale", [1e-18, 1e15])
def test_missing_entries_are_found_at_any_scale(scale):
    X = data(rank=3).astype(np.float32)
    holed = np.where(np.random.default_rng(2).random(X.shape) < 0.2, np.nan, X)
    models = [StreamingPCA(3).fit(holed), StreamingPCA(3).fit(np.float32(scale) * holed)]
    unscaled, scaled = (
        model.transform(holed * np.float32(s)) / s for model, s in zip(models, (1, scale), strict=True)
    )
    np.testing.assert_allclose(np.abs(scaled), np.abs(unscaled), atol=1e-3)


def test_a_component_keeps_its_direction_where_its_variance_passes_that_of_another():
    """Two fixed directions, of which the second becomes the first."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        directions = np.linalg.qr(rng.normal(size=(12, 2))).Q.T
        scores = rng.normal(size=(30, 2))
        scores = np.linalg.qr(scores - scores.mean(axis=0)).Q
        model, signs = StreamingPCA(2, follow="frames"), set()
        for share in np.linspace(0, 1, 10):
            model.partial_fit(scores * (2 - share, 1 + share) @ directions)
            overlaps = directions @ model.components_.T
            signs.add(tuple(np.sign(row[np.abs(row).argmax()]) for row in overlaps))
        assert len(signs) == 1
