"""Measure the maps of the networks that run.py trained: a row per network and method in measurements.csv.

    python pytorch-grad-cam/study/measure.py

A few seconds per network on one core; rows that are there already are kept. What is measured: protocol.md.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dlrt import errors
from dlrt.cams import known
from dlrt.cams.study import (
    FROM_DENSE,
    KINDS,
    METHODS,
    REFERENCES,
    clutter,
    complete,
    finished,
    kept,
    maps_of,
    measure,
)
from dlrt.checkpoint import save_table
from dlrt.errors import RunError
from dlrt.flags import HelpFormatter, Parser

HERE = Path(__file__).parent


@errors.boundary()
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, default=HERE / "results", help="the folder with the runs")
    add("--output", type=Path, default=HERE / "measurements.csv", help="the table, which is continued")
    args = parser.parse_args()
    rows = kept(args.output)
    there = {f"{row['kind']}_seed{row['seed']}" for row in rows}
    paths = [args.results / f"reference_seed{seed}" for seed in REFERENCES]
    if missing := [path.name for path in paths if not finished(path)]:
        raise RunError(f"{', '.join(missing)} must be trained in {args.results}: go on with study/run.py")
    nets = [known.from_run(path) for path in paths]
    sample = clutter()
    references = {method: [maps_of(network, sample, method) for network in nets] for method in METHODS}
    for seed in complete(args.results):
        dense = known.from_run(args.results / f"dense_seed{seed}")
        start = {method: [maps_of(dense, sample, method)] for method in METHODS}
        for kind in KINDS:
            name = f"{kind}_seed{seed}"
            if name not in there:
                rows += measure(args.results / name, start if kind in FROM_DENSE else references, sample)
                print(name, flush=True)
    if not rows:
        raise RunError(f"no seed has all networks in {args.results} yet: go on with study/run.py")
    save_table(args.output, pd.DataFrame(rows))


if __name__ == "__main__":
    main()
