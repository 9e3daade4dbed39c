"""What cam.py records of all its maps, and which predictions it warns of."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import dlrt
from dlrt.cams.networks import Network
from dlrt.checkpoint import atomic_write, save_table
from dlrt.errors import KEPT
from dlrt.options import NOT_PART_OF_THE_EXPERIMENT
from dlrt.runs import environment


def warn_of_changes(table: pd.DataFrame, first: Network) -> None:
    """Say on stderr which networks predict something else than the first one."""
    once = table.drop_duplicates(["file", "network"]).set_index("file")
    expected = once.loc[once["network"] == first.label, "predicted"]
    for label, group in once.groupby("network", sort=False):
        changed = group.index[group["predicted"] != expected[group.index]]
        if len(changed):
            told_of = f"something else than {first.label} on {len(changed)} of {len(group)} pictures"
            print(f"warning: {label} predicts {told_of}: {', '.join(changed)}", file=sys.stderr)


def write_records(table: pd.DataFrame, nets: Sequence[Network], layer: str, args: argparse.Namespace) -> None:
    """cams.csv and config.json; of files and folders the names alone, since records can be published."""
    save_table(args.output_dir / "cams.csv", table)
    options = {key: value for key, value in vars(args).items() if key not in NOT_PART_OF_THE_EXPERIMENT}
    options["target_layer"] = layer if args.method != ["fullgrad"] else None
    config = {
        "networks": [about(network) for network in nets],
        "input": list(nets[0].shape),
        "options": {key: published(value) for key, value in options.items()},
        **environment(nets[0].device),
    }
    text = json.dumps(config, indent=2) + "\n"
    atomic_write(args.output_dir / "config.json", lambda file: file.write(text.encode()), KEPT)


def about(network: Network) -> dict[str, object]:
    count = dlrt.compression(network.model)
    compression = round(count.evaluation_compression, 3)
    return {"network": network.label, "ranks": count.ranks, "evaluation_compression": compression}


def published(value: object) -> object:
    """An option as JSON has it, without the folders of files that are there."""
    if isinstance(value, list):
        return [published(entry) for entry in value]
    if isinstance(value, (str, Path)):  # what is not there is a name, as of a network that comes along
        return Path(value).resolve().name if Path(value).exists() else str(value)
    return value
