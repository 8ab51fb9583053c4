"""The notebooks run, on toy sizes, and are stored with the pictures of a full run."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def pictures(book: nbformat.NotebookNode) -> list[str]:
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert all(output.output_type != "error" for output in outputs)
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def test_all_notebooks_are_here():
    expected = ["01_forward_process", "02_ddpm_and_ddim", "03_autoencoder_and_latents", "04_classifier_guidance"]
    expected += ["05_stable_diffusion_by_hand", "06_ablation"]
    assert [path.stem for path in NOTEBOOKS] == expected


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_with_their_pictures(path):
    book = nbformat.read(path, as_version=4)
    assert len(pictures(book)) >= 3
    assert all(cell.execution_count for cell in book.cells if cell.cell_type == "code")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_NOTEBOOK_TOY", "1")
    stored = nbformat.read(path, as_version=4)
    fresh = nbformat.from_dict(stored)
    NotebookClient(fresh, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert len(pictures(fresh)) == len(pictures(stored))
