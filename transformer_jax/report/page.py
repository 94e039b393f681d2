"""A run as one HTML page that needs nothing else: what was asked, what came of it, curves,
pictures, and what the model does with a text: what it writes, and where it looks.

Numbers come from the run's results.json; of a run that has not ended, from its TensorBoard events.
"""

import base64
import html
import json
import struct
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer_jax.generation import fill_mask, generate
from transformer_jax.models import BERT, GPT, Transformer
from transformer_jax.pretrained.runs import LoadedRun, is_run, load_run
from transformer_jax.report import plots

DEFAULT_TEXT = "Return the number of bytes that were written to the file."
SHOWN = 24  # tokens of a text that is looked at
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left;
       vertical-align: top } td.n { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100%; margin: .5rem 0 } pre { white-space: pre-wrap; background: #f6f6f6;
       padding: .6rem } details { margin: .5rem 0 }
"""


def write_report(folder: str | Path, out: str | Path | None = None, text: str = DEFAULT_TEXT) -> Path:
    """The page of a run, at `out` or in its folder as report.html.

    Args:
        folder: of a run of the scripts in `experiments`.
        text: what the model is given, if the folder has one.

    Raises:
        FileNotFoundError: the folder has neither results nor events.
        ValueError: results.json is damaged.
    """
    folder = Path(folder)
    results = _results(folder)
    history = list(_histories(results["metrics"])) if results else []
    if not history and (rows := list(read_events(folder / "events"))):
        history = [("events", rows)]
    if results is None and not history:
        raise FileNotFoundError(f"{folder} has no results.json and no events; give the --out "
                                "folder of a run")
    parts = [f"<h1>{html.escape(folder.resolve().name)}</h1>", _facts(results, history)]
    for name, rows in history:
        parts += [_section(f"Curves: {name}" if len(history) > 1 else "Curves"), *_curves(rows)]
    if results:
        parts += [_section("Numbers"), _table(_numbers(results["metrics"]))]
    pictures = sorted(folder.glob("*.png"))
    if pictures:
        parts.append(_section("Pictures"))
        parts += [_image(path.read_bytes(), path.stem) for path in pictures]
    if is_run(folder) and (folder / "checkpoints").is_dir():
        parts += _model(load_run(folder), text)
    if results:
        settings = _table(_numbers(results["config"], everything=True))
        parts += [_section("Settings"), f"<details><summary>all</summary>{settings}</details>"]
    out = folder / "report.html" if out is None else Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"<!doctype html><html lang=en><meta charset=utf-8><title>"
                   f"{html.escape(folder.resolve().name)}</title><style>{STYLE}</style>"
                   f"<body>{''.join(parts)}</body></html>", encoding="utf-8")
    return out


def read_events(folder: Path) -> Iterator[dict[str, float]]:
    """Rows of "step" and scalars that TensorBoard's files hold, in the order of steps; what a run
    that was cut off wrote by half is left out."""
    # Imported here: a run with results needs no protocol buffers.
    from tensorboardX.proto import event_pb2

    rows: dict[int, dict[str, float]] = defaultdict(dict)
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            record = data[at + 12 : at + 12 + length]
            at += 16 + length
            if len(record) < length:
                break
            event = event_pb2.Event.FromString(record)
            for value in event.summary.value:
                name = value.tag.removeprefix("train/").replace("eval/", "eval_")
                rows[event.step][name] = value.simple_value
    return ({"step": step, **row} for step, row in sorted(rows.items()))


def _results(folder: Path) -> dict[str, Any] | None:
    path = folder / "results.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        return {name: found[name] for name in
                ("metrics", "config", "versions", "device", "seconds", "finished")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); run the experiment again") from None


def _histories(metrics: Any, name: str = "") -> Iterator[tuple[str, list[dict]]]:
    """(where it was found, rows) of every history in the results."""
    if isinstance(metrics, list) and metrics and all(
            isinstance(row, dict) and "step" in row for row in metrics):
        yield name.strip("."), metrics
    elif isinstance(metrics, Mapping):
        for key, value in metrics.items():
            yield from _histories(value, f"{name}.{key}")


def _numbers(value: Any, name: str = "", everything: bool = False) -> dict[str, Any]:
    """Single values by dotted name; lists of rows are for other places."""
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= _numbers(item, f"{name}.{key}" if name else str(key), everything)
        return found
    if isinstance(value, int | float | str) or (everything and not isinstance(value, list)):
        return {name: value}
    return {name: ", ".join(map(str, value))} if everything else {}


def _facts(results: Mapping | None, history: Sequence) -> str:
    if results is None:
        return f"<p>Not ended: step {int(history[0][1][-1]['step']):,}.</p>"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (f"<p>{html.escape(str(results['device']))}, {results['seconds']:,.0f} s, finished "
            f"{html.escape(str(results['finished']))}<br>{html.escape(versions)}</p>")


def _curves(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Pictures of the losses, and of what else changes with the steps."""
    names = {name for row in rows for name in row} - {"step", "seconds"}
    groups = {
        "loss (nats)": [n for n in sorted(names) if n.endswith("loss")],
        "gradient norm": ["grad_norm"],
        "accuracy": [n for n in sorted(names) if n.endswith("accuracy")],
        "tokens a second": ["tokens_per_second"],
    }
    found = []
    for label, members in groups.items():
        lines = {}
        for name in members:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                shown = name.replace("eval_", "held-out ").replace("_", " ")
                lines[shown] = tuple(zip(*points))
        if lines:
            found.append(_drawn(lambda path, lines=lines, label=label: plots.curves(
                path, lines, title="", ylabel=label), label))
    return found


def _model(found: LoadedRun, text: str) -> list[str]:
    """What the model makes of a text, and its attention."""
    model, params, tokenizer = found.model, found.params, found.tokenizer
    ids = tokenizer.encode(text)[: min(SHOWN, model.config.max_length // 2)]
    if not ids:
        return []
    given = tokenizer.decode(ids)
    parts = [_section("A text"), f"<p>Given: {html.escape(given)}</p>"]
    apply = jax.jit(model.apply)
    if isinstance(model, GPT):
        if model.task == "causal_lm":
            room = min(60, model.config.max_length - len(ids))
            new = generate(model, params, [ids], max_new_tokens=room)[0]
            parts.append(f"<pre>{html.escape(tokenizer.decode(new.tolist()))}</pre>")
        out = apply({"params": params}, np.array([ids]))
        looks = {"self-attention": (out.attention, ids, None)}
    elif isinstance(model, BERT):
        row = [tokenizer.cls_id, *ids, tokenizer.sep_id]
        if not model.num_classes:
            hidden = list(row)
            hidden[len(row) // 2] = tokenizer.mask_id
            best = fill_mask(model, params, hidden, mask_id=tokenizer.mask_id)
            parts.append(f"<pre>{html.escape(tokenizer.decode(hidden, skip_special_tokens=False))}\n"
                         f"{html.escape(str(best))}</pre>")
        out = apply({"params": params}, np.array([row]))
        looks = {"self-attention": (out.attention, row, None)}
    elif isinstance(model, Transformer):
        source = [*ids, tokenizer.sep_id]
        new = generate(model, params, [source], max_new_tokens=min(SHOWN,
                       model.config.max_length - 1))[0].tolist()
        parts.append(f"<pre>{html.escape(tokenizer.decode(new))}</pre>")
        out = apply({"params": params}, np.array([source]), np.array([new]))
        looks = {"encoder": (out.encoder_attention, source, None),
                 "decoder": (out.attention, new, None),
                 "cross-attention": (out.cross_attention, new, source)}
    parts.append(_section("Where it looks"))
    for name, (weights, tokens, sources) in looks.items():
        layers = sorted({0, len(weights) - 1})
        maps = {f"layer {i}, mean over heads": np.asarray(weights[i])[0].mean(0) for i in layers}
        words, others = ([tokenizer.decode([i], skip_special_tokens=False) or "·" for i in row]
                         if row is not None else None for row in (tokens, sources))
        parts.append(_drawn(lambda path, a=(maps, words, others), name=name: plots.attention(
            path, *a, title=name), f"attention: {name}"))
    return parts


def _section(title: str) -> str:
    return f"<h2>{html.escape(title)}</h2>"


def _table(values: Mapping[str, Any]) -> str:
    rows = []
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        shown = f"{value:,.4g}" if isinstance(value, float) else (
            f"{value:,}" if number else str(value))
        rows.append(f"<tr><td>{html.escape(name)}</td><td{' class=n' if number else ''}>"
                    f"{html.escape(shown)}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def _drawn(make: Callable[[Path], Any], name: str) -> str:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "picture.png"
        make(path)
        return _image(path.read_bytes(), name)


def _image(data: bytes, name: str) -> str:
    return (f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,'
            f'{base64.b64encode(data).decode()}"><figcaption>{html.escape(name)}</figcaption>'
            "</figure>")
