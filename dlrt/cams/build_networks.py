"""The networks that are compared with a reference, and those that show what a similarity is worth."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import dlrt
from dlrt.cams import known, networks
from dlrt.cams.networks import Network
from dlrt.runs import Run

FULL_RANK = "full rank"
OTHER_FILES = ("pictures", "times")  # of a comparison's folder, beside those of the networks


@dataclass(frozen=True)
class Candidate:
    """A network to compare, what it is, its tolerance, and the method by which its maps are made."""

    network: Network
    kind: str
    method: str
    tau: float | None = None

    def fingerprint(self) -> str:
        """Twelve letters that change with the weights."""
        digest = hashlib.sha256(self.kind.encode())
        for name, tensor in self.network.model.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]


def gather(
    reference: Network,
    method: str,
    low_rank: Sequence[Path] = (),
    taus: Sequence[float] = (),
    seeds: Sequence[Path] = (),
    image_size: int | None = None,
) -> list[Candidate]:
    """The reference, the low-rank networks, the same cut from the reference, other seeds, and three controls.

    The controls are the reference in low-rank layers of full rank, with random weights, and explained by
    RandomCAM. All are on the reference's device; those of runs see pictures of image_size, too. ValueError
    where a run is dense and should be low-rank, or the reverse.
    """

    def run(path: Path, flag: str) -> Network:
        network = networks.placed(known.from_run(path), image_size, reference.device)
        is_low_rank = dlrt.compression(network.model).compressed
        if is_low_rank != (flag == "--low-rank"):
            kind, place = ("low-rank", "--low-rank") if is_low_rank else ("dense", "--seeds")
            raise ValueError(f"{network.label} is {kind}: give it as {place}, not as {flag}")
        return network

    def cut(tau: float | None, label: str) -> Network:
        return replace(networks.truncated(reference, tau=tau), label=label)

    found = [Candidate(reference, "reference", method)]
    found += [Candidate(run(path, "--low-rank"), "low-rank", method, _tau(path)) for path in low_rank]
    found += [Candidate(cut(tau, f"svd_tau{tau:g}"), "SVD", method, tau) for tau in dict.fromkeys(taus)]
    found += [Candidate(run(path, "--seeds"), "other seed", method) for path in seeds]
    found.append(Candidate(cut(None, "full_rank"), FULL_RANK, method))
    random = replace(reference, model=random_weights(reference.model), label="random_weights")
    found.append(Candidate(random, "random weights", method))
    found.append(Candidate(replace(reference, label="randomcam"), "RandomCAM", "randomcam"))
    return found


def _tau(run: Path) -> float | None:
    return Run(run if run.is_dir() else run.parent).options().get("tau") or None  # a budget has none


def check(found: Sequence[Candidate], layer: str) -> None:
    """ValueError where a network cannot be compared with the first one at a layer, or not by its name."""
    nets = [candidate.network for candidate in found]
    networks.check_alike(nets, layer)
    if taken := [network.label for network in nets if network.label in OTHER_FILES]:
        raise ValueError(f"no network can be called {taken[0]}, as another file is: rename its folder")


def random_weights(model: nn.Module) -> nn.Module:
    """A copy in which every layer has the weights that torch begins with, always the same.

    What no layer of torch's draws, as the token of a class, is normal with the mean and deviation it had.
    """
    copy = deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20_221_128)  # of none of the seeds with which networks begin
        for module in copy.modules():
            reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
            own = module.parameters(recurse=False)
            if reset is not None:
                reset()
            for parameter in own if reset is None else ():
                std, mean = (float(value) for value in torch.std_mean(parameter, correction=0))
                nn.init.normal_(parameter, mean, std)
    return copy


def describe(candidate: Candidate) -> dict[str, object]:
    """What is written about a network in each of its rows."""
    count = dlrt.compression(candidate.network.model)
    return {
        "network": candidate.network.label,
        "kind": candidate.kind,
        "tau": candidate.tau,
        "compression": round(count.evaluation_compression, 3),
        "ranks": "/".join(map(str, count.ranks.values())),
        "weights": candidate.fingerprint(),
    }
