"""Tokenized corpora on disk: made in parts that survive an interruption, checked, read by need.

A folder holds numbered parts, each of so many documents, and prepared.json, written last. A part is

    part-00000.array_record    its tokens, in records of `BLOCK`
    part-00000.npz             where documents and sentences begin
    part-00000.json            the digests of both and of its texts, and the options; written last

Preparing again goes on behind the parts that are whole and of the same texts and options.
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

BLOCK = 8192  # tokens of a record
NAME = "prepared.json"


def tokenize_to_cache(
    source: Sequence[Mapping], tokenizer: Tokenizer, folder: str | Path, *, text_key: str = "text",
    eos_id: int | None = None, sentences: bool = True, documents: int = 10_000,
    quiet: bool = False,
) -> Corpus:
    """`tokenize_corpus`, kept in `folder`; what is there already is used.

    Args:
        documents: of a part.

    Raises:
        ValueError: the folder holds a corpus of other texts or another tokenizer; or as
            `tokenize_corpus`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = {"tokenizer": tokenizer.fingerprint(), "text_key": text_key, "eos_id": eos_id,
               "sentences": sentences, "documents": documents, "examples": len(source)}
    if (folder / NAME).is_file():
        saved = _read_json(folder / NAME)["options"]
        changed = [name for name in options if saved.get(name) != options[name]]
        if changed:
            name = changed[0]
            raise ValueError(f"the corpus in {folder} was prepared with another {name} "
                             f"({saved.get(name)}, not {options[name]}); give another folder, or "
                             "delete it")
    parts = []
    for number, begin in enumerate(range(0, len(source), documents)):
        texts = [source[i] for i in range(begin, min(begin + documents, len(source)))]
        digest = _digest_texts(texts, text_key)
        stem = folder / f"part-{number:05d}"
        found = _part(stem)
        if found is None or (found["options"], found["texts"]) != (options, digest):
            found = _write(stem, texts, tokenizer, options, digest)
            if not quiet:
                print(f"{folder}: {min(begin + documents, len(source)):,} of {len(source):,} "
                      "documents", flush=True)
        parts.append(found)
    if not sum(part["tokens"] for part in parts):
        raise ValueError(f"the {len(source)} examples give 0 tokens; give at least one with text")
    _write_json(folder / NAME, {"options": options, "parts": parts})
    return load_token_cache(folder, tokenizer)


def load_token_cache(folder: str | Path, tokenizer: Tokenizer | None = None) -> Corpus:
    """A corpus that `prepare` made. Its tokens are read when they are asked for.

    Raises:
        FileNotFoundError: it is not there, or not all of it.
        ValueError: a file is not what was written, or it is of another tokenizer.
    """
    folder = Path(folder)
    if not (folder / NAME).is_file():
        raise FileNotFoundError(f"{folder} has no {NAME}; prepare the corpus, which goes on where "
                                "it was cut off")
    found = _read_json(folder / NAME)
    if tokenizer is not None and found["options"]["tokenizer"] != tokenizer.fingerprint():
        raise ValueError(f"the corpus in {folder} is of another tokenizer; give the one it was "
                         "prepared with, or prepare it again")
    offset, documents, sentences, readers = 0, [], [], []
    for number, part in enumerate(found["parts"]):
        stem = folder / f"part-{number:05d}"
        for suffix, digest in part["digests"].items():
            file = stem.with_suffix(suffix)
            if not file.is_file() or storage.sha256(file) != digest:
                raise ValueError(f"{file} is not what was written; prepare the corpus again, which "
                                 "makes this part anew")
        with np.load(stem.with_suffix(".npz")) as starts:
            documents.append(starts["documents"][:-1] + offset)
            sentences.append(starts["sentences"][:-1] + offset)
        readers.append((offset, stem.with_suffix(".array_record")))
        offset += part["tokens"]
    last = np.array([offset])
    return Corpus(Tokens(readers, offset, np.dtype(found["parts"][0]["dtype"])),
                  np.concatenate([*documents, last]), np.concatenate([*sentences, last]))


class Tokens:
    """A flat array of tokens in records of `BLOCK`, indexed by slices and arrays of integers."""

    def __init__(self, parts: Sequence[tuple[int, Path]], length: int, dtype: np.dtype):
        self._begins = np.array([begin for begin, _ in parts])
        self._files = [file for _, file in parts]
        self._length, self.dtype = length, dtype
        self._readers: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._length

    def __getstate__(self):
        return self.__dict__ | {"_readers": {}}  # readers stay in their process

    def __getitem__(self, index) -> np.ndarray:
        if isinstance(index, slice):
            index = np.arange(*index.indices(self._length))
        at = np.asarray(index)
        part = np.searchsorted(self._begins, at, side="right") - 1
        record, place = np.divmod(at - self._begins[part], BLOCK)
        # Number of a record among those that are read, for each token.
        keys, which = np.unique(part * 2**32 + record, return_inverse=True)
        blocks = np.zeros((len(keys), BLOCK), self.dtype)
        for number in np.unique(keys >> 32):
            mine = np.flatnonzero(keys >> 32 == number)
            read = self._reader(int(number)).read((keys[mine] & (2**32 - 1)).tolist())
            for row, data in zip(mine, read):
                tokens = np.frombuffer(data, self.dtype)
                blocks[row, : len(tokens)] = tokens
        return blocks[which.reshape(at.shape), place]

    def _reader(self, part: int):
        if part not in self._readers:
            self._readers[part] = array_record_module.ArrayRecordReader(str(self._files[part]))
        return self._readers[part]


def _write(stem: Path, texts: Sequence[Mapping], tokenizer, options, digest: str) -> dict[str, Any]:
    """One part, its description last."""
    try:
        corpus = tokenize_corpus(texts, tokenizer, text_key=options["text_key"],
                                 eos_id=options["eos_id"], sentences=options["sentences"])
        tokens, documents, sentences = (corpus.tokens, corpus.document_starts,
                                        corpus.sentence_starts)
    except ValueError as error:
        if "give 0 tokens" not in str(error):
            raise
        tokens = np.zeros(0, np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
        documents = sentences = np.zeros(1, np.int64)
    records = stem.with_suffix(".array_record")
    writer = array_record_module.ArrayRecordWriter(str(records), "group_size:1,uncompressed")
    for begin in range(0, len(tokens), BLOCK):
        writer.write(tokens[begin : begin + BLOCK].tobytes())
    writer.close()
    np.savez(stem.with_suffix(".npz"), documents=documents, sentences=sentences)
    found = {"options": options, "texts": digest, "tokens": len(tokens), "dtype": str(tokens.dtype),
             "digests": {suffix: storage.sha256(stem.with_suffix(suffix))
                         for suffix in (".array_record", ".npz")}}
    _write_json(stem.with_suffix(".json"), found)
    return found


def _part(stem: Path) -> dict[str, Any] | None:
    """The description of a part that is whole."""
    try:
        found = _read_json(stem.with_suffix(".json"))
        whole = all(storage.sha256(stem.with_suffix(suffix)) == digest
                    for suffix, digest in found["digests"].items())
    except (OSError, ValueError, KeyError):
        return None
    return found if whole else None


def _digest_texts(texts: Sequence[Mapping], text_key: str) -> str:
    digest = hashlib.sha256()
    for example in texts:
        text = str(example.get(text_key)).encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); delete it and prepare again") from None


def _write_json(file: Path, value: Any) -> None:
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value))
    unfinished.replace(file)
