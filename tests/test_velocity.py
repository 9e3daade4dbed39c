"""The velocity is a tangent vector that follows the bases, and at full rank DLRT is the dense optimizer."""

import copy

import pytest
import torch
from torch import nn

import dlrt
from dlrt import DLRT, LowRank, LowRankLayer, LowRankLinear
from dlrt.baselines import Muon
from dlrt.integrators import parallel_step
from dlrt.models import GPT
from dlrt.velocity import Tangent, adam, carried, msign

pytestmark = pytest.mark.usefixtures("float64")

NETS = {
    "wide": (lambda: nn.Linear(12, 5), (20, 12), (20, 5)),
    "tall": (lambda: nn.Linear(5, 12), (20, 5), (20, 12)),
    "square": (lambda: nn.Linear(7, 7), (20, 7), (20, 7)),
    "strided convolution": (lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1), (4, 3, 9, 9), (4, 6, 5, 5)),
    "two layers": (
        lambda: nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5)),
        (20, 12),
        (20, 5),
    ),
}
OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "decay": {"momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "maximize": {"momentum": 0.5, "weight_decay": 0.01, "maximize": True},
}


def apart(dense, model):
    """The largest relative difference of a parameter."""
    other = dlrt.to_dense(copy.deepcopy(model))
    pairs = zip(dense.parameters(), other.parameters(), strict=True)
    return max(float(((a - b).norm() / a.norm()).detach()) for a, b in pairs)


def train_both(name, make_dense, make_low_rank, steps=50):
    net, x_shape, y_shape = NETS[name]
    x, y, dense = torch.randn(x_shape), torch.randn(y_shape), net()
    model = dlrt.to_low_rank(copy.deepcopy(dense))
    for net, make in ((dense, make_dense), (model, make_low_rank)):
        optimizer = make(net)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps + 5)
        for _ in range(steps):
            optimizer.zero_grad()
            net(x).sub(y).square().mean().backward()
            optimizer.step()
            scheduler.step()
    return apart(dense, model)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("options", OPTIONS)
def test_fifty_full_rank_steps_are_those_of_torchs_sgd(name, options):
    options = {"lr": 0.05, **OPTIONS[options]}
    difference = train_both(
        name,
        lambda net: torch.optim.SGD(net.parameters(), **options),
        lambda net: DLRT(net, torch.optim.SGD, tau=0.0, **options),
        steps=20 if options.get("maximize") else 50,
    )
    assert difference <= 1e-10


@pytest.mark.parametrize(
    ("optimizer_class", "update"),
    [
        (torch.optim.SGD, "sgd"),
        (torch.optim.SGD, "muon"),
        (torch.optim.Adam, "adam"),
        (torch.optim.AdamW, "adam"),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"s_steps": 2}, {"integrator": "augmented", "weight_decay": 0.1}], ids=str
)
def test_to_maximize_a_loss_is_to_minimize_its_negative(options, optimizer_class, update):
    (make, shape, _), models = NETS["two layers"], []
    x, net = torch.randn(shape), make()
    for sign in (1, -1):
        models.append(dlrt.to_low_rank(copy.deepcopy(net), rank=3))
        optimizer = DLRT(models[-1], optimizer_class, lr=0.01, update=update, maximize=sign == -1, **options)

        def closure(model=models[-1], optimizer=optimizer, sign=sign):
            optimizer.zero_grad()
            loss = sign * model(x).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
    assert apart(dlrt.to_dense(models[0]), models[1]) <= 1e-10


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("options", OPTIONS)
def test_after_earlier_weights_are_loaded_the_velocity_goes_on_as_the_dense_one(name, options):
    """Back to the best weights, with the same optimizer: a torch optimizer keeps its momentum then."""
    options, (make, x_shape, y_shape) = {"lr": 0.05, **OPTIONS[options]}, NETS[name]
    x, y, dense = torch.randn(x_shape), torch.randn(y_shape), make()
    model = dlrt.to_low_rank(copy.deepcopy(dense))
    nets = {
        dense: torch.optim.SGD(dense.parameters(), **options),
        model: DLRT(model, torch.optim.SGD, tau=0.0, **options),
    }
    sign = -1 if options.get("maximize") else 1

    def train(steps):
        for net, optimizer in nets.items():
            for _ in range(steps):
                optimizer.zero_grad()
                (sign * net(x).sub(y).square().mean()).backward()
                optimizer.step()

    train(3)
    best = [copy.deepcopy(net.state_dict()) for net in nets]
    train(9)
    for net, state in zip(nets, best, strict=True):
        net.load_state_dict(state)
    train(9)
    assert apart(dense, model) <= 1e-10


def dense_velocity(layer, optimizer):
    MV, core, MU = (optimizer.state[p]["velocity"] for p in (layer.U, layer.S, layer.V))
    return Tangent(layer.U, layer.V, MV, MU, core) @ torch.eye(len(layer.V))


def trained_layer(kind=torch.optim.SGD, **options):
    layer = LowRankLinear(9, 7, 3)
    optimizer = DLRT(nn.Sequential(layer), kind, lr=0.01, tau=0.0, max_rank=3, **options)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(8, 9)).square().mean().backward()
        optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize("rank", [2, 3, 5])
@pytest.mark.parametrize("way", ["load_state_dict", "factors"])
def test_the_velocity_of_loaded_weights_is_the_tangent_projection_of_the_one_before(way, rank):
    layer, optimizer = trained_layer(momentum=0.9)
    own, M = copy.deepcopy(layer.state_dict()), dense_velocity(layer, optimizer)
    other = LowRankLinear(9, 7, rank)

    def give(factors):
        if way == "factors":
            layer.factors = LowRank(*(factors[name] for name in "USV"))
        else:
            layer.load_state_dict(factors)

    give(other.state_dict())
    give(own)
    optimizer.state_dict()
    assert torch.equal(dense_velocity(layer, optimizer), M)  # as if nothing had been
    give(other.state_dict())
    optimizer.state_dict()
    PU, PV = (basis @ basis.mT for basis in (other.U, other.V))
    assert torch.allclose(dense_velocity(layer, optimizer), PU @ M + M @ PV - PU @ M @ PV, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_of_the_velocity_of_resting_bases_that_part_goes_on_which_loaded_ones_hold(frozen):
    layer, optimizer = trained_layer(momentum=0.9, s_steps=5)
    if frozen:
        optimizer.freeze_bases()
    assert not layer.trains_bases
    core, U, V = optimizer.state[layer.S]["velocity"], layer.U.detach().clone(), layer.V.detach().clone()
    other = LowRankLinear(9, 7, layer.rank)
    layer.load_state_dict(other.state_dict())
    optimizer.state_dict()
    expected = other.U.mT @ U @ core @ V.mT @ other.V
    assert torch.allclose(optimizer.state[layer.S]["velocity"], expected, atol=1e-12)


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.99)])
def test_mean_squares_follow_loaded_weights_as_they_follow_the_bases(betas):
    layer, optimizer = trained_layer(torch.optim.Adam, betas=betas)
    squares, U, V = optimizer.state[layer.S]["squares"], layer.U.detach().clone(), layer.V.detach().clone()
    other = LowRankLinear(9, 7, 2)
    layer.load_state_dict(other.state_dict())
    optimizer.state_dict()
    expected = (other.U.mT @ U).square() @ squares @ (V.mT @ other.V).square()
    assert torch.allclose(optimizer.state[layer.S]["squares"], expected, atol=1e-12)


@pytest.mark.parametrize("order", [("layer", "optimizer"), ("optimizer", "layer")])
def test_states_of_layer_and_optimizer_may_be_loaded_in_either_order(order):
    layer, optimizer = trained_layer(momentum=0.9)
    M = dense_velocity(layer, optimizer)
    states = {"layer": copy.deepcopy(layer.state_dict()), "optimizer": copy.deepcopy(optimizer.state_dict())}
    again, other = trained_layer(momentum=0.9)
    for name in order:
        {"layer": again, "optimizer": other}[name].load_state_dict(states[name])
    for each, its in ((layer, optimizer), (again, other)):
        its.zero_grad()
        each(torch.ones(2, 9)).square().mean().backward()
        its.step()
    assert not torch.equal(dense_velocity(layer, optimizer), M)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_velocity_follows_a_model_that_changes_its_type_as_well(when):
    layer, optimizer = trained_layer(momentum=0.9)
    M, other = dense_velocity(layer, optimizer), LowRankLinear(9, 7, 3)
    if when == "before":
        layer.float()
    layer.load_state_dict(other.state_dict())
    layer.float()
    optimizer.state_dict()
    assert optimizer.state[layer.S]["velocity"].dtype == torch.float32
    PU, PV = (basis @ basis.mT for basis in (other.U, other.V))
    MV, core, MU = (optimizer.state[p]["velocity"].double() for p in (layer.U, layer.S, layer.V))
    found = Tangent(other.U, other.V, MV, MU, core) @ torch.eye(9)
    assert torch.allclose(found, PU @ M + M @ PV - PU @ M @ PV, atol=1e-5 * M.norm().item())


def test_factors_that_are_replaced_by_others_are_told():
    layer, optimizer = trained_layer(momentum=0.9)
    layer.load_state_dict(LowRankLinear(9, 7, 3).state_dict(), assign=True)
    layer(torch.ones(2, 9)).sum().backward()
    with pytest.raises(RuntimeError, match="must have the parameters of which the DLRT was made"):
        optimizer.step()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.AdamW, {"betas": (0.8, 0.99)}),
    ],
)
def test_full_rank_muon_is_muon_on_the_dense_weight(name, kind, options):
    options = {"lr": 0.05, "weight_decay": 0.01, **options}

    def dense_muon(net):
        layers = [module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        return Muon(net.parameters(), layers, optimizer_class=kind, **options)

    def low_rank_muon(net):
        return DLRT(net, kind, update="muon", tau=0.0, **options)

    assert train_both(name, dense_muon, low_rank_muon) <= 1e-10


def test_the_polar_factor_is_that_of_the_range_and_turns_with_the_bases():
    D = torch.randn(6, 2) @ torch.randn(2, 8)
    P, Q = (torch.linalg.qr(torch.randn(n, n)).Q for n in (6, 8))
    sign = msign(D)
    assert torch.allclose(torch.linalg.svdvals(sign), torch.tensor([1.0, 1, 0, 0, 0, 0]), atol=1e-12)
    assert torch.allclose(msign(P.mT @ D @ Q), P.mT @ sign @ Q, atol=1e-12)
    assert torch.equal(msign(torch.zeros(3, 3)), torch.zeros(3, 3))


def test_adam_moves_entries_in_new_directions_by_at_most_the_step_size():
    """They have no past squares, and would move by thirty times as much were they taken to be zero."""
    state = {}
    for _ in range(30):
        adam(torch.randn(4, 4), torch.randn(4, 4), state, (0.9, 0.999), 1e-8)
    old = adam(torch.randn(4, 4), torch.randn(4, 4), dict(state), (0.9, 0.999), 1e-8)
    grown = adam(torch.randn(6, 5), 0.01 * torch.randn(6, 5), state, (0.9, 0.999), 1e-8)
    new = torch.ones(6, 5, dtype=bool)
    new[:4, :4] = False
    assert grown[new].abs().max() <= 1
    assert old.abs().max() > 1


@pytest.mark.parametrize("options", [{"tau": 0.05}, {"compression": 0.4, "ramp": 30}], ids=str)
def test_adam_trains_while_new_directions_come_in_at_every_step(options):
    torch.manual_seed(0)
    model, x = dlrt.to_low_rank(NETS["two layers"][0]()), torch.randn(64, 12)
    y, optimizer = x[:, :5].sin(), DLRT(model, torch.optim.Adam, lr=0.005, **options)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(x).sub(y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert max(losses) < 1.5 * losses[0]


def projected(M, Y):
    """The orthogonal projection of a matrix onto the tangent space at Y."""
    PU, PV = Y.U @ Y.U.mT, Y.V @ Y.V.mT
    return PU @ M + M @ PV - PU @ M @ PV


def dense(M):
    return M @ torch.eye(len(M.V))


def test_a_tangent_vector_is_an_operator():
    Y, A = LowRank.from_dense(torch.randn(9, 7), rank=3), torch.randn(9, 7)
    M = Tangent(Y.U, Y.V, A @ Y.V, A.mT @ Y.U, Y.U.mT @ A @ Y.V)
    assert torch.allclose(dense(M), projected(A, Y), atol=1e-13)
    assert torch.allclose(dense(M.T), dense(M).mT, atol=1e-13)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("inside", [False, True])
def test_the_velocity_is_carried_by_the_orthogonal_projection(inside, rank):
    """To bases in the span of the augmented ones, in which the velocity may lie or not."""
    Y, A = LowRank.from_dense(torch.randn(9, 7), rank=3), torch.randn(9, 7)
    M = Tangent(Y.U, Y.V, A @ Y.V, A.mT @ Y.U, Y.U.mT @ A @ Y.V + torch.randn(3, 3))
    along = A if inside else torch.randn(9, 7)
    Y_hat, D = parallel_step(Y, along @ Y.V, along.mT @ Y.U, 1.0, M.core)
    P, Q = (torch.linalg.qr(torch.randn(k, rank)).Q for k in Y_hat.S.shape)
    U, V, *products = moved = carried(M, Y_hat, P, Q)
    assert torch.allclose(U, Y_hat.U @ P)
    assert torch.allclose(V, Y_hat.V @ Q)
    Y1 = LowRank(U, torch.eye(rank), V)
    assert torch.allclose(dense(Tangent(U, V, *products)), projected(dense(M), Y1), atol=1e-13)
    if inside:
        by_coefficients = carried(LowRank(Y_hat.U, D, Y_hat.V), Y_hat, P, Q)
        for one, other in zip(by_coefficients, moved, strict=True):
            assert torch.allclose(one, other, atol=1e-13)
        assert all(product.untyped_storage().nbytes() == product.nbytes for product in by_coefficients[2:])


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_velocity_of_a_step_is_the_projection_of_the_one_before_while_ranks_change(nesterov):
    layer, x, y = LowRankLinear(9, 8, 3, bias=False), torch.randn(20, 9), torch.randn(20, 8)
    options = {"lr": 0.3, "momentum": 0.9, "nesterov": nesterov}
    optimizer = DLRT(layer, torch.optim.SGD, tau=0.01, min_rank=1, allot_every=3, **options)
    M, ranks = torch.zeros(8, 9), set()
    for _ in range(12):
        same = layer.to_dense()
        same(x).sub(y).square().mean().backward()
        Y = LowRank(*(factor.detach().clone() for factor in (layer.U, layer.S, layer.V)))
        M = 0.9 * M + projected(same.weight.grad, Y)
        optimizer.zero_grad()
        layer(x).sub(y).square().mean().backward()
        optimizer.step()
        M = projected(M, layer.factors)
        MV, core, MU = (optimizer.state[p]["velocity"] for p in (layer.U, layer.S, layer.V))
        assert torch.allclose(dense(Tangent(layer.U, layer.V, MV, MU, core)).detach(), M, atol=1e-11)
        ranks.add(layer.rank)
    assert len(ranks) > 1


def test_a_penalty_on_s_alone_moves_s_and_does_not_disturb_the_rest():
    """core differs from Uᵀ MV then, and must count once."""
    Y = LowRank.from_dense(torch.randn(9, 7), rank=3)
    A, E = torch.randn(9, 7), torch.randn(3, 3)
    M = Tangent(Y.U, Y.V, A @ Y.V, A.mT @ Y.U, Y.U.mT @ A @ Y.V + E)
    assert torch.allclose(dense(M), projected(A, Y) + Y.U @ E @ Y.V.mT, atol=1e-13)


@pytest.mark.parametrize("update", ["sgd", "muon", "adam"])
@pytest.mark.parametrize(
    "options", [{}, {"s_steps": 3}, {"compression": 0.4, "ramp": 12}, {"integrator": "augmented"}]
)
def test_the_state_resumes_bit_for_bit(update, options):
    kind = torch.optim.Adam if update == "adam" else torch.optim.SGD
    inner = {"betas": (0.8, 0.99)} if update == "adam" else {"momentum": 0.9}
    torch.manual_seed(3)
    model, data = dlrt.to_low_rank(NETS["two layers"][0]()), [torch.randn(20, 12) for _ in range(16)]
    optimizer = DLRT(model, kind, lr=0.02, update=update, **inner, **options)

    def train(model, optimizer, data):
        for x in data:

            def closure(x=x):
                optimizer.zero_grad()
                loss = model(x).sub(x[:, :5].sin()).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)

    train(model, optimizer, data[:7])
    other = copy.deepcopy(model)
    again = DLRT(other, kind, lr=0.5, update=update, **inner, **options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, data[7:])
    train(other, again, data[7:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_schedulers_change_the_step_size_of_all_groups_alike():
    model = dlrt.to_low_rank(NETS["two layers"][0]())
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, update="muon", update_lr=0.02)
    assert optimizer.group["lr"] * optimizer.group["update_share"] == pytest.approx(0.02)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}


def test_a_budget_is_reached_and_never_exceeded():
    model = dlrt.to_low_rank(
        nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 25), nn.Tanh(), nn.Linear(25, 4))
    )
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, momentum=0.9, compression=0.6, ramp=30, allot_every=7)
    x, y = torch.randn(40, 30), torch.randn(40, 4)
    total = dlrt.compression(model).dense_parameters
    for step in range(1, 51):
        optimizer.zero_grad()
        model(x).sub(y).square().mean().backward()
        optimizer.step()
        have = dlrt.compression(model).evaluation_parameters
        allowed = 0.4 * total + 0.6 * total * max(0, 1 - step / 30) ** 3
        assert have <= allowed + 1, step
    assert have >= 0.4 * total - 55  # the most expensive direction
    assert all(layer.rank >= 2 for layer in model if isinstance(layer, LowRankLayer))


def test_an_average_of_models_is_that_of_their_dense_weights():
    models = [dlrt.to_low_rank(nn.Sequential(nn.Linear(9, 7), nn.BatchNorm1d(7)), rank=r) for r in (2, 3)]
    mean = dlrt.average(models)
    expected = (models[0][0].weight + models[1][0].weight) / 2
    assert torch.allclose(mean[0].weight, expected, atol=1e-14)
    assert type(mean[0]) is nn.Linear
    again = dlrt.to_low_rank(mean, tau=1e-12)
    assert torch.allclose(again[0].weight, expected, atol=1e-12)


def test_an_average_counts_a_weight_that_is_tied_once():
    models = [GPT((8,), classes=5, width=16, depth=1, heads=2) for _ in range(2)]
    mean = dlrt.average(
        [dlrt.to_low_rank(copy.deepcopy(model), skip=["head"]) for model in models], [0.25, 0.75]
    )
    expected = 0.25 * models[0].head.weight + 0.75 * models[1].head.weight
    torch.testing.assert_close(mean.words.weight, expected)
    assert mean.head.weight is mean.words.weight


def test_factors_that_are_no_bases_are_refused_by_name():
    model = dlrt.to_low_rank(NETS["two layers"][0](), rank=3)
    good = copy.deepcopy(model.state_dict())
    for spoil in (
        nn.init.normal_,
        lambda U: U.clamp_(-0.1, 0.1),
        lambda U: U.add_(torch.randn_like(U), alpha=0.1),
    ):
        model.load_state_dict(good)
        with torch.no_grad():
            spoil(model[2].U)
        with pytest.raises(ValueError, match=r"bases of 2 must be orthonormal.*to_low_rank"):
            DLRT(model, torch.optim.SGD, lr=0.1)
        with pytest.raises(RuntimeError, match=r"bases of 2 must be orthonormal"):
            copy.deepcopy(model).load_state_dict(model.state_dict())
