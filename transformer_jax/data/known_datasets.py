"""Known labeled datasets: the task type, columns, labels and metric of datasets, by their names."""

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

Columns = Mapping[str, str | tuple[str, ...]]
"""Field of an example -> column of the data. A dot selects an item of a dict. Several columns in a
tuple are joined by spaces for "text" and "text_b", and are the choices for "choices"."""


class HubSource(NamedTuple):
    """Arguments of `datasets.load_dataset` for a dataset on the Hugging Face Hub."""

    path: str = ""
    config: str | None = None
    options: Mapping[str, Any] = MappingProxyType({})


class KnownDataset(NamedTuple):
    """Description of a dataset.

    Attributes:
        task_type: a key of `METRICS`.
        columns: column of each field of an example.
        validation_split: name of the split to evaluate on, which must have labels.
        metric: main metric; if empty, the first metric of the task type in `METRICS`.
        label_names: names of the classes in order; if empty, the class names of the data.
        label_range: lowest and highest label of a regression.
        hub: location on the Hugging Face Hub.
    """

    task_type: str
    columns: Columns
    validation_split: str = "validation"
    metric: str = ""
    label_names: tuple[str, ...] = ()
    label_range: tuple[float, float] | None = None
    hub: HubSource = HubSource()


METRICS = {
    "classification": ("accuracy", "f1", "macro_f1", "matthews"),
    "regression": ("pearson_spearman",),
    "multiple_choice": ("accuracy", "macro_f1", "matthews"),
    "token_classification": ("f1", "accuracy"),
    "question_answering": ("squad",),
    "seq2seq": ("rouge", "bleu"),
}
"""Task type -> its metrics; the first one is the default."""

# GLUE, which TFDS and the Hugging Face Hub have in the same form --------------------------------

NLI = ("entailment", "neutral", "contradiction")
SENTIMENT = ("negative", "positive")
PARAPHRASE = ("different_meaning", "paraphrase")


def _classification(
    text: str | tuple[str, ...], text_b: str | None = None, **fields: Any
) -> KnownDataset:
    """Describes a classification whose label column is "label"; `fields` override any field."""
    columns = {"text": text, **({"text_b": text_b} if text_b else {}),
               **fields.pop("columns", {"label": "label"})}
    return KnownDataset(**{"task_type": "classification", "columns": columns, **fields})


def _glue(text: str, text_b: str | None = None, **fields: Any) -> KnownDataset:
    return _classification(text, text_b, columns={"label": "label", "id": "idx"}, **fields)


def _question_answering() -> KnownDataset:
    return KnownDataset("question_answering", {
        "id": "id", "question": "question", "context": "context", "answers": "answers"})


def _seq2seq(source: str, target: str, **fields: Any) -> KnownDataset:
    columns = {"source": source, "target": target, **fields.pop("columns", {})}
    return KnownDataset("seq2seq", columns, **fields)


def _multiple_choice(
    text: str | tuple[str, ...], choices: str | tuple[str, ...], label: str = "label",
    **columns: str,
) -> KnownDataset:
    return KnownDataset("multiple_choice",
                        {"text": text, "choices": choices, "label": label, **columns})


GLUE = {
    "cola": _glue("sentence", metric="matthews", label_names=("unacceptable", "acceptable")),
    "sst2": _glue("sentence", label_names=SENTIMENT),
    "mrpc": _glue("sentence1", "sentence2", metric="f1",
                  label_names=("not_equivalent", "equivalent")),
    "qqp": _glue("question1", "question2", metric="f1",
                 label_names=("not_duplicate", "duplicate")),
    "stsb": _glue("sentence1", "sentence2", task_type="regression", label_range=(0.0, 5.0)),
    "mnli": _glue("premise", "hypothesis", validation_split="validation_matched", label_names=NLI),
    "qnli": _glue("question", "sentence", label_names=("entailment", "not_entailment")),
    "rte": _glue("sentence1", "sentence2", label_names=("entailment", "not_entailment")),
    "wnli": _glue("sentence1", "sentence2", label_names=("not_entailment", "entailment")),
}
ANSWERS = tuple(f"answer{i}" for i in range(4))

# TFDS --------------------------------------------------------------------------------------------

TFDS = {
    **{f"glue/{name}": known for name, known in GLUE.items()},
    "snli": _classification("premise", "hypothesis", label_names=NLI),
    "multi_nli": _classification("premise", "hypothesis", validation_split="validation_matched",
                        label_names=NLI),
    "imdb_reviews": _classification("text", validation_split="test", label_names=SENTIMENT),
    "yelp_polarity_reviews": _classification("text", validation_split="test",
                                             label_names=SENTIMENT),
    "ag_news_subset": _classification(("title", "description"), validation_split="test",
                                      label_names=("World", "Sports", "Business", "Sci/Tech")),
    "paws_wiki": _classification("sentence1", "sentence2", label_names=PARAPHRASE),
    "squad": _question_answering(),
    "squad/v2.0": _question_answering(),
    "hellaswag": _multiple_choice("context", "endings"),
    "cosmos_qa": _multiple_choice(("context", "question"), ANSWERS, id="id"),
    "piqa": _multiple_choice("goal", ("sol1", "sol2"), id="id"),
    "openbookqa": _multiple_choice("question.stem", tuple(f"question.choice_{x}" for x in "ABCD"),
                           "answerKey"),
    "conll2003": KnownDataset("token_classification", {"words": "tokens", "tags": "ner"}),
    "cnn_dailymail": _seq2seq("article", "highlights", columns={"id": "id"}),
    "xsum": _seq2seq("document", "summary"),
    "samsum": _seq2seq("dialogue", "summary", columns={"id": "id"}),
}

# Hugging Face ------------------------------------------------------------------------------------


def _hub(path: str, config: str | None, known: KnownDataset, **options: Any) -> KnownDataset:
    return known._replace(hub=HubSource(path, config, options))


HF = {
    **{f"glue/{name}": _hub("nyu-mll/glue", name, known) for name, known in GLUE.items()},
    "snli": _hub("stanfordnlp/snli", None, TFDS["snli"]),
    "multi_nli": _hub("nyu-mll/multi_nli", None, TFDS["multi_nli"]),
    "imdb": _hub("stanfordnlp/imdb", None, TFDS["imdb_reviews"]),
    "yelp_polarity": _hub("fancyzhx/yelp_polarity", None, TFDS["yelp_polarity_reviews"]),
    "ag_news": _hub("fancyzhx/ag_news", None,
                    TFDS["ag_news_subset"]._replace(columns={"text": "text", "label": "label"})),
    "paws": _hub("google-research-datasets/paws", "labeled_final", _classification(
        "sentence1", "sentence2", columns={"label": "label", "id": "id"}, label_names=PARAPHRASE)),
    "boolq": _hub("google/boolq", None, _classification(
        "question", "passage", columns={"label": "answer"}, label_names=("false", "true"))),
    "squad": _hub("rajpurkar/squad", None, _question_answering()),
    "squad_v2": _hub("rajpurkar/squad_v2", None, _question_answering()),
    "hellaswag": _hub("Rowan/hellaswag", None, _multiple_choice("ctx", "endings")),
    "swag": _hub("allenai/swag", "regular", _multiple_choice(
        "startphrase", tuple(f"ending{i}" for i in range(4)))),
    "commonsense_qa": _hub("tau/commonsense_qa", None, _multiple_choice(
        "question", "choices.text", "answerKey", id="id")),
    "race/high": _hub("ehovy/race", "high", _multiple_choice(
        ("article", "question"), "options", "answer")),
    "race/middle": _hub("ehovy/race", "middle", _multiple_choice(
        ("article", "question"), "options", "answer")),
    # The main revision has a loading script, which `datasets` no longer runs; the Hub keeps a copy
    # converted to Parquet.
    "conll2003": _hub("eriktks/conll2003", None, KnownDataset(
        "token_classification", {"words": "tokens", "tags": "ner_tags", "id": "id"}),
        revision="refs/convert/parquet"),
    "wikiann/en": _hub("unimelb-nlp/wikiann", "en", KnownDataset(
        "token_classification", {"words": "tokens", "tags": "ner_tags"})),
    "cnn_dailymail": _hub("abisee/cnn_dailymail", "3.0.0", TFDS["cnn_dailymail"]),
    "xsum": _hub("EdinburghNLP/xsum", None, _seq2seq("document", "summary", columns={"id": "id"})),
    "samsum": _hub("knkarthick/samsum", None, TFDS["samsum"]),
    "dialogsum": _hub("knkarthick/dialogsum", None, TFDS["samsum"]),
}

# By name -----------------------------------------------------------------------------------------

KNOWN = {
    **{f"tfds:{name}": known for name, known in TFDS.items()},
    **{f"hf:{name}": known for name, known in HF.items()},
    "python_docs/topics": _classification("text"),
    "python_docs/summaries": _seq2seq("body", "summary"),
}
"""Name as `load_dataset` accepts it -> description."""


def find(spec: str) -> KnownDataset | None:
    """Returns the description of "tfds:NAME", "hf:NAME" or "python_docs/CONFIG", or None.

    A TFDS config without its own description has the description of its dataset. A name on the Hub
    may include its owner. For translation datasets, such as "tfds:wmt14_translate/de-en", the first
    language is the source and the second the target.

    Example:
        >>> find("hf:snli").task_type, find("hf:snli").label_names
        ('classification', ('entailment', 'neutral', 'contradiction'))
    """
    prefix, _, name = spec.partition(":")
    if prefix == "tfds":
        name = name.partition(":")[0]  # without the version
        if pair := re.fullmatch(r"wmt\w+_translate/(\w\w)-(\w\w)|ted_hrlr_translate/"
                                r"(\w+)_to_(\w+)", name):
            return _seq2seq(*filter(None, pair.groups()), metric="bleu")
        return TFDS.get(name) or TFDS.get(name.partition("/")[0])
    if prefix == "hf":
        if pair := re.fullmatch(r"(?:wmt/)?(wmt\d\d)/(\w\w)-(\w\w)", name):
            year, source, target = pair.groups()
            return _hub(f"wmt/{year}", f"{source}-{target}", _seq2seq(
                f"translation.{source}", f"translation.{target}", metric="bleu"))
        for short_name, known in HF.items():
            config = short_name.partition("/")[2]
            if name in (short_name, f"{known.hub.path}/{config}" if config else known.hub.path):
                return known
        return None
    return KNOWN.get(spec)


def get(spec: str) -> KnownDataset:
    """Returns the description of a dataset as `find` does.

    Raises:
        ValueError: the dataset is unknown; the message lists similar names.
    """
    known = find(spec)
    if known is None:
        near = difflib.get_close_matches(spec, KNOWN, n=3, cutoff=0.5) or sorted(KNOWN)
        raise ValueError(f"unknown labeled dataset {spec!r}; choose from {', '.join(near)}")
    return known
