"""Transfer: after pre-training, fewer labels suffice, above all on text similar to the task's.

    python experiments/study.py transfer --data path/to/data

Claims: knowledge from plain text transfers, so fine-tuning needs fewer labeled examples than
training from scratch; and it transfers better if the pre-training text is similar to that of the
task.

Five small GPTs are pre-trained, each on a million characters of one source: film reviews, novels,
an encyclopedia, plays, or documentation. They are fine-tuned on the sentiment of film reviews
(SST-2), on natural language inference (SNLI), and on the classification of docstrings by the part
of Python's standard library that they document (topics), and compared with a model from scratch.
The peak learning rates of fine-tuning and of training from scratch are searched separately, on
training examples that are not used otherwise.

`--data` is a folder with `movie_reviews/movie_reviews.jsonl.gz`, `wikitext-2/train.txt.gz`,
`gutenberg/sentences.train.txt.gz`, `tinyshakespeare/input.txt`, `sst2` and `snli`.

Hardware and time: one core of an AMD EPYC, 55 minutes.

Result: the claims hold for topics. With 128, 512 and 1,536 labels: documentation 44.4 ± 2.5, 61.4 ±
0.5 and 71.9 ± 0.6 %, from scratch 35.7 ± 0.6, 53.5 ± 2.8 and 70.7 ± 1.3 %; the other sources are
worse than training from scratch: 22.3 to 26.1, 36.8 to 43.9 and 63.2 to 66.7 % (323 test docstrings
that are in no source; majority class 22.3 %). The claims do not hold for SST-2 and SNLI. SST-2 with
128, 512 and 2,048 labels: from scratch 54.5, 61.4 and 69.3 %, all sources, film reviews included,
51.0 to 55.6, 59.3 to 60.8 and 65.6 to 68.3 %. SNLI with 2,048 labels: from scratch 45.8 ± 1.2 %,
all sources 43.6 to 47.7 %. The held-out loss after 1,500 steps is 4.7 to 5.0 nats. Some of the
chosen learning rates are the largest of the search, 3e-3. `sweep.py sst2_few` measures the gain
from more pre-training.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import configs.snli
import configs.sst2_few
import jax
import numpy as np

from studies import small_models, training
from studies.figures import Line, Lines, save_panels
from transformer_jax.data import LabeledDataset, load_dataset, packing, sources, tokenizers
from transformer_jax.models import GPT, init_params, presets
from transformer_jax.objectives import causal_lm
from transformer_jax.pretrained import LoadedRun
from transformer_jax.recipes.config import (
    DatasetConfig,
    FinetuneOptimizerConfig,
    OptimizerConfig,
    TrainingConfig,
)
from transformer_jax.train import step

SOURCES = {
    "film reviews": "movie_reviews/movie_reviews.jsonl.gz",
    "novels": "gutenberg/sentences.train.txt.gz",
    "encyclopedia": "wikitext-2/train.txt.gz",
    "plays": "tinyshakespeare/input.txt",
    "documentation": "python_docs/documents",
}
TASK_CONFIGS = {"SST-2": configs.sst2_few, "SNLI": configs.snli}
FROM_SCRATCH = "from scratch"
HELD_OUT_FRACTION = 0.05  # of a source


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Settings of the study.

    Attributes:
        data: folder with the sources and the labeled datasets.
        out: folder for the figure and the results.
        sources: names in `SOURCES`.
        targets: names of tasks, "SST-2", "SNLI" or "topics".
        characters: number of characters from each source.
        vocab_size: size of the vocabulary, shared by all sources.
        num_layers: layers of the models.
        d_model: width of the models.
        length: tokens per row, in pre-training and fine-tuning.
        batch_size: rows per step of pre-training.
        num_steps: steps of pre-training.
        peak_lr: peak learning rate of pre-training.
        examples: numbers of labeled examples for fine-tuning.
        test_examples: maximum number of test examples per task.
        epochs: epochs of fine-tuning.
        min_steps: minimum number of steps of fine-tuning.
        peak_lrs: candidates for the peak learning rate of fine-tuning.
        tuning_examples: number of held-out training examples for choosing among them.
        seeds: number of fine-tuning runs for each combination of a model and an entry of
            `examples`.
        seed: seed of pre-training and of the splits.
    """

    data: Path = Path("data")
    out: Path = Path("runs/transfer")
    sources: tuple[str, ...] = tuple(SOURCES)
    targets: tuple[str, ...] = ("SST-2", "SNLI", "topics")
    characters: int = 1_000_000
    vocab_size: int = 4096
    num_layers: int = 2
    d_model: int = 128
    length: int = 48
    batch_size: int = 32
    num_steps: int = 1500
    peak_lr: float = 2e-3
    examples: tuple[int, ...] = (128, 512, 2048)
    test_examples: int = 1000
    epochs: float = 3
    min_steps: int = 120
    peak_lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    tuning_examples: int = 500
    seeds: int = 3
    seed: int = 0


SIZES = {
    "default": Transfer(),
    "large": Transfer(
        characters=100_000_000, vocab_size=30_000, num_layers=12, d_model=768, length=128,
        batch_size=256, num_steps=100_000, peak_lr=2e-4, examples=(32, 128, 512, 2048, 8192),
        peak_lrs=(3e-5, 1e-4, 3e-4), seeds=5),
    "smallest": Transfer(
        characters=20_000, sources=("plays",), targets=("SST-2",), vocab_size=300, d_model=16,
        length=16, batch_size=4, num_steps=2, examples=(8,), test_examples=16, tuning_examples=4,
        peak_lrs=(1e-3,), epochs=1, min_steps=2, seeds=1),
}


def load_text(config: Transfer, name: str) -> str:
    """Returns the first `config.characters` characters of a source, in lower case."""
    path = SOURCES[name]
    if path.startswith("python_docs/"):
        source = sources.load_source(path, "train")
    elif not (config.data / path).exists():
        raise FileNotFoundError(
            f"{config.data / path} does not exist; set --data to the folder with the sources "
            "(see the docstring of studies/transfer.py), or choose other --sources")
    elif ".jsonl" in path:
        source = sources.load_table(config.data / path)
    else:
        source = sources.load_text_files(config.data / path)
    texts, num_characters = [], 0
    for i in range(len(source)):
        texts.append(source[i]["text"].lower())
        num_characters += len(texts[-1])
        if num_characters >= config.characters:
            break
    return "\n".join(texts)[: config.characters]


def remove_seen(examples: Sequence[dict], texts: Sequence[str]) -> list[dict]:
    """Returns the examples whose first 60 characters are not in the pre-training texts.

    Whitespace is normalized. Examples of fewer than 20 characters are kept, because a few words may
    be in both by chance.
    """
    texts = [" ".join(text.split()) for text in texts]
    beginnings = [" ".join(example["text"].split())[:60] for example in examples]
    return [example for example, beginning in zip(examples, beginnings)
            if len(beginning) < 20 or not any(beginning in text for text in texts)]


class Task(NamedTuple):
    """A labeled dataset; `tuning` validates on held-out training examples."""

    dataset: LabeledDataset
    tuning: LabeledDataset


def load_task(config: Transfer, name: str, texts: Sequence[str]) -> Task:
    """Returns a task in lower case, without test examples that are in the pre-training texts."""
    dataset_config = DatasetConfig()
    if name != "topics":
        dataset_config = TASK_CONFIGS[name].CONFIG.dataset
        dataset_config = dataclasses.replace(
            dataset_config, data=str(config.data / dataset_config.data))
    dataset = load_dataset(dataset_config)

    def shuffle(split: Sequence[dict]) -> list[dict]:
        order = np.random.default_rng(config.seed).permutation(len(split))
        return [{key: value.lower() if isinstance(value, str) else value
                 for key, value in split[i].items()} for i in order]

    train, test = shuffle(dataset.train), shuffle(dataset.validation)
    held_out, train = train[: config.tuning_examples], train[config.tuning_examples:]
    test = remove_seen(test[: config.test_examples], texts)
    dataset = dataset._replace(train=train, validation=test)
    return Task(dataset, dataset._replace(validation=held_out))


def pretraining_batches(config: Transfer, tokens: np.ndarray, seed: int) -> Iterator[dict]:
    """Yields batches for next-token prediction, from random windows of the token stream."""
    weights = np.ones((config.batch_size, config.length), np.float32)
    for windows in training.random_windows(tokens, config.length + 1, config.batch_size, seed):
        yield {"tokens": windows[:, :-1], "targets": windows[:, 1:], "weights": weights}


def pretrain(
    config: Transfer, name: str, text: str, tokenizer: tokenizers.Tokenizer
) -> tuple[LoadedRun, float]:
    """Pre-trains a GPT; returns it and its held-out loss in nats per token."""
    tokens = packing.tokenize_corpus(
        [{"text": text}], tokenizer, one_sentence_per_line=False).tokens
    cut = int(len(tokens) * (1 - HELD_OUT_FRACTION))
    model = GPT(presets.gpt2(
        num_layers=config.num_layers, d_model=config.d_model, num_heads=4,
        mlp_dim=4 * config.d_model, vocab_size=tokenizer.vocab_size, max_length=2 * config.length,
        dropout_rate=0.1, attention_dropout_rate=0.0, init_std=0.05, positions="sinusoidal"))
    loss_fn = functools.partial(causal_lm.loss, model.apply)
    result = training.train(
        name, loss_fn, init_params(model, jax.random.key(config.seed)),
        pretraining_batches(config, tokens[:cut], config.seed), config.num_steps,
        OptimizerConfig(peak_lr=config.peak_lr, warmup_steps=config.num_steps // 20, b2=0.99),
        seed=config.seed)
    held_out = pretraining_batches(config, tokens[cut:], config.seed + 1)
    metrics = step.evaluate(step.make_eval_step(loss_fn), result.params,
                            [next(held_out) for _ in range(16)])
    return LoadedRun(model, result.params, tokenizer, []), metrics["loss"]


def finetune_accuracy(
    config: Transfer, base: LoadedRun, dataset: LabeledDataset, num_examples: int, peak_lr: float,
    seed: int, from_scratch: bool,
) -> float:
    """Returns the accuracy, in percent, after fine-tuning all parameters on some examples."""
    training_config = TrainingConfig(
        max_length=config.length, batch_size=16, epochs=config.epochs, min_steps=config.min_steps,
        gpt_special_tokens=True, optimizer=FinetuneOptimizerConfig(peak_lr=peak_lr, b2=0.99))
    found = small_models.finetune(
        base, dataset, num_examples, training_config, seed, from_scratch)
    return 100 * found.result.metrics["accuracy"]


def choose_peak_lr(config: Transfer, base: LoadedRun, tuning: LabeledDataset, num_examples: int,
                   from_scratch: bool) -> float:
    """Returns the best peak learning rate on held-out training examples, by a seed of its own."""
    accuracies = {
        peak_lr: finetune_accuracy(
            config, base, tuning, num_examples, peak_lr, config.seeds, from_scratch)
        for peak_lr in config.peak_lrs}
    return max(accuracies, key=accuracies.get)


def run(config: Transfer) -> dict[str, Any]:
    texts = {name: load_text(config, name) for name in config.sources}
    tasks = {name: load_task(config, name, list(texts.values())) for name in config.targets}
    tokenizer = tokenizers.train_wordpiece(list(texts.values()), vocab_size=config.vocab_size)
    models, losses = {}, {}
    for name, text in texts.items():
        models[name], losses[name] = pretrain(config, name, text, tokenizer)
    models[FROM_SCRATCH] = models[config.sources[0]]  # its parameters are not used
    rows = []
    for name, task in tasks.items():
        for num_examples in sorted({min(n, len(task.dataset.train)) for n in config.examples}):
            rows += compare_sources(config, name, task, num_examples, models)
    save_figure(config, rows)
    return {"rows": rows, "held_out": losses,
            "chance": {name: small_models.majority_baseline(task.dataset)
                       for name, task in tasks.items()},
            "tests": {name: len(task.dataset.validation) for name, task in tasks.items()}}


def compare_sources(config: Transfer, name: str, task: Task, num_examples: int,
                    models: dict[str, LoadedRun]) -> list[dict[str, Any]]:
    """Fine-tunes all models on `num_examples` examples; returns the accuracies by source."""
    # The learning rate that is best for the first source is used for all sources.
    first = models[config.sources[0]]
    peak_lrs = {from_scratch: choose_peak_lr(config, first, task.tuning, num_examples, from_scratch)
                for from_scratch in (False, True)}
    rows = []
    for source, base in models.items():
        from_scratch = source == FROM_SCRATCH
        peak_lr = peak_lrs[from_scratch]
        accuracies = [
            finetune_accuracy(config, base, task.dataset, num_examples, peak_lr, seed, from_scratch)
            for seed in range(config.seeds)]
        rows.append({"target": name, "examples": num_examples, "source": source,
                     "peak_lr": peak_lr, "accuracy": accuracies})
        print(f"{name}, {num_examples:,} examples, {source}: {np.mean(accuracies):.1f} ± "
              f"{np.std(accuracies):.1f} %, peak learning rate {peak_lr:g}", flush=True)
    return rows


def save_figure(config: Transfer, rows: Sequence[dict[str, Any]]) -> None:
    def line(target: str, source: str, color: str) -> Line:
        found = [row for row in rows if (row["target"], row["source"]) == (target, source)]
        accuracies = [row["accuracy"] for row in found]
        return Line([row["examples"] for row in found], np.mean(accuracies, 1),
                    np.std(accuracies, 1), markers=True, color=color,
                    dashed=source == FROM_SCRATCH)

    colors = {source: f"C{k}" for k, source in enumerate(config.sources)}
    colors[FROM_SCRATCH] = "black"
    save_panels(config.out / "transfer.png", {
        target: Lines({source: line(target, source, color) for source, color in colors.items()},
                      xlabel="labeled examples", ylabel="accuracy (%)", xscale="log")
        for target in config.targets},
        title=f"Pre-training on {config.characters:,} characters of each source; "
              f"{config.seeds} seeds")
