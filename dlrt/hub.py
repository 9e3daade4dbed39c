"""Low-rank networks with huggingface_hub's methods: save_pretrained, from_pretrained, push_to_hub.

    class Net(nn.Module, LowRankHubMixin): ...

    dlrt.to_low_rank(net); ...; net.save_pretrained("folder")
    net = Net.from_pretrained("folder")       low-rank again, of the ranks that it had

A class is made with the arguments that it had, as with every such mixin, and gets its ranks from the weights.
Needs the extra `hub`. For a folder no connection is needed.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import PyTorchModelHubMixin

from dlrt.convert import load_factors
from dlrt.pretrained import load_weights, save_weights


class LowRankHubMixin(PyTorchModelHubMixin):
    """huggingface_hub's mixin for modules whose layers `dlrt.to_low_rank` has converted."""

    def _save_pretrained(self, save_directory: Path) -> None:
        save_weights(self, save_directory)

    @classmethod
    def _load_as_safetensor(
        cls, model: LowRankHubMixin, model_file: str, map_location: str, strict: bool
    ) -> LowRankHubMixin:
        return load_factors(model, load_weights(model_file)).to(map_location).eval()
