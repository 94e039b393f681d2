"""Commands that apply fine-tuned models: `evaluate`, `predict` and `classify`."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from transformer_jax.cli.command import (
    ModelArgument,
    TextArguments,
    given,
    optional,
    read_texts,
)


@dataclasses.dataclass(frozen=True)
class DataFlags:
    """Flags of labeled data.

    Attributes:
        validation: name of the split to evaluate on.
        columns: pairs of an example field (text, text_b, label, choices, words, tags, question,
            context, answers, source or target) and its column in the data.
        header: column names of files without a header line.
        label_names: pairs of a label value in the data and the name of its class.
        like: known data set with the same columns, such as hf:snli.
        metric: main metric: accuracy, f1, macro_f1 or matthews; for target texts, rouge or bleu.
        limit: maximum number of examples, sampled at random.
    """

    validation: Annotated[str | None, optional("STR")] = None
    columns: Annotated[dict[str, str] | None, optional("FIELD COLUMN ...")] = None
    header: Annotated[tuple[str, ...] | None, optional("NAME ...")] = None
    label_names: Annotated[dict[str, str] | None, optional("VALUE NAME ...")] = None
    like: Annotated[str | None, optional("STR")] = None
    metric: Annotated[str | None, optional("STR")] = None
    limit: Annotated[int | None, optional("INT")] = None


def evaluate(
    model: ModelArgument,
    /,
    data: Annotated[str | None, optional("STR")] = None,
    labeled: Annotated[DataFlags, tyro.conf.arg(name="")] = DataFlags(),
    max_length: Annotated[int | None, optional("INT")] = None,
    num_beams: Annotated[int | None, optional("INT")] = None,
    num_rows: Annotated[int | None, optional("INT")] = None,
    out: Annotated[Path | None, optional("PATH")] = None,
) -> None:
    """Evaluates a fine-tuned model on labeled data, or a pre-trained one on plain text.

        transformer-jax evaluate runs/topics --data test.tsv --columns text sentence label label

    Args:
        model: folder of a run or a checkpoint, or an id on the Hugging Face Hub.
        data: labeled data: python_docs/topics, tfds:NAME, hf:NAME, a .tsv, .csv or .jsonl file,
            or a folder. For a pre-trained model: a text file or folder, or python_docs/documents;
            without --data, a pre-training run is evaluated on its held-out rows.
        labeled: flags of labeled data.
        max_length: maximum number of tokens per row; by default, that of training.
        num_beams: number of beams with which target texts are generated.
        num_rows: number of rows on which a pre-trained model is evaluated; 256 by default.
        out: JSON file for all metrics.
    """
    from transformer_jax.recipes import evaluate as evaluate_model
    from transformer_jax.recipes.run_dir import to_json

    options = given(**vars(labeled), max_length=max_length, num_beams=num_beams, num_rows=num_rows)
    _setup()
    metrics = to_json(evaluate_model(model, data, **options))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(metrics, indent=2) + "\n")
    for name, value in metrics.items():
        if isinstance(value, int | float | str):
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")


def predict(
    model: ModelArgument,
    texts: TextArguments = (),
    /,
    data: Annotated[str | None, optional("FILE")] = None,
    columns: Annotated[dict[str, str] | None, optional("FIELD COLUMN ...")] = None,
    max_length: Annotated[int | None, optional("INT")] = None,
    num_beams: Annotated[int | None, optional("INT")] = None,
    out: Annotated[Path | None, optional("PATH")] = None,
) -> None:
    """Predicts labels, scores, tags, answers or target texts: one JSON object per input.

        transformer-jax predict runs/sst2 "A gripping film." "Two hours that I will not get back."

    Args:
        model: folder of a fine-tuned run or a checkpoint with a task head, or an id on the Hugging
            Face Hub.
        texts: input texts; a tab separates the two texts of a pair, or question and context. By
            default, the lines of standard input.
        data: .tsv, .csv, .jsonl or .txt file of inputs, instead of texts.
        columns: pairs of an input field (text, text_b, choices, words, question, context or source)
            and its column in the file.
        max_length: maximum number of tokens per row; by default, that of training.
        num_beams: number of beams with which target texts are generated.
        out: .jsonl file for the predictions; by default, they are printed.
    """
    from transformer_jax.recipes import predict as predict_inputs
    from transformer_jax.recipes.run_dir import to_json, write_predictions

    if data is not None and texts:
        raise ValueError("--data and texts are both given; give one of them")
    inputs = [_split_pair(text) for text in read_texts(texts)] if data is None else Path(data)
    options = given(columns=columns, max_length=max_length, num_beams=num_beams)
    _setup()
    predictions = to_json(predict_inputs(model, inputs, **options))
    if out is not None:
        write_predictions(out, predictions)
        print(f"{out}: {len(predictions)} predictions")
        return
    for prediction in predictions:
        print(json.dumps(prediction, ensure_ascii=False))


def classify(model: ModelArgument, texts: TextArguments = (), /, top_k: int = 5) -> None:
    """Classifies texts: prints the most probable classes and their probabilities.

        transformer-jax classify runs/topics "Parse an XML document."

    Args:
        model: folder of a fine-tuned run or a checkpoint with a classifier, or an id on the Hugging
            Face Hub.
        texts: texts to classify, with a tab between the two texts of a pair; by default, the lines
            of standard input.
        top_k: number of classes to print for each text.
    """
    from transformer_jax.recipes.prediction import load_task_model
    from transformer_jax.recipes.prediction import predict as predict_inputs

    found = load_task_model(model)
    if found.task is None or found.task.task_type != "classification":
        raise ValueError(f"{model} has no classifier; fine-tune it first (transformer-jax "
                         "finetune), or use transformer-jax predict for other tasks")
    lines = read_texts(texts)
    for line, prediction in zip(lines, predict_inputs(found, [_split_pair(x) for x in lines])):
        best = sorted(prediction["probabilities"].items(), key=lambda item: -item[1])[:top_k]
        print(f"{line}\n  " + ", ".join(f"{name} {p:.3f}" for name, p in best))


def _split_pair(text: str) -> str | tuple[str, str]:
    """Splits a text at its first tab, if any."""
    first, tab, second = text.partition("\t")
    return (first, second) if tab else text


def _setup() -> None:
    """Sets up the process, with messages printed to standard error."""
    from transformer_jax.recipes.run_dir import setup

    with contextlib.redirect_stdout(sys.stderr):
        setup()
