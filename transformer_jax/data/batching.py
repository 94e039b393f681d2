"""Batches of NumPy arrays, of one length or length-bucketed: shuffled, sharded and prefetched.

Loaders read their source by index. The state of a loader is therefore one number, and a resumed run
receives the batches of an uninterrupted run.
"""

import abc
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

Batch = dict[str, np.ndarray]
Transform = Callable[[Any, np.random.Generator], Mapping[str, Any]]

# Loaders ------------------------------------------------------------------------------------------


class Loader(Iterator[Batch]):
    """Iterator over batches, whose position is saved and restored as a dict of JSON values."""

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
    """Makes an iterator over batches, dicts of NumPy arrays `[batch_size, ...]`, with Grain.

    For a given seed, the examples of the run and their order do not depend on how often the run
    was interrupted and resumed, nor on the number of processes. Each epoch contains every example
    once, in a new order. A batch may contain the end of one epoch and the start of the next.

    Args:
        source: sequence of dicts of arrays, or of inputs of `transform`. If it has a method
            `take(indices) -> batch` and `transform` is None, that method makes whole batches.
        batch_size: global batch size, over all processes.
        transform: `transform(example, rng) -> dict` makes one row. The generator `rng` depends on
            the seed and on the position of the example in the run, so it differs between epochs.
        num_epochs: None to repeat indefinitely.
        drop_remainder: whether to drop the last batch of the last epoch if it is incomplete. If
            False, it is padded with rows of zeros, whose loss weight is 0.
        prefetch: number of batches that a background thread prepares ahead; 0 for no thread.
        process_index: this process, which receives its contiguous slice of every global batch.

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
    if not len(source):
        raise ValueError("the source has 0 examples; give at least 1")
    own = _process_slice(batch_size, process_index, process_count)
    if num_epochs is not None and drop_remainder and len(source) * num_epochs < batch_size:
        raise ValueError(f"batch_size {batch_size} is larger than the {len(source)} examples times "
                         f"{num_epochs} epochs; lower it, or use drop_remainder=False")
    # A source with `take` makes whole batches, so the pipeline passes row indices to it.
    takes_indices = transform is None and hasattr(source, "take")
    rows = (grain.MapDataset.range(len(source)) if takes_indices else
            grain.MapDataset.source(source)).seed(seed)
    if shuffle:
        rows = rows.shuffle()
    rows = rows.repeat(num_epochs)
    if transform is not None:
        rows = rows.random_map(transform)
    if num_epochs is not None and drop_remainder:
        rows = rows[: len(rows) // batch_size * batch_size]
    elif num_epochs is not None:
        # `take` returns padding for an index past the end of its source.
        padding = len(source) if takes_indices else {
            name: np.zeros_like(value) for name, value in rows[0].items()}
        rows = grain.MapDataset.range(-(-len(rows) // batch_size) * batch_size).map(
            lambda i, rows=rows: rows[i] if i < len(rows) else padding)
    per_process = batch_size // process_count
    if process_count > 1:
        rows = grain.MapDataset.range(len(rows) // process_count).map(lambda i, rows=rows: rows[
            i // per_process * batch_size + own.start + i % per_process])
    batches = rows.batch(per_process, drop_remainder=True)
    return Loader(batches.map(source.take) if takes_indices else batches, prefetch)


def _process_slice(num_rows: int, process_index: int, process_count: int) -> slice:
    """Returns the rows of a batch that belong to one process: all slices are equally long."""
    if num_rows < 1 or num_rows % process_count:
        raise ValueError(f"batch_size {num_rows} cannot be split evenly among {process_count} "
                         f"processes; use a positive multiple of {process_count}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is out of range for {process_count} "
                         f"processes; use 0 to {process_count - 1}")
    per_process = num_rows // process_count
    return slice(process_index * per_process, (process_index + 1) * per_process)


# Length buckets -----------------------------------------------------------------------------------


def choose_buckets(lengths: Sequence[int], max_length: int, max_buckets: int) -> list[int]:
    """Chooses at most `max_buckets` row lengths that minimize the padding of rows.

    The buckets, in ascending order, are multiples of 8, which suits vector units, except that the
    last one may be `max_length`; longer rows count as rows of this length. The choice is optimal
    among these: it is found by dynamic programming.

    Example:
        >>> choose_buckets([3, 3, 3, 30], max_length=64, max_buckets=2)
        [8, 32]
    """
    if not len(lengths) or max_length < 1 or max_buckets < 1:
        raise ValueError(f"there are {len(lengths)} lengths, max_length is {max_length} and "
                         f"max_buckets is {max_buckets}; give at least 1 of each")
    rounded = np.minimum(-8 * (-np.asarray(lengths) // 8), max_length)
    edges, count = np.unique(rounded, return_counts=True)
    cumulative = np.concatenate([[0], np.cumsum(count)])
    # best[i]: the fewest tokens to which all rows of length up to edges[i] can be padded, and the
    # buckets for it, of which the last is edges[i].
    best = [(int(edge * num_rows), [int(edge)]) for edge, num_rows in zip(edges, cumulative[1:])]
    for _ in range(min(max_buckets, len(edges)) - 1):
        best = [min([best[i], *(
            (tokens + int(edges[i] * (cumulative[i + 1] - cumulative[j + 1])),
             [*buckets, int(edges[i])]) for j, (tokens, buckets) in enumerate(best[:i]))],
            key=operator.itemgetter(0)) for i in range(len(edges))]
    return best[-1][1]


class BucketedBatches(abc.ABC):
    """Endless sequence of batches, each padded to the smallest bucket that fits its examples.

    The training step is compiled once per bucket. A subclass plans the batches of one period, such
    as an epoch, at a time.

    Args:
        lengths: number of tokens of each example's row, special tokens included.
        make_row: `make_row(example, length)` returns a dict of arrays padded or truncated to
            `length`.
        buckets: row lengths in ascending order; longer rows are truncated to the last one.
        process: `(index, count)` of processes; each receives its slice of every batch.
    """

    period: int  # number of batches that are planned together

    def __init__(
        self, examples: Sequence[Any], lengths: Sequence[int],
        make_row: Callable[[Any, int], Batch], buckets: Sequence[int], process: tuple[int, int],
    ):
        if not len(examples):
            raise ValueError("there are 0 examples; give at least 1")
        if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
            raise ValueError(f"buckets are {list(buckets)}; give positive lengths in ascending "
                             "order")
        self.examples, self.make_row, self.buckets = examples, make_row, tuple(buckets)
        self.lengths = np.minimum(np.asarray(lengths), buckets[-1])
        self._process = process
        self._plan: tuple[int, list[np.ndarray]] = (-1, [])  # the period that was planned last

    @abc.abstractmethod
    def _plan_period(self, number: int) -> list[np.ndarray]:
        """Returns the batches of a period, each as an array of example indices."""

    def __len__(self) -> int:
        return self.period * 2**32  # practically infinite

    def __getitem__(self, i: int) -> Batch:
        number, index = divmod(int(i), self.period)
        if self._plan[0] != number:
            self._plan = (number, self._plan_period(number))
        indices = self._plan[1][index]
        return self._make_batch(indices[_process_slice(len(indices), *self._process)], indices)

    def _make_batch(self, indices: np.ndarray, all_indices: np.ndarray) -> Batch:
        """Makes a batch of the bucket that fits `all_indices`, those of all processes."""
        longest = self.lengths[all_indices].max()
        length = self.buckets[int(np.searchsorted(self.buckets, longest))]
        rows = [self.make_row(self.examples[i], length) for i in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _padded_batches(self, order: np.ndarray, size: int) -> list[Batch]:
        """Returns batches of `size` rows in this order, with the "index" of each row's example.

        The last batch is padded with rows of zeros, whose loss weight is 0 and whose "index" is -1.
        """
        batches = []
        for k in range(0, len(order), size):
            indices = order[k : k + size]
            padding = (0, size - len(indices))
            batch = {name: np.pad(x, [padding] + [(0, 0)] * (x.ndim - 1))
                     for name, x in self._make_batch(indices, indices).items()}
            batch["index"] = np.pad(indices, padding, constant_values=-1).astype(np.int32)
            rows = _process_slice(size, *self._process)
            batches.append({name: x[rows] for name, x in batch.items()})
        return batches

    def loader(self, prefetch: int = 2) -> Loader:
        return Loader(grain.MapDataset.source(self), prefetch)


class LengthBucketedBatches(BucketedBatches):
    """Batches of `batch_size` rows, over all processes; see `BucketedBatches`.

    The examples of several consecutive batches, a group, are sorted by length together, and none is
    left out: every example occurs once per epoch, even if the dataset is small.

    Args:
        group_size: number of batches of a group. It is limited to a quarter of the batches of an
            epoch, and to 1 if there is only one bucket.

    Example:
        >>> texts = ["a", "bb", "ccccccccc", "dd"]
        >>> def make_row(text, length):
        ...     return {"tokens": np.frombuffer(text.ljust(length).encode(), np.uint8)}
        >>> batches = LengthBucketedBatches(
        ...     texts, [len(text) for text in texts], make_row, buckets=[8, 16], batch_size=2)
        >>> [batch["tokens"].shape for batch in batches.evaluation_batches()]
        [(2, 8), (2, 16)]
    """

    def __init__(
        self, examples: Sequence[Any], lengths: Sequence[int],
        make_row: Callable[[Any, int], Batch], *, buckets: Sequence[int], batch_size: int,
        seed: int = 0, group_size: int = 32, process_index: int = 0, process_count: int = 1,
    ):
        super().__init__(examples, lengths, make_row, buckets, (process_index, process_count))
        _process_slice(batch_size, process_index, process_count)
        self.batch_size, self.seed = batch_size, seed
        # Larger groups would give batches whose examples are too similar to one another.
        quarter_epoch = len(examples) // batch_size // 4
        self.period = 1 if len(buckets) == 1 else max(min(group_size, quarter_epoch), 1)

    def _plan_period(self, number: int) -> list[np.ndarray]:
        size = self.period * self.batch_size
        epochs, positions = np.divmod(
            np.arange(number * size, (number + 1) * size), len(self.examples))
        indices = np.concatenate([
            np.random.default_rng((self.seed, int(epoch))).permutation(len(self.examples))[
                positions[epochs == epoch]]
            for epoch in np.unique(epochs)])
        indices = indices[np.argsort(self.lengths[indices], kind="stable")]
        batches = indices.reshape(self.period, self.batch_size)
        return list(batches[np.random.default_rng((self.seed, number, 1)).permutation(self.period)])

    def evaluation_batches(self, batch_size: int | None = None) -> list[Batch]:
        """Returns batches with every example once, sorted by length; see `_padded_batches`."""
        order = np.argsort(self.lengths, kind="stable")
        return self._padded_batches(order, batch_size or self.batch_size)


class TokenBudgetBatches(BucketedBatches):
    """Batches of pairs of texts, of at most a given number of tokens; see `BucketedBatches`.

    In every epoch the pairs of each bucket are shuffled and divided into batches, and the batches
    of all buckets are shuffled together. Pairs that do not fill a batch are left out of the epoch.

    Args:
        pairs: dicts with the token ids "source" and "target".
        buckets: lengths of both sides in ascending order, special tokens included.
        tokens_per_batch: maximum number of source tokens, and also of target tokens, in a global
            batch, padding included: rows times bucket length.
        batch_size_multiple: the number of rows of every global batch is a multiple of this, which
            should be the number of devices of all processes.
        num_special_tokens: number of special tokens that `make_row` adds to a text.

    Attributes:
        batch_sizes: number of rows of a batch, for each bucket.
        period, batches_per_epoch: number of batches of an epoch.
        num_truncated: number of pairs that are longer than the last bucket.

    Example:
        >>> def make_row(pair, length):
        ...     return {"tokens": np.resize(pair["source"], length)}
        >>> pairs = [{"source": [1] * n, "target": [2]} for n in (3, 4, 9)]
        >>> batches = TokenBudgetBatches(pairs, make_row, buckets=(8, 16), tokens_per_batch=32)
        >>> [batch["tokens"].shape for batch in batches.evaluation_batches()]
        [(2, 8), (1, 16)]
    """

    def __init__(
        self, pairs: Sequence[Mapping[str, Sequence[int]]], make_row: Callable[[Any, int], Batch],
        *, buckets: Sequence[int], tokens_per_batch: int, seed: int = 0,
        batch_size_multiple: int = 1, num_special_tokens: int = 1, process_index: int = 0,
        process_count: int = 1,
    ):
        lengths = [max(len(p["source"]), len(p["target"])) + num_special_tokens for p in pairs]
        super().__init__(pairs, lengths, make_row, buckets, (process_index, process_count))
        if buckets[0] <= num_special_tokens:
            raise ValueError(f"buckets are {list(buckets)}; give lengths above the "
                             f"{num_special_tokens} special tokens of a text")
        multiple = batch_size_multiple
        if tokens_per_batch < multiple * buckets[-1]:
            raise ValueError(f"tokens_per_batch {tokens_per_batch} has no room for {multiple} "
                             f"rows of {buckets[-1]} tokens; use at least "
                             f"{multiple * buckets[-1]}")
        self.seed = seed
        self.num_truncated = int(np.sum(np.asarray(lengths) > buckets[-1]))
        bucket_of = np.searchsorted(buckets, self.lengths)
        self._in_bucket = [np.flatnonzero(bucket_of == k) for k in range(len(buckets))]
        # A bucket with fewer pairs than one batch gets smaller batches. Otherwise its pairs would
        # never be used.
        self.batch_sizes = [
            min(tokens_per_batch // length // multiple * multiple,
                max(len(indices) // multiple * multiple, multiple))
            for length, indices in zip(buckets, self._in_bucket)]
        self.period = self.batches_per_epoch = sum(
            len(indices) // size for indices, size in zip(self._in_bucket, self.batch_sizes))

    def _plan_period(self, number: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self.seed, number))
        batches = []
        for in_bucket, size in zip(self._in_bucket, self.batch_sizes):
            indices = rng.permutation(in_bucket)
            batches += [indices[k : k + size] for k in range(0, len(indices) - size + 1, size)]
        return [batches[k] for k in rng.permutation(len(batches))]

    def loader(self, prefetch: int = 2) -> Loader:
        """Returns a loader; raises ValueError if no bucket has enough pairs for a batch."""
        if not self.period:
            raise ValueError(f"{len(self.examples)} pairs do not fill a batch of "
                             f"{min(self.batch_sizes)} rows in any bucket; give more pairs or "
                             "fewer buckets")
        return super().loader(prefetch)

    def evaluation_batches(self) -> list[Batch]:
        """Returns batches with every pair once, ordered by bucket; see `_padded_batches`."""
        return [batch for indices, size in zip(self._in_bucket, self.batch_sizes)
                for batch in self._padded_batches(indices, size)]


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

    Raises:
        ValueError: an id is outside the vocabulary, or a sequence has more than `max_length`
            positions.

    Example:
        >>> check_batch_ids({"tokens": np.array([[3, 4]])}, vocab_size=5, max_length=8)
        >>> check_batch_ids(np.array([[3, 5]]), vocab_size=5, max_length=8)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: token id 5 is outside the vocabulary of 5; ...
    """
    arrays = batch if isinstance(batch, Mapping) else {"tokens": batch}
    for name in ("targets", "masked_targets", "tokens"):
        ids = np.asarray(arrays.get(name, ()))
        if (invalid := ids[(ids < 0) | (ids >= vocab_size)]).size:
            raise ValueError(
                f"{name.replace('_', ' ').removesuffix('s')} id {invalid.flat[0]} is outside the "
                f"vocabulary of {vocab_size}; use the tokenizer that the model was made for, or "
                "raise vocab_size")
    # Explicit positions may restart within a row, which may then be longer than `max_length`.
    positions = arrays.get("positions")
    length = (np.shape(arrays["tokens"])[-1] if positions is None
              else np.max(positions, initial=-1) + 1)
    if length > max_length:
        raise ValueError(f"a sequence of {length} tokens is longer than the {max_length} positions "
                         "of the model; truncate the text or raise max_length")
