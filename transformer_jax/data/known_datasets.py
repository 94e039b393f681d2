"""`DatasetConfig`, the description of a labeled dataset, and the descriptions of known datasets."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformer_jax.errors import did_you_mean

Columns = Mapping[str, str | tuple[str, ...]]
"""Field of an example -> column of the data, or several columns."""

METRICS = {
    "classification": ("accuracy", "f1", "macro_f1", "matthews"),
    "regression": ("pearson_spearman",),
    "multiple_choice": ("accuracy", "macro_f1", "matthews"),
    "token_classification": ("f1", "accuracy"),
    "question_answering": ("squad",),
    "seq2seq": ("rouge", "bleu"),
}
"""Task type -> its metrics; the first one is the default."""


@dataclass(frozen=True)
class DatasetConfig:
    """Description of a labeled dataset, for `datasets.load_dataset`.

    Fields that are left at their defaults are taken from the description of the dataset if it is
    known (`KNOWN`), or else inferred from the data.

    Attributes:
        data: one of

            - "tfds:NAME"; "hf:NAME", also "hf:OWNER/NAME/CONFIG@REVISION"; "hf:FOLDER" for a folder
              of `save_to_disk`; or "python_docs/topics";
            - a .tsv, .csv, .jsonl, tab-separated .txt (or .gz of one) or .parquet file;
            - a folder with such a file that has the word train in its name, and such a file that
              has the word validation, valid, val, dev, trial or test in its name; for seq2seq, also
              a folder with line-aligned files such as train.de, train.en, dev.de and dev.en.
        validation: file of the validation split, or its name.
        task_type: "classification", "regression", "multiple_choice", "token_classification",
            "question_answering" or "seq2seq"; inferred from the columns if None. A dataset whose
            labels are numbers is a regression if one of them is not an integer.
        columns: field of the example -> column of the data, such as `{"text": "sentence"}`. A dot
            in the name of a column selects an item of a dict. Several columns are
            written as "a+b" or as a tuple: a text is then their texts joined by spaces, and
            "choices" has one choice per column.
        header: column names of .tsv and .csv files without a header line.
        validation_header: the same for the validation file, if its columns differ.
        label_names: label in the data -> name of its class, as `{"1": "neutral", ...}`, in the
            order of the classes; in Python also a sequence of the names. By default, the class
            names of the data if it has them, else the sorted labels of the training split. If the
            data has class names or `label_names` is given, rows with the label -1 or "-" count as
            unlabeled and are left out.
        validation_label_names: the same for the validation split, if its labels differ.
        like: name of a known dataset of which this is a copy, such as "hf:snli".
        metric: main metric: accuracy, f1, macro_f1 or matthews for classes; rouge or bleu for
            texts. The default for token classification is the F1 of entities if the tags are in a
            scheme such as BIO, else accuracy.
        label_range: lowest and highest label of a regression; those of the training split if None.
        allow_empty_classes: whether a class may have no training example.
        validation_folds: the training rows whose column "fold" has one of these values become the
            validation split.
        validation_fraction: fraction of the training rows, in (0, 1), that is drawn at random as
            the validation split.
        limit: maximum number of rows of each split; the rows are drawn at random.
        on_bad_rows: what to do with rows that have an empty text, an empty label, or an answer that
            is not at its position in the context: "error" raises an error, and "drop" leaves them
            out and counts them. The default is "drop" for known datasets and "error" for others.
            In multiple choice without `label_names`, rows with an empty label or the label -1
            count as unlabeled and are always left out.
    """

    data: str = "python_docs/topics"
    validation: str | None = None
    task_type: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    header: tuple[str, ...] = ()
    validation_header: tuple[str, ...] = ()
    label_names: dict[str, str] = field(default_factory=dict)
    validation_label_names: dict[str, str] = field(default_factory=dict)
    like: str | None = None
    metric: str | None = None
    label_range: tuple[float, float] | None = None
    allow_empty_classes: bool = False
    validation_folds: tuple[int, ...] = ()
    validation_fraction: float | None = None
    limit: int | None = None
    on_bad_rows: str | None = None


# GLUE, which TFDS and the Hugging Face Hub have in the same form --------------------------------

NLI = ("entailment", "neutral", "contradiction")
SENTIMENT = ("negative", "positive")
PARAPHRASE = ("different_meaning", "paraphrase")


def _classification(
    text: str | tuple[str, ...], text_b: str | None = None, **fields: Any
) -> DatasetConfig:
    """Describes a classification whose label column is "label"; `fields` override any field."""
    columns = {"text": text, **({"text_b": text_b} if text_b else {}),
               **fields.pop("columns", {"label": "label"})}
    return DatasetConfig(**{"task_type": "classification", "columns": columns, **fields})


def _glue(text: str, text_b: str | None = None, **fields: Any) -> DatasetConfig:
    return _classification(text, text_b, columns={"label": "label", "id": "idx"}, **fields)


def _question_answering() -> DatasetConfig:
    names = ("id", "question", "context", "answers")
    return DatasetConfig(task_type="question_answering", columns={name: name for name in names})


def _seq2seq(source: str, target: str, **fields: Any) -> DatasetConfig:
    columns = {"source": source, "target": target, **fields.pop("columns", {})}
    return DatasetConfig(task_type="seq2seq", columns=columns, **fields)


def _multiple_choice(
    text: str | tuple[str, ...], choices: str | tuple[str, ...], label: str = "label",
    **columns: str,
) -> DatasetConfig:
    return DatasetConfig(task_type="multiple_choice", columns={
        "text": text, "choices": choices, "label": label, **columns})


def _token_classification(words: str, tags: str, **columns: str) -> DatasetConfig:
    return DatasetConfig(task_type="token_classification",
                         columns={"words": words, "tags": tags, **columns})


GLUE = {
    "cola": _glue("sentence", metric="matthews", label_names=("unacceptable", "acceptable")),
    "sst2": _glue("sentence", label_names=SENTIMENT),
    "mrpc": _glue("sentence1", "sentence2", metric="f1",
                  label_names=("not_equivalent", "equivalent")),
    "qqp": _glue("question1", "question2", metric="f1",
                 label_names=("not_duplicate", "duplicate")),
    "stsb": _glue("sentence1", "sentence2", task_type="regression", label_range=(0.0, 5.0)),
    "mnli": _glue("premise", "hypothesis", validation="validation_matched", label_names=NLI),
    "qnli": _glue("question", "sentence", label_names=("entailment", "not_entailment")),
    "rte": _glue("sentence1", "sentence2", label_names=("entailment", "not_entailment")),
    "wnli": _glue("sentence1", "sentence2", label_names=("not_entailment", "entailment")),
}
ANSWERS = tuple(f"answer{i}" for i in range(4))

# TFDS --------------------------------------------------------------------------------------------

TFDS = {
    **{f"glue/{name}": known for name, known in GLUE.items()},
    "snli": _classification("premise", "hypothesis", label_names=NLI),
    "multi_nli": _classification("premise", "hypothesis", validation="validation_matched",
                        label_names=NLI),
    "imdb_reviews": _classification("text", validation="test", label_names=SENTIMENT),
    "yelp_polarity_reviews": _classification("text", validation="test",
                                             label_names=SENTIMENT),
    "ag_news_subset": _classification(("title", "description"), validation="test",
                                      label_names=("World", "Sports", "Business", "Sci/Tech")),
    "paws_wiki": _classification("sentence1", "sentence2", label_names=PARAPHRASE),
    "squad": _question_answering(),
    "squad/v2.0": _question_answering(),
    "hellaswag": _multiple_choice("context", "endings"),
    "cosmos_qa": _multiple_choice(("context", "question"), ANSWERS, id="id"),
    "piqa": _multiple_choice("goal", ("sol1", "sol2"), id="id"),
    "openbookqa": _multiple_choice("question.stem", tuple(f"question.choice_{x}" for x in "ABCD"),
                           "answerKey"),
    "conll2003": _token_classification("tokens", "ner"),
    "cnn_dailymail": _seq2seq("article", "highlights", columns={"id": "id"}),
    "xsum": _seq2seq("document", "summary"),
    "samsum": _seq2seq("dialogue", "summary", columns={"id": "id"}),
}

# Hugging Face ------------------------------------------------------------------------------------


def _at(location: str, known: DatasetConfig, **fields: Any) -> DatasetConfig:
    """Returns the description with its location on the Hub, OWNER/NAME[/CONFIG][@REVISION]."""
    return dataclasses.replace(known, data=f"hf:{location}", **fields)


HF = {
    **{f"glue/{name}": _at(f"nyu-mll/glue/{name}", known) for name, known in GLUE.items()},
    "snli": _at("stanfordnlp/snli", TFDS["snli"]),
    "multi_nli": _at("nyu-mll/multi_nli", TFDS["multi_nli"]),
    "imdb": _at("stanfordnlp/imdb", TFDS["imdb_reviews"]),
    "yelp_polarity": _at("fancyzhx/yelp_polarity", TFDS["yelp_polarity_reviews"]),
    "ag_news": _at("fancyzhx/ag_news", TFDS["ag_news_subset"],
                   columns={"text": "text", "label": "label"}),
    "paws": _at("google-research-datasets/paws/labeled_final", _classification(
        "sentence1", "sentence2", columns={"label": "label", "id": "id"}, label_names=PARAPHRASE)),
    "boolq": _at("google/boolq", _classification(
        "question", "passage", columns={"label": "answer"}, label_names=("false", "true"))),
    "squad": _at("rajpurkar/squad", _question_answering()),
    "squad_v2": _at("rajpurkar/squad_v2", _question_answering()),
    "hellaswag": _at("Rowan/hellaswag", _multiple_choice("ctx", "endings")),
    "swag": _at("allenai/swag/regular", _multiple_choice(
        "startphrase", tuple(f"ending{i}" for i in range(4)))),
    "commonsense_qa": _at("tau/commonsense_qa", _multiple_choice(
        "question", "choices.text", "answerKey", id="id")),
    **{f"race/{level}": _at(f"ehovy/race/{level}", _multiple_choice(
        ("article", "question"), "options", "answer")) for level in ("high", "middle")},
    # The main revision has a loading script, which `datasets` no longer runs; the Hub keeps a copy
    # converted to Parquet.
    "conll2003": _at("eriktks/conll2003@refs/convert/parquet", _token_classification(
        "tokens", "ner_tags", id="id")),
    "wikiann/en": _at("unimelb-nlp/wikiann/en", _token_classification("tokens", "ner_tags")),
    "cnn_dailymail": _at("abisee/cnn_dailymail/3.0.0", TFDS["cnn_dailymail"]),
    "xsum": _at("EdinburghNLP/xsum", _seq2seq("document", "summary", columns={"id": "id"})),
    "samsum": _at("knkarthick/samsum", TFDS["samsum"]),
    "dialogsum": _at("knkarthick/dialogsum", TFDS["samsum"]),
}

# By name -----------------------------------------------------------------------------------------

KNOWN = {
    **{f"tfds:{name}": dataclasses.replace(known, data=f"tfds:{name}")
       for name, known in TFDS.items()},
    **{f"hf:{name}": known for name, known in HF.items()},
    "python_docs/topics": _classification("text", data="python_docs/topics", validation="test"),
    "python_docs/summaries": _seq2seq("body", "summary", data="python_docs/summaries",
                                      validation="test"),
}
"""Name as `load_dataset` accepts it -> description."""


def find(name: str) -> DatasetConfig | None:
    """Returns the description of "tfds:NAME", "hf:NAME" or "python_docs/CONFIG", or None.

    A TFDS config without its own description has the description of its dataset. A name on the Hub
    may include its owner. For translation datasets, such as "tfds:wmt14_translate/de-en", the first
    language is the source and the second the target.

    Example:
        >>> find("hf:snli").task_type, find("hf:snli").data
        ('classification', 'hf:stanfordnlp/snli')
    """
    if name.startswith("tfds:"):
        name = name.removeprefix("tfds:").partition(":")[0]  # without the version
        if pair := re.fullmatch(r"wmt\w+_translate/(\w\w)-(\w\w)|ted_hrlr_translate/"
                                r"(\w+)_to_(\w+)", name):
            return _seq2seq(*filter(None, pair.groups()), metric="bleu")
        return KNOWN.get(f"tfds:{name}") or KNOWN.get(f"tfds:{name.partition('/')[0]}")
    if pair := re.fullmatch(r"hf:(?:wmt/)?(wmt\d\d)/(\w\w)-(\w\w)", name):
        year, source, target = pair.groups()
        return _at(f"wmt/{year}/{source}-{target}", _seq2seq(
            f"translation.{source}", f"translation.{target}", metric="bleu"))
    for short_name, known in HF.items():
        location = known.data.partition("@")[0]
        if name == location or ("/" not in short_name
                                and name == "/".join(location.split("/")[:2])):
            return known
    return KNOWN.get(name)


def get(name: str) -> DatasetConfig:
    """Returns the description of a dataset as `find` does.

    Raises:
        ValueError: the dataset is unknown; the message lists similar names.
    """
    known = find(name)
    if known is None:
        raise ValueError(f"unknown labeled dataset {name!r}; {did_you_mean(name, sorted(KNOWN))}")
    return known
