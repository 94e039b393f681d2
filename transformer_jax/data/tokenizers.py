"""Text to ids and back, by the `tokenizers` library, in the files that everybody reads."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
UNKNOWN_CHARACTER = "<unk>"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` under the few names that the library needs."""

    backend: hf.Tokenizer

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens are not added (`objectives.layout` places them)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, in parallel.

        Raises:
            ValueError: a text holds lone surrogates: bytes that were not decoded.
        """
        try:
            return [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=False)]
        except (UnicodeEncodeError, TypeError) as error:
            for i, text in enumerate(texts):
                if not isinstance(text, str):
                    raise ValueError(f"text {i} is {type(text).__name__}, not str; decode it "
                                     "first") from error
                if any("\ud800" <= c <= "\udfff" for c in text):
                    raise ValueError(f"text {i} holds undecoded bytes (a lone surrogate); read it "
                                     "as UTF-8") from error
            raise

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str:
        """The token as the vocabulary spells it."""
        return self.backend.id_to_token(int(token_id))

    def token_id(self, token: str) -> int:
        """The id of a token.

        Raises:
            ValueError: the vocabulary has no such token.
        """
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(f"token {token!r} is not in the vocabulary of {self.vocab_size}; "
                             "use the tokenizer the model was trained with")
        return found

    def _special(self, *names: str) -> int | None:
        found = (self.backend.token_to_id(name) for name in names)
        return next((i for i in found if i is not None), None)

    @property
    def pad_id(self) -> int:
        """[PAD], or 0: padding is masked, so any id serves where a vocabulary has none."""
        return self._special("[PAD]", "<pad>") or 0

    @property
    def cls_id(self) -> int | None:
        return self._special("[CLS]", "<s>")

    @property
    def sep_id(self) -> int | None:
        return self._special("[SEP]", "</s>")

    @property
    def mask_id(self) -> int | None:
        return self._special("[MASK]", "<mask>")

    @property
    def eos_id(self) -> int | None:
        """What ends a document: end-of-text, or [SEP]."""
        return self._special(END_OF_TEXT, "</s>", "[SEP]")

    @property
    def is_word_start(self) -> np.ndarray:
        """bool [V]: the token begins a word, rather than continues one."""
        tokens = [self.backend.id_to_token(i) or "" for i in range(self.vocab_size)]
        if isinstance(self.backend.model, models.WordPiece):
            prefix = self.backend.model.continuing_subword_prefix
            return np.array([not token.startswith(prefix) for token in tokens])
        # Byte-level BPE writes the space before a word as "Ġ" and a newline as "Ċ".
        return np.array([not token[:1].isalnum() for token in tokens])

    def save(self, folder: str | Path) -> None:
        """tokenizer.json and the model's own files: vocab.json and merges.txt, or vocab.txt."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        if isinstance(self.backend.model, models.WordLevel):
            vocab = sorted(self.backend.get_vocab().items(), key=lambda item: item[1])
            (folder / "vocab.json").write_text(json.dumps(dict(vocab), ensure_ascii=False),
                                               encoding="utf-8")
        else:
            self.backend.model.save(str(folder))


def load(path: str | Path) -> Tokenizer:
    """A tokenizer from a folder (or its tokenizer.json), in any of the standard forms.

    tokenizer.json; vocab.json with merges.txt, or OpenAI's encoder.json with vocab.bpe (byte-level
    BPE); vocab.txt (BERT's WordPiece, uncased).

    Raises:
        FileNotFoundError: no such folder, or none of these files in it.
        ValueError: a file that cannot be read as what its name says.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    whole = path if path.is_file() else folder / "tokenizer.json"
    try:
        if whole.is_file():
            return Tokenizer(hf.Tokenizer.from_file(str(whole)))
        for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
            if (folder / vocab).is_file() and (folder / merges).is_file():
                model = models.BPE.from_file(str(folder / vocab), str(folder / merges))
                return _byte_level(model, [END_OF_TEXT])
        if (folder / "vocab.txt").is_file():
            model = models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]")
            return _wordpiece(model, lowercase=True)
    except Exception as error:  # the backend raises bare Exception
        raise ValueError(f"{path} cannot be read as a tokenizer ({error}); save it again") from error
    raise FileNotFoundError(f"{path} has no tokenizer.json, vocab.json with merges.txt, or "
                            "vocab.txt; give the folder of a saved tokenizer")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE as in GPT-2 (Radford et al. 2019, section 2.2): every text can be written, and
    decode(encode(text)) == text. End-of-text has id 0."""
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is too small for byte-level BPE, which needs "
                         f"{smallest} for the bytes; raise it")
    tokenizer = _byte_level(models.BPE(), [END_OF_TEXT])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.backend.train_from_iterator(_some(texts), trainer)
    return tokenizer


def train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool = True) -> Tokenizer:
    """WordPiece with BERT's normalisation; [PAD] has id 0, then [UNK], [CLS], [SEP], [MASK]."""
    if vocab_size <= len(BERT_SPECIALS):
        raise ValueError(f"vocab_size {vocab_size} leaves no room beside {len(BERT_SPECIALS)} "
                         "special tokens; raise it")
    tokenizer = _wordpiece(models.WordPiece(unk_token="[UNK]"), lowercase)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(BERT_SPECIALS), show_progress=False
    )
    tokenizer.backend.train_from_iterator(_some(texts), trainer)
    return tokenizer


def train_chars(texts: Iterable[str]) -> Tokenizer:
    """A token for every character of the texts; others become <unk>. Newlines and spaces stay."""
    characters = sorted(set().union(*_some(texts)))
    specials = [END_OF_TEXT, UNKNOWN_CHARACTER]
    vocab = {token: i for i, token in enumerate([*specials, *characters])}
    backend = hf.Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN_CHARACTER))
    backend.pre_tokenizer = pre_tokenizers.Split(hf.Regex("(?s)."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(specials)
    return Tokenizer(backend)


def _some(texts: Iterable[str]) -> Iterable[str]:
    """The texts, or an error where there are none to learn from."""
    texts = list(texts)
    if not any(texts):
        raise ValueError(f"{len(texts)} texts hold nothing to train a tokenizer on; give at least "
                         "one with characters in it")
    return texts


def _byte_level(model: models.BPE, specials: list[str]) -> Tokenizer:
    backend = hf.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens(specials)
    return Tokenizer(backend)


def _wordpiece(model: models.WordPiece, lowercase: bool) -> Tokenizer:
    backend = hf.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(list(BERT_SPECIALS))
    return Tokenizer(backend)
