"""Pre-training of GPT, BERT, BART and the Transformer on plain text.

    from transformer_jax.recipes import pretrain, pretrain_config

    results = pretrain(pretrain_config("bert_tiny", data="corpus.txt", num_steps=1000))
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from transformer_jax import metrics, sharding, tree
from transformer_jax.data import batching, packing, sources, token_cache, tokenizers
from transformer_jax.errors import did_you_mean
from transformer_jax.models import build_model, config_to_dict, family_name, init_params, presets
from transformer_jax.models.config import Config, TransformerConfig
from transformer_jax.objectives import causal_lm, mlm_nsp, seq2seq
from transformer_jax.objectives.mlm_nsp import MASK_RATE
from transformer_jax.objectives.seq2seq import Noise
from transformer_jax.pretrained import save_run_config
from transformer_jax.recipes import run_dir
from transformer_jax.recipes.config import (
    MeshConfig,
    OptimizerConfig,
    check_options,
    convert_paths,
)
from transformer_jax.train import anomalies, step

LOSSES = {"causal_lm": causal_lm.loss, "mlm_nsp": mlm_nsp.loss, "denoising": seq2seq.loss}
"""Pre-training objective -> its loss function."""


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of a pre-training run.

    Attributes:
        model: the config of the model; its vocabulary size is replaced by the tokenizer's.
        objective: "causal_lm", "mlm_nsp" or "denoising".
        tokenizer: "bpe", "wordpiece" or "chars", trained on the training text (the first two with
            the model's vocab_size); or the folder of a saved tokenizer.
        max_length: number of tokens of a row.
        batch_size: number of rows per step, over all devices.
        num_steps: number of updates.
        out: folder of the run.
        data: "python_docs/documents", "tfds:NAME", "hf:NAME", or a text file or folder.
        tokenized_cache_dir: folder of the tokenized corpus, which is completed if necessary; tokens
            are read from it on demand, for corpora larger than memory.
        document_separator: how text files are split into documents: "blank_line" at blank lines
            (each line of a document is then a sentence); "newline" at every line end; "file" does
            not split or change the text.
        validation_fraction: fraction at the end of the text files that is held out for evaluation.
        mask_rate: fraction of the tokens that masked language modeling predicts.
        whole_word_masking: mask whole words instead of tokens (mlm_nsp and denoising).
        noise: how texts are corrupted for the denoising objective.
        sentence_end: end of a sentence within a line, for denoising, such as " . " in tokenized
            text; if empty, each line is one sentence.
        accumulate: number of microbatches whose gradients are accumulated in each step.
        scan_layers: scan over stacked layers, which compiles only one; for deep models.
        optimizer: AdamW and its learning-rate schedule.
        mesh: number of devices along each mesh axis.
        eval_every: number of updates between evaluations on the held-out rows.
        eval_batches: number of held-out batches to evaluate on; None for all.
        save_every: number of updates between checkpoints.
        log_every: number of updates between rows of the history.
        seed: seed of initialization, data order, masking and dropout.
        profile_steps: number of steps to profile; the trace is written to `<out>/trace`.
        allow_config_mismatch: resume from a checkpoint that was saved with other settings or data.
        anomaly_policy: action on non-finite losses and on loss spikes (`train.anomalies`).
        replay_step: number of a step to repeat from the last checkpoint before it, for debugging;
            its metrics are printed, and no checkpoint is saved.
    """

    model: Config
    objective: str
    tokenizer: str
    max_length: int
    batch_size: int
    num_steps: int
    out: Path
    data: str = "python_docs/documents"
    tokenized_cache_dir: Path | None = None
    document_separator: str = "blank_line"
    validation_fraction: float = 0.1
    mask_rate: float = MASK_RATE
    whole_word_masking: bool = False
    noise: Noise = field(default_factory=Noise)
    sentence_end: str = ""
    accumulate: int = 1
    scan_layers: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval_every: int = 250
    eval_batches: int | None = None
    save_every: int = 500
    log_every: int = 50
    seed: int = 0
    profile_steps: int = 0
    allow_config_mismatch: bool = False
    anomaly_policy: anomalies.AnomalyPolicy = anomalies.DEFAULT_POLICY
    replay_step: int | None = None

    def __post_init__(self):
        convert_paths(self, "out", "tokenized_cache_dir")


# Model family -> default objective, tokenizer and optimizer.
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt": {"objective": "causal_lm", "tokenizer": "bpe",
            "optimizer": OptimizerConfig(peak_lr=2.5e-4, b2=0.95, weight_decay=0.1)},
    "bert": {"objective": "mlm_nsp", "tokenizer": "wordpiece",
             "optimizer": OptimizerConfig(schedule="linear", peak_lr=1e-4)},
    "bart": {"objective": "denoising", "tokenizer": "bpe",
             "optimizer": OptimizerConfig(schedule="linear", peak_lr=2e-4, b2=0.98)},
}
FAMILY_DEFAULTS["transformer"] = FAMILY_DEFAULTS["bart"]


def pretrain_config(preset: str, **changes: Any) -> PretrainConfig:
    """Returns the settings for pre-training a preset, with the defaults of its model family.

    The objective and tokenizer are causal_lm with BPE for GPT, mlm_nsp with WordPiece for BERT, and
    denoising with BPE for BART and the Transformer. By default, the corpus is the documentation
    that comes with Python, and a run has 10,000 steps of 32 rows; the first tenth of the steps, at
    most 1,000, is warm-up.

    Args:
        preset: a name of `models.presets`, such as "gpt2", "bert_base" or "bart_base".
        changes: fields of `PretrainConfig`.

    Raises:
        ValueError: the preset or a field is unknown; the message suggests known ones.

    Example:
        >>> config = pretrain_config("bert_tiny", num_steps=100)
        >>> config.objective, config.tokenizer, config.max_length, config.optimizer.warmup_steps
        ('mlm_nsp', 'wordpiece', 512, 10)
    """
    check_options(changes, [f.name for f in dataclasses.fields(PretrainConfig)], "pre-training")
    model = changes.get("model") or presets.get(preset)
    defaults = FAMILY_DEFAULTS[family_name(model)]
    num_steps = changes.get("num_steps", 10_000)
    optimizer = dataclasses.replace(
        defaults["optimizer"], warmup_steps=min(1000, num_steps // 10))
    return PretrainConfig(**{
        **defaults, "optimizer": optimizer, "model": model, "max_length": model.max_length,
        "batch_size": 32, "num_steps": num_steps, "out": Path("runs") / preset, **changes})


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Pre-trains a model and evaluates it on held-out rows.

    Checkpoints, TensorBoard events, the loss curve and the results are written to `config.out`. If
    that folder has checkpoints of the same run, training resumes from the last one.

    Returns:
        The content of `results.json`; with `config.replay_step`, the metrics of that step.

    Raises:
        ValueError: the data, the tokenizer or the settings do not fit together, or the checkpoints
            in `config.out` are of a run with other settings.
        FileNotFoundError: the data does not exist.
    """
    began, replay = time.perf_counter(), config.replay_step is not None
    if replay and not 0 < config.replay_step <= config.num_steps:
        raise ValueError(f"replay_step is {config.replay_step}; it must be from 1 to "
                         f"{config.num_steps}, the number of steps of the run")
    optimizer = config.optimizer.make(config.num_steps)  # raises on invalid settings
    train_texts, held_out_texts = load_texts(config)
    saved = config.out / "tokenizer"
    tokenizer = (tokenizers.load(saved) if saved.is_dir()
                 else train_tokenizer(config, train_texts))
    config = dataclasses.replace(config, model=with_vocabulary(config.model, tokenizer))
    save_run_config(config.out, config.model, tokenizer)
    run_dir.add_to_run_config(config.out, objective=config.objective)
    train, held_out = (
        make_objective_rows(config, texts, tokenizer, name)
        for name, texts in (("train", train_texts), ("held_out", held_out_texts)))
    mesh = config.mesh.make()
    held_out_batches = held_out.evaluation_batches(config.batch_size, config.eval_batches, mesh)
    for batch in held_out_batches:
        batching.check_batch_ids(batch, config.model.vocab_size, config.model.max_length)

    model = build_model(config.model)

    def init(rng):
        params = init_params(model, rng)
        return tree.stack_layers(params) if config.scan_layers else params

    params = sharding.init_sharded(init, jax.random.key(config.seed), mesh)
    loss_fn = functools.partial(LOSSES[config.objective], model.apply)
    held_out_loss = functools.partial(
        step.evaluate, step.make_eval_step(loss_fn), batches=held_out_batches, mesh=mesh)
    rows_per_device = config.batch_size // sharding.num_batch_shards(mesh)
    print(f"{tree.count(params):,} parameters, {len(train.rows):,} rows of {config.max_length} "
          f"tokens, global batch {config.batch_size} ({rows_per_device} per device), "
          f"{config.num_steps} steps, {len(held_out.rows):,} rows held out", flush=True)
    before = None if replay else held_out_loss(params)
    state, history = run_dir.fit(
        config, config.out, step.init_state(params, optimizer),
        step.make_train_step(loss_fn, optimizer, accumulate=config.accumulate),
        train.loader(config.batch_size, mesh, seed=config.seed), held_out_loss, mesh,
        {"model": config_to_dict(config.model)} | run_dir.run_metadata(config, train.rows),
        keep_best=("loss", "min"))
    if replay:
        print(json.dumps(history[-1]))
        return history[-1]
    after = held_out_loss(state.params)
    measured = {"held_out_before": before, "held_out": after, "history": history}
    if config.objective == "causal_lm":
        measured["perplexity"] = metrics.perplexity(after["loss"])
    print(f"held-out loss before {before['loss']:.3f}, after {after['loss']:.3f}", flush=True)
    if waits := [h["data_wait_fraction"] for h in history if "data_wait_fraction" in h]:
        measured["data_wait_fraction"] = sum(waits) / len(waits)
        print("devices waited for the host in at most "
              f"{100 * measured['data_wait_fraction']:.2f} % of the step time", flush=True)
    run_dir.plot_losses(config.out / "loss.png", f"Pre-training by {config.objective}", {
        "training": (history, "loss"),
        "held-out": ([{"step": 0, "eval_loss": before["loss"]}, *history], "eval_loss")})
    return run_dir.write_results(config.out, config, measured, time.perf_counter() - began)


def load_texts(config: PretrainConfig) -> tuple[Sequence[dict], Sequence[dict]]:
    """Returns the training and held-out texts, as sequences of `{"text": str}`.

    The held-out texts of a named dataset are its validation split. Those of local files are the
    last documents, a fraction `validation_fraction` of all; with document_separator "file", the
    last characters.
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


def train_tokenizer(config: PretrainConfig, texts: Sequence[dict]) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a pre-training run, trained on the texts or loaded."""
    size = {"vocab_size": config.model.vocab_size}
    special = ({"special_tokens": tokenizers.SEQ2SEQ_SPECIAL_TOKENS}
               if config.objective == "denoising" else {})
    trainers: dict[str, Callable] = {
        "bpe": functools.partial(tokenizers.train_bpe, **size, **special),
        "wordpiece": functools.partial(tokenizers.train_wordpiece, **size),
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
    """Rows of a pre-training objective: `transform(rows[i], rng)`, or `rows[i]` if it is None."""

    rows: Any
    transform: Callable | None

    def loader(self, batch_size: int, mesh: Mesh | None = None, **options) -> batching.Loader:
        """Returns an iterator over this process's rows of each batch of `batch_size` rows.

        The options are those of `data.batching.make_loader`; without num_epochs, the iterator is
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
        """
        loader = self.loader(batch_size, mesh, shuffle=False, num_epochs=1, drop_remainder=False)
        return [batch for i, batch in enumerate(loader) if max_batches is None or i < max_batches]


def make_objective_rows(
    config: PretrainConfig, texts: Sequence[dict], tokenizer: tokenizers.Tokenizer,
    name: str = "train",
) -> ObjectiveRows:
    """Returns rows of `config.max_length` tokens for the objective of a pre-training run.

    The texts are a sequence of `{"text": str}`, and `name` is their subfolder of
    `config.tokenized_cache_dir`.

    Example:
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
    if config.objective not in LOSSES:
        raise ValueError(
            f"unknown objective {config.objective!r}; "
            f"{did_you_mean(config.objective, LOSSES, show_all=True)}")
    if config.objective == "causal_lm":
        corpus = tokenize(texts, tokenizer, eos_id=tokenizer.eos_id,
                          one_sentence_per_line=config.document_separator != "file")
        return ObjectiveRows(packing.PackedTokens(corpus, length), None)
    options = {"length": length, "mask_id": tokenizer.mask_id, "pad_id": tokenizer.pad_id,
               "word_starts": tokenizer.is_word_start if config.whole_word_masking else None}
    if config.objective == "denoising":
        corpus = tokenize(_split_lines(texts, config.sentence_end), tokenizer)
        return ObjectiveRows(seq2seq.Passages(corpus, length - 2), functools.partial(
            seq2seq.prepare_denoising, noise=config.noise, start_id=tokenizer.sep_id,
            bos_id=tokenizer.cls_id, eos_id=tokenizer.sep_id, **options))
    pairs = mlm_nsp.SentencePairs(tokenize(texts, tokenizer), length - 3)
    return ObjectiveRows(pairs, functools.partial(
        mlm_nsp.prepare, pairs=pairs, mask_rate=config.mask_rate,
        max_predictions=max(1, round(length * config.mask_rate)),
        vocab_size=tokenizer.vocab_size, cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id,
        min_random_id=tokenizer.mask_id + 1, **options))


def _split_lines(texts: Sequence[dict], sentence_end: str) -> Sequence[dict]:
    """Inserts a line break after each `sentence_end`; if it is empty, returns `texts` unchanged."""
    if not sentence_end:
        return texts
    replacement = sentence_end.rstrip() + "\n"
    return [{"text": texts[i]["text"].replace(sentence_end, replacement)}
            for i in range(len(texts))]
