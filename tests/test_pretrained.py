"""A network that was saved in the hub's form is the same network after loading, of the same ranks."""

import json

import pytest
import torch
from torch import nn

import dlrt

pytest.importorskip("safetensors")


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.first = nn.Linear(6, width)
        self.tied = nn.Linear(width, 6, bias=False)
        self.again = nn.Linear(width, 6, bias=False)
        self.again.weight = self.tied.weight

    def forward(self, x):
        h = self.norm(self.conv(x)).mean((2, 3))
        return self.tied(self.first(h).relu()) + self.again(self.first(h))


@pytest.mark.filterwarnings("ignore:.*another module shares its weight")
@pytest.mark.parametrize("spatial", [False, True])
def test_a_saved_network_is_the_same_after_loading(spatial, tmp_path):
    model, x = dlrt.to_low_rank(Net(), rank=3, spatial=spatial).eval(), torch.randn(4, 3, 7, 7)
    dlrt.save_pretrained(model, tmp_path / "net", data="none")
    again = dlrt.from_pretrained(Net(), tmp_path / "net").eval()
    assert torch.equal(again(x), model(x))
    assert type(again.conv) is type(model.conv)
    facts = json.loads((tmp_path / "net/config.json").read_text())
    assert facts["data"] == "none"
    assert facts["ranks"] == dlrt.compression(again).ranks == {"conv": 3, "first": 3}


def test_what_is_not_there_or_fits_no_network_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not there: give the folder that save_pretrained wrote"):
        dlrt.from_pretrained(Net(), tmp_path)
    dlrt.save_pretrained(dlrt.to_low_rank(nn.Sequential(nn.Linear(3, 4))), tmp_path)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        dlrt.from_pretrained(Net(), tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        dlrt.save_pretrained(nn.Linear(3, 4), tmp_path / "none", data=object())
    assert not (tmp_path / "none").exists()


@pytest.mark.filterwarnings("ignore:.*another module shares its weight")
def test_the_mixin_of_the_hub_restores_ranks_and_arguments(tmp_path):
    pytest.importorskip("huggingface_hub")
    from dlrt.hub import LowRankHubMixin

    class Shared(Net, LowRankHubMixin):
        pass

    model, x = dlrt.to_low_rank(Shared(width=5), rank=2).eval(), torch.randn(4, 3, 7, 7)
    model.save_pretrained(tmp_path / "net")
    again = Shared.from_pretrained(tmp_path / "net")
    assert torch.equal(again(x), model(x))
    assert dlrt.compression(again).ranks == {"conv": 2, "first": 2}
    with pytest.raises(ValueError, match="must have no adapters: merge them"):
        dlrt.add_adapters(Shared(width=5)).save_pretrained(tmp_path / "other")
