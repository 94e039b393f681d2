"""Batches of fixed shape from a random-access source: shuffled, sharded and prefetched with Grain.

Host code in NumPy: it uses no device, so background threads can prepare batches during a training
step. Loaders read their source by index. The state of a loader is therefore one number, and a run
that is resumed with this state receives the batches of an uninterrupted run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

Batch = dict[str, np.ndarray]
Transform = Callable[[Any, np.random.Generator], Mapping[str, Any]]

# Loaders ------------------------------------------------------------------------------------------


class Loader(Iterator[Batch]):
    """Iterator over batches whose position can be saved and restored.

    `get_state` returns the position as a small dict of JSON values; `set_state` moves the iterator
    to such a position.

    Args:
        batches: the batches, with random access.
        prefetch: number of batches that a background thread prepares ahead; 0 for no thread.
    """

    def __init__(self, batches: grain.MapDataset, prefetch: int):
        options = grain.ReadOptions(num_threads=1 if prefetch else 0,
                                    prefetch_buffer_size=prefetch)
        self._batches = batches
        self._iterator = iter(batches.to_iter_dataset(options))

    def __len__(self) -> int:
        """Total number of batches; practically infinite if `num_epochs` is None."""
        return len(self._batches)

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)


def make_loader(
    source: Sequence,
    batch_size: int,
    *,
    transform: Transform | None = None,
    seed: int = 0,
    shuffle: bool = True,
    num_epochs: int | None = None,
    drop_remainder: bool = True,
    prefetch: int = 2,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Makes a loader: an iterator over batches, dicts of NumPy arrays `[batch_size, ...]`.

    For a given seed, the examples of the run and their order do not depend on how often the run
    was interrupted and resumed, nor on the number of processes. Each epoch contains every example
    once, in a new order. A batch may contain the end of one epoch and the start of the next.

    Args:
        source: sequence of examples: dicts of arrays, or inputs of `transform`. If the source has a
            method `take(indices) -> batch` and `transform` is None, batches are made by this method
            instead of row by row (see `PackedTokens.take`).
        batch_size: global batch size, over all processes.
        transform: `transform(example, rng) -> dict` makes one row of the batch. The generator `rng`
            depends on the seed and on the position of the example in the run, so random choices
            differ between epochs.
        seed: seed of the shuffling and of the transform's generators.
        shuffle: whether to shuffle each epoch.
        num_epochs: number of epochs, or None to repeat indefinitely.
        drop_remainder: whether to drop the last batch of the last epoch if it is incomplete. If
            False, the batch is padded with rows of zeros, whose loss weight is 0: for evaluation
            with `num_epochs=1`.
        prefetch: number of batches that a background thread prepares ahead; 0 prepares each batch
            when it is requested.
        process_index: index of this process, which receives its slice of the rows of every batch.
            The slices of all processes in order make up the global batch, so the position of a row
            in the batch does not depend on the number of processes.
        process_count: number of processes.

    Returns:
        The loader; see `Loader`.

    Raises:
        ValueError: the source is empty, its examples do not fill a batch and `drop_remainder` is
            True, `batch_size` is not a multiple of `process_count`, or `process_index` is out of
            range.

    Example:
        >>> source = [{"x": np.int32(i)} for i in range(6)]
        >>> loader = make_loader(source, 4, shuffle=False, num_epochs=1, drop_remainder=False)
        >>> [batch["x"].tolist() for batch in loader]
        [[0, 1, 2, 3], [4, 5, 0, 0]]
    """
    _check_loader(len(source), batch_size, num_epochs, drop_remainder, process_index,
                  process_count)
    # A source with `take` makes whole batches, so the pipeline passes row indices to it.
    takes_indices = transform is None and hasattr(source, "take")
    rows = (grain.MapDataset.range(len(source)) if takes_indices else
            grain.MapDataset.source(source)).seed(seed)
    if shuffle:
        rows = rows.shuffle()
    rows = rows.repeat(num_epochs)
    if transform is not None:
        rows = rows.random_map(transform)
    if num_epochs is not None:
        num_full, remainder = divmod(len(rows), batch_size)
        if remainder and not drop_remainder:
            # `take` returns padding for an index past the end of its source.
            padding = len(source) if takes_indices else _zeros_like(rows[0])
            rows = grain.MapDataset.source(_PaddedRows(rows, (num_full + 1) * batch_size, padding))
        else:
            rows = rows[: num_full * batch_size]
    if process_count > 1:
        rows = grain.MapDataset.source(
            _ProcessRows(rows, batch_size, process_index, process_count))
    batches = rows.batch(batch_size // process_count, drop_remainder=True)
    return Loader(batches.map(source.take) if takes_indices else batches, prefetch)


def process_slice(process_index: int, process_count: int, num_rows: int) -> slice:
    """Returns the slice of a batch's rows that belongs to one process; all slices are equally long.

    Raises:
        ValueError: `num_rows` is not a multiple of `process_count`.

    Example:
        >>> process_slice(1, 4, num_rows=8)
        slice(2, 4, None)
    """
    if num_rows % process_count:
        raise ValueError(f"a batch of {num_rows} rows cannot be split evenly among {process_count} "
                         f"processes; use a multiple of {process_count}")
    per_process = num_rows // process_count
    return slice(process_index * per_process, (process_index + 1) * per_process)


class _ProcessRows:
    """The rows of one process: its slice of every global batch."""

    def __init__(self, rows: Sequence, batch_size: int, process_index: int, process_count: int):
        self._rows, self._batch_size = rows, batch_size
        self._start = process_slice(process_index, process_count, batch_size).start
        self._per_process = batch_size // process_count
        self._length = len(rows) // process_count

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> Any:
        batch, offset = divmod(i, self._per_process)
        return self._rows[batch * self._batch_size + self._start + offset]


class _PaddedRows:
    """Rows, followed by copies of a padding row up to the given length."""

    def __init__(self, rows: Sequence, length: int, padding: Any):
        self._rows, self._length, self._padding = rows, length, padding

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> Any:
        return self._rows[i] if i < len(self._rows) else self._padding


def _zeros_like(row: Mapping[str, Any]) -> Batch:
    return {name: np.zeros_like(value) for name, value in row.items()}


def _check_loader(size, batch_size, num_epochs, drop_remainder, process_index, process_count):
    if size == 0:
        raise ValueError("the source has 0 examples; give at least 1")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} cannot be split evenly among {process_count} "
                         f"processes; use a positive multiple of {process_count}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is out of range for {process_count} "
                         f"processes; use 0 to {process_count - 1}")
    if num_epochs is not None and drop_remainder and size * num_epochs < batch_size:
        raise ValueError(f"batch_size {batch_size} is larger than the {size} examples times "
                         f"{num_epochs} epochs; lower it, or use drop_remainder=False")


# Checks -------------------------------------------------------------------------------------------


def check_batch_ids(
    batch: Mapping[str, np.ndarray] | np.ndarray, vocab_size: int, max_length: int
) -> None:
    """Checks on the host that token ids and positions are within the range of the model.

    An invalid id raises no error on the device: `jnp.take` returns NaN for an id that is too large,
    and a negative id counts from the end of the table and so selects a wrong token.

    Args:
        batch: a batch of a loader, whose "tokens" and targets are checked, or an array of token
            ids whose last axis is the sequence.
        vocab_size: vocabulary size of the model.
        max_length: number of positions of the model.

    Raises:
        ValueError: an id is outside the vocabulary, or a sequence has more than `max_length`
            positions.

    Example:
        >>> check_batch_ids({"tokens": np.array([[3, 4]])}, vocab_size=5, max_length=8)
        >>> check_batch_ids(np.array([[3, 5]]), vocab_size=5, max_length=8)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: token id 5 is outside the vocabulary of 5; ...
    """
    if isinstance(batch, Mapping):
        for name in ("targets", "masked_targets"):
            if name in batch:
                _check_range(name, batch[name], vocab_size)
        positions = batch.get("positions")
        if positions is not None and np.max(positions, initial=0) >= max_length:
            _raise_too_long(int(np.max(positions)) + 1, max_length)
        tokens = batch["tokens"]
    else:
        tokens, positions = batch, None
    _check_range("token", tokens, vocab_size)
    # Explicit positions may restart within a row, which may then be longer than `max_length`.
    if positions is None and np.shape(tokens)[-1] > max_length:
        _raise_too_long(np.shape(tokens)[-1], max_length)


def _check_range(name: str, ids: np.ndarray, vocab_size: int) -> None:
    ids = np.asarray(ids)
    invalid = ids[(ids < 0) | (ids >= vocab_size)]
    if invalid.size:
        name = name.replace("_", " ").removesuffix("s")
        raise ValueError(f"{name} id {invalid.flat[0]} is outside the vocabulary of {vocab_size}; "
                         "use the tokenizer that the model was made for, or raise vocab_size")


def _raise_too_long(length: int, max_length: int) -> None:
    raise ValueError(f"a sequence of {length} tokens is longer than the {max_length} positions of "
                     "the model; truncate the text or raise max_length")
