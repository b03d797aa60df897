"""Every notebook runs live in the tiny profile, twice, and prints the same both times."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMETERS = ["profile", "data_root", "results_root", "seeds", "device", "overrides"]

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """A store that the notebooks fill together: what one has trained the next does not train again."""
    return str(tmp_path_factory.mktemp("tiny"))


@pytest.mark.notebooks
@every_notebook
def test_runs_in_tiny_and_prints_the_same_from_nothing(path, kept, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")  # rates and times differ from run to run
    executed, parameters = tmp_path / path.name, {"profile": "tiny", "results_root": kept}
    papermill.execute_notebook(path, executed, parameters, kernel_name="python3", progress_bar=False)
    notebook = nbformat.read(executed, 4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs
    assert not any(output.get("name") == "stderr" for output in outputs), "a reader would see warnings"
    (injected,) = [cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    injected.source = 'profile = "tiny"'  # nothing is kept: every number comes from training, here and now
    nbformat.write(notebook, executed)
    again = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(executed)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stdout + again.stderr


@every_notebook
def test_is_committed_clean(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.language == "python"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert list(papermill.inspect_notebook(str(path))) == PARAMETERS
    assert 'profile = "stored"' in parameters.source


@every_notebook
def test_is_a_page_of_the_book(path):
    assert f"notebooks/{path.stem}\n" in (ROOT / "_toc.yml").read_text()


@every_notebook
def test_every_picture_has_a_text_for_those_who_cannot_see_it(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and "show(" in cell.source:
            assert len(cell.metadata["mystnb"]["image"]["alt"]) > 20
