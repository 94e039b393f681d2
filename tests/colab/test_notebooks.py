"""Notebooks: each runs in a clean kernel with its smallest settings and matches its source."""

import importlib.util
import tempfile
from pathlib import Path

import pytest
from stand_ins import STAND_INS

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("jupytext")
pytest.importorskip("nbclient")

COLAB_DIR = Path(__file__).parents[2] / "colab"


def _load_build_script():
    spec = importlib.util.spec_from_file_location("build_notebooks", COLAB_DIR / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load_build_script()


def test_there_are_eight_notebooks():
    assert len(build.notebook_names()) == 8


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Jupyter has warnings of its own
@pytest.mark.parametrize("name", build.notebook_names())
def test_notebook_runs_with_smallest_settings(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFORMER_JAX_NOTEBOOK", "smallest")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for variable, make in STAND_INS.get(name, {}).items():
        monkeypatch.setenv(variable, make(tmp_path / variable.lower()))
    notebook = build.execute(name, timeout=240)
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    printed = "".join(o.text for o in outputs if o.output_type == "stream")
    wants_accelerator = 'print_devices("' in (COLAB_DIR / f"{name}.py").read_text()
    assert ("!!  NO " in printed) == wants_accelerator  # the tests run on a CPU


@pytest.mark.parametrize("name", build.notebook_names())
def test_saved_notebook_is_a_run_of_its_source(name):
    saved = nbformat.read(COLAB_DIR / f"{name}.ipynb", as_version=4)
    source = build.load_source(name)
    assert [c.source for c in saved.cells] == [c.source for c in source.cells]
    code_cells = [c for c in saved.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code_cells] == list(range(1, len(code_cells) + 1))
    outputs = [o for c in code_cells for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 1
    assert f"/colab/{name}.ipynb" in saved.cells[0].source  # the badge opens this notebook


@pytest.mark.parametrize("name", build.notebook_names())
def test_saved_notebook_has_no_local_paths(name):
    lines = (COLAB_DIR / f"{name}.ipynb").read_text().splitlines()
    text = "\n".join(line for line in lines if '"image/png"' not in line)
    local = (tempfile.gettempdir(), str(Path.home()), str(COLAB_DIR.parent))
    assert not [folder for folder in local if f"{folder}/" in text]
