"""Tables and figures of the comparisons of class-activation maps. It needs no network and no pictures.

python pytorch-grad-cam/produce_results.py
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dlrt import errors, tables
from dlrt.cams import drawings
from dlrt.cams.summary import CAPTION, FINISH, read_study, read_times, readable, summarise
from dlrt.errors import RunError, one_line
from dlrt.runs import read_options

SHORT = ("study", "method", "network", "compression [%]", "Pearson", "Pearson own")


@errors.boundary()
def main() -> None:
    args = tables.parse(__doc__, Path(__file__).parent, of_runs=False)
    studied, figures = [], {}
    for folder in sorted(path.parent for path in args.results.glob("*/config.json")):
        try:
            config = read_options(folder)
            summary, times = summarise(read_study(folder)), read_times(folder)
            drawn = {"_grid": drawings.grid(folder, summary), "": drawings.over_compression(summary)}
            if times is not None:
                drawn["_time"] = drawings.time_over_rank(times)
            studied.append(readable(folder.name, config, summary))
        except Exception as error:  # numpy and pandas raise many types on what they cannot read
            reason = one_line(str(error) if isinstance(error, OSError | RunError) else repr(error))
            errors.report(f"{folder} is left out ({reason}): {FINISH}")
            continue
        figures |= {f"gradcam_{folder.name}{kind}": figure for kind, figure in drawn.items()}
    if not studied:
        raise RunError(
            f"no finished comparisons in {args.results}; make one with: "
            "python pytorch-grad-cam/compare_cams.py --help"
        )
    tables.publish(args, pd.concat(studied, ignore_index=True), CAPTION, figures, SHORT)


if __name__ == "__main__":
    main()
