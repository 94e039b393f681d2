"""Loading: task names, new and unused heads, and files that contradict each other."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from pretrained.files import golden, read_all, write, write_tensors

from transformer_jax import load_pretrained, save_pretrained, sharding
from transformer_jax.pretrained import families, safetensors_io
from transformer_jax.tree import flatten_paths


def assert_one_line(error) -> None:
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "family", "task"),
    [
        ("BertForSequenceClassification", "bert", "classification"),
        ("FlaxBertForMaskedLM", "bert", "masked_lm"),
        ("SequenceClassification", "bert", "classification"),
        ("text-classification", "roberta", "classification"),
        ("sentiment-analysis", "distilbert", "classification"),
        ("fill-mask", "camembert", "masked_lm"),
        ("question-answering", "bart", "question_answering"),
        ("ner", "bert", "token_classification"),
        ("Token Classification", "gpt2", "token_classification"),
        ("text-generation", "openai-gpt", "causal_lm"),
        ("GPT2LMHeadModel", "gpt2", "causal_lm"),
        ("summarization", "bart", "seq2seq_lm"),
        ("translation_en_to_de", "marian", "seq2seq_lm"),
        ("MarianMTModel", "marian", "seq2seq_lm"),
        ("ForConditionalGeneration", "pegasus", "seq2seq_lm"),
        ("multiple_choice", "xlm-roberta", "multiple_choice"),
        ("feature-extraction", "bert", "base"),
        ("DistilBertModel", "distilbert", "encoder"),
        ("pretraining", "bert", "pretraining"),
        ("NextSentencePrediction", "bert", "next_sentence"),
    ],
)
def test_tasks_have_several_names(name, family, task):
    assert families.resolve_task(name, family) == task


@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        ("BertForSequenceClasification", "bert", "did you mean BertForSequenceClassification"),
        ("GPT2LMHeadModel", "bert", "unknown task"),
        ("text-generation", "bert", "unsupported task causal_lm for bert"),
        ("", "bert", "unknown task"),
    ],
)
def test_unknown_tasks_are_rejected_with_suggestions(name, family, message):
    with pytest.raises(ValueError, match=message) as error:
        families.resolve_task(name, family)
    assert_one_line(error)


def test_a_missing_head_is_initialized_and_reported(tmp_path, capsys):
    write(tmp_path, "bert")
    model, params, tokenizer = load_pretrained(tmp_path, "classification", 3)
    printed = capsys.readouterr().err
    assert "2 new (classifier/bias, classifier/kernel)" in printed
    assert "7 unused (cls.predictions.bias" in printed
    assert tokenizer is None
    assert params["classifier"]["kernel"].shape == (12, 3)
    assert np.asarray(params["classifier"]["kernel"]).std() > 0.001
    pooler = golden("bert")["tensors"]["bert.pooler.dense.weight"]
    np.testing.assert_array_equal(params["pooler"]["kernel"], pooler.T)
    save_pretrained(tmp_path / "saved", model, params)
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert fields["architectures"] == ["BertForSequenceClassification"]
    assert fields["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    reloaded = load_pretrained(tmp_path / "saved")
    assert reloaded.model.task == "classification"
    assert reloaded.model.num_classes == 3


def test_a_head_is_unused_in_the_base_model(tmp_path, capsys):
    write(tmp_path, "gpt2")
    model, params, _ = load_pretrained(tmp_path, "base")
    assert "0 new, 1 unused (score.weight)" in capsys.readouterr().err
    assert "classifier" not in params
    save_pretrained(tmp_path / "saved", model, params)
    assert "wte.weight" in read_all(tmp_path / "saved")  # models without a head have no prefix


def test_another_number_of_labels_initializes_a_new_classifier(tmp_path, capsys):
    write(tmp_path, "gpt2")
    assert load_pretrained(tmp_path).model.num_classes == 4
    assert capsys.readouterr().err == ""
    params = load_pretrained(tmp_path, num_labels=7).params
    assert params["classifier"]["kernel"].shape == (12, 7)
    assert "1 new (classifier/kernel), 1 unused (score.weight)" in capsys.readouterr().err
    assert load_pretrained(tmp_path, num_labels=4).model.num_classes == 4
    assert capsys.readouterr().err == ""


def test_new_parameters_depend_on_the_key(tmp_path):
    write(tmp_path, "bert")
    kernels = [load_pretrained(tmp_path, "classification", rng=rng).params["classifier"]["kernel"]
               for rng in (None, jax.random.key(0), jax.random.key(1))]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[1] - kernels[2]).max() > 0


def test_config_fields_can_be_overridden(tmp_path):
    write(tmp_path, "bert")
    config = load_pretrained(tmp_path, dropout_rate=0.3, dtype="bfloat16").model.config
    assert (config.dropout_rate, config.dtype) == (0.3, "bfloat16")


def test_configs_and_models_of_one_architecture_are_equal(tmp_path):
    """What else config.json contains does not lead to another compilation."""
    notes = {"one": {"my_note": 1}, "two": {"my_note": 2, "id2label": dict.fromkeys("0123", "x")}}
    models = [load_pretrained(write(tmp_path / name, "roberta", config=note)).model
              for name, note in notes.items()]
    assert models[0].hf_config != models[1].hf_config
    assert models[0].config == models[1].config and models[0] == models[1]
    assert len({hash(model) for model in models}) == 1
    assert len({hash(model.config) for model in models}) == 1
    run = jax.jit(lambda model, x: model.num_classes * x, static_argnums=0)
    assert [int(run(model, 1)) for model in models] == [4, 4]
    assert run._cache_size() == 1
    assert models[0] != models[0].clone(num_classes=3)


def test_parameters_are_sharded_over_a_mesh(tmp_path):
    write(tmp_path, "bart")
    mesh = sharding.make_mesh(data=2, fsdp=4)
    unsharded = flatten_paths(load_pretrained(tmp_path).params)
    model, params, _ = load_pretrained(tmp_path, "classification", mesh=mesh)
    expected = flatten_paths(sharding.param_shardings(params, mesh))
    num_sharded = 0
    for path, leaf in flatten_paths(params).items():
        assert leaf.sharding == expected[path], path
        num_sharded += leaf.addressable_shards[0].data.size < leaf.size
        if path in unsharded:
            np.testing.assert_array_equal(leaf, unsharded[path])
    assert num_sharded > 25
    save_pretrained(tmp_path / "saved", model, params)
    np.testing.assert_array_equal(read_all(tmp_path / "saved")["model.shared.weight"],
                                  golden("bart")["tensors"]["model.shared.weight"])


def test_special_ids_come_from_both_files(tmp_path):
    write(tmp_path, "marian")
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"forced_bos_token_id": 5, "eos_token_id": [2, 3], "num_beams": 4}))
    model, params, _ = load_pretrained(tmp_path)
    assert model.config.forced_bos_token_id == 5
    assert (model.config.pad_token_id, model.config.eos_token_id) == (1, 2)
    assert json.loads(model.hf_config)["generation_config"]["num_beams"] == 4
    save_pretrained(tmp_path / "saved", model, params)
    assert json.loads((tmp_path / "saved" / path.name).read_text())["num_beams"] == 4


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gpt2", {"model_type": "gpt_neo"},
         "unsupported model_type 'gpt_neo' in config.json; supported: gpt2"),
        ("gpt2", {"model_type": None}, "model_type None"),
        ("gpt2", {"n_layer": 3}, "no tensors for 32 of 53 parameters.*has 3 layers"),
        ("bart", {"decoder_layers": 1}, "contain model.decoder.layers.1.*has 1 layers"),
        ("gpt2", {"n_embd": 8}, "has shape .*but config.json requires"),
        ("gpt2", {"vocab_size": 31}, r"wte.weight has shape \(30, 12\).*requires \(31, 12\)"),
        ("gpt2", {"id2label": {"0": "a"}}, r"score.weight has shape \(4, 12\).*\(1, 12\)"),
        ("gpt2", {"n_head": 5}, "multiple of num_heads 5"),
        ("gpt2", {"n_head": "2"}, "num_heads is '2'"),
        ("gpt2", {"activation_function": "mish"},
         "unsupported activation 'mish' in config.json; supported: gelu"),
        ("gpt2", {"reorder_and_upcast_attn": True},
         "unsupported reorder_and_upcast_attn True in config.json; supported: False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"architectures": ["GPT2DoubleHeadsModel"]},
         "comes from architectures in config.json; give task"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder True"),
        ("bert", {"tie_word_embeddings": False},
         "tie_word_embeddings False in config.json; supported: True"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings"),
        ("marian", {"decoder_vocab_size": 40},
         "unsupported decoder_vocab_size 40 .*one vocabulary"),
        ("marian", {"tie_word_embeddings": False}, "tie_word_embeddings False"),
    ],
)
def test_unsupported_and_contradictory_configs_are_rejected(name, fields, message, tmp_path):
    write(tmp_path, name, config=fields)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(tmp_path)
    assert_one_line(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "base", "num_labels": 2}, "num_labels is 2, but the task base has no labels"),
        ({"num_labels": 0}, "num_labels is 0; it must be"),
        ({"droput_rate": 0.1}, "unknown option 'droput_rate'.*dropout_rate"),
        ({"dropout_rate": 2.0}, "dropout_rate is 2.0"),
    ],
)
def test_invalid_options_are_rejected(options, message, tmp_path):
    write(tmp_path, "gpt2")
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(tmp_path, **options)
    assert_one_line(error)


@pytest.mark.parametrize("file", sorted(safetensors_io.UNSUPPORTED_FORMATS))
def test_unsupported_formats_are_rejected_with_instructions(file, tmp_path):
    write(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_bytes(b"\x80\x04.")
    with pytest.raises(FileNotFoundError, match=f"only {file}.*save_pretrained") as error:
        load_pretrained(tmp_path)
    assert_one_line(error)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=re.escape("config.json does not exist")):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        load_pretrained(tmp_path / "config.json")


def test_learned_positions_are_rejected_in_sinusoidal_families(tmp_path):
    values = golden("pegasus")["tensors"]
    name = "model.decoder.embed_positions.weight"
    write(tmp_path, "pegasus")
    write_tensors(tmp_path, values | {name: values[name] + 0.5})
    with pytest.raises(ValueError, match="unsupported learned positions"):
        load_pretrained(tmp_path)


def test_a_tensor_with_two_names_is_rejected(tmp_path):
    values = golden("gpt2")["tensors"]
    write(tmp_path, "gpt2")
    write_tensors(tmp_path, values | {"wte.weight": values["transformer.wte.weight"]})
    with pytest.raises(ValueError, match="have both"):
        load_pretrained(tmp_path)


def test_integer_tensors_are_rejected_as_parameters(tmp_path):
    values = golden("gpt2")["tensors"]
    write(tmp_path, "gpt2")
    write_tensors(tmp_path, values | {"score.weight": values["score.weight"].astype(np.int32)})
    with pytest.raises(ValueError, match=r"score\.weight has dtype int32"):
        load_pretrained(tmp_path)


def test_buffers_are_ignored(tmp_path, capsys):
    write(tmp_path, "gpt2")
    write_tensors(tmp_path, golden("gpt2")["tensors"] | {
        "transformer.h.0.attn.bias": np.ones((1, 1, 12, 12), bool),
        "h.0.attn.masked_bias": np.float32(-1e4).reshape(())})
    load_pretrained(tmp_path)
    assert capsys.readouterr().err == ""


def test_only_needed_files_are_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    requested = {}

    def snapshot_download(name, **options):
        requested.update(options, name=name)
        return str(write(tmp_path, "gpt2"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_pretrained("some/gpt2", revision="v1").model.config.vocab_size == 30
    assert (requested["name"], requested["revision"]) == ("some/gpt2", "v1")
    patterns = requested["allow_patterns"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(patterns)
    assert not any("bin" in pattern or pattern == "*" for pattern in patterns)

    def fail(name, **options):
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"some/gpt2 is not a folder.*no network\)$"):
        load_pretrained("some/gpt2")


@pytest.mark.slow
def test_top_level_names_are_imported_lazily():
    script = ("import sys, transformer_jax as t; assert 'jax' not in sys.modules; "
              "t.load_pretrained, t.save_pretrained, t.forward; dir(t).index('forward'); "
              "assert not {'grain', 'torch', 'tensorflow_datasets'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", script], check=True)


PEAK_MEMORY_SCRIPT = """
import resource, sys, threading, time
import jax
from transformer_jax import load_pretrained
jax.config.update("jax_platforms", "cpu")
jax.numpy.zeros(1).block_until_ready()
load_pretrained(sys.argv[1])  # the first load also allocates compilers and caches
page = resource.getpagesize()
rss = lambda: int(open("/proc/self/statm").read().split()[1]) * page
before, peak, stop = rss(), 0, False
def watch():
    global peak
    while not stop:
        peak = max(peak, rss()); time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
params = load_pretrained(sys.argv[2]).params
jax.block_until_ready(params); stop = True; thread.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_needs_little_more_memory_than_the_parameters(tmp_path):
    """With GPT-2's embedding and four of its layers, a copy would be visible."""
    small = write(tmp_path / "small", "gpt2")
    d_model = 768
    sizes = {"n_embd": d_model, "n_head": 12, "n_positions": 1024, "vocab_size": 50_257,
             "n_layer": 4, "n_inner": None}
    (tmp_path / "big").mkdir()
    fields = json.loads((small / "config.json").read_text()) | sizes
    (tmp_path / "big" / "config.json").write_text(json.dumps(fields))
    block = {key: value for key, value in golden("gpt2")["tensors"].items() if ".h.0." in key}
    shapes = {"transformer.wte.weight": (50_257, d_model),
              "transformer.wpe.weight": (1024, d_model),
              "transformer.ln_f.weight": (d_model,), "transformer.ln_f.bias": (d_model,),
              "score.weight": (4, d_model)}
    sizes_of = {12: d_model, 36: 3 * d_model, 20: 4 * d_model}
    for i in range(4):
        shapes |= {key.replace(".h.0.", f".h.{i}."): tuple(sizes_of[n] for n in value.shape)
                   for key, value in block.items()}
    specs = [safetensors_io.TensorSpec(name, np.dtype(np.float32), shape)
             for name, shape in shapes.items()]
    values = (np.ones(spec.shape, np.float32) for spec in specs)
    safetensors_io.save_tensors(tmp_path / "big", specs, values, 10**10)
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    assert size > 2.5e8
    done = subprocess.run([sys.executable, "-c", PEAK_MEMORY_SCRIPT, small, tmp_path / "big"],
                          check=True, capture_output=True, text=True)
    assert 0.9 * size < int(done.stdout) < 1.2 * size
