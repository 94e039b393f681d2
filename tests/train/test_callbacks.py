"""Callbacks: progress, history file, early stopping, the best parameters, and users' own."""

import json
import math

import jax
import numpy as np
import pytest
import toy
from test_loop import Signaling, assert_bit_equal, make, train

from transformer_jax.train import anomalies, callbacks, checkpoint_files, checkpointing, loop
from transformer_jax.train.callbacks import EarlyStopping, HistoryFile, KeepBest, Logging
from transformer_jax.train.checkpointing import Checkpointer
from transformer_jax.train.loop import Evaluation, fit


def evaluation(*values: float) -> Evaluation:
    """An evaluation every two steps, whose metric "loss" has these values."""
    remaining = iter(values)
    return Evaluation(lambda params: {"loss": next(remaining)}, 2)


def params_after(num_steps: int) -> dict:
    return train(num_steps)[0].params


def test_a_progress_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    progress, state = callbacks.Progress(), loop.Run(4, None, Checkpointer(None), ())
    progress.on_start(state)
    progress.on_row(state, {"step": 2, "loss": 2.5, "tokens_per_second": 1234.0,
                            "seconds_per_step": 37.5})
    progress.on_end(state)
    out = capsys.readouterr().out
    assert "2/4" in out
    assert "loss 2.5  1,234 tokens/s  1:15 left" in out


def test_durations():
    assert [callbacks.format_duration(s) for s in (0, 75.4, 3700)] == ["0:00", "1:15", "1:01:40"]


def test_the_default_callbacks_and_none(capsys):
    options = {"rng": None, "num_steps": 10}
    assert [row["step"] for row in fit(*make(), toy.Stream(), **options)[1]] == [10]
    assert capsys.readouterr().out.startswith("step 10/10  loss ")
    assert fit(*make(), toy.Stream(), **options, callbacks=())[1] == []
    assert capsys.readouterr().out == ""


def test_hooks_are_called_in_order():
    class Recorder(callbacks.Callback):
        def __init__(self):
            self.calls = []

        def on_start(self, run):
            self.calls.append("start")

        def on_batch(self, run):
            self.calls.append(f"batch {run.step}")

        def on_step(self, run, result):
            self.calls.append(f"step {result.step}")

        def on_row(self, run, row):
            self.calls.append(f"row {row['step']}")

        def on_end(self, run):
            self.calls.append("end")

    recorder = Recorder()
    train(3, log_every=2, callbacks=[recorder], evaluation=Evaluation(lambda params: {}))
    # The metrics of a step are read after the next batch.
    assert recorder.calls == ["start", "batch 1", "batch 2", "step 1", "batch 3", "row 2",
                              "step 2", "row 3", "step 3", "row 3", "end"]
    recorder = Recorder()
    with pytest.raises(ValueError, match="the batches ended"):
        train(3, iter([toy.batch()]), callbacks=[recorder])
    assert recorder.calls[-1] == "end"


def test_the_file_of_the_history_has_each_step_once(tmp_path):
    path, folder = tmp_path / "rows" / "history.jsonl", tmp_path / "run"
    _, first = train(6, log_every=2, callbacks=[HistoryFile(path)], directory=folder, save_every=4)
    (folder / "6" / "params" / "_METADATA").write_text("{}")  # the run resumes from step 4
    _, second = train(8, log_every=2, callbacks=[HistoryFile(path)], directory=folder)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert rows == first[:2] + second


def test_early_stopping(tmp_path, capsys):
    values = (3.0, 2.0, 2.0, 2.5, math.nan, 0.0)
    options = {"directory": tmp_path, "save_every": 100, "callbacks": [
        EarlyStopping("loss", patience=3), callbacks.Progress()]}
    state, history = train(20, evaluation=evaluation(*values), **options)
    assert int(state.step) == 10
    assert [row["step"] for row in history if "eval_loss" in row] == [2, 4, 6, 8, 10]
    assert checkpoint_files.saved_steps(tmp_path) == [10]
    assert ("stopped at step 10 of 20: eval_loss has not improved since step 4 (3 evaluations)"
            in capsys.readouterr().out)
    # A stopped run stays stopped, and continues with more patience.
    stopped, history = train(20, evaluation=evaluation(), directory=tmp_path,
                             callbacks=[EarlyStopping("loss", patience=3)])
    assert_bit_equal(stopped, state)
    assert history == []
    state, _ = train(20, evaluation=evaluation(2.5, 0.0, 1.0, 1.0, 1.0), directory=tmp_path,
                     callbacks=[EarlyStopping("loss", patience=5)])
    assert_bit_equal(state, train(20)[0])


def test_a_callback_stops_the_run_from_the_metrics_of_a_step(tmp_path):
    class StopAfter(callbacks.Callback):
        def on_step(self, run, result):
            if result.step == 5:
                run.stop("enough")

    state, history = train(20, callbacks=[StopAfter()], directory=tmp_path,
                           evaluation=Evaluation(lambda params: {"one": 1}))
    assert int(state.step) == 6  # it was running when the metrics of step 5 were read
    assert history[-1]["step"] == 6 and history[-1]["eval_one"] == 1
    assert checkpoint_files.saved_steps(tmp_path) == [6]


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_best_parameters_are_kept(tmp_path, on_disk):
    best = KeepBest("accuracy", "max")
    values = iter([0.1, 0.5, 0.5, 0.4, 0.3])
    options = {"directory": tmp_path, "keep": 1, "keep_best": ("accuracy", "max")}
    state, _ = train(10, callbacks=[best], **options if on_disk else {},
                     evaluation=Evaluation(lambda params: {"accuracy": next(values)}, 2))
    assert (best.step, best.value) == (6, 0.5)  # of equal values, the last
    assert_bit_equal(best.best(state), params_after(6))
    if on_disk:
        assert checkpoint_files.saved_steps(tmp_path) == [6, 10]
        assert checkpointing.best_step(tmp_path, "accuracy", "max") == 6
        again = KeepBest("accuracy", "max")
        state, history = train(10, callbacks=[again], **options)
        assert history == []
        assert_bit_equal(again.best(state), params_after(6))


@pytest.mark.slow
def test_a_resumed_run_has_the_same_best_parameters(tmp_path):
    """A signal arrives between the best evaluation and the end."""
    options = {"directory": tmp_path, "keep": 1, "keep_best": ("loss", "min")}
    with pytest.raises(anomalies.Preempted) as error:
        train(20, Signaling(), callbacks=[KeepBest("loss"), EarlyStopping("loss", patience=6)],
              evaluation=evaluation(3.0, 1.0, 2.0, 2.0, 2.0, 2.0), **options)
    assert error.value.step == 13
    best, stopping = KeepBest("loss"), EarlyStopping("loss", patience=6)
    state, _ = train(20, callbacks=[best, stopping], evaluation=evaluation(2.0, 2.0, 2.0, 2.0),
                     **options)
    assert int(state.step) == 16 and stopping.step == best.step == 4
    assert_bit_equal(best.best(state), params_after(4))


def test_the_best_of_a_part_of_the_state():
    best = KeepBest("loss", select=lambda state: state.params["classifier"])
    train(4, callbacks=[best], evaluation=evaluation(1.0, 2.0))
    assert_bit_equal(best.best(train(4)[0]), params_after(2)["classifier"])
    state, _ = train(3, callbacks=[KeepBest("loss")])
    assert_bit_equal(KeepBest("loss").best(state), state.params)  # without an evaluation


@pytest.mark.parametrize(("make_callback", "message"), [
    (lambda: KeepBest("loss", "lowest"), "mode is 'lowest'; it must be 'min' or 'max'"),
    (lambda: EarlyStopping("loss", patience=0), "patience is 0; it must be at least 1"),
    (lambda: Logging(0), "log_every is 0; it must be at least 1"),
    (lambda: callbacks.Profiler("trace", 0), "num_steps of the profile is 0; it must be"),
    (lambda: train(2, callbacks=[KeepBest("acuracy")], evaluation=evaluation(1.0)),
     "KeepBest: the evaluation has no metric 'acuracy'; choose from loss"),
])
def test_invalid_callbacks(make_callback, message):
    with pytest.raises(ValueError, match=message):
        make_callback()


def test_two_callbacks_of_a_class_have_separate_states(tmp_path):
    both = [EarlyStopping("loss", patience=9), EarlyStopping("loss", "max", patience=9)]
    train(4, callbacks=both, evaluation=evaluation(1.0, 2.0), directory=tmp_path)
    again = [EarlyStopping("loss", patience=9), EarlyStopping("loss", "max", patience=9)]
    train(4, callbacks=again, directory=tmp_path)
    assert [c.step for c in again] == [2, 4]
    assert [c.get_state() for c in again] == [c.get_state() for c in both]
    jax.tree.map(np.testing.assert_equal, again[0].get_state(),
                 {"value": 1.0, "step": 2, "num_evaluations": 1})
