import numpy as np
import pytest

from mislas.data import SPECS, load, long_tailed_counts
from mislas.methods import configure
from mislas.runs import Store
from mislas.train import Options


@pytest.fixture
def options():
    return Options(device="cpu", progress=False)


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's digits at imbalance factor 50: some 400 training images in all three groups."""
    return load("digits", imbalance=50)


@pytest.fixture
def made_up(tmp_path):
    """A function that puts a run with made-up predictions into the store under ``tmp_path / "results"``."""
    store = Store(tmp_path / "results")

    def put(
        dataset,
        method,
        changes=None,
        seed=0,
        imbalance=100,
        right=(1, 1, 0, 1),
        ece=0.1,
        own=None,
        norm=None,
        history=(),
    ):
        config = configure(dataset, method, imbalance, seed, changes)
        spec = SPECS[config.dataset]
        target = np.arange(len(right)) % spec.num_classes
        own = np.full(len(right), 0.5) if own is None else np.array(own)
        first, last = np.zeros(16), np.zeros(64)
        arrays = {
            "target": target,
            "predicted": np.where(right, target, (target + 1) % spec.num_classes),
            "confidence": np.full(len(right), 65535),
            "true_probability": np.rint(own * 65535),
            "class_counts": np.array(long_tailed_counts(spec.train_per_class, imbalance, spec.num_classes)),
            **{"bn_first_mean": first, "bn_first_var": first + 1, "bn_last_mean": last, "bn_last_var": last + 1},
            **(norm or {}),
        }
        accuracy = float(np.mean(right))
        metrics = {"accuracy": accuracy, "ece": ece, "nll": 1.0}
        source = {"date": "2000-01-01", "commit": "0", "device": "none", "torch": "0", "data": config.dataset}
        return store.put(config, metrics, list(history), arrays, {**source, "data_checksum": "made up"})

    put.root = store.root
    return put
