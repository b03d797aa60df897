import pytest

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
        assert rows.keys() <= METHODS.keys()
        assert all(len(numbers) == len(paper.IMBALANCES) for numbers in rows.values())


@pytest.mark.parametrize("titles", [paper.TITLES, paper.TITLES_LARGE])
def test_titles_agree_with_the_registry_but_for_remarks(titles):
    assert all(METHODS[name].title == title.partition(" (")[0] for name, title in titles.items())


def test_mislas_is_the_best_of_every_column_as_the_paper_says():
    for rows in paper.TABLE3.values():
        for column in range(len(paper.IMBALANCES)):
            others = [numbers[column] for name, numbers in rows.items() if numbers[column] and name != "mislas"]
            assert rows["mislas"][column] > max(others)


# ------------------------------------------------------------------------------------------------ the large benchmarks

BACKBONES = ("resnet10", "resnet50", "resnet101", "resnet152")


def by_table1(first, second):
    """A row of Table 1 as the paper prints it: cRT and LWS of ResNet-10, then of ResNet-50, ..."""
    return [number for name in BACKBONES for number in paper.TABLE1[first, second][name]]


def test_table_1_is_the_papers():
    assert by_table1(False, None) == [36.8, 36.8, 45.8, 45.8, 47.3, 47.3, 48.7, 48.7]
    assert by_table1(True, None) == [35.7, 35.7, 45.6, 45.6, 47.7, 47.7, 48.4, 48.4]
    assert by_table1(False, False) == [43.3, 43.5, 50.3, 51.2, 51.4, 52.3, 52.7, 53.8]
    assert by_table1(False, True) == [43.0, 43.3, 50.2, 51.1, 51.4, 52.2, 52.8, 53.6]
    assert by_table1(True, False) == [43.4, 42.9, 51.7, 52.0, 53.1, 53.5, 54.2, 54.6]
    assert by_table1(True, True) == [43.3, 42.8, None, 51.9, None, 53.5, None, 54.5]


@pytest.mark.parametrize(
    ("table", "row", "numbers"),
    [
        (paper.TABLE6["resnet50"], "lws", (61.8, 48.6, 33.5, 51.2)),
        (paper.TABLE6["resnet101"], "mislas", (64.3, 52.1, 35.8, 54.1)),
        (paper.TABLE6["resnet152"], "crt+mixup", (66.5, 51.6, 32.8, 54.2)),
        (paper.TABLE7, "tau-norm", (71.1, 68.9, 69.3, 69.3)),
        (paper.TABLE7, "crt+mixup", (74.2, 71.1, 68.2, 70.2)),
        (paper.TABLE7, "mislas", (73.2, 72.4, 70.4, 71.6)),
        (paper.TABLE8, "fslwf", (43.9, 29.9, 29.5, 34.9)),
        (paper.TABLE8, "tau-norm", (37.8, 40.7, 31.8, 37.9)),
        (paper.TABLE8, "mislas", (39.6, 43.3, 36.1, 40.4)),
    ],
)
def test_rows_of_the_appendix_are_the_papers(table, row, numbers):
    assert table[row] == numbers


def test_table_4_is_the_papers():
    assert list(paper.TABLE4["imagenet-lt"].values()) == [44.6, 48.5, 47.9, 48.8, 51.7, 52.0, 52.7]
    assert list(paper.TABLE4["inaturalist18"].values()) == [61.1, 68.0, 69.6, 70.5, 70.2, 70.9, 71.6]
    assert list(paper.TABLE4["places-lt"].values()) == [35.1, 34.9, 35.9, 36.2, 38.3, 39.7, 40.4]


def test_table_1_and_table_6_agree_where_they_show_the_same_runs():
    for name in BACKBONES[1:]:
        for mixup, suffix in ((False, ""), (True, "+mixup")):
            expected = tuple(paper.TABLE6[name][method + suffix][3] for method in ("crt", "lws"))
            assert paper.TABLE1[mixup, False][name] == expected


def test_table_4_agrees_with_the_appendix_but_for_one_cell():
    details = {"imagenet-lt": paper.TABLE6["resnet50"], "inaturalist18": paper.TABLE7, "places-lt": paper.TABLE8}
    both = {
        (dataset, method): (number, details[dataset][method][3])
        for dataset, rows in paper.TABLE4.items()
        for method, number in rows.items()
        if method in details[dataset]
    }
    assert len(both) == 3 + 3 + 7
    assert {key: pair for key, pair in both.items() if pair[0] != pair[1]} == {("places-lt", "crt+mixup"): (38.3, 38.1)}


def average(numbers, sizes):
    return sum(size * number for size, number in zip(sizes, numbers, strict=False)) / sum(sizes)


def test_the_groups_of_table_6_average_to_its_last_column():
    for rows in paper.TABLE6.values():
        for numbers in rows.values():
            assert average(numbers, paper.GROUP_SIZES["imagenet-lt"]["authors' code"]) == pytest.approx(
                numbers[3], abs=0.11
            )


def test_the_groups_of_table_8_average_to_its_last_column_by_one_definition_or_the_other_but_for_oltr():
    words, code = (
        {m: average(n, paper.GROUP_SIZES["places-lt"][by]) - n[3] for m, n in paper.TABLE8.items()}
        for by in ("paper's words", "authors' code")
    )
    off = {m: min(abs(words[m]), abs(code[m])) for m in paper.TABLE8}
    assert [method for method, difference in off.items() if difference > 0.06] == ["oltr"]
    assert (words["oltr"], code["oltr"]) == pytest.approx((1.6, 1.4), abs=0.05)
    own = [method for method in paper.TABLE8 if abs(words[method]) > 0.11 >= abs(code[method])]
    assert own == ["oltr+lfme", "crt+mixup", "lws+mixup", "mislas"]
    assert words["crt+mixup"] + 38.1 == pytest.approx(38.3, abs=0.05)


def test_the_last_column_of_table_7_is_within_its_groups():
    assert all(min(numbers[:3]) < numbers[3] < max(numbers[:3]) for numbers in paper.TABLE7.values())


def test_mislas_is_the_best_of_every_large_benchmark():
    everywhere = [*paper.TABLE4.values(), *({m: n[3] for m, n in t.items()} for t in
                  (*paper.TABLE6.values(), paper.TABLE7, paper.TABLE8))]  # fmt: skip
    assert all(max(rows, key=rows.get) == "mislas" for rows in everywhere)


def test_every_large_row_has_a_title():
    rows = [*paper.TABLE4.values(), *paper.TABLE6.values(), paper.TABLE7, paper.TABLE8]
    assert set().union(*rows) <= METHODS.keys()


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        (4, set().union(*paper.TABLE4.values())),
        (6, set(paper.TABLE6["resnet50"])),
        (7, set(paper.TABLE7)),
        (8, set(paper.TABLE8)),
    ],
)
def test_the_registry_names_the_tables_that_have_a_row(table, rows):
    assert {name for name, method in METHODS.items() if table in method.tables} == rows


def test_the_authors_numbers_are_those_of_their_code():
    assert paper.AUTHORS_CODE_LARGE["imagenet-lt"] == {"mixup": (45.5, 7.98), "mislas": (52.7, 1.78)}
    assert paper.AUTHORS_CODE_LARGE["inaturalist18"] == {"mixup": (66.9, 5.37), "mislas": (71.6, 7.67)}
    assert paper.AUTHORS_CODE_LARGE["places-lt"] == {"mixup": (29.4, 16.7), "mislas": (40.4, 3.41)}
    assert {d: rows["mislas"] for d, rows in paper.TABLE4.items()} == {
        d: rows["mislas"][0] for d, rows in paper.AUTHORS_CODE_LARGE.items()
    }


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
