"""Table and figure of the study of protocol.md, from measurements.csv. It needs no network and no pictures.

python pytorch-grad-cam/study/produce_results.py
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dlrt import tables
from dlrt.cams.study_results import caption, compare, figure, readable
from dlrt.errors import RunError
from dlrt.flags import HelpFormatter, Parser
from dlrt.options import ROOT

SHORT = ("comparison", "outcome", "method", "difference", "p", "verdict")
HERE = Path(__file__).parent


@tables.boundary()
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--measurements", type=Path, default=HERE / "measurements.csv", help="the table of measure.py")
    add("--output-dir", type=Path, help="of table and figure; by default this folder, and figures/")
    args = parser.parse_args()
    if not args.measurements.exists():
        raise RunError(f"there is no {args.measurements}: make it with study/run.py and study/measure.py")
    args.figures = [args.output_dir] if args.output_dir else [HERE, ROOT / "figures"]
    args.output_dir = args.output_dir or HERE
    rows = pd.read_csv(args.measurements)
    table = compare(rows)
    drawn = figure(table, rows["seed"].nunique())
    tables.publish(args, readable(table), caption(rows), {"gradcam_study": drawn}, SHORT)


if __name__ == "__main__":
    main()
