"""Conversion of plain text to training rows: sources, tokenizer, rows of an objective."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jax.sharding import Mesh

from transformer_jax import sharding
from transformer_jax.data import batching, packing, sources, token_cache, tokenizers
from transformer_jax.errors import did_you_mean
from transformer_jax.models.config import Config, TransformerConfig
from transformer_jax.objectives import causal_lm, mlm_nsp, seq2seq

if TYPE_CHECKING:
    from transformer_jax.recipes.pretraining import PretrainConfig

LOSSES = {"causal_lm": causal_lm.loss, "mlm_nsp": mlm_nsp.loss, "denoising": seq2seq.loss}
"""Pre-training objective -> its loss function."""


def load_texts(config: "PretrainConfig") -> tuple[Sequence[dict], Sequence[dict]]:
    """Returns the training and held-out texts, as sequences of `{"text": str}`.

    The held-out texts of a named dataset are its validation split. Those of local files are the
    last documents, a fraction `validation_fraction` of all; with document_separator "file", the
    last characters.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: no document is left for training or for validation, or `document_separator` is
            unknown.
    """
    data, fraction = config.data, config.validation_fraction
    if not sources.is_local(data):
        return sources.load_source(data, "train"), sources.load_source(data, "validation")
    source = sources.load_text_files(data, document_separator=config.document_separator)
    if config.document_separator == "file":
        text = "".join(example["text"] for example in source)
        cut = int(len(text) * (1 - fraction))
        return [{"text": text[:cut]}], [{"text": text[cut:]}]
    cut = int(len(source) * (1 - fraction))
    examples = [source[i] for i in range(len(source))]
    if not 0 < cut < len(examples):
        raise ValueError(f"validation_fraction {fraction} of {len(examples)} documents in {data} "
                         "leaves no document for training or none for validation; separate "
                         'documents by blank lines, or use document_separator "file"')
    return examples[:cut], examples[cut:]


def train_tokenizer(config: "PretrainConfig", texts: Sequence[dict]) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a pre-training run.

    If `config.tokenizer` is "bpe", "wordpiece" or "chars", it is trained on the texts, for "bpe"
    and "wordpiece" with the model's vocab_size. Any other value is a folder to load it from.
    """
    vocab_size = config.model.vocab_size
    bpe = functools.partial(tokenizers.train_bpe, vocab_size=vocab_size)
    if config.objective == "denoising":
        bpe = functools.partial(bpe, special_tokens=tokenizers.SEQ2SEQ_SPECIAL_TOKENS)
    trainers: dict[str, Callable] = {
        "bpe": bpe,
        "wordpiece": functools.partial(tokenizers.train_wordpiece, vocab_size=vocab_size),
        "chars": tokenizers.train_chars,
    }
    if config.tokenizer not in trainers:
        return tokenizers.load(config.tokenizer)
    return trainers[config.tokenizer]([example["text"] for example in texts])


def with_vocabulary(model: Config, tokenizer: tokenizers.Tokenizer) -> Config:
    """Returns the model config with the tokenizer's vocabulary size and, for encoder-decoders, its
    special token ids."""
    model = model.replace(vocab_size=tokenizer.vocab_size)
    if not isinstance(model, TransformerConfig):
        return model
    eos_id = tokenizer.sep_id
    return model.replace(pad_token_id=tokenizer.pad_id, bos_token_id=tokenizer.cls_id,
                         eos_token_id=eos_id, decoder_start_token_id=eos_id)


class ObjectiveRows(NamedTuple):
    """Rows of a pre-training objective.

    Attributes:
        rows: examples by index.
        transform: `transform(example, rng)` returns the arrays of a row; None if `rows` already
            holds arrays.
        tokens_per_row: number of tokens of a row, used to compute throughput.
    """

    rows: Any
    transform: Callable | None
    tokens_per_row: int

    def loader(self, batch_size: int, mesh: Mesh | None = None, **options) -> batching.Loader:
        """Returns an iterator over this process's rows of each batch.

        Args:
            batch_size: number of rows of a batch, over all devices.
            mesh: device mesh, which determines the rows of this process.
            options: options of `data.batching.make_loader`; without num_epochs, the iterator is
                infinite.
        """
        shard = sharding.process_data_shard(mesh)
        return batching.make_loader(
            self.rows, batch_size, transform=self.transform, process_index=shard.index,
            process_count=shard.count, **options)

    def evaluation_batches(
        self, batch_size: int, max_batches: int | None = None, mesh: Mesh | None = None
    ) -> list[dict]:
        """Returns batches that contain each row once, as a list in memory.

        Random masks and sentence pairs are drawn only once, so that the losses of different
        parameters are comparable.

        Args:
            batch_size: number of rows of a batch, over all devices.
            max_batches: maximum number of batches; None for all.
            mesh: device mesh, which determines the rows of this process.
        """
        loader = self.loader(batch_size, mesh, shuffle=False, num_epochs=1, drop_remainder=False)
        return [batch for i, batch in enumerate(loader) if max_batches is None or i < max_batches]


def make_objective_rows(
    config: "PretrainConfig", texts: Sequence[dict], tokenizer: tokenizers.Tokenizer,
    name: str = "train",
) -> ObjectiveRows:
    """Returns rows of `config.max_length` tokens for the objective of a pre-training run.

    Args:
        texts: sequence of `{"text": str}`.
        name: subfolder of `config.tokenized_cache_dir` for these texts.

    Raises:
        ValueError: the objective is unknown, or the corpus is too small for it.

    Example:
        >>> from transformer_jax.recipes.pretraining import pretrain_config
        >>> config = pretrain_config("gpt2", tokenizer="chars", max_length=8)
        >>> texts = [{"text": "One two three four five."}]
        >>> rows = make_objective_rows(config, texts, train_tokenizer(config, texts))
        >>> rows.evaluation_batches(batch_size=2)[0]["tokens"].shape
        (2, 8)
    """
    tokenize = packing.tokenize_corpus
    if config.tokenized_cache_dir is not None:
        tokenize = functools.partial(
            token_cache.tokenize_to_cache, folder=config.tokenized_cache_dir / name)
    length = config.max_length
    word_starts = tokenizer.is_word_start if config.whole_word_masking else None
    if config.objective not in LOSSES:
        raise ValueError(
            f"unknown objective {config.objective!r}; "
            f"{did_you_mean(config.objective, LOSSES, show_all=True)}")
    if config.objective == "causal_lm":
        corpus = tokenize(texts, tokenizer, eos_id=tokenizer.eos_id,
                          one_sentence_per_line=config.document_separator != "file")
        return ObjectiveRows(packing.PackedTokens(corpus, length), None, length)
    if config.objective == "denoising":
        corpus = tokenize(_split_lines(texts, config.sentence_end), tokenizer)
        transform = functools.partial(
            seq2seq.prepare_denoising, noise=config.noise, length=length, mask_id=tokenizer.mask_id,
            start_id=tokenizer.sep_id, bos_id=tokenizer.cls_id, eos_id=tokenizer.sep_id,
            pad_id=tokenizer.pad_id, word_starts=word_starts)
        return ObjectiveRows(seq2seq.Passages(corpus, length - 2), transform, length)
    pairs = mlm_nsp.SentencePairs(tokenize(texts, tokenizer), length - 3)
    transform = functools.partial(
        mlm_nsp.prepare, pairs=pairs, length=length, mask_rate=config.mask_rate,
        max_predictions=max(1, round(length * config.mask_rate)),
        vocab_size=tokenizer.vocab_size, cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id,
        mask_id=tokenizer.mask_id, pad_id=tokenizer.pad_id,
        min_random_id=tokenizer.mask_id + 1, word_starts=word_starts)
    return ObjectiveRows(pairs, transform, length)


def _split_lines(texts: Sequence[dict], sentence_end: str) -> Sequence[dict]:
    """Inserts a line break after each `sentence_end`; if it is empty, returns `texts` unchanged."""
    if not sentence_end:
        return texts
    replacement = sentence_end.rstrip() + "\n"
    return [{"text": texts[i]["text"].replace(sentence_end, replacement)}
            for i in range(len(texts))]
