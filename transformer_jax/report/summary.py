"""The files of a run, and the summary of its report: what was trained, and the final results."""

import datetime
import json
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformer_jax import storage
from transformer_jax.report import markup

RESULTS = "results.json"
RUN_CONFIG = "config.json"
EVENTS = "events"
OUTPUT_FILES = ("predictions.jsonl", "translations.jsonl")
FAMILIES = {"gpt": "GPT", "bert": "BERT", "bart": "BART", "transformer": "Transformer"}
OBJECTIVES = {
    "causal_lm": "next-token prediction",
    "mlm_nsp": "masked language modeling and next-sentence prediction",
    "denoising": "denoising"}
NAMES = {
    "loss": "loss", "mlm_loss": "MLM loss", "nsp_loss": "NSP loss", "mlm_accuracy": "MLM accuracy",
    "nsp_accuracy": "NSP accuracy", "nll": "negative log-likelihood", "macro_f1": "macro F1",
    "f1": "F1", "bleu": "BLEU", "rouge": "ROUGE-L", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum", "matthews": "Matthews correlation",
    "pearson": "Pearson correlation", "spearman": "Spearman correlation",
    "ece": "calibration error", "grad_norm": "gradient norm", "lm_nats": "language-model loss",
    "tokens_per_second": "tokens per second", "recipe": "trainable", "labels": "examples",
    "share_trained": "fraction trained", "trained": "parameters trained",
    "held_out_before": "pre-training loss before", "held_out_after": "pre-training loss after"}
"""Name in results.json -> name in the report, if it differs by more than underscores."""
# Numbers in the results of a fine-tuning run that are not scores.
_NOT_SCORES = {
    "labels", "steps", "trained", "share_trained", "cut", "cut_validation", "seconds",
    "seconds_per_step", "held_out_before", "held_out_after", "host_share", "data_wait_fraction"}
MAX_TILES = 6


# Files --------------------------------------------------------------------------------------------


class RunFiles(NamedTuple):
    """The recorded results of a run.

    `results` is None for a run that is not finished; `histories` has, by stage name ("" for a run
    of one stage), one dict of values for each logged step.
    """

    folder: Path
    results: dict[str, Any] | None
    histories: dict[str, list[dict]]
    run_config: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return {} if self.results is None else self.results["config"]

    @property
    def metrics(self) -> dict[str, Any]:
        return {} if self.results is None else self.results["metrics"]


def load_run_files(folder: str | Path) -> RunFiles:
    """Loads the results of a run, or the TensorBoard events of a run that is not finished.

    Raises:
        FileNotFoundError: the folder has neither results.json nor events.
        ValueError: results.json or config.json is damaged.
    """
    folder = Path(folder)
    results = _load_results(folder / RESULTS)
    histories = dict(_find_histories(results["metrics"])) if results else {}
    if not histories and (rows := list(read_events(folder / EVENTS))):
        histories = {"": rows}
    if results is None and not histories:
        raise FileNotFoundError(
            f"{folder} has no {RESULTS} and no {EVENTS}; give the --out folder of a run")
    path = folder / RUN_CONFIG
    run_config = storage.read_json(path) if path.is_file() else {}
    return RunFiles(folder, results, histories, run_config)


def _load_results(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = storage.read_json(path)
    for name in ("metrics", "config", "versions", "device", "seconds", "finished"):
        if name not in found:
            raise ValueError(f"{path} is damaged: it has no {name!r}; run the experiment again")
    return found


def _find_histories(metrics: Any, name: str = "") -> Iterator[tuple[str, list[dict]]]:
    """Yields (name of the stage, rows) of every history in the metrics."""
    if isinstance(metrics, list) and metrics and all(
            isinstance(row, Mapping) and "step" in row for row in metrics):
        yield name.strip(".").removesuffix("history").strip("."), metrics
    elif isinstance(metrics, Mapping):
        for key, value in metrics.items():
            yield from _find_histories(value, f"{name}.{key}")


def read_events(folder: Path) -> Iterator[dict[str, float]]:
    """Yields {"step": step, name: scalar, ...} of TensorBoard files, in the order of steps.

    An incomplete last record, which an interrupted run may leave, is skipped.
    """
    # Imported here because results.json can be read without protocol buffers.
    from tensorboardX.proto import event_pb2

    rows: dict[int, dict[str, float]] = defaultdict(dict)
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, offset = path.read_bytes(), 0
        while offset + 12 <= len(data):
            (length,) = struct.unpack_from("<Q", data, offset)
            record = data[offset + 12 : offset + 12 + length]
            offset += 16 + length
            if len(record) < length:
                break
            event = event_pb2.Event.FromString(record)
            for value in event.summary.value:
                name = value.tag.removeprefix("train/").replace("eval/", "eval_")
                rows[event.step][name] = value.simple_value
    return ({"step": step, **row} for step, row in sorted(rows.items()))


def load_outputs(folder: Path) -> list[dict]:
    """Returns the predictions or translations of a run, or an empty list if it has none."""
    for name in OUTPUT_FILES:
        path = folder / name
        if path.is_file():
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return []


def setting(config: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """Returns the first setting of `names` in the config; some have other names in runs of older
    versions.
    """
    return next((config[name] for name in names if name in config), default)


# Summary ------------------------------------------------------------------------------------------


def display_name(name: str) -> str:
    """Returns the name of a metric or column as shown in the report: "nsp_loss" is "NSP loss"."""
    return NAMES.get(name, name.replace("_", " "))


def job_of(run: RunFiles) -> str:
    """Returns "pretraining", "finetuning", "sweep", "translation" or "denoising"; "" if unknown."""
    config = run.config
    if "objective" in config:
        return "pretraining"
    if "pretrained" in config:
        spec = setting(config, "trainable", "train", "recipes")
        return "finetuning" if isinstance(spec, str) else "sweep"
    if {"source", "target"} <= config.keys():
        return "translation"
    return "denoising" if {"pretrain", "finetune"} <= config.keys() else ""


def summary(run: RunFiles, num_params: int | None) -> list[str]:
    """Returns the HTML at the top of a report: two sentences, main results and a table of facts."""
    return [f'<p class="lead">{markup.escape(_trained(run))}</p>',
            f"<p>{markup.escape(_ended(run))}</p>",
            markup.tiles(list(main_results(run))[:MAX_TILES]),
            markup.key_value_table(dict(_facts(run, num_params)), markup.format_setting)]


def _trained(run: RunFiles) -> str:
    """Returns one sentence: the model, the kind of training and the data."""
    config, job = run.config, job_of(run)
    model = _family(run)
    if job == "pretraining":
        objective = OBJECTIVES.get(config["objective"], config["objective"])
        return f"{model} pre-trained by {objective} on {config['data']}."
    if job == "finetuning":
        spec = setting(config, "trainable", "train")
        start = ("from new parameters" if config.get("from_scratch")
                 else f"from {config['pretrained']}")
        return f"{model} fine-tuned with {spec} on {_dataset(config)['data']}, {start}."
    if job == "sweep":
        specs = setting(config, "trainable", "recipes", default=())
        return (f"{len(specs)} trainable specs compared on {_dataset(config)['data']}, from "
                f"{config['pretrained']}: {', '.join(specs)}.")
    if job == "translation":
        return (f"{model} trained on pairs of texts, {config['source']} to {config['target']}, "
                f"from {config['data']}.")
    if job == "denoising":
        return (f"{model} pre-trained by denoising on {config['pretrain']['data']}, then "
                f"fine-tuned on pairs of texts from {config['finetune']['data']}.")
    return f"{model} in training." if run.results is None else "Results of a run."


def _ended(run: RunFiles) -> str:
    results = run.results
    if results is None:
        step = max(int(rows[-1]["step"]) for rows in run.histories.values())
        return f"Not finished: step {step:,} so far."
    return (f"Finished {_time(results['finished'])} after "
            f"{markup.format_seconds(results['seconds'])} on {results['device']}.")


def _time(value: str) -> str:
    try:
        return f"{datetime.datetime.strptime(value, '%Y-%m-%dT%H:%M:%S%z'):%Y-%m-%d %H:%M}"
    except ValueError:
        return value


def _family(run: RunFiles) -> str:
    config = run.config.get("model") or run.run_config.get("model") or (
        run.config.get("pretrain", {}).get("model", {}))
    return FAMILIES.get(config.get("family"), "Model")


def _dataset(config: Mapping[str, Any]) -> dict[str, Any]:
    found = setting(config, "dataset", "data")
    return found if isinstance(found, dict) else {"data": found}


# Results ------------------------------------------------------------------------------------------


def main_results(run: RunFiles) -> Iterator[markup.Tile]:
    """Yields the final losses and scores, the most important first."""
    metrics, job = run.metrics, job_of(run)
    held_out = metrics.get("held_out")
    if job == "translation" and "bleu" in metrics:
        yield markup.Tile("BLEU", metrics["bleu"])
    if isinstance(held_out, Mapping):
        before = metrics.get("held_out_before")
        before = before if isinstance(before, Mapping) else {}
        for name in sorted(held_out, key=_loss_first):
            if name == "nll" and held_out[name] == held_out.get("loss"):
                continue
            note = f"{markup.format_score(before[name])} before training" if name in before else ""
            yield markup.Tile(f"held-out {display_name(name)}", held_out[name], note)
    if "perplexity" in metrics:
        yield markup.Tile("held-out perplexity", metrics["perplexity"])
    if job == "finetuning":
        yield from _finetuning_results(metrics)
    if run.results is None:
        yield from _last_values(run)
    elif job not in ("pretraining", "finetuning", "translation"):
        others = {k: x for k, x in metrics.items() if k not in ("held_out", "perplexity")}
        for name, value in flatten(others).items():
            if isinstance(value, float):
                yield markup.Tile(" ".join(map(display_name, name.split("."))), value)


def _loss_first(name: str) -> tuple:
    return name != "loss", not name.endswith("loss"), name


def _finetuning_results(metrics: Mapping[str, Any]) -> Iterator[markup.Tile]:
    for name, value in metrics.items():
        if isinstance(value, int | float) and name not in _NOT_SCORES:
            yield markup.Tile(display_name(name), value)
    if calibration := metrics.get("calibration"):
        yield markup.Tile(display_name("ece"), calibration["ece"])
    if metrics.get("held_out_after") is not None:
        yield markup.Tile(f"pre-training loss ({metrics['held_out_objective']})",
                        metrics["held_out_after"],
                        f"{markup.format_score(metrics['held_out_before'])} before fine-tuning")


def _last_values(run: RunFiles) -> Iterator[markup.Tile]:
    """Yields the last value of each loss of a run that is not finished."""
    for rows in run.histories.values():
        last = {name: value for row in rows for name, value in row.items()}
        for name in sorted(last):
            if name.endswith("loss"):
                prefix = "held-out " if name.startswith("eval_") else "training "
                yield markup.Tile(prefix + display_name(name.removeprefix("eval_")), last[name])


# Facts --------------------------------------------------------------------------------------------


def _facts(run: RunFiles, num_params: int | None) -> Iterator[tuple[str, str]]:
    config, metrics = run.config, run.metrics
    if model := (config.get("model") or run.run_config.get("model")):
        yield "model", _model_sizes(model, num_params)
    if labels := run.run_config.get("label_names"):
        shown = ", ".join(map(str, labels[:8])) + (", ..." if len(labels) > 8 else "")
        yield "labels", f"{len(labels)}: {shown}"
    elif task := run.run_config.get("task_type"):
        yield "task", str(task).replace("_", " ")
    if "labels" in metrics:
        validation = _dataset(config).get("validation")
        yield "data", (f"{metrics['labels']:,} training examples"
                       + (f", evaluated on {validation}" if validation else ""))
    if "trained" in metrics:
        yield "trainable", (f"{metrics['trained']:,} parameters, "
                            f"{100 * metrics['share_trained']:.3g} % of all")
    training = setting(config, "training", "settings", default=config)
    if steps := (metrics.get("steps") or training.get("num_steps")):
        yield "training", _training(steps, training)
    if optimizer := training.get("optimizer"):
        yield "optimizer", _optimizer(optimizer)
    if run.results is not None:
        versions = run.results["versions"]
        names = [name for name in ("python", "jax", "flax", "optax") if name in versions]
        yield "versions", ", ".join(f"{name} {versions[name]}" for name in names)


def _model_sizes(model: Mapping[str, Any], num_params: int | None) -> str:
    names = {"num_layers": "layers", "num_decoder_layers": "decoder layers", "d_model": "d_model",
             "num_heads": "heads", "mlp_dim": "mlp_dim", "max_length": "positions",
             "vocab_size": "tokens in the vocabulary"}
    parts = [] if num_params is None else [f"{num_params:,} parameters"]
    for name, noun in names.items():
        if model.get(name) is not None:
            parts.append(f"{noun} {model[name]:,}" if noun == name else f"{model[name]:,} {noun}")
    return ", ".join(parts)


def _training(steps: int, training: Mapping[str, Any]) -> str:
    text = f"{steps:,} steps"
    if "tokens_per_batch" in training:
        return f"{text} of at most {training['tokens_per_batch']:,} tokens"
    if (batch_size := training.get("batch_size")) is not None:
        text += f" of {batch_size:,} rows"
    if (length := setting(training, "max_length", "length")) is not None:
        text += f" of at most {length:,} tokens"
    return text


def _optimizer(optimizer: Mapping[str, Any]) -> str:
    return (f"AdamW, {optimizer.get('schedule')} schedule, peak learning rate "
            f"{setting(optimizer, 'peak_lr', 'peak')}, weight decay "
            f"{optimizer.get('weight_decay')}")


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Returns the values of nested dicts by dotted name; lists of dicts or of lists are left out.
    """
    if isinstance(value, Mapping) and value:
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= flatten(item, f"{name}.{key}" if name else str(key))
        return found
    if isinstance(value, Sequence) and value and isinstance(value[0], Mapping | list):
        return {}
    return {name: value}
