"""The velocity is a tangent vector that follows the bases, also to weights that are loaded."""

import copy

import pytest
import torch
from small_networks import NETS, OPTIONS, apart
from torch import nn

import dlrt
from dlrt import DLRT, LowRank, LowRankLinear
from dlrt.integrators import parallel_step
from dlrt.velocity import Tangent, carried

pytestmark = pytest.mark.usefixtures("float64")


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


def projected(M, Y):
    """The orthogonal projection of a matrix onto the tangent space at Y."""
    PU, PV = Y.U @ Y.U.mT, Y.V @ Y.V.mT
    return PU @ M + M @ PV - PU @ M @ PV


def dense(M):
    return M @ torch.eye(len(M.V))


def dense_velocity(layer, optimizer):
    MV, core, MU = (optimizer.state[p]["velocity"] for p in (layer.U, layer.S, layer.V))
    return dense(Tangent(layer.U, layer.V, MV, MU, core))


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
    assert torch.allclose(dense_velocity(layer, optimizer), projected(M, other), atol=1e-12)


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
    MV, core, MU = (optimizer.state[p]["velocity"].double() for p in (layer.U, layer.S, layer.V))
    found = dense(Tangent(other.U, other.V, MV, MU, core))
    assert torch.allclose(found, projected(M, other), atol=1e-5 * M.norm().item())


def test_factors_that_are_replaced_by_others_are_told():
    layer, optimizer = trained_layer(momentum=0.9)
    layer.load_state_dict(LowRankLinear(9, 7, 3).state_dict(), assign=True)
    layer(torch.ones(2, 9)).sum().backward()
    with pytest.raises(RuntimeError, match="must have the parameters of which the DLRT was made"):
        optimizer.step()


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
        assert torch.allclose(dense_velocity(layer, optimizer).detach(), M, atol=1e-11)
        ranks.add(layer.rank)
    assert len(ranks) > 1


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


def test_a_penalty_on_s_alone_moves_s_and_does_not_disturb_the_rest():
    """core differs from Uᵀ MV then, and must count once."""
    Y = LowRank.from_dense(torch.randn(9, 7), rank=3)
    A, E = torch.randn(9, 7), torch.randn(3, 3)
    M = Tangent(Y.U, Y.V, A @ Y.V, A.mT @ Y.U, Y.U.mT @ A @ Y.V + E)
    assert torch.allclose(dense(M), projected(A, Y) + Y.U @ E @ Y.V.mT, atol=1e-13)
