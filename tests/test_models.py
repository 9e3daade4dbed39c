"""The networks have the parameters that they are known for, and low-rank copies compute the same."""

import pytest
import torch

import dlrt
from dlrt.cams.pictures import read
from dlrt.models import MLP, VGG16, AlexNet, EfficientNetLite0, LeNet5, ResNet8, ResNet20
from dlrt.models.efficientnet import MEAN, STD, imagenet_weights, padded
from dlrt.options import DATA_DIR, ROOT

TRAINED = DATA_DIR / "resnet20-12fca82f.pt"
PARAMETERS = {
    MLP: 1_149_010,
    LeNet5: 431_080,
    ResNet8: 75_290,
    ResNet20: 269_722,
    VGG16: 14_724_042,
    AlexNet: 23_272_266,
    EfficientNetLite0: 4_652_008,
}


@pytest.mark.parametrize("network", PARAMETERS)
def test_a_network_has_as_many_parameters_as_it_is_known_for(network):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in network().parameters()) == PARAMETERS[network]


@pytest.mark.parametrize("network", [VGG16, AlexNet, LeNet5])
def test_a_picture_too_small_is_refused_with_the_size_that_is_needed(network):
    with pytest.raises(ValueError, match=r"needs pictures of at least .* got 8 x 9"):
        network((3, 8, 9), 10)


@pytest.mark.parametrize("trained", [False, True])
def test_resnet20_computes_the_same_at_full_rank_and_dense_again(trained):
    """Also with weights that somebody else trained, where they are at hand."""
    model, x = ResNet20().eval(), torch.randn(4, 3, 32, 32)
    if trained and not TRAINED.exists():
        pytest.skip(f"{TRAINED} is not there")
    if trained:
        model.load_state_dict(torch.load(TRAINED, weights_only=True))
    with torch.no_grad():
        logits = model(x)
        dlrt.to_low_rank(model, skip=["conv1", "linear"])
        assert len(dlrt.compression(model).ranks) == 18
        assert (model(x) - logits).abs().max() <= 1e-4
        assert (dlrt.to_dense(model)(x) - logits).abs().max() <= 1e-4


@pytest.mark.parametrize(("network", "convolutions"), [(ResNet8, 7), (ResNet20, 19)])
def test_with_twice_the_channels_a_resnet_has_four_times_the_inner_weights(network, convolutions):
    with torch.device("meta"):
        narrow, wide = ([p.numel() for p in network(width=w).parameters() if p.dim() == 4] for w in (0.5, 1))
    assert len(narrow) == len(wide) == convolutions
    assert wide == [2 * narrow[0], *(4 * count for count in narrow[1:])]
    assert network((1, 8, 8), 7, width=0.25)(torch.randn(2, 1, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize("network", [ResNet8, ResNet20])
def test_resnets_take_parameter_free_shortcuts(network):
    model = network().eval()
    block = model.layer2[0]
    for name in ("conv1", "conv2"):
        torch.nn.init.zeros_(getattr(block, name).weight)
    for norm in (block.bn1, block.bn2):
        norm.reset_parameters()
        norm.reset_running_stats()
    x = torch.rand(2, 16, 8, 8)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert y[:, :8].abs().max() == y[:, 24:].abs().max() == 0


@pytest.mark.parametrize(("rank", "least"), [(None, 0.1), (0.25, 0.005)])
def test_alexnet_tells_pictures_apart_before_training(rank, least):
    """It has no norms: where its logits do not vary it begins on a plateau that it never leaves."""
    model = AlexNet() if rank is None else dlrt.to_low_rank(AlexNet(), rank=rank, skip=["fc2"])
    with torch.no_grad():
        assert model(torch.randn(64, 3, 32, 32)).std(0).mean() > least


@pytest.mark.parametrize("size", [7, 8, 9])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_efficientnet_pads_for_outputs_of_ceil_size_over_stride(kernel, stride, size):
    conv, x = torch.nn.Conv2d(1, 1, kernel, stride), torch.rand(1, 1, size, size) + 1
    y = padded(x, conv)
    assert conv(y).shape[2:] == (-(-size // stride),) * 2
    added = y.shape[2] - size
    first, last = added // 2, added // 2 + size  # an odd pixel comes after
    assert torch.equal(y[:, :, first:last, first:last], x)
    assert y.count_nonzero() == size**2


def test_efficientnet_with_the_installed_weights_knows_a_cat_and_an_espresso():
    """Of classes 285 and 967; grouped convolutions stay dense at full rank, and nothing else."""
    model = EfficientNetLite0().eval()
    model.load_state_dict(imagenet_weights())
    pictures = [read(ROOT / "test_images" / name) for name in ("chelsea.png", "coffee.png")]
    x = torch.stack([picture.tensor((3, 224, 224), MEAN, STD) for picture in pictures])
    with torch.no_grad():
        logits = model(x)
        p = logits.softmax(1)
        assert p[0, 285] == pytest.approx(0.77, abs=0.01)
        assert p[1, 967] == pytest.approx(0.90, abs=0.01)
        with pytest.warns(UserWarning, match="it is a grouped convolution"):
            dlrt.to_low_rank(model)
        assert len(dlrt.compression(model).ranks) == 34
        assert (model(x) - logits).abs().max() <= 1e-3
