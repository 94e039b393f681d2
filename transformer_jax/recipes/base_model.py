"""Loading of the pre-trained model of a fine-tuning run, and addition of the task head."""

import functools
from pathlib import Path
from typing import Any

import jax

from transformer_jax import tree
from transformer_jax.data.datasets import LabeledDataset
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.models import Model, build_model, init_params
from transformer_jax.objectives import classification
from transformer_jax.pretrained import LoadedRun, load_model
from transformer_jax.recipes.task_encoder import TaskInfo

Source = str | Path | tuple[Model, dict, Tokenizer] | LoadedRun
"""A run's folder, a checkpoint (a folder in the Hugging Face format, an id on the Hugging Face Hub,
or "package:NAME/FOLDER"), or a loaded (model, params, tokenizer)."""


def load_base(
    source: Source, *, dropout_rate: float | None = None, pooling: str | None = None
) -> LoadedRun:
    """Loads a model with its pre-trained heads, its parameters and its tokenizer.

    Args:
        source: a run's folder, a checkpoint or a loaded model.
        dropout_rate: overrides the model's dropout rate, also that of attention weights.
        pooling: overrides the input of BERT's classifier: "first" for the pooled first token, or
            "mean" for the mean over all tokens.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: the source has no tokenizer, or `pooling` is unknown.
    """
    changes: dict[str, Any] = {} if dropout_rate is None else {
        "dropout_rate": dropout_rate, "attention_dropout_rate": dropout_rate}
    changes |= {} if pooling is None else {"pooling": pooling}
    if not isinstance(source, tuple):
        return load_model(source, **changes)
    model, params, tokenizer = source[:3]
    model = model.clone(config=model.config.replace(**changes))
    return LoadedRun(model, params, tokenizer, [])


def add_task_head(base: LoadedRun, dataset: LabeledDataset) -> tuple[Model, dict]:
    """Returns the base model with a head for the task of a dataset, and the pre-trained parameters.

    A pre-trained classifier whose shape does not match is left out of the parameters, so that a new
    one is initialized.
    """
    task_type = dataset.task_type
    head = None if task_type == "seq2seq" else classification.TASK_TYPES[task_type].task
    model = build_model(base.model.config, TaskInfo.of(dataset).num_outputs, head)
    model = model.clone(hf_config=base.model.hf_config)
    shapes = tree.flatten_paths(_initial_shapes(model))
    params = {path: leaf for path, leaf in tree.flatten_paths(base.params).items()
              if not path.startswith("classifier/")
              or (path in shapes and shapes[path].shape == leaf.shape)}
    return model, tree.unflatten_paths(params)


def load_report(model: Model, pretrained: dict) -> tree.LoadReport:
    """Returns which parameters of `model` are pre-trained, which are new, and which are unused."""
    wanted, found = (set(tree.flatten_paths(x)) for x in (_initial_shapes(model), pretrained))
    return tree.LoadReport(sorted(wanted & found), sorted(wanted - found), sorted(found - wanted))


def include_new_modules(model: Model, pretrained: dict, trainable: str) -> str:
    """Returns the trainable spec, extended by the modules that are missing from the checkpoint.

    Such modules are randomly initialized and must not stay frozen: RoBERTa and DistilBERT
    checkpoints without a head, for example, have no pooler.
    """
    new = {path.partition("/")[0] for path in load_report(model, pretrained).new} - {"classifier"}
    return "+".join([trainable, *(f"regex:^{name}/" for name in sorted(new))])


def initial_params(model: Model, pretrained: dict) -> dict:
    """Returns the model's parameters without PEFT: pre-trained if available, otherwise initial.

    The initial values do not depend on the seed of the run, because `finetuning.adapter_io`
    identifies the base model of an adapter by the fingerprint of these parameters.
    """
    return tree.restore_partial(init_params(model, jax.random.key(0)), pretrained)[0]


def _initial_shapes(model: Model) -> dict:
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
