"""What PCA of a frame costs: integrators, subspace iteration and decompositions from scratch, at rank 8.

    python timings/pca.py      five minutes on one CPU core; figures/pca_costs.csv, .png and .pdf

Square frames of growing size, and the 4096 x 32 window of the video in pca_experiments.ipynb. All methods
take turns, and what is compared are ratios to BUG in the same round. float32, and one thread.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from dlrt import LowRank, errors
from dlrt.flags import NATURAL, HelpFormatter, Parser, number
from dlrt.integrators import Residual, augmented_bug, bug, projector_splitting, times
from dlrt.lowrank import qr, svd
from dlrt.plots import LOOK, Figure, mpl, plt, save, style
from dlrt.timing import in_turn

RANK, WINDOW = 8, (4096, 32)


def gram(A: Tensor) -> Tensor:
    """The leading left singular vectors by way of the smaller Gram matrix."""
    V = torch.linalg.eigh(A.mT @ A)[1][:, -RANK:]
    return qr(times(A, V))[0]


def randomised(A: Tensor, columns: int) -> tuple[Tensor, ...]:
    """A randomised SVD of so many columns with one power iteration, cut to the rank. Halko et al. 2011.

    With 8 columns torch's own takes three to four times as long, by the layout of its products; with 16 they
    are alike.
    """
    Q = qr(times(A, torch.randn(A.shape[1], columns).to(A)))[0]
    Q = qr(times(A, qr(times(A.mT, Q))[0]))[0]
    P, sigma, Vh = svd(times(A.mT, Q).mT)
    return Q @ P[:, :RANK], sigma[:RANK], Vh[:RANK]


def contenders(rows: int, columns: int, largest_svd: int) -> dict[str, Callable[[], object]]:
    """What takes the rank-8 approximation Y of the last frame to that of A, whose increment is dA."""
    torch.manual_seed(0)
    A, dA = torch.randn(rows, columns), torch.randn(rows, columns) / 100
    U, V = (torch.linalg.qr(torch.randn(size, RANK))[0] for size in (rows, columns))
    Y = LowRank(U, torch.eye(RANK), V)
    functions = {
        "BUG": lambda: bug(Y, dA),
        "augmented BUG": lambda: augmented_bug(Y, dA, max_rank=RANK),
        "projector splitting": lambda: projector_splitting(Y, dA),
        "anchored BUG": lambda: bug(Y, Residual(A, Y)),
        "anchored augmented BUG": lambda: augmented_bug(Y, Residual(A, Y), max_rank=RANK),
        "subspace iteration": lambda: qr(times(A.mT, qr(times(A, V))[0])),
        "randomised SVD, q = 8": lambda: randomised(A, RANK),
        "randomised SVD, q = 16": lambda: randomised(A, 2 * RANK),
    }
    if rows != columns:
        functions |= {"thin SVD": lambda: torch.linalg.svd(A, full_matrices=False)}
        functions |= {"Gram matrix, eigenvalues": lambda: gram(A)}
    elif rows <= largest_svd:
        functions |= {"full SVD": lambda: torch.linalg.svd(A)}
    return functions


def measure(shape: tuple[int, int], repeats: int, largest_svd: int) -> pd.DataFrame:
    """A row for each method: median ms of warm calls, and quartiles of the ratio to BUG of the same round."""
    functions = contenders(*shape, largest_svd)
    in_turn(list(functions.values()), 1)
    repeats *= max(1, min(8, 2048**2 // (shape[0] * shape[1])))  # short times need more
    repeats = max(2, repeats)  # one has no quartiles
    # the second call of two, since what was called before has filled the caches with matrices of its own
    twice = [function for function in functions.values() for _ in range(2)]
    taken = in_turn(twice, repeats, seconds=200)[1::2]
    rows = []
    for name, elapsed in zip(functions, taken, strict=True):
        ratios = [time / reference for time, reference in zip(elapsed, taken[0], strict=False)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        ratio = {"ratio": middle, "ratio_low": low, "ratio_high": high, "repeats": len(elapsed)}
        row = {"rows": shape[0], "columns": shape[1], "method": name, "ms": statistics.median(elapsed)}
        rows.append(row | ratio)
    return pd.DataFrame(rows)


LOOKS = {  # colours are those of the notebook, but for what is grey there
    "BUG": 0,
    "projector splitting": 1,
    "augmented BUG": 3,
    "anchored BUG": 4,
    "anchored augmented BUG": 5,
    "subspace iteration": 2,
    "randomised SVD, q = 8": 8,
    "randomised SVD, q = 16": 6,
    "full SVD": 14,
}


def draw(table: pd.DataFrame) -> Figure:
    """Ratios to BUG with their quartiles: over the size of a square frame, and for the video's window."""
    with mpl.rc_context(LOOK):
        figure, (sizes, video) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(1.3, 1))
        square = table[table["rows"] == table["columns"]]
        for name, rows in square.groupby("method", sort=False):
            look = style(LOOKS[name])
            sizes.loglog(rows["rows"], rows["ratio"], marker=".", label=name, **look)
            band = {"color": look["color"], "alpha": 0.2, "linewidth": 0}
            sizes.fill_between(rows["rows"], rows["ratio_low"], rows["ratio_high"], **band)
        sizes.set(xlabel="n", ylabel="time / time of a BUG step", title="a frame of n x n")
        ticks = sorted(set(square["rows"]))
        sizes.set_xticks(ticks, ticks)
        sizes.minorticks_off()
        window = table[table["rows"] != table["columns"]].iloc[::-1]
        bars = [window["ratio"] - window["ratio_low"], window["ratio_high"] - window["ratio"]]
        video.barh(window["method"], window["ratio"], xerr=bars, color="0.7", ecolor="0.2", capsize=3)
        video.set(
            xlabel="time / time of a BUG step", title=f"a {WINDOW[0]} x {WINDOW[1]} window of the video"
        )
        shown = sizes.get_legend_handles_labels()
        figure.legend(*shown, loc="outside lower center", ncols=3, fontsize="small")
    return figure


@errors.boundary()
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    sizes = (512, 1024, 2048, 4096, 8192, 16384)
    size = number(int, f"[{2 * RANK}, inf]")  # as many columns has the larger randomised SVD
    parser.add_argument("--sizes", type=size, nargs="+", default=sizes, help="of square frames")
    parser.add_argument("--repeats", type=NATURAL, default=5, help="rounds at least")
    parser.add_argument("--largest-svd", type=NATURAL, default=1024, help="size of the largest full SVD")
    figures = Path(__file__).parents[1] / "figures"
    parser.add_argument("--output-dir", type=Path, default=figures, help="for the table and the figure")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)  # before anything is timed
    torch.set_num_threads(1)
    tables = []
    for shape in [WINDOW, *((size, size) for size in args.sizes)]:
        tables.append(measure(shape, args.repeats, args.largest_svd))
        print(tables[-1].to_string(index=False, float_format="%.3g"), flush=True)
        table = pd.concat(tables)
        path = save(draw(table), [args.output_dir], "pca_costs")
        table.to_csv(path.with_suffix(".csv"), index=False, float_format="%.4g")
    print(f"{path} and {path.with_suffix('.csv')}")


if __name__ == "__main__":
    main()
