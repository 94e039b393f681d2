"""Builds the notebooks from their sources, and executes them.

    python colab/build.py                       # execute all notebooks, and save their outputs
    python colab/build.py quick_start planner
    python colab/build.py --prose               # update only Markdown cells, and keep the outputs
    TRANSFORMER_JAX_NOTEBOOK=smallest python colab/build.py --out /tmp/notebooks

`NAME.py` is the source, in Jupytext's percent format; `NAME.ipynb` beside it is what Colab opens,
with the outputs of a run. Each notebook runs in its own kernel, in an empty folder. Environment
variables configure it; MODEL and DATA can be local folders. Needs `pip install ".[notebooks]"`.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

COLAB_DIR = Path(__file__).parent
PATH_VARIABLES = ("MODEL", "DATA")  # environment variables that may be local folders


def notebook_names() -> list[str]:
    """Returns the names of all notebooks."""
    return sorted(path.stem for path in COLAB_DIR.glob("*.py") if path.name != Path(__file__).name)


def load_source(name: str) -> nbformat.NotebookNode:
    """Loads the source of a notebook, without outputs. Cell ids are deterministic."""
    notebook = jupytext.read(COLAB_DIR / f"{name}.py")
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python",
                                        "name": "python3"},
                         "colab": {"name": f"{name}.ipynb", "provenance": []}}
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", {}
    return notebook


def execute(name: str, timeout: int = 3600) -> nbformat.NotebookNode:
    """Executes a notebook and returns it with its outputs.

    Args:
        name: name of the notebook.
        timeout: time limit for each cell, in seconds.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises an error.
    """
    notebook = load_source(name)
    paths = [str(COLAB_DIR.parent.resolve()), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=timeout, kernel_name="python3",
                                resources={"metadata": {"path": folder}})
        client.execute(env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))})
    for cell in notebook.cells:
        cell.metadata = {}  # remove the execution timestamps, which differ between runs
        if cell.cell_type == "code":
            cell.outputs = _remove_local_paths(_merge_streams(cell.outputs))
    return notebook


def _remove_local_paths(outputs: list) -> list:
    """Replaces paths of local folders with the folder names, and removes the TPU compiler's
    warnings about a missing TPU."""
    outputs = [o for o in outputs if not (o.get("name") == "stderr" and "libtpu" in o["text"])]
    text = nbformat.v4.writes(nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell("", outputs=outputs)]))
    for name in PATH_VARIABLES:
        if (path := os.environ.get(name, "")).startswith("/"):
            text = text.replace(path, Path(path).name)
    return nbformat.v4.reads(text).cells[0].outputs


def _merge_streams(outputs: list) -> list:
    """Merges consecutive outputs of the same stream, and removes text that a progress bar has
    overwritten."""
    merged: list = []
    for output in outputs:
        if output.output_type == "stream":
            output.text = "".join(line.rpartition("\r")[2] for line in
                                  output.text.splitlines(keepends=True))
            if merged and merged[-1].output_type == "stream" and merged[-1].name == output.name:
                merged[-1].text += output.text
                continue
        merged.append(output)
    return merged


def update_prose(name: str, folder: Path = COLAB_DIR) -> bool:
    """Updates the Markdown cells of a notebook and keeps its outputs.

    Returns:
        False if the code cells have changed; the notebook is then not written.
    """
    saved, notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4), load_source(name)
    code = [[c.source for c in book.cells if c.cell_type == "code"] for book in (saved, notebook)]
    if code[0] != code[1]:
        return False
    executed_cells = iter([c for c in saved.cells if c.cell_type == "code"])
    for cell in notebook.cells:
        if cell.cell_type == "code":
            executed = next(executed_cells)
            cell.outputs, cell.execution_count = executed.outputs, executed.execution_count
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of notebooks (default: all)")
    parser.add_argument("--out", type=Path, default=COLAB_DIR, help="output folder")
    parser.add_argument("--prose", action="store_true",
                        help="update only the Markdown cells; do not execute")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or notebook_names():
        if arguments.prose:
            print(f"{name}: "
                  f"{'updated' if update_prose(name) else 'code has changed; run without --prose'}")
            continue
        started = time.perf_counter()
        nbformat.write(execute(name), arguments.out / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
