"""The pages: what they must have, the list of exercises, which has all of them and no solution, and the two pages that
add something to the library."""

import ast
import itertools
import os
import re
import sys
import textwrap
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import mislas
from mislas.errors import DataError
from mislas.methods import METHODS, SETTINGS
from mislas.registries import REGISTRIES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def book(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book")
    import exercises

    return exercises


def test_pages_are_those_of_the_book_in_order(book):
    pages = [page.as_posix() for page in book.pages()]
    assert pages[:2] == ["book/introduction.md", "book/calibration.md"]
    assert sum(page.startswith("notebooks/") for page in pages) == 19
    assert all((ROOT / page).exists() for page in pages)
    assert {page.name for page in (ROOT / "book").glob("*.md")} <= {Path(page).name for page in pages}


def test_options_of_the_theme_are_added_to_those_that_the_book_makes_of_its_config():
    config = (ROOT / "_config.yml").read_text()
    assert ("html_theme_options:" in config) <= ("  recursive_update: true" in config)  # without it they replace them


def test_every_picture_has_a_text_for_those_who_cannot_see_it(book):
    """Notebooks have a test of their own."""
    for page in book.pages():
        if page.suffix == ".md":
            for cell in re.findall(r"^```\{code-cell\}(.*?)^```$", book.text(page), re.DOTALL | re.MULTILINE):
                assert "show(" not in cell or re.search(r"^    alt: .{20}", cell, re.MULTILINE), f"{page}: {cell}"


def test_code_in_the_docstring_of_a_module_is_announced_as_code():
    """Else the page of the library sets it as prose, with curly quotes."""
    for module in (ROOT / "mislas").glob("*.py"):
        lines = [line for line in ast.get_docstring(ast.parse(module.read_text())).splitlines() if line]
        for before, line in itertools.pairwise(lines):
            assert before.startswith(" ") or not line.startswith(" ") or before.endswith("::"), f"{module}: {line}"


def test_every_exercise_is_listed_with_a_link_and_without_its_solution(book):
    listed = book.exercises().data
    prose = {page: book.text(page) for page in book.pages()}
    headings = sum(text.count("{admonition} Exercise") for text in prose.values())
    assert headings == sum(text.count("{admonition} Solution") for text in prose.values())
    assert len(re.findall(r"^::::\{admonition\} Exercise", listed, re.MULTILINE)) == headings
    assert "dropdown" not in listed
    assert "Solution" not in listed
    for page, text in prose.items():
        assert (f"(../{page.as_posix()})**" in listed) == ("{admonition} Exercise" in text)


def test_exercises_link_nowhere_so_that_they_can_stand_on_another_page(book):
    for page in book.pages():
        assert not any("](" in exercise for *_, exercise in book.EXERCISE.findall(book.text(page))), page


CELL = re.compile(r"^```\{code-cell\} ipython3\n(?:---\n.*?^---\n|(?::.*?\n)+)?(.*?)^```$", re.DOTALL | re.MULTILINE)


def scripts(text):
    """What a page shows of scripts; no cell."""
    return [textwrap.dedent(code) for code in re.findall(r"^ *```python\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)]


@pytest.fixture
def hand_over(monkeypatch):
    """A function that ends a script, whose names are in ``space``, as a page says; it returns the exit status.

    The script is the first to import ``mislas.cli``, as it would be on its own.
    """

    def end(lines, space, arguments):
        monkeypatch.setattr(sys, "argv", ["mine.py", *arguments])
        monkeypatch.delitem(sys.modules, "mislas.cli", raising=False)
        monkeypatch.delattr(mislas, "cli", raising=False)
        with pytest.raises(SystemExit) as ended:
            exec(lines, space | {"__name__": "__main__"})
        return ended.value.code

    return end


def execute(cell, space):
    """What a notebook's cell would show last, or None."""
    tree = ast.parse(cell)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), space)
    return eval(compile(last, "cell", "eval"), space) if last else None


@pytest.mark.parametrize("page", sorted((ROOT / "book").glob("*.md")), ids=lambda page: page.stem)
def test_code_is_no_wider_than_its_column(page):
    """As ruff holds it for notebooks: 86 characters."""
    text = page.read_text()
    code = "".join(CELL.findall(text) + scripts(text))
    assert [line for line in code.splitlines() if len(line) > 86] == []


OWN_TEST = ("add-a-method.md", "bring-your-images.md")
WITH_CELLS = [page for page in sorted((ROOT / "book").glob("*.md")) if CELL.search(page.read_text())]


@pytest.mark.parametrize("page", [page for page in WITH_CELLS if page.name not in OWN_TEST], ids=lambda page: page.stem)
def test_the_cells_of_a_page_run_and_are_shown(page, monkeypatch):
    monkeypatch.chdir(page.parent)
    monkeypatch.syspath_prepend(page.parent)
    space = {"display": lambda *shown: [one._repr_html_() for one in shown if hasattr(one, "_repr_html_")]}
    for cell in CELL.findall(page.read_text()):
        space["display"](execute(cell, space))
    plt.close("all")


@pytest.fixture
def registries():
    """What a page registers is gone after the test."""
    known = (METHODS, SETTINGS, *REGISTRIES.values())
    before = [dict(registry) for registry in known]
    yield
    for registry, old in zip(known, before, strict=True):
        registry.clear()
        registry.update(old)


def test_the_page_that_adds_a_method_adds_one_in_under_30_lines(
    book, registries, hand_over, tmp_path, monkeypatch, capsys
):
    page = book.text(Path("book/add-a-method.md"))
    cell, own_mix, own_classifier, rule_and_backbone, own_measure, choice = CELL.findall(page)
    assert len([line for line in cell.splitlines() if line.strip()]) < 30
    space = {}
    table = execute(cell, space)
    assert list(table.frame.index) == ["CE", "Mine", "cRT"]
    assert float(table.frame.loc["Mine", ("IF 10", "tiny")]) > 50
    mixes = execute(own_mix, space).frame
    assert list(mixes.index) == ["CE", "mixup", "Rare partners"]
    assert float(mixes.loc["Rare partners", ("IF 10", "tiny")]) > 50
    classifiers = execute(own_classifier, space).frame
    assert list(classifiers.index) == ["CE", "LWS", "Aligned"]
    assert float(classifiers.loc["Aligned", ("IF 10", "tiny")]) > 50
    measured = execute(rule_and_backbone, space).frame
    assert list(measured.index) == ["CE", "CE+TS", "Calm"]
    assert (measured["accuracy"].astype(float) > 50).all()
    sure = execute(own_measure, space).frame["wrong and sure"].astype(float)
    assert sure["CE"] > sure["MiSLAS"] > 0
    unseen = execute(choice, space).frame.astype(float)
    assert unseen["acc., held out"].between(50, 100).all()
    assert unseen["NLL, held out"].nunique() == 3
    in_full, as_a_row, ending = scripts(page)
    monkeypatch.chdir(tmp_path)  # where no data are: it gets as far as that
    with pytest.raises(DataError, match="cannot read cifar10 under data"):
        exec(in_full, space)
    (tmp_path / "results").mkdir(exist_ok=True)
    assert execute(as_a_row, space).frame.index[-1] == "Mine"
    assert hand_over(ending, space, ["list", "methods"]) == 0
    assert "PolyLoss on square-root batches" in capsys.readouterr().out


def test_the_page_that_brings_images_trains_on_both_kinds(book, registries, hand_over, monkeypatch, capsys):
    monkeypatch.setenv("MISLAS_CACHE", os.devnull)  # the page sets its own, which must not outlive the test
    page, space = book.text(Path("book/bring-your-images.md")), {}
    shown = [execute(cell, space) for cell in CELL.findall(page)]
    (table,) = (value for value in shown if hasattr(value, "frame"))
    assert float(table.frame.loc["CE", ("IF 50", "measured")]) > 60
    said = capsys.readouterr().out
    assert said.count("all is well") == 2
    assert "ce {'many': 1.0" in said
    (ending,) = scripts(page)
    root = str(space["data_root"])
    results = ["--results-root", f"{root}/results"]
    command = re.search(r"`python mine\.py (.*?)`", page)[1].replace("DIR", root)
    assert hand_over(ending, space, [*command.split(), *results]) == 0  # the run is in the store
    assert re.search(r" textures +50 +mislas ", capsys.readouterr().out)
    assert hand_over(ending, space, ["list", *results]) == 0
    listed = capsys.readouterr().out
    stage1 = next(line.split()[0] for line in listed.splitlines() if " textures " in line and " ce " in line)
    assert hand_over(ending, space, ["eval", stage1, "--data-root", root, *results]) == 0
    accuracy = f"{float(table.frame.loc['CE', ('IF 50', 'measured')]) / 100:.3f}"
    assert f"from weights: accuracy {accuracy}" in capsys.readouterr().out
    assert hand_over(ending, space, ["data", "check", "textures", "--root", root]) == 0


def test_the_citation_names_the_version():
    assert f"\nversion: {mislas.__version__}\n" in (ROOT / "CITATION.cff").read_text()
