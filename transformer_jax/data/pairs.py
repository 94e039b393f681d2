"""Pairs of texts, a source and its target: where they come from, and batches of like lengths.

Rows of a batch are padded to one shape, and each shape is compiled once, so pairs are sorted into a
few buckets of length. A batch holds about the same number of tokens whatever its bucket.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from transformer_jax.data.batching import Batch, Loader, process_rows
from transformer_jax.data.sources import TABLE_SUFFIXES, Example, _read_text, load_source, table

# Sources ------------------------------------------------------------------------------------------


def aligned_files(source: str | Path, target: str | Path) -> list[Example]:
    """Line n of one file with line n of the other (or of .gz files) as `{"source", "target"}`.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: the files have unlike numbers of lines, or one side of a pair is empty.
    """
    sides = []
    for path in map(Path, (source, target)):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; give a file with one text a line")
        sides.append([line.strip() for line in _read_text(path).rstrip("\n").split("\n")])
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"{source} has {len(sides[0])} lines and {target} {len(sides[1])}; line n "
                         "of one has to belong to line n of the other")
    return _checked([{"source": s, "target": t} for s, t in zip(*sides)], f"{source}, {target}")


def _checked(pairs: list[Example], where: str) -> list[Example]:
    for i, pair in enumerate(pairs):
        for side in ("source", "target"):
            if not isinstance(pair[side], str) or not pair[side].strip():
                raise ValueError(f"pair {i + 1} of {where} has the {side} {pair[side]!r}; give "
                                 "text on both sides, or remove the pair")
    return pairs


def load_pairs(spec: str | Path, split: str, source: str, target: str) -> list[Example]:
    """A split of a set of pairs as `{"source", "target"}` texts.

    `spec` is "tfds:NAME" or "hf:NAME", whose columns `source` and `target` name (for
    tfds:wmt14_translate/de-en "de" and "en", for tfds:cnn_dailymail "article" and "highlights"); a
    .jsonl, .tsv or .csv file, likewise; or a folder with a file `split` of that kind, or with the
    aligned files `split`.`source` and `split`.`target` (train.de, train.en; or .gz). The columns
    of a Hugging Face translation may be inside the one called "translation".

    Raises:
        FileNotFoundError: there is no such data set, file, or split of a folder.
        ValueError: a column is missing, lines do not match, or a text is empty.
    """
    path = Path(spec)
    if not str(spec).startswith(("tfds:", "hf:")) and path.is_dir():
        for gz in ("", ".gz"):
            files = [path / f"{split}.{side}{gz}" for side in (source, target)]
            if all(file.is_file() for file in files):
                return aligned_files(*files)
        tables = [path / f"{split}{end}{gz}" for end in TABLE_SUFFIXES for gz in ("", ".gz")]
        path = next((file for file in tables if file.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{spec} has no split {split!r}; give a folder with {split}."
                                    f"{source} and {split}.{target}, or with {split}.jsonl")
        spec = path
    if path.is_file():
        return _checked(table(path, columns={"source": source, "target": target}), str(spec))
    found = load_source(spec, split)
    return _checked([_sides(found[i], source, target) for i in range(len(found))], str(spec))


def _sides(example: Mapping[str, Any], source: str, target: str) -> Example:
    texts = example.get("translation", example)
    for name in (source, target):
        if name not in texts:
            raise ValueError(f"the data has no column {name!r}; it has {', '.join(texts)}")
    return {"source": texts[source], "target": texts[target]}


# Batches ------------------------------------------------------------------------------------------


class TokenBudgetBatches:
    """Random access to the batches of an endless run over pairs, each of one bucket's shape.

    Every epoch deals the pairs anew, by the seed: within a bucket in random order, then batches of
    all buckets mixed. What does not fill a batch waits for the next epoch's deal.

    Args:
        pairs: dicts of ids, "source" and "target".
        make_row: `make_row(pair, source_length=, target_length=)` gives a row of arrays, such as
            `objectives.seq2seq.prepare` with the special tokens filled in.
        buckets: lengths, ascending, of both sides with their special tokens; what is longer than
            the last is cut to it.
        tokens_per_batch: rows times length, at most; of all hosts together.
        rows_multiple: the number of rows is a multiple of it: the devices of all hosts.
        special: special tokens a text gets, counted into its length.

    Raises:
        ValueError: no pairs, buckets that do not ascend, or tokens_per_batch too small for a row on
            each device.
    """

    def __init__(
        self,
        pairs: Sequence[Mapping[str, Sequence[int]]],
        make_row: Callable[..., Batch],
        *,
        buckets: Sequence[int],
        tokens_per_batch: int,
        seed: int = 0,
        rows_multiple: int = 1,
        special: int = 1,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not len(pairs):
            raise ValueError("there are 0 pairs; give at least 1")
        if list(buckets) != sorted(set(buckets)) or not buckets or buckets[0] <= special:
            raise ValueError(f"buckets are {list(buckets)}; give ascending lengths above {special}")
        self.rows = [tokens_per_batch // length // rows_multiple * rows_multiple
                     for length in buckets]
        if not self.rows[-1]:
            raise ValueError(f"tokens_per_batch {tokens_per_batch} has no room for {rows_multiple} "
                             f"rows of {buckets[-1]} tokens; use at least "
                             f"{rows_multiple * buckets[-1]}")
        self.pairs, self.make_row, self.buckets, self.seed = pairs, make_row, buckets, seed
        longest = [max(len(p["source"]), len(p["target"])) + special for p in pairs]
        self.bucket_of = np.minimum(np.searchsorted(buckets, longest), len(buckets) - 1)
        self.num_cut = int(np.sum(np.asarray(longest) > buckets[-1]))
        counts = np.bincount(self.bucket_of, minlength=len(buckets))
        # A bucket with fewer pairs than a batch would never be seen: its batches are smaller.
        self.rows = [min(rows, max(count // rows_multiple * rows_multiple, rows_multiple))
                     for rows, count in zip(self.rows, counts)]
        self.batches_per_epoch = int(sum(c // r for c, r in zip(counts, self.rows)))
        self._part = functools.partial(process_rows, process_index, process_count)
        self._epoch: tuple[int, list] = (-1, [])

    def __len__(self) -> int:
        """Practically endless."""
        return self.batches_per_epoch * 2**20

    def __getitem__(self, i: int) -> Batch:
        epoch, place = divmod(i, self.batches_per_epoch)
        number, plan = self._epoch
        if number != epoch:
            plan = self._deal(epoch)
            self._epoch = (epoch, plan)
        bucket, members = plan[place]
        length = self.buckets[bucket]
        rows = [self.make_row(self.pairs[j], source_length=length, target_length=length)
                for j in members[self._part(len(members))]]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _deal(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        rng = np.random.default_rng((self.seed, epoch))
        batches = []
        for bucket, rows in enumerate(self.rows):
            members = rng.permutation(np.flatnonzero(self.bucket_of == bucket))
            batches += [(bucket, members[k : k + rows])
                        for k in range(0, len(members) - rows + 1, rows)]
        return [batches[k] for k in rng.permutation(len(batches))]

    def loader(self, prefetch: int = 2) -> Loader:
        """The batches in order, made ahead in a thread; its state is one number.

        Raises:
            ValueError: no bucket has pairs enough for a row on each device.
        """
        if not self.batches_per_epoch:
            raise ValueError(f"{len(self.pairs)} pairs do not fill a batch of {min(self.rows)} "
                             "rows in any bucket; give more pairs or fewer buckets")
        return Loader(grain.MapDataset.source(self), prefetch)

    def evaluation(self) -> list[Batch]:
        """Every pair once, in order of bucket; the last batch of each is filled with rows of zeros,
        which weigh nothing."""
        batches = []
        for bucket, rows in enumerate(self.rows):
            length = self.buckets[bucket]
            members = np.flatnonzero(self.bucket_of == bucket)
            for k in range(0, len(members), rows):
                made = [self.make_row(self.pairs[j], source_length=length, target_length=length)
                        for j in members[k : k + rows]]
                batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
                batches.append({
                    name: np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])
                    [self._part(rows)] for name, x in batch.items()})
        return batches
