"""The catalogue of methods, and the page that adds one."""

import re
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")

from mislas.cards import card, cards, settings
from mislas.losses import LOSSES
from mislas.methods import METHODS, configure
from mislas.runs import Store
from mislas.samplers import SAMPLERS
from mislas.study import Study

PAGE = Path(__file__).resolve().parents[1] / "book" / "add-a-method.md"


def test_settings_are_what_differs_from_the_plain_model():
    assert settings("ce") == {}
    assert settings("ldam+drw") == {
        "stage1.loss": "ldam",
        "stage1.max_margin": 0.5,
        "stage1.scale": 30.0,
        "stage1.beta": 0.9999,
        "stage1.defer": 0.8,
    }
    assert settings("temperature") == {"stage1.holdout": 0.1, "stage2.rule": "temperature"}


def test_every_method_has_a_card_that_says_how_to_measure_it(tmp_path):
    text = str(cards(METHODS, Study("stored", results_root=tmp_path)))
    for name, method in METHODS.items():
        assert f"{method.title} — `{name}`" in text
        assert f"--method {name} " in text
    assert text.count("$$") == 2 * len(METHODS)


def test_variants_share_a_card_and_each_has_its_standing(tmp_path):
    text = card(["crt", "crt+mixup"], Study("stored", results_root=tmp_path))
    assert text.count("$$") == 2
    assert "- `crt`: not measured yet, `mislas train" in text
    assert "- `crt+mixup` (Tables 1, 3, 4, 6, 7, 8 of the paper): not measured yet" in text


def test_a_card_shows_where_a_method_stands(tmp_path):
    metrics = {"accuracy": 0.7123, "ece": 0.0456}
    source = {"date": "2026-01-01", "device": "CPU", "seconds": 1}
    Store(tmp_path).put(configure("cifar10-jpeg", "ce"), metrics, [], {}, source)
    text = card("ce", Study("stored", results_root=tmp_path))
    assert "*measured* on `cifar10-jpeg`, IF 100: accuracy 71.2%, ECE 4.6%, n = 1" in text


@pytest.fixture
def registries():
    """What the page registers is gone after the test."""
    before = [dict(registry) for registry in (METHODS, LOSSES, SAMPLERS)]
    yield
    for registry, old in zip((METHODS, LOSSES, SAMPLERS), before, strict=True):
        registry.clear()
        registry.update(old)


def test_the_page_that_adds_a_method_adds_one_in_under_30_lines(registries):
    cell = re.search(r"```\{code-cell\} ipython3\n:tags: \[own-method\]\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    assert len([line for line in cell.splitlines() if line.strip()]) < 30
    statements, last = cell.strip().rsplit("\n", 1)
    space = {}
    exec(statements, space)
    table = eval(last, space)
    assert list(table.frame.index) == ["CE", "Mine", "cRT"]
    assert float(table.frame.loc["Mine", ("IF 10", "tiny")]) > 50
