"""Metrics of named-entity recognition."""

from collections.abc import Sequence

from transformer_jax.metrics.classification import check_same_length


def entity_f1(
    labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]
) -> dict[str, float]:
    """F1, precision and recall of entities in BIO tags, as in the script conlleval.

    A predicted entity is correct if its first word, last word and type equal those of a true
    entity. An I- tag after O or after another type begins an entity. BILOU and IOBES tags are
    converted: U- and S- to B-, and L- and E- to I-.

    Args:
        labels: true tags of the words of each text.
        predictions: predicted tags, likewise.

    Returns:
        "f1", "precision" and "recall", 0 where undefined.

    Raises:
        ValueError: labels and predictions differ in the number of texts, or of tags of a text.

    Example:
        >>> entity_f1([["B-PER", "I-PER", "O"]], [["B-PER", "I-PER", "B-LOC"]])["precision"]
        0.5
    """
    check_same_length(labels, predictions)
    for text_labels, text_predictions in zip(labels, predictions):
        check_same_length(text_labels, text_predictions)
    true, predicted = ({(i, *entity) for i, tags in enumerate(texts) for entity in _entities(tags)}
                       for texts in (labels, predictions))
    num_correct = len(true & predicted)
    return {"f1": 2 * num_correct / max(len(true) + len(predicted), 1),
            "precision": num_correct / max(len(predicted), 1),
            "recall": num_correct / max(len(true), 1)}


_BIO_PREFIXES = {"U": "B", "S": "B", "L": "I", "E": "I"}


def _entities(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """The entities `(first word, last word + 1, type)` of one text."""
    entities: list[tuple[int, int, str]] = []
    start, entity_type = 0, None
    for i, tag in enumerate([*tags, "O"]):
        prefix, dash, tag_type = tag.partition("-")
        prefix = _BIO_PREFIXES.get(prefix, prefix) if dash else prefix
        if entity_type is not None and (prefix != "I" or tag_type != entity_type):
            entities.append((start, i, entity_type))
            entity_type = None
        if prefix in ("B", "I") and entity_type is None:
            start, entity_type = i, tag_type
    return entities
