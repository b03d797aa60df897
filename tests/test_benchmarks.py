"""The benchmarks run, and keep what the book's page on speed shows."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from scipy.stats import ttest_ind

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_the_benchmark_runs_and_saves_rates_and_ratios(script, tmp_path, monkeypatch, capsys):
    benchmark, saved = script("train"), tmp_path / "here.json"
    monkeypatch.setattr(benchmark, "BACKBONE", "resnet8")
    monkeypatch.setattr(benchmark, "get_num_threads", lambda: 2)
    benchmark.main(["--images", "128", "--repeats", "1", "--device", "cpu", "--save", str(saved)])
    found, printed = json.loads(saved.read_text()), capsys.readouterr().out
    assert set(found["images_per_second"]) == {
        "usual", "ours", "bare", "roofline", "together", "one head", "grid", "at once"
    }  # fmt: skip
    assert "2 processes at once, a thread each, against one of 2 threads" in found["ratios"]
    for middle, low, high in (*found["images_per_second"].values(), *found["ratios"].values()):
        assert 0 < low <= middle <= high
    assert all(name in printed for name in found["ratios"])


def test_the_roofline_counts_what_a_step_computes_and_moves(script):
    """A linear layer of 3 x 5 on 7 rows, by hand; a view moves nothing."""
    roofline = script("roofline")
    x, w = torch.zeros(7, 5), torch.zeros(3, 5)
    assert roofline.work(lambda: x @ w.t()) == (2 * 7 * 5 * 3, 4 * (7 * 5 + 5 * 3 + 7 * 3))
    assert roofline.work(lambda: torch.relu(x).view(5, 7)) == (0, 4 * 2 * 7 * 5)
    assert roofline.work(lambda: torch.empty(100)) == (0, 0)
    assert roofline.roofline_seconds(100, 20, 50, 5) == 4  # 2 s of arithmetic, 4 s of memory
    assert all(rate > 1e6 for rate in roofline.peaks(torch.device("cpu"), 0.01))


def test_the_ways_to_decode_take_turns_and_are_held_against_the_usual_one(script, capsys):
    script("pipeline").main(["--images", "2", "--repeats", "1"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["usual", "workers", "whole", "shrunk"]
    assert lines[0][-3:] == ["1.00", "of", "usual"]


@pytest.fixture
def accuracy(script):
    return script("accuracy")


def test_accuracy_is_compared_and_what_is_measured_is_not_trained_again(accuracy, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "accuracy-here.json"
    command = ["--imbalance", "50", "--epochs", "1", "--device", "cpu", "--quiet", "--save", str(saved), "--seeds"]
    assert accuracy.main([*command, "0"]) == 0
    assert accuracy.main([*command, "0", "1"]) == 0
    measured = json.loads(saved.read_text())
    assert [(run["seed"], run["way"]) for run in measured["runs"]] == [
        (seed, way) for seed in (0, 1) for way in ("usual", "ours")
    ]
    assert measured["setting"]["data_checksum"] == measured["runs"][0]["data_checksum"]
    assert all(0 <= run["accuracy"] <= 1 and run["commit"] and run["date"] for run in measured["runs"])
    shown = capsys.readouterr().out
    assert "ours minus usual" in shown
    before = saved.read_bytes()
    for way in accuracy.WAYS:
        monkeypatch.setitem(accuracy.WAYS, way, None)
    assert accuracy.main([*command, "0", "1"]) == 0
    assert saved.read_bytes() == before
    assert accuracy.main([*command[:2], *command[4:], "0"]) == 2
    assert "was measured with epochs 1, not 20" in capsys.readouterr().err


def test_the_interval_of_the_difference_is_scipys(accuracy):
    values = {"usual": [0.71, 0.73, 0.705, 0.72], "ours": [0.722, 0.7, 0.715]}
    found = accuracy.compare([{"way": way, "accuracy": value} for way, some in values.items() for value in some])
    test = ttest_ind([100 * v for v in values["ours"]], [100 * v for v in values["usual"]], equal_var=False)
    assert found["interval"] == pytest.approx(list(test.confidence_interval()))
    assert found["difference"] / found["standard_error"] == pytest.approx(test.statistic)
    alone = accuracy.compare([{"way": way, "accuracy": 0.5} for way in values])
    assert (alone["difference"], alone["interval"], alone["ours"]["deviation"]) == (0, None, None)
    same = accuracy.compare([{"way": way, "accuracy": 0.5} for way in (*values, *values)])
    assert same["interval"] == [0, 0]
