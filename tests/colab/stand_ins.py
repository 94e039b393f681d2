"""Small stand-ins for what notebooks download: checkpoints and datasets."""

import json
from pathlib import Path

import jax

from transformer_jax import save_pretrained
from transformer_jax.data import tokenizers
from transformer_jax.models import TransformerConfig, build_model, init_params, presets

WORDS = ("a", "fine", "film", "with", "good", "story", "and", "bad", "music", "nobody", "watches")
SHAPE = {"num_layers": 1, "d_model": 16, "num_heads": 2, "mlp_dim": 64, "max_length": 64}


def make_sentence(i: int, count: int = 8) -> str:
    return " ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, count + 1)) + "."


TEXTS = [make_sentence(i) for i in range(40)]


def _save(folder: Path, config, tokenizer, task: str | None = None) -> str:
    model = build_model(config, task=task)
    save_pretrained(folder, model, init_params(model, jax.random.key(0)), tokenizer)
    return str(folder)


def bert(folder: Path) -> str:
    tokenizer = tokenizers.train_wordpiece(TEXTS, vocab_size=200)
    return _save(folder, presets.bert_tiny(**SHAPE, vocab_size=tokenizer.vocab_size), tokenizer)


def gpt2(folder: Path) -> str:
    tokenizer = tokenizers.train_bpe(TEXTS, vocab_size=300)
    return _save(folder, presets.gpt2(**SHAPE, vocab_size=tokenizer.vocab_size), tokenizer)


def marian_config(tokenizer, **shape) -> TransformerConfig:
    """Returns a config with the architecture of Marian's checkpoints."""
    eos_id = tokenizer.sep_id
    return TransformerConfig(
        **shape, vocab_size=tokenizer.vocab_size, positions="sinusoidal_halves",
        scale_embedding=True, output_bias=True, initializer="normal", activation="swish",
        pad_token_id=tokenizer.pad_id, eos_token_id=eos_id, decoder_start_token_id=tokenizer.pad_id,
        forced_eos_token_id=eos_id)


def marian(folder: Path) -> str:
    tokenizer = tokenizers.train_unigram(TEXTS, vocab_size=100)
    return _save(folder, marian_config(tokenizer, **SHAPE), tokenizer)


def reviews(folder: Path) -> str:
    folder.mkdir()
    rows = ["sentence\tlabel"] + [f"{text}\t{i % 2}" for i, text in enumerate(TEXTS)]
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return str(folder)


def questions(folder: Path) -> str:
    folder.mkdir()
    rows = []
    for i, text in enumerate(TEXTS):
        answer = text.split()[i % 5]
        rows.append({"id": str(i), "question": "Which word is it?", "context": text,
                     "answers": [{"text": answer, "start": text.index(answer)}]})
    for split in ("train", "dev"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(folder)


def captions(folder: Path) -> str:
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.de").write_text("\n".join(TEXTS) + "\n")
        (folder / f"{split}.en").write_text("\n".join(t[::-1] for t in TEXTS) + "\n")
    return str(folder)


STAND_INS = {
    "sentiment": {"MODEL": bert, "DATA": reviews},
    "question_answering": {"MODEL": bert, "DATA": questions},
    "translation": {"MODEL": marian, "DATA": captions},
    "gpt2_lora": {"MODEL": gpt2},
    "planner": {"TOPOLOGY": lambda folder: "local"},
}
"""Name of a notebook -> environment variable -> function that creates its value in a folder."""
