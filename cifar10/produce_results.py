"""Tables of CIFAR-10: low-rank nets beside their dense twins, and what fine-tuning adds. It trains nothing.

python cifar10/produce_results.py
"""

from pathlib import Path

import pandas as pd

from dlrt import plots, records, results, tables

HERE = Path(__file__).parent
# Schotthöfer et al. 2022: after 20 epochs at 93 to 98 % compression, and after 20 more of S alone
PUBLISHED = pd.DataFrame({
    "network": ["LeNet5", "AlexNet", "VGG16", "ResNet20"],
    "τ": "published",
    "epochs": "20 + 20",
    "before [%]": ["44.0", "42.9", "39.5", "45.8"],
    "after [%]": ["58.7", "58.6", "67.7", "64.2"],
    "compression [%]": "93 to 98",
})  # fmt: skip
CAPTION = (
    "{data} (the runs that are committed: a JPEG copy of it): test accuracy in %, mean and standard "
    "deviation over the seeds, at the epoch chosen on the validation pictures and at the last one. start: "
    "scratch, the weights of a file, or of a run (adapted: those of the file, trained on for two epochs). "
    "below dense: points below the dense net that began alike and was trained for as many epochs, of "
    "several the best on the validation pictures. cut to: the compression that trained weights were cut to "
    "at the start. kernels: low-rank across space, as a horizontal and a vertical convolution, or as "
    "matrices out x (in x height x width). Trained weights of "
    f"others may have seen the validation pictures, dense and low-rank nets alike. {tables.COUNTED}"
)
FINE_TUNING = (
    "{data} (the runs that are committed: a JPEG copy of it): test accuracy in % before and after fine-"
    "tuning of S and all that is dense in frozen bases, each at the epoch chosen on the validation "
    "pictures; epochs: before + after, on one schedule of the learning rate, so that part of the gain is "
    "its fall. published: Schotthöfer et al. 2022, on CIFAR-10."
    f"{{missing}} {tables.COUNTED}"
)
SETTING = ["network", "start", "epochs"]
KERNELS = {True: "across space", False: "matrices"}


def compared(found: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means over the seeds of all runs without fine-tuning, as numbers and as text."""
    summary = results.over_seeds(found, [*SETTING, "tau", "asked", "spatial", "lr"])
    dense = summary[summary["tau"].isna()].sort_values("validation").groupby(SETTING)["accuracy"].last()
    below = summary.join(dense.rename("dense"), on=SETTING)["dense"] - summary["accuracy"]
    tau = tables.text(summary["tau"], "{:g}", "dense")
    asked = tables.text(summary["asked"], "{:g}")
    kernels = summary["spatial"].map(KERNELS).where(summary["tau"].notna(), "")
    setting = {"network": summary["network"], "start": summary["start"]}
    setting |= {"cut to [%]": asked, "kernels": kernels, "τ": tau, "lr": summary["lr"].map("{:g}".format)}
    table = tables.readable(summary, setting)
    below = tables.text(below.where(summary["tau"].notna()), "{:.2f}")
    table.insert(table.columns.get_loc("at the last epoch [%]") + 1, "below dense", below)
    return summary, table


def fine_tuned(found: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """A row per network: the accuracy before and after fine-tuning, chosen alike among the epochs of each."""
    rows = []
    for run in found.itertuples():
        metrics = records.read_metrics(folder / run.run)
        parts = [metrics[metrics["frozen_bases"] == frozen].reset_index() for frozen in (False, True)]
        before, after = (part.loc[records.chosen_epoch(part)] for part in parts)
        rows.append({
            "network": run.network,
            "τ": f"{run.tau:g}",
            "seed": run.seed,
            "epochs": f"{run.epochs} + {run.finetune_epochs:g}",
            "before": before["test_accuracy"],
            "after": after["test_accuracy"],
            "compression": after["evaluation_compression"],
            "ranks (first seed)": after["ranks"],
        })  # fmt: skip
    groups = pd.DataFrame(rows).sort_values("seed").groupby(["network", "τ", "epochs"], sort=False)
    mean, std = (getattr(groups[["before", "after"]], name)() for name in ("mean", "std"))
    table = mean.index.to_frame(index=False)
    table["seeds"] = groups.size().map(str).to_list()
    for column in ("before", "after"):
        table[f"{column} [%]"] = tables.spread(mean[column], std[column])
    table["compression [%]"] = groups["compression"].mean().map("{:.2f}".format).to_list()
    table["ranks (first seed)"] = groups["ranks (first seed)"].first().to_list()
    published = PUBLISHED[PUBLISHED["network"].isin(table["network"])]
    return pd.concat([table, published]).fillna("").sort_values("network", kind="stable")


@results.told
def main() -> None:
    args = results.parse(__doc__, HERE)
    command = "python cifar10/run.py, or the training scripts beside it"
    found = results.read(args, command, dataset="cifar10")
    data = results.data(found)
    found["tau"] = tables.dense_or_tau(found)
    start = found["from_checkpoint"].astype("string").str.replace(r" [0-9a-f]{8}$", "", regex=True)
    found["start"] = start.str.replace(r"_seed\d+$", "", regex=True).fillna("scratch")
    # dense runs alone have no such options
    found["asked"] = found.get("compression", pd.Series(float("nan"), found.index))
    found["spatial"] = found.get("spatial", pd.Series(False, found.index)).fillna(False).astype(bool)
    tuned = found.get("finetune_epochs", pd.Series(0, found.index)) > 0
    summary, table = (None, None) if tuned.all() else compared(found[~tuned])
    if tuned.any():
        effects = fine_tuned(found[tuned], args.results)
        missing = ", ".join(name for name in PUBLISHED["network"] if name not in set(effects["network"]))
        missing = missing and f" Runs of {missing} are still to come."
        caption = FINE_TUNING.format(data=data, missing=missing)
        tables.write(effects, args.output_dir, caption, name="fine_tune_effects")
        print(tables.markdown(effects, caption))
    if summary is None:
        return
    curves, lines = {}, {}
    low_rank = summary.dropna(subset="tau")
    for (network, start, epochs, spatial), rows in low_rank.groupby([*SETTING, "spatial"]):
        curves[f"{network}, start: {start}, {epochs} epochs, {KERNELS[spatial]}"] = rows
    for row in summary[summary["tau"].isna()].merge(low_rank[SETTING].drop_duplicates()).itertuples():
        lines[f"{row.network}, start: {row.start}, {row.epochs} epochs, dense"] = row.accuracy
    figures = {}
    if curves:
        figures["cifar10_accuracy_vs_cr"] = plots.accuracy_against_compression(curves, {}, lines)
    results.publish(args, table, CAPTION.format(data=data), figures)


if __name__ == "__main__":
    main()
