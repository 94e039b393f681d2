"""Annotated examples become rows; labels are checked on the host."""

import functools

import pytest

from transformer_jax.objectives import classification, input_format

BERT_ROW = functools.partial(input_format.pack_bert_input, length=8, cls_id=101, sep_id=102)
GPT_ROW = functools.partial(input_format.pack_gpt_input, length=8, extract_id=7, delimiter_id=8)


@pytest.mark.parametrize(
    ("row", "example", "tokens"),
    [
        (BERT_ROW, {"tokens": [1, 2]}, [101, 1, 2, 102, 0, 0, 0, 0]),
        (BERT_ROW, {"tokens": [1], "tokens_b": [2, 3]}, [101, 1, 102, 2, 3, 102, 0, 0]),
        (GPT_ROW, {"tokens": [1, 2]}, [1, 2, 7, 0, 0, 0, 0, 0]),
        (GPT_ROW, {"tokens": [1], "tokens_b": [2, 3]}, [1, 8, 2, 3, 7, 0, 0, 0]),
    ],
)
def test_rows(row, example, tokens):
    made = classification.prepare_classification({**example, "label": 2}, row=row, num_classes=3)
    assert made["tokens"].tolist() == tokens
    assert (made["labels"], made["weights"]) == (2, 1)
    assert (made["labels"].dtype, made["weights"].dtype) == ("int32", "float32")
    assert set(made) == {"tokens", "segment_ids", "padding_mask", "labels", "weights"}


@pytest.mark.parametrize("label", [-1, 3])
def test_label_out_of_range(label):
    with pytest.raises(ValueError, match=f"label {label} is outside the 3 classes 0 to 2; mend"):
        classification.prepare_classification({"tokens": [1], "label": label}, row=BERT_ROW, num_classes=3)
