"""Configs with models that are small enough for a test, and labeled examples."""

import dataclasses

from transformer_jax.recipes.config import MeshConfig
from transformer_jax.recipes.pretraining import PretrainConfig

TINY = {"num_layers": 1, "d_model": 16, "num_heads": 2, "mlp_dim": 16, "max_length": 64}

ROWS = {  # two labeled rows of each task type
    "classification": ({"text": "one two", "text_b": "two three", "label": "yes"},
                       {"text": "four", "text_b": "five six", "label": "no"}),
    "regression": ({"text": "one two", "text_b": "two three", "label": 1.5},
                   {"text": "four", "text_b": "five six", "label": 4.25}),
    "multiple_choice": ({"text": "one two", "choices": ["two", "three four"], "label": 1},
                        {"text": "four", "choices": ["five", "six"], "label": 0}),
    "token_classification": ({"words": ["one", "two"], "tags": ["B-X", "O"]},
                             {"words": ["three", "four", "five"], "tags": ["O", "B-X", "I-X"]}),
    "question_answering": (
        {"id": "a", "question": "one", "context": "one two three", "answer": "two", "start": 4},
        {"id": "b", "question": "four", "context": "four five six", "answer": "six", "start": 10}),
    "seq2seq": ({"source": "one two", "target": "two"}, {"source": "four five", "target": "five"}),
}


def shrink(config: PretrainConfig, out, **changes) -> PretrainConfig:
    """Returns the config with two steps of a model that is small enough for a test."""
    changes = {"num_steps": 2, "eval_batches": 1, "max_length": 24, "batch_size": 8,
               "log_every": 1, "mesh": MeshConfig(data=-1), **changes}
    model = config.model.replace(**TINY, vocab_size=min(config.model.vocab_size, 600))
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=1)
    return dataclasses.replace(config, out=out, model=model, optimizer=optimizer, **changes)
