"""Improving Calibration for Long-Tailed Recognition, as a library to read, re-run and teach."""

__version__ = "0.1.0"

from .config import RunConfig, Stage1, Stage2
from .data import Dataset, load
from .errors import DataError, MislasError, RecordError
from .methods import METHODS, configure
from .runs import Record, Store, run
from .train import Options

__all__ = [
    "METHODS",
    "DataError",
    "Dataset",
    "MislasError",
    "Options",
    "Record",
    "RecordError",
    "RunConfig",
    "Stage1",
    "Stage2",
    "Store",
    "configure",
    "load",
    "run",
]
