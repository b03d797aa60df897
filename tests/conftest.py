import pytest

from mislas.data import load
from mislas.train import Options


@pytest.fixture
def options():
    return Options(device="cpu", progress=False)


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's digits at imbalance factor 50: some 400 training images in all three groups."""
    return load("digits", imbalance=50)
