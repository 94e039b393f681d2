"""The shell face, on runs of tiny models."""

import io
import json

import numpy as np
import pytest
import transformer_jax.cli.main as cli
from small_models import BART, BERT, GPT2, build

from transformer_jax.data import tokenizers
from transformer_jax.pretrained import runs
from transformer_jax.train import checkpointing, optimizers, step

TEXTS = ["the cat sat on the mat", "a dog ran in the park", "Übung macht den Meister"] * 3


def save(folder, config, tokenizer, num_classes=0, labels=()):
    config = config.replace(vocab_size=tokenizer.vocab_size)
    params = build(config, num_classes)[1]
    if num_classes:
        params = {k: v for k, v in params.items() if k not in ("mlm_head", "nsp_head")}
    runs.save_run_config(folder, config, tokenizer, labels)
    checkpointing.save(folder / "checkpoints", 1, step.init_state(params, optimizers.make_optimizer(0.1)))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    bpe, wordpiece = tokenizers.train_bpe(TEXTS, 280), tokenizers.train_wordpiece(TEXTS, 140)
    joint = tokenizers.train_bpe(TEXTS, 290, tokenizers.SEQ2SEQ_SPECIAL_TOKENS)
    bart = BART.replace(eos_token_id=2, pad_token_id=1)
    save(folder / "gpt", GPT2, bpe)
    save(folder / "bert", BERT, wordpiece)
    save(folder / "classes", BERT, wordpiece, 3, ("zoo", "park", "house"))
    save(folder / "bart", bart, joint)
    return folder


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_generate_streams_what_it_would_return(saved, capsys):
    status, streamed, _ = run(capsys, "generate", saved / "gpt", "the cat",
                              "--max-new-tokens", "9")
    assert status == 0 and streamed.startswith("the cat") and len(streamed) > 9
    _, searched, _ = run(capsys, "generate", saved / "gpt", "the cat", "--max-new-tokens", "9",
                         "--num-beams", "2")
    assert searched.startswith("the cat")
    drawn = [run(capsys, "generate", saved / "gpt", "the cat", "--temperature", "2.0", "--seed",
                 str(seed))[1] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_character_is_printed_when_it_is_whole(capsys):
    parts = {1: b"a", 2: b"\xc3", 3: b"\x9c", 4: b"!"}
    printer = cli.Printer(
        lambda ids: b"".join(parts[i] for i in ids).decode(errors="replace"), {9})
    shown = []
    for token in (1, 2, 3, 4, 9):
        printer(np.array([token]))
        shown.append(capsys.readouterr().out)
    assert shown == ["a", "", "Ü", "!", ""]
    printer(np.array([2]))
    printer.finish()
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n"


def test_fill_and_classify(saved, capsys):
    status, out, _ = run(capsys, "fill", saved / "bert", "the [MASK] sat", "--top-k", "3")
    assert status == 0 and out.splitlines()[0] == "the [MASK] sat"
    words = out.splitlines()[1].split(", ")
    shares = [float(word.split()[-1]) for word in words]
    assert len(words) == 3 and shares == sorted(shares, reverse=True)
    status, out, _ = run(capsys, "classify", saved / "classes", "the cat", "a dog")
    assert status == 0
    answers = out.splitlines()[1::2]
    assert len(answers) == 2
    for answer in answers:
        assert {word.split()[0] for word in answer.strip().split(", ")} == {"zoo", "park", "house"}
        assert sum(float(word.split()[1]) for word in answer.split(", ")) == pytest.approx(
            1, abs=0.01)


def test_translate_and_summarize(saved, capsys, monkeypatch):
    short = ("--max-new-tokens", "6", "--num-beams", "2")
    status, given, _ = run(capsys, "translate", saved / "bart", "the cat", "a dog", *short)
    assert status == 0 and len(given.split("\n")) >= 3
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n\na dog\n"))
    assert run(capsys, "translate", saved / "bart", *short)[1] == given
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\na dog " * 30))
    status, out, err = run(capsys, "summarize", saved / "bart", *short)
    assert status == 0 and out and "only the first 32 are read" in err
    assert run(capsys, "translate", saved / "bart", "x", "--num-beams", "1")[0] == 0


@pytest.mark.parametrize(("arguments", "message"), [
    (("generate", "bert", "x"), "the model is a BERT; this needs a GPT"),
    (("fill", "gpt", "x"), "the model is a GPT; this needs a BERT"),
    (("translate", "gpt", "x"), "this needs a Transformer"),
    (("classify", "bert", "x"), "has no classifier; fine-tune it first"),
    (("fill", "bert", "no mask here"), "put \\[MASK\\] into the text"),
    (("generate", "gpt", " "), "there is no text; give some"),
    (("generate", "nowhere", "x"), "nowhere"),
])
def test_bad_input_is_one_line(saved, capsys, arguments, message):
    command, name, *rest = arguments
    status, _, err = run(capsys, command, saved / name, *rest)
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    import re

    assert re.search(message, err)


def test_convert_gives_the_same_answers(saved, capsys, tmp_path):
    status, out, _ = run(capsys, "convert", saved / "gpt", tmp_path / "out")
    assert status == 0 and "model.safetensors" in out and "config.json" in out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt2"
    answers = [run(capsys, "generate", folder, "the cat", "--max-new-tokens", "8")[1]
               for folder in (saved / "gpt", tmp_path / "out")]
    assert answers[0] == answers[1]


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
