"""Learning curves of DLRT and of plain factors U Vᵀ, from weights of decaying singular values; no training.

python UV_vanilla/produce_results.py
"""

from pathlib import Path

import pandas as pd
from factored import AS_IN_THE_PAPER

from dlrt import plots, tables
from dlrt.errors import RunError
from dlrt.plots import Figure, MaxNLocator, plt
from dlrt.runs import chosen_epoch, read_metrics
from dlrt.summaries import best_lrs, over_seeds

# Schotthöfer et al. 2022: test accuracy after epoch 1, and after epoch 20
PUBLISHED = pd.DataFrame({
    "method": ["DLRT, published"] * 3 + ["U Vᵀ, published"] * 3,
    "decay": [1, 2, 10] * 2,
    "epochs": ["20"] * 6,
    "after epoch 1 [%]": ["81", "56", "39", "33", "17", "16"],
    "after the last epoch [%]": [
        "97.81 ± 0.15", "97.29 ± 0.30", "97.07 ± 0.69", "93.74 ± 1.5", "90.9 ± 2.6", "86.2 ± 4.8"
    ],
})  # fmt: skip
SHORT = (
    "method",
    "decay",
    "learning rate",
    "after epoch 1 [%]",
    "at the chosen epoch [%]",
    "after the last epoch [%]",
)
CAPTION = (
    "LeNet5 on {data} at rank 20 (the last layer at its full 10), from weights of singular values |N(0, 1)|, "
    "divided by 1, decay, decay², ...: test accuracy, mean and standard deviation over the seeds, after the "
    "first and the last epoch and at the one chosen on the validation digits. SGD without momentum, batch "
    "128; the learning rate of U Vᵀ is the one of {lrs} that did best on the validation digits with the "
    "first seed; DLRT has that one, too, and the paper's. Seeds that diverged are left out. published: "
    "Schotthöfer et al. 2022, where the convolutions of U Vᵀ are not trained. {integrators}"
)
METHODS = {"decayed_lenet5": "DLRT", "vanilla_lenet5": "U Vᵀ"}


def curves(found: pd.DataFrame, folder: Path) -> dict[tuple[str, float, float], list[pd.DataFrame]]:
    """The metrics of all seeds for each method, decay and learning rate: the paper's, and the best of U Vᵀ.

    U Vᵀ is there with the best one only.
    """
    over_seeds(found, ["network", "decay", "lr"])  # refuses runs that differ in more than the seed
    vanilla = found["network"] == "vanilla_lenet5"
    if not vanilla.any():
        raise RunError(f"{folder} has no runs of U Vᵀ to compare with: go on with UV_vanilla/run.py")
    best = found["lr"] == found["decay"].map(best_lrs(found[vanilla], "decay"))
    shown = best | (~vanilla & (found["lr"] == AS_IN_THE_PAPER["lr"]))
    return {
        (METHODS[network], decay, lr): [read_metrics(folder / run) for run in rows["run"]]
        for (network, decay, lr), rows in found[shown].groupby(["network", "decay", "lr"])
    }


def table(of_setting: dict[tuple[str, float, float], list[pd.DataFrame]]) -> pd.DataFrame:
    """A row per method, decay and learning rate: test accuracy after the first, chosen and last epoch."""
    rows = []
    for (method, decay, lr), metrics in of_setting.items():
        accuracies = pd.DataFrame(
            [of_run["test_accuracy"].iloc[[0, chosen_epoch(of_run), -1]].tolist() for of_run in metrics],
            columns=["after epoch 1 [%]", "at the chosen epoch [%]", "after the last epoch [%]"],
        )
        setting = {"method": method, "decay": decay, "learning rate": f"{lr:g}"}
        setting |= {"epochs": str(len(metrics[0])), "seeds": str(len(metrics))}
        told = tables.spread(accuracies.mean(), accuracies.std())
        rows.append({**setting, **dict(zip(accuracies, told, strict=True))})
    ours_and_theirs = pd.concat([pd.DataFrame(rows), PUBLISHED]).fillna("")
    decay = ours_and_theirs["decay"].map(lambda decay: "none" if decay == 1 else f"{decay:g}")
    return ours_and_theirs.assign(decay=decay)


def draw(of_setting: dict[tuple[str, float, float], list[pd.DataFrame]]) -> Figure:
    """Training loss and test accuracy over the epochs, a column of axes per decay."""
    decays = sorted({decay for _, decay, _ in of_setting})
    with plt.rc_context(plots.LOOK):
        figure, axes = plt.subplots(2, len(decays), figsize=(9, 5), sharex=True, sharey="row", squeeze=False)
        for (method, decay, lr), metrics in of_setting.items():
            number = 1 if method == "U Vᵀ" else 0 if lr == AS_IN_THE_PAPER["lr"] else 2
            for row, column in enumerate(("train_loss", "test_accuracy")):
                plots.bands(axes[row, decays.index(decay)], metrics, column, f"{method}, lr {lr:g}", number)
        for upper, lower, decay in zip(*axes, decays, strict=True):
            upper.set(title="no decay" if decay == 1 else f"decay {decay:g}", yscale="log")
            lower.set(xlabel="epoch")
            lower.xaxis.set_major_locator(MaxNLocator(integer=True))
            lower.legend(loc="lower right", fontsize="small")
        axes[0, 0].set(ylabel="training loss")
        axes[1, 0].set(ylabel="test accuracy [%]")
        plots.widen_near_100(axes[1, 0])  # curves begin far below where they are to be compared
    return figure


@tables.boundary()
def main() -> None:
    args = tables.parse(__doc__, Path(__file__).parent)
    found = tables.read(args, "python UV_vanilla/run.py", needs=["decay"])
    of_setting = curves(found, args.results)
    tried = found.loc[found["network"] == "vanilla_lenet5", "lr"].unique()
    lrs = ", ".join(f"{lr:g}" for lr in sorted(tried))
    caption = CAPTION.format(data=tables.data(found), lrs=lrs, integrators=tables.integrators(found))
    tables.publish(args, table(of_setting), caption, {"uv_vanilla": draw(of_setting)}, SHORT)


if __name__ == "__main__":
    main()
