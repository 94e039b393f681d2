"""Make the notebooks from their text form, and run them.

    python colab/build.py                       # all: execute as they stand, keep what they print
    python colab/build.py quick_start planner
    python colab/build.py --prose               # those whose code is the same: new prose only
    TRANSFORMER_JAX_NOTEBOOK=smallest python colab/build.py --out /tmp/notebooks

`NAME.py` is the source, in Jupytext's percent form; `NAME.ipynb` beside it is what Colab opens,
with the output of a real run. Each runs in a kernel of its own, in an empty folder. What a notebook
fetches by name can be something local: its settings are environment variables too, such as MODEL and
DATA. Needs `pip install ".[notebooks]"`.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
LOCAL = ("MODEL", "DATA", "TEXT")  # settings of notebooks that may be a folder


def names() -> list[str]:
    """Of all notebooks."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.name != Path(__file__).name)


def read(name: str) -> nbformat.NotebookNode:
    """The notebook without output, as its text says; cells have the same ids each time."""
    notebook = jupytext.read(HERE / f"{name}.py")
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python",
                                        "name": "python3"},
                         "colab": {"name": f"{name}.ipynb", "provenance": []}}
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", {}
    return notebook


def run(name: str, timeout: int = 1200) -> nbformat.NotebookNode:
    """The notebook with the output of a run. An error in a cell is raised."""
    notebook = read(name)
    paths = [str(HERE.parent.resolve()), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=timeout, kernel_name="python3",
                                resources={"metadata": {"path": folder}})
        client.execute(env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))})
    for cell in notebook.cells:
        cell.metadata = {}  # times of day would differ each time
        if cell.cell_type == "code":
            cell.outputs = _public(_joined(cell.outputs))
    return notebook


def _public(outputs: list) -> list:
    """The same with local folders by their last name: where they were concerns nobody. Nor does what
    the TPU compiler says of a machine without a TPU."""
    outputs = [o for o in outputs if not (o.get("name") == "stderr" and "libtpu" in o["text"])]
    text = nbformat.v4.writes(nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell("", outputs=outputs)]))
    for name in LOCAL:
        if (path := os.environ.get(name, "")).startswith("/"):
            text = text.replace(path, Path(path).name)
    return nbformat.v4.reads(text).cells[0].outputs


def update(name: str, folder: Path = HERE) -> bool:
    """The notebook with new prose and the output that it has; False, and nothing done, if its code
    is not that of the text."""
    kept, new = nbformat.read(folder / f"{name}.ipynb", as_version=4), read(name)
    code = [[c.source for c in book.cells if c.cell_type == "code"] for book in (kept, new)]
    if code[0] != code[1]:
        return False
    done = iter([c for c in kept.cells if c.cell_type == "code"])
    for cell in new.cells:
        if cell.cell_type == "code":
            old = next(done)
            cell.outputs, cell.execution_count = old.outputs, old.execution_count
    nbformat.write(new, folder / f"{name}.ipynb")
    return True


def _joined(outputs: list) -> list:
    """Output without what was only shown for a while: progress, and carriage returns."""
    kept = []
    for output in outputs:
        if output.output_type == "stream":
            output.text = "".join(line.rpartition("\r")[2] for line in
                                  output.text.splitlines(keepends=True))
            if kept and kept[-1].output_type == "stream" and kept[-1].name == output.name:
                kept[-1].text += output.text
                continue
        kept.append(output)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=names())
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--prose", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or names():
        if arguments.prose:
            print(f"{name}: {'done' if update(name) else 'its code is another, run it'}")
            continue
        began = time.perf_counter()
        nbformat.write(run(name), arguments.out / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
