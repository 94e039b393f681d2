"""From labeled examples to scores: every task type, and combinations that are not supported."""

import json

import numpy as np
import pytest
from small_configs import ROWS
from small_models import BART, GPT2, TRANSFORMER

from transformer_jax.data import LabeledDataset, load_dataset, tokenizers
from transformer_jax.models import build_model
from transformer_jax.pretrained import load_run
from transformer_jax.recipes import encoding, run_dir
from transformer_jax.recipes.config import TrainingConfig
from transformer_jax.recipes.encoding import encode_dataset
from transformer_jax.recipes.finetuning_run import (
    add_task_head,
    encode_for_training,
    finetune_params,
    include_new_modules,
    load_base,
    make_finetune_step,
)
from transformer_jax.recipes.run_dir import write_predictions
from transformer_jax.recipes.task_encoder import InputConfig


@pytest.mark.slow
@pytest.mark.parametrize(("task_type", "name"), [
    ("classification", "gpt_python_docs"), ("regression", "bert_python_docs"),
    ("multiple_choice", "gpt_python_docs"), ("token_classification", "bert_python_docs"),
    ("question_answering", "gpt_python_docs"), ("question_answering", "bert_python_docs"),
    ("seq2seq", "gpt_python_docs"), ("seq2seq", "bert_python_docs"),
])
def test_every_task_type(task_type, name, pretrained, tmp_path):
    """From a file to scores and a prediction for each example."""
    for split, count in (("train", 12), ("validation", 5)):
        rows = [ROWS[task_type][i % 2] for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = load_run(pretrained(name))
    dataset = load_dataset(str(tmp_path), task_type=task_type)
    model, params = add_task_head(base, dataset)
    training = TrainingConfig(
        max_length=24, batch_size=4, num_steps=2, gpt_special_tokens="gpt" in name,
        target_length=8, num_beams=2,
        max_question_length=8 if task_type == "question_answering" else 64)
    if task_type == "seq2seq" and "bert" in name:
        with pytest.raises(ValueError, match="BERT does not generate text"):
            encode_for_training(dataset, model, base.tokenizer, training)
        return
    encoded = encode_for_training(dataset, model, base.tokenizer, training)
    found = finetune_params(encoded, params, "lora:2", training, 0, quiet=True)
    main_metric = {"regression": "pearson_spearman", "token_classification": "f1",
                   "question_answering": "f1", "seq2seq": "rouge"}.get(task_type, "accuracy")
    assert next(iter(found.metrics)) == main_metric
    assert len(found.predictions) == 5 and 0 < found.metrics["share_trained"] < 1
    write_predictions(tmp_path / "out.jsonl", run_dir.to_json(found.predictions))
    assert (tmp_path / "out.json").is_file() == (task_type == "question_answering")
    if task_type == "question_answering":
        answers = json.loads((tmp_path / "out.json").read_text())
        assert answers == {x["id"]: x["prediction"] for x in found.predictions}
        for line, example in zip(found.predictions, dataset.validation):
            assert line["prediction"] == example["context"][line["start"] : line["stop"]] != ""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task_type", "changes", "message"), [
    ("bert", "classification", {"both_orders": True}, "both_orders is for GPT, .* is a BERT"),
    ("bert", "classification", {"gpt_special_tokens": True}, "gpt_special_tokens is for GPT"),
    ("bert", "classification", {"aux_lm_loss_weight": 0.5},
     "aux_lm_loss_weight is for GPT on class.* a BERT on cl"),
    ("bert", "classification", {"max_length": 65}, "max_length is 65, but .* 64 positions"),
    ("bert", "token_classification", {"max_length": 4}, "training example 0 has .* tokens, more"),
    ("gpt", "token_classification", {"aux_lm_loss_weight": 0.5}, "a GPT on token_classification"),
    ("gpt", "multiple_choice", {"both_orders": True}, "both_orders is for pairs of texts"),
    ("gpt", "classification", {}, "GPT needs a delimiter token .* set gpt_special_tokens"),
    ("gpt", "seq2seq", {"target_length": 24}, "max_length 24 leaves no tokens for the source"),
])
def test_unsupported_combinations_are_errors_before_training(
    name, task_type, changes, message, pretrained, tmp_path
):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[task_type]))
    base = load_run(pretrained(f"{name}_python_docs"))
    dataset = load_dataset(path, validation=path, task_type=task_type)
    model, _ = add_task_head(base, dataset)
    with pytest.raises(ValueError, match=message):
        encode_for_training(dataset, model, base.tokenizer,
                            TrainingConfig(**{"max_length": 24, **changes}))


@pytest.mark.slow
def test_modules_that_the_checkpoint_does_not_have_are_trained(pretrained):
    """Checkpoints of RoBERTa and DistilBERT without a head have no pooler."""
    base = load_run(pretrained("bert_python_docs"))
    model = build_model(base.model.config, 2, "classification")
    params = {name: x for name, x in base.params.items() if name != "pooler"}
    assert include_new_modules(model, base.params, "lora:2") == "lora:2"
    trainable = include_new_modules(model, params, "lora:2")
    mask = make_finetune_step(model, trainable, TrainingConfig(), "classification").mask
    assert mask["pooler"]["kernel"] and not mask["token_embed"]["embedding"]


def test_pooling_replaces_that_of_the_model(pretrained):
    folder = pretrained("bert_python_docs")
    first, mean = (load_base(folder, pooling=pooling) for pooling in (None, "mean"))
    assert (first.model.config.pooling, mean.model.config.pooling) == ("first", "mean")
    with pytest.raises(ValueError, match="pooling"):
        load_base(folder, pooling="last")


def test_training_questions_whose_answer_has_no_token_are_left_out(pretrained, capsys):
    base = load_run(pretrained("bert_python_docs"))
    lost = {"question": "one", "context": "one \u200b two", "answers": [
        {"text": "\u200b", "start": 4}]}
    kept = {"question": "one", "context": "one two", "answers": [{"text": "two", "start": 4}]}
    dataset = LabeledDataset(
        "question_answering", [lost, kept], [lost, kept], (), "squad", None, {})
    model, _ = add_task_head(base, dataset)
    encoded = encode_for_training(dataset, model, base.tokenizer, TrainingConfig(
        max_length=24, max_question_length=8, num_steps=2))
    assert "1 of 2 training questions are left out" in capsys.readouterr().out
    assert {w.example_index for w in encoded.train} == {1}
    assert {w.example_index for w in encoded.validation} == {0, 1}  # all are answered and counted


@pytest.mark.slow
def test_questions_without_an_answer(pretrained):
    base = load_run(pretrained("bert_python_docs"))
    rows = [{"question": "one", "context": "one two", "answers": [{"text": "two", "start": 4}]},
            {"question": "three", "context": "one two", "answers": []}] * 4
    dataset = LabeledDataset("question_answering", rows, rows, (), "squad", None, {})
    model, params = add_task_head(base, dataset)
    training = TrainingConfig(max_length=24, max_question_length=8, num_steps=2, batch_size=4)
    encoded = encode_for_training(dataset, model, base.tokenizer, training)
    found = finetune_params(encoded, params, "bitfit", training, 0, quiet=True)
    assert next(iter(found.metrics)) == "f1"
    # Half are correct if nothing is answered, and no threshold separates equal margins better.
    assert found.metrics["best_f1"] >= max(found.metrics["f1"], 50)
    assert np.isfinite(found.metrics["best_f1_threshold"])
    assert all(line["best"] for line in found.predictions)


# Special tokens of sources and targets

PAIRS = [{"source": "one two", "target": "two"}, {"source": "three", "target": "one"}]
PAIRS_DATASET = LabeledDataset("seq2seq", PAIRS, PAIRS, (), "rouge", None, {})
PAIRS_CONFIG = InputConfig(16, target_length=8)
PAIRS_TEXTS = ["one two three"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train_bpe(
        PAIRS_TEXTS, vocab_size=300, special_tokens=tokenizers.SEQ2SEQ_SPECIAL_TOKENS)


@pytest.mark.parametrize("config", [BART, TRANSFORMER], ids=["bart", "transformer"])
@pytest.mark.parametrize("ids", [(0, 5), (3, 5), (None, 5), (None, None)])
def test_training_starts_the_decoder_as_generation_does(config, ids, tokenizer):
    """Also with the id 0, which is not a missing id."""
    start, bos = ids
    config = config.replace(vocab_size=tokenizer.vocab_size, decoder_start_token_id=start,
                            bos_token_id=bos)
    encoded = encode_dataset(PAIRS_DATASET, build_model(config), tokenizer, PAIRS_CONFIG)
    row = encoded.encoder.make_row(encoded.train[0], 16)
    expected = next(i for i in (start, bos, tokenizer.sep_id) if i is not None)
    assert row["decoder_tokens"][0] == expected


def test_gpt_needs_a_token_between_source_and_target():
    wordpiece = tokenizers.train_wordpiece(PAIRS_TEXTS, vocab_size=120)
    model = build_model(GPT2.replace(vocab_size=wordpiece.vocab_size))
    with pytest.raises(ValueError, match="no end-of-text token to separate source and target"):
        encode_dataset(PAIRS_DATASET, model, wordpiece, PAIRS_CONFIG)


@pytest.mark.parametrize("config, num_special", [(BART, 2), (TRANSFORMER, 1)],
                         ids=["bart", "transformer"])
@pytest.mark.parametrize("num_beams, penalty", [(2, {"length_penalty": 0.6}), (1, {})])
def test_rows_and_options_of_generation(config, num_special, num_beams, penalty, tokenizer,
                                        monkeypatch):
    """Sources fill `max_length`, as in training; the length penalty is that of the config."""
    calls = []

    def record(model, params, tokenizer, rows, **options):
        calls.append((rows, options))
        return ["one"] * len(rows)

    monkeypatch.setattr(encoding, "generate_texts", record)
    long = [{"source": "one two three " * 9, "target": "one"}]
    model = build_model(config.replace(vocab_size=tokenizer.vocab_size))
    encoded = encode_dataset(
        LabeledDataset("seq2seq", long, long, (), "rouge", None, {}), model, tokenizer,
        PAIRS_CONFIG._replace(num_beams=num_beams, length_penalty=0.6))
    encoded.encoder.predict({}, encoded.validation)
    ((row,), options), = calls
    assert len(row) == PAIRS_CONFIG.max_length and row[-1] == tokenizer.sep_id
    assert row[num_special - 1:-1] == encoded.validation[0]["source"][: 16 - num_special]
    assert {k: v for k, v in options.items() if k == "length_penalty"} == penalty
