"""What every experiment does around its subject: a run's folder, its data and its record."""

import dataclasses
import functools
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from settings import Pretrain

from transformer_jax import distributed, sharding
from transformer_jax.data import batching, packing, sources, token_cache, tokenizers
from transformer_jax.models import build_model, config_from_dict, config_to_dict
from transformer_jax.models.config import Config, TransformerConfig
from transformer_jax.objectives import causal_lm, denoising, mlm_nsp
from transformer_jax.objectives.denoising import Noise
from transformer_jax.pretrained import load_pretrained
from transformer_jax.pretrained.runs import LoadedRun, is_run, load_run

LOSSES = {"causal_lm": causal_lm.loss, "mlm_nsp": mlm_nsp.loss, "denoising": denoising.loss}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets",
            "tokenizers", "numpy")


def start() -> None:
    """Call first in a script: host settings, other processes, what was compiled before, and the
    devices, said aloud."""
    if distributed.platform_is_cpu():
        distributed.configure_malloc()
    distributed.initialize()
    devices = jax.devices()
    if not jax.config.jax_compilation_cache_dir:
        folder = distributed.compilation_cache_dir(devices[0].device_kind)
        jax.config.update("jax_compilation_cache_dir", str(folder))
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
    bpe = functools.partial(tokenizers.train_bpe, vocab_size=size)
    if c.objective == "denoising":
        bpe = functools.partial(bpe, specials=tokenizers.SEQ2SEQ_SPECIALS)
    train: dict[str, Callable] = {
        "bpe": bpe,
        "wordpiece": functools.partial(tokenizers.train_wordpiece, vocab_size=size),
        "chars": tokenizers.train_chars,
    }
    if c.tokenizer not in train:
        return tokenizers.load(c.tokenizer)
    return train[c.tokenizer]([example["text"] for example in texts])


def fit_to(model: Config, tokenizer: tokenizers.Tokenizer) -> Config:
    """The config with the tokenizer's size, and for encoder-decoders its special tokens."""
    model = model.replace(vocab_size=tokenizer.vocab_size)
    if not isinstance(model, TransformerConfig):
        return model
    end = tokenizer.sep_id
    return model.replace(pad_token_id=tokenizer.pad_id, bos_token_id=tokenizer.cls_id,
                         eos_token_id=end, decoder_start_token_id=end)


class Split(NamedTuple):
    """Rows of one objective: random access to examples, and what makes a row of one."""

    rows: Any
    transform: Callable | None
    tokens_per_row: int

    def loader(self, batch_size: int, mesh: Mesh | None = None, **options) -> batching.Loader:
        """Batches for this process, which takes its share of the rows of each global batch."""
        share = sharding.process_data_shard(mesh)
        return batching.make_loader(
            self.rows, batch_size, transform=self.transform,
            process_index=share.index, process_count=share.count, **options,
        )

    def evaluation(
        self, batch_size: int, limit: int | None = None, mesh: Mesh | None = None
    ) -> list[dict]:
        """Every row once, in fixed batches: masks and pairs are drawn once, so losses compare."""
        loader = self.loader(batch_size, mesh, shuffle=False, num_epochs=1, drop_remainder=False)
        return [batch for i, batch in enumerate(loader) if limit is None or i < limit]


def objective_rows(c: Pretrain, texts: Sequence[dict], tokenizer: tokenizers.Tokenizer,
                   name: str = "train") -> Split:
    """Rows of `c.length` tokens for the run's objective; `name` is of the part of the data."""
    tokenize = packing.tokenize_corpus
    if c.prepared is not None:
        tokenize = functools.partial(token_cache.tokenize_to_cache, folder=c.prepared / name)
    if c.objective not in LOSSES:
        raise ValueError(f"unknown objective {c.objective!r}; choose one of {', '.join(LOSSES)}")
    if c.objective == "causal_lm":
        corpus = tokenize(texts, tokenizer, eos_id=tokenizer.eos_id, sentences=c.unit != "file")
        return Split(packing.PackedTokens(corpus, c.length), None, c.length)
    if c.objective == "denoising":
        corpus = tokenize(_sentences(texts, c.sentence_end), tokenizer)
        transform = functools.partial(
            denoising.prepare, noise=c.noise, length=c.length, mask_id=tokenizer.mask_id,
            start_id=tokenizer.sep_id, bos_id=tokenizer.cls_id, eos_id=tokenizer.sep_id,
            pad_id=tokenizer.pad_id,
            word_starts=tokenizer.is_word_start if c.whole_words else None)
        return Split(denoising.Passages(corpus, c.length - 2), transform, c.length)
    pairs = mlm_nsp.SentencePairs(tokenize(texts, tokenizer), c.length - 3)
    transform = functools.partial(
        mlm_nsp.prepare, pairs=pairs, length=c.length, rate=c.mask_rate,
        max_predictions=max(1, round(c.length * c.mask_rate)), vocab_size=tokenizer.vocab_size,
        cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id, mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id, first_ordinary_id=tokenizer.mask_id + 1,
        word_starts=tokenizer.is_word_start if c.whole_words else None,
    )
    return Split(pairs, transform, c.length)


def _sentences(texts: Sequence[dict], end: str) -> Sequence[dict]:
    """Texts with a line end after every sentence that `end` ends; as they are if it is empty."""
    if not end:
        return texts
    lines = end.rstrip() + "\n"
    return [{"text": texts[i]["text"].replace(end, lines)} for i in range(len(texts))]


# A run's folder -----------------------------------------------------------------------------------


def load_base(
    source: str | Path, *, dropout_rate: float | None = None, pooling: str | None = None
) -> LoadedRun:
    """What is fine-tuned: the model of a run's folder, or of a checkpoint in the Hugging Face
    format (a folder, an id on the hub, "package:NAME/FOLDER"), with its pre-trained heads.

    `dropout_rate`, of attention too, and `pooling` are the model's own if not given.
    """
    changes: dict[str, Any] = {} if dropout_rate is None else {
        "dropout_rate": dropout_rate, "attention_dropout_rate": dropout_rate}
    changes |= {} if pooling is None else {"pooling": pooling}
    if is_run(source):
        run = load_run(source)
        return run._replace(model=build_model(run.model.config.replace(**changes)))
    model, params, tokenizer = load_pretrained(source, **changes)
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer; add its tokenizer.json or vocabulary files")
    return LoadedRun(model, params, tokenizer, [])


def held_out_batches(pretrained: Path, tokenizer, batch_size: int = 64) -> list[dict]:
    """The rows that a pre-training run held out, as it evaluated on them."""
    saved = _read_json(pretrained / "results.json")["config"]
    saved["model"] = config_from_dict(saved["model"])
    fields = {f.name for f in dataclasses.fields(Pretrain)} - {"optimizer", "mesh", "out"}
    saved["noise"] = Noise(**saved["noise"])
    # Fields that are newer than the run have their defaults, which change nothing of its data.
    c = Pretrain(out=pretrained, **{name: saved[name] for name in fields & saved.keys()})
    return objective_rows(c, load_texts(c)[1], tokenizer).evaluation(batch_size)


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the --out folder of a finished "
                                "pretrain.py or finetune.py run")
    return json.loads(path.read_text())


# What a run may change and go on: where it stands, what is looked at, on what it runs. Files are
# known by what was read from them.
_NOT_THE_RUN = {"out", "data", "tokenizer", "mesh", "eval_every", "eval_batches", "eval_pairs",
                "save_every", "log_every", "profile", "remember", "pretrained", "quiet", "prepared",
                "allow_config_mismatch", "policy", "replay"}


def identity(config: Any, rows: Any, *more: Any) -> dict[str, Any]:
    """What makes a run what it is, for its checkpoints: every setting that its result depends on,
    and a fingerprint of the rows it reads and of anything else, such as a base's parameters."""
    def settings(value):
        if not isinstance(value, dict):
            return value
        return {name: settings(x) for name, x in value.items() if name not in _NOT_THE_RUN}

    return {"settings": settings(to_json(config)), "data": fingerprint(rows),
            **{f"with_{i}": fingerprint(x) for i, x in enumerate(more)}}


def fingerprint(rows: Any) -> str:
    """A digest of a corpus, of rows, or of any tree of arrays; of long arrays, of 64 blocks."""
    digest = hashlib.sha256()
    rows = getattr(rows, "corpus", rows)
    for leaf in jax.tree.leaves(vars(rows) if dataclasses.is_dataclass(rows) else rows):
        if not hasattr(leaf, "dtype"):
            digest.update(repr(leaf).encode())
            continue
        flat = np.asarray(leaf).reshape(-1) if hasattr(leaf, "shape") else leaf  # or on disk
        digest.update(f"{flat.dtype}{len(flat)}".encode())
        block = max(len(flat) // 64, 2**18)
        for start in range(0, len(flat), block):
            digest.update(np.ascontiguousarray(flat[start : start + 2**18]).tobytes())
    return digest.hexdigest()[:16]


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
    """Dataclasses, paths, NumPy numbers and arrays as JSON values; model configs with family; NaN
    and infinity as null."""
    if isinstance(value, Config):
        return config_to_dict(value)
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):  # a NamedTuple
        return to_json(value._asdict())
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return to_json(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN
    return str(value) if isinstance(value, Path) else value
