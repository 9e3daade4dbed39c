"""Compare the runs of this folder: a table, and a figure of how they learned. It trains nothing.

python mnist/produce_results.py
"""

from pathlib import Path

from dlrt import plots, tables
from dlrt.runs import read_metrics


@tables.boundary()
def main() -> None:
    args = tables.parse(__doc__, Path(__file__).parent)
    found = tables.read(args, "python mnist/lenet5_mnist.py, or the other scripts beside it")
    metrics = {
        f"{row.network} {row['name']}": read_metrics(args.results / row.run) for _, row in found.iterrows()
    }
    figures = {"learning_curves": plots.learning_curves(metrics)}
    short = ("network", "run", "test accuracy [%]", "ranks", "evaluation parameters", "compression [%]")
    caption = tables.integrators(found) + tables.COUNTED
    tables.publish(args, tables.comparison(found), caption, figures, short)


if __name__ == "__main__":
    main()
