import functools
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from mislas.augment import Images
from mislas.data import LISTS, load, long_tailed_counts, spec_of
from mislas.methods import configure
from mislas.runs import Store
from mislas.train import Options


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache of the tests' own: what is there of the user's may be older than the code, and is theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MISLAS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def options():
    return Options(device="cpu", progress=False)


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's digits at imbalance factor 50: some 400 training images in all three groups."""
    return load("digits", imbalance=50)


@pytest.fixture
def near(monkeypatch):
    """A deadline that is too near for a second epoch, however long the first takes: training's clock stands still."""
    clock = SimpleNamespace(monotonic=functools.partial(float, time.monotonic() + 1000))
    monkeypatch.setattr("mislas.train.time", clock)
    return clock.monotonic() + 1


class KilledError(BaseException):
    pass


@pytest.fixture
def kill_after():
    """A function that lets training die, under a monkeypatch, when it asks for one more than so many batches."""

    def kill(patch, batches):
        whole, seen = Images.batch, []

        def batch(self, *arguments):
            seen.append(1)
            if len(seen) > batches:
                raise KilledError
            return whole(self, *arguments)

        patch.setattr(Images, "batch", batch)

    return kill


@pytest.fixture
def killed(monkeypatch, kill_after):
    """A function of a number of batches: a context in which training must die after them."""

    @contextmanager
    def after(batches):
        with monkeypatch.context() as patch:
            kill_after(patch, batches)
            with pytest.raises(KilledError):
                yield

    return after


@pytest.fixture
def made_up(tmp_path):
    """A function that puts a run with made-up predictions into the store under ``tmp_path / "results"``."""
    store = Store(tmp_path / "results")
    store.root.mkdir()

    def put(
        dataset,
        method,
        changes=None,
        seed=0,
        imbalance=None,
        right=(1, 1, 0, 1),
        ece=0.1,
        own=None,
        norm=None,
        history=(),
    ):
        config = configure(dataset, method, imbalance, seed, changes)
        spec = spec_of(config.dataset)
        largest = spec.largest if config.dataset in LISTS else spec.train_per_class
        counts = long_tailed_counts(largest, config.imbalance, spec.num_classes)
        target = np.arange(len(right)) % spec.num_classes
        own = np.full(len(right), 0.5) if own is None else np.array(own)
        first, last = np.zeros(16), np.zeros(64)
        arrays = {
            "target": target,
            "predicted": np.where(right, target, (target + 1) % spec.num_classes),
            "confidence": np.full(len(right), 65535),
            "true_probability": np.rint(own * 65535),
            "class_counts": np.array(counts),
            **{"bn_first_mean": first, "bn_first_var": first + 1, "bn_last_mean": last, "bn_last_var": last + 1},
            **(norm or {}),
        }
        accuracy = float(np.mean(right))
        metrics = {"accuracy": accuracy, "ece": ece, "nll": 1.0}
        metrics |= {f"accuracy_{group}": accuracy for group in ("many", "medium", "few")}
        source = {
            "date": "2000-01-01",
            "commit": "0",
            "device": "none",
            "torch": "0",
            "data": config.dataset,
            "seconds": 0,
        }
        return store.put(config, metrics, list(history), arrays, {**source, "data_checksum": "made up"})

    put.root = store.root
    return put


@pytest.fixture
def full_disk():
    """A context in which no file can grow beyond 50 kB."""
    resource = pytest.importorskip("resource", reason="limits the size of files")

    @contextmanager
    def limited():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
