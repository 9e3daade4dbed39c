"""Do maps depend on the weights? Correlation with a network's own maps while its layers become random.

    python pytorch-grad-cam/randomise.py --image-path test_images --rank 0.75
    python pytorch-grad-cam/randomise.py --checkpoint RUN --compare RUN ... --image-path FOLDER

From the last layer to the first, in --steps, with random weights of the same norm, as often as --draws says
(Adebayo et al. 2018, cascading randomisation). All networks explain the class that the first one predicts.
A minute on two cores. Leaves randomised.csv, a row for each map, and the figure randomised.png and .pdf in
--output-dir. It ends with 2 for a mistake, before anything is made.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from dlrt import errors, plots
from dlrt.cams import explain, network_flags, networks
from dlrt.cams.load_pictures import batches, readable
from dlrt.cams.networks import Network
from dlrt.cams.pictures import Picture, files
from dlrt.cams.randomised import cascade
from dlrt.cams.targets import of_classes
from dlrt.checkpoint import save_table
from dlrt.errors import RunError
from dlrt.flags import NATURAL, HelpFormatter, Parser
from dlrt.plots import LOOK, Figure, mpl, plt

BATCH = 16  # pictures at a time


def figure(table: pd.DataFrame, titles: dict[str, str]) -> Figure:
    """The mean over pictures and draws, in a band of one standard deviation, over the share of layers."""
    with mpl.rc_context(LOOK):
        made, axes = plt.subplots(figsize=(6.4, 3.8))
        for number, (name, rows) in enumerate(table.groupby("network", sort=False)):
            r = rows.groupby("random_layers")["correlation"]
            mean, std = r.mean(), r.std().fillna(0)
            axes.plot(100 * mean.index, mean, label=plots.label(titles[name]), **plots.style(number))
            axes.fill_between(
                100 * mean.index, mean - std, mean + std, alpha=0.15, lw=0, color=plots.COLOURS[number % 7]
            )
        axes.set(xlabel="layers that are random, from the last on [%]", ylabel="correlation with the own map")
        made.legend(loc="outside upper center", ncols=2, fontsize="small")
    return made


def measured(
    nets: Sequence[Network], pictures: Sequence[Picture], layer: str, args: Namespace
) -> pd.DataFrame:
    """A row for each map of each network, draw and step."""
    parts = batches(len(pictures), BATCH)
    targets = [target for part in parts for target in predicted(nets[0], nets[0].images(pictures[part]))]
    rows = []
    for network in nets:
        for draw, part in product(range(args.draws), batches(len(pictures), BATCH, [args.method])):
            images = network.images(pictures[part])
            for share, name, correlations in cascade(
                network.model, images, targets[part], args.method, layer, args.steps, draw
            ):
                at = {"network": network.label, "draw": draw, "random_layers": share, "down_to": name}
                rows += [
                    {**at, "file": picture.name, "correlation": r}
                    for picture, r in zip(pictures[part], correlations, strict=True)
                ]
    return pd.DataFrame(rows)


@torch.no_grad()
def predicted(network: Network, images: Tensor) -> list:
    """Targets: the classes that a network predicts."""
    return of_classes(network.model(images).argmax(1))


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    network_flags.add_flags(parser)
    network_flags.add_size_flag(parser)
    network_flags.add_flags_beside(parser)
    add = parser.add_argument
    add("--image-path", type=Path, required=True, help="a picture, or a folder")
    add("--steps", type=NATURAL, default=10, help="in which all layers become random")
    add("--draws", type=NATURAL, default=3, help="of random weights")
    add("--output-dir", type=Path, default=Path("cams"), help="made if it is not there")
    return parser


@errors.boundary(code=errors.STOPPED)
def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        paths, nets = files(args.image_path), network_flags.read_all(args)
        layer = network_flags.target_layer(nets[0], None, args.method)
        networks.check_alike(nets, layer)
        pictures, failed = readable(paths)
        if not pictures:
            raise RunError(f"no picture in {args.image_path} can be read")
        target = predicted(nets[0], nets[0].images(pictures[:1]))
        for network in nets:  # where the method has no map of a network, it ends here
            explain(network.model, network.images(pictures[:1]), target, args.method, layer)
            networks.warn_if_larger(network)
        networks.warn(nets)
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except (RunError, ValueError, OSError) as error:
        parser.error(str(error))
    table = measured(nets, pictures, layer, args)
    save_table(args.output_dir / "randomised.csv", table)
    if undefined := int(table["correlation"].isna().sum()):
        print(f"warning: {undefined} of {len(table)} maps are undefined: left out", file=sys.stderr)
    titles = {network.label: network.title.replace("\n", ", ") for network in nets}
    means = table.groupby(["network", "random_layers"], sort=False)["correlation"].mean().unstack()
    print(means.round(2).to_string())
    print(f"figure: {plots.save(figure(table, titles), [args.output_dir], 'randomised')}")
    sys.exit(errors.LEFT_OUT if failed else 0)


if __name__ == "__main__":
    main()
