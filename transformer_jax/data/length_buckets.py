"""Length-bucketed batches of single sequences, which reduce padding.

The run is an endless sequence of epochs, each in a new random order, and is divided into groups of
consecutive batches. The examples of a group are sorted by length and divided into batches, and each
batch is padded to the smallest bucket (row length) that fits its longest example. The training step
is compiled once per bucket. Every batch is full, and every example occurs once per epoch, even if
the dataset is small.
"""

import functools
from collections.abc import Callable, Sequence
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


class LengthBucketedBatches:
    """Random access to an endless sequence of batches, each padded to the length of one bucket.

    Args:
        examples: the examples; any objects.
        lengths: number of tokens of each example's row, special tokens included.
        make_row: `make_row(example, length)` returns a dict of arrays padded or truncated to
            `length`.
        buckets: row lengths in ascending order; longer rows are truncated to the last one.
        batch_size: global batch size, over all processes.
        seed: seed of the order of the examples and batches.
        group_size: number of batches in a group, whose examples are sorted by length together. It
            is reduced to a quarter of an epoch, and to 1 if there is only one bucket.
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
        if not len(examples):
            raise ValueError("there are 0 examples; give at least 1")
        if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
            raise ValueError(f"buckets are {list(buckets)}; give positive lengths in ascending "
                             "order")
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(f"batch_size {batch_size} cannot be split evenly among "
                             f"{process_count} processes; use a positive multiple of "
                             f"{process_count}")
        self.examples, self.make_row, self.buckets = examples, make_row, tuple(buckets)
        self.lengths = np.minimum(np.asarray(lengths), buckets[-1])
        self.batch_size, self.seed = batch_size, seed
        # Larger groups would give batches whose examples are too similar to one another.
        quarter_epoch = len(examples) // batch_size // 4
        self.group_size = 1 if len(buckets) == 1 else max(min(group_size, quarter_epoch), 1)
        self._process_slice = functools.partial(process_slice, process_index, process_count)
        # Number and batches of the group that was planned last.
        self._plan: tuple[int, list[np.ndarray]] = (-1, [])

    def __len__(self) -> int:
        """Practically infinite."""
        return 2**40 // self.batch_size

    def __getitem__(self, i: int) -> Batch:
        group, index = divmod(int(i), self.group_size)
        planned_group, plan = self._plan
        if planned_group != group:
            plan = self._plan_group(group)
            self._plan = (group, plan)
        indices = plan[index]
        return self._make_batch(indices[self._process_slice(len(indices))],
                                self._bucket_length(indices))

    def _plan_group(self, group: int) -> list[np.ndarray]:
        """Returns the batches of a group, each as an array of example indices."""
        size = self.group_size * self.batch_size
        epochs, positions = np.divmod(
            np.arange(group * size, (group + 1) * size), len(self.examples))
        indices = np.concatenate([
            np.random.default_rng((self.seed, int(epoch))).permutation(len(self.examples))[
                positions[epochs == epoch]]
            for epoch in np.unique(epochs)])
        indices = indices[np.argsort(self.lengths[indices], kind="stable")]
        batches = indices.reshape(self.group_size, self.batch_size)
        order = np.random.default_rng((self.seed, group, 1)).permutation(self.group_size)
        return [batches[k] for k in order]

    def _bucket_length(self, indices: np.ndarray) -> int:
        """Returns the smallest bucket that fits all these examples."""
        return self.buckets[int(np.searchsorted(self.buckets, self.lengths[indices].max()))]

    def _make_batch(self, indices: np.ndarray, length: int) -> Batch:
        rows = [self.make_row(self.examples[i], length) for i in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def loader(self, prefetch: int = 2) -> Loader:
        """Returns a loader of the batches, whose state is one number.

        Args:
            prefetch: number of batches that a background thread prepares ahead; 0 for no thread.
        """
        return Loader(grain.MapDataset.source(self), prefetch)

    def evaluation_batches(self, batch_size: int | None = None) -> list[Batch]:
        """Returns batches that contain every example once, sorted by length.

        The entry "index" of a batch holds the index of each row's example. The last batch is padded
        with rows of zeros, whose loss weight is 0 and whose "index" is -1.

        Args:
            batch_size: global batch size; `self.batch_size` if None.
        """
        size = batch_size or self.batch_size
        order = np.argsort(self.lengths, kind="stable")
        batches = []
        for k in range(0, len(order), size):
            indices = order[k : k + size]
            batch = self._make_batch(indices, self._bucket_length(indices))
            num_padding = size - len(indices)
            batch = {name: np.concatenate([x, np.zeros((num_padding, *x.shape[1:]), x.dtype)])
                     for name, x in batch.items()}
            batch["index"] = np.pad(indices, (0, num_padding), constant_values=-1).astype(np.int32)
            batches.append({name: x[self._process_slice(size)] for name, x in batch.items()})
        return batches
