"""Generation of a text for each of many rows of token ids, in batches of similar lengths."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from transformer_jax.generation.api import generate
from transformer_jax.generation.decoding import transpose_kernels_for_decoding
from transformer_jax.models import GPT, Model


def generate_texts(
    model: Model, params: dict, tokenizer: Any, rows: Sequence[Sequence[int]], *,
    batch_size: int = 64, **options: Any,
) -> list[str]:
    """Generates a text for each row: the target of an encoder-decoder, or a GPT's continuation.

    Args:
        model: a GPT or an encoder-decoder.
        params: its parameters.
        tokenizer: the tokenizer of the model (`data.tokenizers`), which decodes the generated ids.
        rows: token ids of the prompts, or of the sources of an encoder-decoder.
        batch_size: number of rows, of similar lengths, that are decoded together.
        options: options of `generate`, such as num_beams. A key `rng` is folded with the number of
            each batch.

    Raises:
        ValueError: `num_return_sequences` is above 1, or as in `generate`.
    """
    if (count := options.get("num_return_sequences", 1)) != 1:
        raise ValueError(f"num_return_sequences is {count}; it must be 1, because one text is "
                         "returned for each row. Repeat the rows, or call generation.generate")
    rng = options.pop("rng", None)
    params = transpose_kernels_for_decoding(model, params)
    texts: dict[int, str] = {}
    for k, (members, batch) in enumerate(length_sorted_batches(rows, batch_size)):
        if rng is not None:
            options["rng"] = jax.random.fold_in(rng, k)
        start = max(map(len, batch)) if isinstance(model, GPT) else 0
        for i, row in zip(members, generate(model, params, batch, **options)):
            texts[i] = tokenizer.decode(row[start:]).strip()
    return [texts[i] for i in range(len(rows))]


def length_sorted_batches(
    rows: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], list[Sequence[int]]]]:
    """Yields batches of rows of similar lengths, as (indices, rows).

    The last batch is padded with copies of its last row, so that all batches have the same size,
    which avoids a recompilation.

    Example:
        >>> list(length_sorted_batches([[1, 2, 3], [4], [5, 6]], batch_size=2))
        [([1, 2], [[4], [5, 6]]), ([0], [[1, 2, 3], [1, 2, 3]])]
    """
    order = np.argsort([len(row) for row in rows], kind="stable")
    for k in range(0, len(order), batch_size):
        members = [int(i) for i in order[k : k + batch_size]]
        yield members, [rows[i] for i in members] + (
            [rows[members[-1]]] * (batch_size - len(members)))
