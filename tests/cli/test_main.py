"""The `transformer-jax` program: its overview, its help pages, and what it imports."""

import re
import subprocess
import sys

import pytest

from transformer_jax.cli.main import COMMANDS, main

MAX_LINES, MAX_COLUMNS = 40, 100
CHOICES = {
    "pretrain": ["bert_base", "causal_lm,mlm_nsp,denoising", "wordpiece", "--num-steps"],
    "finetune": ["token_classification", "lora:RANK", "--trainable", "--optimizer.peak-lr"],
    "evaluate": ["macro_f1", "--out"], "predict": ["--data"], "generate": ["float32,bfloat16,int8"],
    "convert": ["causal_lm"], "plan": ["none,dots,full", "v5e:16x16", "--mesh.fsdp"]}


def test_overview_has_one_line_for_each_command(run):
    status, out, _ = run("--help")
    assert status == 0 and run()[1] == out
    lines = out.splitlines()
    assert len(lines) <= MAX_LINES and max(map(len, lines)) <= MAX_COLUMNS
    assert list(COMMANDS) == re.findall(r"^  (\w+) +[A-Z].*\.$", out, re.MULTILINE)
    assert run("--version")[1].startswith("transformer-jax 0.")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_one_screen_and_has_an_example(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(MAX_COLUMNS))
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert stop.value.code == 0
    assert len(lines) <= MAX_LINES and max(map(len, lines)) <= MAX_COLUMNS
    assert f"\n    transformer-jax {name} " in out
    assert [choice for choice in CHOICES.get(name, ()) if choice not in out] == []
    # The example has no unknown flags.
    example = re.search(r"\n    transformer-jax .*(\n     .*)*", out).group()
    assert [flag for flag in re.findall(r"--[\w.-]+", example)
            if f"{flag} " not in out.replace(example, "")] == []


@pytest.mark.parametrize(("name", "flags"), [
    ("pretrain", ["--model.num-layers", "--optimizer.schedule", "--mesh.fsdp", "--save-every"]),
    ("finetune", ["--stride", "--retention-data", "--optimizer.layer-decay", "--label-names"]),
    ("fill", ["--top-k"])])
def test_help_all_has_all_flags(name, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help-all"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and [flag for flag in flags if flag not in out] == []


@pytest.mark.parametrize(("arguments", "message"), [
    (["pretrian"], "unknown command 'pretrian'; did you mean pretrain"),
    (["generate"], "Missing from transformer-jax generate: MODEL"),
    (["generate", "x", "--top-n", "3"], "Unrecognized options: --top-n, 3; did you mean --top-"),
    (["plan", "gpt2", "--remat", "some"], "invalid choice 'some' for argument '--remat'"),
    (["pretrain"], "PRESET is missing; choose one of gpt1, gpt2,"),
    (["pretrain", "gpt22"], "unknown preset 'gpt22'; did you mean gpt2"),
    (["pretrain", "gpt2", "--model.num-layer", "3"], "did you mean --model.num-layers"),
    (["pretrain", "gpt2", "--model.dropout-rate", "2"], "dropout_rate is 2.0; it must be"),
    (["pretrain", "gpt2", "--data", "nowhere.txt"], "nowhere.txt"),
    (["finetune", "--out", "x"], "--pretrained is missing"),
    (["finetune", "--pretrained", "x"], "--out is missing"),
    (["finetune", "--pretrained", "x", "--out", "y", "--epoch", "3"], "did you mean --epochs"),
])
def test_user_errors_are_one_line(run, arguments, message):
    status, _, err = run(*arguments)
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_help_imports_no_jax():
    script = ("import sys; from transformer_jax.cli.main import main; main(['--help']);"
              "assert not {'jax', 'numpy', 'flax'} & set(sys.modules)\n"
              "try: main(['finetune', '--help'])\n"
              "except SystemExit: assert not {'jax', 'flax'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_module_is_the_same_program():
    result = subprocess.run([sys.executable, "-m", "transformer_jax", "fly"], check=False,
                            capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: unknown command 'fly'")
