"""Fine-tune a copy of a pre-trained model on labelled text, training only what a recipe names.

    python experiments/finetune.py --pretrained runs/gpt --train last_k:1 --out runs/topics
    python experiments/finetune.py --pretrained runs/bert --data reviews.tsv --text sentence \
        --label label --train bitfit --out runs/sst2

Hardware and time: python_docs/topics with the quickstart's models takes under a minute on 2 cores.
`--train` is full, head, last_k:N, bitfit, layernorm or regex:..., joined by "+"; the table that is
printed says what trains. `--labels-per-class` limits the annotated examples, `--from-scratch` draws
new parameters instead of copying. `results.json` has accuracy and what was forgotten: the
held-out pre-training loss of the fine-tuned parameters.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import common
import jax
import numpy as np
import tyro
from settings import Mesh, Optimizer

from transformer_jax import draw, evaluate, sharding, tree
from transformer_jax.data import sources
from transformer_jax.finetune import select
from transformer_jax.models import (
    BERT,
    GPT,
    Model,
    Transformer,
    config_to_dict,
    init_params,
)
from transformer_jax.objectives import tasks
from transformer_jax.train import loop, step


@dataclass(frozen=True)
class Settings:
    """How to train, whatever the data. Runs with equal settings and recipe share compiled steps."""

    length: int = 64
    batch_size: int = 16
    num_steps: int = 100
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(
        schedule="linear", peak=1e-3, warmup_steps=10, b2=0.99))


@dataclass(frozen=True)
class Finetune:
    """One fine-tuning run.

    Attributes:
        pretrained: the --out folder of a pretrain.py run.
        train: which parameters change: a recipe.
        from_scratch: start from new parameters instead of a copy of the pre-trained ones.
        data: python_docs/topics, tfds:name, hf:name, or a .tsv, .csv or .jsonl file.
        validation: the file to evaluate on, where data is a file.
        text, label: names of the columns.
        labels_per_class: how many annotated examples to use; all if not given.
    """

    pretrained: Path
    out: Path
    train: str = "full"
    from_scratch: bool = False
    data: str = "python_docs/topics"
    validation: Path | None = None
    text: str = "text"
    label: str = "label"
    labels_per_class: int | None = None
    settings: Settings = field(default_factory=Settings)
    mesh: Mesh = field(default_factory=Mesh)
    seed: int = 0


class Task(NamedTuple):
    """A classification set, tokenized once: examples are `{"tokens", "label"}`."""

    train: list[dict]
    test: list[dict]
    label_names: Sequence[str]


def load_task(c: Finetune, tokenizer) -> Task:
    """The labelled examples that the run asks for, with labels as numbers."""
    if sources.is_local(c.data):
        if c.validation is None:
            raise ValueError(f"{c.data} is a file; name the file to evaluate on by --validation")
        raw = [sources.table(path, columns={"text": c.text, "label": c.label})
               for path in (c.data, c.validation)]
        names = sorted({str(e["label"]) for e in raw[0]})
    else:
        raw = [sources.load_source(c.data, split) for split in ("train", "test")]
        names = raw[0].label_names
    number = {name: i for i, name in enumerate(names)}

    def tokenized(source):
        examples = [source[i] for i in range(len(source))]
        ids = tokenizer.encode_batch([e["text"] for e in examples])
        return [{"tokens": np.asarray(row, np.int32), "label": _label(e["label"], number)}
                for row, e in zip(ids, examples)]

    return Task(*map(tokenized, raw), names)


def _label(value: Any, number: dict[str, int]) -> int:
    if isinstance(value, (int, np.integer)):
        return int(value)
    if value not in number:
        raise ValueError(f"label {value!r} is not among the training labels "
                         f"{', '.join(number)}; mend the evaluation file")
    return number[value]


def few_labels(examples: list[dict], per_class: int | None, seed: int) -> list[dict]:
    """The same number of examples of every class, drawn by seed."""
    if per_class is None:
        return examples
    rng = np.random.default_rng(seed)
    chosen: dict[int, list[dict]] = {}
    for i in rng.permutation(len(examples)):
        of_class = chosen.setdefault(examples[i]["label"], [])
        if len(of_class) < per_class:
            of_class.append(examples[i])
    scarce = {label: len(found) for label, found in chosen.items() if len(found) < per_class}
    if scarce:
        raise ValueError(f"{per_class} labels a class were asked for, but classes have only "
                         f"{scarce}; lower labels_per_class")
    return [example for found in chosen.values() for example in found]


class Compiled(NamedTuple):
    mask: dict
    optimizer: Any
    train_step: Any


@functools.cache
def compiled(model: Model, recipe: str, settings: Settings) -> Compiled:
    """Mask and step of a recipe: the same object for the same arguments, so compiled once."""
    shapes = jax.eval_shape(functools.partial(_new_params, model), jax.random.key(0))
    mask = select.trainable_mask(shapes, recipe)
    optimizer = settings.optimizer.make(settings.num_steps)
    loss_fn = functools.partial(tasks.classification_loss, model.apply)
    return Compiled(mask, optimizer, step.make_train_step(loss_fn, optimizer, mask))


@functools.partial(jax.jit, static_argnames="model")
def _new_params(model, rng):
    return init_params(model, rng, "classify")


@functools.partial(jax.jit, static_argnames="model")
def _predict(model, params, batch):
    return model.apply(
        {"params": params}, batch["tokens"], segment_ids=batch["segment_ids"],
        padding_mask=batch["padding_mask"], method="classify",
    ).argmax(-1)


class Outcome(NamedTuple):
    params: dict
    metrics: dict
    history: list[dict]


def finetune(
    model: Model, pretrained: dict | None, tokenizer, task: Task, recipe: str,
    settings: Settings, seed: int, labels_per_class: int | None = None, quiet: bool = False,
    checkpoint_dir: Path | None = None, mesh: jax.sharding.Mesh | None = None,
) -> Outcome:
    """Copy, train what the recipe names, evaluate every test example once.

    `pretrained` None starts from scratch. `model` has `num_classes` set. Without a mesh the
    parameters stay on one device.
    """
    num_classes = len(task.label_names)
    examples = few_labels(task.train, labels_per_class, seed)
    row = tasks.text_row(model, tokenizer, settings.length)
    transform = functools.partial(tasks.prepare_classification, row=row, num_classes=num_classes)
    fresh = _new_params(model, jax.random.key(seed))
    params, report = (fresh, "new parameters") if pretrained is None else tree.load_into(
        fresh, pretrained)
    mask, optimizer, train_step = compiled(model, recipe, settings)
    if not quiet:
        print(report, select.describe(params, mask), sep="\n", flush=True)
    began = time.perf_counter()
    state, history = loop.fit(
        step.init_state(params, optimizer, mask), train_step,
        common.Split(examples, transform, settings.length).loader(settings.batch_size, seed=seed),
        rng=jax.random.key(seed + 1), num_steps=settings.num_steps, quiet=quiet,
        log_every=max(settings.num_steps // 10, 1), checkpoint_dir=checkpoint_dir, mesh=mesh,
        metadata={"model": config_to_dict(model.config), "recipe": recipe},
    )
    test = common.Split(task.test, transform, settings.length).evaluation(64)
    labels, predictions = [], []
    for batch in test:
        real = batch["weights"] > 0
        predictions.append(np.asarray(_predict(model, state.params, batch))[real])
        labels.append(batch["labels"][real])
    table = evaluate.confusion(np.concatenate(labels), np.concatenate(predictions), num_classes)
    trained = tree.count(tree.split(state.params, mask)[0])
    timed = [h["seconds_per_step"] for h in history if "seconds_per_step" in h]
    return Outcome(state.params, {
        "accuracy": evaluate.accuracy(table), "macro_f1": evaluate.macro_f1(table),
        "matthews": evaluate.matthews(table), "confusion": table,
        "labels": len(examples), "share_trained": trained / tree.count(state.params),
        "seconds_per_step": float(np.median(timed)) if timed else None,
        "seconds": time.perf_counter() - began,
    }, history)


def forgotten(
    model: Model, pretrained: dict, finetuned: dict, batches: list[dict]
) -> float:
    """Held-out pre-training loss of fine-tuned parameters, under the pre-trained heads."""
    kinds = {GPT: "causal_lm", BERT: "mlm_nsp", Transformer: "denoising"}
    objective = next(name for kind, name in kinds.items() if isinstance(model, kind))
    merged = {**pretrained, **{k: v for k, v in finetuned.items() if k in pretrained}}
    return step.evaluate(_eval_step(model, objective), merged, batches)["loss"]


@functools.cache
def _eval_step(model: Model, objective: str):
    return step.make_eval_step(functools.partial(common.LOSSES[objective], model.apply))


def main(c: Finetune) -> dict:
    """The command: one run, its record, and pictures."""
    began = time.perf_counter()
    mesh = sharding.make_mesh(c.mesh.data, c.mesh.fsdp)
    base = common.load_run(c.pretrained)
    base = base._replace(params=jax.device_put(
        base.params, sharding.param_shardings(base.params, mesh)))
    task = load_task(c, base.tokenizer)
    model = type(base.model)(base.model.config, num_classes=len(task.label_names))
    outcome = finetune(
        model, None if c.from_scratch else base.params, base.tokenizer, task, c.train,
        c.settings, c.seed, c.labels_per_class, checkpoint_dir=c.out / "checkpoints", mesh=mesh,
    )
    common.save_card(c.out, model.config, base.tokenizer, task.label_names)
    metrics = dict(outcome.metrics, history=outcome.history)
    if not c.from_scratch:
        held_out = common.held_out_batches(c.pretrained, base.tokenizer)
        metrics["held_out_before"] = forgotten(model, base.params, {}, held_out)
        metrics["held_out_after"] = forgotten(model, base.params, outcome.params, held_out)
        print(f"held-out pre-training loss {metrics['held_out_before']:.3f} before, "
              f"{metrics['held_out_after']:.3f} after fine-tuning")
    print(f"accuracy {metrics['accuracy']:.3f}, macro F1 {metrics['macro_f1']:.3f}, "
          f"{100 * metrics['share_trained']:.2f} % of the parameters trained", flush=True)
    if outcome.history:  # a run that was finished before has none
        points = [(h["step"], h["loss"]) for h in outcome.history if "loss" in h]
        draw.curves(c.out / "loss.png", {"training": tuple(zip(*points))},
                    title=f"Fine-tuning by {c.train}")
    return common.write_results(c.out, c, metrics, time.perf_counter() - began)


if __name__ == "__main__":
    config = tyro.cli(Finetune, description=__doc__)
    common.start()
    main(config)
