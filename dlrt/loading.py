"""The trained network of a run, to look at it, to draw its activations or to take it elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dlrt import models
from dlrt.baselines import plain_factors
from dlrt.convert import load_factors
from dlrt.errors import RunError
from dlrt.records import one_line
from dlrt.runs import load_checkpoint


def load_network(run: Path | str, network: type[nn.Module] | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run with the weights of its chosen epoch, and what the checkpoint says about it.

    run is a run's folder or a checkpoint.pt. The network is on the CPU and in evaluation mode, and low-rank
    where the run's was. The second value has the keys network, settings, shape (channels, height, width),
    classes, dataset, mean and std (per channel, of pixels in [0, 1]), by which images must be normalised. A
    network that is not one of `dlrt.models` must be given as a class. RunError where there is no checkpoint,
    or where it is damaged or of another network.
    """
    path = Path(run)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise RunError(f"there is no {path}: give a run's folder or its checkpoint.pt, or train it anew")
    state = load_checkpoint(path)
    if missing := {"about", "chosen"} - state.keys():
        raise RunError(f"{path} has no {' and no '.join(sorted(missing))}: it is not from a training script")
    about = state["about"]
    name = about.get("network") if isinstance(about, dict) else None
    if not isinstance(name, str):
        raise RunError(f"{path} is damaged: it does not say which network it holds")
    if network is None and name not in models.__all__:
        raise RunError(
            f"{path} holds the network {name!r}, and dlrt.models has only {', '.join(models.__all__)}: "
            f"give its class, load_network(run, {name})"
        )
    network = network or getattr(models, name)
    try:
        model = network(tuple(about["shape"]), about["classes"], **about["settings"])
        if factors := about.get("factors"):
            model = plain_factors(model, **factors)
        numbers = [float(value) for key in ("mean", "std") for value in about[key]]
        if len(numbers) != 2 * about["shape"][0] or not isinstance(about["dataset"], str):
            raise ValueError("it must name the data set, with a mean and a deviation of every channel")
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise RunError(f"{path} is damaged: it does not say how its {name} is made ({reason})") from error
    try:
        model = load_factors(model, state["chosen"])
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"the weights in {path} do not fit {network.__name__}: {reason}") from error
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise RunError(f"the weights in {path} must be finite, got NaN or infinity: train it anew")
    return model.eval(), about
