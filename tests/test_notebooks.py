"""The notebooks in examples/ run from beginning to end, as they are, and are kept with their outputs."""

import os
import sys
from pathlib import Path

import pytest
from paths import ROOT

NOTEBOOKS = sorted(path.name for path in (ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_there_and_name_no_folder_of_a_machine(name: str) -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples" / name, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert len(outputs) >= 3 and not [output for output in outputs if output.output_type == "error"]
    assert "/tmp/" not in str(outputs) and "/home/" not in str(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / name, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    if name == "own_data.ipynb":
        assert (tmp_path / "runs" / "mine" / "report.html").exists()
        assert (tmp_path / "predictions" / "predictions.json").exists()
