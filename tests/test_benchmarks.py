"""The benchmark runs, and keeps what the book's page on speed shows."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_benchmark_runs_and_saves_rates_and_ratios(tmp_path):
    script, saved = ROOT / "benchmarks" / "train.py", tmp_path / "here.json"
    options = ["--images", "128", "--repeats", "1", "--device", "cpu", "--save", str(saved)]
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(saved.read_text())
    assert set(found["images_per_second"]) == {"usual", "ours", "bare", "together", "one head", "grid"}
    for middle, low, high in (*found["images_per_second"].values(), *found["ratios"].values()):
        assert 0 < low <= middle <= high
    assert all(name in done.stdout for name in found["ratios"])
