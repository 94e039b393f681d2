"""Progress reports on a terminal; `test_loop` tests those without one."""

from transformer_jax.train import progress


def test_a_progress_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress.progress(4) as report:
        report(2, {"step": 2, "loss": 2.5, "tokens_per_second": 1234.0}, 75.0)
    out = capsys.readouterr().out
    assert "2/4" in out
    assert "loss 2.5  1,234 tokens/s  1:15 left" in out


def test_durations():
    assert [progress.format_duration(s) for s in (0, 75.4, 3700)] == ["0:00", "1:15", "1:01:40"]
