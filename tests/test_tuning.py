"""Validation data choose options: among values of a grid, and further ones beyond its ends."""

import json
import math

import pandas as pd
import pytest
from test_tables import write_run

from dlrt import grid, tuning
from dlrt.errors import RunError
from dlrt.options import ROOT


@pytest.fixture
def pretend_to_make(monkeypatch):
    """Let make leave records in which the loss is |log(size / best)|; sizes from 0.1 on diverge."""
    made = []

    def pretend(plans, results, jobs, may_diverge):
        for plan in plans:
            size, best = plan.options["lr"], plan.options["best"]
            (results / plan.name).mkdir(parents=True, exist_ok=True)
            (results / plan.name / "config.json").write_text(json.dumps({"options": {"epochs": 1}}))
            if size < 0.1:
                record = pd.DataFrame({"epoch": [1], "ranks": [""], "loss": [abs(math.log(size / best))]})
                record.to_csv(results / plan.name / "metrics.csv", index=False)
            made.append((best, size))

    monkeypatch.setattr(grid, "make", pretend)
    return made


def short_run(best, size):
    return grid.RunSpec(f"{best}_{size}", ROOT / "script.py", {"epochs": 1, "best": best, "lr": size})


@pytest.mark.parametrize("best", [0.0025, 0.01, 0.08])
def test_values_are_tried_until_the_best_lies_between_two(best, pretend_to_make, tmp_path):
    first = {best: (0.04, 0.02), 0.02: (0.01, 0.02, 0.04)}
    assert tuning.choose(first, short_run, tmp_path, "loss", sign=-1) == {best: best, 0.02: 0.02}
    assert len(pretend_to_make) == len(set(pretend_to_make))  # one that diverged is not made again
    sizes = [size for of, size in pretend_to_make if of == best]
    assert min(sizes) < 0.6 * best
    assert max(sizes) > 1.8 * best
    assert [size for of, size in pretend_to_make if of == 0.02] == [0.01, 0.02, 0.04]


def test_of_values_that_are_as_good_none_beyond_them_is_tried(pretend_to_make, tmp_path):
    assert tuning.choose({0.02: (0.01, 0.04)}, short_run, tmp_path, "loss", sign=-1) == {0.02: 0.01}
    assert len(pretend_to_make) == 2


def test_a_choice_whose_values_all_diverge_names_their_runs(pretend_to_make, tmp_path):
    with pytest.raises(RunError, match=r"all of these diverge: 1_0\.2, 1_0\.4: add smaller step sizes"):
        tuning.choose({1: (0.2, 0.4)}, short_run, tmp_path, "loss")


def test_a_grid_chooses_among_its_own_runs_and_ends_where_all_diverged(tmp_path):
    def plan(name, decay, lr):
        return grid.RunSpec(name, ROOT / "script.py", {"epochs": 1, "decay": decay, "lr": lr})

    for name, lr, validation in (("one", 0.1, 80), ("two", 0.2, 90), ("by hand", 0.3, 99)):
        write_run(tmp_path, name, [validation], [50], decay=2.0, lr=lr)
    plans = [plan("one", 2.0, 0.1), plan("two", 2.0, 0.2)]
    assert tuning.choose_lrs(plans, tmp_path, "decay") == {2.0: 0.2}
    with pytest.raises(RunError, match="every learning rate diverges at decay 9: add smaller"):
        tuning.choose_lrs([*plans, plan("three", 9.0, 0.1)], tmp_path, "decay")
