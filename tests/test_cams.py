"""Maps of dense and low-rank networks: what they equal, and where they point."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from pytorch_grad_cam.base_cam import BaseCAM
from pytorch_grad_cam.metrics.road import NoisyLinearImputer
from torch import nn
from torch.nn.functional import conv_transpose2d, cross_entropy

import dlrt
from dlrt.cams import (
    CLASSLESS,
    METHODS,
    explain,
)
from dlrt.cams.compare import in_boxes, similarity, top
from dlrt.cams.faithfulness import faithfulness
from dlrt.cams.figure import Cell, Row, figure
from dlrt.cams.guided import guided_gradients
from dlrt.cams.imputation import fill
from dlrt.cams.methods import NOT_SMOOTHED
from dlrt.cams.targets import of_classes
from dlrt.checkpoint import load_network
from dlrt.cluttered_digits import EASY, HARD, clutter
from dlrt.models import ConvNet, LeNet5
from dlrt.plots import plt


@pytest.fixture(scope="module")
def trained():
    """A small network trained on digits in clutter, and 200 test pictures with labels and boxes."""
    torch.manual_seed(0)
    made, test = clutter(2500, seed=0), clutter(200, seed=0, test=True)
    x, x_test = (torch.from_numpy(part.images)[:, None] / 255 for part in (made, test))
    y = torch.from_numpy(made.labels)
    model = ConvNet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    for _ in range(6):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch], label_smoothing=0.1).backward()
            optimizer.step()
        scheduler.step()
    return model.eval(), x_test, test


@pytest.mark.parametrize("method", METHODS)
def test_maps_depend_on_the_class_but_those_of_classless_methods(method, resnet):
    model, x = resnet
    raw = [explain(model, x[:1], of_classes([[number]]), method).raw for number in (1, 2)]
    assert np.array_equal(*raw) == (method in CLASSLESS)


@pytest.mark.parametrize("method", METHODS)
def test_low_rank_at_full_rank_has_the_maps_of_the_dense_network(method, resnet):
    model, x = resnet
    if method == "fullgrad":  # in float32 a gradient jumps where a ReLU's input is 0 but for rounding
        model, x = deepcopy(model).double(), x.double()
    low_rank = dlrt.to_low_rank(deepcopy(model))
    one, other = (explain(net, x, method=method) for net in (model, low_rank))
    assert one.defined.any()
    np.testing.assert_allclose(one.displayed, other.displayed, atol=2e-5)
    scale = np.abs(one.raw).max()
    np.testing.assert_allclose(one.raw / scale, other.raw / scale, atol=2e-5)
    assert set(one.milliseconds) == {"forward", "backward", "assembly"}
    assert one.milliseconds["forward"] > 0


def test_fullgrad_counts_the_biases_of_low_rank_layers():
    model, x = LeNet5().double().eval(), torch.randn(2, 1, 28, 28, dtype=torch.float64)
    dense = explain(model, x, method="fullgrad")
    low_rank = explain(dlrt.to_low_rank(deepcopy(model)), x, method="fullgrad")
    np.testing.assert_allclose(dense.displayed, low_rank.displayed, atol=1e-6)


def test_with_global_pooling_and_a_linear_head_grad_cam_is_hires_cam(trained):
    model, x, _ = trained
    for net in (model, dlrt.to_low_rank(deepcopy(model), rank=0.5)):
        grad_cam, hires_cam = (explain(net, x[:20], method=method) for method in ("gradcam", "hirescam"))
        np.testing.assert_allclose(grad_cam.displayed, hires_cam.displayed, atol=1e-5)


def test_the_raw_map_sums_to_the_logit_without_its_bias(trained):
    model, x, _ = trained
    for net in (model, dlrt.to_low_rank(deepcopy(model), rank=0.5)):
        maps = explain(net, x[:20], of_classes([[3]] * 20))
        expected = maps.logits[:, 3] - net.linear.bias[3]
        np.testing.assert_allclose(maps.raw.sum((1, 2)), expected.detach(), atol=1e-4)


def test_maps_of_a_trained_network_point_at_the_digit(trained):
    model, x, test = trained
    low_rank = dlrt.to_low_rank(deepcopy(model), tau=0.1)
    for net in (model, low_rank):
        with torch.no_grad():
            assert (net(x).argmax(1).numpy() == test.labels).mean() >= 0.95
        shown = explain(net, x, of_classes([[label] for label in test.labels])).displayed
        found = [in_boxes(cam, [box], (32, 32)) for cam, box in zip(shown, test.boxes, strict=True)]
        assert np.nanmean([scores["pointing"] for scores in found]) >= 0.9
        area = np.prod(test.boxes[:, 2:] - test.boxes[:, :2], axis=1).mean() / 32**2
        assert np.nanmean([scores["energy"] for scores in found]) > 2.5 * area


def test_a_network_needs_what_its_map_shows_more_than_random_places(trained):
    model, x, _ = trained
    x = x[:16]
    predicted = model(x).argmax(1).tolist()
    true, random = (explain(model, x, method=method).displayed for method in ("gradcam", "randomcam"))
    true, random = (faithfulness(model, x, shown, predicted) for shown in (true, random))
    assert np.nanmean(true["deletion"]) < np.nanmean(random["deletion"]) - 0.05
    assert np.nanmean(true["insertion"]) > np.nanmean(random["insertion"]) + 0.05
    assert np.nanmean(true["road"]) > np.nanmean(random["road"]) + 0.05


@pytest.mark.parametrize("shape", [(3, 9, 14), (1, 32, 20)])
def test_missing_pixels_are_filled_in_as_by_the_authors_of_road(shape):
    rng = np.random.default_rng(0)
    image, known = rng.normal(size=shape).astype(np.float32), rng.random(shape[1:]) < 0.3
    reference = NoisyLinearImputer(noise=0.0)(torch.from_numpy(image), torch.from_numpy(np.float32(known)))
    filled = fill(image, known)
    np.testing.assert_allclose(filled, reference.numpy(), atol=1e-6)
    np.testing.assert_array_equal(filled[:, known], image[:, known])
    np.testing.assert_array_equal(fill(image, np.ones_like(known)), image)


def test_road_takes_equal_shares_of_a_map_that_is_zero_almost_everywhere():
    model, x = ConvNet((1, 16, 16)).eval(), torch.randn(2, 1, 16, 16)
    sparse = np.zeros((2, 256), dtype=np.float32)
    sparse[:, 100:150] = np.random.default_rng(0).uniform(0.1, 1, size=(2, 50))
    without_ties = sparse + np.linspace(1e-3, 0, 256, dtype=np.float32) * (sparse == 0)
    one, other = (
        faithfulness(model, x, shown.reshape(2, 16, 16), [0, 1]) for shown in (sparse, without_ties)
    )
    for name in ("road", "deletion", "insertion"):
        np.testing.assert_array_equal(one[name], other[name])


def test_a_saved_and_reloaded_low_rank_network_has_the_same_maps_bit_for_bit(resnet, tmp_path):
    model, x = resnet
    low_rank = dlrt.to_low_rank(deepcopy(model), rank=0.5)
    about = {"network": "ResNet20", "settings": {}, "shape": [3, 32, 32], "classes": 10}
    about |= {"dataset": "cifar10", "mean": [0.5] * 3, "std": [0.5] * 3}
    state = {"model": {}, "metrics": [], "chosen": low_rank.state_dict(), "about": about}
    torch.save(state, tmp_path / "checkpoint.pt")
    loaded, _ = load_network(tmp_path)
    one, other = explain(low_rank, x), explain(loaded, x)
    assert torch.equal(one.logits, other.logits)
    np.testing.assert_array_equal(one.raw, other.raw)
    np.testing.assert_array_equal(one.displayed, other.displayed)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", [nn.ReLU, nn.ReLU6])
def test_nothing_negative_passes_a_rectifier_in_guided_backpropagation(kind, in_place):
    layers = [nn.Conv2d(2, 4, 3), kind(in_place), nn.Conv2d(4, 4, 3), kind(in_place), nn.Flatten()]
    model, x = nn.Sequential(*layers, nn.Linear(64, 3)).eval(), 0.1 * torch.randn(2, 2, 8, 8)
    guided = guided_gradients(model, x, of_classes([1, 2]))
    conv1, conv2, linear = model[0], model[2], model[5]
    for image, label, found in zip(x, (1, 2), guided, strict=True):
        one = conv1(image)
        two = conv2(one.relu())
        g = (linear.weight[label].view_as(two).clamp(min=0) * (two > 0))[None]
        g = (conv_transpose2d(g, conv2.weight).clamp(min=0) * (one > 0))[0]
        expected = conv_transpose2d(g[None], conv1.weight)[0].permute(1, 2, 0)
        np.testing.assert_allclose(found, expected.detach(), atol=1e-6)


def test_a_map_without_anything_positive_is_undefined():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    )
    with torch.no_grad():
        model[0].weight.abs_()  # so that both channels are active
        model[4].weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
    maps = explain(model.eval(), torch.rand(2, 1, 8, 8) + 1, of_classes([[0], [1]]))
    assert maps.defined.tolist() == [True, False]
    assert np.isnan(maps.displayed[1]).all()
    assert np.isnan(in_boxes(maps.displayed[1], [(0, 0, 4, 4)], (8, 8))["pointing"])


def test_principal_components_point_to_where_the_network_is_active(resnet):
    model, x = resnet
    activations = []
    handle = model.layer3.register_forward_hook(lambda module, x, y: activations.append(y.detach().numpy()))
    with torch.no_grad():
        model(x)
    handle.remove()
    active, with_gradients = activations[0].sum(1), explain(model, x, method="hirescam").raw
    for method, total in (("eigencam", active), ("kpca_cam", active), ("eigengradcam", with_gradients)):
        assert (along(total, explain(model, x, method=method).raw) > 0).all()


def along(total, component):
    """How much each of several maps varies as another one does."""
    return (component * (total - total.mean((1, 2), keepdims=True))).sum((1, 2))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in NOT_SMOOTHED])
def test_the_component_of_a_method_points_to_where_its_plain_map_does(method):
    head = nn.Linear(8 * 36, 16), nn.ReLU(), nn.Linear(16, 3)
    model, x = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), *head).eval(), torch.randn(4, 1, 8, 8)
    smooth, plain = (explain(model, x, method=method, eigen_smooth=smoothing) for smoothing in (True, False))
    assert smooth.defined.any()
    if issubclass(METHODS[method], BaseCAM):  # SESS puts maps together that are positive already
        assert (along(plain.raw, smooth.raw) > 0).all()


def test_smoothing_by_augmentation_leaves_a_mirrored_picture_a_mirrored_map(resnet):
    model, x = resnet
    targets = of_classes([[1], [2]])
    one, other = (explain(model, batch, targets, aug_smooth=True) for batch in (x, x.flip(3)))
    np.testing.assert_allclose(one.raw, other.raw[..., ::-1], atol=1e-4)
    np.testing.assert_allclose(one.displayed, other.displayed[..., ::-1], atol=1e-3)


def test_a_map_is_as_similar_to_itself_as_can_be():
    values = np.random.default_rng(0).normal(size=(8, 8))
    assert similarity(values, 3 * values) == pytest.approx(
        dict.fromkeys(("pearson", "spearman", "ssim", "iou"), 1)
    )
    assert similarity(values, -values)["pearson"] == pytest.approx(-1)
    assert similarity(values, -values)["iou"] == 0
    assert np.isnan(similarity(values, np.zeros((8, 8)))["pearson"])
    flat = np.zeros((8, 8))
    flat[2, 3] = 1
    assert top(flat).sum() == 1  # and not any of the zeros


def test_boxes_are_counted_in_the_pixels_of_the_picture():
    shown = np.zeros((4, 4), dtype=np.float32)
    shown[1, 2] = 1
    for box, pointing, energy in (
        ((20, 10, 30, 20), 1, 1),
        ((20, 10, 25, 20), 0, 0.5),
        ((0, 0, 20, 40), 0, 0),
    ):
        assert in_boxes(shown, [box], (40, 40)) == {"pointing": pointing, "energy": pytest.approx(energy)}
    assert np.isnan(in_boxes(shown, [], (40, 40))["energy"])


@pytest.mark.parametrize("layout", [EASY, HARD])
def test_boxes_of_digits_in_clutter_are_exact(layout):
    made = clutter(50, seed=3, layout=layout)
    assert made.images.shape == (50, layout.side, layout.side)
    np.testing.assert_array_equal(made.images, clutter(50, seed=3, layout=layout).images)
    for image, (left, top_, right, bottom) in zip(made.images, made.boxes, strict=True):
        inside = image[top_:bottom, left:right] > 64 * layout.faintest
        for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert edge.any()
    assert set(made.labels) <= set(range(10))


@pytest.mark.parametrize("size", [(90, 37), (30, 90), (64, 64)])
@pytest.mark.parametrize("rows", [1, 5])
def test_nothing_in_the_figure_of_maps_is_cut_off_or_overlaps(rows, size):
    """With the longest names that ImageNet has, and values of the most characters."""
    names = ["American Staffordshire terrier", "black-and-tan coonhound", "Shih-Tzu", "a" * 50]
    shown = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    cells = [Cell(shown * value, names[i], i > 1, 0.123, -0.123) for i, value in enumerate((1, 1, np.nan, 1))]
    row = Row(np.ones((*size, 3), np.float32), "a_photograph_of_a_long_name.jpg", names[0], cells)
    made = figure([row] * rows, ["dense", *["low-rank, τ = 0.123\ncompression 25 %"] * 3])
    made.canvas.draw()
    texts = [text for text in made.findobj(Text) if text.get_text().strip() and text.get_visible()]
    boxes = [text.get_window_extent() for text in texts] + [ax.get_tightbbox() for ax in made.axes[:-1]]
    for box in boxes:
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= made.bbox.x1 + 1
        assert box.y1 <= made.bbox.y1 + 1
    extents = [text.get_window_extent() for text in texts]
    for number, one in enumerate(extents):
        for other in extents[number + 1 :]:
            assert not one.padded(-1).overlaps(other.padded(-1))
    plt.close(made)
