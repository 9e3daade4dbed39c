"""A packed linear layer in blocks of ranks of their own: one map, and the state dicts of both forms load."""

import copy

import pytest
import torch
from torch import nn

import dlrt

pytestmark = pytest.mark.usefixtures("float64")


class Packed(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 15, bias), nn.Linear(15, 4)

    def forward(self, x):
        return self.proj(self.qkv(x).tanh())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("split", [{"qkv": 3}, {"qkv": (9, 3, 3)}, {"qkv": [5, 10], "proj": 2}])
def test_a_split_layer_has_the_same_map_and_becomes_the_packed_one_again(split, bias):
    model, x = Packed(bias), torch.randn(2, 7, 6)
    state, expected = copy.deepcopy(model.state_dict()), model(x)
    dlrt.to_low_rank(model, split=split)
    rows = split["qkv"]
    assert [block.shape[0] for block in model.qkv] == ([5, 5, 5] if rows == 3 else list(rows))
    assert all(isinstance(block, dlrt.LowRankLinear) for block in model.qkv)
    assert torch.allclose(model(x), expected, atol=1e-12)
    assert torch.allclose(torch.nn.functional.linear(x, model.qkv.weight, model.qkv.bias), model.qkv(x))
    assert torch.allclose(dlrt.export(model)(x), expected, atol=1e-12)
    dlrt.to_dense(model)
    assert type(model.qkv) is nn.Linear
    assert model.state_dict().keys() == state.keys()
    assert all(torch.allclose(value, state[name], atol=1e-12) for name, value in model.state_dict().items())


def test_blocks_take_ranks_of_their_own_and_both_forms_of_state_load():
    model, x = Packed(), torch.randn(7, 6)
    with torch.no_grad():
        model.qkv.weight[:5] = torch.outer(torch.randn(5), torch.randn(6))
    state, expected = copy.deepcopy(model.state_dict()), model(x)
    low_rank = dlrt.to_low_rank(copy.deepcopy(model), tau=1e-6, split={"qkv": 3})
    assert [block.rank for block in low_rank.qkv] == [1, 5, 5]
    assert torch.allclose(low_rank(x), expected, atol=1e-5)
    again = dlrt.load_factors(Packed(), low_rank.state_dict())
    assert [block.rank for block in again.qkv] == [1, 5, 5]
    assert torch.equal(again(x), low_rank(x))
    other = dlrt.to_low_rank(Packed(), split={"qkv": 3})
    other.load_state_dict(state)
    assert torch.allclose(other(x), expected, atol=1e-12)
    with pytest.raises(RuntimeError, match=r"qkv\.weight"):
        other.load_state_dict({**state, "qkv.weight": torch.randn(12, 6)})


def test_blocks_train_unless_frozen_and_a_skipped_layer_trains_dense():
    model = nn.ModuleDict({"a": Packed(), "b": Packed()})
    model.b.qkv.requires_grad_(False)
    dlrt.to_low_rank(model, rank=2, skip=["b.proj"], split={"a.qkv": 3, "b.qkv": 3})
    optimizer = dlrt.DLRT(model, torch.optim.SGD, lr=0.1, tau=0.0, max_rank=2)
    before = copy.deepcopy(model.state_dict())
    sum(model[name](torch.randn(9, 6)).square().sum() for name in "ab").backward()
    optimizer.step()
    now = model.state_dict()
    moved = {name.rpartition(".")[0] for name in now if not torch.equal(now[name], before[name])}
    assert moved == {"a.qkv.0", "a.qkv.1", "a.qkv.2", "a.proj", "b.proj"}
    assert type(model.b.proj) is nn.Linear


@pytest.mark.parametrize("rows", [0, 2, -3, 2.5, True, "three", b"\x0f", (5, 5), (15, 0), (True, 14), None])
def test_a_wrong_split_is_told_and_changes_nothing(rows):
    model = Packed()
    with pytest.raises(ValueError, match=r"make up the 15 outputs of qkv, got"):
        dlrt.to_low_rank(model, split={"qkv": rows})
    with pytest.raises(ValueError, match=r"no linear layer of the model: kqv; it has qkv, proj"):
        dlrt.to_low_rank(model, split={"kqv": 3})
    both = nn.ModuleDict({"a": model})
    with pytest.raises(ValueError, match=r"names a.qkv twice, the second time by 'qkv'"):
        dlrt.to_low_rank(both, split={"a.qkv": 3, "qkv": 5})
    with pytest.raises(TypeError, match=r"must be a dict"):
        dlrt.to_low_rank(model, split=("qkv",))
    assert type(model.qkv) is nn.Linear


def test_blocks_are_linear_layers_to_others():
    """Whatever order parameters were registered in, exported or not."""
    model = Packed()
    weight = model.qkv._parameters.pop("weight")
    model.qkv.register_parameter("weight", weight)  # behind the bias, as after pruning
    dlrt.to_low_rank(model, rank=2, split={"qkv": 3})
    assert (model.qkv.in_features, model.qkv.out_features) == (6, 15)
    assert [type(block) for block in model.qkv[1:]] == [dlrt.LowRankLinear] * 2
    exported = dlrt.export(model)
    exported.load_state_dict(exported.state_dict())
    dlrt.add_adapters(model, rank=1, target="qkv")
    assert len(dlrt.adapter_state(model)) == 3 * 3
    with pytest.raises(ValueError, match=r"peft has no layers qkv.0, qkv.1, qkv.2"):
        dlrt.save_lora(model, "nowhere")


def test_what_is_frozen_in_part_is_trained_once_packed():
    model = dlrt.to_low_rank(Packed(), split={"qkv": 3})
    model.qkv[0].requires_grad_(False)
    assert dlrt.to_dense(model).qkv.weight.requires_grad


def test_a_state_of_other_blocks_is_refused_by_name():
    state = dlrt.to_low_rank(Packed(), rank=2, split={"qkv": 3}).state_dict()
    other = Packed()
    other.qkv = nn.Linear(6, 18)
    with pytest.raises(RuntimeError, match=r"qkv\.0\.U"):
        dlrt.load_factors(other, state)


def test_a_bias_that_others_share_keeps_a_layer_whole():
    model = nn.ModuleDict({"qkv": nn.Linear(6, 12), "other": nn.Linear(6, 12)})
    model.other.bias = model.qkv.bias
    with pytest.warns(UserWarning, match="qkv stays dense: another module shares its bias"):
        dlrt.to_low_rank(model, split={"qkv": 3})
    assert type(model.qkv) is nn.Linear
    assert model.other.bias is model.qkv.bias
    assert isinstance(model.other, dlrt.LowRankLinear)


def test_split_and_skip_of_the_same_layers_contradict_each_other():
    model = nn.Sequential(nn.ModuleDict({"qkv": nn.Linear(6, 12)}), nn.ModuleDict({"qkv": nn.Linear(6, 12)}))
    with pytest.raises(ValueError, match=r"split names 0.qkv, 1.qkv, which skip leaves dense: give one"):
        dlrt.to_low_rank(model, skip=["0", "1"], split={"qkv": 3})
    dlrt.to_low_rank(model, skip=["0"], split={"qkv": 3})
    assert (type(model[0].qkv), type(model[1].qkv)) == (nn.Linear, dlrt.Blocks)
