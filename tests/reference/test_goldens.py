"""Our models against small files that PyTorch Transformers wrote (`make_goldens.py`)."""

import numpy as np
import pytest
from compare import compare
from make_goldens import FAMILIES, GOLDENS


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}.npz") as file:  # refuses pickles
        return dict(file)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_loss_and_gradients_are_the_reference(name):
    assert (GOLDENS / f"{name}.npz").stat().st_size < 200_000
    compare(load(name))
