"""What every experiment does around its subject: a run's folder, its data and its record."""

import dataclasses
import functools
import json
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from transformer_jax import host
from transformer_jax.data import pipeline, sources, tokenizers
from transformer_jax.models import BERT, GPT, build_model, config_from_dict, config_to_dict
from transformer_jax.models.config import Config
from transformer_jax.objectives import causal_lm, layout, mlm_nsp
from transformer_jax.train import checkpoint

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets",
            "tokenizers", "numpy")


def start() -> None:
    """Call first in a script: host settings, and the devices, said aloud."""
    if jax.default_backend() == "cpu":
        host.keep_freed_memory()
    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), "
          f"{jax.process_count()} process(es), jax {jax.__version__}", flush=True)


# Data ---------------------------------------------------------------------------------------------


def train_tokenizer(kind: str, texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    """"bpe", "wordpiece" or "chars" trained on texts; anything else is a folder to load."""
    train: dict[str, Callable] = {
        "bpe": functools.partial(tokenizers.train_bpe, vocab_size=vocab_size),
        "wordpiece": functools.partial(tokenizers.train_wordpiece, vocab_size=vocab_size),
        "chars": tokenizers.train_chars,
    }
    return train[kind](texts) if kind in train else tokenizers.load(kind)


class Split(NamedTuple):
    """Rows of one objective: random access to examples, and what makes a row of one."""

    rows: Any
    transform: Callable | None
    tokens_per_row: int

    def loader(self, batch_size: int, **options):
        return pipeline.make_loader(self.rows, batch_size, transform=self.transform, **options)

    def evaluation(self, batch_size: int, limit: int | None = None) -> list[dict]:
        """Every row once, in fixed batches: masks and pairs are drawn once, so losses compare."""
        loader = self.loader(batch_size, shuffle=False, num_epochs=1, drop_remainder=False)
        return [batch for i, batch in enumerate(loader) if limit is None or i < limit]


def objective_rows(
    objective: str, corpus, tokenizer: tokenizers.Tokenizer, length: int,
    mask_rate: float = mlm_nsp.MASK_RATE, whole_words: bool = False,
) -> Split:
    """Rows of `length` tokens for "causal_lm" or "mlm_nsp"."""
    if objective == "causal_lm":
        return Split(pipeline.PackedTokens(corpus, length), None, length)
    if objective != "mlm_nsp":
        raise ValueError(f"unknown objective {objective!r}; choose causal_lm or mlm_nsp")
    pairs = mlm_nsp.SentencePairs(corpus, length - 3)
    transform = functools.partial(
        mlm_nsp.prepare, pairs=pairs, length=length, rate=mask_rate,
        max_predictions=max(1, round(length * mask_rate)), vocab_size=tokenizer.vocab_size,
        cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id, mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id, first_ordinary_id=tokenizer.mask_id + 1,
        word_starts=tokenizer.is_word_start if whole_words else None,
    )
    return Split(pairs, transform, length)


def text_row(model: GPT | BERT, tokenizer: tokenizers.Tokenizer, length: int) -> Callable:
    """How this family writes a text (or a pair) to classify as one row."""
    if isinstance(model, GPT):
        return functools.partial(layout.gpt_row, length=length, extract_id=tokenizer.eos_id)
    return functools.partial(layout.bert_row, length=length, cls_id=tokenizer.cls_id,
                             sep_id=tokenizer.sep_id, pad_id=tokenizer.pad_id)


# A run's folder -----------------------------------------------------------------------------------


class Trained(NamedTuple):
    """What a finished run gives to the next: see `load_run`."""

    model: GPT | BERT
    params: dict
    tokenizer: tokenizers.Tokenizer


def save_model_card(out: Path, config: Config, tokenizer: tokenizers.Tokenizer) -> None:
    """config.json and the tokenizer's files; parameters are in `<out>/checkpoints`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config_to_dict(config), indent=2) + "\n")
    tokenizer.save(out / "tokenizer")


def load_run(out: Path, num_classes: int = 0) -> Trained:
    """The model of a run's folder with its parameters and tokenizer.

    Raises:
        FileNotFoundError: there is no finished run in the folder.
    """
    path = out / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{out} holds no config.json; give the --out folder of a "
                                "pretrain.py or finetune.py run")
    values = json.loads(path.read_text())
    num_classes = num_classes or values.pop("num_classes", 0)
    model = build_model(config_from_dict(values), num_classes)
    return Trained(model, checkpoint.load_params(out / "checkpoints"),
                   tokenizers.load(out / "tokenizer"))


def write_results(out: Path, config: Any, metrics: dict, seconds: float) -> dict:
    """`<out>/results.json`: what ran, on what, and what came of it."""
    results = {
        "config": to_json(config),
        "versions": {"python": platform.python_version(),
                     **{name: version(name) for name in PACKAGES}},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 1),
        "metrics": to_json(metrics),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def to_json(value: Any) -> Any:
    """Dataclasses, paths, NumPy numbers and arrays as JSON values; model configs with family."""
    if isinstance(value, Config):
        return config_to_dict(value)
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return np.asarray(value).tolist()
    return str(value) if isinstance(value, Path) else value


def load_texts(data: str, validation_share: float, unit: str) -> tuple[Sequence, Sequence]:
    """(train, validation) sources of `{"text"}`.

    Named data sets have a validation split. Of files, the last `validation_share` is held out: of
    the documents, or, with unit "file", of the characters, kept exactly as they stand.
    """
    if not sources.is_local(data):
        return sources.load_source(data, "train"), sources.load_source(data, "validation")
    source = sources.text_files(data, unit=unit)
    if unit == "file":
        text = "".join(example["text"] for example in source)
        cut = int(len(text) * (1 - validation_share))
        return [{"text": text[:cut]}], [{"text": text[cut:]}]
    cut = int(len(source) * (1 - validation_share))
    examples = [source[i] for i in range(len(source))]
    if not 0 < cut < len(examples):
        raise ValueError(f"{data} has {len(examples)} documents: holding out {validation_share} "
                         "of them leaves one side empty; separate documents by blank lines, or "
                         "use --unit file")
    return examples[:cut], examples[cut:]
