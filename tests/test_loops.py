"""Whatever the loop, the step is that of the same loop on a dense net under the integrator."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import dlrt
from dlrt import DLRT, LowRankLayer

pytestmark = pytest.mark.usefixtures("float64")
TAU, LR, BETA = 2e-5, 0.2, 0.9


class DenseDLRT:
    """The slow reference: the parallel integrator with momentum, on dense weights and dense gradients."""

    def __init__(self, model, ranks, lr=LR, momentum=BETA, tau=TAU):
        self.model, self.lr, self.beta, self.tau = model, lr, momentum, tau
        self.layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        self.rank, self.M = dict(zip(self.layers, ranks, strict=True)), dict.fromkeys(self.layers, 0)
        rest = [p for m in self.layers if m.bias is not None for p in (m.bias,)]
        self.rest = torch.optim.SGD(rest, lr=lr, momentum=momentum)

    def bases(self, layer):
        P, _, Qh = torch.linalg.svd(layer.weight.detach().flatten(1))
        return P[:, : self.rank[layer]], Qh[: self.rank[layer]].mT

    def project(self, layer, F):
        U, V = self.bases(layer)
        return U @ U.mT @ F + F @ V @ V.mT - U @ U.mT @ F @ V @ V.mT

    def products(self):
        """What the factors' gradients are, for clipping; their norms do not depend on the bases."""
        for layer in self.layers:
            if layer.weight.grad is not None:
                (U, V), G = self.bases(layer), layer.weight.grad.flatten(1)
                yield from (G @ V, G.mT @ U, U.mT @ G @ V)
            if layer.bias is not None and layer.bias.grad is not None:
                yield layer.bias.grad

    def zero_grad(self):
        self.model.zero_grad()

    @torch.no_grad()
    def step(self):
        for layer in self.layers:
            if layer.weight.grad is None:
                continue
            W, G = layer.weight.flatten(1), layer.weight.grad.flatten(1)
            M = self.beta * self.M[layer] + self.project(layer, G)
            P, sigma, Qh = torch.linalg.svd(W - self.lr * M, full_matrices=False)
            tail = sigma.square().flip(0).cumsum(0).flip(0).sqrt()
            r = self.rank[layer] = max(1, int((tail > self.tau * tail[0]).sum()))
            layer.weight.copy_((P[:, :r] * sigma[:r] @ Qh[:r]).view_as(layer.weight))
            self.M[layer] = self.project(layer, M)
        self.rest.step()


def network():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 12), nn.Tanh(), nn.Linear(12, 4)
    )


def clip(optimizer, model, largest):
    products = getattr(optimizer, "products", None)
    if products is None:
        nn.utils.clip_grad_norm_(model.parameters(), largest)
        return
    norm = torch.stack([part.norm() for part in products()]).norm()
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(min(1.0, float(largest / (norm + 1e-6))))


def loss_of(model, batch, parts=1):
    return cross_entropy(model(batch[0]), batch[1]) / parts


def plain(model, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def thrown_away(forget):
    def loop(model, optimizer, batches):
        for one, other in zip(batches[::2], batches[1::2], strict=True):
            loss_of(model, one).backward()
            forget(model, optimizer)
            loss_of(model, other).backward()
            optimizer.step()
            optimizer.zero_grad()

    return loop


def each_grad(do):
    def forget(model, optimizer):
        for p in model.parameters():
            if p.grad is not None:
                do(p)

    return forget


def late_backward(model, optimizer, batches):
    for one, other in zip(batches[::2], batches[1::2], strict=True):
        first, second = loss_of(model, one), loss_of(model, other)
        first.backward()
        optimizer.zero_grad()
        second.backward()
        optimizer.step()
        optimizer.zero_grad()


def clipped_micro_batches(model, optimizer, batches):
    for one, other in zip(batches[::2], batches[1::2], strict=True):
        total = []
        for batch in (one, other):
            model.zero_grad()
            loss_of(model, batch, 2).backward()
            clip(optimizer, model, 0.1)
            total.append([p.grad for p in model.parameters()])
            for p in model.parameters():
                p.grad = None
        for p, *gradients in zip(model.parameters(), *total, strict=True):
            p.grad = sum(gradients) if gradients[0] is not None else None
        optimizer.step()
        optimizer.zero_grad()


def scaled_and_clipped(model, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        (1024 * loss_of(model, batch)).backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.div_(1024)
        clip(optimizer, model, 0.2)
        optimizer.step()


def infinite_batch(model, optimizer, batches):
    for batch in batches:
        (loss_of(model, batch) * float("inf")).backward()
        model.zero_grad(set_to_none=False)
        loss_of(model, batch).backward()
        optimizer.step()
        model.zero_grad(set_to_none=False)


def both_modes(model, optimizer, batches):
    for one, other in zip(batches[::2], batches[1::2], strict=True):
        optimizer.zero_grad()
        loss_of(model.train(), one, 2).backward()
        loss_of(model.eval(), other, 2).backward()
        optimizer.step()


def accumulated(model, optimizer, batches):
    for one, other in zip(batches[::2], batches[1::2], strict=True):
        optimizer.zero_grad()
        for batch in (one, other):
            loss_of(model, batch, 2).backward()
        optimizer.step()


LOOPS = {
    "plain": plain,
    "thrown away by zero_grad in place": thrown_away(lambda m, o: m.zero_grad(set_to_none=False)),
    "thrown away by the model's zero_grad": thrown_away(lambda m, o: m.zero_grad()),
    "thrown away by the optimizer's zero_grad": thrown_away(lambda m, o: o.zero_grad()),
    "thrown away by p.grad.zero_": thrown_away(each_grad(lambda p: p.grad.zero_())),
    "thrown away by p.grad = None": thrown_away(each_grad(lambda p: setattr(p, "grad", None))),
    "two forward passes, then backward": late_backward,
    "clipped micro-batches": clipped_micro_batches,
    "scaled and clipped": scaled_and_clipped,
    "infinite batch": infinite_batch,
    "train and eval mode": both_modes,
    "accumulated": accumulated,
}


def both(make, ranks, loop, batches):
    start = dlrt.to_low_rank(make(), rank=3)
    dense = dlrt.to_dense(copy.deepcopy(start))
    layers = [m for m in start.modules() if isinstance(m, LowRankLayer)]
    optimizer = DLRT(start, torch.optim.SGD, lr=LR, momentum=BETA, tau=TAU, min_rank=1, allot_every=1)
    loop(start, optimizer, batches)
    loop(dense, DenseDLRT(dense, [3] * len(layers)), batches)
    assert any(layer.rank != 3 for layer in layers), "ranks are to change"
    other = dlrt.to_dense(copy.deepcopy(start))
    for a, b in zip(other.parameters(), dense.parameters(), strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_is_that_of_a_dense_net_under_the_integrator(name):
    torch.manual_seed(4)
    batches = [(torch.randn(16, 1, 8, 8), torch.randint(0, 4, (16,))) for _ in range(8)]
    both(network, None, LOOPS[name], batches)


class Twice(nn.Module):
    """A layer used twice, one shared by two places, one that is used at times only."""

    def __init__(self):
        super().__init__()
        self.twice, self.sometimes, self.last = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 4)
        self.again = self.last
        self.turn = 0

    def forward(self, x):
        self.turn += 1
        x = self.twice(self.twice(x).tanh()).tanh()
        x = self.sometimes(x).tanh() if self.turn % 2 else x
        return self.last(x) + self.again(x.sin())


def test_layers_used_twice_shared_or_at_times_unused():
    torch.manual_seed(5)
    batches = [(torch.randn(16, 9), torch.randint(0, 4, (16,))) for _ in range(8)]
    both(Twice, None, plain, batches)


def test_two_nets_that_zero_one_anothers_gradients():
    """As the steps of a GAN do: the generator's step leaves gradients in the discriminator."""

    def loop(model, optimizers, noise, real):
        generator, critic = model
        for z, x in zip(noise, real, strict=True):
            optimizers[1].zero_grad()
            (critic(generator(z).detach()).mean() - critic(x).mean()).tanh().backward()
            optimizers[1].step()
            optimizers[0].zero_grad()
            (-critic(generator(z)).mean()).tanh().backward()
            optimizers[0].step()

    torch.manual_seed(6)
    start = nn.ModuleList([
        nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8)),
        nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 6)),
    ])  # fmt: skip
    dlrt.to_low_rank(start, rank=3)
    dense = dlrt.to_dense(copy.deepcopy(start))
    data = [torch.randn(5, 16, 7), torch.randn(5, 16, 8)]
    options = {"lr": LR, "momentum": BETA, "tau": TAU}
    loop(start, [DLRT(net, torch.optim.SGD, min_rank=1, allot_every=1, **options) for net in start], *data)
    loop(dense, [DenseDLRT(net, [3, 3], **options) for net in dense], *data)
    for a, b in zip(dlrt.to_dense(start).parameters(), dense.parameters(), strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


def test_a_loss_scale_unscales_and_skips_as_with_any_optimizer():
    """What is scaled, and overflows, is in .grad, where a GradScaler looks."""
    model = dlrt.to_low_rank(network(), rank=3)
    before = copy.deepcopy(model.state_dict())
    optimizer = DLRT(model, torch.optim.SGD, lr=LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e30)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 4, (16,))
    for size, moves in ((1e290, False), (1.0, True)):  # the first overflows
        optimizer.zero_grad()
        scaler.scale(size * loss_of(model, (x, y))).backward()
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(value, before[name]) for name, value in model.state_dict().items()]
        assert not any(same) if moves else all(same)
