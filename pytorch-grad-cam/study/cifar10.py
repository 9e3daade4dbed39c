"""Maps of networks that were trained from scratch with several seeds: those of the study of CIFAR-10.

    python pytorch-grad-cam/study/cifar10.py --results cifar10/results/resnet20

Beyond the protocol, with fewer seeds, and so without tests. A network's maps of the true class of the first
test pictures are compared with those of the first kind's networks of all other seeds, those of that kind too;
outcomes are as in protocol.md. Half a minute a network on one core. Networks whose checkpoint.pt is not there
keep the rows they have in cifar10_measured.csv; the table goes to cifar10.md.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dlrt import errors, markup, tables
from dlrt.cams import known
from dlrt.cams.study import METHODS, Sample, finished, kept, maps_of, measure, of_dataset, runs_of
from dlrt.cams.study_results import TITLES
from dlrt.checkpoint import load_network, save_table
from dlrt.errors import RunError
from dlrt.flags import NATURAL, HelpFormatter, Parser
from dlrt.options import DATA_DIR, ROOT
from dlrt.runs import chosen_epoch, read_metrics

HERE = Path(__file__).parent
KINDS = {
    "dense_muon": "dense",
    "narrow75_muon": "dense, narrower",
    "factors75_muon": "plain factors",
    "matrices75_muon": "DLRT",
    "separable75_muon": "DLRT, separable kernels",
}
SHORT = ("network", "seeds", "test accuracy [%]", *(f"1 − r, {title}" for title in TITLES.values()))


def trained(folder: Path, kinds: list[str]) -> dict[str, dict[int, Path]]:
    """The finished runs of each kind, by their seeds; RunError with fewer than two of the first."""
    found = {
        kind: {seed: path for seed, path in runs_of(kind, folder).items() if finished(path)} for kind in kinds
    }
    if len(found[kinds[0]]) < 2:
        raise RunError(
            f"{folder} must hold two finished runs {kinds[0]}_seedN with their checkpoint.pt, "
            f"got {len(found[kinds[0]])}: make them with cifar10/run.py"
        )
    return found


def measured(runs: dict[str, dict[int, Path]], sample: Sample) -> list[dict[str, object]]:
    """A row per network and method."""
    dense, *_ = runs.values()
    networks = {seed: known.from_run(path) for seed, path in dense.items()}
    maps = {
        method: {seed: maps_of(network, sample, method) for seed, network in networks.items()}
        for method in METHODS
    }
    rows = []
    for seeds in runs.values():
        for seed, path in seeds.items():
            others = {
                method: [found for other, found in of_seed.items() if other != seed]
                for method, of_seed in maps.items()
            }
            rows += [{**row, "pictures": len(sample.images)} for row in measure(path, others, sample)]
            print(path.name, flush=True)
    return rows


def table(rows: pd.DataFrame, kinds: list[str]) -> pd.DataFrame:
    """A row per kind: means and deviations over its networks."""
    found = []
    for kind in kinds:
        own = rows[rows["kind"] == kind]
        if own.empty:
            continue
        first = own[own["method"] == METHODS[0]]
        row = {
            "network": KINDS.get(kind, kind),
            "seeds": len(first),
            "parameters": f"{first['parameters'].mean():,.0f}",
            "test accuracy [%]": _spread(first["accuracy"], 2),
        }
        for name, outcome in (("1 − r", "difference"), ("faithfulness", "faithfulness")):
            for method, title in TITLES.items():
                values = own.loc[own["method"] == method, outcome]
                one_pair = outcome == "difference" and kind == kinds[0] and len(values) == 2
                row[f"{name}, {title}"] = _spread(values[:1] if one_pair else values, 3)
        found.append(row)
    return pd.DataFrame(found)


def _spread(values: pd.Series, digits: int) -> str:
    mean = f"{values.mean():.{digits}f}"
    return f"{mean} ± {values.std():.{digits}f}" if len(values) > 1 else mean


def made_anew(rows: pd.DataFrame, results: Path) -> list[str]:
    """The kinds of which a row is of another network than the run that is there now."""
    found = {}
    for row in rows.itertuples():
        metrics = read_metrics(results / f"{row.kind}_seed{row.seed}")
        if metrics is not None:
            accuracy = metrics.loc[chosen_epoch(metrics), "test_accuracy"]
            found[row.kind] = found.get(row.kind, False) or abs(accuracy - row.accuracy) > 0.005
    return [KINDS.get(kind, kind) for kind, other in found.items() if other]


def caption_of(rows: pd.DataFrame, dataset: str, kinds: list[str], count: int, results: Path) -> str:
    data, first = tables.DATA.get(dataset, dataset), KINDS.get(kinds[0], kinds[0])
    since = ", ".join(made_anew(rows, results))
    return (
        f"Networks trained from scratch on {data} (the measurements that are committed: a JPEG copy of it); "
        f"the first {count} test pictures, true classes. 1 − r: raw maps beside those of the networks "
        f'"{first}" of other seeds. Faithfulness: insertion − deletion over the probability of the class, '
        "less the same of RandomCAM. Mean ± standard deviation over seeds; two networks of the first kind "
        f"make one pair. {tables.COUNTED}"
        + (f" Measured of networks that have been made anew since: {since}." if since else "")
    )


@errors.boundary()
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    runs = ROOT / "cifar10" / "results" / "resnet20"
    add("--results", type=Path, default=runs, help="the folder with the runs KIND_seedN")
    kinds = "of networks; all are compared with the first"
    add("--kinds", nargs="+", default=list(KINDS), metavar="KIND", help=kinds)
    add("--count", type=NATURAL, default=200, help="of pictures")
    add("--data-dir", type=Path, default=DATA_DIR, help="or set DLRT_DATA")
    add("--output-dir", type=Path, default=HERE, help="of the measurements and the table")
    args = parser.parse_args()
    found, path = trained(args.results, args.kinds), args.output_dir / "cifar10_measured.csv"
    again = {(kind, seed) for kind, runs in found.items() for seed in runs}
    before = [row for row in kept(path) if (row["kind"], row["seed"]) not in again]
    _, about = load_network(next(iter(found[args.kinds[0]].values())))
    sample = of_dataset(about["dataset"], args.count, args.data_dir)
    if others := sorted({row.get("pictures") for row in before} - {len(sample.images)}, key=str):
        raise RunError(
            f"--count must be that of the rows in {path} that stay, {', '.join(map(str, others))}, got "
            f"{len(sample.images)}: give that, or another --output-dir"
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = pd.DataFrame([*before, *measured(found, sample)])
    rows = rows.sort_values(["kind", "seed"], kind="stable")
    save_table(path, rows)
    caption = caption_of(rows, about["dataset"], args.kinds, len(sample.images), args.results)
    made = table(rows, args.kinds)
    tables.write(made, args.output_dir, caption, "cifar10", SHORT)
    print(markup.markdown(made, caption))


if __name__ == "__main__":
    main()
