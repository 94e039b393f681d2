"""The commands `generate`, `fill`, `translate` and `summarize`, on runs of tiny models."""

import io

import numpy as np
import pytest

from transformer_jax.cli import inference

pytestmark = pytest.mark.slow


def test_generate_streams_text(saved, run):
    status, streamed, _ = run("generate", saved / "gpt", "the cat", "--max-new-tokens", "9")
    assert status == 0 and streamed.startswith("the cat") and len(streamed) > 9
    _, searched, _ = run("generate", saved / "gpt", "the cat", "--max-new-tokens", "9",
                         "--num-beams", "2")
    assert searched.startswith("the cat")
    sampled = [run("generate", saved / "gpt", "the cat", "--temperature", "2.0", "--seed", seed)[1]
               for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_incomplete_characters_are_not_printed(capsys):
    parts = {1: b"a", 2: b"\xc3", 3: b"\x9c", 4: b"!"}
    printer = inference.TextPrinter(
        lambda ids: b"".join(parts[i] for i in ids).decode(errors="replace"), {9})
    printed = []
    for token in (1, 2, 3, 4, 9):
        printer(np.array([token]))
        printed.append(capsys.readouterr().out)
    assert printed == ["a", "", "Ü", "!", ""]
    printer(np.array([2]))
    printer.finish()
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n"


def test_fill_prints_words_by_probability(saved, run):
    status, out, _ = run("fill", saved / "bert", "the [MASK] sat", "--top-k", "3")
    assert status == 0 and out.splitlines()[0] == "the [MASK] sat"
    words = out.splitlines()[1].split(", ")
    probabilities = [float(word.split()[-1]) for word in words]
    assert len(words) == 3 and probabilities == sorted(probabilities, reverse=True)


def test_translate_and_summarize(saved, run, monkeypatch):
    short = ("--max-new-tokens", "6", "--num-beams", "2")
    status, given, _ = run("translate", saved / "bart", "the cat", "a dog", *short)
    assert status == 0 and len(given.split("\n")) >= 3
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n\na dog\n"))
    assert run("translate", saved / "bart", *short)[1] == given
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\na dog " * 30))
    status, out, err = run("summarize", saved / "bart", *short)
    assert status == 0 and out and "is truncated to the model's 32 positions" in err
    assert run("translate", saved / "bart", "x", "--num-beams", "1")[0] == 0


@pytest.mark.parametrize(("command", "name", "text", "message"), [
    ("generate", "bert", "x", "the model is a BERT; this command needs a GPT"),
    ("fill", "gpt", "x", "the model is a GPT; this command needs a BERT"),
    ("translate", "gpt", "x", "this command needs a Transformer"),
    ("fill", "bert", "no mask here", "put [MASK] into the text"),
    ("generate", "gpt", " ", "no text is given; pass it"),
    ("generate", "nowhere", "x", "nowhere"),
])
def test_wrong_input_is_one_line(saved, run, command, name, text, message):
    status, _, err = run(command, saved / name, text)
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
