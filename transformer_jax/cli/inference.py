"""Commands that apply models: `evaluate`, `predict`, `classify`, and those that generate text."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from transformer_jax.cli.command import (
    ModelArgument,
    TextArguments,
    check_family,
    given,
    optional,
    read_texts,
)

if TYPE_CHECKING:
    import numpy as np

    from transformer_jax.models import Model

BATCH_SIZE = 16  # of texts that are translated or summarized


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
        texts: texts, with a tab between the two of a pair; by default, lines of standard input.
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
    first, tab, second = text.partition("\t")
    return (first, second) if tab else text


def _setup() -> None:
    """Sets up the process, with messages printed to standard error."""
    from transformer_jax.recipes.run_dir import setup

    with contextlib.redirect_stdout(sys.stderr):
        setup()


# Generation ---------------------------------------------------------------------------------------


def generate(
    model: ModelArgument,
    texts: TextArguments = (),
    /,
    max_new_tokens: int = 60,
    temperature: Annotated[float | None, optional("FLOAT")] = None,
    top_k: Annotated[int | None, optional("INT")] = None,
    top_p: Annotated[float | None, optional("FLOAT")] = None,
    num_beams: int = 1,
    no_repeat_ngram_size: int = 0,
    weights: Literal["float32", "bfloat16", "int8"] = "float32",
    seed: int = 0,
) -> None:
    """Continues texts with GPT and prints them token by token.

        transformer-jax generate gpt2 "Once upon a time" --temperature 0.8 --top-p 0.95

    Args:
        model: folder of a run or a checkpoint, or an id on the Hugging Face Hub.
        texts: prompts; by default, the lines of standard input.
        max_new_tokens: maximum number of generated tokens; an end-of-text token, or the model's
            last position, ends a text earlier.
        temperature: sample with logits divided by this value; without temperature, top_k or top_p,
            decoding is greedy.
        top_k: sample from the k most probable tokens.
        top_p: sample from the most probable tokens with total probability p.
        num_beams: number of beams; with more than 1, a text is printed when it is complete.
        no_repeat_ngram_size: size of the n-grams that are not generated twice; 0 for no limit.
        weights: dtype of the parameters in memory; int8 is faster on a CPU, but less exact.
        seed: random seed of sampling.
    """
    import jax

    from transformer_jax.finetuning import frozen
    from transformer_jax.generation import generate as generate_tokens
    from transformer_jax.pretrained import load_model

    found = load_model(model, "causal_lm")
    check_family(found.model, "GPT")
    tokenizer, max_length = found.tokenizer, found.model.config.max_length
    params, _ = frozen.quantize_frozen(
        found.params, jax.tree.map(lambda x: False, found.params), weights)
    options = given(temperature=temperature, top_k=top_k, top_p=top_p)
    if options:
        options |= {"do_sample": True, "rng": jax.random.key(seed)}
    eos = found.model.config.eos_token_id
    eos = tokenizer.eos_id if eos is None else eos
    eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    for prompt in read_texts(texts):
        ids = tokenizer.encode(prompt)
        print(prompt, end="", flush=True)
        printer = TextPrinter(tokenizer.decode, set(eos_ids))
        [row] = generate_tokens(
            found.model, params, [ids],
            max_new_tokens=min(max_new_tokens, max(max_length - len(ids), 1)),
            eos_token_id=eos_ids, num_beams=num_beams,
            streamer=None if num_beams > 1 else printer,
            no_repeat_ngram_size=no_repeat_ngram_size, **options)
        if num_beams > 1:
            printer.ids = [int(i) for i in row[len(ids) :]]
        printer.finish()


class TextPrinter:
    """Prints a text while it is generated; a `streamer` of `generation.generate` for one row."""

    def __init__(self, decode: Callable[[list[int]], str], eos_ids: set[int]):
        self.decode, self.eos_ids = decode, eos_ids
        self.ids: list[int] = []
        self.printed = ""

    def __call__(self, tokens: "np.ndarray") -> None:
        """Prints the next token; `tokens` is `[1]`."""
        if int(tokens[0]) in self.eos_ids:
            return
        self.ids.append(int(tokens[0]))
        text = self.decode(self.ids)
        # A multi-byte character is printed when all of its tokens have been generated.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._print(text)

    def _print(self, text: str, end: str = "") -> None:
        print(text[len(self.printed) :], end=end, flush=True)
        self.printed = text

    def finish(self) -> None:
        """Prints the rest of the text and a line break."""
        self._print(self.decode(self.ids), end="\n")


def fill(model: ModelArgument, texts: TextArguments = (), /, top_k: int = 5) -> None:
    """Fills masks with BERT: prints the most probable words and their probabilities.

        transformer-jax fill runs/bert "I ate an [MASK] today."

    Args:
        model: folder of a run or a checkpoint, or an id on the Hugging Face Hub.
        texts: texts with the model's mask token, such as [MASK] or <mask>; by default, the lines
            of standard input.
        top_k: number of words for each mask.
    """
    from transformer_jax.generation import fill_mask
    from transformer_jax.objectives.input_format import pack_bert_input
    from transformer_jax.pretrained import load_model

    found = load_model(model, "masked_lm")
    check_family(found.model, "BERT")
    tokenizer = found.tokenizer
    if tokenizer.mask_id is None:
        raise ValueError(f"the vocabulary of {model} has no mask token; use a model that was "
                         "pre-trained by masked language modeling")
    for text in read_texts(texts):
        ids = tokenizer.encode(text)
        row = pack_bert_input(
            ids, length=len(ids) + 2, cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id)
        print(text)
        for mask in fill_mask(found.model, found.params, row["tokens"],
                              mask_id=tokenizer.mask_id, top_k=top_k):
            words = [tokenizer.decode([int(i)]).strip() for i in mask.token_ids]
            print("  " + ", ".join(f"{w} {p:.3f}" for w, p in zip(words, mask.probabilities)))


@dataclasses.dataclass(frozen=True)
class TargetFlags:
    """Flags of the generation of a target text.

    Attributes:
        num_beams: number of beams; 1 for greedy decoding.
        length_penalty: exponent of the length that divides scores; larger favors longer texts.
        max_new_tokens: maximum number of generated tokens.
        min_new_tokens: minimum number of generated tokens.
        no_repeat_ngram_size: size of the n-grams that are not generated twice; 0 for no limit.
    """

    num_beams: Annotated[int | None, optional("INT")] = None
    length_penalty: Annotated[float | None, optional("FLOAT")] = None
    max_new_tokens: Annotated[int | None, optional("INT")] = None
    min_new_tokens: Annotated[int | None, optional("INT")] = None
    no_repeat_ngram_size: Annotated[int | None, optional("INT")] = None


def translate(
    model: ModelArgument,
    texts: TextArguments = (),
    /,
    generation: Annotated[TargetFlags, tyro.conf.arg(name="")] = TargetFlags(),
) -> None:
    """Translates texts with an encoder-decoder and prints one translation per line.

        transformer-jax translate runs/multi30k_de_en "Zwei Hunde spielen im Schnee."

    The defaults of the options are those of the checkpoint; if it has none: 5 beams, a length
    penalty of 0.6 and at most 128 tokens.

    Args:
        model: folder of a run or a checkpoint, or an id on the Hugging Face Hub.
        texts: source texts; by default, the lines of standard input.
        generation: flags of the generation.
    """
    _print_targets(model, read_texts(texts), vars(generation),
                   {"num_beams": 5, "length_penalty": 0.6, "max_length": 129})


def summarize(
    model: ModelArgument,
    texts: TextArguments = (),
    /,
    generation: Annotated[TargetFlags, tyro.conf.arg(name="")] = TargetFlags(),
) -> None:
    """Summarizes texts with an encoder-decoder.

        transformer-jax summarize facebook/bart-large-cnn < article.txt

    The defaults of the options are those of the checkpoint; if it has none: 4 beams, a length
    penalty of 2, at most 142 tokens, and no repeated trigrams.

    Args:
        model: folder of a run or a checkpoint, or an id on the Hugging Face Hub.
        texts: texts to summarize; by default, all of standard input as one text.
        generation: flags of the generation.
    """
    _print_targets(model, read_texts(texts, single=True), vars(generation),
                   {"num_beams": 4, "length_penalty": 2.0, "max_length": 143,
                    "no_repeat_ngram_size": 3})


def _print_targets(
    model_name: str, texts: Sequence[str], options: dict[str, Any], defaults: dict[str, Any]
) -> None:
    """Prints the target of each text; sources longer than max_length are truncated, with a message
    on standard error."""
    from transformer_jax.generation import generate_texts
    from transformer_jax.pretrained import load_model

    model, params, tokenizer, _ = load_model(model_name, "seq2seq_lm")
    check_family(model, "Transformer")
    max_length = model.config.max_length
    options = target_options(model, options, defaults)
    for start in range(0, len(texts), BATCH_SIZE):
        rows = tokenizer.encode_batch(texts[start : start + BATCH_SIZE], add_special_tokens=True)
        for i, row in enumerate(rows):
            if len(row) > max_length:
                print(f"text {start + i + 1} has {len(row)} tokens and is truncated to the "
                      f"model's {max_length} positions", file=sys.stderr)
                rows[i] = [*row[: max_length - 1], row[-1]]
        for text in generate_texts(
                model, params, tokenizer, rows, batch_size=len(rows), **options):
            print(text, flush=True)


def target_options(
    model: "Model", options: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, Any]:
    """Returns the options of `generation.generate` for one target text per source.

    `options` replace those of the checkpoint unless they are None; `defaults` are used last.
    """
    from transformer_jax.generation.options import drop_unused_options, generation_options

    single_text = {"do_sample": False, "num_return_sequences": 1}
    options = drop_unused_options(
        defaults | generation_options(model) | given(**options) | single_text)
    limits = {"max_new_tokens": model.config.max_length - 1, "max_length": model.config.max_length}
    return {name: min(x, limits[name]) if name in limits else x for name, x in options.items()}
