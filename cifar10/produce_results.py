"""Tables and figures of CIFAR-10: the study from scratch, and what fine-tuning adds. It trains nothing.

python cifar10/produce_results.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import study_figures
from fine_tune_effects import FOLDER
from study_figures import DENSE
from study_tables import compared, step_sizes, with_ways
from tuned_runs import COPY

from dlrt import markup, tables
from dlrt.errors import RunError
from dlrt.runs import chosen_epoch, differences, read_metrics
from dlrt.summaries import check_difference

HERE = Path(__file__).parent
SHORT = ("network", "trained", "rule", "test accuracy [%]", "below dense", "compression [%]")
# Schotthöfer et al. 2022: after 20 epochs at 93 to 98 % compression, and after 20 more of S alone
PUBLISHED = pd.DataFrame({
    "network": ["LeNet5", "AlexNet", "VGG16", "ResNet20"],
    "epochs": "20 + 20",
    "before [%]": ["44.0", "42.9", "39.5", "45.8"],
    "after [%]": ["58.7", "58.6", "67.7", "64.2"],
    "compression [%]": "93 to 98",
})  # fmt: skip
CAPTION = (
    "{data}: test accuracy in %, mean and standard deviation over the seeds, at the epoch chosen on the "
    "validation pictures and at the last one. All begin at random but those that are called cut, which are "
    "the dense net of the same seed (Muon) cut at once and trained on, and those of trained weights. After a "
    "dense start: the dense net for the first two fifths of the epochs, then cut by what the loss needs; the "
    "parameters are those after it. below dense: points below the dense net with the same rule and epochs, "
    "of cut ones the longest. compression: against the dense net of full width. {missing}" + tables.COUNTED
)
FINE_TUNING = (
    "{data}: test accuracy in % before and after fine-tuning of S and all that is dense in frozen bases, "
    "each at the epoch chosen on the validation pictures; epochs: before + after, on one schedule of the "
    "learning rate, so that part of the gain is its fall. not frozen: the control, as many epochs in which "
    "bases are updated and ranks decided, at the epoch chosen among all. published: Schotthöfer et al. 2022, "
    f"on CIFAR-10.{{missing}} {tables.COUNTED}"
)
STEP_SIZES = (
    "{data}: accuracy in % on the validation pictures of seed 0 after the last epoch, over the step size: "
    "update_lr with Muon, lr with SGD. Long runs are those of the table, short ones tell where these begin. "
    "best: that of the longest runs is what run.py takes for all seeds and budgets."
)
NETWORKS = ("ResNet20", "VGG16", "AlexNet")


def is_control(options: dict, fine_tuned: dict) -> bool:
    """Whether a run differs from one that is fine-tuned in that alone, and has as many epochs."""
    same_length = options["epochs"] == fine_tuned["epochs"] + fine_tuned["finetune_epochs"]
    return same_length and not differences(options, fine_tuned, "and", "epochs", "finetune_epochs", "name")


def fine_tuned(found: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """A row per network, tolerance and epochs: the accuracy before and after fine-tuning, and of the control.

    That has as many epochs, all with basis updates. Epochs are chosen alike among those before and
    those after; of the control among all. RunError where the runs of a row differ in more than the seed.
    """
    rows, controls = [], found[~(found["finetune_epochs"] > 0)]
    for run in found[found["finetune_epochs"] > 0].itertuples():
        metrics = read_metrics(folder / run.run)
        parts = [metrics[metrics["frozen_bases"] == frozen].reset_index() for frozen in (False, True)]
        before, after = (part.loc[chosen_epoch(part)] for part in parts)
        control = controls.loc[[is_control(options, run.options) for options in controls["options"]]]
        rows.append({
            "network": run.network,
            "τ": f"{run.tau:g}",
            "seed": run.seed,
            "run": run.run,
            "options": run.options,
            "epochs": f"{run.epochs} + {run.finetune_epochs:g}",
            "before": before["test_accuracy"],
            "after": after["test_accuracy"],
            "not frozen": control["test_accuracy"].mean(),
            "compression": after["evaluation_compression"],
            "control compression": control["evaluation_compression"].mean(),
            "ranks (first seed)": after["ranks"],
        })  # fmt: skip
    groups = pd.DataFrame(rows).sort_values("seed").groupby(["network", "τ", "epochs"], sort=False)
    for _, of_one in groups:
        check_difference(of_one, "seed")
    accuracies = ["before", "after", "not frozen"]
    mean, std = (getattr(groups[accuracies], name)() for name in ("mean", "std"))
    has_all = groups["not frozen"].count() == groups.size()  # a control of every seed
    mean["not frozen"] = mean["not frozen"].where(has_all)
    std["not frozen"] = std["not frozen"].where(has_all)
    table = mean.index.to_frame(index=False)
    table["seeds"] = groups.size().map(str).to_list()
    for column in accuracies:
        table[f"{column} [%]"] = tables.spread(mean[column], std[column])
    table["compression [%]"] = tables.text(groups["compression"].mean(), "{:.2f}").to_list()
    of_control = tables.text(groups["control compression"].mean().where(has_all), "{:.2f}")
    table["not frozen: compression [%]"] = of_control.to_list()
    table["ranks (first seed)"] = groups["ranks (first seed)"].first().to_list()
    published = PUBLISHED[PUBLISHED["network"].isin(table["network"])]
    published = published.assign(network=published["network"] + ", published")
    return pd.concat([table, published]).fillna("").sort_values("network", kind="stable")


def publish_fine_tuning(args: argparse.Namespace, found: pd.DataFrame, data: str) -> None:
    """The table of fine-tuned runs and their controls, which says what is missing."""
    effects = fine_tuned(found.assign(tau=tables.dense_or_tau(found)), args.results)
    missing = ", ".join(name for name in PUBLISHED["network"] if name not in set(effects["network"]))
    missing = missing and f" Runs of {missing} are still to come."
    without = effects[(effects["not frozen [%]"] == "") & (effects["τ"] != "")]
    if len(without):
        names = ", ".join(without["network"] + " (" + without["epochs"] + ")")
        missing += f" Controls of {names} are missing."
    caption = FINE_TUNING.format(data=data, missing=missing)
    short = ("network", "epochs", "before [%]", "after [%]", "not frozen [%]", "compression [%]")
    tables.write(effects, args.output_dir, caption, "fine_tune_effects", short)
    print(markup.markdown(effects, caption))


def publish_study(args: argparse.Namespace, study: pd.DataFrame, data: str) -> None:
    """The table and the figures of the study from scratch."""
    summary, table = compared(study)
    absent = [name for name in NETWORKS if name not in set(summary["network"])]
    missing = f"Runs of {', '.join(absent)} are still to come, on a GPU. " if absent else ""
    figures = {}
    if args.time and study["budget"].notna().any():
        figures["cifar10_training_time"] = study_figures.over_time(study, args.results)
    beside_dense = summary[summary["dense"].notna()]
    if (beside_dense["way"] != DENSE).any():
        figures["cifar10_accuracy_vs_cr"] = study_figures.relative_to_dense(beside_dense)
    if (ours := study[study["way"].str.startswith("DLRT, budget")].sort_values(["seed", "run"])).size:
        figures["cifar10_ranks"] = study_figures.ranks_over_training(ours.iloc[0], args.results)
    tables.publish(args, table, CAPTION.format(data=data, missing=missing), figures, SHORT)
    if len(tried := tables.tried(args.results, study["dataset"].iloc[0])):
        table = step_sizes(with_ways(tried), args.results)
        tables.write(table, args.output_dir, STEP_SIZES.format(data=data), "step_sizes")


@tables.boundary()
def main() -> None:
    args = tables.parse(__doc__, HERE, time="draw accuracy over time, too: of runs that had a machine each")
    command = "python cifar10/run.py, or the training scripts beside it"
    found = tables.read(args, command, dataset="cifar10")
    data = tables.data(found) + (COPY if (found["dataset"] == "cifar10").all() else "")
    has_part = found.get("finetune_epochs", pd.Series(0, found.index)) > 0
    tuned = has_part | found["run"].map(lambda run: FOLDER in (args.results.resolve().name, *Path(run).parts))
    if has_part.any():
        publish_fine_tuning(args, found[tuned], data)
    elif tuned.all():
        raise RunError(f"{args.results} has controls alone: go on with cifar10/fine_tune_effects.py")
    if not tuned.all():
        publish_study(args, with_ways(found[~tuned]), data)


if __name__ == "__main__":
    main()
