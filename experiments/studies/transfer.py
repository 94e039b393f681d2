"""Transfer: fewer labels for the same accuracy, the more so the nearer the text of pre-training.

    python experiments/study.py transfer --data path/to/data

Claims: what is learnt from plain text carries over, so that fine-tuning needs fewer annotated
examples than learning from scratch; and it carries further the nearer the source is to the target.

Small GPTs learn the next word of a million characters of each of five sources: film reviews,
novels, an encyclopedia, plays, and documentation. Each is fine-tuned on the sentiment of film
reviews (SST-2), on the logic between two sentences (SNLI) and on which part of a library a
docstring is about (topics), beside a model from scratch. The rate of fine-tuning is searched for
both, on training examples that are left out otherwise.

`--data` is a folder with `movie_reviews/movie_reviews.jsonl.gz`, `wikitext-2/train.txt.gz`,
`gutenberg/sentences.train.txt.gz`, `tinyshakespeare/input.txt`, `sst2` and `snli`.

One core of an AMD EPYC: 55 minutes. It holds for topics, the one target with a source of its own
kind: with 128, 512 and 1,536 labels documentation 44.4 ± 2.5, 61.4 ± 0.5, 71.9 ± 0.6 %, from
scratch 35.7 ± 0.6, 53.5 ± 2.8, 70.7 ± 1.3; the far sources do harm: 22.3 to 26.1, 36.8 to 43.9,
63.2 to 66.7 (323 docstrings that no source has, commonest class 22.3 %). It does not for the
others: SST-2, 128, 512 and 2,048 labels, from scratch 54.5, 61.4, 69.3 %, the sources 51.0 to 55.6,
59.3 to 60.8, 65.6 to 68.3, film reviews amid them; SNLI with 2,048: 45.8 ± 1.2 and 43.6 to 47.7.
Held-out loss after 1,500 steps is 4.7 to 5.0 nats. Rates of 3e-3 are at the end of what was
searched. What pre-training is worth when there is more of it: `sweep.py sst2_few`.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import configs.snli
import configs.sst2_few
import jax
import numpy as np

from studies import small, systems
from studies.pictures import Line, Lines, show
from transformer_jax.data import (
    LabeledDataset,
    packing,
    sources,
    subsample_balanced,
    tokenizers,
)
from transformer_jax.models import GPT, init_params, presets
from transformer_jax.objectives import causal_lm
from transformer_jax.pretrained.runs import LoadedRun
from transformer_jax.recipes.base_model import add_task_head
from transformer_jax.recipes.config import (
    DatasetConfig,
    FinetuneOptimizerConfig,
    OptimizerConfig,
    TrainingConfig,
)
from transformer_jax.recipes.finetuning_run import encode_for_training, finetune_params
from transformer_jax.train import step

SOURCES = {
    "film reviews": "movie_reviews/movie_reviews.jsonl.gz",
    "novels": "gutenberg/sentences.train.txt.gz",
    "encyclopedia": "wikitext-2/train.txt.gz",
    "plays": "tinyshakespeare/input.txt",
    "documentation": "python_docs/documents",
}
SCRATCH = "from scratch"
HELD_OUT = 0.05  # of a source


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Attributes:
        data: the folder with the sources and the annotated sets.
        sources: what to pre-train on.
        characters: of each source.
        num_steps: of pre-training.
        examples: annotated ones to fine-tune on; test_examples: at most so many to be scored on.
        epochs, min_steps: of fine-tuning; peak_lrs: its rates, of which the one that does best on
            `tuning_examples` of training, for a seed of its own, is taken.
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


def config() -> Transfer:
    return Transfer()


def large() -> Transfer:
    return Transfer(characters=100_000_000, vocab_size=30_000, num_layers=12, d_model=768,
                    length=128, batch_size=256, num_steps=100_000, peak_lr=2e-4,
                    examples=(32, 128, 512, 2048, 8192), peak_lrs=(3e-5, 1e-4, 3e-4), seeds=5)


def smallest() -> Transfer:
    return Transfer(characters=20_000, sources=("plays",), targets=("SST-2",), vocab_size=300,
                    d_model=16, length=16, batch_size=4, num_steps=2, examples=(8,),
                    test_examples=16, tuning_examples=4, peak_lrs=(1e-3,), epochs=1,
                    min_steps=2, seeds=1)


def load_source(c: Transfer, name: str) -> str:
    """The first `characters` of a source, in lower case as the targets are."""
    spec = SOURCES[name]
    if spec.startswith("python_docs/"):
        found = sources.load_source(spec, "train")
    elif not (path := c.data / spec).exists():
        raise FileNotFoundError(f"{path} does not exist; --data names the folder with the sources, "
                                "see the top of studies/transfer.py; --sources chooses others")
    else:
        found = sources.load_table(path) if ".jsonl" in spec else sources.load_text_files(path)
    texts, have = [], 0
    for i in range(len(found)):
        texts.append(found[i]["text"].lower())
        have += len(texts[-1])
        if have >= c.characters:
            break
    return "\n".join(texts)[: c.characters]


def unseen(examples: list[dict], texts: list[str]) -> list[dict]:
    """Those whose beginning no source has: what was read in pre-training is no test. A few words
    may well stand in both."""
    texts = [" ".join(text.split()) for text in texts]
    begins = [" ".join(e["text"].split())[:60] for e in examples]
    return [e for e, begin in zip(examples, begins)
            if len(begin) < 20 or not any(begin in text for text in texts)]


def load_target(c: Transfer, name: str, texts: list[str]) -> tuple[LabeledDataset, LabeledDataset]:
    """(the target, the same with its validation from training examples, to choose a rate by)."""
    if name == "topics":
        data = DatasetConfig()
    else:
        data = {"SST-2": configs.sst2_few, "SNLI": configs.snli}[name].config().dataset
        data = dataclasses.replace(data, data=str(c.data / data.data))
    found = data.load()
    lower = [[{key: value.lower() if isinstance(value, str) else value
               for key, value in found_in[i].items()} for i in range(len(found_in))]
             for found_in in (found.train, found.validation)]
    train, tests = ([split[i] for i in np.random.default_rng(c.seed).permutation(len(split))]
                    for split in lower)
    tests = unseen(tests[: c.test_examples], texts)
    target = found._replace(train=train[c.tuning_examples:], validation=tests)
    return target, target._replace(validation=train[: c.tuning_examples])


def batches(c: Transfer, tokens: np.ndarray, seed: int) -> Iterator[dict]:
    """Next words, at random places of the stream."""
    weights = np.ones((c.batch_size, c.length), np.float32)
    for window in small.windows(tokens, c.length + 1, c.batch_size, seed):
        yield {"tokens": window[:, :-1], "targets": window[:, 1:], "weights": weights}


def pretrain(c: Transfer, name: str, text: str, tokenizer) -> tuple[GPT, dict, float]:
    """(model, parameters, loss on the end of the source, in nats a token)."""
    tokens = packing.tokenize_corpus([{"text": text}], tokenizer, one_sentence_per_line=False).tokens
    cut = int(len(tokens) * (1 - HELD_OUT))
    model = GPT(presets.gpt2(
        num_layers=c.num_layers, d_model=c.d_model, num_heads=4, mlp_dim=4 * c.d_model,
        vocab_size=tokenizer.vocab_size, max_length=2 * c.length, dropout_rate=0.1,
        attention_dropout_rate=0.0, init_std=0.05, positions="sinusoidal"))
    loss = functools.partial(causal_lm.loss, model.apply)
    trained = small.train(
        name, loss, init_params(model, jax.random.key(c.seed)), batches(c, tokens[:cut], c.seed),
        c.num_steps, OptimizerConfig(peak_lr=c.peak_lr, warmup_steps=c.num_steps // 20, b2=0.99),
        seed=c.seed)
    endless = batches(c, tokens[cut:], c.seed + 1)
    held_out = step.evaluate(step.make_eval_step(loss), trained.params,
                             [next(endless) for _ in range(16)])
    return model, trained.params, held_out["loss"]


def score(c: Transfer, base: LoadedRun, data: LabeledDataset, examples: int, peak: float,
          seed: int, scratch: bool) -> float:
    """Accuracy in percent after fine-tuning."""
    training = TrainingConfig(
        max_length=c.length, batch_size=16, epochs=c.epochs, min_steps=c.min_steps,
        gpt_special_tokens=True, optimizer=FinetuneOptimizerConfig(peak_lr=peak, b2=0.99))
    model, pretrained = add_task_head(base, data)
    drawn = data._replace(train=subsample_balanced(data.train, None, seed, total=examples))
    encoded = encode_for_training(drawn, model, base.tokenizer, training)
    found = finetune_params(
        encoded, None if scratch else pretrained, "full", training, seed, quiet=True)
    return 100 * found.metrics["accuracy"]


def best_peak(c: Transfer, base: LoadedRun, tuning: LabeledDataset, examples: int,
              scratch: bool) -> float:
    """The rate that does best on examples that nobody trains on, for a seed of its own."""
    tried = {peak: score(c, base, tuning, examples, peak, c.seeds, scratch) for peak in c.peak_lrs}
    return max(tried, key=tried.get)


def run(c: Transfer) -> dict:
    texts = {name: load_source(c, name) for name in c.sources}
    targets = {name: load_target(c, name, list(texts.values())) for name in c.targets}
    tokenizer = tokenizers.train_wordpiece(list(texts.values()), vocab_size=c.vocab_size)
    bases, losses = {}, {}
    for name, text in texts.items():
        model, params, losses[name] = pretrain(c, name, text, tokenizer)
        bases[name] = LoadedRun(model, params, tokenizer, [])
    starts = {**bases, SCRATCH: next(iter(bases.values()))}
    rows = []
    for target, (data, tuning) in targets.items():
        for examples in sorted({min(n, len(data.train)) for n in c.examples}):
            # The first source's rate serves all sources.
            peak_lrs = {scratch: best_peak(c, bases[c.sources[0]], tuning, examples, scratch)
                     for scratch in (False, True)}
            for start, base in starts.items():
                scratch = start == SCRATCH
                scores = [score(c, base, data, examples, peak_lrs[scratch], seed, scratch)
                          for seed in range(c.seeds)]
                rows.append({"target": target, "examples": examples, "source": start,
                             "peak": peak_lrs[scratch], "accuracy": scores})
                print(f"{target}, {examples:,} examples, {start}: {np.mean(scores):.1f} ± "
                      f"{np.std(scores):.1f} %, rate {peak_lrs[scratch]:g}", flush=True)
    tests = {name: len(data.validation) for name, (data, _) in targets.items()}
    chance = {name: systems.chance(data) for name, (data, _) in targets.items()}
    picture(c, rows, starts)
    return {"rows": rows, "held_out": losses, "chance": chance, "tests": tests}


def picture(c: Transfer, rows: list[dict], starts: dict) -> None:
    def line(target: str, k: int, start: str) -> Line:
        mine = [r for r in rows if (r["target"], r["source"]) == (target, start)]
        found = [r["accuracy"] for r in mine]
        return Line([r["examples"] for r in mine], np.mean(found, 1), np.std(found, 1),
                    points=True, color="black" if start == SCRATCH else f"C{k}",
                    dashed=start == SCRATCH)

    show(c.out / "transfer.png", {
        target: Lines({start: line(target, k, start) for k, start in enumerate(starts)},
                      xlabel="labelled examples", ylabel="accuracy (%)", xscale="log")
        for target in c.targets},
        title=f"Pre-trained on {c.characters:,} characters of …; {c.seeds} seeds")
