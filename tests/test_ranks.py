"""Ranks for a budget: never above it, and no exchange would keep more."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlrt.ranks import allocate_ranks, budget_for, falling_budget, parameters

LAYERS = st.lists(
    st.tuples(st.integers(2, 6), st.integers(2, 6)).flatmap(
        lambda shape: st.tuples(
            st.just(shape), st.lists(st.floats(1e-3, 1), min_size=min(shape), max_size=min(shape))
        )
    ),
    min_size=1,
    max_size=3,
)


def spent(ranks, shapes):
    return sum(parameters(rank, shape) for rank, shape in zip(ranks, shapes, strict=True))


def kept(ranks, scores):
    return sum(sum(score[:rank]) for rank, score in zip(ranks, scores, strict=True))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(LAYERS, st.floats(0, 1))
def test_the_budget_is_kept_and_no_exchange_of_a_direction_for_another_keeps_more(layers, share):
    shapes = [shape for shape, _ in layers]
    scores = [sorted(values, reverse=True) for _, values in layers]
    least, most = spent([1] * len(shapes), shapes), spent([min(s) for s in shapes], shapes)
    budget = int(least + share * (most - least))
    ranks = allocate_ranks(budget, scores, shapes)
    assert spent(ranks, shapes) <= budget
    assert all(1 <= rank <= min(shape) for rank, shape in zip(ranks, shapes, strict=True))
    for moves in itertools.product((-1, 0, 1), repeat=len(shapes)):
        if sum(move < 0 for move in moves) > 1:
            continue
        other = [rank + move for rank, move in zip(ranks, moves, strict=True)]
        possible = all(1 <= rank <= min(shape) for rank, shape in zip(other, shapes, strict=True))
        if possible and spent(other, shapes) <= budget:
            assert kept(other, scores) <= kept(ranks, scores) * (1 + 1e-9)


def test_layers_of_one_shape_share_a_budget_by_their_largest_values():
    scores = [[0.5, 0.3, 0.1, 0.01], [0.9, 0.05, 0.02, 0.01]]
    assert allocate_ranks(4 * 20, scores, [(10, 10)] * 2) == [3, 1]
    assert allocate_ranks(4 * 20, scores, [(10, 10)] * 2, min_rank=2) == [2, 2]


def test_a_layer_worth_its_whole_weight_keeps_all_directions_for_the_weights_price():
    flat, steep = [0.25] * 4, [1.0, 1e-6, 1e-6, 1e-6]
    ranks = allocate_ranks(16 + 8, [flat, steep], [(4, 4), (4, 4)])
    assert ranks == [4, 1]
    assert spent(ranks, [(4, 4)] * 2) == 24


def test_the_budget_falls_along_a_cubic_and_stays():
    assert [falling_budget(1000, 200, 10, step) for step in (0, 5, 10, 99)] == [1000, 300, 200, 200]
    assert falling_budget(1000, 200, 0, 0) == 200


@pytest.mark.parametrize("wrong", [60, 1.0, 0.0, -0.5])
def test_a_percentage_is_no_fraction(wrong):
    with pytest.raises(ValueError, match=r"fraction in \(0, 1\), got"):
        budget_for(wrong, 1000, 0, [(5, 5)], [1])
    with pytest.raises(ValueError, match=r"must be at most 0\.8"):
        budget_for(0.9, 1000, 100, [(50, 50)], [1])
