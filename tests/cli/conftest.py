"""Folders of tiny runs, and a function that runs a command."""

import pytest
from small_models import BART, BERT, GPT2, build

from transformer_jax.cli.main import main
from transformer_jax.data import tokenizers
from transformer_jax.pretrained import save_run_config
from transformer_jax.train import checkpointing, optimizers, step

TEXTS = ["the cat sat on the mat", "a dog ran in the park", "Übung macht den Meister"] * 3


def save_run(folder, config, tokenizer, num_classes=0, labels=()):
    """Saves a run with random parameters."""
    config = config.replace(vocab_size=tokenizer.vocab_size)
    params = build(config, num_classes)[1]
    if num_classes:
        params = {k: v for k, v in params.items() if k not in ("mlm_head", "nsp_head")}
    save_run_config(folder, config, tokenizer, labels)
    state = step.init_state(params, optimizers.make_optimizer(0.1))
    checkpointing.save(folder / "checkpoints", 1, state)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with the runs gpt, bert, bart, and the classifier topics."""
    folder = tmp_path_factory.mktemp("runs")
    bpe, wordpiece = tokenizers.train_bpe(TEXTS, 280), tokenizers.train_wordpiece(TEXTS, 140)
    joint = tokenizers.train_bpe(TEXTS, 290, tokenizers.SEQ2SEQ_SPECIAL_TOKENS)
    save_run(folder / "gpt", GPT2, bpe)
    save_run(folder / "bert", BERT, wordpiece)
    save_run(folder / "topics", BERT, wordpiece, 3, ("zoo", "park", "house"))
    save_run(folder / "bart", BART.replace(eos_token_id=2, pad_token_id=1), joint)
    return folder


@pytest.fixture
def run(capsys):
    """Runs a command; returns its exit status, standard output and standard error."""

    def run_with(*arguments):
        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_with
