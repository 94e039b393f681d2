"""Training of encoder-decoders on pairs of texts: translation, and denoising with fine-tuning.

For translation, the size of a batch is a number of tokens, and the result is the average of the
last checkpoints (Vaswani et al. 2017, sections 5.1 and 6.1).
"""

import dataclasses
import functools
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
from transformer_jax.data.batching import TokenBudgetBatches
from transformer_jax.generation.api import generate_texts
from transformer_jax.models import Transformer, build_model, config_to_dict, init_params
from transformer_jax.models.config import TransformerConfig
from transformer_jax.objectives import seq2seq
from transformer_jax.pretrained import load_run, save_run_config
from transformer_jax.recipes import pretraining, run_dir
from transformer_jax.recipes.config import MeshConfig, OptimizerConfig, convert_paths
from transformer_jax.recipes.prediction import save_task
from transformer_jax.recipes.task_encoder import InputConfig, TaskInfo
from transformer_jax.report import plots
from transformer_jax.train import anomalies, checkpointing, step

SIDES = ("source", "target")
TOKENIZERS = {
    "bpe": functools.partial(
        tokenizers.train_bpe, special_tokens=tokenizers.SEQ2SEQ_SPECIAL_TOKENS),
    "unigram": tokenizers.train_unigram,
}


@dataclass(frozen=True, kw_only=True)
class _PairsTraining:
    """Settings that translation and fine-tuning on pairs share.

    Attributes:
        train_split: name of the split to train on.
        validation_split: name of the split to evaluate on.
        label_smoothing: probability mass that is distributed uniformly over the vocabulary.
        optimizer: AdamW and its learning-rate schedule.
        num_beams: number of beams of the beam search.
        length_penalty: beam scores are divided by length ** length_penalty; unused with one beam.
        eval_pairs: number of validation pairs to generate targets for; None for all.
        eval_every: number of updates between evaluations of the loss on the validation split.
        save_every: number of updates between checkpoints.
        log_every: number of updates between rows of the history.
        seed: seed of data order and dropout and, for translation, of initialization.
        allow_config_mismatch: resume from a checkpoint that was saved with other settings or data.
        anomaly_policy: action on non-finite losses and on loss spikes (`train.anomalies`).
    """

    train_split: str = "train"
    validation_split: str = "val"
    label_smoothing: float = 0.1
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(
        schedule="inverse_sqrt", warmup_steps=1000, weight_decay=0.0, b2=0.98, eps=1e-9))
    num_beams: int = 5
    length_penalty: float = 0.6
    eval_pairs: int | None = None
    eval_every: int = 250
    save_every: int = 250
    log_every: int = 50
    seed: int = 0
    allow_config_mismatch: bool = False
    anomaly_policy: anomalies.AnomalyPolicy = anomalies.DEFAULT_POLICY


@dataclass(frozen=True)
class TranslateConfig(_PairsTraining):
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
        length_buckets: lengths to which batches are padded; the step is compiled once for each.
        tokens_per_batch: maximum number of source tokens, and also of target tokens, of a batch,
            including padding, over all devices.
        accumulate: number of microbatches whose gradients are accumulated in each step.
        mesh: number of devices along each mesh axis.
        num_averaged_checkpoints: number of last checkpoints whose average is the result.
        max_new_tokens: maximum number of tokens of a translation.
    """

    model: TransformerConfig
    source: str
    target: str
    num_steps: int
    out: Path
    data: str
    tokenizer: str = "bpe"
    length_buckets: tuple[int, ...] = (16, 32, 64)
    tokens_per_batch: int = 4096
    accumulate: int = 1
    mesh: MeshConfig = field(default_factory=MeshConfig)
    num_averaged_checkpoints: int = 5
    max_new_tokens: int = 64

    @property
    def num_saved_checkpoints(self) -> int:
        """Number of checkpoints that a finished run has and averages; fewer if it is short."""
        num_saved = -(-self.num_steps // self.save_every) if self.save_every else 1
        return min(self.num_averaged_checkpoints, num_saved)

    def __post_init__(self):
        convert_paths(self, "out")


@dataclass(frozen=True, kw_only=True)
class PairsConfig(_PairsTraining):
    """Settings for fine-tuning a pre-trained encoder-decoder on pairs of texts.

    Attributes:
        source: file suffix or column name of the source texts.
        target: file suffix or column name of the target texts.
        num_steps: number of updates.
        data: as in `TranslateConfig`.
        source_length: number of tokens, including special tokens, to which sources are padded or
            truncated.
        target_length: the same for targets.
        batch_size: number of rows per step, over all devices.
        no_repeat_ngram_size: size of the n-grams of tokens that may occur only once in a target.
    """

    source: str
    target: str
    num_steps: int
    data: str
    validation_split: str = "dev"
    source_length: int = 192
    target_length: int = 64
    batch_size: int = 16
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(schedule="linear", b2=0.98))
    num_beams: int = 4
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 3
    eval_every: int = 200
    save_every: int = 200


@dataclass(frozen=True)
class DenoiseConfig:
    """Settings of denoising pre-training and of fine-tuning on pairs.

    Attributes:
        pretrain: settings of pre-training. Fine-tuning uses the same model, mesh and tokenizer; the
            tokenizer is trained on the plain text and the pairs together. `pretrain.out` is
            ignored; the folder is `<out>/pretraining`.
        finetune: settings of fine-tuning.
        out: folder of the run.
    """

    pretrain: pretraining.PretrainConfig
    finetune: PairsConfig
    out: Path

    def __post_init__(self):
        convert_paths(self, "out")


def _load_splits(config: Any) -> list[list[dict]]:
    return [load_pairs(config.data, split, config.source, config.target)
            for split in (config.train_split, config.validation_split)]


def _tokenize(texts: Sequence[dict], tokenizer: tokenizers.Tokenizer) -> list[dict]:
    ids = [tokenizer.encode_batch([pair[side] for pair in texts]) for side in SIDES]
    return [dict(zip(SIDES, pair)) for pair in zip(*ids)]


def _generate(
    config: _PairsTraining, model: Transformer, params: dict, tokenizer: tokenizers.Tokenizer,
    pairs: Sequence[dict], source_length: int, bos_id: int | None = None, **options: Any,
) -> list[str]:
    """Generates a target for each source; longer sources are truncated to `source_length`."""
    prefix = [] if bos_id is None else [bos_id]
    rows = [[*prefix, *ids[: source_length - 1 - len(prefix)], tokenizer.sep_id]
            for ids in tokenizer.encode_batch([pair["source"] for pair in pairs])]
    if config.num_beams > 1:
        options["length_penalty"] = config.length_penalty
    return generate_texts(
        model, params, tokenizer, rows, batch_size=64, num_beams=config.num_beams, **options)


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
    texts, validation = _load_splits(config)
    saved = config.out / "tokenizer"
    if saved.is_dir() or config.tokenizer not in TOKENIZERS:
        tokenizer = tokenizers.load(saved if saved.is_dir() else config.tokenizer)
    else:
        tokenizer = TOKENIZERS[config.tokenizer](
            [pair[side] for side in SIDES for pair in texts], config.model.vocab_size)
    config = dataclasses.replace(config, model=pretraining.with_vocabulary(config.model, tokenizer))
    save_run_config(config.out, config.model, tokenizer,
                    num_averaged_checkpoints=config.num_saved_checkpoints)
    save_task(config.out, TaskInfo("seq2seq", metric="bleu"), InputConfig(
        config.length_buckets[-1], target_length=config.max_new_tokens + 1,
        num_beams=config.num_beams, length_penalty=config.length_penalty))
    model, params, history, loss = _train_on_pairs(config, tokenizer, texts, validation)
    print(f"averaged parameters: held-out loss {loss['nll']:.3f} nats per token, accuracy "
          f"{loss['accuracy']:.3f}", flush=True)
    trained = time.perf_counter()
    validation = validation[: config.eval_pairs]
    outputs = _generate(config, model, params, tokenizer, validation, config.length_buckets[-1],
                        max_new_tokens=config.max_new_tokens)
    run_dir.write_jsonl(config.out / "translations.jsonl", (
        {**pair, "translation": text} for pair, text in zip(validation, outputs)))
    bleu = metrics.bleu(outputs, [pair["target"] for pair in validation])
    print(f"sacreBLEU {bleu.score:.2f} with {config.num_beams} beams on {len(outputs)} held-out "
          f"pairs ({bleu.signature}), {time.perf_counter() - trained:.0f} s", flush=True)
    for pair, text in zip(validation[:3], outputs):
        print(f"  {pair['source']}\n  -> {text}\n   = {pair['target']}")
    plot_cross_attention(config.out / "cross_attention.png", model, params, tokenizer,
                         validation[0]["source"], outputs[0])
    # The training loss includes label smoothing; the held-out loss does not.
    run_dir.plot_losses(config.out / "loss.png", f"{config.source} to {config.target}", {
        "training (smoothed)": (history, "loss"), "held-out": (history, "eval_nll")})
    measured = {"bleu": bleu.score, "signature": bleu.signature, "held_out": loss,
                "history": history}
    return run_dir.write_results(config.out, config, measured, time.perf_counter() - began)


def _train_on_pairs(
    config: TranslateConfig, tokenizer: tokenizers.Tokenizer, texts: Sequence[dict],
    validation: Sequence[dict],
) -> tuple[Transformer, dict, list[dict], dict[str, float]]:
    """Returns the model, its averaged parameters, the history and the held-out metrics."""
    mesh = config.mesh.make()
    data, held_out = (_pair_batches(config, pairs, tokenizer, mesh)
                      for pairs in (texts, validation))
    model = build_model(config.model)
    params = sharding.init_sharded(
        functools.partial(init_params, model), jax.random.key(config.seed), mesh)
    loss_fn = functools.partial(seq2seq.loss, model.apply, label_smoothing=config.label_smoothing)
    optimizer = config.optimizer.make(config.num_steps)
    held_out_loss = functools.partial(step.evaluate, step.make_eval_step(loss_fn),
                                      batches=held_out.evaluation_batches(), mesh=mesh)
    print(f"{tree.count(params):,} parameters, {len(texts):,} pairs ({data.num_truncated} "
          f"truncated to {config.length_buckets[-1]} tokens), {data.batches_per_epoch} batches per "
          f"epoch, {config.num_steps} steps, {len(validation):,} pairs held out", flush=True)
    state, history = run_dir.fit(
        config, config.out, step.init_state(params, optimizer),
        step.make_train_step(loss_fn, optimizer, accumulate=config.accumulate), data.loader(),
        held_out_loss, mesh,
        {"model": config_to_dict(config.model)} | run_dir.run_metadata(config, texts),
        keep=config.num_averaged_checkpoints)
    params = checkpointing.average_params(
        config.out / "checkpoints", config.num_saved_checkpoints, state.params)
    return model, params, history, held_out_loss(params)


def _pair_batches(
    config: TranslateConfig, texts: Sequence[dict], tokenizer: tokenizers.Tokenizer, mesh: Mesh
) -> TokenBudgetBatches:
    """Tokenizes pairs and returns batches of at most `config.tokens_per_batch` tokens per side."""
    def make_row(pair: dict, length: int) -> dict[str, np.ndarray]:
        return seq2seq.prepare(
            pair, source_length=length, target_length=length, eos_id=tokenizer.sep_id,
            start_id=config.model.decoder_start_token_id, pad_id=tokenizer.pad_id)

    shard = sharding.process_data_shard(mesh)
    return TokenBudgetBatches(
        _tokenize(texts, tokenizer), make_row, buckets=config.length_buckets,
        tokens_per_batch=config.tokens_per_batch, seed=config.seed,
        batch_size_multiple=sharding.num_batch_shards(mesh) * config.accumulate,
        process_index=shard.index, process_count=shard.count)


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


def denoise(config: DenoiseConfig) -> dict[str, Any]:
    """Pre-trains by denoising, then fine-tunes on pairs; also trains on the pairs from scratch.

    Writes to `config.out`: the folders `pretraining`, `pretrained` and `scratch` with checkpoints,
    from which the same call resumes; `targets.jsonl` with the targets that both models generate;
    the loss curves; and `results.json` with the denoising loss before and after pre-training and
    the ROUGE scores of both models.

    Returns:
        The content of `results.json`.

    Raises:
        FileNotFoundError: the data does not exist.
        ModuleNotFoundError: rouge-score is not installed.
        ValueError: the data or the settings do not fit together.
    """
    began = time.perf_counter()
    metrics.require_library("rouge")
    f, mesh = config.finetune, config.pretrain.mesh.make()
    texts, validation = _load_splits(f)
    folder = config.out / "tokenizer"
    if not folder.is_dir():
        plain = pretraining.load_texts(config.pretrain)[0]
        both = [*plain, *({"text": pair[side]} for side in SIDES for pair in texts)]
        pretraining.train_tokenizer(config.pretrain, both).save(folder)
    denoised = pretraining.pretrain(dataclasses.replace(
        config.pretrain, tokenizer=str(folder), out=config.out / "pretraining"))["metrics"]
    model, pretrained, tokenizer, _ = load_run(config.out / "pretraining")
    new_params = jax.jit(functools.partial(init_params, model))(
        jax.random.key(config.pretrain.seed))
    train, held_out = (pretraining.ObjectiveRows(_tokenize(pairs, tokenizer), functools.partial(
        seq2seq.prepare, source_length=f.source_length, target_length=f.target_length,
        start_id=tokenizer.sep_id, bos_id=tokenizer.cls_id, eos_id=tokenizer.sep_id,
        pad_id=tokenizer.pad_id)) for pairs in (texts, validation))
    loss_fn = functools.partial(seq2seq.loss, model.apply, label_smoothing=f.label_smoothing)
    optimizer = f.optimizer.make(f.num_steps)
    # Created once, so that both runs share the compiled steps.
    train_step = step.make_train_step(loss_fn, optimizer)
    held_out_loss = functools.partial(
        step.evaluate, step.make_eval_step(loss_fn), mesh=mesh,
        batches=held_out.evaluation_batches(f.batch_size, mesh=mesh))
    scored = validation[: f.eval_pairs]
    print(f"{tree.count(new_params):,} parameters, {len(texts):,} pairs, {f.num_steps} steps of "
          f"{f.batch_size} pairs, {len(validation):,} pairs held out", flush=True)
    measured: dict[str, Any] = {
        "denoising": {key: denoised[key] for key in ("held_out_before", "held_out")}}
    outputs = {}
    for name, params in (("pretrained", pretrained), ("scratch", new_params)):
        params = jax.device_put(params, sharding.param_shardings(params, mesh))
        save_run_config(config.out / name, model.config, tokenizer)
        state, history = run_dir.fit(
            f, config.out / name, step.init_state(params, optimizer), train_step,
            train.loader(f.batch_size, mesh, seed=f.seed), held_out_loss, mesh,
            {"model": config_to_dict(model.config)} | run_dir.run_metadata(f, train.rows, params))
        outputs[name] = _generate(
            f, model, state.params, tokenizer, scored, f.source_length, tokenizer.cls_id,
            max_new_tokens=f.target_length, no_repeat_ngram_size=f.no_repeat_ngram_size)
        measured[name] = {
            "rouge": metrics.rouge(outputs[name], [pair["target"] for pair in scored]),
            "held_out": held_out_loss(state.params), "history": history}
        print(f"{name}: held-out loss {measured[name]['held_out']['nll']:.3f}, "
              + ", ".join(f"{k} {v:.2f}" for k, v in measured[name]["rouge"].items()), flush=True)
    lines = [{**pair, **{name: texts[i] for name, texts in outputs.items()}}
             for i, pair in enumerate(scored)]
    run_dir.write_jsonl(config.out / "targets.jsonl", lines)
    for line in lines[:3]:
        print("\n  ".join(["", line["source"][:300].replace("\n", "\n  "),
                           *(f"{name}: {line[name]}" for name in ("target", *outputs))]),
              flush=True)
    run_dir.plot_losses(config.out / "finetuning.png", f"{f.source} to {f.target}", {
        f"{name}, {label}": (measured[name]["history"], key) for name in outputs
        for label, key in (("training (smoothed)", "loss"), ("held-out", "eval_nll"))})
    return run_dir.write_results(config.out, config, measured, time.perf_counter() - began)
