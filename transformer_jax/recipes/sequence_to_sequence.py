"""Translation: training of encoder-decoders on pairs of texts, evaluated by BLEU.

The size of a batch is a number of tokens, and the result is the average of the last checkpoints
(Vaswani et al. 2017, sections 5.1 and 6.1).
"""

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from transformer_jax import metrics, sharding, tree
from transformer_jax.data import load_pairs, tokenizers
from transformer_jax.data.length_buckets import TokenBudgetBatches
from transformer_jax.generation.api import generate_texts
from transformer_jax.models import Transformer, build_model, config_to_dict, init_params
from transformer_jax.models.config import TransformerConfig
from transformer_jax.objectives import seq2seq
from transformer_jax.pretrained.runs import save_run_config
from transformer_jax.recipes import run_dir
from transformer_jax.recipes.config import MeshConfig, OptimizerConfig, convert_paths
from transformer_jax.recipes.corpus import with_vocabulary
from transformer_jax.recipes.prediction import save_task
from transformer_jax.recipes.task_encoder import InputConfig, TaskInfo
from transformer_jax.report import plots
from transformer_jax.train import anomalies, checkpointing, loop, step

TOKENIZERS = {
    "bpe": functools.partial(
        tokenizers.train_bpe, special_tokens=tokenizers.SEQ2SEQ_SPECIAL_TOKENS),
    "unigram": tokenizers.train_unigram,
}


@dataclass(frozen=True)
class TranslateConfig:
    """Settings of a training run on pairs of texts, for translation or summarization.

    Attributes:
        model: the config of the model; its vocabulary size is replaced by the tokenizer's.
        source: file suffix or column name of the source texts.
        target: file suffix or column name of the target texts.
        num_steps: number of updates.
        out: folder of the run.
        data: a folder with aligned files (train.de, train.en, val.de, ...) or with one .jsonl, .tsv
            or .csv file for each split; "tfds:NAME" or "hf:NAME".
        tokenizer: "bpe" or "unigram", to train one tokenizer of the model's vocab_size on both the
            source and the target texts; or the folder of a saved tokenizer.
        train_split: name of the split to train on.
        validation_split: name of the split to evaluate on.
        length_buckets: lengths to which batches are padded; the step is compiled once for each.
        tokens_per_batch: maximum number of source tokens, and also of target tokens, of a batch,
            including padding, over all devices.
        label_smoothing: probability mass that is distributed uniformly over the vocabulary.
        accumulate: number of microbatches whose gradients are accumulated in each step.
        optimizer: AdamW and its learning-rate schedule.
        mesh: number of devices along each mesh axis.
        num_averaged_checkpoints: number of last checkpoints whose average is the result.
        num_beams: number of beams of the beam search.
        length_penalty: beam scores are divided by length ** length_penalty; unused with one beam.
        max_new_tokens: maximum number of tokens of a translation.
        eval_pairs: number of validation pairs to translate; None for all.
        eval_every: number of updates between evaluations of the loss on the validation split.
        save_every: number of updates between checkpoints.
        log_every: number of updates between rows of the history.
        seed: seed of initialization, data order and dropout.
        allow_config_mismatch: resume from a checkpoint that was saved with other settings or data.
        anomaly_policy: action on non-finite losses and on loss spikes (`train.anomalies`).
    """

    model: TransformerConfig
    source: str
    target: str
    num_steps: int
    out: Path
    data: str
    tokenizer: str = "bpe"
    train_split: str = "train"
    validation_split: str = "val"
    length_buckets: tuple[int, ...] = (16, 32, 64)
    tokens_per_batch: int = 4096
    label_smoothing: float = 0.1
    accumulate: int = 1
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(
        schedule="inverse_sqrt", warmup_steps=1000, weight_decay=0.0, b2=0.98, eps=1e-9))
    mesh: MeshConfig = field(default_factory=MeshConfig)
    num_averaged_checkpoints: int = 5
    num_beams: int = 5
    length_penalty: float = 0.6
    max_new_tokens: int = 64
    eval_pairs: int | None = None
    eval_every: int = 250
    save_every: int = 250
    log_every: int = 50
    seed: int = 0
    allow_config_mismatch: bool = False
    anomaly_policy: anomalies.AnomalyPolicy = anomalies.DEFAULT_POLICY

    @property
    def num_saved_checkpoints(self) -> int:
        """Number of checkpoints that a finished run has, all of which are averaged.

        It is smaller than `num_averaged_checkpoints` if the run is too short to save so many.
        """
        num_saved = -(-self.num_steps // self.save_every) if self.save_every else 1
        return min(self.num_averaged_checkpoints, num_saved)

    def __post_init__(self):
        convert_paths(self, "out")


def train_translation(config: TranslateConfig) -> dict[str, Any]:
    """Trains an encoder-decoder, translates the validation split and computes sacreBLEU.

    Checkpoints, `translations.jsonl`, TensorBoard events, the loss curve, the cross-attention of
    one sentence and `results.json` are written to `config.out`. If that folder has checkpoints of
    the same run, training resumes from the last one.

    Returns:
        The content of `results.json`.

    Raises:
        FileNotFoundError: the data does not exist.
        ModuleNotFoundError: sacrebleu is not installed.
        ValueError: the data or the settings do not fit together.
    """
    began = time.perf_counter()
    metrics.require_library("bleu")
    # 1 is added to max_new_tokens, because the decoder also reads the start token.
    for name, value in (("length_buckets", max(config.length_buckets)),
                        ("max_new_tokens", config.max_new_tokens + 1)):
        if value > config.model.max_length:
            raise ValueError(f"{name} needs {value} positions, but model.max_length is "
                             f"{config.model.max_length}; lower {name} or raise model.max_length")
    texts, validation = (
        load_pairs(config.data, split, config.source, config.target)
        for split in (config.train_split, config.validation_split))
    saved = config.out / "tokenizer"
    tokenizer = tokenizers.load(saved) if saved.is_dir() else train_tokenizer(config, texts)
    config = dataclasses.replace(config, model=with_vocabulary(config.model, tokenizer))
    save_run_config(config.out, config.model, tokenizer,
                    num_averaged_checkpoints=config.num_saved_checkpoints)
    save_task(config.out, TaskInfo("seq2seq", metric="bleu"), InputConfig(
        config.length_buckets[-1], target_length=config.max_new_tokens + 1,
        num_beams=config.num_beams, length_penalty=config.length_penalty))
    model, params, history, loss = train_on_pairs(config, tokenizer, texts, validation)
    print(f"averaged parameters: held-out loss {loss['nll']:.3f} nats per token, accuracy "
          f"{loss['accuracy']:.3f}", flush=True)
    trained = time.perf_counter()
    validation = validation[: config.eval_pairs]
    outputs = generate_targets(
        model, params, tokenizer, [pair["source"] for pair in validation],
        max_new_tokens=config.max_new_tokens, max_source_length=config.length_buckets[-1],
        num_beams=config.num_beams,
        **({"length_penalty": config.length_penalty} if config.num_beams > 1 else {}))
    (config.out / "translations.jsonl").write_text("".join(
        json.dumps({**pair, "translation": text}, ensure_ascii=False) + "\n"
        for pair, text in zip(validation, outputs)))
    bleu = metrics.bleu(outputs, [pair["target"] for pair in validation])
    print(f"sacreBLEU {bleu.score:.2f} with {config.num_beams} beams on {len(outputs)} held-out "
          f"pairs ({bleu.signature}), {time.perf_counter() - trained:.0f} s", flush=True)
    for pair, text in zip(validation[:3], outputs):
        print(f"  {pair['source']}\n  -> {text}\n   = {pair['target']}")
    plot_cross_attention(config.out / "cross_attention.png", model, params, tokenizer,
                         validation[0]["source"], outputs[0])
    if points := loss_curves({"": history}):
        plots.curves(config.out / "loss.png", points,
                     title=f"{config.source} to {config.target}")
    measured = {"bleu": bleu.score, "signature": bleu.signature, "held_out": loss,
                "history": history}
    return run_dir.write_results(config.out, config, measured, time.perf_counter() - began)


def train_tokenizer(config: TranslateConfig, texts: Sequence[dict]) -> tokenizers.Tokenizer:
    """Returns one tokenizer for sources and targets, trained on the pairs or loaded."""
    if config.tokenizer not in TOKENIZERS:
        return tokenizers.load(config.tokenizer)
    both = [pair[side] for side in ("source", "target") for pair in texts]
    return TOKENIZERS[config.tokenizer](both, config.model.vocab_size)


def pair_batches(
    config: TranslateConfig, texts: Sequence[dict], tokenizer: tokenizers.Tokenizer, mesh: Mesh
) -> TokenBudgetBatches:
    """Tokenizes pairs and returns batches of at most `config.tokens_per_batch` tokens per side."""
    sides = [tokenizer.encode_batch([pair[side] for pair in texts])
             for side in ("source", "target")]
    ids = [{"source": s, "target": t} for s, t in zip(*sides)]

    def make_row(pair: dict, length: int) -> dict[str, np.ndarray]:
        return seq2seq.prepare(
            pair, source_length=length, target_length=length, eos_id=tokenizer.sep_id,
            start_id=config.model.decoder_start_token_id, pad_id=tokenizer.pad_id)

    shard = sharding.process_data_shard(mesh)
    return TokenBudgetBatches(
        ids, make_row, buckets=config.length_buckets, tokens_per_batch=config.tokens_per_batch,
        seed=config.seed, batch_size_multiple=sharding.num_batch_shards(mesh) * config.accumulate,
        process_index=shard.index, process_count=shard.count)


def train_on_pairs(
    config: TranslateConfig, tokenizer: tokenizers.Tokenizer, texts: Sequence[dict],
    validation: Sequence[dict], pretrained: dict | None = None,
) -> tuple[Transformer, dict, list[dict], dict[str, float]]:
    """Trains the model, resuming from `<out>/checkpoints`.

    Args:
        tokenizer: tokenizer of sources and targets, with the vocabulary size of `config.model`.
        texts: training pairs `{"source", "target"}`.
        validation: pairs to evaluate the loss on.
        pretrained: initial parameters, which are copied; None trains from scratch.

    Returns:
        The model, the average of its last checkpoints, the history, and the loss and metrics on the
        validation pairs.
    """
    mesh = config.mesh.make()
    data = pair_batches(config, texts, tokenizer, mesh)
    eval_batches = pair_batches(config, validation, tokenizer, mesh).evaluation_batches()
    model = build_model(config.model)
    params = sharding.init_sharded(
        functools.partial(init_params, model), jax.random.key(config.seed), mesh)
    if pretrained is not None:
        params, report = tree.restore_partial(params, pretrained)
        print(report, flush=True)
    loss_fn = functools.partial(seq2seq.loss, model.apply, label_smoothing=config.label_smoothing)
    optimizer = config.optimizer.make(config.num_steps)
    eval_step = step.make_eval_step(loss_fn)
    print(f"{tree.count(params):,} parameters, {len(texts):,} pairs ({data.num_truncated} "
          f"truncated to {config.length_buckets[-1]} tokens), {data.batches_per_epoch} batches per "
          f"epoch, {config.num_steps} steps, {len(validation):,} pairs held out", flush=True)
    metadata = {"model": config_to_dict(config.model)} | run_dir.run_metadata(config, texts)
    checkpoint = run_dir.make_checkpointer(
        config, metadata, config.out / "checkpoints", keep=config.num_averaged_checkpoints)

    def held_out_loss(params):
        return step.evaluate(eval_step, params, eval_batches, mesh)

    state, history = loop.fit(
        step.init_state(params, optimizer),
        step.make_train_step(loss_fn, optimizer, accumulate=config.accumulate), data.loader(),
        rng=jax.random.key(config.seed + 1), num_steps=config.num_steps, mesh=mesh,
        evaluation=loop.Evaluation(held_out_loss, config.eval_every), checkpoint=checkpoint,
        anomalies=config.anomaly_policy, callbacks=run_dir.make_callbacks(config, config.out))
    params = checkpointing.average_params(
        checkpoint.directory, config.num_saved_checkpoints, state.params)
    return model, params, history, held_out_loss(params)


def generate_targets(
    model: Transformer, params: dict, tokenizer: tokenizers.Tokenizer, texts: Sequence[str], *,
    max_source_length: int = 128, bos_id: int | None = None, **options: Any,
) -> list[str]:
    """Generates a target for each source text.

    Args:
        max_source_length: number of tokens to which longer sources are truncated.
        bos_id: first token of each source, if any.
        options: options of `generation.generate`, such as num_beams.
    """
    prefix = [] if bos_id is None else [bos_id]
    rows = [[*prefix, *ids[: max_source_length - 1 - len(prefix)], tokenizer.sep_id]
            for ids in tokenizer.encode_batch(list(texts))]
    return generate_texts(model, params, tokenizer, rows, batch_size=64, **options)


def plot_cross_attention(
    path: Path, model: Transformer, params: dict, tokenizer: tokenizers.Tokenizer, source: str,
    target: str,
) -> None:
    """Plots the cross-attention weights of each layer for one pair, averaged over heads."""
    source_ids, target_ids = (
        [*tokenizer.encode(text)[: model.config.max_length - 1], tokenizer.sep_id]
        for text in (source, target))
    decoder_ids = [model.config.decoder_start_token_id, *target_ids[:-1]]
    apply = jax.jit(functools.partial(model.apply, output_attentions=True))
    out = apply({"params": params}, np.array([source_ids]), np.array([decoder_ids]))
    maps = {f"layer {i}": np.asarray(weights)[0].mean(0)
            for i, weights in enumerate(out.cross_attention)}
    tokens = [[tokenizer.decode([i], skip_special_tokens=False) for i in ids]
              for ids in (target_ids, source_ids)]
    plots.attention(path, maps, *tokens,
                    title="cross-attention: predicted token, and its weights over the source")


def loss_curves(histories: dict[str, list[dict]]) -> dict[str, tuple]:
    """Returns the curves (steps, losses) of the training and held-out loss of each run, by name.

    The training loss includes label smoothing; the held-out loss does not.
    """
    points = {}
    for name, history in histories.items():
        prefix = f"{name}, " if name else ""
        points[f"{prefix}training (smoothed)"] = [
            (h["step"], h["loss"]) for h in history if "loss" in h]
        points[f"{prefix}held-out"] = [
            (h["step"], h["eval_nll"]) for h in history if "eval_nll" in h]
    return {name: tuple(zip(*found)) for name, found in points.items() if found}
