"""A checkpoint's tokenizer: tokenizer.json, or a family's own vocabulary files.

`encode(text, add_special=True)` gives the ids that the checkpoint's model was trained on.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from transformer_jax import storage
from transformer_jax.data import tokenizers
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.pretrained import sentencepiece

CONFIG = "tokenizer_config.json"
FILES = ("tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.txt",
         "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "source.spm", "target.spm",
         "sentencepiece.bpe.model", "spiece.model")
# mBART's languages (`FAIRSEQ_LANGUAGE_CODES` of the reference), after the pieces.
LANGUAGES = (
    "ar_AR", "cs_CZ", "de_DE", "en_XX", "es_XX", "et_EE", "fi_FI", "fr_XX", "gu_IN", "hi_IN",
    "it_IT", "ja_XX", "kk_KZ", "ko_KR", "lt_LT", "lv_LV", "my_MM", "ne_NP", "nl_XX", "ro_RO",
    "ru_RU", "si_LK", "tr_TR", "vi_VN", "zh_CN",
)
_UNDERLINE = "▁"  # how SentencePiece writes a space


@dataclass(frozen=True, eq=False)
class PretrainedTokenizer(Tokenizer):
    """A tokenizer that is saved with the files it came with."""

    files: dict[str, bytes] = field(default_factory=dict, repr=False)

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and the source's other files as they were."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        for name, content in self.files.items():
            (directory / name).write_bytes(content)


@dataclass(frozen=True, eq=False)
class MarianTokenizer(PretrainedTokenizer):
    """Marian's: SentencePiece cuts the source's texts, vocab.json numbers the pieces of both
    languages. A text may begin with the language to write, as in ">>fr<< Good morning"."""

    vocab: dict[str, int] = field(default_factory=dict, repr=False)
    target: Backend | None = field(default=None, repr=False)  # cuts texts of the other language

    def encode_batch(
        self, texts: Sequence[str], add_special: bool = False, target: bool = False
    ) -> list[list[int]]:
        """Ids of each text; those of translations with `target`."""
        unknown = self.vocab["<unk>"]
        backend = self.target if target else self.backend
        for i, text in enumerate(texts):
            tokenizers.check_text(text, i)
        cut = [_language_code(text) for text in texts]
        rows = backend.encode_batch([text for _, text in cut], add_special_tokens=False)
        end = [self.vocab["</s>"]] if add_special else []
        return [[self.vocab.get(token, unknown) for token in ([code] if code else []) + row.tokens]
                + end for (code, _), row in zip(cut, rows)]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """The text of ids, of either language."""
        special = {self.vocab[token] for token in ("</s>", "<pad>", "<unk>")}
        tokens = [self._tokens.get(i, "") for i in self._inside(ids)
                  if not (skip_special and i in special)]
        return "".join(tokens).replace(_UNDERLINE, " ").strip()

    @property
    def vocab_size(self) -> int:
        return max(self.vocab.values()) + 1

    def _id(self, token: str) -> int | None:
        return self.vocab.get(token)

    @functools.cached_property
    def _tokens(self) -> dict[int, str]:
        return {i: token for token, i in self.vocab.items()}

    @functools.cached_property
    def is_word_start(self) -> np.ndarray:
        """bool [V]: whether a token begins a word."""
        starts = np.zeros(self.vocab_size, bool)
        for token, i in self.vocab.items():
            starts[i] = token.startswith((_UNDERLINE, "</s>", "<pad>", "<unk>"))
        return starts

    def save(self, directory: str | Path) -> None:
        """Writes the source's files as they were."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (directory / name).write_bytes(content)


_PROBE = "a \U0010fffd"  # a vocabulary without a token for what is unknown fails on it


def _language_code(text: str) -> tuple[str, str]:
    """">>fr<< Good morning" -> ">>fr<<", " Good morning"."""
    end = text.find("<<")
    return (text[: end + 2], text[end + 2 :]) if text.startswith(">>") and end > 0 else ("", text)


def load(folder: Path, values: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer in a checkpoint's folder, None where there is none.

    Args:
        values: the fields of config.json; the family decides how a vocabulary is used.

    Raises:
        ValueError: a file cannot be read as what its name says.
    """
    present = {name: folder / name for name in FILES if (folder / name).is_file()}
    config = storage.read_json(present[CONFIG]) if CONFIG in present else {}
    family = values.get("model_type", "")
    for names, make in _MAKERS.items():
        if not all(name in present for name in names):
            continue
        paths = [present[name] for name in names]
        try:
            made = make(*paths, family=family, config=config, stated=CONFIG in present)
            if isinstance(made, Backend):
                made.encode(_PROBE)
        except BaseException as error:
            # The library raises bare Exception, and where it panics something that is none.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{paths[0]} cannot be read as a tokenizer ({error}); fetch it "
                             "again") from None
        files = {name: path.read_bytes() for name, path in present.items()
                 if name != "tokenizer.json"}
        if isinstance(made, Backend):
            if "tokenizer.json" not in present and "added_tokens.json" in present:
                _add(made, storage.read_json(present["added_tokens.json"]))
            return PretrainedTokenizer(made, files)
        source, target, vocab = made
        return MarianTokenizer(source, files, vocab, target)
    if "spiece.model" in present:
        print(f"{present['spiece.model']} is not read here: the tokenizer is None; a "
              "tokenizer.json beside it would be", file=sys.stderr)
    return None


def _add(backend: Backend, added: dict[str, int]) -> None:
    """Tokens that were added after training, in the order of their ids."""
    for token, i in sorted(added.items(), key=lambda item: item[1]):
        backend.add_tokens([AddedToken(token, normalized=False)])
        if backend.token_to_id(token) != i:
            raise ValueError(f"added_tokens.json gives {token!r} the id {i}, but the vocabulary's "
                             f"next is {backend.token_to_id(token)}; fetch it again")


def _from_json(path: Path, *, family: str, config: dict, stated: bool) -> Backend:
    """tokenizer.json, where tokenizer_config.json may say otherwise."""
    backend = tokenizers.load(path).backend
    normalizer = backend.normalizer
    if isinstance(normalizer, normalizers.BertNormalizer):
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=normalizer.clean_text,
            handle_chinese_chars=config.get("tokenize_chinese_chars",
                                            normalizer.handle_chinese_chars),
            strip_accents=config.get("strip_accents", normalizer.strip_accents),
            lowercase=config.get("do_lower_case", normalizer.lowercase))
    before = backend.pre_tokenizer
    if isinstance(before, pre_tokenizers.ByteLevel) and "add_prefix_space" in config:
        before.add_prefix_space = bool(config["add_prefix_space"])
        backend.pre_tokenizer = before
    return backend


def _wordpiece(path: Path, *, family: str, config: dict, stated: bool) -> Backend:
    """vocab.txt of BERT and DistilBERT."""
    backend = tokenizers.load(path).backend
    if stated:
        lowercase = config.get("do_lower_case", True)
        backend.normalizer = normalizers.BertNormalizer(
            handle_chinese_chars=config.get("tokenize_chinese_chars", True),
            strip_accents=config.get("strip_accents"), lowercase=lowercase)
    return backend


def _bpe(vocab: Path, merges: Path, *, family: str, config: dict, stated: bool) -> Backend:
    """vocab.json and merges.txt: byte-level, or the first GPT's."""
    named = config.get("tokenizer_class") or family
    if named.lower().startswith("openai"):
        return _gpt1(vocab, merges)
    backend = tokenizers.load(vocab).backend
    if config.get("add_prefix_space"):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    known = backend.get_vocab()
    if named.lower().startswith(("roberta", "bart")) or family in ("roberta", "bart"):
        # "<mask>" takes the space in front of it, as in pre-training.
        backend.add_special_tokens([
            AddedToken(token, lstrip=token == "<mask>", normalized=False)
            for token in tokenizers.SEQ2SEQ_SPECIALS if token in known])
        backend.post_processor = processors.RobertaProcessing(
            ("</s>", known["</s>"]), ("<s>", known["<s>"]),
            add_prefix_space=bool(config.get("add_prefix_space")))
    return backend


def _gpt1(vocab: Path, merges: Path) -> Backend:
    """The first GPT: BERT's words in lower case, in pieces of which the last carries "</w>"."""
    backend = Backend(models.BPE.from_file(
        str(vocab), str(merges), unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    if "<unk>" in backend.get_vocab():
        backend.add_special_tokens(["<unk>"])
    return backend


def _marian(source: Path, target: Path, vocab: Path, *, family: str, config: dict, stated: bool):
    """Cutters of both languages, and the vocabulary they share."""
    if config.get("separate_vocabs"):
        raise ValueError("separate_vocabs is true; only one vocabulary for both languages is here")
    ids = storage.read_json(vocab)
    if missing := [token for token in ("</s>", "<unk>", "<pad>") if token not in ids]:
        raise ValueError(f"{vocab.name} lacks {missing[0]!r}")
    cutters = [sentencepiece.backend(sentencepiece.read(path)) for path in (source, target)]
    for cutter in cutters:
        cutter.add_special_tokens(["</s>", "<unk>", "<pad>"])
    return *cutters, ids


def _fairseq(path: Path, *, family: str, config: dict, stated: bool) -> Backend:
    """sentencepiece.bpe.model of XLM-RoBERTa, CamemBERT and mBART, which number the pieces behind
    special tokens of their own."""
    model = sentencepiece.read(path)
    if family == "camembert":
        first = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"]
        pieces = [*((token, 0.0) for token in first), *model.pieces[1:]]
        pieces[4] = ("<unk>NOTUSED", -100.0)
    else:
        first = ["<s>", "<pad>", "</s>", "<unk>"]
        pieces = [*((token, 0.0) for token in first), *model.pieces[3:]]
    languages = LANGUAGES if family == "mbart" else ()
    pieces += [(token, 0.0) for token in (*languages, "<mask>")]
    backend = sentencepiece.backend(model, pieces, unknown=3)
    backend.add_special_tokens([
        *("<s>", "<pad>", "</s>", "<unk>", *languages),
        AddedToken("<mask>", lstrip=True, normalized=False)])
    language = config.get("src_lang") or "en_XX"
    frame = f"$A </s> {language}" if family == "mbart" else "<s> $A </s>"
    ends = [token for token in frame.split() if token != "$A"]
    backend.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[(token, backend.token_to_id(token)) for token in ends])
    return backend


# The first of which all files are there counts.
_MAKERS: dict[tuple[str, ...], Callable] = {
    ("source.spm", "target.spm", "vocab.json"): _marian,
    ("tokenizer.json",): _from_json,
    ("vocab.json", "merges.txt"): _bpe,
    ("encoder.json", "vocab.bpe"): _bpe,
    ("vocab.txt",): _wordpiece,
    ("sentencepiece.bpe.model",): _fairseq,
}
