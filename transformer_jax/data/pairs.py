"""Loading of source and target texts for sequence-to-sequence training, and batching by tokens.

The training step is compiled once per batch shape, so pairs are grouped into a few length buckets,
and all rows of a batch are padded to the length of its bucket. Batches of longer rows have fewer
rows, so that all batches contain about the same number of tokens.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from transformer_jax.data.batching import Batch, Loader, process_slice
from transformer_jax.data.sources import (
    TABLE_SUFFIXES,
    Example,
    load_source,
    load_table,
    load_text,
)

# Loading ------------------------------------------------------------------------------------------


def load_aligned_files(source: str | Path, target: str | Path) -> list[Example]:
    """Loads two line-aligned text files (or .gz files) as `{"source", "target"}` examples.

    Line n of one file belongs to line n of the other.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: the files have different numbers of lines, or one side of a pair is empty.
    """
    sides = []
    for path in map(Path, (source, target)):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; give a file with one text per line")
        sides.append([line.strip() for line in load_text(path).rstrip("\n").split("\n")])
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"{source} has {len(sides[0])} lines and {target} has {len(sides[1])}; "
                         "line n of one file must belong to line n of the other")
    return _check_pairs([{"source": s, "target": t} for s, t in zip(*sides)],
                        f"{source}, {target}")


def _check_pairs(pairs: list[Example], origin: str) -> list[Example]:
    for i, pair in enumerate(pairs):
        for side in ("source", "target"):
            if not isinstance(pair[side], str) or not pair[side].strip():
                raise ValueError(f"pair {i + 1} of {origin} has the {side} {pair[side]!r}; give "
                                 "text on both sides, or remove the pair")
    return pairs


def load_pairs(spec: str | Path, split: str, source: str, target: str) -> list[Example]:
    """Loads a split of a parallel dataset as `{"source", "target"}` texts.

    Args:
        spec: one of

            - "tfds:NAME" or "hf:NAME";
            - a .jsonl, .tsv or .csv file (or .gz of one), which is loaded for any `split`;
            - a folder with such a file named after the split, such as train.jsonl;
            - a folder with two line-aligned files per split, as train.de and train.en (or .gz).
        split: name of the split.
        source: column of the source texts, or suffix of their file, such as "de" for
            "tfds:wmt14_translate/de-en" and "article" for "tfds:cnn_dailymail". If the dataset has
            a column "translation" of dicts, the columns are keys of these dicts.
        target: the same for the target texts.

    Raises:
        FileNotFoundError: the dataset or file does not exist, or the folder has no such split.
        ValueError: a column is missing, the files are not line-aligned, or a text is empty.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "train.de").write_text("Ein Hund.")
        >>> _ = (folder / "train.en").write_text("A dog.")
        >>> load_pairs(folder, "train", source="de", target="en")
        [{'source': 'Ein Hund.', 'target': 'A dog.'}]
    """
    path = Path(spec)
    if not str(spec).startswith(("tfds:", "hf:")) and path.is_dir():
        for gz in ("", ".gz"):
            files = [path / f"{split}.{side}{gz}" for side in (source, target)]
            if all(file.is_file() for file in files):
                return load_aligned_files(*files)
        tables = [path / f"{split}{end}{gz}" for end in TABLE_SUFFIXES for gz in ("", ".gz")]
        path = next((file for file in tables if file.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{spec} has no split {split!r}; give a folder with {split}."
                                    f"{source} and {split}.{target}, or with {split}.jsonl")
        spec = path
    if path.is_file():
        return _check_pairs(load_table(path, columns={"source": source, "target": target}),
                            str(spec))
    dataset = load_source(spec, split)
    return _check_pairs([_select_sides(dataset[i], source, target) for i in range(len(dataset))],
                        str(spec))


def _select_sides(example: Mapping[str, Any], source: str, target: str) -> Example:
    texts = example.get("translation", example)
    for name in (source, target):
        if name not in texts:
            raise ValueError(f"the data has no column {name!r}; it has {', '.join(texts)}")
    return {"source": texts[source], "target": texts[target]}


# Batches ------------------------------------------------------------------------------------------


class TokenBudgetBatches:
    """Random access to an endless sequence of batches of pairs, each padded to one bucket length.

    In every epoch the pairs of each bucket are shuffled and divided into batches, and the batches
    of all buckets are shuffled together. Pairs that do not fill a batch are left out of the epoch.

    Args:
        pairs: dicts with the token ids "source" and "target".
        make_row: `make_row(pair, source_length=, target_length=)` returns a dict of arrays; for
            example `objectives.seq2seq.prepare` with the ids of the special tokens filled in.
        buckets: lengths of both sides in ascending order, special tokens included; longer pairs are
            truncated to the last one.
        tokens_per_batch: maximum number of tokens in a global batch: rows times bucket length.
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
        >>> def make_row(pair, source_length, target_length):
        ...     return {"tokens": np.resize(pair["source"], source_length)}
        >>> pairs = [{"source": [1] * n, "target": [2]} for n in (3, 4, 9)]
        >>> batches = TokenBudgetBatches(pairs, make_row, buckets=(8, 16), tokens_per_batch=32)
        >>> [batch["tokens"].shape for batch in batches.evaluation_batches()]
        [(2, 8), (1, 16)]
    """

    def __init__(
        self,
        pairs: Sequence[Mapping[str, Sequence[int]]],
        make_row: Callable[..., Batch],
        *,
        buckets: Sequence[int],
        tokens_per_batch: int,
        seed: int = 0,
        batch_size_multiple: int = 1,
        num_special_tokens: int = 1,
        process_index: int = 0,
        process_count: int = 1,
    ):
        multiple = batch_size_multiple
        if not len(pairs):
            raise ValueError("there are 0 pairs; give at least 1")
        if (not buckets or list(buckets) != sorted(set(buckets))
                or buckets[0] <= num_special_tokens):
            raise ValueError(f"buckets are {list(buckets)}; give ascending lengths above "
                             f"{num_special_tokens}")
        self.batch_sizes = [tokens_per_batch // length // multiple * multiple for length in buckets]
        if not self.batch_sizes[-1]:
            raise ValueError(f"tokens_per_batch {tokens_per_batch} has no room for {multiple} "
                             f"rows of {buckets[-1]} tokens; use at least "
                             f"{multiple * buckets[-1]}")
        self.pairs, self.make_row, self.buckets, self.seed = pairs, make_row, buckets, seed
        lengths = [max(len(p["source"]), len(p["target"])) + num_special_tokens for p in pairs]
        self.bucket_of = np.minimum(np.searchsorted(buckets, lengths), len(buckets) - 1)
        self.num_truncated = int(np.sum(np.asarray(lengths) > buckets[-1]))
        counts = np.bincount(self.bucket_of, minlength=len(buckets))
        # A bucket with fewer pairs than one batch gets smaller batches. Otherwise its pairs would
        # never be used.
        self.batch_sizes = [min(size, max(count // multiple * multiple, multiple))
                            for size, count in zip(self.batch_sizes, counts)]
        self.batches_per_epoch = int(sum(c // n for c, n in zip(counts, self.batch_sizes)))
        self._process_slice = functools.partial(process_slice, process_index, process_count)
        self._plan: tuple[int, list] = (-1, [])  # number and batches of the epoch planned last

    def __len__(self) -> int:
        """Practically infinite."""
        return self.batches_per_epoch * 2**20

    def __getitem__(self, i: int) -> Batch:
        epoch, index = divmod(i, self.batches_per_epoch)
        planned_epoch, plan = self._plan
        if planned_epoch != epoch:
            plan = self._plan_epoch(epoch)
            self._plan = (epoch, plan)
        bucket, indices = plan[index]
        return self._make_batch(indices[self._process_slice(len(indices))], self.buckets[bucket])

    def _plan_epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Returns the bucket and the indices of the pairs of each batch of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        batches = []
        for bucket, size in enumerate(self.batch_sizes):
            indices = rng.permutation(np.flatnonzero(self.bucket_of == bucket))
            batches += [(bucket, indices[k : k + size])
                        for k in range(0, len(indices) - size + 1, size)]
        return [batches[k] for k in rng.permutation(len(batches))]

    def _make_batch(self, indices: np.ndarray, length: int) -> Batch:
        rows = [self.make_row(self.pairs[i], source_length=length, target_length=length)
                for i in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def loader(self, prefetch: int = 2) -> Loader:
        """Returns a loader of the batches, whose state is one number.

        Args:
            prefetch: number of batches that a background thread prepares ahead; 0 for no thread.

        Raises:
            ValueError: no bucket contains enough pairs for a batch.
        """
        if not self.batches_per_epoch:
            raise ValueError(f"{len(self.pairs)} pairs do not fill a batch of "
                             f"{min(self.batch_sizes)} rows in any bucket; give more pairs or "
                             "fewer buckets")
        return Loader(grain.MapDataset.source(self), prefetch)

    def evaluation_batches(self) -> list[Batch]:
        """Returns batches that contain every pair once, ordered by bucket.

        The last batch of each bucket is padded with rows of zeros, whose loss weight is 0.
        """
        batches = []
        for bucket, size in enumerate(self.batch_sizes):
            indices = np.flatnonzero(self.bucket_of == bucket)
            for k in range(0, len(indices), size):
                batch = self._make_batch(indices[k : k + size], self.buckets[bucket])
                batches.append({
                    name: np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])
                    [self._process_slice(size)] for name, x in batch.items()})
        return batches
