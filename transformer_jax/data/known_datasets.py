"""Annotated data sets by name: what their columns are called, and by what they are measured."""

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

# Canonical name -> the set's column; a dot goes into a dict. Of "text" and "text_b" a tuple is
# joined by spaces, of "choices" it is one column for each choice.
Columns = Mapping[str, str | tuple[str, ...]]


class KnownDataset(NamedTuple):
    """What is known of a data set.

    Attributes:
        kind: a key of `METRICS`.
        validation: the split to evaluate on: the annotated one where "test" has no labels.
        metric: the main metric; that of the kind if empty.
        label_names: in the order of the classes; those of the source if empty.
        label_range: of the labels of a regression.
        hub: path on the Hugging Face Hub, config, and further options of `load_dataset`.
    """

    kind: str
    columns: Columns
    validation: str = "validation"
    metric: str = ""
    label_names: tuple[str, ...] = ()
    label_range: tuple[float, float] | None = None
    hub: tuple[str, str | None, Mapping[str, Any]] = ("", None, MappingProxyType({}))


# Kind -> by what it may be measured; the first is what it is measured by if nothing is said.
METRICS = {
    "classification": ("accuracy", "f1", "macro_f1", "matthews"),
    "regression": ("pearson_spearman",),
    "multiple_choice": ("accuracy", "macro_f1", "matthews"),
    "token_classification": ("f1", "accuracy"),
    "question_answering": ("squad",),
    "seq2seq": ("rouge", "bleu"),
}

# Sets that both libraries have -------------------------------------------------------------------

NLI = ("entailment", "neutral", "contradiction")
SENTIMENT = ("negative", "positive")
SAME_AS = ("different_meaning", "paraphrase")


def _texts(text: str | tuple[str, ...], text_b: str | None = None, **more: Any) -> KnownDataset:
    """A classification, or what `more` says, of the column "label"."""
    columns = {"text": text, **({"text_b": text_b} if text_b else {}),
               **more.pop("columns", {"label": "label"})}
    return KnownDataset(**{"kind": "classification", "columns": columns, **more})


def _glue(text: str, text_b: str | None = None, **more: Any) -> KnownDataset:
    return _texts(text, text_b, columns={"label": "label", "id": "idx"}, **more)


def _answers() -> KnownDataset:
    return KnownDataset("question_answering", {"id": "id", "question": "question", "context": "context",
                                        "answers": "answers"})


def _pairs(source: str, target: str, **more: Any) -> KnownDataset:
    columns = {"source": source, "target": target, **more.pop("columns", {})}
    return KnownDataset("seq2seq", columns, **more)


def _choices(
    text: str | tuple[str, ...], choices: str | tuple[str, ...], label: str = "label", **more: str
) -> KnownDataset:
    return KnownDataset("multiple_choice", {"text": text, "choices": choices, "label": label, **more})


GLUE = {
    "cola": _glue("sentence", metric="matthews", label_names=("unacceptable", "acceptable")),
    "sst2": _glue("sentence", label_names=SENTIMENT),
    "mrpc": _glue("sentence1", "sentence2", metric="f1",
                  label_names=("not_equivalent", "equivalent")),
    "qqp": _glue("question1", "question2", metric="f1",
                 label_names=("not_duplicate", "duplicate")),
    "stsb": _glue("sentence1", "sentence2", kind="regression", label_range=(0.0, 5.0)),
    "mnli": _glue("premise", "hypothesis", validation="validation_matched", label_names=NLI),
    "qnli": _glue("question", "sentence", label_names=("entailment", "not_entailment")),
    "rte": _glue("sentence1", "sentence2", label_names=("entailment", "not_entailment")),
    "wnli": _glue("sentence1", "sentence2", label_names=("not_entailment", "entailment")),
}
ANSWERS = tuple(f"answer{i}" for i in range(4))

# TFDS --------------------------------------------------------------------------------------------

TFDS = {
    **{f"glue/{name}": named for name, named in GLUE.items()},
    "snli": _texts("premise", "hypothesis", label_names=NLI),
    "multi_nli": _texts("premise", "hypothesis", validation="validation_matched", label_names=NLI),
    "imdb_reviews": _texts("text", validation="test", label_names=SENTIMENT),
    "yelp_polarity_reviews": _texts("text", validation="test", label_names=SENTIMENT),
    "ag_news_subset": _texts(("title", "description"), validation="test",
                             label_names=("World", "Sports", "Business", "Sci/Tech")),
    "paws_wiki": _texts("sentence1", "sentence2", label_names=SAME_AS),
    "squad": _answers(),
    "squad/v2.0": _answers(),
    "hellaswag": _choices("context", "endings"),
    "cosmos_qa": _choices(("context", "question"), ANSWERS, id="id"),
    "piqa": _choices("goal", ("sol1", "sol2"), id="id"),
    "openbookqa": _choices("question.stem", tuple(f"question.choice_{x}" for x in "ABCD"),
                           "answerKey"),
    "conll2003": KnownDataset("token_classification", {"words": "tokens", "tags": "ner"}),
    "cnn_dailymail": _pairs("article", "highlights", columns={"id": "id"}),
    "xsum": _pairs("document", "summary"),
    "samsum": _pairs("dialogue", "summary", columns={"id": "id"}),
}

# Hugging Face ------------------------------------------------------------------------------------


def _hub(path: str, config: str | None, named: KnownDataset, **options: Any) -> KnownDataset:
    return named._replace(hub=(path, config, options))


HF = {
    **{f"glue/{name}": _hub("nyu-mll/glue", name, named) for name, named in GLUE.items()},
    "snli": _hub("stanfordnlp/snli", None, TFDS["snli"]),
    "multi_nli": _hub("nyu-mll/multi_nli", None, TFDS["multi_nli"]),
    "imdb": _hub("stanfordnlp/imdb", None, TFDS["imdb_reviews"]),
    "yelp_polarity": _hub("fancyzhx/yelp_polarity", None, TFDS["yelp_polarity_reviews"]),
    "ag_news": _hub("fancyzhx/ag_news", None,
                    TFDS["ag_news_subset"]._replace(columns={"text": "text", "label": "label"})),
    "paws": _hub("google-research-datasets/paws", "labeled_final", _texts(
        "sentence1", "sentence2", columns={"label": "label", "id": "id"}, label_names=SAME_AS)),
    "boolq": _hub("google/boolq", None, _texts(
        "question", "passage", columns={"label": "answer"}, label_names=("false", "true"))),
    "squad": _hub("rajpurkar/squad", None, _answers()),
    "squad_v2": _hub("rajpurkar/squad_v2", None, _answers()),
    "hellaswag": _hub("Rowan/hellaswag", None, _choices("ctx", "endings")),
    "swag": _hub("allenai/swag", "regular", _choices(
        "startphrase", tuple(f"ending{i}" for i in range(4)))),
    "commonsense_qa": _hub("tau/commonsense_qa", None, _choices(
        "question", "choices.text", "answerKey", id="id")),
    "race/high": _hub("ehovy/race", "high", _choices(
        ("article", "question"), "options", "answer")),
    "race/middle": _hub("ehovy/race", "middle", _choices(
        ("article", "question"), "options", "answer")),
    # Its own files need a script, which `datasets` runs no more; the Hub keeps a converted copy.
    "conll2003": _hub("eriktks/conll2003", None, KnownDataset(
        "token_classification", {"words": "tokens", "tags": "ner_tags", "id": "id"}),
        revision="refs/convert/parquet"),
    "wikiann/en": _hub("unimelb-nlp/wikiann", "en", KnownDataset(
        "token_classification", {"words": "tokens", "tags": "ner_tags"})),
    "cnn_dailymail": _hub("abisee/cnn_dailymail", "3.0.0", TFDS["cnn_dailymail"]),
    "xsum": _hub("EdinburghNLP/xsum", None, _pairs("document", "summary", columns={"id": "id"})),
    "samsum": _hub("knkarthick/samsum", None, TFDS["samsum"]),
    "dialogsum": _hub("knkarthick/dialogsum", None, TFDS["samsum"]),
}

# By name -----------------------------------------------------------------------------------------

KNOWN = {
    **{f"tfds:{name}": named for name, named in TFDS.items()},
    **{f"hf:{name}": named for name, named in HF.items()},
    "python_docs/topics": _texts("text"),
    "python_docs/summaries": _pairs("body", "summary"),
}


def find(spec: str) -> KnownDataset | None:
    """What is known of "tfds:NAME", "hf:NAME" or "python_docs/CONFIG"; None if nothing.

    Configs of TFDS that the table does not tell apart are alike. A name on the Hub may have its
    owner before it. Translations are read from the first of their two languages to the second.
    """
    prefix, _, name = spec.partition(":")
    if prefix == "tfds":
        name = name.partition(":")[0]  # without its version
        if pair := re.fullmatch(r"wmt\w+_translate/(\w\w)-(\w\w)|ted_hrlr_translate/"
                                r"(\w+)_to_(\w+)", name):
            return _pairs(*filter(None, pair.groups()), metric="bleu")
        return TFDS.get(name) or TFDS.get(name.partition("/")[0])
    if prefix == "hf":
        if pair := re.fullmatch(r"(?:wmt/)?(wmt\d\d)/(\w\w)-(\w\w)", name):
            year, source, target = pair.groups()
            return _hub(f"wmt/{year}", f"{source}-{target}", _pairs(
                f"translation.{source}", f"translation.{target}", metric="bleu"))
        for known, named in HF.items():
            path = named.hub[0]
            config = known.partition("/")[2]
            if name in (known, f"{path}/{config}" if config else path):
                return named
        return None
    return KNOWN.get(spec)


def known(spec: str) -> KnownDataset:
    """`find`, of a name that must be known.

    Raises:
        ValueError: it is not; near ones are listed.
    """
    named = find(spec)
    if named is None:
        near = difflib.get_close_matches(spec, KNOWN, n=3, cutoff=0.5) or sorted(KNOWN)
        raise ValueError(f"no annotated set {spec!r} is known; choose from {', '.join(near)}")
    return named
