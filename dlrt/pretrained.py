"""Save and load trained networks in the hub's form: a folder with model.safetensors and config.json.

Needs safetensors (the extra `hub`). `dlrt.hub` has huggingface_hub's methods for it.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dlrt.adapters import adapters
from dlrt.convert import load_factors
from dlrt.costs import compression

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_pretrained(model: nn.Module, folder: Path | str, **about: Any) -> None:
    """Write a network's state_dict, and its ranks and compression with what else there is to say about it.

    folder is made where it is not there. ImportError without safetensors, TypeError for what JSON has no form
    for, ValueError for a network with adapters.
    """
    _check_savable(model)
    cost, folder = compression(model), Path(folder)
    facts = {**about, "ranks": cost.ranks, "evaluation_compression": cost.evaluation_compression}
    text = json.dumps(facts, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def from_pretrained(model: nn.Module, folder: Path | str) -> nn.Module:
    """Load what `save_pretrained` wrote into the dense network that it was made of, in place; give it back.

    Its layers become low-rank, of the ranks there, without a decomposition. FileNotFoundError where there are
    no weights, RuntimeError where they are another network's.
    """
    return load_factors(model, load_weights(Path(folder) / WEIGHTS))


def save_weights(model: nn.Module, folder: Path | str) -> None:
    """Write the state_dict alone; what two names share is written for each.

    ImportError without safetensors, ValueError for a network with adapters.
    """
    _check_savable(model)
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, Path(folder) / WEIGHTS, {"format": "pt"})


def load_weights(path: Path | str) -> dict[str, Tensor]:
    """The state_dict in a file."""
    _check_safetensors()
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there: give the folder that save_pretrained wrote")
    return load_file(path)


def _check_savable(model: nn.Module) -> None:
    _check_safetensors()
    if adapters(model):
        raise ValueError("the model must have no adapters: merge them, or save dlrt.adapter_state(model)")


def _check_safetensors() -> None:
    if not find_spec("safetensors"):
        raise ImportError("safetensors must be installed to save and load: pip install safetensors")
