"""From text to batches, on the host and in NumPy: sources, tokenizers, Grain pipelines."""
