"""A run as one content: its numbers, curves, pictures, samples; and that a browser draws it."""

import functools
import json
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
from small_models import BART, BERT, GPT2
from tensorboardX import SummaryWriter

from transformer_jax.cli.main import main
from transformer_jax.data import tokenizers
from transformer_jax.models import build_model, init_params
from transformer_jax.pretrained.runs import save_run_config
from transformer_jax.report import page, plots
from transformer_jax.train import checkpointing, optimizers, step

HISTORY = [{"step": n, "loss": 4.0 / n, "grad_norm": 1.0, "tokens_per_second": 100.0}
           for n in range(1, 9)] + [{"step": 8, "eval_loss": 0.9}]
RESULTS = {"config": {"model": {"d_model": 16}, "out": "runs/<x>", "peak_lrs": [1, 2]},
           "versions": {"jax": "0.10.2"}, "device": "1 x cpu", "seconds": 12.0, "finished": "now",
           "metrics": {"held_out": {"loss": 0.9}, "history": HISTORY, "text": "a < b"}}


def pictures(content):
    return re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,[\w+/=]{200,}"', content)


def test_results_curves_and_pictures(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    plots.curves(tmp_path / "loss.png", {"loss": ([1, 2], [3, 4])}, title="t")
    path = page.write_report(tmp_path)
    content = path.read_text()
    assert path == tmp_path / "report.html"
    assert pictures(content) == ["loss (nats)", "gradient norm", "tokens a second", "loss"]
    assert "<td>held_out.loss</td><td class=n>0.9</td>" in content
    assert "a &lt; b" in content and "runs/&lt;x&gt;" in content and "<td>1, 2</td>" in content
    assert "jax 0.10.2" in content
    assert not re.findall(r'(src|href)="(?!data:)', content)  # it needs nothing else


def test_a_run_that_has_not_ended(tmp_path):
    with SummaryWriter(str(tmp_path / "events")) as writer:
        for n in range(1, 6):
            writer.add_scalar("train/loss", 5.0 - n, n)
        writer.add_scalar("eval/loss", 2.5, 5)
    (file,) = (tmp_path / "events").iterdir()
    rows = list(page.read_events(tmp_path / "events"))
    assert rows[-1] == {"step": 5, "loss": 0.0, "eval_loss": 2.5} and len(rows) == 5
    file.write_bytes(file.read_bytes()[:-7])  # cut off in the middle of a record
    assert "eval_loss" not in list(page.read_events(tmp_path / "events"))[-1]
    content = page.write_report(tmp_path, tmp_path / "out" / "page.html").read_text()
    assert "Not ended: step 5." in content and pictures(content) == ["loss (nats)"]


TOKENIZERS = {"gpt": (tokenizers.train_bpe, 270, GPT2),
              "bert": (tokenizers.train_wordpiece, 120, BERT),
              "bart": (tokenizers.train_unigram, 80, BART)}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_the_model_makes_of_a_text(tmp_path, name):
    train, size, config = TOKENIZERS[name]
    tokenizer = train(["the cat saw a dog", "a dog saw the cat"], size)
    config = config.replace(vocab_size=tokenizer.vocab_size)
    model = build_model(config)
    state = step.init_state(init_params(model, jax.random.key(0)), optimizers.make_optimizer(1e-3))
    save_run_config(tmp_path, config, tokenizer)
    checkpointing.save(tmp_path / "checkpoints", 1, state)
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    content = page.write_report(tmp_path, text="the cat saw").read_text()
    found = [alt for alt in pictures(content) if alt.startswith("attention")]
    assert found == (["attention: encoder", "attention: decoder", "attention: cross-attention"]
                     if name == "bart" else ["attention: self-attention"])
    assert "<pre>" in content and "Given: the cat saw" in content


def test_the_command(tmp_path, capsys):
    assert main.main(["report", str(tmp_path)]) == 2
    assert "has no results.json and no events; give the --out" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("{}")
    assert main.main(["report", str(tmp_path)]) == 2
    assert "results.json is damaged ('metrics'); run the" in capsys.readouterr().err
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    assert main.main(["report", str(tmp_path), "--out", str(tmp_path / "p.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "p.html")


CHROMIUM = functools.reduce(lambda found, name: found or shutil.which(name),
                            ("chromium", "chromium-browser", "google-chrome"), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_draws_it(tmp_path):
    """With and without pictures, the content's screenshot has the ink of the curves or has not."""
    from matplotlib.image import imread

    def coloured(history):
        results = RESULTS | {"metrics": RESULTS["metrics"] | {"history": history}}
        (tmp_path / "results.json").write_text(json.dumps(results))
        content, shot = page.write_report(tmp_path), tmp_path / "shot.png"
        shot.unlink(missing_ok=True)
        subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
                        "--window-size=1100,2600", f"--screenshot={shot}", content.as_uri()],
                       check=True, capture_output=True, timeout=120)
        pixels = imread(shot)[..., :3]
        return int((np.ptp(pixels, axis=-1) > 0.3).sum())

    assert coloured([]) < 100 < 1000 < coloured(HISTORY)
