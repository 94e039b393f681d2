"""Text to ids and back, through the `tokenizers` library.

Three kinds can be trained, each as in the paper that made it common: byte-level BPE (GPT-2,
section 2.2), WordPiece (BERT, section 3) and characters. Training is deterministic: the same texts
give the same files. Trained or loaded, all are one `Tokenizer`.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from transformer_jax import storage

END_OF_TEXT = "<|endoftext|>"
UNKNOWN_CHARACTER = "<unk>"
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# For an encoder-decoder, in BART's order.
SEQ2SEQ_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
CONTINUATION = "##"  # how WordPiece writes a piece that does not begin a word

# Each role's usual names, the first one present counts.
ROLES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", UNKNOWN_CHARACTER),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "eos": (END_OF_TEXT, "</s>"),
}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A thin face of `tokenizers.Tokenizer`, which is there as `backend`.

    Special tokens written out in a text, as in "I ate an [MASK] today", become their ids.
    """

    backend: Backend

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of a text; `add_special` adds what the kind wraps a text in ([CLS] ... [SEP]).

        Raises:
            ValueError: the text is not a string of valid Unicode.
        """
        return self.encode_batch([text], add_special)[0]

    def encode_batch(self, texts: Sequence[str], add_special: bool = False) -> list[list[int]]:
        """Ids of each text, in threads; see `encode`."""
        try:
            rows = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special)
        except TypeError:
            for i, text in enumerate(texts):
                check_text(text, i)
            raise
        return [row.ids for row in rows]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """The text of ids. BPE and characters give back exactly what was encoded."""
        return self.backend.decode(self._inside(ids), skip_special_tokens=skip_special)

    def _inside(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        """The ids, all of which are in the vocabulary."""
        ids = np.asarray(ids, np.int64)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise ValueError(f"token id {outside[0]} is outside the vocabulary of "
                             f"{self.vocab_size}; decode with the tokenizer that encoded")
        return ids.tolist()

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def token_id(self, token: str) -> int:
        """The id of one token as the vocabulary spells it.

        Raises:
            ValueError: the vocabulary has no such token.
        """
        found = self._id(token)
        if found is None:
            raise ValueError(f"{token!r} is not among the {self.vocab_size} tokens of this "
                             "vocabulary; encode(text) splits a text into tokens that are")
        return found

    def _id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def _role(self, role: str) -> int | None:
        ids = map(self._id, ROLES[role])
        return next((found for found in ids if found is not None), None)

    # Ids of special tokens, None where the vocabulary has none.
    pad_id = property(lambda self: self._role("pad"))
    unk_id = property(lambda self: self._role("unk"))
    cls_id = property(lambda self: self._role("cls"))
    sep_id = property(lambda self: self._role("sep"))
    mask_id = property(lambda self: self._role("mask"))
    eos_id = property(lambda self: self._role("eos"))

    @functools.cached_property
    def is_word_start(self) -> np.ndarray:
        """bool [V]: whether a token begins a word, for whole-word masking.

        WordPiece: it is no "##" continuation. Otherwise: it begins with white space (byte-level
        BPE writes a space as "Ġ") or is special; so a word at the very front of a text counts
        as a start only by its place.
        """
        tokens = [self.backend.id_to_token(i) or "" for i in range(self.vocab_size)]
        special = {t.content for t in self.backend.get_added_tokens_decoder().values()}
        if isinstance(self.backend.model, models.WordPiece):
            return np.array([not t.startswith(CONTINUATION) for t in tokens])
        spaces = "ĠĊĉč" if _is_byte_level(self.backend) else "▁ \n\t\r"
        return np.array([t in special or t.startswith(tuple(spaces)) for t in tokens])

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and the kind's own files: vocab.txt for WordPiece, vocab.json
        and merges.txt for BPE, vocab.json for characters."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        if isinstance(self.backend.model, models.BPE) and not _is_byte_level(self.backend):
            vocab = sorted(self.backend.get_vocab().items(), key=lambda item: item[1])
            text = json.dumps(dict(vocab), ensure_ascii=False)
            (directory / "vocab.json").write_text(text, encoding="utf-8")
        else:
            self.backend.model.save(str(directory))

    def fingerprint(self) -> str:
        """A digest of all that it does."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()


def check_text(text: object, i: int = 0) -> None:
    """Refuse what is not a string of valid Unicode; `i` is its number among the texts."""
    if not isinstance(text, str):
        raise ValueError(f"text {i} is of type {type(text).__name__}; give a str "
                         "(decode bytes as UTF-8)") from None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text {i} has the lone surrogate {text[error.start]!a} at character {error.start}, "
            "which is not Unicode text; read it with the right encoding or errors='replace'"
        ) from None


def _is_byte_level(backend: Backend) -> bool:
    return isinstance(backend.decoder, decoders.ByteLevel)


# Training -----------------------------------------------------------------------------------------


def train_bpe(
    texts: Iterable[str], vocab_size: int, specials: Sequence[str] = (END_OF_TEXT,)
) -> Tokenizer:
    """Byte-level BPE as in GPT-2 (section 2.2): every text has an encoding and comes back exactly.

    The special tokens have the first ids, "<|endoftext|>" or `SEQ2SEQ_SPECIALS`; the 256 bytes
    follow, then the merges. Small corpora may run out of pairs to merge before `vocab_size` is
    reached. For two languages give the texts of both: one vocabulary serves encoder and decoder.

    Raises:
        ValueError: vocab_size has no room for the bytes, or there is no text.
    """
    specials, alphabet = list(specials), sorted(pre_tokenizers.ByteLevel.alphabet())
    _check_room(vocab_size, len(specials) + len(alphabet), "bytes and special tokens")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials,
                                  initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_some(texts), trainer)
    return Tokenizer(_end_texts(backend))


def _end_texts(backend: Backend) -> Backend:
    """With `add_special`, texts for an encoder-decoder end with "</s>"."""
    end = backend.token_to_id("</s>")
    if end is not None:
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", end)])
    return backend


def train_unigram(
    texts: Iterable[str], vocab_size: int, specials: Sequence[str] = SEQ2SEQ_SPECIALS
) -> Tokenizer:
    """Unigram language model (Kudo 2018, "Subword Regularization", section 3.2) over text with
    spaces written as "▁", as SentencePiece does. Runs of spaces become one.

    The special tokens have the first ids, one of which has to be "<unk>".

    Raises:
        ValueError: vocab_size has no room for special tokens and letters, or there is no text.
    """
    _check_room(vocab_size, len(specials) + 64, "special tokens and letters")
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=list(specials), unk_token=UNKNOWN_CHARACTER,
        show_progress=False)
    backend.train_from_iterator(_some(texts), trainer)
    return Tokenizer(_end_texts(backend))


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, lowercase: bool = True, max_alphabet: int = 1000
) -> Tokenizer:
    """WordPiece with BERT's normalizer and word splitter (BERT, section 3).

    [PAD] is id 0, then [UNK], [CLS], [SEP], [MASK]. Pieces that do not begin a word carry "##".
    Of the characters only the `max_alphabet` most frequent are kept, and never so many that they
    fill more than half of the vocabulary; the others become [UNK].

    Raises:
        ValueError: vocab_size has no room for special tokens and letters, or there is no text.
    """
    room = (vocab_size - len(BERT_SPECIALS)) // 4  # each has two forms, "a" and "##a"
    _check_room(vocab_size, len(BERT_SPECIALS) + 4 * 26, "special tokens and letters")
    normalizer = _bert(models.WordPiece(unk_token="[UNK]"), lowercase).normalizer
    texts = [normalizer.normalize_str(text) for text in _some(texts)]
    count = Counter()
    for text in texts:
        count.update(text)
    seen = (c for c in count if not c.isspace())
    kept = sorted(sorted(seen, key=lambda c: (-count[c], c))[: min(max_alphabet, room)])
    rare = dict.fromkeys(map(ord, set(count) - set(kept)), " ")

    # The trainer numbers "##a" in the order in which its hash map comes upon it, another one in
    # each process. Given as special tokens they are numbered first, and only the vocabulary of
    # the trained backend is used, for which they are ordinary.
    alphabet = [*kept, *(CONTINUATION + c for c in kept)]
    trained = _bert(models.WordPiece(unk_token="[UNK]"), lowercase)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*BERT_SPECIALS, *alphabet], show_progress=False,
        continuing_subword_prefix=CONTINUATION)
    trained.train_from_iterator((text.translate(rare) for text in texts), trainer)
    return Tokenizer(_finish_bert(trained.get_vocab(), lowercase))


def train_chars(texts: Iterable[str]) -> Tokenizer:
    """Every character of the texts is a token; all others become "<unk>".

    "<|endoftext|>" is id 0, "<unk>" 1, then the characters in order of their code points.
    """
    characters = sorted(set().union(*_some(texts)))
    vocab = {token: i for i, token in enumerate((END_OF_TEXT, UNKNOWN_CHARACTER, *characters))}
    # BPE without merges and without a word splitter: six times as fast as WordLevel.
    backend = Backend(models.BPE(vocab, [], unk_token=UNKNOWN_CHARACTER))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END_OF_TEXT, UNKNOWN_CHARACTER])
    return Tokenizer(backend)


def _some(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise ValueError("texts is one str; give a list of texts")
    texts = list(texts)
    for i, text in enumerate(texts):
        check_text(text, i)
    if not any(texts):
        raise ValueError(f"there is nothing to train on in {len(texts)} texts; "
                         "give at least one that is not empty")
    return texts


def _check_room(vocab_size: int, least: int, what: str) -> None:
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size} has no room for {what}; "
                         f"use at least {least}")


def _byte_level(model: models.BPE) -> Backend:
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def _bert(model: models.WordPiece, lowercase: bool) -> Backend:
    backend = Backend(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def _finish_bert(vocab: dict[str, int], lowercase: bool) -> Backend:
    backend = _bert(models.WordPiece(vocab, unk_token="[UNK]"), lowercase)
    backend.add_special_tokens([t for t in BERT_SPECIALS if t in vocab])
    backend.decoder = decoders.WordPiece(prefix=CONTINUATION)
    if "[CLS]" in vocab and "[SEP]" in vocab:
        backend.post_processor = processors.BertProcessing(
            ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return backend


# Loading ------------------------------------------------------------------------------------------


def load(path: str | Path) -> Tokenizer:
    """A tokenizer from a folder or one of its files.

    In this order: tokenizer.json; vocab.json with merges.txt, or encoder.json with vocab.bpe
    (byte-level BPE); vocab.txt (WordPiece, lower-cased if no entry has a capital letter).

    Raises:
        FileNotFoundError: none of them is there.
        ValueError: a file cannot be read as what its name says, or is not what was saved.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder with one of "
                                f"{', '.join(' + '.join(names) for names in LOADERS)}")
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and storage.has_manifest(path) and (damaged := storage.verify_manifest(path, more=True)):
        raise ValueError(f"the tokenizer in {path} is damaged: {damaged}; save it again, or delete "
                         f"{storage.MANIFEST} if you changed it on purpose")
    for names, read in LOADERS.items():
        files = [folder / name for name in names]
        wanted = path.is_dir() or path.name in names
        if wanted and all(file.is_file() for file in files):
            try:
                return Tokenizer(read(*map(str, files)))
            except Exception as error:  # the library raises bare Exception
                raise ValueError(f"{files[0]} cannot be read as a tokenizer "
                                 f"({error}); save it again") from None
    raise FileNotFoundError(f"{path} is no tokenizer; give a folder with one of "
                            f"{', '.join(' + '.join(names) for names in LOADERS)}")


def _load_json(path: str) -> Backend:
    backend = Backend.from_file(path)
    # Length and padding are the batch's business, not the text's.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _load_bpe(vocab: str, merges: str) -> Backend:
    backend = _byte_level(models.BPE.from_file(vocab, merges))
    if backend.token_to_id(END_OF_TEXT) is not None:
        backend.add_special_tokens([END_OF_TEXT])
    return backend


def _load_wordpiece(path: str) -> Backend:
    vocab = models.WordPiece.read_file(path)
    lowercase = not any(t != t.lower() for t in vocab if not t.startswith("["))
    return _finish_bert(vocab, lowercase)


LOADERS: dict[tuple[str, ...], Callable[..., Backend]] = {
    ("tokenizer.json",): _load_json,
    ("vocab.json", "merges.txt"): _load_bpe,
    ("encoder.json", "vocab.bpe"): _load_bpe,
    ("vocab.txt",): _load_wordpiece,
}
