"""Validation data choose options: among values of a grid, and further ones beyond its ends."""

import math

import pytest
from made_up_runs import makes, write_run

from dlrt import grid, tuning
from dlrt.errors import RunError
from dlrt.options import ROOT


def loss_of(options):
    """|log(lr / best)|; step sizes from 0.1 on diverge."""
    return abs(math.log(options["lr"] / options["best"])) if options["lr"] < 0.1 else math.inf


def short_run(best, size):
    return grid.RunSpec(f"{best}_{size}", ROOT / "script.py", {"epochs": 1, "best": best, "lr": size})


@pytest.fixture
def tried(monkeypatch, tmp_path):
    """The best values that are found, and all that were tried for each, beginning with some."""

    def try_values(first):
        make, made = makes(loss_of)
        monkeypatch.setattr(grid, "make", make)
        best = tuning.try_values(first, short_run, tmp_path, "validation_loss", smallest=True)
        return best, {case: [o["lr"] for o in made.values() if o["best"] == case] for case in first}

    return try_values


@pytest.mark.parametrize(
    ("best", "first"), [(0.002, (0.02, 0.2)), (0.01, (0.04, 0.02)), (0.08, (0.02, 0.04))]
)
def test_values_are_tried_until_the_best_lies_between_two(best, first, tried):
    found, values = tried({best: first, 0.02: (0.01, 0.02, 0.04)})
    assert found == {best: best, 0.02: 0.02}
    assert min(values[best]) < 0.6 * best
    assert max(values[best]) > 1.8 * best
    assert values[0.02] == [0.01, 0.02, 0.04]


def test_of_values_that_are_as_good_the_smallest_is_taken_and_none_beyond_it_tried(tried):
    assert tried({0.02: (0.01, 0.04)}) == ({0.02: 0.01}, {0.02: [0.01, 0.04]})


def test_cases_whose_values_all_diverge_are_told_by_their_runs(tried):
    with pytest.raises(RunError, match=r"all of these diverge: 1_0\.2, 1_0\.4, 2_0\.3, 2_0\.5: begin with"):
        tried({1: (0.2, 0.4), 0.01: (0.01, 0.02), 2: (0.3, 0.5)})


def test_a_grid_chooses_among_its_own_runs_and_ends_where_all_diverged(tmp_path):
    def plan(name, decay, lr):
        return grid.RunSpec(name, ROOT / "script.py", {"epochs": 1, "decay": decay, "lr": lr})

    for name, lr, validation in (("one", 0.1, 80), ("two", 0.2, 90), ("by hand", 0.3, 99)):
        write_run(tmp_path, name, [validation], [50], decay=2.0, lr=lr)
    plans = [plan("one", 2.0, 0.1), plan("two", 2.0, 0.2)]
    assert tuning.choose_lrs(plans, tmp_path, "decay") == {2.0: 0.2}
    with pytest.raises(RunError, match="every learning rate diverges at decay 9: add smaller"):
        tuning.choose_lrs([*plans, plan("three", 9.0, 0.1)], tmp_path, "decay")
