"""A corpus that needs no download: the documentation in every Python installation.

A TFDS builder, registered by importing this package: `tfds.builder("python_docs/documents")`, or
shorter `python_docs.load("documents", "train")`.
"""

from transformer_jax.data.python_docs.builder import CONFIGS, SPLITS, PythonDocs, load, prepare

__all__ = ["CONFIGS", "SPLITS", "PythonDocs", "load", "prepare"]
