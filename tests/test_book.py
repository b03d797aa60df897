"""The pages: what they must have, and the list of exercises, which has all of them and no solution."""

import re
from pathlib import Path

import pytest

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


def test_every_picture_has_a_text_for_those_who_cannot_see_it(book):
    """Notebooks have a test of their own."""
    for page in book.pages():
        if page.suffix == ".md":
            for cell in re.findall(r"^```\{code-cell\}(.*?)^```$", book.text(page), re.DOTALL | re.MULTILINE):
                assert "show(" not in cell or re.search(r"^    alt: .{20}", cell, re.MULTILINE), f"{page}: {cell}"


def test_every_exercise_is_listed_with_a_link_and_without_its_solution(book):
    listed = str(book.exercises())
    prose = {page: book.text(page) for page in book.pages()}
    headings = sum(text.count("{admonition} Exercise") for text in prose.values())
    assert headings == sum(text.count("{admonition} Solution") for text in prose.values())
    numbers = [int(number) for number in re.findall(r"^::::\{admonition\} (\d+)", listed, re.MULTILINE)]
    assert numbers == list(range(1, headings + 1))
    assert "dropdown" not in listed
    assert "Solution" not in listed
    for page, text in prose.items():
        assert (f"(../{page.as_posix()})**" in listed) == ("{admonition} Exercise" in text)


def test_exercises_link_nowhere_so_that_they_can_stand_on_another_page(book):
    for page in book.pages():
        assert not any("](" in exercise for *_, exercise in book.EXERCISE.findall(book.text(page))), page
