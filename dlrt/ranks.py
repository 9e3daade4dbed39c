"""Ranks for a budget of parameters: the directions of all layers compete for it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from dlrt.checks import check_compression

Shape = tuple[int, int]


def parameters(rank: int, shape: Shape) -> int:
    """What a layer of that rank with an m x n weight costs: r (m + n), or m n where that is less."""
    m, n = shape
    return rank * (m + n) if pays(rank, shape) else m * n


def pays(rank: int, shape: Shape) -> bool:
    """Whether two factors of that rank cost less than their product, an m x n weight."""
    m, n = shape
    return rank * (m + n) < m * n


def budget_for(
    compression: float,
    dense_parameters: int,
    others: int,
    shapes: Sequence[Shape],
    least_ranks: Sequence[int],
) -> int:
    """How many parameters layers of these shapes may have, where `others` are not theirs.

    ValueError where that is below what they have at their least ranks.
    """
    check_compression(compression)
    budget = int((1 - compression) * dense_parameters + 1e-6) - others
    least = sum(map(parameters, least_ranks, shapes))
    if budget < least:
        most = int(1e4 * (1 - (others + least) / dense_parameters)) / 1e4
        raise ValueError(
            f"compression must be at most {most:g} ({100 * most:g} %) here, with the least ranks and the "
            f"layers that stay dense, got {compression:g} ({100 * compression:g} %): ask for less, or let "
            "fewer layers stay dense"
        )
    return budget


def falling_budget(start: int, end: int, ramp: int, step: int) -> int:
    """The budget after that many steps: it falls along a cubic from start to end over `ramp` steps."""
    left = max(0.0, 1 - step / ramp) if ramp else 0.0
    return int(end + (start - end) * left**3)


def allocate_ranks(
    budget: int, scores: Sequence[Sequence[float]], shapes: Sequence[Shape], min_rank: int = 1
) -> list[int]:
    """Ranks with at most `budget` parameters in all that keep the largest sum of scores.

    scores[i] are those of layer i's directions, descending; the layer has at least min_rank of them, at most
    all. Greedy by score per parameter, as for a knapsack, and then no exchange of a layer's last direction
    for others improves what is kept. A layer whose factors would cost as much as its weight has all its
    directions for m n parameters: it had better stay dense. The budget must cover the smallest ranks.
    """
    ranks = [min(min_rank, len(score)) for score in scores]

    def cost(i: int, rank: int) -> int:
        return parameters(rank, shapes[i])

    def fill(ranks: list[int], left: int, closed: int | None = None) -> tuple[list[int], int, float]:
        """Take directions while any fits; gives ranks, parameters left over, and what was gained."""
        ranks, gained, queue = list(ranks), 0.0, []
        for i in range(len(ranks)):
            if i != closed:
                _offer(queue, i, ranks[i], scores[i], cost)
        while queue:
            _, i, rank, price, value = heapq.heappop(queue)
            if price <= left:
                left, gained, ranks[i] = left - price, gained + value, rank
                _offer(queue, i, rank, scores[i], cost)
        return ranks, left, gained

    ranks, left, _ = fill(ranks, budget - sum(cost(i, rank) for i, rank in enumerate(ranks)))
    improved = True
    while improved:
        improved = False
        for i in range(len(ranks)):
            rank = ranks[i]
            last = _block_start(i, rank, cost)
            if last < min(min_rank, len(scores[i])):
                continue
            smaller = [*ranks[:i], last, *ranks[i + 1 :]]
            freed, lost = cost(i, rank) - cost(i, last), sum(scores[i][last:rank])
            others, rest, gained = fill(smaller, left + freed, closed=i)
            if gained > lost * (1 + 1e-12):
                ranks, left, improved = others, rest, True
    return ranks


def _offer(queue: list, i: int, rank: int, score: Sequence[float], cost: Callable[[int, int], int]) -> None:
    """Queue a layer's next direction, with those that cost nothing on top of it."""
    if rank >= len(score):
        return
    more = rank + 1
    while more < len(score) and cost(i, more + 1) == cost(i, more):
        more += 1
    price, value = cost(i, more) - cost(i, rank), sum(score[rank:more])
    heapq.heappush(queue, (-value / price if price else float("-inf"), i, more, price, value))


def _block_start(i: int, rank: int, cost: Callable[[int, int], int]) -> int:
    """The rank before the last direction that was paid for."""
    start = rank - 1
    while start > 0 and cost(i, start) == cost(i, rank):
        start -= 1
    return start
