"""Reports of runs: content for every family, task type and recipe, and the page in a browser."""

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from small_models import BART, BERT, GPT2, TRANSFORMER, random_params
from tensorboardX import SummaryWriter

from transformer_jax.cli.main import main
from transformer_jax.data import tokenizers
from transformer_jax.models import build_model, init_params
from transformer_jax.pretrained import save_run_config
from transformer_jax.report import markup, page, plots, summary
from transformer_jax.train import checkpointing, optimizers, step

OLD_RUNS = Path(__file__).parents[1] / "files" / "before_redesign"
HISTORY = [{"step": n, "loss": 4.0 / n, "grad_norm": 1.0, "tokens_per_second": 100.0}
           for n in range(1, 9)] + [{"step": 4, "eval_loss": 1.2}, {"step": 8, "eval_loss": 0.9}]
RESULTS = {"config": {"model": {"d_model": 16}, "out": "runs/<x>", "peak_lrs": [1, 2]},
           "versions": {"jax": "0.10.2"}, "device": "1 x cpu", "seconds": 12.0,
           "finished": "2026-01-02T03:04:05+0000",
           "metrics": {"held_out": {"loss": 0.9}, "history": HISTORY, "text": "a < b"}}
TEXTS = ["the cat saw a dog", "a dog saw the cat"]


def captions(content):
    """The captions of all images that are in the page."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,[\w+/=]{200,}"', content)
    assert found == re.findall(r"<figcaption>([^<]*)</figcaption>", content)
    return found


def write_results(folder, config, metrics):
    results = RESULTS | {"config": config, "metrics": metrics}
    (folder / "results.json").write_text(json.dumps(results))


def save_model(folder, config, tokenizer, num_classes=0, task=None, label_names=()):
    config = config.replace(vocab_size=tokenizer.vocab_size)
    model = build_model(config, num_classes, task)
    params = random_params(jax.eval_shape(
        functools.partial(init_params, model), jax.random.key(0)))
    save_run_config(folder, config, tokenizer, label_names, task=task, num_classes=num_classes)
    checkpointing.save(folder / "checkpoints", 1,
                       step.init_state(params, optimizers.make_optimizer(1e-3)))


def test_results_curves_and_figures(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    plots.curves(tmp_path / "two_curves.png", {"loss": ([1, 2], [3, 4])}, title="t")
    path = page.write_report(tmp_path)
    content = path.read_text()
    assert path == tmp_path / "report.html"
    assert captions(content) == ["loss (nats)", "gradient norm", "tokens per second", "two curves"]
    assert "Finished 2026-01-02 03:04 after 12 s on 1 x cpu." in content
    assert "<b>0.900</b><span>held-out loss</span>" in content
    assert "<td>held_out.loss</td><td class=n>0.900</td>" in content
    assert "a &lt; b" in content and "runs/&lt;x&gt;" in content and "<td>1, 2</td>" in content
    assert "<td>jax</td><td>0.10.2</td>" in content
    assert not re.findall(r'(src|href)="(?!data:)', content)  # no external files


def test_run_that_is_not_finished(tmp_path):
    with SummaryWriter(str(tmp_path / "events")) as writer:
        for n in range(1, 6):
            writer.add_scalar("train/loss", 5.0 - n, n)
        writer.add_scalar("eval/loss", 2.5, 5)
    (file,) = (tmp_path / "events").iterdir()
    rows = list(summary.read_events(tmp_path / "events"))
    assert rows[-1] == {"step": 5, "loss": 0.0, "eval_loss": 2.5} and len(rows) == 5
    file.write_bytes(file.read_bytes()[:-7])  # incomplete last record
    assert "eval_loss" not in list(summary.read_events(tmp_path / "events"))[-1]
    content = page.write_report(tmp_path, tmp_path / "out" / "page.html").read_text()
    assert "Not finished: step 5 so far." in content and captions(content) == ["loss (nats)"]
    assert "<b>0.000</b><span>training loss</span>" in content


PRETRAINED = {
    "gpt": (GPT2, tokenizers.train_bpe, 270, ["self-attention"]),
    "bert": (BERT, tokenizers.train_wordpiece, 120, ["self-attention"]),
    "bart": (BART, functools.partial(
        tokenizers.train_bpe, special_tokens=tokenizers.SEQ2SEQ_SPECIAL_TOKENS), 290,
        ["encoder self-attention", "decoder self-attention", "cross-attention"]),
    "transformer": (TRANSFORMER, tokenizers.train_unigram, 80,
                    ["encoder self-attention", "decoder self-attention", "cross-attention"])}


@pytest.mark.slow
@pytest.mark.parametrize("family", PRETRAINED)
def test_sample_and_attention_of_each_family(tmp_path, family):
    config, train, size, attention = PRETRAINED[family]
    save_model(tmp_path, config, train(TEXTS, size))
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    content = page.write_report(tmp_path, text="the cat saw").read_text()
    found = [caption for caption in captions(content) if "layer" in caption]
    assert found == [f"{name}, layer {i}" for name in attention for i in (0, 1)]
    given = {"bert": "the [MASK] saw", "bart": "&lt;mask&gt;"}.get(family, "the cat saw")
    assert "<h2>Sample</h2>" in content and given in content
    if family == "bert":
        table = content.partition("masked text")[2].partition("</table>")[0]
        words = re.findall(r"<tr><td>([^<]+)</td><td class=n>[^<]+</td></tr>", table)
        vocabulary = (tmp_path / "tokenizer" / "vocab.txt").read_text().split("\n")
        assert len(words) == 5 and set(words) <= set(vocabulary)


def test_losses_of_bert_have_plots_of_their_own(tmp_path):
    history = [{"step": n, "loss": 6.0, "mlm_loss": 5.3, "nsp_loss": 0.7, "nsp_accuracy": 0.5}
               for n in range(4)]
    write_results(tmp_path, {"objective": "mlm_nsp", "data": "corpus.txt",
                             "model": {"family": "bert"}},
                  {"held_out": {"nsp_loss": 0.69, "loss": 5.0, "mlm_loss": 4.3},
                   "held_out_before": {"loss": 6.1}, "history": history})
    content = page.write_report(tmp_path).read_text()
    assert captions(content) == [
        "loss (nats)", "MLM loss (nats)", "NSP loss (nats)", "NSP accuracy"]
    assert ("BERT pre-trained by masked language modeling and next-sentence prediction on "
            "corpus.txt.") in content
    tiles = re.findall(r'<div class="tile"><b>([^<]*)</b><span>([^<]*)</span><span>([^<]*)',
                       content)
    assert tiles == [("5.000", "held-out loss", "6.100 before training"),
                     ("4.300", "held-out MLM loss", ""), ("0.690", "held-out NSP loss", "")]


# Task type -> (head, classes, metrics, line of predictions.jsonl, its row in the table).
TASKS = {
    "classification": (
        "classification", 2, {"accuracy": 0.75, "confusion": [[3, 1], [0, 0]],
                              "calibration": {"ece": 0.1, "accuracy": [None, 0.75]}},
        {"id": 0, "prediction": "no", "label": "yes", "p(no)": 0.6, "p(yes)": 0.4},
        ["0", "no", "yes", "0.600", "wrong"]),
    "regression": ("classification", 1, {"pearson": 0.5, "spearman": None},
                   {"id": 0, "prediction": 2.25, "label": 3.0}, ["0", "2.250", "3.000"]),
    "multiple_choice": (
        "multiple_choice", 1, {"accuracy": 0.5},
        {"id": "q", "prediction": "1", "label": "1", "p(0)": 0.2, "p(1)": 0.8},
        ["q", "1", "1", "0.800", ""]),
    "token_classification": (
        "token_classification", 3, {"f1": 0.5},
        {"id": 0, "words": ["A", "cat", "<b>"], "tags": ["O", "B-ANIMAL", "O"]},
        ["0", "A <b>cat</b> [B-ANIMAL] &lt;b&gt;"]),
    "question_answering": (
        "question_answering", 2, {"f1": 50.0, "exact_match": 25.0},
        {"id": "q", "prediction": "", "start": 0, "stop": 0, "score": -1.5, "no_answer": 2.0,
         "best": []}, ["q", "(no answer)", "-1.500"]),
    "seq2seq": (None, 0, {"rouge": 31.25, "rouge1": 35.0},
                {"id": 0, "prediction": "a cat", "target": "the cat"}, ["0", "a cat", "the cat"]),
}


@pytest.mark.parametrize(("family", "task_type"), [
    *((family, task_type) for family in ("gpt", "bert") for task_type in TASKS
      if (family, task_type) != ("bert", "seq2seq")),
    ("bart", "classification"), ("bart", "seq2seq"),
    *(pytest.param("bart", task_type, marks=pytest.mark.slow) for task_type in TASKS
      if task_type not in ("classification", "seq2seq"))])
def test_finetuned_run_of_each_family_and_task_type(tmp_path, family, task_type):
    task, num_classes, scores, line, row = TASKS[task_type]
    config, train, size, attention = PRETRAINED[family]
    save_model(tmp_path, config, train(TEXTS, size), num_classes, task,
               ("no", "yes") if task_type == "classification" else ())
    metrics = {**scores, "labels": 30, "steps": 8, "trained": 288, "share_trained": 0.0286,
               "held_out_objective": "causal_lm", "held_out_before": 5.2, "held_out_after": 5.3}
    write_results(tmp_path, {
        "pretrained": "runs/base", "trainable": "lora:2", "dataset": {"data": "topics.tsv"},
        "training": {"batch_size": 8, "max_length": 32, "optimizer": {"peak_lr": 0.02}}}, metrics)
    (tmp_path / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    content = page.write_report(tmp_path).read_text()
    name = {"gpt": "GPT", "bert": "BERT", "bart": "BART"}[family]
    assert f"{name} fine-tuned with lora:2 on topics.tsv, from runs/base." in content
    assert "288 parameters, 2.86 % of all" in content
    assert "8 steps of 8 rows of at most 32 tokens" in content
    assert "5.200 before fine-tuning" in content
    main_score = next(iter(scores.values()))
    assert f"<b>{markup.format_score(main_score)}</b>" in content
    cells = re.findall(r"<td[^>]*>(.*?)</td>", content.partition("<h2>Predictions</h2>")[2])
    assert cells[: len(row)] == row
    found = [caption for caption in captions(content) if "layer" in caption]
    assert found == [f"{name}, layer {i}" for name in attention for i in (0, 1)]
    assert ("<h2>Sample</h2>" in content) == (task_type == "seq2seq")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), {
    "gpt_run": ["GPT pre-trained by next-token prediction on corpus.txt.",
                "4 steps of 16 rows of at most 16 tokens", "peak learning rate 0.01",
                "held-out perplexity"],
    "bert_run": ["2 steps of 8 rows of at most 24 tokens", "NSP loss (nats)", "[MASK]"],
    "bart_run": ["BART pre-trained by denoising on corpus.txt.", "cross-attention, layer 0"],
    "finetuned_lora": ["GPT fine-tuned with lora:2 on topics.tsv, from gpt_run.",
                       "288 parameters, 2.86 % of all", "2: garden, kitchen"],
    "finetuned_head": ["BERT fine-tuned with head on topics.tsv, from bert_run.",
                       "peak learning rate 0.02", "self-attention, layer 1"],
    "translate_run": ["Transformer trained on pairs of texts, de to en, from pairs.",
                      "Der Mann sucht einen Vogel", "BLEU"],
    "sweep_run": ["2 trainable specs compared on topics.tsv, from bert_run: bitfit, scratch.",
                  "fraction trained"],
}.items())
def test_runs_of_older_versions(tmp_path, name, expected):
    shutil.copytree(OLD_RUNS / name, tmp_path / name)
    content = page.write_report(tmp_path / name).read_text()
    assert [text for text in expected if text not in content] == []


def test_model_that_cannot_be_loaded_is_a_note(tmp_path):
    shutil.copytree(OLD_RUNS / "gpt_run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    content = page.write_report(tmp_path / "run").read_text()
    assert "The model is not shown, because it cannot be loaded:" in content
    assert "held-out perplexity" in content


def test_table_of_records_joins_mean_and_deviation():
    table = page.records_table([
        {"trainable": "full", "accuracy": 0.5, "accuracy_std": 0.01, "scores": [0.5]},
        {"trainable": "head", "accuracy": 0.25, "accuracy_std": None, "scores": [0.25]}])
    assert "<td>0.500 ± 0.010</td>" in table and "<td class=n>0.250</td>" in table
    assert "std" not in table and "scores" not in table


def test_report_command(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "has no results.json and no events; give the --out" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    assert "results.json is damaged: it has no 'metrics'; run the" in capsys.readouterr().err
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "p.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "p.html")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [500, 1000])
def test_browser_draws_the_curves_within_the_page(tmp_path, width):
    """The screenshot has the colors of the curves, and no element is wider than the window."""
    from matplotlib.image import imread

    def colored_pixels(history):
        metrics = RESULTS["metrics"] | {"history": history, "cells": [
            {f"a long name of a column {i}": 0.5 for i in range(20)}]}
        write_results(tmp_path, RESULTS["config"], metrics)
        path, image = page.write_report(tmp_path), tmp_path / "screen.png"
        path.write_text(path.read_text().replace("</body>", (
            "<script>if (document.documentElement.scrollWidth > innerWidth)"
            " document.body.innerHTML = ''</script></body>")))
        image.unlink(missing_ok=True)
        subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
                        f"--window-size={width},2600", f"--screenshot={image}", path.as_uri()],
                       check=True, capture_output=True, timeout=120)
        pixels = imread(image)[..., :3]
        return int((np.ptp(pixels, axis=-1) > 0.3).sum())

    without = colored_pixels([])
    assert without > 0  # the page is not empty
    assert without + 800 < colored_pixels(HISTORY)
