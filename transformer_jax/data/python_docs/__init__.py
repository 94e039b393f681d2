"""python_docs: a text corpus that needs no download, the documentation in a Python installation.

It is a TFDS builder, registered when this package is imported: `tfds.builder(
"python_docs/documents")`, or in short `python_docs.load("documents", "train")`.
"""

from transformer_jax.data.python_docs.builder import CONFIGS, SPLITS, PythonDocs, build, load

__all__ = ["CONFIGS", "SPLITS", "PythonDocs", "build", "load"]
