"""Adapters begin as nothing, learn as full fine-tuning does, share a budget, and leave in three forms."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import dlrt
from dlrt.baselines import plain_factors

pytestmark = pytest.mark.usefixtures("float64")


class Network(nn.Module):
    """A convolution, attention, two linear layers of which the names end alike, and a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 12), "last": nn.Linear(12, 8, bias=False)})
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.conv(x).flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.fc(x).tanh()
        return self.head(self.block["last"](self.block["fc"](x).relu()).mean(1))


def data():
    return torch.randn(16, 2, 6, 6), torch.arange(16) % 3


def train(model, steps=4, **options):
    x, y = data()
    options = {"lr": 0.05, "update": "muon", "tau": 0.0, **options}
    optimizer = dlrt.DLRT(model, torch.optim.SGD, **options)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
    return losses


def trained(**options):
    model = dlrt.add_adapters(Network(), rank=3, target=("conv", "fc", "last"))
    train(model, **options)
    return model


def test_a_network_with_new_adapters_computes_what_it_did_and_only_they_are_trained():
    model, (x, _) = Network(), data()
    expected, own = model(x), dict(model.named_parameters())
    held = model.fc
    assert dlrt.add_adapters(model, rank=4) is model
    assert model.fc is held
    assert torch.allclose(model(x), expected, atol=1e-14)
    names = ("conv", *(f"attention.{kind}_proj" for kind in ("q", "k", "v", "out")), "fc")
    names += ("block.fc", "block.last", "head")
    assert {*dlrt.compression(model).ranks} == {f"{name}.adapter" for name in names}
    before = {name: value.clone() for name, value in own.items()}
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(torch.equal(own[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in own.values())


def test_at_full_rank_the_first_step_is_that_of_the_dense_weights():
    """And the second, with momentum: an adapter that begins at zero loses no direction."""
    dense, (x, y) = Network(), data()
    model = dlrt.add_adapters(copy.deepcopy(dense), rank=12, target=("fc", "last", "conv"))
    chosen = [m.weight for m in (dense.conv, dense.fc, dense.block["fc"], dense.block["last"])]
    settings = {"lr": 0.1, "momentum": 0.9}
    optimizers = torch.optim.SGD(chosen, **settings), dlrt.DLRT(model, torch.optim.SGD, tau=0.0, **settings)
    for _ in range(3):
        for net, optimizer in zip((dense, model), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    merged = dlrt.merge_adapters(model)
    assert all(torch.allclose(value, dense.state_dict()[name]) for name, value in merged.state_dict().items())


def test_from_random_bases_an_adapter_finds_a_change_of_its_rank():
    """Which random bases that stay would not: their best approximation misses most of it."""
    change, x = torch.randn(9, 2) @ torch.randn(2, 7), torch.linalg.qr(torch.randn(40, 7))[0]
    model = dlrt.add_adapters(nn.Linear(7, 9, bias=False), rank=2)
    aim, U, V = model(x).detach() + x @ change.mT, model.adapter.U.clone(), model.adapter.V.clone()
    assert (change - U @ (U.mT @ change @ V) @ V.mT).norm() > 0.5 * change.norm()
    optimizer = dlrt.DLRT(model, torch.optim.SGD, lr=0.4, tau=0.0, max_rank=2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), aim, reduction="sum").backward()
        optimizer.step()
    assert torch.allclose(model.adapter.weight, change, atol=1e-9)


def test_ranks_move_between_layers_under_one_budget_of_what_is_trained():
    model = dlrt.add_adapters(Network(), rank=6, target=("fc", "last"))
    cost = dlrt.compression(model)
    shapes = {"fc": 16, "block.fc": 20, "block.last": 20}
    assert cost.dense_parameters == 8 * 8 + 12 * 8 + 8 * 12  # and not those that rest
    assert cost.evaluation_parameters == 64 + 2 * 96  # 6 (m + n) is more in each
    train(model, steps=6, compression=0.5, ramp=3, allot_every=1, min_rank=1)
    after = dlrt.compression(model)
    assert after.evaluation_parameters <= cost.dense_parameters / 2
    assert after.evaluation_parameters == sum(
        after.ranks[f"{n}.adapter"] * size for n, size in shapes.items()
    )
    assert len(set(after.ranks.values())) > 1


def test_a_head_that_is_unfrozen_is_trained_counted_and_saved():
    model = dlrt.add_adapters(Network(), rank=2, target="fc")
    model.head.requires_grad_(True)
    assert dlrt.compression(model).dense_parameters == 64 + 96 + 24
    before = model.head.weight.clone()
    train(model)
    assert not torch.equal(model.head.weight, before)
    assert {"head.weight", "head.bias"} < dlrt.adapter_state(model).keys()


def test_merged_it_is_the_network_of_before_with_other_weights():
    model, (x, _) = dlrt.add_adapters(Network(), rank=3), data()
    train(model)
    expected, weight = model(x), model.fc.base.weight
    other = nn.Linear(8, 8)
    other.weight = weight  # tied
    before = weight.clone()
    assert dlrt.merge_adapters(model) is model
    assert str(model) == str(Network())
    assert list(model.state_dict()) == list(Network().state_dict())
    assert torch.allclose(model(x), expected, atol=1e-12)
    assert torch.equal(other.weight, before)


def test_the_state_of_the_adapters_alone_loads_into_the_network_without_them():
    first = Network()
    model, (x, _) = dlrt.add_adapters(copy.deepcopy(first), rank=3), data()
    train(model, compression=0.5, ramp=2, allot_every=1)
    state = dlrt.adapter_state(model)
    assert len(state) == 3 * len(dlrt.compression(model).ranks)
    for start in (copy.deepcopy(first), dlrt.add_adapters(copy.deepcopy(first), rank=1)):
        again = dlrt.load_adapters(start, state)
        assert torch.allclose(again(x), model(x), atol=1e-12)
        assert train(again)[-1] < nn.functional.cross_entropy(first(x), data()[1]) + 1  # it trains on
    with pytest.raises(ValueError, match=r"which has no attention\.k_proj, attention\.out_proj"):
        dlrt.load_adapters(nn.Sequential(nn.Linear(8, 8)), state)
    with pytest.raises(ValueError, match="got none of any"):
        dlrt.load_adapters(first, {})
    assert all(parameter.requires_grad for parameter in first.parameters())
    part = {name: value for name, value in state.items() if not name.startswith("block.")}
    with pytest.raises(ValueError, match=r"got none of block\.fc, block\.last"):
        dlrt.load_adapters(model, part)


def test_a_state_that_does_not_fit_leaves_the_network_as_it_was():
    model, other = trained(), Network()
    state, before = dlrt.adapter_state(model), copy.deepcopy(model.state_dict())
    wrong = {
        "must be orthonormal": {"fc.adapter.U": 2 * state["fc.adapter.U"]},
        "must be finite": {"fc.adapter.S": torch.full_like(state["fc.adapter.S"], torch.nan)},
        r"U, S and V of 8 x 8 weights, got .*, \(9, 3\)": {"fc.adapter.V": torch.ones(9, 3)},
    }
    for told, change in wrong.items():
        for network in (model, other):
            with pytest.raises(ValueError, match=told):
                dlrt.load_adapters(network, state | change)
    head = {"head.weight": torch.ones(3, 9)}
    with pytest.raises(ValueError, match=r"got head\.weight of the shape \(3, 9\) instead of \(3, 8\)"):
        dlrt.load_adapters(other, state | head)
    with pytest.raises(ValueError, match=r"which has no tail\.weight"):
        dlrt.load_adapters(other, state | {"tail.weight": torch.ones(3)})
    for stray in ("head.adapter.U", "database.fc.weight"):
        with pytest.raises(ValueError, match=rf"which has no {stray}"):
            dlrt.load_adapters(other, state | {stray: torch.ones(8, 8)})
    incomplete = {name: value for name, value in state.items() if name != "fc.adapter.V"}
    with pytest.raises(ValueError, match="U, S and V of 8 x 8"):
        dlrt.load_adapters(other, incomplete)
    with pytest.raises(TypeError, match="must be a dict as of"):
        dlrt.load_adapters(other, [1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not [m for m in other.modules() if isinstance(m, dlrt.LowRankLayer)]
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_a_state_between_two_basis_updates_loads():
    first = Network()
    model = dlrt.add_adapters(copy.deepcopy(first), rank=3, target=("conv", "fc", "last"))
    train(model, steps=5, s_steps=4)
    state, (x, _) = dlrt.adapter_state(model), data()
    assert any(S.shape[0] != S.shape[1] for name, S in state.items() if name.endswith("S"))
    assert torch.allclose(dlrt.load_adapters(first, state)(x), model(x), atol=1e-12)


def test_an_optimizer_of_adapters_that_are_merged_is_told_when_it_steps():
    model, (x, y) = dlrt.add_adapters(Network(), target="fc"), data()
    optimizer = dlrt.DLRT(model, torch.optim.SGD, lr=0.05)
    dlrt.merge_adapters(model).requires_grad_(True)
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="must belong to the DLRT that steps"):
        optimizer.step()


@pytest.mark.parametrize("change", [dlrt.to_dense, dlrt.export, lambda model: dlrt.average([model, model])])
def test_what_makes_layers_dense_wants_adapters_merged(change):
    model, (x, _) = trained(), data()
    with pytest.raises(ValueError, match=r"conv, fc, .* must have no adapters: call dlrt\.merge_adapters"):
        change(model)
    expected = model(x)
    assert torch.allclose(change(dlrt.merge_adapters(model))(x), expected, atol=1e-12)


class Quantised(nn.Module):
    """A layer with 8-bit weights, as libraries have them: no parameter can be trained."""

    def __init__(self, dense):
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.scale = dense.weight.detach().abs().max() / 127
        self.register_buffer("codes", (dense.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.codes.to(x.dtype) * self.scale.to(x.dtype)).mT


def test_weights_of_other_types_rest_beside_adapters_in_single_precision():
    for base in (Quantised(nn.Linear(8, 6)), nn.Linear(8, 6).bfloat16(), dlrt.LowRankLinear(8, 6, 2)):
        kind = type(base).__name__
        x = torch.randn(20, 8, dtype=torch.bfloat16 if kind == "Linear" else torch.float64)
        model = dlrt.add_adapters(nn.Sequential(base), rank=2)
        optimizer = dlrt.DLRT(model, torch.optim.SGD, lr=0.1, update="muon", tau=0.0)
        y = model(x)
        assert y.dtype == x.dtype
        for _ in range(2):
            optimizer.zero_grad()
            (model(x).double() - 1).square().mean().backward()
            optimizer.step()
        assert not torch.equal(model(x), y)
        if kind == "Linear":
            assert dlrt.merge_adapters(model)[0].weight.dtype == torch.bfloat16
        elif kind == "LowRankLinear":
            expected, rank = model(x), model[0].base.rank + model[0].adapter.rank
            assert torch.allclose(dlrt.merge_adapters(model)(x), expected, atol=1e-12)
            assert model[0].rank == min(rank, 6)
        else:
            with pytest.raises(ValueError, match=f"got {kind}: keep them beside it"):
                dlrt.merge_adapters(model)


def test_what_cannot_have_adapters_is_told():
    model = Network()
    with pytest.raises(
        ValueError, match=r"layers that can have adapters, got f; there are conv, attention\.q"
    ):
        dlrt.add_adapters(model, target=["fc", "f"])
    for rank in (0, 1.5, True, "8"):
        with pytest.raises(ValueError, match=rf"rank must be a whole number from 1 on, got {rank!r}"):
            dlrt.add_adapters(model, rank=rank)
    with pytest.raises(ValueError, match="target must name a layer, or be None for all"):
        dlrt.add_adapters(model, target=())
    one_sided = nn.ModuleDict({"fc": nn.Linear(8, 8), "head": nn.AdaptiveLogSoftmaxWithLoss(8, 9, [3, 5])})
    dlrt.add_adapters(one_sided, target="fc")  # the head has no number of outputs
    assert all(parameter.requires_grad for parameter in model.parameters())
    dlrt.add_adapters(model, target="block")
    assert list(dlrt.compression(model).ranks) == ["block.fc.adapter", "block.last.adapter"]
    with pytest.raises(ValueError, match="no adapters yet"):
        dlrt.add_adapters(model)


def test_what_batch_norms_have_seen_goes_along():
    def network():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 3))

    model, x = dlrt.add_adapters(network()), torch.randn(16, 3, 6, 6)
    other = network()
    other.load_state_dict(dlrt.merge_adapters(copy.deepcopy(model)).state_dict())
    model(x)  # in training mode
    dlrt.load_adapters(other, dlrt.adapter_state(model))
    assert torch.allclose(other.eval()(x), model.eval()(x), atol=1e-12)


def test_adapters_beside_plain_factors_stand_for_what_rests_there():
    model = plain_factors(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10)), 0.5)
    held = dlrt.compression(model).evaluation_parameters
    cost = dlrt.compression(dlrt.add_adapters(model, rank=2))
    sizes = [m.base.weight.shape for m in model.modules() if hasattr(m, "adapter")]
    assert cost.dense_parameters == held == sum(m * n for m, n in sizes)
    assert cost.evaluation_parameters == sum(2 * (m + n) for m, n in sizes)


def test_layers_that_compute_something_else_have_no_adapters():
    class Padded(nn.Conv2d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))

    normed = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    weighed = torch.nn.utils.weight_norm(nn.Linear(8, 8))
    pruned = prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)
    model = nn.ModuleDict(
        {"a": nn.Linear(8, 8), "n": normed, "p": pruned, "w": weighed, "c": Padded(8, 8, 3)}
    )
    with pytest.raises(ValueError, match=r"got c \(c: Padded is a subclass of .*\); there are a"):
        dlrt.add_adapters(model, target="c")
    assert all(parameter.requires_grad for parameter in model.parameters())
    scaled = Quantised(nn.Linear(8, 8))
    scaled.weight_scale_inv = nn.Parameter(torch.ones(1))  # its own, no part of a sum
    assert hasattr(dlrt.add_adapters(nn.Sequential(scaled))[0], "adapter")
    body = nn.ModuleDict({"a": nn.Linear(8, 8), "w": weighed})
    around = nn.ModuleDict({"body": body, "n": normed})
    with pytest.warns(UserWarning, match="^body.w gets no adapter: its weight is computed of others"):
        dlrt.add_adapters(around, target="body")
    with pytest.warns(UserWarning, match="gets no adapter") as told:
        dlrt.add_adapters(model)
    assert [str(warning.message).split()[0] for warning in told] == ["n", "p", "w", "c"]
    assert [name for name, module in model.named_modules() if hasattr(module, "adapter")] == ["a"]


def test_a_layer_of_whole_numbers_tells_its_sizes_and_has_no_sum_of_weights():
    whole = nn.Linear(8, 6)
    del whole.weight
    whole.register_buffer("weight", torch.ones(6, 8, dtype=torch.int8))
    for base in (Quantised(nn.Linear(8, 6)), whole):
        model = dlrt.add_adapters(nn.Sequential(base))
        assert (model[0].in_features, model[0].out_features) == (8, 6)
        assert getattr(model[0], "weight", None) is None
        with pytest.raises(ValueError, match="floating-point weights"):
            dlrt.merge_adapters(model)
