"""A trained weight is cut where the loss needs it least, and layers share a budget by what they are score."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dlrt
from dlrt.convertible import LOW_RANK_TYPES
from dlrt.curvature import kronecker_factors, terms
from dlrt.models import LeNet5
from dlrt.ranks import allocate_ranks, parameters

pytestmark = pytest.mark.usefixtures("float64")


def covariance(n):
    """Of very different size in different directions."""
    Q = torch.linalg.qr(torch.randn(n, n))[0]
    return (Q * torch.logspace(0, -3, n)) @ Q.mT


def change(D, A, G):
    """‖√G D √A‖, without a square root."""
    return torch.trace(G @ D @ A @ D.mT).sqrt()


def test_the_terms_are_the_best_of_every_rank_in_the_norm_of_the_curvature():
    W, A, G = torch.randn(7, 9), covariance(9), covariance(7)
    parts = terms(W, (A, G))
    LA, LG = torch.linalg.cholesky(A), torch.linalg.cholesky(G)  # other roots, the same singular values
    sigma = torch.linalg.svdvals(LG.mT @ W @ LA)
    assert torch.allclose(parts.sigma, sigma / sigma.norm(), rtol=1e-3)
    assert torch.allclose(parts.matrix(7, W.dtype).dense(), W, atol=1e-10)
    for rank in (1, 3, 6):
        Y = parts.matrix(rank, W.dtype)
        best = sigma[rank:].norm()
        # damping changes the norm a little
        assert torch.isclose(change(W - Y.dense(), A, G), best, rtol=1e-3)
        assert change(W - dlrt.LowRank.from_dense(W, rank).dense(), A, G) > best
        assert torch.allclose(Y.U.mT @ Y.U, torch.eye(rank), atol=1e-12)


def kinds(*layers):
    return {layer: LOW_RANK_TYPES[type(layer)] for layer in layers}


def test_without_factors_the_terms_are_the_singular_value_decomposition():
    W = torch.randn(6, 4)
    assert torch.allclose(terms(W).matrix(2, W.dtype).dense(), dlrt.LowRank.from_dense(W, 2).dense())
    sigma = torch.linalg.svdvals(W)
    assert torch.allclose(terms(W).sigma, sigma / sigma.norm())


def test_the_factors_of_a_linear_layer_are_the_fisher_information_where_they_separate():
    """All inputs alike, so A is one outer product, and G that of logits: diag(p) - p pᵀ."""
    layer = nn.Linear(5, 3)
    x = torch.randn(5).expand(20_000, 5)
    A, G = kronecker_factors(nn.Sequential(layer), kinds(layer), x)[layer]
    p = layer(x[0]).softmax(0).detach()
    assert torch.allclose(A, torch.outer(x[0], x[0]))
    assert torch.allclose(G, p.diag() - torch.outer(p, p), atol=0.02)


GEOMETRIES = {
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "oblong": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "one row high": {"kernel_size": (1, 3), "stride": 2},
    "same": {"kernel_size": (3, 4), "padding": "same", "padding_mode": "circular"},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_A_is_of_what_the_kernel_is_multiplied_by(geometry):
    conv = nn.Conv2d(2, 3, bias=False, **geometry)
    x = torch.randn(20, 2, 8, 8)
    y = conv(x).movedim(1, -1).flatten(end_dim=2)
    network = nn.Sequential(conv, nn.Flatten(), nn.Linear(len(y) * 3 // 20, 4))
    A, _ = kronecker_factors(network, kinds(conv), x)[conv]
    W = conv.weight.flatten(1)
    assert torch.allclose(W @ A @ W.mT, y.mT @ y / len(y))


def test_G_is_of_the_gradients_for_all_outputs_whatever_follows_in_place():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    head = nn.Linear(2 * 36, 4)
    network = nn.Sequential(conv, nn.ReLU(inplace=True), conv, nn.Flatten(), head)
    x = torch.randn(8, 2, 6, 6)
    first = conv(x)
    second = conv(F.relu(first))
    logits = head(second.flatten(1))
    classes = torch.multinomial(logits.softmax(1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    gradients = torch.autograd.grad(F.cross_entropy(logits, classes, reduction="sum"), [first, second])
    rows = torch.cat([gradient.movedim(1, -1).flatten(end_dim=2) for gradient in gradients])
    _, G = kronecker_factors(network, kinds(conv), x)[conv]
    assert torch.allclose(G, rows.mT @ rows / 8)


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_the_gradient_for_a_kernel_is_the_sum_of_the_products_whose_factors_are_taken(geometry, spatial):
    """G and A are second moments of the rows that ∇_W L = Σ gᵀ x has, for W the matrix of either layer."""
    conv = nn.Conv2d(2, 3, **geometry)
    x = torch.randn(4, 2, 8, 11)
    y = conv(x)
    g = torch.randn_like(y)
    y.backward(g)
    kind = dlrt.SpatialLowRankConv2d if spatial else dlrt.LowRankConv2d
    patches, gradients = kind.input_rows(conv, x), kind.output_rows(conv, g)
    assert len(patches) == len(gradients)
    assert torch.allclose(gradients.mT @ patches, kind.as_matrix(conv.weight.grad))
    assert torch.equal(kind.input_rows(conv, x[0]), kind.input_rows(conv, x[:1]))  # pictures may come singly
    assert torch.equal(kind.output_rows(conv, g[0]), kind.output_rows(conv, g[:1]))
    if conv.kernel_size[0] == 1:  # the same matrix either way
        assert torch.equal(patches, dlrt.LowRankConv2d.input_rows(conv, x))


def test_a_spatial_cut_by_the_loss_keeps_a_network_nearer_to_itself_than_one_by_the_weights():
    network = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    )
    x = torch.randn(500, 1, 7, 7) * torch.tensor([1.0, 0.05])[:, None, None]  # one channel says little
    x, unseen = x.split(400)
    expected = network(unseen).log_softmax(1)
    distances = []
    for inputs in (x, None):
        options = {"rank": 3, "inputs": inputs, "spatial": True, "skip": ["5"]}
        low_rank = dlrt.to_low_rank(copy.deepcopy(network), **options)
        distances.append(
            F.kl_div(low_rank(unseen).log_softmax(1), expected, log_target=True, reduction="batchmean")
        )
    assert distances[0] < 0.8 * distances[1]


def test_linear_layers_may_see_sequences_and_convolutions_single_pictures():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.sequence, self.vector = nn.Conv2d(1, 2, 3), nn.Linear(36, 5), nn.Linear(5, 3)
            self.embedding = nn.Embedding(7, 64)

        def forward(self, x):
            pictures = torch.stack([self.conv(picture) for picture in self.embedding(x).view(-1, 1, 8, 8)])
            y = self.sequence(pictures.flatten(2)).mean(1)
            return torch.stack([self.vector(row) for row in y])

    network, x = Odd(), torch.randint(7, (30,))
    layers = [network.conv, network.sequence, network.vector]
    shapes = [
        (tuple(A.shape), tuple(G.shape)) for A, G in kronecker_factors(network, kinds(*layers), x).values()
    ]
    assert sorted(shapes) == [((5, 5), (3, 3)), ((9, 9), (2, 2)), ((36, 36), (5, 5))]


def test_half_precision_does_not_overflow():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).half()
    x = torch.full((16, 3, 64, 64), 3.0, dtype=torch.half)
    factors = kronecker_factors(network, kinds(network[0], network[3]), x)
    assert all(matrix.isfinite().all() for pair in factors.values() for matrix in pair)


def test_a_cut_by_the_loss_keeps_a_network_nearer_to_itself_than_one_by_the_weights():
    network = nn.Sequential(
        nn.Linear(20, 16), nn.ReLU(inplace=True), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )
    x = torch.randn(500, 20) @ covariance(20)
    x, unseen = x.split(400)
    expected = network(unseen).log_softmax(1)
    distances = []
    for inputs in (x, None):
        low_rank = dlrt.to_low_rank(copy.deepcopy(network), rank=4, inputs=inputs)
        distances.append(
            F.kl_div(low_rank(unseen).log_softmax(1), expected, log_target=True, reduction="batchmean")
        )
    assert distances[0] < 0.5 * distances[1]


def test_at_full_rank_the_network_is_what_it_was_and_its_modes_gradients_and_norms_too():
    network = nn.Sequential(LeNet5(), nn.BatchNorm1d(10))
    x = torch.randn(20, 1, 28, 28)
    expected, mean = network.eval()(x), network[1].running_mean.clone()
    network.train()
    network[0].eval()
    modes = [
        module.training for module in network.modules() if not isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    dlrt.to_low_rank(network, inputs=x)
    kept = [module.training for module in network.modules() if not isinstance(module, dlrt.LowRankLayer)]
    assert kept == modes
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(network[1].running_mean, mean)
    assert torch.allclose(network.eval()(x), expected, atol=1e-8)


@pytest.mark.parametrize("tau", [0.05, 0.3])
def test_tau_bounds_the_change_in_the_norm_of_the_curvature(tau):
    layer, x = nn.Linear(12, 9), torch.randn(400, 12) @ covariance(12)
    A, G = kronecker_factors(nn.Sequential(layer), kinds(layer), x)[layer]
    W = layer.weight.detach()
    low_rank = dlrt.to_low_rank(nn.Sequential(layer), tau=tau, inputs=x)[0]
    assert 1e-4 < change(low_rank.weight - W, A, G) / change(W, A, G) <= tau
    assert low_rank.rank < 9


def test_a_layer_without_influence_is_cut_by_its_weights():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    idle = network[0]
    network.forward = lambda x: network[1](x + 0 * idle(x).detach())
    assert idle not in kronecker_factors(network, kinds(idle, network[1]), torch.randn(9, 4))
    low_rank = dlrt.to_low_rank(network, rank=2, inputs=torch.randn(9, 4))[0]
    assert torch.allclose(low_rank.weight, dlrt.LowRank.from_dense(idle.weight.detach(), 2).dense())


@pytest.mark.parametrize("skip", [["0"], []])
def test_layers_that_are_not_called_or_not_there_leave_the_others_as_they_are(skip):
    class Aside(nn.Sequential):
        def forward(self, x):
            return self[1](x)

    model, x = Aside(nn.Linear(6, 5), nn.Flatten()), torch.randn(20, 6)
    W = model[0].weight.detach().clone()
    made = dlrt.to_low_rank(model, rank=5, skip=skip, inputs=x)[0]
    assert torch.allclose(made.weight, W)


def test_ranks_within_a_budget_lose_least_and_use_it():
    shapes = [(4, 6), (5, 3), (2, 9)]
    parts = [terms(torch.randn(shape)) for shape in shapes]
    scores = [part.sigma.square().tolist() for part in parts]

    def loss(ranks):
        return sum(sum(score[rank:]) for score, rank in zip(scores, ranks, strict=True))

    def cost(ranks):
        return sum(parameters(rank, shape) for rank, shape in zip(ranks, shapes, strict=True))

    grid = torch.cartesian_prod(*(torch.arange(1, min(shape) + 1) for shape in shapes)).tolist()
    for budget in range(29, 60):
        ranks = allocate_ranks(budget, scores, shapes)
        assert cost(ranks) <= budget
        more = [[*ranks[:i], ranks[i] + 1, *ranks[i + 1 :]] for i in range(3) if ranks[i] < min(shapes[i])]
        assert all(cost(other) > budget for other in more)
        # the bound of a greedy knapsack: what it loses more than the best is score less than one term
        best = min(loss(other) for other in grid if cost(other) <= budget)
        assert loss(ranks) <= best + max(score[1] for score in scores)


def test_what_does_not_fit_leaves_room_for_smaller_terms():
    wide, narrow = [0.5, 0.3, 0.2], [0.98, 0.011, 0.009]
    assert allocate_ranks(40 + 6 + 2, [wide, narrow], [(20, 20), (3, 3)]) == [1, 1]
    assert allocate_ranks(40 + 12 + 39, [wide, narrow], [(20, 20), (6, 6)]) == [1, 3]


def test_a_layer_worth_its_whole_weight_stays_dense_and_computes_the_same():
    network = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 30))
    with torch.no_grad():
        network[0].weight.copy_(torch.linalg.qr(torch.randn(30, 30)).Q)
        network[2].weight.copy_(torch.randn(30, 1) @ torch.randn(1, 30))
    x = torch.randn(5, 30)
    expected, dense = network(x), network[0]
    dlrt.to_low_rank(network, compression=0.46)  # 900 and 60 of 1800 are 46.7 %
    assert network[0] is dense
    assert list(dlrt.compression(network).ranks.values()) == [1]
    assert torch.allclose(network(x), expected)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_network_is_compressed_by_at_least_what_was_asked(share):
    network = dlrt.to_low_rank(LeNet5(), skip="conv1", compression=share)
    cost = dlrt.compression(network)
    largest = max(sum(layer.shape) for layer in network.modules() if isinstance(layer, dlrt.LowRankLayer))
    step = 100 * largest / cost.dense_parameters
    assert 100 * share <= cost.evaluation_compression < 100 * share + step


def test_layers_without_influence_do_not_take_the_budget_of_others():
    network = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("first", "idle", "last")})
    network["idle"].weight.data *= 100
    network.forward = lambda x: network["last"](network["first"](x).relu())
    ranks = dlrt.compression(dlrt.to_low_rank(network, compression=0.6, inputs=torch.randn(100, 64))).ranks
    assert ranks["idle"] < 1.5 * ranks["first"]


def test_what_cannot_be_is_refused():
    for wrong, got in ((1.0, "1: 0.01 for 1 %"), (0.0, "0"), (60, "60: 0.6 for 60 %")):
        with pytest.raises(ValueError, match=rf"compression must be a fraction in \(0, 1\), got {got}$"):
            dlrt.to_low_rank(LeNet5(), compression=wrong)
    for options in ({"rank": 3}, {"tau": 0.1}):
        with pytest.raises(ValueError, match="compression must come without rank and tau"):
            dlrt.to_low_rank(LeNet5(), compression=0.5, **options)
    with pytest.raises(
        ValueError, match=r"compression must be at most 0\.99\d+ \(99\.\d+ %\) here, .* got 0.999"
    ):
        dlrt.to_low_rank(LeNet5(), compression=0.999)
    with pytest.raises(ValueError, match=r"compression must be at most 0\.0672 \(6\.72 %\) here"):
        dlrt.to_low_rank(LeNet5(), skip=["fc1", "conv1"], compression=0.5)
    for network, outputs in ((nn.Conv2d(1, 1, 3), r"\(5, 1, 26, 26\)"), (LeNet5(classes=1), r"\(5, 1\)")):
        network = nn.Sequential(network)
        with pytest.raises(ValueError, match=rf"needs logits \(N, classes\) of two .* got outputs {outputs}"):
            dlrt.to_low_rank(network, rank=1, inputs=torch.randn(5, 1, 28, 28))
        assert network.training
        assert not network[0]._forward_hooks
