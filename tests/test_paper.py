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
