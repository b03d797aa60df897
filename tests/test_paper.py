from mislas import paper
from mislas.methods import METHODS


def test_table_3_has_the_headline_numbers_of_the_paper():
    assert [paper.TABLE3["cifar10"][m][0] for m in ("ce", "mixup", "crt+mixup", "lws+mixup", "mislas")] == [
        70.4,
        73.1,
        79.1,
        76.3,
        82.1,
    ]
    assert paper.TABLE3["cifar100"]["mislas"] == (47.0, 52.3, 63.0)


def test_every_row_has_a_title_and_a_number_per_imbalance_factor():
    for rows in paper.TABLE3.values():
        assert rows.keys() == paper.TITLES.keys()
        assert all(len(numbers) == len(paper.IMBALANCES) for numbers in rows.values())


def test_titles_agree_with_the_registry():
    assert all(METHODS[name].title == title for name, title in paper.TITLES.items() if name in METHODS)


def test_mislas_is_the_best_of_every_column_as_the_paper_says():
    for rows in paper.TABLE3.values():
        for column in range(len(paper.IMBALANCES)):
            others = [numbers[column] for name, numbers in rows.items() if numbers[column] and name != "mislas"]
            assert rows["mislas"][column] > max(others)


def test_table_2_has_the_numbers_of_the_paper():
    assert [row[0] for row in paper.TABLE2.values()] == [41.2, 44.2, 45.3, 47.0]
    assert paper.TABLE2["lws"] == (41.2, 46.0, 58.5)
    assert paper.TABLE2["lws+mixup+shift"][1:] == (51.4, 62.8)
    assert paper.TABLE2.keys() == paper.TABLE2_TITLES.keys()


def test_table_2_agrees_with_the_rows_of_table_3_that_it_repeats():
    for method in ("lws+mixup", "mislas"):
        assert paper.TABLE2[method] == paper.TABLE3["cifar100"][method]


def test_table_5_has_the_settings_of_the_paper():
    column = [row[list(paper.TABLE5_COLUMNS).index(("Common", "WD"))] for row in paper.TABLE5.values()]
    assert column == [2e-4, 2e-4, 5e-4, 5e-4, 1e-4]
    assert paper.TABLE5["cifar10"][-3:] == (0.3, 0.0, 0.5)
    assert paper.TABLE5["cifar100"][-3:] == (0.4, 0.1, 0.2)
    assert paper.TABLE5["places-lt"] == (0.1, 256, 5e-4, 90, "cosine", 10, "cosine", 0.4, 0.1, 0.05)
    assert paper.TABLE5["inaturalist18"][3:6] == (200, "cosine", 30)
    assert all(len(row) == len(paper.TABLE5_COLUMNS) for row in paper.TABLE5.values())
    assert paper.TABLE5.keys() == paper.TABLE5_TITLES.keys()


def test_smoothing_gains_are_those_of_the_text():
    assert paper.SMOOTHING_GAIN == {"cifar10": 3.3, "cifar100": 0.9}
