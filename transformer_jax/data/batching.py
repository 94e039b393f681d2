"""From examples to batches of fixed shapes: tokenize once, pack, shuffle, batch (Grain).

NumPy only: what runs here competes with nothing on the device, and batches can be made in other
threads. Every loader is random access underneath, so its state is one number and it resumes
exactly.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

Batch = dict[str, np.ndarray]
Transform = Callable[[Any, np.random.Generator], Mapping[str, Any]]

# Loaders ------------------------------------------------------------------------------------------


class Loader(Iterator[Batch]):
    """Batches in order; `get_state` and `set_state` (a small dict, fit for JSON) move in it."""

    def __init__(self, batches: grain.MapDataset, prefetch: int):
        options = grain.ReadOptions(num_threads=1 if prefetch else 0,
                                    prefetch_buffer_size=prefetch)
        self._batches = batches
        self._iterator = iter(batches.to_iter_dataset(options))

    def __len__(self) -> int:
        """Batches in all; practically infinite without num_epochs."""
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
    """Batches of a source: dicts of NumPy arrays with a leading dimension of `batch_size`.

    Example n of the run is the same for the same seed, however often the run was stopped and on
    however many hosts it runs. Each epoch is in another order and holds every example once;
    batches go on over its end.

    Args:
        source: dicts of arrays, or whatever `transform` takes. If it has `take(rows) -> batch`, and
            there is no transform, that makes the batches (see `PackedTokens.take`).
        batch_size: of all hosts together.
        transform: `transform(example, rng) -> dict` makes a row; rng depends on the seed and on
            the example's number in the run, so other epochs draw otherwise.
        num_epochs: None for ever.
        drop_remainder: drop the last batch of the last epoch if it is not full. False fills it
            with rows of zeros, which weigh nothing: for evaluation with num_epochs=1.
        prefetch: batches made ahead in a thread; 0 makes each when it is asked for.
        process_index, process_count: this host takes its part of the rows of each batch. The parts
            in order are the batch, so that what depends on a row's place depends on no host.

    Raises:
        ValueError: the source is empty, or too small for one batch, or batch_size does not divide
            by process_count.
    """
    _check_loader(len(source), batch_size, num_epochs, drop_remainder, process_index,
                  process_count)
    # Sources with `take` make a batch at once: for them the pipeline carries numbers of rows.
    at_once = transform is None and hasattr(source, "take")
    rows = (grain.MapDataset.range(len(source)) if at_once else
            grain.MapDataset.source(source)).seed(seed)
    if shuffle:
        rows = rows.shuffle()
    rows = rows.repeat(num_epochs)
    if transform is not None:
        rows = rows.random_map(transform)
    if num_epochs is not None:
        whole, rest = divmod(len(rows), batch_size)
        if rest and not drop_remainder:
            padding = len(source) if at_once else _zeros_like(rows[0])
            rows = grain.MapDataset.source(_Filled(rows, (whole + 1) * batch_size, padding))
        else:
            rows = rows[: whole * batch_size]
    if process_count > 1:
        rows = grain.MapDataset.source(_Part(rows, batch_size, process_index, process_count))
    batches = rows.batch(batch_size // process_count, drop_remainder=True)
    return Loader(batches.map(source.take) if at_once else batches, prefetch)


def process_rows(process_index: int, process_count: int, rows: int) -> slice:
    """The rows of one process among those of a batch, which all processes share equally.

    Raises:
        ValueError: they cannot.
    """
    if rows % process_count:
        raise ValueError(f"a batch of {rows} rows cannot be shared by {process_count} processes; "
                         "make it a multiple of their number")
    own = rows // process_count
    return slice(process_index * own, (process_index + 1) * own)


class _Part:
    """The rows of one process, in batches that `part` cuts."""

    def __init__(self, rows: Sequence, batch_size: int, process_index: int, process_count: int):
        self._rows, self._batch_size = rows, batch_size
        self._first = process_rows(process_index, process_count, batch_size).start
        self._own, self._length = batch_size // process_count, len(rows) // process_count

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> Any:
        batch, place = divmod(i, self._own)
        return self._rows[batch * self._batch_size + self._first + place]


class _Filled:
    """Rows, and the same padding row up to a length."""

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
        raise ValueError(f"batch_size {batch_size} cannot be shared by {process_count} processes; "
                         "use a multiple of their number")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is outside the {process_count} processes; "
                         f"use 0 to {process_count - 1}")
    if num_epochs is not None and drop_remainder and size * num_epochs < batch_size:
        raise ValueError(f"batch_size {batch_size} is larger than the {size} examples times "
                         f"{num_epochs} epochs; lower it, or use drop_remainder=False")


# Checks -------------------------------------------------------------------------------------------


def check_batch_ids(
    batch: Mapping[str, np.ndarray] | np.ndarray, vocab_size: int, max_length: int
) -> None:
    """Checks ids on the host. On the device nothing would: `jnp.take` gives rows of NaN for an id
    behind the end of the table, and counts a negative one from the end, a wrong token in silence.

    Args:
        batch: rows of a loader, of which "tokens" and all targets are looked at, or an array of
            ids whose last axis is the sequence.
        vocab_size, max_length: the model's.

    Raises:
        ValueError: an id is outside the vocabulary, or a sequence is longer than the positions.
    """
    if isinstance(batch, Mapping):
        for name in ("targets", "masked_targets"):
            if name in batch:
                _check_range(name, batch[name], vocab_size)
        positions = batch.get("positions")
        if positions is not None and np.max(positions, initial=0) >= max_length:
            _too_long(int(np.max(positions)) + 1, max_length)
        tokens = batch["tokens"]
    else:
        tokens, positions = batch, None
    _check_range("token", tokens, vocab_size)
    # Positions that are given may restart, so that a row is longer than they reach.
    if positions is None and np.shape(tokens)[-1] > max_length:
        _too_long(np.shape(tokens)[-1], max_length)


def _check_range(name: str, ids: np.ndarray, vocab_size: int) -> None:
    ids = np.asarray(ids)
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        name = name.replace("_", " ").removesuffix("s")
        raise ValueError(f"{name} id {wrong.flat[0]} is outside the vocabulary of {vocab_size}; "
                         "use the tokenizer that the model was made for, or raise vocab_size")


def _too_long(length: int, max_length: int) -> None:
    raise ValueError(f"a sequence of {length} tokens is longer than the {max_length} positions of "
                     "the model; cut the text or raise max_length")
