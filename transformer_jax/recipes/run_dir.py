"""The folder of a run: training with checkpoints in it, results, and files of older versions.

A run writes `results.json` (config, versions, device, metrics), `config.json` and `tokenizer/`
(`pretrained.load_run`), `checkpoints/`, `events/` for TensorBoard, and figures.
"""

import dataclasses
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from transformer_jax import distributed, storage
from transformer_jax.models import REMOVED_FIELDS, RENAMED_FIELDS, config_to_dict
from transformer_jax.models.config import Config
from transformer_jax.report import plots
from transformer_jax.train import callbacks, checkpointing, loop, step
from transformer_jax.train.checkpointing import Checkpointer

CONFIG, RESULTS = "config.json", "results.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets",
            "tokenizers", "numpy")

OLD_NAMES = {
    "aux_lm_loss_weight": "lm_weight", "head_lr_multiplier": "head_rate", "end_lr": "end",
    "peak_lr": "peak", "warmup_fraction": "warmup_share",
    "validation_folds": "held_out", "validation_fraction": "validation_share",
    "task_type": "kind", "on_bad_rows": "on_bad",
    "dataset": "data", "training": "settings", "trainable": "train",
    "retention_data": "remember", "max_length": "length", "frozen_dtype": "frozen",
    "gpt_special_tokens": "new_tokens", "max_question_length": "max_question",
    "allow_config_mismatch": "accept_changes", "anomaly_policy": "policy",
    "document_separator": "unit", "tokenized_cache_dir": "prepared",
    "whole_word_masking": "whole_words", "profile_steps": "profile", "replay_step": "replay",
    "validation_split": "held_out_split", "num_averaged_checkpoints": "average",
    "length_buckets": "buckets",
    **{new: old for old, new in RENAMED_FIELDS.items()},
}
"""Name of a setting -> its name in the files of older runs."""
OLD_VALUES = {"document_separator": {"blank_line": "document", "newline": "line"}}
"""Name of a setting -> its value -> that value in the files of older runs."""
NEW_SETTINGS = {"eval_every": 0, "patience": None, "keep_best": False}
"""Settings of fine-tuning that older versions lack -> the value with which a run is the same as in
those versions."""
NOT_IDENTITY = {
    "out", "data", "tokenizer", "mesh", "eval_every", "eval_batches", "eval_pairs", "save_every",
    "log_every", "patience", "keep_best", "profile_steps", "retention_data", "pretrained", "quiet",
    "tokenized_cache_dir", "allow_config_mismatch", "anomaly_policy", "replay_step"}
"""Settings that may differ when a run is resumed: paths, evaluation, logging and devices. Data is
identified by its content instead."""


def setup() -> None:
    """Sets up JAX in a script: memory allocator, distributed processes, compilation cache.

    Prints the devices. Call it before the first array is created.
    """
    if distributed.platform_is_cpu():
        distributed.configure_malloc()
    distributed.initialize()
    devices = jax.devices()
    if not jax.config.jax_compilation_cache_dir:
        folder = distributed.compilation_cache_dir(devices[0].device_kind)
        jax.config.update("jax_compilation_cache_dir", str(folder))
    print(f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), "
          f"{jax.process_count()} process(es), jax {jax.__version__}", flush=True)


def fit(
    config: Any, out: Path, state: step.TrainState, train_step: Callable, batches: loop.Batches,
    evaluate: Callable, mesh: Mesh, metadata: dict[str, Any], **options: Any,
) -> tuple[step.TrainState, list[dict]]:
    """Runs the training loop of a config with checkpoints and TensorBoard events in `out`.

    `metadata` is the identity of the run (`run_metadata`) with the model config, and the options
    are those of `Checkpointer`. With `config.replay_step`, only that step is repeated.
    """
    arguments = {"rng": jax.random.key(config.seed + 1), "mesh": mesh,
                 "anomalies": config.anomaly_policy, "checkpoint": make_checkpointer(
                     config, metadata, out / "checkpoints", **options)}
    if (number := getattr(config, "replay_step", None)) is not None:
        state, row = loop.replay_step(state, train_step, batches, step=number, **arguments)
        return state, [row]
    found = [callbacks.Logging(config.log_every), callbacks.Progress(),
             callbacks.TensorBoard(out / "events")]
    if profile_steps := getattr(config, "profile_steps", 0):
        found.append(callbacks.Profiler(out / "trace", profile_steps))
    return loop.fit(
        state, train_step, batches, num_steps=config.num_steps, callbacks=found,
        evaluation=loop.Evaluation(evaluate, config.eval_every), **arguments)


def make_checkpointer(
    config: Any, metadata: dict[str, Any] | None, directory: Path | None, **options: Any
) -> Checkpointer:
    """Returns a checkpointer that also resumes runs of older versions, if there is a directory.

    A run resumes only if its metadata equals that of the checkpoint, whose names of settings are
    therefore used.
    """
    if directory is not None and checkpointing.latest_step(directory) is not None:
        metadata = with_old_names(metadata, checkpointing.load_metadata(directory) or {})
    return Checkpointer(
        directory, save_every=config.save_every, metadata=metadata,
        allow_config_mismatch=config.allow_config_mismatch, **options)


def add_to_run_config(out: Path, **values: Any) -> None:
    """Adds values to the config.json of a run (`pretrained.save_run_config`)."""
    path = out / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")


def to_json(value: Any) -> Any:
    """Converts a value to JSON types.

    Dataclasses and NamedTuples become dicts, arrays become lists, and paths become strings. The
    dict of a model config includes its family. NaN and infinity become None, because JSON has
    neither.

    Example:
        >>> to_json({"loss": np.float32(0.5), "path": Path("a"), "bad": math.nan})
        {'loss': 0.5, 'path': 'a', 'bad': None}
    """
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
        return None
    return str(value) if isinstance(value, Path) else value


def write_results(out: Path, config: Any, metrics: dict, seconds: float) -> dict[str, Any]:
    """Writes `<out>/results.json` and returns its content: config, versions, device and metrics."""
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
    (out / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
    return results


def load_results(out: str | Path) -> dict[str, Any]:
    """Returns the content of `<out>/results.json`, with the current names of settings."""
    path = Path(out) / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the --out folder of a finished "
                                "pre-training or fine-tuning run")
    results = storage.read_json(path)
    return results | {"config": with_present_names(results["config"])}


def write_jsonl(path: Path, lines: Iterable[dict]) -> None:
    """Writes one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
                    encoding="utf-8")


def write_predictions(path: Path, lines: Sequence[dict]) -> None:
    """Writes one JSON object per line, in the order of the data.

    Answers to questions are also written to a file of the same name with the suffix .json, as the
    dict `{id: text}` that SQuAD's evaluation script reads.
    """
    write_jsonl(path, lines)
    if lines and "no_answer" in lines[0]:
        answers = {str(line["id"]): line["prediction"] for line in lines}
        path.with_suffix(".json").write_text(json.dumps(answers, ensure_ascii=False, indent=1),
                                             encoding="utf-8")


def plot_losses(path: Path, title: str, series: dict[str, tuple[list[dict], str]]) -> None:
    """Plots entries of histories by step; series: label -> (history, name of the entry).

    There is no plot without values, as after a run that was already complete.
    """
    points = {label: [(row["step"], row[name]) for row in history if name in row]
              for label, (history, name) in series.items()}
    if curves := {label: tuple(zip(*found)) for label, found in points.items() if found}:
        plots.curves(path, curves, title=title)


def run_metadata(config: Any, rows: Any, *more: Any) -> dict[str, Any]:
    """Returns the identity of a run; it resumes only from a checkpoint with the same identity.

    It consists of the settings that affect the result (all but `NOT_IDENTITY`) and of fingerprints
    of the training rows and of `more` data, such as pre-trained parameters.
    """
    def identity(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: identity(x) for name, x in value.items() if name not in NOT_IDENTITY}

    return {"settings": identity(to_json(config)), "data": fingerprint(rows),
            **{f"with_{i}": fingerprint(x) for i, x in enumerate(more)}}


def fingerprint(rows: Any) -> str:
    """Returns a hash of a corpus, of rows, or of any tree of arrays: 16 digits of its SHA-256.

    Of a long array, only about 64 evenly spaced blocks are hashed.
    """
    digest = hashlib.sha256()
    rows = getattr(rows, "corpus", rows)
    for leaf in jax.tree.leaves(vars(rows) if dataclasses.is_dataclass(rows) else rows):
        if not hasattr(leaf, "dtype"):
            digest.update(repr(leaf).encode())
            continue
        # A corpus in a token cache is not an array, but its slices are arrays.
        flat = np.asarray(leaf).reshape(-1) if hasattr(leaf, "shape") else leaf
        digest.update(f"{flat.dtype}{len(flat)}".encode())
        block = max(len(flat) // 64, 2**18)
        for start in range(0, len(flat), block):
            digest.update(np.ascontiguousarray(flat[start : start + 2**18]).tobytes())
    return digest.hexdigest()[:16]


def with_present_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of an older run under their current names.

    Example:
        >>> with_present_names({"length": 64, "optimizer": {"peak": 0.1}, "unit": "document"})
        {'max_length': 64, 'optimizer': {'peak_lr': 0.1}, 'document_separator': 'blank_line'}
    """
    current = {old: new for new, old in OLD_NAMES.items()}
    renamed = {}
    for old, value in config.items():
        # "data" is the old name of "dataset" in fine-tuning; in pre-training it is a string.
        name = old if old == "data" and not isinstance(value, Mapping) else current.get(old, old)
        values = {old: new for new, old in OLD_VALUES.get(name, {}).items()}
        renamed[name] = (with_present_names(value) if isinstance(value, Mapping)
                         else values.get(value, value) if isinstance(value, str) else value)
    return renamed


def without_new_settings(settings: Any) -> Any:
    """Returns settings in JSON types without those that have their value in `NEW_SETTINGS`."""
    if isinstance(settings, list):
        return [without_new_settings(x) for x in settings]
    if not isinstance(settings, Mapping):
        return settings
    return {name: without_new_settings(value) for name, value in settings.items()
            if name not in NEW_SETTINGS or value != NEW_SETTINGS[name]}


def with_old_names(settings: Any, saved: Any = None) -> Any:
    """Returns settings in JSON types under the names that older runs use.

    If `saved`, the settings of an older run, is given, only old names that it contains are used.

    Example:
        >>> with_old_names({"max_length": 32, "seed": 1}, saved={"length": 64, "seed": 0})
        {'length': 32, 'seed': 1}
    """
    if isinstance(settings, list):
        return [with_old_names(x) for x in settings] if saved is None else settings
    if not isinstance(settings, Mapping) or not isinstance(saved, Mapping | None):
        return settings
    renamed = {}
    for name, value in settings.items():
        old = OLD_NAMES.get(name, name)
        if saved is None or (name not in saved and old in saved):
            if isinstance(value, str):
                value = OLD_VALUES.get(name, {}).get(value, value)
            name = old
        renamed[name] = with_old_names(value, None if saved is None else saved.get(name, ""))
    # Model configs of older runs have the config.json of their checkpoint in the field `source`.
    return renamed | {name: saved[name] for name in REMOVED_FIELDS
                      if saved and "family" in settings and name in saved}
