"""Run files that a report reads: results.json, events, and tables of outputs."""

import json
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = "results.json"
RUN_CONFIG = "config.json"
EVENTS = "events"
OUTPUT_FILES = ("predictions.jsonl", "translations.jsonl")


class RunFiles(NamedTuple):
    """The recorded results of a run.

    Attributes:
        folder: the folder of the run.
        results: content of results.json; None for a run that is not finished.
        histories: stage name -> rows of the training history, one dict of values for each logged
            step; the name is "" for a run of one stage.
        run_config: content of config.json; empty if there is none.
    """

    folder: Path
    results: dict[str, Any] | None
    histories: dict[str, list[dict]]
    run_config: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the run; empty for a run that is not finished."""
        return {} if self.results is None else self.results["config"]

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of the run; empty for a run that is not finished."""
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
    run_config = _parse_json(path) if path.is_file() else {}
    return RunFiles(folder, results, histories, run_config)


def _load_results(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = _parse_json(path)
    for name in ("metrics", "config", "versions", "device", "seconds", "finished"):
        if not isinstance(found, dict) or name not in found:
            raise ValueError(f"{path} is damaged: it has no {name!r}; run the experiment again")
    return found


def _parse_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); run the experiment again") from None


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
    """Returns the first setting of `names` that is in the config, or the default.

    Some settings have other names in runs of older versions.

    Example:
        >>> setting({"length": 64}, "max_length", "length")
        64
    """
    return next((config[name] for name in names if name in config), default)
