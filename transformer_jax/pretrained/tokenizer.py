"""Loading of the tokenizer of a Hugging Face checkpoint.

A tokenizer is loaded from tokenizer.json, or from the vocabulary files of the model family. Its
`encode(text, add_special_tokens=True)` returns token ids in the format that the checkpoint's
model was trained on, special tokens included.
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
from transformer_jax.pretrained import sentencepiece_model

CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "source.spm", "target.spm",
    "sentencepiece.bpe.model", "spiece.model")
# Language tokens of mBART in the order of their ids, which come after the ids of the pieces
# (`FAIRSEQ_LANGUAGE_CODES` in Transformers).
MBART_LANGUAGES = (
    "ar_AR", "cs_CZ", "de_DE", "en_XX", "es_XX", "et_EE", "fi_FI", "fr_XX", "gu_IN", "hi_IN",
    "it_IT", "ja_XX", "kk_KZ", "ko_KR", "lt_LT", "lv_LV", "my_MM", "ne_NP", "nl_XX", "ro_RO",
    "ru_RU", "si_LK", "tr_TR", "vi_VN", "zh_CN",
)
_SPACE_MARK = "▁"  # replaces a space in SentencePiece pieces
_MARIAN_SPECIAL_TOKENS = ("</s>", "<unk>", "<pad>")


@dataclass(frozen=True, eq=False)
class PretrainedTokenizer(Tokenizer):
    """A tokenizer that keeps the checkpoint files it was loaded from.

    Attributes:
        files: file name -> content, for all tokenizer files except tokenizer.json.
    """

    files: dict[str, bytes] = field(default_factory=dict, repr=False)

    def save(self, directory: str | Path) -> None:
        """Saves tokenizer.json and unchanged copies of the checkpoint's other tokenizer files."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        for name, content in self.files.items():
            (directory / name).write_bytes(content)


@dataclass(frozen=True, eq=False)
class MarianTokenizer(PretrainedTokenizer):
    """The tokenizer of a Marian translation model.

    Source and target language each have a SentencePiece model that splits texts into pieces;
    vocab.json maps the pieces of both languages to ids. A source text may start with the code of
    the target language, as in ">>fr<< Good morning".

    Attributes:
        vocab: piece -> id, for both languages.
        target: backend for texts in the target language; `backend` is for the source language.
    """

    vocab: dict[str, int] = field(default_factory=dict, repr=False)
    target: Backend | None = field(default=None, repr=False)

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = False, target: bool = False
    ) -> list[list[int]]:
        """Token ids of each text.

        Args:
            texts: the texts, all in the same language.
            add_special_tokens: whether to append "</s>".
            target: whether the texts are in the target language instead of the source language.

        Raises:
            ValueError: a text is not a string of valid Unicode.
        """
        unk_id = self.vocab["<unk>"]
        backend = self.target if target else self.backend
        for i, text in enumerate(texts):
            tokenizers.check_text(text, i)
        pairs = [_split_language_code(text) for text in texts]
        encodings = backend.encode_batch([text for _, text in pairs], add_special_tokens=False)
        suffix = [self.vocab["</s>"]] if add_special_tokens else []
        return [
            [self.vocab.get(token, unk_id) for token in ([code] if code else []) + encoding.tokens]
            + suffix for (code, _), encoding in zip(pairs, encodings)]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """Converts token ids of either language to text.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        special_ids = {self.vocab[token] for token in _MARIAN_SPECIAL_TOKENS}
        tokens = [self._tokens.get(i, "") for i in self._check_ids(ids)
                  if not (skip_special_tokens and i in special_ids)]
        return "".join(tokens).replace(_SPACE_MARK, " ").strip()

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
        """bool [V]: whether each token starts a word."""
        starts = np.zeros(self.vocab_size, bool)
        for token, i in self.vocab.items():
            starts[i] = token.startswith((_SPACE_MARK, *_MARIAN_SPECIAL_TOKENS))
        return starts

    def save(self, directory: str | Path) -> None:
        """Saves unchanged copies of the checkpoint's tokenizer files."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (directory / name).write_bytes(content)


# A text with a private-use character. Encoding it fails if the vocabulary requires an unknown token
# but does not contain it.
_PROBE_TEXT = "a \U0010fffd"


def _split_language_code(text: str) -> tuple[str, str]:
    """(language code or "", remaining text): ">>fr<< Good" -> (">>fr<<", " Good")."""
    end = text.find("<<")
    return (text[: end + 2], text[end + 2 :]) if text.startswith(">>") and end > 0 else ("", text)


def load(folder: Path, hf_config: dict[str, Any]) -> Tokenizer | None:
    """Loads the tokenizer of a checkpoint folder; None if the folder has no supported tokenizer.

    Args:
        folder: the folder.
        hf_config: the fields of config.json; the model family determines how vocabulary files are
            interpreted.

    Raises:
        ValueError: a file is invalid, or requires an unsupported option.

    Example:

        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello"]
        >>> _ = (folder / "vocab.txt").write_text("\\n".join(vocab))
        >>> load(folder, {"model_type": "bert"}).encode("Hello", add_special_tokens=True)
        [2, 5, 3]
    """
    present = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    has_config = CONFIG_FILE in present
    tokenizer_config = storage.read_json(present[CONFIG_FILE]) if has_config else {}
    model_type = hf_config.get("model_type", "")
    for names, load_files in _LOADERS.items():
        if not all(name in present for name in names):
            continue
        paths = [present[name] for name in names]
        try:
            loaded = load_files(*paths, model_type=model_type, tokenizer_config=tokenizer_config,
                                has_config=has_config)
            if isinstance(loaded, Backend):
                loaded.encode(_PROBE_TEXT)
        except BaseException as error:
            # The `tokenizers` library raises plain `Exception`. If its Rust code panics, it raises
            # PanicException, which is derived from BaseException.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{paths[0]} cannot be loaded as a tokenizer ({error}); if the file "
                             "is corrupted or truncated, download it again") from None
        files = {name: path.read_bytes() for name, path in present.items()
                 if name != "tokenizer.json"}
        if isinstance(loaded, Backend):
            if "tokenizer.json" not in present and "added_tokens.json" in present:
                _add_tokens(loaded, storage.read_json(present["added_tokens.json"]))
            return PretrainedTokenizer(loaded, files)
        source, target, vocab = loaded
        return MarianTokenizer(source, files, vocab, target)
    if "spiece.model" in present:
        print(f"unsupported tokenizer file {present['spiece.model']}; no tokenizer is loaded; "
              "supported: tokenizer.json in the same folder", file=sys.stderr)
    return None


def _add_tokens(backend: Backend, added: dict[str, int]) -> None:
    """Adds the tokens of added_tokens.json (token -> id), in the order of their ids."""
    for token, i in sorted(added.items(), key=lambda item: item[1]):
        backend.add_tokens([AddedToken(token, normalized=False)])
        if backend.token_to_id(token) != i:
            raise ValueError(f"added_tokens.json gives {token!r} the id {i}, but the next id of "
                             f"the vocabulary is {backend.token_to_id(token)}; download the "
                             "tokenizer again")


# Loaders -----------------------------------------------------------------------------------------
#
# Arguments of each loader:
#     the paths of its files (see `_LOADERS`);
#     model_type: the model family, from config.json;
#     tokenizer_config: the fields of tokenizer_config.json, empty if the file does not exist;
#     has_config: whether tokenizer_config.json exists.


def _load_json(
    path: Path, *, model_type: str, tokenizer_config: dict, has_config: bool
) -> Backend:
    """Loads tokenizer.json; the options of tokenizer_config.json take precedence."""
    backend = tokenizers.load(path).backend
    normalizer = backend.normalizer
    if isinstance(normalizer, normalizers.BertNormalizer):
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=normalizer.clean_text,
            handle_chinese_chars=tokenizer_config.get("tokenize_chinese_chars",
                                                      normalizer.handle_chinese_chars),
            strip_accents=tokenizer_config.get("strip_accents", normalizer.strip_accents),
            lowercase=tokenizer_config.get("do_lower_case", normalizer.lowercase))
    pre_tokenizer = backend.pre_tokenizer
    if (isinstance(pre_tokenizer, pre_tokenizers.ByteLevel)
            and "add_prefix_space" in tokenizer_config):
        pre_tokenizer.add_prefix_space = bool(tokenizer_config["add_prefix_space"])
        backend.pre_tokenizer = pre_tokenizer
    return backend


def _load_wordpiece(
    path: Path, *, model_type: str, tokenizer_config: dict, has_config: bool
) -> Backend:
    """Loads the vocab.txt of BERT and DistilBERT (WordPiece)."""
    backend = tokenizers.load(path).backend
    if has_config:
        backend.normalizer = normalizers.BertNormalizer(
            handle_chinese_chars=tokenizer_config.get("tokenize_chinese_chars", True),
            strip_accents=tokenizer_config.get("strip_accents"),
            lowercase=tokenizer_config.get("do_lower_case", True))
    return backend


def _load_bpe(
    vocab: Path, merges: Path, *, model_type: str, tokenizer_config: dict, has_config: bool
) -> Backend:
    """Loads vocab.json and merges.txt: byte-level BPE, or the BPE of GPT-1."""
    tokenizer_class = (tokenizer_config.get("tokenizer_class") or model_type).lower()
    if tokenizer_class.startswith("openai"):
        return _load_gpt1(vocab, merges)
    add_prefix_space = bool(tokenizer_config.get("add_prefix_space"))
    backend = tokenizers.load(vocab).backend
    if add_prefix_space:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    ids = backend.get_vocab()
    if tokenizer_class.startswith(("roberta", "bart")) or model_type in ("roberta", "bart"):
        # As in pre-training, "<mask>" includes the preceding space.
        backend.add_special_tokens([
            AddedToken(token, lstrip=token == "<mask>", normalized=False)
            for token in tokenizers.SEQ2SEQ_SPECIAL_TOKENS if token in ids])
        backend.post_processor = processors.RobertaProcessing(
            ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=add_prefix_space)
    return backend


def _load_gpt1(vocab: Path, merges: Path) -> Backend:
    """Loads the BPE of GPT-1: BERT's pre-tokenization of lowercase text, "</w>" after each word."""
    backend = Backend(models.BPE.from_file(
        str(vocab), str(merges), unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    if "<unk>" in backend.get_vocab():
        backend.add_special_tokens(["<unk>"])
    return backend


def _load_marian(
    source: Path, target: Path, vocab: Path, *, model_type: str, tokenizer_config: dict,
    has_config: bool,
) -> tuple[Backend, Backend, dict[str, int]]:
    """Loads source.spm, target.spm and vocab.json of Marian.

    Returns:
        (backend of the source language, backend of the target language, piece -> id).
    """
    if tokenizer_config.get("separate_vocabs"):
        raise ValueError("unsupported separate_vocabs True; supported: False, one vocabulary for "
                         "both languages")
    ids = storage.read_json(vocab)
    if missing := [token for token in _MARIAN_SPECIAL_TOKENS if token not in ids]:
        raise ValueError(f"{vocab.name} has no token {missing[0]!r}")
    backends = [sentencepiece_model.make_backend(sentencepiece_model.load_model(path))
                for path in (source, target)]
    for backend in backends:
        backend.add_special_tokens(list(_MARIAN_SPECIAL_TOKENS))
    return *backends, ids


def _load_fairseq(
    path: Path, *, model_type: str, tokenizer_config: dict, has_config: bool
) -> Backend:
    """Loads the sentencepiece.bpe.model of XLM-RoBERTa, CamemBERT and mBART.

    As in fairseq, the special tokens of the family have the first ids, and the pieces of the
    SentencePiece model have the ids after them.
    """
    model = sentencepiece_model.load_model(path)
    if model_type == "camembert":
        special_tokens = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"]
        pieces = [*((token, 0.0) for token in special_tokens), *model.pieces[1:]]
        pieces[4] = ("<unk>NOTUSED", -100.0)
    else:
        special_tokens = ["<s>", "<pad>", "</s>", "<unk>"]
        pieces = [*((token, 0.0) for token in special_tokens), *model.pieces[3:]]
    languages = MBART_LANGUAGES if model_type == "mbart" else ()
    pieces += [(token, 0.0) for token in (*languages, "<mask>")]
    backend = sentencepiece_model.make_backend(model, pieces, unk_id=3)
    backend.add_special_tokens([
        *("<s>", "<pad>", "</s>", "<unk>", *languages),
        AddedToken("<mask>", lstrip=True, normalized=False)])
    language = tokenizer_config.get("src_lang") or "en_XX"
    template = f"$A </s> {language}" if model_type == "mbart" else "<s> $A </s>"
    template_tokens = [token for token in template.split() if token != "$A"]
    backend.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[(token, backend.token_to_id(token)) for token in template_tokens])
    return backend


# File names -> loader of these files. The first entry whose files all exist is used.
_LOADERS: dict[tuple[str, ...], Callable] = {
    ("source.spm", "target.spm", "vocab.json"): _load_marian,
    ("tokenizer.json",): _load_json,
    ("vocab.json", "merges.txt"): _load_bpe,
    ("encoder.json", "vocab.bpe"): _load_bpe,
    ("vocab.txt",): _load_wordpiece,
    ("sentencepiece.bpe.model",): _load_fairseq,
}
