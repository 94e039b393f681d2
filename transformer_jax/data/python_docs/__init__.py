"""The embedded corpus: documentation that every Python installation carries.

`load("documents", "train")` builds the TFDS data set `python_docs` on first use, in seconds and
without a download, and returns a random-access source.
"""

from transformer_jax.data.python_docs.builder import PythonDocs, load

__all__ = ["PythonDocs", "load"]
