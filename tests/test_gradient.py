"""The recorded operator G is the dense gradient, for every geometry, and records no more than it should."""

import pytest
import torch
import torch.utils.checkpoint
from test_layers import low_rank, low_rank_pairs
from torch import nn

import dlrt
from dlrt import LowRankConv2d, LowRankLinear
from dlrt.gradient import Gradient

pytestmark = pytest.mark.usefixtures("float64")


def close(A, B):
    return (A - B).norm() <= 1e-10 * B.norm()


def check_operator(G, layer, dense_gradient, name):
    for V in (layer.V, torch.randn(layer.V.shape[0], 3)):
        assert close(G @ V, dense_gradient @ V), name
    for U in (layer.U, torch.randn(layer.U.shape[0], 3)):
        assert close(G.T @ U, dense_gradient.mT @ U), name


@pytest.mark.parametrize("rank", [1, None])
def test_products_with_the_operator_are_those_with_the_dense_gradient(rank):
    formed = set()
    for name, _, layer, x in low_rank_pairs(rank):
        dense = layer.to_dense()
        G = Gradient(layer, keep_samples=True)
        x1, x2 = (x.clone().requires_grad_() for _ in range(2))
        layer(x1).sin().sum().backward()
        dense(x2).sin().sum().backward()
        W_grad = layer.as_matrix(dense.weight.grad)
        check_operator(G, layer, W_grad, name)
        assert close(x1.grad, x2.grad), name
        assert close(layer.S.grad, layer.U.mT @ W_grad @ layer.V), name
        assert layer.bias is None or close(layer.bias.grad, dense.bias.grad), name
        formed.add(G.dense is not None)  # some convolutions form G itself
    assert formed == {False, True} or rank == 1


def test_several_backward_passes_before_a_step_add_up():
    for dense, xs in (
        (nn.Linear(7, 5), (torch.randn(4, 7), torch.randn(2, 3, 7))),
        (nn.Conv2d(3, 5, 3), (torch.randn(2, 3, 9, 8), torch.randn(1, 3, 4, 4))),
    ):
        layer = low_rank(dense, 2)
        dense = layer.to_dense()
        G = Gradient(layer, keep_samples=True)
        for x in xs:
            layer(x).sin().sum().backward()
            dense(x).sin().sum().backward()
        check_operator(G, layer, dense.weight.grad.flatten(1), "accumulated")


def test_a_layer_used_twice_in_one_pass_records_both_uses():
    dense = nn.Linear(5, 5)
    layer = low_rank(dense, 2)
    dense = layer.to_dense()
    G = Gradient(layer, keep_samples=True)
    x = torch.randn(3, 5)
    layer(layer(x).tanh()).sin().sum().backward()
    dense(dense(x).tanh()).sin().sum().backward()
    check_operator(G, layer, dense.weight.grad, "twice")


def test_the_columns_of_a_small_batch_span_what_the_operator_reaches():
    layer = LowRankLinear(9, 8, 6)
    G = Gradient(layer, keep_samples=True)
    layer(torch.randn(3, 9)).sin().sum().backward()
    for operator, X in ((G, layer.V), (G.T, layer.U)):
        Q = torch.linalg.qr(operator.columns).Q
        assert Q.shape[1] == 3
        assert close(Q @ (Q.mT @ (operator @ X)), operator @ X)
    layer(torch.randn(3, 9)).sin().sum().backward()
    assert G.columns is None  # two batches


@pytest.mark.parametrize("by_model", [False, True])
def test_resetting_the_gradients_resets_the_records(by_model):
    model = nn.Sequential(LowRankLinear(6, 4, 2), nn.Tanh(), nn.Linear(4, 1))
    optimizer = dlrt.DLRT(model, torch.optim.SGD, lr=0.1)
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    model(x).sum().backward()
    (model if by_model else optimizer).zero_grad()
    model(y).sum().backward()
    layer, G = model[0], model[0].gradient
    assert len(G.samples) == 1
    assert torch.equal(G.samples[0][0], y)
    assert close(layer.S.grad, layer.U.mT @ (G @ layer.V))


def test_eval_mode_and_no_grad_leave_no_records():
    model = nn.Sequential(LowRankConv2d(1, 4, 3, rank=2), nn.Flatten(), LowRankLinear(4 * 36, 3, 2))
    dlrt.DLRT(model, torch.optim.SGD, lr=0.1)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        model(x)
    model.eval()(x).sum().backward()
    assert all(layer.gradient.empty and not layer.gradient.samples for layer in (model[0], model[2]))


def test_only_the_augmented_integrator_keeps_samples():
    for integrator, kept in (("augmented", 1), ("parallel", 0), ("bug", 0)):
        model = nn.Sequential(LowRankLinear(6, 4, 2))
        dlrt.DLRT(model, torch.optim.SGD, lr=0.1, integrator=integrator)
        model(torch.randn(5, 6)).sum().backward()
        assert len(model[0].gradient.samples) == kept
        assert not model[0].gradient.empty


def test_recorded_and_plain_passes_agree_and_in_place_activations_are_fine():
    for name, _, layer, x in low_rank_pairs(3):
        plain = torch.relu_(layer(x))
        Gradient(layer, keep_samples=True)
        recorded = torch.relu_(layer(x))
        assert torch.equal(plain, recorded), name
        recorded.sum().backward()


def test_scale_is_what_happened_to_the_gradient_after_the_backward_pass():
    layer = LowRankLinear(6, 4, 2)
    G = Gradient(layer, keep_samples=True)
    (layer(torch.randn(5, 6)).sum() + layer.S.square().sum()).backward()  # a penalty is no change of scale
    assert G.scale == 1
    layer.S.grad.mul_(0.25)
    assert torch.isclose(G.scale, torch.tensor(0.25))
    layer.S.grad = None
    layer(torch.zeros(5, 6)).sum().backward()
    assert G.scale == 1


def test_a_tiny_gradient_has_a_scale_too():
    layer = LowRankLinear(6, 4, 2).float()
    G = Gradient(layer, keep_samples=True)
    (1e-25 * layer(torch.randn(5, 6).float()).sum()).backward()
    assert torch.isclose(G.scale, torch.tensor(1.0, dtype=torch.float32))


def test_gradients_for_inputs_alone_add_nothing():
    """An adversarial example or a saliency map between backward and step."""
    layer = LowRankLinear(6, 4, 2)
    G = Gradient(layer, keep_samples=True)
    layer(torch.randn(5, 6)).sin().sum().backward()
    before = G @ layer.V
    z = torch.randn(3, 6, requires_grad=True)
    torch.autograd.grad(layer(z).sin().sum(), z)
    assert torch.equal(G @ layer.V, before)
    assert len(G.samples) == 1


def test_activation_checkpointing_changes_nothing():
    x = torch.randn(3, 5)
    products = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        layer = LowRankLinear(5, 5, 2)
        G = Gradient(layer, keep_samples=True)

        def twice(x, layer=layer):
            return layer(layer(x).tanh()).sin().sum()

        loss = torch.utils.checkpoint.checkpoint(twice, x, use_reentrant=False) if checkpointed else twice(x)
        loss.backward()
        products.append(G @ layer.V)
    assert close(*products)


def test_products_that_were_not_kept_are_refused():
    layer = LowRankLinear(6, 4, 2)
    G = Gradient(layer, keep_samples=False)
    layer(torch.randn(5, 6)).sum().backward()
    with pytest.raises(RuntimeError, match="keep_samples=True"):
        G @ torch.randn(6, 2)
    with pytest.raises(RuntimeError, match="keep_samples=True"):
        G.T @ torch.randn(4, 2)
