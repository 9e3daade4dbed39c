"""One step of all low-rank weights of a network: whose bases are updated, and which ranks they are cut to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlrt.curvature import Terms, terms
from dlrt.layers import LowRankLayer
from dlrt.lowrank import LowRank, at_least_single, leading_subspace, rank_within, svd, truncated_svd
from dlrt.moments import MOMENT_DAMPING, forget_moments, second_moments
from dlrt.ranks import allocate_ranks, falling_budget
from dlrt.velocity import Velocity
from dlrt.weight_step import WeightStep

Moved = tuple[LowRank, Velocity | None]


@dataclass(frozen=True, eq=False)
class NetworkStep:
    """What a DLRT does with its layers, which have names: `state` and `group` are those of a WeightStep.

    The group has the progress, too: steps, steps of S since the last basis update, the step of the next
    decision of ranks, and whether bases are frozen.
    """

    layers: dict[LowRankLayer, str]
    state: dict[torch.nn.Parameter, dict[str, Any]]
    group: dict[str, Any]

    def weight(self, layer: LowRankLayer) -> WeightStep:
        return WeightStep(layer, self.layers[layer], self.state, self.group)

    @property
    def decides_next(self) -> bool:
        """Whether ranks are due to be decided in the next step, if it updates bases."""
        return not self.group["frozen"] and self.group["steps"] + 1 >= self.group["allot_at"]

    def update_bases(self, layers: list[LowRankLayer]) -> None:
        """K- and L-step, the first pass of two; not of those that a pass that failed has augmented."""
        for layer in (L for L in layers if L.trains_bases):
            self.weight(layer).update_bases()

    def move(self, layers: list[LowRankLayer], s_step_alone: bool) -> None:
        """K-, L- and S-step of layers, or the S-step where bases rest; truncation where it is due."""
        group = self.group
        group["steps"] += 1
        group["s_steps_taken"] += 1
        rests = group["frozen"] or group["s_steps_taken"] < group["s_steps"]
        decides = not rests and group["steps"] >= group["allot_at"]
        if decides:
            group["allot_at"] = group["steps"] + group["allot_every"]
        moved: dict[LowRankLayer, Moved] = {}
        for layer in layers:
            weight = self.weight(layer)
            at = weight.s_step() if s_step_alone or not layer.trains_bases else weight.parallel_step()
            if rests:
                weight.rest(*at)
                continue
            due = self.state[layer.S].pop("due", False)
            if decides and "budget" in group:
                moved[layer] = at
            else:
                self._cut(layer, *at, decides or due)
        if decides and "budget" in group:
            self._cut_to_budget(moved)
        elif decides:
            for layer in self.layers.keys() - set(layers):  # they are cut when they take part again
                self.state[layer.S]["due"] = True
        if not rests:
            self._end_rest(decides)

    def truncate(self) -> None:
        """Cut all layers by tau, or, under a budget, to its ranks where a decision is due."""
        group = self.group
        for layer in self.layers:
            self._cut(layer, *self._at(layer), decides="budget" not in group)
        group["s_steps_taken"] = 0
        if "budget" in group and group["steps"] >= group["allot_at"]:
            group["allot_at"] = group["steps"] + group["allot_every"]
            self._cut_to_budget({})

    def freeze(self) -> None:
        """Let all bases rest from now on, after a budget is met."""
        self._end_rest(decides="budget" not in self.group)
        if "budget" in self.group:
            self._cut_to_budget({}, self.group["budget"][2])
        for layer in self.layers:
            self.weight(layer).rest(*self._at(layer))
            forget_moments(self.state[layer.S])
        self.group["frozen"] = True

    def _end_rest(self, decides: bool) -> None:
        """Cut the layers whose bases rest; then they train again."""
        self.group["s_steps_taken"] = 0
        for layer in self.layers:
            if not layer.trains_bases:
                self._cut(layer, *self._at(layer), decides)

    def _cut_to_budget(self, moved: dict[LowRankLayer, Moved], step: int | None = None) -> None:
        """Cut all layers to the ranks that fit the budget of that step, by default of the next decision."""
        if step is None:
            step = self.group["allot_at"] + self.group["s_steps"] - 1  # at the latest
        now = {layer: moved.get(layer) or self._at(layer) for layer in self.layers}
        parts = [self._terms(layer, Y_hat.S) for layer, (Y_hat, _) in now.items()]
        least, tau = self.group["min_rank"], self.group["tau"]
        scores = []
        for (Y_hat, _), part, most in zip(now.values(), parts, self.group["max_ranks"], strict=True):
            sigma = svd(Y_hat.S)[1] if tau else part.sigma  # tau is a share of ‖S‖, whatever ranks compete by
            within = rank_within(sigma, tau)
            scores.append(part.sigma.square()[: min(most, max(least, within))].tolist())
        budget = falling_budget(*self.group["budget"], step)
        ranks = allocate_ranks(budget, scores, [layer.shape for layer in now], least)
        for (layer, at), part, rank in zip(now.items(), parts, ranks, strict=True):
            if layer in moved or not layer.trains_bases or rank < layer.rank:
                kept = part.matrix(rank, layer.S.dtype)
                self.weight(layer).cut(*at, kept.U, kept.S, kept.V)

    def _terms(self, layer: LowRankLayer, S: Tensor) -> Terms:
        """S taken apart by what the loss needs, or by its singular values."""
        needs = second_moments(self.state[layer.S], S) if self.group["cut_by"] == "loss" else None
        try:
            return terms(at_least_single(S), needs, MOMENT_DAMPING)
        except torch.linalg.LinAlgError as error:
            what = "S" if needs is None else "S, or of the second moments of its gradient,"
            raise self._svd_failed(layer, error, what) from error

    def _cut(
        self,
        layer: LowRankLayer,
        Y_hat: LowRank,
        M: Velocity | None,
        decides: bool = True,
    ) -> None:
        """Truncate by tau, or to the rank that a layer keeps; then its bases train."""
        weight, group = self.weight(layer), self.group
        keeps_rank = group["integrator"] == "bug"
        if keeps_rank and layer.trains_bases:
            weight.stay(Y_hat)
            return
        if not decides and layer.trains_bases:
            P, S1, Q = leading_subspace(Y_hat.S, weight.kept_rank)
        else:
            tau, least, most = group["tau"], group["min_rank"], self._max_rank(layer)
            if not decides or keeps_rank:  # S was stepped, so that its first columns may not be the best
                tau, least, most = None, 1, weight.kept_rank
            try:
                P, sigma, Q = truncated_svd(Y_hat.S, tau, min(least, most), most)
            except torch.linalg.LinAlgError as error:
                raise self._svd_failed(layer, error) from error
            S1 = sigma.diag()
        weight.cut(Y_hat, M, P, S1, Q)

    def _svd_failed(
        self, layer: LowRankLayer, error: torch.linalg.LinAlgError, what: str = "S"
    ) -> torch.linalg.LinAlgError:
        return torch.linalg.LinAlgError(f"the SVD of {what} fails in {self.layers[layer]}: {error}")

    def _max_rank(self, layer: LowRankLayer) -> int:
        return self.group["max_ranks"][list(self.layers).index(layer)]

    def _at(self, layer: LowRankLayer) -> Moved:
        """Factors and velocity as they are."""
        return layer.factors, self.weight(layer).velocity
