"""Our measures beside those of the library Quantus, where it is installed (pip install quantus)."""

import numpy as np
import pytest

from dlrt.cams.compare import in_boxes
from dlrt.models import ConvNet

quantus = pytest.importorskip("quantus", reason="pip install quantus")


def of_quantus(measure, maps, boxes):
    """A measure of Quantus of maps (N, 16, 16), of which it gets the boxes as masks."""
    masks = np.zeros((len(maps), 1, 16, 16), dtype=int)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[0, top:bottom, left:right] = 1
    images, labels = np.zeros((len(maps), 1, 16, 16), dtype=np.float32), np.zeros(len(maps), dtype=int)
    options = {"x_batch": images, "y_batch": labels, "a_batch": maps[:, None], "s_batch": masks}
    return measure(model=ConvNet((1, 16, 16)).eval(), device="cpu", **options)


@pytest.mark.parametrize(
    ("name", "ours"), [("RelevanceMassAccuracy", "energy"), ("PointingGame", "pointing")]
)
@pytest.mark.filterwarnings("ignore")
def test_energy_and_pointing_are_those_of_quantus(name, ours):
    rng = np.random.default_rng(0)
    maps = rng.random((8, 16, 16)).astype(np.float32)
    corners = np.sort(rng.permuted(np.tile(np.arange(17), (16, 1)), axis=1)[:, :2], axis=1).reshape(8, 2, 2)
    boxes = [(left, top, right, bottom) for (left, right), (top, bottom) in corners]
    measure = getattr(quantus, name)(abs=False, normalise=False, disable_warnings=True)
    expected = of_quantus(measure, maps, boxes)
    found = [in_boxes(shown, [box], (16, 16))[ours] for shown, box in zip(maps, boxes, strict=True)]
    np.testing.assert_allclose(found, np.array(expected, dtype=float), rtol=1e-5)
    assert len(set(found)) > 1
