"""Maps of what a network looked at, dense or low-rank; the network is afterwards what it was before."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from pytorch_grad_cam.base_cam import BaseCAM
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import dlrt
from dlrt.cams.methods import METHODS, NOT_SMOOTHED, PROGRESS_BARS, Record, inner, make
from dlrt.cams.spatial import FeatureMaps, default_layer, feature_maps
from dlrt.cams.targets import SumOfTargets, Target, finer, per_picture
from dlrt.layers import LowRankLayer

FLAT = 1e-6  # a map that varies by less than this share of its largest value is flat to float32


@dataclass(frozen=True)
class Maps:
    """What `explain` gives for N pictures of H x W pixels.

    raw (N, h, w): the map as the method defines it, before negative values are cut off and before scaling, of
    the target layer's size where the method has one; SESS, which puts scaled maps together, has no other.
    displayed (N, H, W): scaled to [0, 1], NaN where it is undefined: where nothing positive varies.
    logits (N, classes). milliseconds: per picture, of the stages forward, backward and assembly, or nothing.
    """

    raw: np.ndarray
    displayed: np.ndarray
    logits: Tensor
    milliseconds: dict[str, float]

    @property
    def defined(self) -> np.ndarray:
        return np.isfinite(self.displayed).all((1, 2))

    @property
    def probabilities(self) -> Tensor:
        return self.logits.softmax(1)


def explain(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[Sequence[Target]] | None = None,
    method: str = "gradcam",
    layer: str | None = None,
    aug_smooth: bool = False,
    eigen_smooth: bool = False,
    seed: int = 0,
) -> Maps:
    """Explain a network's logits on normalised images (N, C, H, W).

    targets is a list of lists of ClassifierOutputTarget: of each image one target, or several, which are
    summed. Where labels are known, take of_classes(labels): maps of what is there can be compared between
    networks, those of what each takes it for cannot. None explains the predicted classes. method is a key of
    `METHODS`, layer the name of a module (by default the output of the last convolutional block), seed that
    of RandomCAM. The gradient stops at the layer wherever the method lets it. ValueError for targets, a
    method or a layer that cannot be used.
    """
    check_options(method, aug_smooth, eigen_smooth)
    smoothing = {"eigen_smooth": eigen_smooth} | ({"aug_smooth": True} if aug_smooth else {})
    parameter = next(model.parameters())
    if parameter.dtype.itemsize < 4:  # numpy, with which maps are made, has no bfloat16
        model, parameter = deepcopy(model).float(), parameter.float()
    images = images.to(parameter.device, parameter.dtype)
    with torch.inference_mode(False), torch.autocast(images.device.type, enabled=False):
        return _explain(model, images.clone(), targets, method, layer, smoothing, seed)


def _explain(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[Sequence[Target]] | None,
    method: str,
    layer: str | None,
    smoothing: dict[str, bool],
    seed: int,
) -> Maps:
    """`explain` in full precision, whatever stands around it, of images whose graph can be recorded."""
    if method == "fullgrad" and any(isinstance(module, LowRankLayer) for module in model.modules()):
        model = dlrt.export(model)  # it looks for the biases of torch's own layers
    # ShapleyCAM differentiates gradients, of which a frozen network has no graph, nor fused attention
    twice = method == "shapleycam"
    attention = sdpa_kernel(SDPBackend.MATH) if twice else contextlib.nullcontext()
    with _undisturbed(model, trainable=twice), torch.enable_grad(), attention:
        # FullGrad finds its layers itself
        target = (
            FeatureMaps(model, ()) if method == "fullgrad" else target_maps(model, layer, images[:1], method)
        )
        with torch.no_grad():
            logits = model(images)
        lists = per_picture(targets, logits)
        if method == "finercam":
            lists = finer(lists, logits)
        summed, record = [SumOfTargets(group) for group in lists], Record(images.device)
        with _hooked(model, target, method, record) as explainer, _random_numbers(seed):
            displayed, raw = _maps(explainer, images, summed, method, record, smoothing)
    displayed = np.where(_defined(raw)[:, None, None], displayed, np.nan).astype(np.float32)
    return Maps(
        raw=raw,
        displayed=displayed,
        logits=logits,
        milliseconds={stage: 1e3 * seconds / len(images) for stage, seconds in record.seconds.items()},
    )


def target_maps(model: nn.Module, layer: str | None, image: Tensor, method: str) -> FeatureMaps:
    """The maps of the module of that name, or of the default one.

    ValueError where there is none, where it does not give feature maps, or not once, or not as the method
    needs them.
    """
    name, modules = layer or default_layer(model, image), dict(model.named_modules())
    if name not in modules:
        raise ValueError(
            f"{type(model).__name__} has no layer {name!r}; the last are {', '.join([*modules][1:][-12:])}"
        )
    maps = feature_maps(model, image).get(name)
    if maps is None:
        raise ValueError(
            f"the layer must be called once and give feature maps, got {type(modules[name]).__name__}: "
            "dlrt.cams.spatial_layers names those that can be explained"
        )
    if maps.layout != "maps" and method == "ablationcam":
        raise ValueError(
            f"ablationcam needs maps (N, C, H, W), got {maps.layout} from {name}: take another method, or "
            "a layer that permutes them"
        )
    return maps


def _maps(
    explainer: object,
    images: Tensor,
    targets: list[Target],
    method: str,
    record: Record,
    smoothing: dict[str, bool],
) -> tuple[np.ndarray, np.ndarray]:
    """The displayed maps (N, H, W), and the raw ones (N, h, w); with aug_smooth means over all passes."""
    bars = contextlib.redirect_stderr(io.StringIO()) if method in PROGRESS_BARS else contextlib.nullcontext()
    record.start()
    with bars:
        displayed = explainer(images.clone(), targets, **smoothing)
    record.lap("assembly")
    if method == "sess":
        return displayed, displayed
    raws = [np.float32(raw) for raw in record.raws]
    if "aug_smooth" in smoothing:  # some passes saw the mirror image
        transforms = list(explainer.tta_transforms)
        raws = [
            transform.deaugment_mask(torch.from_numpy(raw)[:, None])[:, 0].numpy()
            for transform, raw in zip(transforms, raws, strict=True)
        ]
    return displayed, np.mean(raws, axis=0)


def _defined(raw: np.ndarray) -> np.ndarray:
    """Whether each map has something positive that varies: scaling would draw rounding errors."""
    positive = np.maximum(raw, 0)
    spread = positive.max((1, 2)) - positive.min((1, 2))
    return np.isfinite(raw).all((1, 2)) & (spread > FLAT * np.abs(raw).max((1, 2)))


def check_options(method: str, aug_smooth: bool = False, eigen_smooth: bool = False) -> None:
    """ValueError where there is no such method, or where it does not have an option."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    if aug_smooth and not issubclass(METHODS[method], BaseCAM):
        raise ValueError(f"{method} has no smoothing by augmentation: leave it out, or take another method")
    if eigen_smooth and method in NOT_SMOOTHED:
        raise ValueError(f"{method} has no eigen-smoothing: leave it out, or take another method")


@contextlib.contextmanager
def _hooked(model: nn.Module, maps: FeatureMaps, method: str, record: Record) -> Iterator[object]:
    """An explainer whose hooks are released whatever happens; it sees every layout as (N, C, H, W).

    The package's own `with` swallows every IndexError inside it, so it is not used.
    """
    layer, extra = maps.module, None
    handles = [model.register_forward_hook(lambda *_: record.lap("forward"))]

    def given(module: nn.Module, x: tuple[Tensor, ...], y: Tensor) -> Tensor:
        nonlocal extra
        extra, y = maps.taken_apart(y)
        # ShapleyCAM needs the gradient of the image itself, and its package detaches what it kept in place
        return y.clone() if method == "shapleycam" else y.detach().requires_grad_()

    if method != "fullgrad":
        handles.append(layer.register_forward_hook(given))
    explainer = None
    try:
        explainer = make(method, model, layer, record)
        # what comes after the layer may change its output in place, and gets a copy of what was kept
        for target in inner(explainer).target_layers:
            handles.append(target.register_forward_hook(lambda module, x, y: y.clone()))
        if maps.layout != "maps":
            handles.append(layer.register_forward_hook(lambda module, x, y: maps.put_together(extra, y)))
        yield explainer
    finally:
        if explainer is not None:
            kept = inner(explainer).activations_and_grads
            # the package detaches in place what it kept, which a gradient that is a view does not allow
            kept.gradients = [gradient.detach() for gradient in kept.gradients]
            kept.release()
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _undisturbed(model: nn.Module, trainable: bool) -> Iterator[None]:
    """Evaluation mode, parameters trainable or frozen, no module in place; then all is as it was.

    A network that changes its input in place changes a copy. AblationCAM puts another module in the layer's
    place, and leaves it there if it fails.
    """
    modules = list(model.modules())
    modes = [(module, module.training, getattr(module, "inplace", None)) for module in modules]
    children = [(module, dict(module._modules)) for module in modules]
    gradients = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    copying = model.register_forward_pre_hook(lambda module, inputs: tuple(x.clone() for x in inputs))
    try:
        model.eval()
        model.requires_grad_(trainable)
        for module, _, inplace in modes:
            if inplace:
                module.inplace = False
        yield
    finally:
        copying.remove()
        for module, submodules in children:
            module._modules.update(submodules)
        for module, training, inplace in modes:
            module.training = training
            if inplace is not None:
                module.inplace = inplace
        for parameter, requires_grad, grad in gradients:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextlib.contextmanager
def _random_numbers(seed: int) -> Iterator[None]:
    """RandomCAM draws from numpy's global generator: the same numbers every time, and none taken away."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
