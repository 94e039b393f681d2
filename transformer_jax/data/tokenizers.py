"""Tokenizers, which convert text to token ids and back, based on the `tokenizers` library.

Except for Unigram (see `train_unigram`), training is deterministic: the same texts give the same
files.
"""

import functools
import hashlib
import itertools
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
UNKNOWN_TOKEN = "<unk>"
BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Special tokens of encoder-decoders, in BART's order.
SEQ2SEQ_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
CONTINUATION_PREFIX = "##"  # WordPiece tokens that continue a word start with it


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A thin wrapper around `tokenizers.Tokenizer`, its attribute `backend`.

    A special token that is written out in a text, as in "I ate an [MASK] today", is encoded as its
    id. The ids of special tokens are None if the vocabulary has no such token.

    Example:
        >>> tokenizer = train_chars(["abc"])
        >>> tokenizer.encode("cab")
        [4, 2, 3]
        >>> tokenizer.decode([4, 2, 3])
        'cab'
    """

    backend: Backend

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Encodes a text as token ids.

        Args:
            add_special_tokens: whether to add the special tokens that this kind of tokenizer puts
                around a text, such as [CLS] and [SEP].

        Raises:
            ValueError: the text is not a string of valid Unicode.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = False
    ) -> list[list[int]]:
        """Encodes texts in several threads; see `encode`."""
        try:
            rows = self.backend.encode_batch_fast(
                list(texts), add_special_tokens=add_special_tokens)
        except TypeError:
            for i, text in enumerate(texts):
                check_text(text, i)
            raise
        return [row.ids for row in rows]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """Decodes token ids to text; raises ValueError if one is outside the vocabulary.

        Byte-level BPE restores the encoded text exactly. A character tokenizer does so unless the
        text contains unknown characters, which are dropped with `skip_special_tokens`.
        """
        return self.backend.decode(self._check_ids(ids), skip_special_tokens=skip_special_tokens)

    def _check_ids(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        ids = np.asarray(ids, np.int64)
        if (invalid := ids[(ids < 0) | (ids >= self.vocab_size)]).size:
            raise ValueError(f"token id {invalid[0]} is outside the vocabulary of "
                             f"{self.vocab_size}; decode with the tokenizer that encoded the text")
        return ids.tolist()

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def token_id(self, token: str) -> int:
        """Returns the id of one token, spelled as in the vocabulary, or raises ValueError."""
        if (token_id := self._id(token)) is None:
            raise ValueError(f"{token!r} is not among the {self.vocab_size} tokens of this "
                             "vocabulary; encode(text) splits a text into tokens that are")
        return token_id

    def _id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def _first_id(self, *tokens: str) -> int | None:
        return next((i for i in map(self._id, tokens) if i is not None), None)

    pad_id = property(lambda self: self._first_id("[PAD]", "<pad>"))
    unk_id = property(lambda self: self._first_id("[UNK]", UNKNOWN_TOKEN))
    cls_id = property(lambda self: self._first_id("[CLS]", "<s>"))
    sep_id = property(lambda self: self._first_id("[SEP]", "</s>"))
    mask_id = property(lambda self: self._first_id("[MASK]", "<mask>"))
    eos_id = property(lambda self: self._first_id(END_OF_TEXT, "</s>"))

    @functools.cached_property
    def is_word_start(self) -> np.ndarray:
        """Whether each token of the vocabulary starts a word, bool [V], for whole-word masking.

        In WordPiece, tokens without "##" start a word. In other tokenizers, special tokens and
        tokens that begin with white space do; callers must add the first token of a text.
        """
        tokens = [self.backend.id_to_token(i) or "" for i in range(self.vocab_size)]
        if isinstance(self.backend.model, models.WordPiece):
            return np.array([not t.startswith(CONTINUATION_PREFIX) for t in tokens])
        special = {t.content for t in self.backend.get_added_tokens_decoder().values()}
        spaces = tuple("ĠĊĉč" if _is_byte_level(self.backend) else "▁ \n\t\r")
        return np.array([t in special or t.startswith(spaces) for t in tokens])

    def save(self, directory: str | Path) -> None:
        """Saves tokenizer.json, and vocab.txt (WordPiece) or vocab.json (BPE with merges.txt)."""
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
        """Returns a SHA-256 digest of the tokenizer's complete definition."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()


def check_text(text: object, i: int = 0) -> None:
    """Raises ValueError, which names text `i`, unless `text` is a str of valid Unicode."""
    if not isinstance(text, str):
        raise ValueError(f"text {i} is of type {type(text).__name__}; give a str "
                         "(decode bytes as UTF-8)") from None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text {i} has the lone surrogate {text[error.start]!a} at character {error.start}, "
            "which is not valid Unicode; decode the file with the correct encoding or with "
            "errors='replace'") from None


# Training -----------------------------------------------------------------------------------------


def train_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,)
) -> Tokenizer:
    """Trains a byte-level BPE tokenizer as in GPT-2 (section 2.2); it encodes any text losslessly.

    The special tokens have the first ids, followed by the 256 bytes and the merges. For
    translation, give the texts of both languages: encoder and decoder share the vocabulary.

    Args:
        vocab_size: the maximum; a small corpus may have too few pairs to merge.
        special_tokens: "<|endoftext|>", or `SEQ2SEQ_SPECIAL_TOKENS` for an encoder-decoder.

    Raises:
        ValueError: `vocab_size` is too small for the bytes and special tokens, or there is no text.

    Example:
        >>> tokenizer = train_bpe(["low lower lowest"] * 2, vocab_size=259)
        >>> tokenizer.decode(tokenizer.encode("slow 漢"))
        'slow 漢'
    """
    special_tokens, alphabet = list(special_tokens), sorted(pre_tokenizers.ByteLevel.alphabet())
    _check_vocab_size(vocab_size, len(special_tokens) + len(alphabet), "bytes and special tokens")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special_tokens,
                                  initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_check_texts(texts), trainer)
    return Tokenizer(_append_eos(backend))


def train_unigram(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = SEQ2SEQ_SPECIAL_TOKENS
) -> Tokenizer:
    """Trains a Unigram tokenizer (Kudo 2018, "Subword Regularization", section 3.2).

    As in SentencePiece, a space is represented by "▁", and consecutive spaces become one. The
    special tokens, which must include "<unk>", have the first ids, followed by the other tokens in
    the order of their code points.

    Training is not exactly deterministic: the `tokenizers` library sums in the order of a hash map,
    so the last digits of the scores of tokens differ between runs, and tokens of equal score could
    differ. The ids do not depend on the scores.

    Raises:
        ValueError: `vocab_size` is too small for special tokens and letters, or there is no text.
    """
    _check_vocab_size(vocab_size, len(special_tokens) + 64, "special tokens and letters")
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=list(special_tokens), unk_token=UNKNOWN_TOKEN,
        show_progress=False)
    backend.train_from_iterator(_check_texts(texts), trainer)
    definition = json.loads(backend.to_str())
    vocab, num_special = definition["model"]["vocab"], len(special_tokens)
    definition["model"]["vocab"] = vocab[:num_special] + sorted(vocab[num_special:])
    return Tokenizer(_append_eos(Backend.from_str(json.dumps(definition))))


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, lowercase: bool = True, max_alphabet: int = 1000
) -> Tokenizer:
    """Trains a WordPiece tokenizer with BERT's normalization and word splitting (BERT, section 3).

    The special tokens [PAD], [UNK], [CLS], [SEP] and [MASK] have the ids 0 to 4. Tokens that
    continue a word begin with "##".

    Args:
        lowercase: whether to convert text to lower case and strip accents.
        max_alphabet: the maximum number of distinct characters. The most frequent ones are used,
            for at most half of the vocabulary; others are encoded as [UNK].

    Raises:
        ValueError: `vocab_size` is too small for special tokens and letters, or there is no text.

    Example:
        >>> tokenizer = train_wordpiece(["the cat sat"], vocab_size=120)
        >>> tokenizer.decode(tokenizer.encode("The Cat"))
        'the cat'
    """
    # Each character has two tokens, "a" and "##a", which take at most half of the vocabulary.
    max_characters = (vocab_size - len(BERT_SPECIAL_TOKENS)) // 4
    _check_vocab_size(vocab_size, len(BERT_SPECIAL_TOKENS) + 4 * 26, "special tokens and letters")
    trained = _wordpiece({}, lowercase)
    texts = [trained.normalizer.normalize_str(text) for text in _check_texts(texts)]
    count = Counter(itertools.chain.from_iterable(texts))
    seen = (c for c in count if not c.isspace())
    kept = sorted(sorted(seen, key=lambda c: (-count[c], c))[: min(max_alphabet, max_characters)])
    rare = dict.fromkeys(map(ord, set(count) - set(kept)), " ")

    # The trainer numbers tokens such as "##a" in the order of a hash map, which differs between
    # processes. As special tokens they come first, in a fixed order. They remain ordinary tokens,
    # because only the vocabulary of the trained backend is used.
    alphabet = [*kept, *(CONTINUATION_PREFIX + c for c in kept)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*BERT_SPECIAL_TOKENS, *alphabet],
        show_progress=False, continuing_subword_prefix=CONTINUATION_PREFIX)
    trained.train_from_iterator((text.translate(rare) for text in texts), trainer)
    return Tokenizer(_wordpiece(trained.get_vocab(), lowercase))


def train_chars(texts: Iterable[str]) -> Tokenizer:
    """Makes a character tokenizer: each character of the texts is a token, all others are "<unk>".

    "<|endoftext|>" has id 0 and "<unk>" 1; the characters follow in the order of their code points.
    Raises ValueError if there is no text.
    """
    characters = sorted(set().union(*_check_texts(texts)))
    vocab = {token: i for i, token in enumerate((END_OF_TEXT, UNKNOWN_TOKEN, *characters))}
    # BPE without merges and without pre-tokenization is six times as fast as WordLevel.
    backend = Backend(models.BPE(vocab, [], unk_token=UNKNOWN_TOKEN))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END_OF_TEXT, UNKNOWN_TOKEN])
    return Tokenizer(backend)


def _check_texts(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise ValueError("texts is one str; give a list of texts")
    texts = list(texts)
    for i, text in enumerate(texts):
        check_text(text, i)
    if not any(texts):
        raise ValueError(f"there is nothing to train on in {len(texts)} texts; "
                         "give at least one text that is not empty")
    return texts


def _check_vocab_size(vocab_size: int, minimum: int, contents: str) -> None:
    if vocab_size < minimum:
        raise ValueError(f"vocab_size {vocab_size} is too small for {contents}; "
                         f"use at least {minimum}")


# Backends -----------------------------------------------------------------------------------------


def _byte_level(model: models.BPE) -> Backend:
    """Returns a backend with GPT-2's byte-level pre-tokenization and decoding."""
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def _is_byte_level(backend: Backend) -> bool:
    return isinstance(backend.decoder, decoders.ByteLevel)


def _wordpiece(vocab: dict[str, int], lowercase: bool) -> Backend:
    """Returns BERT's backend for a vocabulary: with special tokens, a row is [CLS] text [SEP]."""
    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens([token for token in BERT_SPECIAL_TOKENS if token in vocab])
    backend.decoder = decoders.WordPiece(prefix=CONTINUATION_PREFIX)
    if "[CLS]" in vocab and "[SEP]" in vocab:
        backend.post_processor = processors.BertProcessing(
            ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return backend


def _append_eos(backend: Backend) -> Backend:
    """Makes `encode(text, add_special_tokens=True)` append "</s>", if the vocabulary has it."""
    eos_id = backend.token_to_id("</s>")
    if eos_id is not None:
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", eos_id)])
    return backend


# Loading ------------------------------------------------------------------------------------------


def load(path: str | Path) -> Tokenizer:
    """Loads a tokenizer from a folder, or from one of its files.

    The first of these that exists is used: tokenizer.json; vocab.json with merges.txt, or
    encoder.json with vocab.bpe (byte-level BPE); vocab.txt (WordPiece, which converts text to lower
    case if no entry has a capital letter).

    Raises:
        FileNotFoundError: none of these files exists.
        ValueError: a file is not a tokenizer of this format, or its checksum is wrong.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> train_chars(["abc"]).save(folder)
        >>> load(folder).encode("cab")
        [4, 2, 3]
    """
    path = Path(path)
    supported = ", ".join(" + ".join(names) for names in _LOADERS)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder with one of {supported}")
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and storage.has_manifest(path) and (
            problem := storage.verify_manifest(path, allow_extra_files=True)):
        raise ValueError(f"the tokenizer in {path} is corrupted: {problem}; save it again, or "
                         f"delete {storage.MANIFEST} if you changed the files on purpose")
    for names, load_backend in _LOADERS.items():
        files = [folder / name for name in names]
        is_selected = path.is_dir() or path.name in names
        if is_selected and all(file.is_file() for file in files):
            try:
                return Tokenizer(load_backend(*map(str, files)))
            except Exception as error:  # the library raises bare Exception
                raise ValueError(f"{files[0]} cannot be read as a tokenizer "
                                 f"({error}); save it again") from None
    raise FileNotFoundError(f"{path} has no tokenizer; give a folder with one of {supported}")


def _load_json(path: str) -> Backend:
    backend = Backend.from_file(path)
    # Rows are truncated and padded when batches are made, not by the tokenizer.
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
    return _wordpiece(vocab, not any(t != t.lower() for t in vocab if not t.startswith("[")))


# File names of a format -> function that loads the backend from the paths of these files.
_LOADERS: dict[tuple[str, ...], Callable[..., Backend]] = {
    ("tokenizer.json",): _load_json,
    ("vocab.json", "merges.txt"): _load_bpe,
    ("encoder.json", "vocab.bpe"): _load_bpe,
    ("vocab.txt",): _load_wordpiece,
}
