"""Denoising pre-training of BART, then fine-tuning on pairs of texts.

The fine-tuned model is compared with a model of the same size that is trained from scratch.
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

from transformer_jax import metrics, sharding, tree
from transformer_jax.data import load_pairs
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.models import Transformer, config_to_dict, init_params
from transformer_jax.objectives import seq2seq
from transformer_jax.pretrained import LoadedRun, load_run, save_run_config
from transformer_jax.recipes import corpus, run_dir
from transformer_jax.recipes.config import OptimizerConfig, convert_paths
from transformer_jax.recipes.pretraining import PretrainConfig, pretrain
from transformer_jax.recipes.sequence_to_sequence import generate_targets, loss_curves
from transformer_jax.report import plots
from transformer_jax.train import anomalies, loop, step

SIDES = ("source", "target")


@dataclass(frozen=True)
class PairsConfig:
    """Settings for fine-tuning a pre-trained encoder-decoder on pairs of texts.

    Attributes:
        source: file suffix or column name of the source texts.
        target: file suffix or column name of the target texts.
        num_steps: number of updates.
        data: as in `sequence_to_sequence.TranslateConfig`.
        train_split: name of the split to train on.
        validation_split: name of the split to evaluate on.
        source_length: number of tokens, including special tokens, to which sources are padded or
            truncated.
        target_length: the same for targets.
        batch_size: number of rows per step, over all devices.
        label_smoothing: probability mass that is distributed uniformly over the vocabulary.
        optimizer: AdamW and its learning-rate schedule.
        num_beams: number of beams of the beam search.
        length_penalty: beam scores are divided by length ** length_penalty.
        no_repeat_ngram_size: size of the n-grams of tokens that may occur only once in a target.
        eval_pairs: number of validation pairs to generate targets for; None for all.
        eval_every: number of updates between evaluations of the loss on the validation split.
        save_every: number of updates between checkpoints.
        log_every: number of updates between rows of the history.
        seed: seed of data order and dropout.
        allow_config_mismatch: resume from a checkpoint that was saved with other settings or data.
        anomaly_policy: action on non-finite losses and on loss spikes (`train.anomalies`).
    """

    source: str
    target: str
    num_steps: int
    data: str
    train_split: str = "train"
    validation_split: str = "dev"
    source_length: int = 192
    target_length: int = 64
    batch_size: int = 16
    label_smoothing: float = 0.1
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(schedule="linear", b2=0.98))
    num_beams: int = 4
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 3
    eval_pairs: int | None = None
    eval_every: int = 200
    save_every: int = 200
    log_every: int = 50
    seed: int = 0
    allow_config_mismatch: bool = False
    anomaly_policy: anomalies.AnomalyPolicy = anomalies.DEFAULT_POLICY


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

    pretrain: PretrainConfig
    finetune: PairsConfig
    out: Path

    def __post_init__(self):
        convert_paths(self, "out")


class _FinetunedPairs(NamedTuple):
    params: dict
    history: list[dict]
    held_out: dict[str, float]  # loss and metrics


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
    f = config.finetune
    texts, validation = (load_pairs(f.data, split, f.source, f.target)
                         for split in (f.train_split, f.validation_split))
    tokenizer_dir = train_joint_tokenizer(config, texts)
    denoised = pretrain(dataclasses.replace(
        config.pretrain, tokenizer=str(tokenizer_dir), out=config.out / "pretraining"))["metrics"]
    base = load_run(config.out / "pretraining")
    new_params = jax.jit(functools.partial(init_params, base.model))(
        jax.random.key(config.pretrain.seed))

    train = pair_rows(f, texts, base.tokenizer)
    eval_batches = pair_rows(f, validation, base.tokenizer).evaluation_batches(
        f.batch_size, mesh=config.pretrain.mesh.make())
    loss_fn = functools.partial(seq2seq.loss, base.model.apply, label_smoothing=f.label_smoothing)
    # Created once, so that both runs share the compiled steps.
    steps = (step.make_train_step(loss_fn, f.optimizer.make(f.num_steps)),
             step.make_eval_step(loss_fn))
    scored = validation[: f.eval_pairs]
    print(f"{tree.count(new_params):,} parameters, {len(texts):,} pairs, {f.num_steps} steps of "
          f"{f.batch_size} pairs, {len(validation):,} pairs held out", flush=True)

    runs, outputs, scores = {}, {}, {}
    for name, params in (("pretrained", base.params), ("scratch", new_params)):
        runs[name] = _finetune_pairs(config, name, *steps, train, eval_batches, base, params)
        outputs[name] = _generate(f, base.model, runs[name].params, base.tokenizer,
                                  [pair["source"] for pair in scored])
        scores[name] = metrics.rouge(outputs[name], [pair["target"] for pair in scored])
        print(f"{name}: held-out loss {runs[name].held_out['nll']:.3f}, "
              + ", ".join(f"{k} {v:.2f}" for k, v in scores[name].items()), flush=True)
    _report(config, scored, outputs, {name: run.history for name, run in runs.items()})
    measured = {
        "denoising": {key: denoised[key] for key in ("held_out_before", "held_out")},
        **{name: {"rouge": scores[name], "held_out": run.held_out, "history": run.history}
           for name, run in runs.items()},
    }
    return run_dir.write_results(config.out, config, measured, time.perf_counter() - began)


def train_joint_tokenizer(config: DenoiseConfig, texts: Sequence[dict]) -> Path:
    """Trains one tokenizer on the plain text and the pairs, unless saved; returns its folder."""
    folder = config.out / "tokenizer"
    if not folder.is_dir():
        both = [{"text": pair[side]} for side in SIDES for pair in texts]
        plain = corpus.load_texts(config.pretrain)[0]
        corpus.train_tokenizer(config.pretrain, [*plain, *both]).save(folder)
    return folder


def pair_rows(
    config: PairsConfig, texts: Sequence[dict], tokenizer: Tokenizer
) -> corpus.ObjectiveRows:
    """Returns the pairs as rows of equal shape, with the special tokens of denoising rows."""
    sides = [tokenizer.encode_batch([pair[side] for pair in texts]) for side in SIDES]
    transform = functools.partial(
        seq2seq.prepare, source_length=config.source_length, target_length=config.target_length,
        start_id=tokenizer.sep_id, bos_id=tokenizer.cls_id, eos_id=tokenizer.sep_id,
        pad_id=tokenizer.pad_id)
    return corpus.ObjectiveRows(
        [dict(zip(SIDES, ids)) for ids in zip(*sides)], transform, config.source_length)


def _finetune_pairs(
    config: DenoiseConfig, name: str, train_step: Callable, eval_step: Callable,
    train: corpus.ObjectiveRows, eval_batches: list[dict], base: LoadedRun, params: dict,
) -> _FinetunedPairs:
    """Trains a copy of `params` in `<out>/<name>`."""
    out, f = config.out / name, config.finetune
    mesh = config.pretrain.mesh.make()
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    save_run_config(out, base.model.config, base.tokenizer)

    def held_out_loss(params):
        return step.evaluate(eval_step, params, eval_batches, mesh)

    metadata = {"model": config_to_dict(base.model.config)} | run_dir.run_metadata(
        f, train.rows, params)
    state, history = loop.fit(
        step.init_state(params, f.optimizer.make(f.num_steps)), train_step,
        train.loader(f.batch_size, mesh, seed=f.seed), rng=jax.random.key(f.seed + 1),
        num_steps=f.num_steps, mesh=mesh, evaluation=loop.Evaluation(held_out_loss, f.eval_every),
        checkpoint=run_dir.make_checkpointer(f, metadata, out / "checkpoints"),
        anomalies=f.anomaly_policy, callbacks=run_dir.make_callbacks(f, out))
    return _FinetunedPairs(state.params, history, held_out_loss(state.params))


def _generate(config: PairsConfig, model: Transformer, params: dict, tokenizer: Tokenizer,
              texts: Sequence[str]) -> list[str]:
    """Generates a target for each source text."""
    beams = {"length_penalty": config.length_penalty} if config.num_beams > 1 else {}
    return generate_targets(
        model, params, tokenizer, texts, max_source_length=config.source_length,
        bos_id=tokenizer.cls_id, num_beams=config.num_beams, max_new_tokens=config.target_length,
        no_repeat_ngram_size=config.no_repeat_ngram_size, **beams)


def _report(config: DenoiseConfig, scored: Sequence[dict], outputs: dict[str, list[str]],
            histories: dict[str, list[dict]]) -> None:
    """Writes all pairs and generated targets to `targets.jsonl`, and plots the loss curves.

    Prints the first three pairs with their generated targets.
    """
    lines = [{**pair, **{name: texts[i] for name, texts in outputs.items()}}
             for i, pair in enumerate(scored)]
    (config.out / "targets.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    for line in lines[:3]:
        print("\n  ".join(["", line["source"][:300].replace("\n", "\n  "),
                           *(f"{name}: {line[name]}" for name in ("target", *outputs))]),
              flush=True)
    if points := loss_curves(histories):  # empty if both runs were already complete
        plots.curves(config.out / "finetuning.png", points,
                     title=f"{config.finetune.source} to {config.finetune.target}")
