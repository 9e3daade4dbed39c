"""Compare the runs of this folder: a table, and a figure of how they learned. It trains nothing.

python mnist/produce_results.py
"""

import sys
from pathlib import Path

from dlrt import cli, plots, runs, tables

HERE = Path(__file__).parent


def main() -> None:
    args = cli.results_parser(__doc__, HERE).parse_args()
    try:
        found = runs.read_runs(args.results)
    except FileNotFoundError as error:
        sys.exit(f"produce_results.py: {error}")
    table = tables.comparison(found)
    tables.write(table, args.output_dir, tables.COUNTED)
    print(tables.markdown(table, tables.COUNTED))
    metrics = {
        f"{row.network} {row['name']}": runs.read_metrics(args.results / row.run)
        for _, row in found.iterrows()
    }
    figure = plots.save(plots.learning_curves(metrics), args.output_dir, "learning_curves")
    print(f"figure: {figure}")


if __name__ == "__main__":
    main()
