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
from settings import Pretrain

from transformer_jax import host
from transformer_jax.data import pipeline, sources, tokenizers
from transformer_jax.models import config_from_dict, config_to_dict
from transformer_jax.models.config import Config
from transformer_jax.objectives import causal_lm, mlm_nsp
from transformer_jax.pretrained.runs import Trained, load_run, save_card

__all__ = ["Trained", "load_run", "save_card"]  # and all that is defined here

LOSSES = {"causal_lm": causal_lm.loss, "mlm_nsp": mlm_nsp.loss}
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


def load_texts(c: Pretrain) -> tuple[Sequence, Sequence]:
    """(train, validation) sources of `{"text"}`.

    Named data sets have a validation split. Of files, the last `validation_share` is held out:
    of the documents, or, with unit "file", of the characters, kept exactly as they stand.
    """
    data, share = c.data, c.validation_share
    if not sources.is_local(data):
        return sources.load_source(data, "train"), sources.load_source(data, "validation")
    source = sources.text_files(data, unit=c.unit)
    if c.unit == "file":
        text = "".join(example["text"] for example in source)
        cut = int(len(text) * (1 - share))
        return [{"text": text[:cut]}], [{"text": text[cut:]}]
    cut = int(len(source) * (1 - share))
    examples = [source[i] for i in range(len(source))]
    if not 0 < cut < len(examples):
        raise ValueError(f"{data} has {len(examples)} documents: holding out {share} "
                         "of them leaves one side empty; separate documents by blank lines, or "
                         "use --unit file")
    return examples[:cut], examples[cut:]


def make_tokenizer(c: Pretrain, texts: Sequence[dict]) -> tokenizers.Tokenizer:
    """"bpe", "wordpiece" or "chars" trained on the texts; anything else is a folder to load."""
    size = c.model.vocab_size
    train: dict[str, Callable] = {
        "bpe": functools.partial(tokenizers.train_bpe, vocab_size=size),
        "wordpiece": functools.partial(tokenizers.train_wordpiece, vocab_size=size),
        "chars": tokenizers.train_chars,
    }
    if c.tokenizer not in train:
        return tokenizers.load(c.tokenizer)
    return train[c.tokenizer]([example["text"] for example in texts])


class Split(NamedTuple):
    """Rows of one objective: random access to examples, and what makes a row of one."""

    rows: Any
    transform: Callable | None
    tokens_per_row: int

    def loader(self, batch_size: int, **options) -> pipeline.Loader:
        """Batches for this process, which takes its share of the rows of each global batch."""
        return pipeline.make_loader(
            self.rows, batch_size, transform=self.transform,
            process_index=jax.process_index(), process_count=jax.process_count(), **options,
        )

    def evaluation(self, batch_size: int, limit: int | None = None) -> list[dict]:
        """Every row once, in fixed batches: masks and pairs are drawn once, so losses compare."""
        loader = self.loader(batch_size, shuffle=False, num_epochs=1, drop_remainder=False)
        return [batch for i, batch in enumerate(loader) if limit is None or i < limit]


def objective_rows(c: Pretrain, texts: Sequence[dict], tokenizer: tokenizers.Tokenizer) -> Split:
    """Rows of `c.length` tokens for the run's objective."""
    if c.objective not in LOSSES:
        raise ValueError(f"unknown objective {c.objective!r}; choose one of {', '.join(LOSSES)}")
    if c.objective == "causal_lm":
        corpus = pipeline.tokenize_corpus(texts, tokenizer, eos_id=tokenizer.eos_id,
                                          sentences=c.unit != "file")
        return Split(pipeline.PackedTokens(corpus, c.length), None, c.length)
    pairs = mlm_nsp.SentencePairs(pipeline.tokenize_corpus(texts, tokenizer), c.length - 3)
    transform = functools.partial(
        mlm_nsp.prepare, pairs=pairs, length=c.length, rate=c.mask_rate,
        max_predictions=max(1, round(c.length * c.mask_rate)), vocab_size=tokenizer.vocab_size,
        cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id, mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id, first_ordinary_id=tokenizer.mask_id + 1,
        word_starts=tokenizer.is_word_start if c.whole_words else None,
    )
    return Split(pairs, transform, c.length)


# A run's folder -----------------------------------------------------------------------------------


def held_out_batches(pretrained: Path, tokenizer, batch_size: int = 64) -> list[dict]:
    """The rows that a pre-training run held out, as it evaluated on them."""
    saved = _read_json(pretrained / "results.json")["config"]
    saved["model"] = config_from_dict(saved["model"])
    fields = {f.name for f in dataclasses.fields(Pretrain)} - {"optimizer", "mesh", "out"}
    c = Pretrain(out=pretrained, **{name: saved[name] for name in fields})
    return objective_rows(c, load_texts(c)[1], tokenizer).evaluation(batch_size)


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the --out folder of a finished "
                                "pretrain.py or finetune.py run")
    return json.loads(path.read_text())


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
