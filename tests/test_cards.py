"""The catalogue of methods."""

from mislas.cards import card, cards, settings
from mislas.methods import METHODS, configure
from mislas.runs import SOURCE, Store
from mislas.study import Study


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
    text = cards(METHODS, Study("stored", results_root=tmp_path)).data
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
    source = dict.fromkeys(SOURCE, "")
    Store(tmp_path).put(configure("cifar10-jpeg", "ce"), metrics, [], {}, source)
    text = card("ce", Study("stored", results_root=tmp_path))
    assert "*measured* on `cifar10-jpeg`, IF 100: accuracy 71.2%, ECE 4.6%, n = 1" in text
