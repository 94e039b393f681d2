"""The report of a run: one HTML page that needs no other files.

A summary of the run is followed by curves, predictions, figures, samples and attention maps of the
model, all results and all settings.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer_jax import tree
from transformer_jax.errors import USER_ERRORS
from transformer_jax.generation import fill_mask, generate
from transformer_jax.models import BART, BERT, GPT, Model, Transformer
from transformer_jax.pretrained import LoadedRun, is_run, load_run
from transformer_jax.report import markup, plots
from transformer_jax.report.summary import (
    RunFiles,
    display_name,
    flatten,
    load_outputs,
    load_run_files,
    summary,
)

DEFAULT_TEXT = "Return the number of bytes that were written to the file."
MAX_TOKENS = 20  # of an input text, and of a generated target
MAX_NEW_TOKENS = 60
MAX_ROWS = 8  # of a table of predictions
HEADS = ("classifier", "lm_head", "mlm_head", "nsp_head", "pooler")
"""Modules that attention does not depend on; without them, all tasks share a compiled program."""
CURVE_SIZE = (5.2, 3.2)  # inches
# Columns of the history that are not plotted: they are constant, or no metrics of the model.
_HIDDEN = {"step", "seconds", "compilations", "seconds_per_step", "host_share",
           "data_wait_fraction", "skipped"}
_LOSSES = ("loss", "nll", "nats")


def write_report(
    folder: str | Path, out: str | Path | None = None, text: str | None = None
) -> Path:
    """Writes the report of a run, by default report.html in its folder, and returns the path.

    Supports runs of all recipes, finished or not, including those written by older versions. `text`
    is the input text for the sample and the attention maps; by default, the first source text of a
    translation run, or `DEFAULT_TEXT` for other runs.

    Raises:
        FileNotFoundError: the folder has neither results nor events.
        ValueError: results.json or config.json is damaged.
    """
    folder = Path(folder)
    run = load_run_files(folder)
    model, note = _load_model(folder)
    name = folder.resolve().name
    parts = [f"<h1>{markup.escape(name)}</h1>",
             *summary(run, None if model is None else tree.count(model.params)),
             *_sections(run, model, text)]
    if note:
        parts.append(f'<p class="note">{markup.escape(note)}</p>')
    out = folder / "report.html" if out is None else Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(markup.page(name, parts), encoding="utf-8")
    return out


def _load_model(folder: Path) -> tuple[LoadedRun | None, str]:
    """Returns the model of a run, or None with the reason why it cannot be loaded."""
    if not (is_run(folder) and (folder / "checkpoints").is_dir()):
        return None, ""
    try:
        return load_run(folder), ""
    except USER_ERRORS as error:
        return None, f"The model is not shown, because it cannot be loaded: {error}"


def _sections(run: RunFiles, model: LoadedRun | None, text: str | None) -> Iterator[str]:
    for name, rows in run.histories.items():
        before = run.metrics.get("held_out_before") if not name else None
        curves = curve_figures(rows, before if isinstance(before, Mapping) else None)
        yield markup.section(f"Curves: {name}" if name else "Curves", markup.figures(curves))
    for name, rows in _records(run.metrics):
        yield markup.section(name, records_table(rows))
    lines = load_outputs(run.folder)
    yield markup.section("Predictions", prediction_table(lines))
    yield markup.section("Figures", markup.figures(list(_saved_figures(run))))
    if model is not None:
        given = text or next((line["source"] for line in lines if "source" in line), DEFAULT_TEXT)
        yield markup.section("Sample", sample(model, given))
        yield markup.section("Attention, mean over heads",
                             markup.figures(attention_figures(model, given)))
    if run.results is not None:
        yield markup.section(
            "Details",
            markup.folded("All results", markup.key_value_table(flatten(run.metrics))),
            markup.folded("All settings", markup.key_value_table(
                flatten(run.config), markup.format_setting)),
            markup.folded("Versions", markup.key_value_table(run.results["versions"])))


def _records(metrics: Mapping[str, Any]) -> Iterator[tuple[str, list[dict]]]:
    """Yields (title, rows) of the tables in the results, except training histories."""
    for name, value in metrics.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and (
                "step" not in value[0]):
            yield name.replace("_", " ").capitalize(), value


def _saved_figures(run: RunFiles) -> Iterator[markup.Html]:
    """Yields the PNG files of the folder, except the loss if it is among the curves."""
    for path in sorted(run.folder.glob("*.png")):
        if path.stem == "loss" and run.histories:
            continue
        caption = re.sub(r"[_-]+", " ", path.stem)
        yield markup.figure(path.read_bytes(), caption)


# Curves -------------------------------------------------------------------------------------------


def curve_figures(
    rows: Sequence[Mapping[str, float]], before: Mapping[str, float] | None = None
) -> list[markup.Html]:
    """Returns a plot of each metric by step, with the training and the held-out curve together.

    Each metric has a plot of its own, because losses and scores have different scales. Held-out
    metrics have the prefix "eval_" in `rows`; `before` has those before the first step.
    """
    names = {name.removeprefix("eval_") for row in rows for name in row} - _HIDDEN
    if _is_same(rows, "loss", "nll"):
        names -= {"nll"}
    return [markup.plot(functools.partial(plots.curves, series=series, ylabel="", size=CURVE_SIZE),
                        display_name(name) + " (nats)" * name.endswith(_LOSSES))
            for name in sorted(names, key=_order)
            if (series := _series(rows, name, (before or {}).get(name)))]


def _series(rows: Sequence[Mapping], name: str, before: float | None) -> dict[str, tuple]:
    """Returns the label, steps and values of the training and the held-out curve of a metric."""
    training = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    held_out = [(row["step"], row[f"eval_{name}"]) for row in rows
                if row.get(f"eval_{name}") is not None]
    if before is not None and held_out:
        held_out = [(0, before), *held_out]
    found = {"training": training, "held-out": held_out}
    if max(map(len, found.values())) < 2:  # no curve
        return {}
    return {label: tuple(zip(*points)) for label, points in found.items() if points}


def _order(name: str) -> tuple:
    """Sort key: the loss, its terms, accuracies, other scores, gradient norm and throughput."""
    kinds = (name == "loss", name.endswith(_LOSSES), "accuracy" in name)
    rank = next((i for i, found in enumerate(kinds) if found), 3)
    return rank + 2 * (name in ("grad_norm", "tokens_per_second")), name


def _is_same(rows: Sequence[Mapping], first: str, second: str) -> bool:
    """Whether two metrics are equal wherever the second is recorded."""
    return all(row[prefix + second] == row.get(prefix + first)
               for row in rows for prefix in ("", "eval_") if prefix + second in row)


# Recorded predictions -----------------------------------------------------------------------------


def prediction_table(lines: Sequence[Mapping[str, Any]]) -> markup.Html:
    """Returns the first lines of predictions.jsonl or translations.jsonl, of any task type, as a
    table.
    """
    if not lines:
        return markup.Html("")
    rows = [_prediction_row(line) for line in lines[:MAX_ROWS]]
    note = f"The first {len(rows)} of {len(lines):,}." if len(lines) > len(rows) else ""
    return markup.Html(
        markup.table(list(rows[0]), [list(row.values()) for row in rows])
        + (f'<p class="note">{note}</p>' if note else ""))


def _prediction_row(line: Mapping[str, Any]) -> dict[str, Any]:
    if "translation" in line:
        return {name: line[name] for name in ("source", "translation", "target")}
    row: dict[str, Any] = {"id": str(line["id"])} if "id" in line else {}
    if "words" in line:  # token classification
        return row | {"words and their tags": _tagged(line["words"], line["tags"])}
    row["prediction"] = line.get("prediction", "")
    if "target" in line:
        return row | {"target": line["target"]}
    if "no_answer" in line:  # question answering
        return row | {"prediction": row["prediction"] or "(no answer)", "score": line["score"]}
    row["label"] = line.get("label")
    probabilities = [p for name, p in line.items() if name.startswith("p(")]
    if not probabilities:  # regression
        return row
    is_correct = row["prediction"] == row["label"]
    return row | {"probability": max(probabilities), "": "" if is_correct else "wrong"}


def _tagged(words: Sequence[str], tags: Sequence[str]) -> markup.Html:
    """Returns a text in which words that have a tag other than "O" are followed by it."""
    parts = []
    for word, tag in zip(words, tags):
        text = markup.escape(word)
        parts.append(text if tag == "O" else f"<b>{text}</b> [{markup.escape(tag)}]")
    return markup.Html(" ".join(parts))


def records_table(rows: Sequence[Mapping[str, Any]]) -> markup.Html:
    """Returns a table of dicts, such as the results of a sweep; "x_std" is shown beside "x".

    Omits nested values, "seconds_per_step", and "score", which repeats the metric of a sweep.
    """
    names = [name for name, value in rows[0].items()
             if not name.endswith("_std") and not isinstance(value, list | dict)
             and name not in ("score", "seconds_per_step")]
    return markup.table([display_name(name) for name in names],
                      [[_with_deviation(row, name) for name in names] for row in rows])


def _with_deviation(row: Mapping[str, Any], name: str) -> Any:
    value, deviation = row.get(name), row.get(f"{name}_std")
    if deviation is None or not isinstance(value, int | float):
        return value
    return f"{markup.format_score(value)} ± {markup.format_score(deviation)}"


# Generated sample ---------------------------------------------------------------------------------


def sample(run: LoadedRun, text: str) -> markup.Html:
    """Returns what a model with a pre-training or seq2seq head generates for a text.

    GPT continues it, BERT fills a mask in its middle, BART restores a masked token, and the
    Transformer generates a target. For a model with a task head, the result is empty.
    """
    model, params, tokenizer, _ = run
    ids = _encode(run, text)
    if not ids or model.num_classes or "prompt" in params:  # no KV cache with prompt tuning
        return markup.Html("")
    given = tokenizer.decode(ids)
    if isinstance(model, GPT):
        limit = min(MAX_NEW_TOKENS, model.config.max_length - len(ids))
        [row] = generate(model, params, [ids], max_new_tokens=limit)
        return _labeled({"continuation": _continuation(given, tokenizer.decode(row.tolist()))})
    if isinstance(model, BERT):
        return _filled_mask(run, ids)
    limit = min(MAX_TOKENS, model.config.max_length - 1)
    if isinstance(model, BART) and tokenizer.mask_id is not None:
        ids = _masked(ids, tokenizer.mask_id)
        given = tokenizer.decode(ids, skip_special_tokens=False)
    source = _source(run, ids)
    [row] = generate(model, params, [source], max_new_tokens=limit)
    return _labeled({"source": given, "generated": tokenizer.decode(row.tolist())})


def _encode(run: LoadedRun, text: str) -> list[int]:
    return list(run.tokenizer.encode(text)[: min(MAX_TOKENS, run.model.config.max_length // 2)])


def _source(run: LoadedRun, ids: Sequence[int]) -> list[int]:
    """Returns the source tokens of an encoder-decoder."""
    prefix = [run.tokenizer.cls_id] if isinstance(run.model, BART) else []
    return [*prefix, *ids, run.tokenizer.sep_id]


def _masked(ids: Sequence[int], mask_id: int) -> list[int]:
    middle = len(ids) // 2
    return [*ids[:middle], mask_id, *ids[middle + 1 :]]


def _labeled(texts: Mapping[str, str]) -> markup.Html:
    return markup.Html("".join(
        f'<p class="note">{markup.escape(name)}</p><pre>{markup.escape(text)}</pre>'
        for name, text in texts.items()))


def _continuation(prompt: str, text: str) -> markup.Html:
    """Returns a generated text with its prompt in bold type."""
    if not text.startswith(prompt):
        return markup.escape(text)
    return markup.Html(f"<b>{markup.escape(prompt)}</b>{markup.escape(text[len(prompt):])}")


def _filled_mask(run: LoadedRun, ids: Sequence[int]) -> markup.Html:
    """Returns the most probable words at a mask in the middle of the text."""
    model, params, tokenizer, _ = run
    if tokenizer.mask_id is None or "mlm_head" not in params:
        return markup.Html("")
    masked = _masked(ids, tokenizer.mask_id)
    row = [tokenizer.cls_id, *masked, tokenizer.sep_id]
    [mask] = fill_mask(model, params, row, mask_id=tokenizer.mask_id)
    words = [tokenizer.decode([int(i)], skip_special_tokens=False).strip() for i in mask.token_ids]
    table = markup.table(["word", "probability"], [
        [word, float(p)] for word, p in zip(words, mask.probabilities)])
    text = _labeled({"masked text": tokenizer.decode(masked, skip_special_tokens=False)})
    return markup.Html(text + table)


# Attention ----------------------------------------------------------------------------------------


def attention_figures(run: LoadedRun, text: str) -> list[markup.Html]:
    """Returns attention maps of the first and the last layer for a text, as the mean over heads.

    Only the body of the model is applied, so models with any head, or none, are supported.
    """
    ids = _encode(run, text)
    if not ids:
        return []
    figures = []
    for name, (weights, queries, keys) in _attention(run, ids).items():
        words, others = (None if row is None else _words(run, row) for row in (queries, keys))
        for layer in sorted({0, len(weights) - 1}):
            maps = {"": np.asarray(weights[layer])[0].mean(0)}
            figures.append(markup.plot(functools.partial(
                plots.attention, maps=maps, tokens=words, sources=others, cell_size=0.18),
                f"{name}, layer {layer}"))
    return figures


def _attention(run: LoadedRun, ids: list[int]) -> dict[str, tuple]:
    """Returns kind of attention -> (weights by layer, query tokens, key tokens or None)."""
    model, params, tokenizer, _ = run
    body = {name: leaves for name, leaves in params.items() if name not in HEADS}
    apply = functools.partial(_apply_to_row, type(model)(model.config), body)
    if isinstance(model, GPT):
        return {"self-attention": (apply("decode", ids).attention, ids, None)}
    if isinstance(model, BERT):
        row = [tokenizer.cls_id, *ids, tokenizer.sep_id]
        return {"self-attention": (apply("encode", row).attention, row, None)}
    assert isinstance(model, Transformer)
    source = _source(run, ids)
    if model.num_classes:  # with a task head, the decoder input is the shifted source
        target = [model.config.decoder_start_token_id or 0, *source[:-1]]
    else:
        limit = min(MAX_TOKENS, model.config.max_length - 1)
        [row] = generate(model, params, [source], max_new_tokens=limit)
        target = row.tolist()
    encoder, decoder = apply("encode_decode", source, target)
    return {"encoder self-attention": (encoder.attention, source, None),
            "decoder self-attention": (decoder.attention, target, None),
            "cross-attention": (decoder.cross_attention, target, source)}


def _apply_to_row(model: Model, params: dict, method: str, *rows: Sequence[int]) -> Any:
    """Returns the outputs of a model method for one row of tokens, or one source and target."""
    return _jitted_apply(model, params, method, *(np.array([row], np.int32) for row in rows))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _jitted_apply(model, params, method, *tokens):
    return model.apply({"params": params}, *tokens, method=method, output_attentions=True)


def _words(run: LoadedRun, ids: Sequence[int]) -> list[str]:
    """Returns the text of each token, for use as axis labels."""
    words = [run.tokenizer.decode([int(i)], skip_special_tokens=False) for i in ids]
    return [word.strip().replace("\n", " ") or "·" for word in words]
