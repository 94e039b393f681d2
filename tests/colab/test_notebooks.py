"""Every notebook runs from a clean kernel at its smallest, and is what its text form says."""

import importlib.util
from pathlib import Path

import pytest
from stand_ins import STAND_INS

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("jupytext")
pytest.importorskip("nbclient")

COLAB = Path(__file__).parents[2] / "colab"


def _build():
    spec = importlib.util.spec_from_file_location("build_notebooks", COLAB / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _build()


def test_there_are_eight():
    assert len(build.names()) == 8


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Jupyter's own
@pytest.mark.parametrize("name", build.names())
def test_it_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFORMER_JAX_NOTEBOOK", "smallest")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for variable, make in STAND_INS.get(name, {}).items():
        monkeypatch.setenv(variable, make(tmp_path / variable.lower()))
    done = build.run(name, timeout=240)
    shown = [o for cell in done.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [o for o in shown if o.output_type == "error"]
    assert any("image/png" in o.get("data", {}) for o in shown)  # something is drawn
    said = "".join(o.text for o in shown if o.output_type == "stream")
    asks = 'print_devices("' in (COLAB / f"{name}.py").read_text()
    assert ("!!  NO " in said) == asks  # this is a CPU, and that is said where it matters


@pytest.mark.parametrize("name", build.names())
def test_what_is_kept_is_a_run_of_the_text(name):
    kept = nbformat.read(COLAB / f"{name}.ipynb", as_version=4)
    text = build.read(name)
    assert [c.source for c in kept.cells] == [c.source for c in text.cells]
    code = [c for c in kept.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 1
    assert f"/colab/{name}.ipynb" in kept.cells[0].source  # its badge opens itself
