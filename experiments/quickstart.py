"""Pre-train, fine-tune a masked subset, evaluate and generate: GPT and BERT in five minutes.

    python experiments/quickstart.py

Hardware: any; 2 CPU cores take five minutes, one takes six. Nothing is downloaded: the text is the
documentation that Python carries. Both models are pre-trained on it; copies are fine-tuned to tell
from a docstring which part of the standard library it documents, with few labels, by recipes
that train ever more of the parameters; a model of the same size is trained from scratch beside
them. `runs/quickstart` gets `results.json` and the pictures.
"""

import dataclasses
import functools
import time
from dataclasses import dataclass
from pathlib import Path

import common
import configs
import jax
import jax.numpy as jnp
import numpy as np
import supervised
import tyro
from finetune import Settings, finetune, for_task
from forgetting import OBJECTIVES, Memory
from pretrain import pretrain
from rich.console import Console
from rich.table import Table
from settings import Data, FinetuneOptimizer, Pretrain

from transformer_jax.data import subsample_balanced
from transformer_jax.generation import fill_mask, generate
from transformer_jax.models import GPT
from transformer_jax.nn.attention import Mask
from transformer_jax.nn.blocks import Stack
from transformer_jax.nn.positions import sinusoidal
from transformer_jax.objectives.input_format import pack_bert_input
from transformer_jax.report import plots

PROMPTS = ("Return the", "If the file", "This class is used to")
SENTENCES = ("Return the [MASK] of the string.", "Raise an [MASK] if the file does not exist.",
             "I ate an [MASK] today.")
NAMES = {"gpt_python_docs": "GPT", "bert_python_docs": "BERT"}


@dataclass(frozen=True)
class Quickstart:
    """The main job.

    Attributes:
        recipes, peak_lrs: what trains, and its highest learning rate: the fewer parameters, the
            higher. From scratch everything trains at the rate of `full`.
        labels_per_class: label budgets, smallest first.
        seeds: fine-tuning runs a cell of the table.
        test_examples: of the test split, for the table; the same for all cells.
        forgetting_rows: held-out pre-training rows on which forgetting is measured.
        pretrain_steps: 0 takes the configs' numbers.
    """

    out: Path = Path("runs/quickstart")
    recipes: tuple[str, ...] = ("head", "last_k:1", "full")
    peak_lrs: tuple[float, ...] = (1e-2, 3e-3, 1.5e-3)
    labels_per_class: tuple[int, ...] = (16, 64)
    seeds: int = 3
    test_examples: int = 384
    forgetting_rows: int = 96
    pretrain_steps: int = 0
    settings: Settings = dataclasses.field(default_factory=lambda: Settings(
        length=48, batch_size=16, num_steps=50,
        optimizer=FinetuneOptimizer(peak_lr=1.5e-3, b2=0.99)))


def main(c: Quickstart) -> dict:
    began = time.perf_counter()
    console = Console(width=110)
    cells, pretraining, trained = [], {}, {}
    for config_name, name in NAMES.items():
        console.rule(f"Pre-training {name} on the documentation of Python")
        settings = configs.load(Pretrain)[config_name][1]
        settings = dataclasses.replace(
            settings, out=c.out / config_name,
            **({"num_steps": c.pretrain_steps} if c.pretrain_steps else {}))
        pretraining[name] = pretrain(settings)["metrics"]
        trained[name] = common.load_run(settings.out)
        cells += compare_recipes(c, name, trained[name], settings.out, console)
    pictures(c, trained, cells)
    samples = use(trained, console)
    console.print(loss_table(pretraining))
    console.print(recipe_table(cells))
    metrics = {"pretraining": pretraining, "finetuning": cells, "samples": samples}
    results = common.write_results(c.out, c, metrics, time.perf_counter() - began)
    console.print(f"{results['seconds']:.0f} s; figures and results.json are in {c.out}")
    return results


def compare_recipes(c: Quickstart, name: str, base, folder: Path, console: Console) -> list[dict]:
    """A cell for every recipe and label budget: means and deviations over seeds."""
    data = Data().load()
    data = data._replace(validation=data.validation[: c.test_examples])
    model, start = for_task(base, data)
    held_out = common.held_out_batches(folder, base.tokenizer, batch_size=32)
    memory = Memory(base.model, base.params, OBJECTIVES[type(base.model).__name__],
                    held_out[: max(c.forgetting_rows // 32, 1)])
    before = memory.loss({})
    tests = [e["label"] for e in data.validation]
    rates = dict(zip(c.recipes, c.peak_lrs))
    rows = [("from scratch", "full", None), *[(r, r, start) for r in c.recipes]]
    cells = []
    read = functools.partial(supervised.read, model=model, tokenizer=base.tokenizer,
                             how=c.settings.reading())
    for budget in c.labels_per_class:
        drawn = [read(data._replace(train=subsample_balanced(data.train, budget, seed)))
                 for seed in range(c.seeds)]
        for label, recipe, source in rows:
            peak = rates.get(recipe, c.settings.optimizer.peak_lr)
            settings = dataclasses.replace(
                c.settings, optimizer=dataclasses.replace(c.settings.optimizer, peak_lr=peak))
            outcomes = [finetune(model, source, base.tokenizer, task, recipe, settings, seed,
                                 quiet=True) for seed, task in enumerate(drawn)]
            accuracy = np.array([o.metrics["accuracy"] for o in outcomes])
            after = [memory.loss(o.params) for o in outcomes if source is not None]
            cells.append({
                "model": name, "recipe": label, "labels": outcomes[0].metrics["labels"],
                "accuracy": accuracy.mean(), "accuracy_std": accuracy.std(),
                "share_trained": outcomes[0].metrics["share_trained"],
                "seconds_per_step": np.median([o.metrics["seconds_per_step"] for o in outcomes]),
                "held_out_before": before, "held_out_after": np.mean(after) if after else None,
                "chance": max(np.bincount(tests)) / len(tests),
            })
            console.print(f"{name}, {label}, {cells[-1]['labels']} labels: accuracy "
                          f"{100 * accuracy.mean():.1f} %")
    return cells


def recipe_table(cells: list[dict]) -> Table:
    table = Table(title="Fine-tuning: which parameters, how many labels (mean of seeds)")
    for heading in ("model", "labels", "recipe", "accuracy %", "trained %", "ms/step",
                    "pre-training loss before", "after"):
        table.add_column(heading, justify="left" if heading in ("model", "recipe") else "right")
    for i, cell in enumerate(cells):
        after = cell["held_out_after"]
        table.add_row(
            cell["model"], str(cell["labels"]), cell["recipe"],
            f"{100 * cell['accuracy']:.1f} ± {100 * cell['accuracy_std']:.1f}",
            f"{100 * cell['share_trained']:.2f}", f"{1000 * cell['seconds_per_step']:.0f}",
            "" if after is None else f"{cell['held_out_before']:.3f}",
            "" if after is None else f"{after:.3f}",
            end_section=i + 1 < len(cells) and cells[i + 1]["labels"] != cell["labels"],
        )
    return table


def loss_table(pretraining: dict[str, dict]) -> Table:
    table = Table(title="Pre-training: held-out loss (nats)")
    for heading in ("model", "before", "after"):
        table.add_column(heading, justify="right")
    for name, metrics in pretraining.items():
        table.add_row(name, f"{metrics['held_out_before']['loss']:.3f}",
                      f"{metrics['held_out']['loss']:.3f}")
    return table


def use(trained: dict, console: Console) -> dict:
    """Text by GPT, greedy and drawn; words for masks by BERT."""
    gpt, bert = trained["GPT"], trained["BERT"]
    prompts = [gpt.tokenizer.encode(p) for p in PROMPTS]
    ends = {"max_new_tokens": 40, "eos_token_id": gpt.tokenizer.eos_id}
    console.rule("Generated text")
    texts = {}
    for how, options in (
        ("greedy", {}),
        ("sampled", {"do_sample": True, "temperature": 0.8, "top_p": 0.95,
                     "rng": jax.random.key(0)}),
    ):
        rows = generate(gpt.model, gpt.params, prompts, **ends, **options)
        # Prompts are padded on the left with end-of-text, which decoding leaves out.
        texts[how] = [gpt.tokenizer.decode(row) for row in rows]
        for text in texts[how]:
            console.print(f"[{how}] {text}", markup=False)
    console.rule("Filled masks")
    t = bert.tokenizer
    filled = {}
    for sentence in SENTENCES:
        ids = t.encode(sentence)
        row = pack_bert_input(ids, length=len(ids) + 2, cls_id=t.cls_id, sep_id=t.sep_id)
        fill = fill_mask(bert.model, bert.params, row["tokens"], mask_id=t.mask_id)[0]
        filled[sentence] = {t.decode([i]): float(p)
                            for i, p in zip(fill.token_ids, fill.probabilities)}
        words = ", ".join(f"{word} {p:.2f}" for word, p in filled[sentence].items())
        console.print(f"{sentence}  ->  {words}", markup=False)
    return {"texts": texts, "masks": filled}


def pictures(c: Quickstart, trained: dict, cells: list[dict]) -> None:
    """Label efficiency, position encodings, and attention with and without the causal mask.

    Curves of pre-training are in each run's own folder.
    """
    gpt = trained["GPT"]
    learned = np.asarray(gpt.params["position_embed"]["embedding"])
    plots.positions(c.out / "positions.png", {
        "fixed (sinusoidal)": sinusoidal(*learned.shape), "learned by GPT": learned})
    ids = gpt.tokenizer.encode("Return the number of bytes that were written to the file.")
    plots.attention(c.out / "attention.png", attention_maps(gpt.model, gpt.params, ids),
                   [gpt.tokenizer.decode([i]) or "·" for i in ids],
                   title="GPT, last layer, mean over heads")
    panels = {}
    for cell in cells:
        line = panels.setdefault(cell["model"], {}).setdefault(cell["recipe"], ([], [], []))
        for values, key in zip(line, ("labels", "accuracy", "accuracy_std")):
            values.append(cell[key])
    plots.label_efficiency(c.out / "labels.png", panels, chance=cells[0]["chance"],
                          title="Accuracy by labels and by what trains")


def attention_maps(model: GPT, params: dict, ids: list[int]) -> dict[str, np.ndarray]:
    """The same parameters under two masks: a mask is data, the stack does not know it."""
    x = params["token_embed"]["embedding"][jnp.array(ids)] * model.config.embedding_scale
    x += params["position_embed"]["embedding"][: len(ids)]
    masks = {"with the causal mask": Mask(causal=True), "without it": Mask()}
    stack = Stack(model.config.stack)
    return {
        name: np.asarray(jax.jit(stack.apply)({"params": params["decoder"]}, x[None], mask)
                         .attention[-1]).mean((0, 1))
        for name, mask in masks.items()
    }


if __name__ == "__main__":
    config = tyro.cli(Quickstart, description=__doc__)
    common.start()
    main(config)
