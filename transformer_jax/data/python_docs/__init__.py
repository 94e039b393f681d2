"""python_docs: a text corpus made from the documentation in a Python installation.

It needs no download. It is a TFDS builder, registered when this package is imported: use
`tfds.builder("python_docs/documents")` or `python_docs.load("documents", "train")`.
"""

from transformer_jax.data.python_docs.builder import CONFIGS, SPLITS, PythonDocs, build, load

__all__ = ["CONFIGS", "SPLITS", "PythonDocs", "build", "load"]
