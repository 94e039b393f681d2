"""Length-bucketed batches, which reduce padding.

Each batch is padded to the smallest bucket (row length) that fits its longest example. The training
step is compiled once per bucket. The batches are an endless sequence of epochs, each in a new
random order. In `LengthBucketedBatches`, all batches have the same number of rows. The examples of
several consecutive batches are sorted by length together, and none is left out: every example
occurs once per epoch, even if the dataset is small. In `TokenBudgetBatches`, the number of rows
depends on the bucket, so that all batches have about the same number of tokens.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from transformer_jax.data.batching import Batch, Loader, process_slice


def choose_buckets(lengths: Sequence[int], max_length: int, max_buckets: int) -> list[int]:
    """Chooses the bucket lengths that minimize the padding of rows with the given lengths.

    Buckets are multiples of 8, which suits vector units, except that the last one may be
    `max_length`. The choice is optimal; it is found by dynamic programming over all such buckets.

    Args:
        lengths: number of tokens of each row.
        max_length: the largest bucket; longer rows count as rows of this length.
        max_buckets: the largest number of buckets.

    Returns:
        At most `max_buckets` lengths in ascending order; the last one fits the longest row.

    Raises:
        ValueError: `lengths` is empty, or `max_length` or `max_buckets` is less than 1.

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
    # cost[i]: number of tokens, padding included, of all rows of length up to edges[i] if they are
    # padded to the buckets best[i], of which the last is edges[i].
    cost, best = edges * cumulative[1:], [[int(edge)] for edge in edges]
    for _ in range(min(max_buckets, len(edges)) - 1):
        # candidates[i][j]: the cost if edges[j] is the last bucket before edges[i].
        candidates = [[cost[j] + edges[i] * (cumulative[i + 1] - cumulative[j + 1])
                       for j in range(i)] for i in range(len(edges))]
        previous = [int(np.argmin(row)) if row and min(row) < cost[i] else None
                    for i, row in enumerate(candidates)]
        best = [best[i] if j is None else [*best[j], int(edges[i])] for i, j in enumerate(previous)]
        cost = np.array([cost[i] if j is None else candidates[i][j]
                         for i, j in enumerate(previous)])
    return best[-1]


class BucketedBatches(abc.ABC):
    """Random access to an endless sequence of batches, each padded to the length of one bucket.

    A subclass plans the batches of one period, such as an epoch, at a time.

    Args:
        examples: the examples; any objects.
        lengths: number of tokens of each example's row, special tokens included.
        make_row: `make_row(example, length)` returns a dict of arrays padded or truncated to
            `length`.
        buckets: row lengths in ascending order; longer rows are truncated to the last one.
        process: `(index, count)`: the index of this process, and the number of processes. Each
            process receives its slice of every batch.

    Raises:
        ValueError: there are no examples, or the buckets are not in ascending order.
    """

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

    @property
    @abc.abstractmethod
    def period(self) -> int:
        """Number of batches that are planned together."""

    @abc.abstractmethod
    def _plan_period(self, number: int) -> list[np.ndarray]:
        """Returns the batches of a period, each as an array of example indices."""

    @abc.abstractmethod
    def evaluation_batches(self) -> list[Batch]:
        """Returns batches that contain every example once."""

    def __len__(self) -> int:
        """Practically infinite."""
        return self.period * 2**32

    def __getitem__(self, i: int) -> Batch:
        number, index = divmod(int(i), self.period)
        if self._plan[0] != number:
            self._plan = (number, self._plan_period(number))
        indices = self._plan[1][index]
        return self._make_batch(indices[process_slice(*self._process, len(indices))],
                                self._bucket_length(indices))

    def _bucket_length(self, indices: np.ndarray) -> int:
        """Returns the smallest bucket that fits all these examples."""
        return self.buckets[int(np.searchsorted(self.buckets, self.lengths[indices].max()))]

    def _make_batch(self, indices: np.ndarray, length: int) -> Batch:
        rows = [self.make_row(self.examples[i], length) for i in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _padded_batches(self, order: np.ndarray, size: int) -> list[Batch]:
        """Returns batches of `size` rows in the given order; the last one is padded.

        The entry "index" holds the index of each row's example. Padding rows have zeros, a loss
        weight of 0 and the "index" -1.
        """
        batches = []
        for k in range(0, len(order), size):
            indices = order[k : k + size]
            batch = self._make_batch(indices, self._bucket_length(indices))
            num_padding = size - len(indices)
            batch = {name: np.concatenate([x, np.zeros((num_padding, *x.shape[1:]), x.dtype)])
                     for name, x in batch.items()}
            batch["index"] = np.pad(indices, (0, num_padding), constant_values=-1).astype(np.int32)
            rows = process_slice(*self._process, size)
            batches.append({name: x[rows] for name, x in batch.items()})
        return batches

    def loader(self, prefetch: int = 2) -> Loader:
        """Returns a loader of the batches, whose state is one number.

        Args:
            prefetch: number of batches that a background thread prepares ahead; 0 for no thread.
        """
        return Loader(grain.MapDataset.source(self), prefetch)


class LengthBucketedBatches(BucketedBatches):
    """Batches with a fixed number of rows, see `BucketedBatches`.

    Args:
        examples: the examples; any objects.
        lengths: number of tokens of each example's row, special tokens included.
        make_row: `make_row(example, length)` returns a dict of arrays padded or truncated to
            `length`.
        buckets: row lengths in ascending order; longer rows are truncated to the last one.
        batch_size: global batch size, over all processes.
        seed: seed of the order of the examples and batches.
        group_size: number of batches in a group, whose examples are sorted by length together. A
            group has at most a quarter of the batches of an epoch (but at least 1 batch), and 1
            batch if there is only one bucket.
        process_index: index of this process, which receives its slice of every batch.
        process_count: number of processes.

    Raises:
        ValueError: there are no examples, the buckets are not in ascending order, or `batch_size`
            is not a multiple of `process_count`.

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
        self,
        examples: Sequence[Any],
        lengths: Sequence[int],
        make_row: Callable[[Any, int], Batch],
        *,
        buckets: Sequence[int],
        batch_size: int,
        seed: int = 0,
        group_size: int = 32,
        process_index: int = 0,
        process_count: int = 1,
    ):
        super().__init__(examples, lengths, make_row, buckets, (process_index, process_count))
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(f"batch_size {batch_size} cannot be split evenly among "
                             f"{process_count} processes; use a positive multiple of "
                             f"{process_count}")
        self.batch_size, self.seed = batch_size, seed
        # Larger groups would give batches whose examples are too similar to one another.
        quarter_epoch = len(examples) // batch_size // 4
        self._group_size = 1 if len(buckets) == 1 else max(min(group_size, quarter_epoch), 1)

    @property
    def period(self) -> int:
        return self._group_size

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
        """Returns batches that contain every example once, sorted by length.

        The entry "index" of a batch holds the index of each row's example. The last batch is padded
        with rows of zeros, whose loss weight is 0 and whose "index" is -1.

        Args:
            batch_size: global batch size; `self.batch_size` if None.
        """
        order = np.argsort(self.lengths, kind="stable")
        return self._padded_batches(order, batch_size or self.batch_size)


class TokenBudgetBatches(BucketedBatches):
    """Batches of pairs of texts, of at most a given number of tokens, see `BucketedBatches`.

    In every epoch the pairs of each bucket are shuffled and divided into batches, and the batches
    of all buckets are shuffled together. Pairs that do not fill a batch are left out of the epoch.

    Args:
        pairs: dicts with the token ids "source" and "target".
        make_row: `make_row(pair, length)` returns a dict of arrays, with both sides padded or
            truncated to `length`.
        buckets: lengths of both sides in ascending order, special tokens included; longer pairs are
            truncated to the last one.
        tokens_per_batch: maximum number of source tokens, and also of target tokens, in a global
            batch, padding included: rows times bucket length.
        seed: seed of the order of pairs and batches.
        batch_size_multiple: the number of rows of every global batch is a multiple of this, which
            should be the number of devices of all processes.
        num_special_tokens: number of special tokens that `make_row` adds to a text.
        process_index: index of this process, which receives its slice of every batch.
        process_count: number of processes.

    Attributes:
        batch_sizes: number of rows of a batch, for each bucket.
        batches_per_epoch: number of batches of an epoch.
        num_truncated: number of pairs that are longer than the last bucket.

    Raises:
        ValueError: there are no pairs, the buckets are not in ascending order, or
            `tokens_per_batch` is too small for `batch_size_multiple` rows of the last bucket.

    Example:
        >>> def make_row(pair, length):
        ...     return {"tokens": np.resize(pair["source"], length)}
        >>> pairs = [{"source": [1] * n, "target": [2]} for n in (3, 4, 9)]
        >>> batches = TokenBudgetBatches(pairs, make_row, buckets=(8, 16), tokens_per_batch=32)
        >>> [batch["tokens"].shape for batch in batches.evaluation_batches()]
        [(2, 8), (1, 16)]
    """

    def __init__(
        self,
        pairs: Sequence[Mapping[str, Sequence[int]]],
        make_row: Callable[[Any, int], Batch],
        *,
        buckets: Sequence[int],
        tokens_per_batch: int,
        seed: int = 0,
        batch_size_multiple: int = 1,
        num_special_tokens: int = 1,
        process_index: int = 0,
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
        self._bucket_of = np.searchsorted(buckets, self.lengths)
        counts = np.bincount(self._bucket_of, minlength=len(buckets))
        # A bucket with fewer pairs than one batch gets smaller batches. Otherwise its pairs would
        # never be used.
        self.batch_sizes = [
            min(tokens_per_batch // length // multiple * multiple,
                max(count // multiple * multiple, multiple))
            for length, count in zip(buckets, counts)]
        self.batches_per_epoch = int(sum(c // n for c, n in zip(counts, self.batch_sizes)))

    @property
    def period(self) -> int:
        return self.batches_per_epoch

    def _plan_period(self, number: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self.seed, number))
        batches = []
        for bucket, size in enumerate(self.batch_sizes):
            indices = rng.permutation(np.flatnonzero(self._bucket_of == bucket))
            batches += [indices[k : k + size] for k in range(0, len(indices) - size + 1, size)]
        return [batches[k] for k in rng.permutation(len(batches))]

    def loader(self, prefetch: int = 2) -> Loader:
        """Returns a loader as `BucketedBatches.loader` does.

        Raises:
            ValueError: no bucket contains enough pairs for a batch.
        """
        if not self.batches_per_epoch:
            raise ValueError(f"{len(self.examples)} pairs do not fill a batch of "
                             f"{min(self.batch_sizes)} rows in any bucket; give more pairs or "
                             "fewer buckets")
        return super().loader(prefetch)

    def evaluation_batches(self) -> list[Batch]:
        """Returns batches that contain every pair once, ordered by bucket.

        The last batch of each bucket is padded as those of `LengthBucketedBatches`.
        """
        return [batch for bucket, size in enumerate(self.batch_sizes)
                for batch in self._padded_batches(np.flatnonzero(self._bucket_of == bucket), size)]
