"""Batches of rows of like lengths, so that short texts do not pay for long ones.

The run is an endless row of epochs, each in another order. It is cut into groups of some batches;
within a group examples are sorted by length, cut into batches, and each batch is padded to the
first bucket that holds its longest example: as many shapes, and compilations, as buckets. Every
batch is full and every example comes once an epoch, however few there are.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from transformer_jax.data.batching import Batch, Loader, process_rows


def choose_buckets(lengths: Sequence[int], limit: int, most: int) -> list[int]:
    """At most so many buckets, under which rows of these lengths are padded the least.

    They are multiples of 8, which vector units want, and the last is the longest row's or `limit`;
    chosen by dynamic programming over all of them.

    Raises:
        ValueError: no lengths, or a limit or number below 1.
    """
    if not len(lengths) or limit < 1 or most < 1:
        raise ValueError(f"{len(lengths)} lengths, limit {limit}, most {most}; give at least 1")
    rounded = np.minimum(-8 * (-np.asarray(lengths) // 8), limit)
    edges, count = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(count)])
    # cost[i]: padded tokens of the rows up to edge i, its buckets ending there in best[i].
    cost, best = edges * below[1:], [[int(edge)] for edge in edges]
    for _ in range(min(most, len(edges)) - 1):
        through = [[cost[j] + edges[i] * (below[i + 1] - below[j + 1]) for j in range(i)]
                   for i in range(len(edges))]
        last = [int(np.argmin(row)) if row and min(row) < cost[i] else None
                for i, row in enumerate(through)]
        best = [best[i] if j is None else [*best[j], int(edges[i])] for i, j in enumerate(last)]
        cost = np.array([cost[i] if j is None else through[i][j] for i, j in enumerate(last)])
    return best[-1]


class LengthBucketedBatches:
    """Random access to the batches of a run.

    Args:
        examples: anything.
        lengths: of each example's row in tokens, special ones included.
        make_row: `make_row(example, length)` gives a row of arrays padded to `length`; it cuts what
            is longer.
        buckets: ascending lengths; what is longer than the last is cut to it.
        batch_size: rows, of all hosts together.
        group: how many batches are sorted together, at most: a quarter of an epoch, and one where
            there is one bucket.

    Raises:
        ValueError: no examples, buckets that do not ascend, or a batch_size that does not divide by
            process_count.
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
        group: int = 32,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not len(examples):
            raise ValueError("there are 0 examples; give at least 1")
        if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
            raise ValueError(f"buckets are {list(buckets)}; give ascending lengths")
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(f"batch_size {batch_size} cannot be shared by {process_count} "
                             "processes; use a multiple of their number")
        self.examples, self.make_row, self.buckets = examples, make_row, tuple(buckets)
        self.lengths = np.minimum(np.asarray(lengths), buckets[-1])
        self.batch_size, self.seed = batch_size, seed
        # Sorting much of an epoch together would fill batches with like examples.
        quarter = len(examples) // batch_size // 4
        self.group = 1 if len(buckets) == 1 else max(min(group, quarter), 1)
        self._part = functools.partial(process_rows, process_index, process_count)
        self._plan: tuple[int, list[np.ndarray]] = (-1, [])

    def __len__(self) -> int:
        """Practically endless."""
        return 2**40 // self.batch_size

    def __getitem__(self, i: int) -> Batch:
        number, place = divmod(int(i), self.group)
        known, plan = self._plan
        if known != number:
            plan = self._deal(number)
            self._plan = (number, plan)
        return self._batch(plan[place])

    def _deal(self, number: int) -> list[np.ndarray]:
        """The batches of one group, as numbers of examples."""
        size = self.group * self.batch_size
        epochs, places = np.divmod(np.arange(number * size, (number + 1) * size),
                                   len(self.examples))
        members = np.concatenate([
            np.random.default_rng((self.seed, int(epoch))).permutation(len(self.examples))[
                places[epochs == epoch]]
            for epoch in np.unique(epochs)])
        members = members[np.argsort(self.lengths[members], kind="stable")]
        batches = members.reshape(self.group, self.batch_size)
        order = np.random.default_rng((self.seed, number, 1)).permutation(self.group)
        return [batches[k] for k in order]

    def _batch(self, members: np.ndarray) -> Batch:
        bucket = int(np.searchsorted(self.buckets, self.lengths[members].max()))
        rows = [self.make_row(self.examples[j], self.buckets[bucket])
                for j in members[self._part(len(members))]]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def loader(self, prefetch: int = 2) -> Loader:
        """The batches in order, made ahead in a thread; its state is one number."""
        return Loader(grain.MapDataset.source(self), prefetch)

    def evaluation(self, batch_size: int | None = None) -> list[Batch]:
        """Every example once, sorted by length, with "index", its number among the examples.

        The last batch is filled with rows of zeros, which weigh nothing and have the index -1.
        """
        size = batch_size or self.batch_size
        order = np.argsort(self.lengths, kind="stable")
        batches = []
        for k in range(0, len(order), size):
            members = order[k : k + size]
            bucket = int(np.searchsorted(self.buckets, self.lengths[members].max()))
            rows = [self.make_row(self.examples[j], self.buckets[bucket]) for j in members]
            batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            missing = size - len(members)
            batch = {name: np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])
                     for name, x in batch.items()}
            batch["index"] = np.pad(members, (0, missing), constant_values=-1).astype(np.int32)
            batches.append({name: x[self._part(size)] for name, x in batch.items()})
        return batches
