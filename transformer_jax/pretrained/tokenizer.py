"""Loading of the tokenizer of a Hugging Face checkpoint.

A tokenizer is loaded from tokenizer.json, or from the vocabulary files of the model family. With
`add_special_tokens=True` it encodes texts in the format that the model was trained on.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError, Message
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from transformer_jax import storage
from transformer_jax.data import tokenizers
from transformer_jax.data.tokenizers import Tokenizer

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
# A text with a private-use character. Encoding it fails if the vocabulary requires an unknown token
# but does not contain it.
_PROBE_TEXT = "a \U0010fffd"


@dataclass(frozen=True, eq=False)
class PretrainedTokenizer(Tokenizer):
    """A tokenizer that keeps the checkpoint files it was loaded from."""

    files: dict[str, bytes] = field(default_factory=dict, repr=False)  # without tokenizer.json

    def save(self, directory: str | Path) -> None:
        """Saves tokenizer.json and unchanged copies of the checkpoint's other tokenizer files."""
        _write_files(directory, {
            "tokenizer.json": self.backend.to_str(pretty=True).encode(), **self.files})


@dataclass(frozen=True, eq=False)
class MarianTokenizer(PretrainedTokenizer):
    """The tokenizer of a Marian translation model.

    Source and target language each have a SentencePiece model that splits texts into pieces;
    `vocab` maps the pieces of both languages to ids. A source text may start with the code of the
    target language, as in ">>fr<< Good morning".
    """

    vocab: dict[str, int] = field(default_factory=dict, repr=False)
    target: Backend | None = field(default=None, repr=False)  # `backend` is for the source language

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = False, target: bool = False
    ) -> list[list[int]]:
        """Token ids of each text, which is in the source language unless `target`."""
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
        starts = np.zeros(self.vocab_size, bool)
        for token, i in self.vocab.items():
            starts[i] = token.startswith((_SPACE_MARK, *_MARIAN_SPECIAL_TOKENS))
        return starts

    def save(self, directory: str | Path) -> None:
        """Saves unchanged copies of the checkpoint's tokenizer files."""
        _write_files(directory, self.files)


def _write_files(directory: str | Path, files: dict[str, bytes]) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (Path(directory) / name).write_bytes(content)


def _split_language_code(text: str) -> tuple[str, str]:
    """(language code or "", remaining text): ">>fr<< Good" -> (">>fr<<", " Good")."""
    end = text.find("<<")
    return (text[: end + 2], text[end + 2 :]) if text.startswith(">>") and end > 0 else ("", text)


def load(folder: Path, hf_config: dict[str, Any]) -> Tokenizer | None:
    """Loads the tokenizer of a checkpoint folder; None if the folder has no supported tokenizer.

    The model family in `hf_config`, the fields of config.json, determines how vocabulary files are
    interpreted. ValueError if a file is invalid, or requires an unsupported option.
    """
    present = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    options = storage.read_json(present[CONFIG_FILE]) if CONFIG_FILE in present else {}
    for names, load_files in _LOADERS.items():
        if not all(name in present for name in names):
            continue
        paths = [present[name] for name in names]
        try:
            loaded = load_files(*paths, hf_config.get("model_type", ""), options)
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
        if not isinstance(loaded, Backend):
            source, target, vocab = loaded
            return MarianTokenizer(source, files, vocab, target)
        if "tokenizer.json" not in present and "added_tokens.json" in present:
            _add_tokens(loaded, storage.read_json(present["added_tokens.json"]))
        return PretrainedTokenizer(loaded, files)
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
# Arguments: the paths of the files, the model family, the fields of tokenizer_config.json.


def _load_json(path: Path, model_type: str, options: dict) -> Backend:
    """Loads tokenizer.json; the options of tokenizer_config.json take precedence."""
    backend = tokenizers.load(path).backend
    if isinstance(normalizer := backend.normalizer, normalizers.BertNormalizer):
        backend.normalizer = _bert_normalizer(options, normalizer)
    pre_tokenizer = backend.pre_tokenizer
    if isinstance(pre_tokenizer, pre_tokenizers.ByteLevel) and "add_prefix_space" in options:
        pre_tokenizer.add_prefix_space = bool(options["add_prefix_space"])
        backend.pre_tokenizer = pre_tokenizer
    return backend


def _load_wordpiece(path: Path, model_type: str, options: dict) -> Backend:
    """Loads the vocab.txt of BERT and DistilBERT (WordPiece)."""
    backend = tokenizers.load(path).backend
    if path.with_name(CONFIG_FILE).is_file():  # otherwise the vocabulary determines the case
        backend.normalizer = _bert_normalizer(options, normalizers.BertNormalizer())
    return backend


def _bert_normalizer(
    options: dict, default: normalizers.BertNormalizer
) -> normalizers.BertNormalizer:
    return normalizers.BertNormalizer(
        clean_text=default.clean_text,
        handle_chinese_chars=options.get("tokenize_chinese_chars", default.handle_chinese_chars),
        strip_accents=options.get("strip_accents", default.strip_accents),
        lowercase=options.get("do_lower_case", default.lowercase))


def _load_bpe(vocab: Path, merges: Path, model_type: str, options: dict) -> Backend:
    """Loads vocab.json and merges.txt: byte-level BPE, or the BPE of GPT-1."""
    tokenizer_class = (options.get("tokenizer_class") or model_type).lower()
    if tokenizer_class.startswith("openai"):
        return _load_gpt1(vocab, merges)
    add_prefix_space = bool(options.get("add_prefix_space"))
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
    source: Path, target: Path, vocab: Path, model_type: str, options: dict
) -> tuple[Backend, Backend, dict[str, int]]:
    """(backend of the source language, backend of the target language, piece -> id) of Marian."""
    if options.get("separate_vocabs"):
        raise ValueError("unsupported separate_vocabs True; supported: False, one vocabulary for "
                         "both languages")
    ids = storage.read_json(vocab)
    if missing := [token for token in _MARIAN_SPECIAL_TOKENS if token not in ids]:
        raise ValueError(f"{vocab.name} has no token {missing[0]!r}")
    backends = []
    for path in (source, target):
        model = load_sentencepiece(path)
        unk_id = [piece.type for piece in model.pieces].index(_UNKNOWN)
        backends.append(_sentencepiece_backend(model, _pieces(model), unk_id))
        backends[-1].add_special_tokens(list(_MARIAN_SPECIAL_TOKENS))
    return *backends, ids


def _load_fairseq(path: Path, model_type: str, options: dict) -> Backend:
    """Loads the sentencepiece.bpe.model of XLM-RoBERTa, CamemBERT and mBART.

    As in fairseq, the special tokens of the family have the first ids, and the pieces of the
    SentencePiece model have the ids after them.
    """
    model = load_sentencepiece(path)
    if model_type == "camembert":
        pieces = [("<s>NOTUSED", 0.0), ("<pad>", 0.0), ("</s>NOTUSED", 0.0), ("<unk>", 0.0),
                  ("<unk>NOTUSED", -100.0), *_pieces(model)[1:]]
    else:
        pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *_pieces(model)[3:]]
    languages = MBART_LANGUAGES if model_type == "mbart" else ()
    pieces += [(token, 0.0) for token in (*languages, "<mask>")]
    backend = _sentencepiece_backend(model, pieces, unk_id=3)
    backend.add_special_tokens([
        *("<s>", "<pad>", "</s>", "<unk>", *languages),
        AddedToken("<mask>", lstrip=True, normalized=False)])
    language = options.get("src_lang") or "en_XX"
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


# SentencePiece models -----------------------------------------------------------------------------

_UNIGRAM = 1  # value of TrainerSpec.ModelType
_UNKNOWN, _USER_DEFINED = 2, 4  # values of ModelProto.SentencePiece.Type
# The fields of sentencepiece_model.proto in the SentencePiece repository that determine
# tokenization, with their defaults.
_SCHEMA = """
name: "sentencepiece_model.proto"
message_type { name: "SentencePiece"
  field { name: "piece" number: 1 type: TYPE_BYTES }
  field { name: "score" number: 2 type: TYPE_FLOAT }
  field { name: "type" number: 3 type: TYPE_INT32 default_value: "1" } }
message_type { name: "TrainerSpec"
  field { name: "model_type" number: 3 type: TYPE_INT32 default_value: "1" } }
message_type { name: "NormalizerSpec"
  field { name: "precompiled_charsmap" number: 2 type: TYPE_BYTES }
  field { name: "add_dummy_prefix" number: 3 type: TYPE_BOOL default_value: "true" }
  field { name: "remove_extra_whitespaces" number: 4 type: TYPE_BOOL default_value: "true" } }
message_type { name: "ModelProto"
  field { name: "pieces" number: 1 label: LABEL_REPEATED type_name: "SentencePiece" }
  field { name: "trainer_spec" number: 2 type_name: "TrainerSpec" }
  field { name: "normalizer_spec" number: 3 type_name: "NormalizerSpec" } }
"""


@functools.cache
def _model_class() -> type[Message]:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("ModelProto"))


def load_sentencepiece(path: Path) -> Message:
    """Loads a SentencePiece model file, a `ModelProto`; ValueError if it is no unigram model."""
    try:
        model = _model_class().FromString(path.read_bytes())
        types = {piece.type for piece in model.pieces}
        _pieces(model)
    except (DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a SentencePiece model ({error}); the file is corrupted or "
                         "truncated; download it again") from None
    if model.trainer_spec.model_type != _UNIGRAM or _UNKNOWN not in types:
        raise ValueError(f"unsupported SentencePiece model {path} of type "
                         f"{model.trainer_spec.model_type} with {len(model.pieces)} pieces; "
                         "supported: unigram models (type 1) with an unknown piece")
    return model


def _pieces(model: Message) -> list[tuple[str, float]]:
    """(piece, log probability), in the order of their ids."""
    return [(piece.piece.decode(), piece.score) for piece in model.pieces]


def _sentencepiece_backend(
    model: Message, pieces: list[tuple[str, float]], unk_id: int
) -> Backend:
    """A backend with the ids of `pieces` that tokenizes like a SentencePiece model."""
    backend = Backend(models.Unigram(pieces, unk_id, False))
    normalizer = model.normalizer_spec
    steps = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex("^ | $"), "")]
    backend.normalizer = normalizers.Sequence(steps)
    scheme = "always" if normalizer.add_dummy_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.add_tokens([AddedToken(piece.piece.decode(), normalized=False)
                        for piece in model.pieces if piece.type == _USER_DEFINED])
    return backend
