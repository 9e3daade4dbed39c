"""What several test files share."""

import pytest
import torch


@pytest.fixture
def float64():
    """Tiny matrices in double precision, where the theory's equalities hold to 1e-12."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
