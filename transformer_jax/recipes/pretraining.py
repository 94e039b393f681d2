"""Pre-training of GPT, BERT, BART and the Transformer on plain text.

    from transformer_jax.recipes import pretrain, pretrain_config

    results = pretrain(pretrain_config("bert_tiny", data="corpus.txt", num_steps=1000))
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from transformer_jax import metrics, sharding, tree
from transformer_jax.data import batching, tokenizers
from transformer_jax.errors import did_you_mean
from transformer_jax.models import build_model, config_to_dict, family_name, init_params, presets
from transformer_jax.models.config import Config
from transformer_jax.objectives.denoising import Noise
from transformer_jax.objectives.mlm_nsp import MASK_RATE
from transformer_jax.pretrained.runs import save_run_config
from transformer_jax.recipes import corpus, run_dir
from transformer_jax.recipes.config import MeshConfig, OptimizerConfig, convert_paths
from transformer_jax.report import plots
from transformer_jax.train import anomalies, loop, step


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
        tokenized_cache_dir: folder in which the tokenized corpus is saved, and from which it is
            loaded if it exists. Tokens are then read from disk on demand, for corpora larger than
            memory, and interrupted tokenization is resumed.
        document_separator: how text files are split into documents: "blank_line" at blank lines
            (each line of a document is then a sentence); "newline" at every line end; "file" does
            not split or change the text.
        validation_fraction: fraction at the end of the text files that is held out for evaluation.
        mask_rate: fraction of the tokens that masked language modeling predicts.
        whole_word_masking: mask whole words instead of tokens (masked language modeling and
            denoising).
        noise: how texts are corrupted for the denoising objective.
        sentence_end: end of a sentence within a line, for denoising, such as " . " in tokenized
            text; if empty, each line is one sentence.
        accumulate: number of microbatches whose gradients are accumulated in each step.
        scan_layers: stack the parameters of all layers and scan over them, so that only one layer
            is compiled; for deep models on accelerators.
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
    fields = [f.name for f in dataclasses.fields(PretrainConfig)]
    for name in changes:
        if name not in fields:
            raise ValueError(f"unknown setting {name!r} of a pre-training run; "
                             f"{did_you_mean(name, fields)}")
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
    began = time.perf_counter()
    if config.replay_step is not None and not 0 < config.replay_step <= config.num_steps:
        raise ValueError(f"replay_step is {config.replay_step}; it must be from 1 to "
                         f"{config.num_steps}, the number of steps of the run")
    optimizer = config.optimizer.make(config.num_steps)  # raises on invalid settings
    train_texts, held_out_texts = corpus.load_texts(config)
    saved = config.out / "tokenizer"
    tokenizer = (tokenizers.load(saved) if saved.is_dir()
                 else corpus.train_tokenizer(config, train_texts))
    config = dataclasses.replace(config, model=corpus.with_vocabulary(config.model, tokenizer))
    save_run_config(config.out, config.model, tokenizer)
    run_dir.add_to_run_config(config.out, objective=config.objective)
    train, held_out = (
        corpus.make_objective_rows(config, texts, tokenizer, name)
        for name, texts in (("train", train_texts), ("held_out", held_out_texts)))
    mesh = config.mesh.make()
    held_out_batches = held_out.evaluation_batches(config.batch_size, config.eval_batches, mesh)
    for batch in held_out_batches:
        batching.check_batch_ids(batch, config.model.vocab_size, config.model.max_length)

    params, loss_fn = _init(config, mesh)
    eval_step = step.make_eval_step(loss_fn)

    def held_out_loss(params):
        return step.evaluate(eval_step, params, held_out_batches, mesh)

    rows_per_device = config.batch_size // sharding.num_batch_shards(mesh)
    print(f"{tree.count(params):,} parameters, {len(train.rows):,} rows of {config.max_length} "
          f"tokens, global batch {config.batch_size} ({rows_per_device} per device), "
          f"{config.num_steps} steps, {len(held_out.rows):,} rows held out", flush=True)
    before = None if config.replay_step is not None else held_out_loss(params)
    state, history = _fit(config, optimizer, params, loss_fn, train, mesh, held_out_loss)
    if config.replay_step is not None:
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
    plots.curves(config.out / "loss.png", loss_curves(history, before),
                 title=f"Pre-training by {config.objective}")
    return run_dir.write_results(config.out, config, measured, time.perf_counter() - began)


def _init(config: PretrainConfig, mesh) -> tuple[dict, Callable]:
    """Returns sharded initial parameters and the loss function of the objective."""
    model = build_model(config.model)

    def init(rng):
        params = init_params(model, rng)
        return tree.stack_layers(params) if config.scan_layers else params

    params = sharding.init_sharded(init, jax.random.key(config.seed), mesh)
    return params, functools.partial(corpus.LOSSES[config.objective], model.apply)


def _fit(
    config: PretrainConfig, optimizer, params: dict, loss_fn: Callable,
    train: corpus.ObjectiveRows, mesh, held_out_loss: Callable,
) -> tuple[step.TrainState, list[dict]]:
    """Runs the training loop; returns the final state and the history."""
    metadata = {"model": config_to_dict(config.model)} | run_dir.run_metadata(config, train.rows)
    arguments = (step.init_state(params, optimizer),
                 step.make_train_step(loss_fn, optimizer, accumulate=config.accumulate),
                 train.loader(config.batch_size, mesh, seed=config.seed))
    options = {"rng": jax.random.key(config.seed + 1), "mesh": mesh,
               "anomalies": config.anomaly_policy,
               "checkpoint": run_dir.make_checkpointer(
                   config, metadata, config.out / "checkpoints", keep_best=("loss", "min"))}
    if config.replay_step is not None:
        state, row = loop.replay_step(*arguments, step=config.replay_step, **options)
        return state, [row]
    return loop.fit(
        *arguments, num_steps=config.num_steps, **options,
        evaluation=loop.Evaluation(held_out_loss, config.eval_every),
        callbacks=run_dir.make_callbacks(
            config, config.out, config.batch_size * train.tokens_per_row))


def loss_curves(history: list[dict], before: dict) -> dict[str, tuple]:
    """Returns the training and held-out loss by step, in the format of `report.plots.curves`."""
    train = [(h["step"], h["loss"]) for h in history if "loss" in h]
    held_out = [(0, before["loss"])]
    held_out += [(h["step"], h["eval_loss"]) for h in history if "eval_loss" in h]
    curves = {"training": train, "held-out": held_out}
    return {name: tuple(zip(*points)) for name, points in curves.items() if points}
