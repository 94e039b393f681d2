"""Tokenizer backends: functions that make or load `Tokenizer` objects of the package tokenizers."""

from collections.abc import Callable

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

END_OF_TEXT = "<|endoftext|>"
UNKNOWN_TOKEN = "<unk>"
BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Special tokens of encoder-decoders, in BART's order.
SEQ2SEQ_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
CONTINUATION_PREFIX = "##"  # WordPiece tokens that continue a word start with it


def byte_level(model: models.BPE) -> Backend:
    """Returns a backend with GPT-2's byte-level pre-tokenization and decoding.

    Example:
        >>> is_byte_level(byte_level(models.BPE()))
        True
    """
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def is_byte_level(backend: Backend) -> bool:
    """Returns whether a backend uses byte-level decoding, as in GPT-2."""
    return isinstance(backend.decoder, decoders.ByteLevel)


def bert(model: models.WordPiece, lowercase: bool) -> Backend:
    """Returns a backend with BERT's normalization and pre-tokenization, without special tokens."""
    backend = Backend(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def wordpiece(vocab: dict[str, int], lowercase: bool) -> Backend:
    """Returns the WordPiece backend of BERT for a vocabulary.

    If `encode` is called with `add_special_tokens=True`, it returns [CLS] text [SEP].
    """
    backend = bert(models.WordPiece(vocab, unk_token="[UNK]"), lowercase)
    backend.add_special_tokens([token for token in BERT_SPECIAL_TOKENS if token in vocab])
    backend.decoder = decoders.WordPiece(prefix=CONTINUATION_PREFIX)
    if "[CLS]" in vocab and "[SEP]" in vocab:
        backend.post_processor = processors.BertProcessing(
            ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return backend


def append_eos(backend: Backend) -> Backend:
    """Makes `encode(text, add_special_tokens=True)` append "</s>", as in encoder-decoders.

    The backend is changed in place and returned. If its vocabulary has no "</s>", it is not
    changed.
    """
    eos_id = backend.token_to_id("</s>")
    if eos_id is not None:
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", eos_id)])
    return backend


# Loading ------------------------------------------------------------------------------------------


def _load_json(path: str) -> Backend:
    backend = Backend.from_file(path)
    # Rows are truncated and padded when batches are made, not by the tokenizer.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _load_bpe(vocab: str, merges: str) -> Backend:
    backend = byte_level(models.BPE.from_file(vocab, merges))
    if backend.token_to_id(END_OF_TEXT) is not None:
        backend.add_special_tokens([END_OF_TEXT])
    return backend


def _load_wordpiece(path: str) -> Backend:
    vocab = models.WordPiece.read_file(path)
    is_lowercase = not any(t != t.lower() for t in vocab if not t.startswith("["))
    return wordpiece(vocab, is_lowercase)


LOADERS: dict[tuple[str, ...], Callable[..., Backend]] = {
    ("tokenizer.json",): _load_json,
    ("vocab.json", "merges.txt"): _load_bpe,
    ("encoder.json", "vocab.bpe"): _load_bpe,
    ("vocab.txt",): _load_wordpiece,
}
"""File names of a format -> function that loads the backend from the paths of these files.

The first entry whose files all exist is used."""
