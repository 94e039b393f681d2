"""Summary of a report: what was trained, and the final results."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformer_jax.report import markup
from transformer_jax.report.run_files import RunFiles, setting

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
_RUN_FIGURES = {
    "labels", "steps", "trained", "share_trained", "cut", "cut_validation", "seconds",
    "seconds_per_step", "held_out_before", "held_out_after", "host_share", "data_wait_fraction"}
MAX_TILES = 6


def display_name(name: str) -> str:
    """Returns the name of a metric or column as shown in the report.

    Example:
        >>> display_name("nsp_loss"), display_name("exact_match")
        ('NSP loss', 'exact match')
    """
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
    """Returns the HTML at the top of a report: two sentences, main results and a table of facts.

    Args:
        run: the files of the run.
        num_params: number of parameters of the model; None if unknown.
    """
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
        if isinstance(value, int | float) and name not in _RUN_FIGURES:
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
    """Returns the values of nested dicts by dotted name; lists of dicts are left out.

    Example:
        >>> flatten({"held_out": {"loss": 2.5}, "rows": [{"step": 1}], "seeds": [0, 1]})
        {'held_out.loss': 2.5, 'seeds': [0, 1]}
    """
    if isinstance(value, Mapping) and value:
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= flatten(item, f"{name}.{key}" if name else str(key))
        return found
    if isinstance(value, Sequence) and value and isinstance(value[0], Mapping | list):
        return {}
    return {name: value}
