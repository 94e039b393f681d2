"""Tokenized corpora on disk: written in shards, verified by checksum, and read on demand.

A cache folder contains numbered shards, each with the tokens of a fixed number of documents, and an
index file prepared.json, which is written last. The files of a shard are

    part-00000.array_record    its tokens, in records of `TOKENS_PER_RECORD`
    part-00000.npz             the offsets at which documents and sentences begin
    part-00000.json            checksums of these files and of the texts, and the options; written
                               last

If tokenization is interrupted, the next call reuses the complete shards: shards that match their
checksums and were made from the same texts and options are not tokenized again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from transformer_jax import storage
from transformer_jax.data.packing import Corpus, tokenize_corpus
from transformer_jax.data.tokenizers import Tokenizer

TOKENS_PER_RECORD = 8192
INDEX_FILE = "prepared.json"


def tokenize_to_cache(
    source: Sequence[Mapping], tokenizer: Tokenizer, folder: str | Path, *,
    text_key: str = "text", eos_id: int | None = None, one_sentence_per_line: bool = True,
    documents_per_shard: int = 10_000, quiet: bool = False,
) -> Corpus:
    """Tokenizes a source into a cache folder, or reuses the shards that are already in it.

    The tokens of the returned corpus stay on disk and are read on demand.

    Args:
        text_key, eos_id, one_sentence_per_line: see `packing.tokenize_corpus`.
        documents_per_shard: number of documents in a shard.
        quiet: whether to disable the progress messages.

    Raises:
        ValueError: the folder has a cache with another tokenizer or other options, no example
            contains a token, or an example has no `text_key`.

    Example:
        >>> import tempfile
        >>> from transformer_jax.data import tokenizers
        >>> source = [{"text": "ab"}, {"text": "bab"}]
        >>> tokenizer = tokenizers.train_chars(["ab"])
        >>> corpus = tokenize_to_cache(source, tokenizer, tempfile.mkdtemp(), quiet=True)
        >>> corpus.tokens[:].tolist(), corpus.document_starts.tolist()
        ([2, 3, 3, 2, 3], [0, 2, 5])
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # These keys, and "parts" below, are part of the file format.
    options = {"tokenizer": tokenizer.fingerprint(), "text_key": text_key, "eos_id": eos_id,
               "sentences": one_sentence_per_line, "documents": documents_per_shard,
               "examples": len(source)}
    if (folder / INDEX_FILE).is_file():
        saved = _load_json(folder / INDEX_FILE)["options"]
        changed = [name for name in options if saved.get(name) != options[name]]
        if changed:
            key = changed[0]
            name = {"sentences": "one_sentence_per_line", "documents": "documents_per_shard",
                    "examples": "number of examples"}.get(key, key)
            raise ValueError(f"the cache in {folder} was made with another {name} "
                             f"({saved.get(key)}, not {options[key]}); give another folder, or "
                             "delete this one")
    shards = []
    for number, begin in enumerate(range(0, len(source), documents_per_shard)):
        end = min(begin + documents_per_shard, len(source))
        examples = [source[i] for i in range(begin, end)]
        digest = _digest_texts(examples, text_key)
        stem = folder / f"part-{number:05d}"
        shard = _load_intact_shard(stem)
        if shard is None or (shard["options"], shard["texts"]) != (options, digest):
            shard = _save_shard(stem, examples, tokenizer, options, digest)
            if not quiet:
                print(f"{folder}: {end:,} of {len(source):,} documents", flush=True)
        shards.append(shard)
    if not sum(shard["tokens"] for shard in shards):
        raise ValueError(f"the {len(source)} examples contain 0 tokens; give at least one with "
                         "text")
    _save_json(folder / INDEX_FILE, {"options": options, "parts": shards})
    return load_token_cache(folder, tokenizer)


def load_token_cache(folder: str | Path, tokenizer: Tokenizer | None = None) -> Corpus:
    """Loads a corpus that `tokenize_to_cache` wrote; its tokens are read from disk on demand.

    Raises:
        FileNotFoundError: the folder has no complete cache.
        ValueError: a file is corrupted, or the cache was made with another tokenizer than the given
            one (None accepts any).
    """
    folder = Path(folder)
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {INDEX_FILE}; run tokenize_to_cache, which "
                                "continues after the last complete shard")
    index = _load_json(folder / INDEX_FILE)
    if tokenizer is not None and index["options"]["tokenizer"] != tokenizer.fingerprint():
        raise ValueError(f"the cache in {folder} was made with another tokenizer; give that "
                         "tokenizer, or another folder")
    offset, documents, sentences, files = 0, [], [], []
    for number, shard in enumerate(index["parts"]):
        stem = folder / f"part-{number:05d}"
        if file := _find_corrupted_file(stem, shard):
            raise ValueError(f"{file} is corrupted: its checksum does not match; run "
                             "tokenize_to_cache again, which rewrites this shard")
        with np.load(stem.with_suffix(".npz")) as starts:
            documents.append(starts["documents"][:-1] + offset)
            sentences.append(starts["sentences"][:-1] + offset)
        files.append((offset, stem.with_suffix(".array_record")))
        offset += shard["tokens"]
    end = np.array([offset])
    return Corpus(CachedTokens(files, offset, np.dtype(index["parts"][0]["dtype"])),
                  np.concatenate([*documents, end]), np.concatenate([*sentences, end]))


class CachedTokens:
    """The tokens of a cache as an array [length] that is read from disk on demand.

    It supports indexing by slices and by integer arrays. `files` are the offset of the first token
    and the path of the array_record file of each shard.
    """

    def __init__(self, files: Sequence[tuple[int, Path]], length: int, dtype: np.dtype):
        self._offsets = np.array([offset for offset, _ in files])
        self._files = [file for _, file in files]
        self._length, self.dtype = length, dtype
        self._readers: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._length

    def __getstate__(self):
        return self.__dict__ | {"_readers": {}}  # open files cannot be sent to another process

    def __getitem__(self, index) -> np.ndarray:
        if isinstance(index, slice):
            index = np.arange(*index.indices(self._length))
        positions = np.asarray(index)
        shard = np.searchsorted(self._offsets, positions, side="right") - 1
        record, offset_in_record = np.divmod(positions - self._offsets[shard], TOKENS_PER_RECORD)
        # Each record is read once, into a row of `blocks`; `block_of` is the row of each token.
        keys, block_of = np.unique(shard * 2**32 + record, return_inverse=True)
        blocks = np.zeros((len(keys), TOKENS_PER_RECORD), self.dtype)
        for number in np.unique(keys >> 32):
            in_shard = np.flatnonzero(keys >> 32 == number)
            records = self._reader(int(number)).read((keys[in_shard] & (2**32 - 1)).tolist())
            for block, data in zip(in_shard, records):
                tokens = np.frombuffer(data, self.dtype)
                blocks[block, : len(tokens)] = tokens
        return blocks[block_of.reshape(positions.shape), offset_in_record]

    def _reader(self, shard: int):
        if shard not in self._readers:
            self._readers[shard] = array_record_module.ArrayRecordReader(str(self._files[shard]))
        return self._readers[shard]


# Shards -------------------------------------------------------------------------------------------


def _save_shard(
    stem: Path, examples: Sequence[Mapping], tokenizer: Tokenizer, options: Mapping[str, Any],
    digest: str,
) -> dict[str, Any]:
    """Tokenizes and saves a shard, and returns its metadata, whose file is written last."""
    corpus = tokenize_corpus(examples, tokenizer, text_key=options["text_key"],
                             eos_id=options["eos_id"], one_sentence_per_line=options["sentences"],
                             allow_empty=True)
    tokens = corpus.tokens
    records = stem.with_suffix(".array_record")
    writer = array_record_module.ArrayRecordWriter(str(records), "group_size:1,uncompressed")
    for begin in range(0, len(tokens), TOKENS_PER_RECORD):
        writer.write(tokens[begin : begin + TOKENS_PER_RECORD].tobytes())
    writer.close()
    np.savez(stem.with_suffix(".npz"), documents=corpus.document_starts,
             sentences=corpus.sentence_starts)
    shard = {"options": options, "texts": digest, "tokens": len(tokens), "dtype": str(tokens.dtype),
             "digests": {suffix: storage.sha256(stem.with_suffix(suffix))
                         for suffix in (".array_record", ".npz")}}
    _save_json(stem.with_suffix(".json"), shard)
    return shard


def _load_intact_shard(stem: Path) -> dict[str, Any] | None:
    """Loads the metadata of a shard; None if the shard is incomplete or corrupted."""
    try:
        shard = _load_json(stem.with_suffix(".json"))
        return None if _find_corrupted_file(stem, shard) else shard
    except (OSError, ValueError, KeyError):
        return None


def _find_corrupted_file(stem: Path, shard: Mapping[str, Any]) -> Path | None:
    files = {stem.with_suffix(suffix): digest for suffix, digest in shard["digests"].items()}
    return next((file for file, digest in files.items()
                 if not file.is_file() or storage.sha256(file) != digest), None)


def _digest_texts(examples: Sequence[Mapping], text_key: str) -> str:
    digest = hashlib.sha256()
    for example in examples:
        text = str(example.get(text_key)).encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def _load_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is corrupted ({error}); delete it and run tokenize_to_cache "
                         "again") from None


def _save_json(path: Path, value: Any) -> None:
    with storage.atomic_write(path) as file:
        file.write(json.dumps(value).encode())
