"""Reliability trial: malformed weights, configs, tokenizers, data, trainable specs and prompts.

    python tests/endurance/fuzz.py --inputs 100000
    python tests/endurance/fuzz.py --inputs 1000 --targets config trainable_specs

Each input is a valid one with a few random mutations: flipped bits, and bytes that are deleted,
repeated or inserted; in JSON also values that are replaced. A loader may raise ValueError or
FileNotFoundError, the errors that it documents, within five seconds and two GiB of memory. Any
other outcome is printed with the seed and number of the input, which reproduce it. Hardware: a CPU
core tries 500 to 20,000 inputs a second.
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from mutations import mutate_bytes, mutate_json, mutate_json_bytes, mutate_text

from transformer_jax.data import load_dataset, tokenizers
from transformer_jax.finetuning import peft, select
from transformer_jax.models import build_model, init_params, presets
from transformer_jax.pretrained import families, safetensors_io
from transformer_jax.pretrained import tokenizer as pretrained_tokenizer

MAX_SECONDS, MAX_BYTES = 5, 2 * 2**30
EXPECTED_ERRORS = (ValueError, FileNotFoundError)


class FuzzTimeoutError(Exception):
    """A loader exceeded its time limit."""


class Target(NamedTuple):
    """A loader under test.

    Attributes:
        load: loads one input.
        valid_inputs: inputs that are loaded without an error.
        mutate: returns a mutated copy of an input.
    """

    load: Callable[[Any], object]
    valid_inputs: list
    mutate: Callable[[Any, random.Random], Any]


# Targets ------------------------------------------------------------------------------------------


def weights(folder: Path) -> Target:
    """A safetensors file, of which all tensors are loaded."""
    values = [np.arange(12, dtype=np.float32).reshape(3, 4), np.ones(5, np.float16),
              np.array(3, np.int64)]
    specs = [safetensors_io.TensorSpec(name, x.dtype, x.shape) for name, x in zip("abc", values)]
    safetensors_io.save_tensors(folder, specs, values, 10**9)
    path = folder / safetensors_io.WEIGHTS_FILE
    valid = path.read_bytes()

    def load(data):
        path.write_bytes(data)
        for entry in safetensors_io.list_tensors(folder).values():
            safetensors_io.load_tensor(entry)

    def mutate(data, rng):
        if rng.random() < 0.5:
            return mutate_bytes(data, rng)
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(mutate_json(json.loads(data[8 : 8 + length]), rng)).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + length :]

    return Target(load, [valid], mutate)


def index(folder: Path) -> Target:
    """The index of two shards of weights."""
    values = [np.ones(5, np.float32), np.zeros(7, np.float32)]
    specs = [safetensors_io.TensorSpec(name, x.dtype, x.shape) for name, x in zip("ab", values)]
    safetensors_io.save_tensors(folder, specs, values, 21)
    path = folder / safetensors_io.INDEX_FILE

    def load(data):
        path.write_bytes(data)
        for entry in safetensors_io.list_tensors(folder).values():
            assert entry.file.parent == folder, f"a shard in another folder: {entry.file}"

    return Target(load, [path.read_bytes()], mutate_json_bytes)


def config(folder: Path) -> Target:
    """config.json of each family; the model is built without parameters."""
    size = {"num_layers": 1, "d_model": 8, "num_heads": 2, "mlp_dim": 32, "vocab_size": 20}
    valid = [families.config_to_hf(build_model(presets.get(name, **size), task=task))
             for name, task in (("gpt2", "causal_lm"), ("gpt1", "causal_lm"),
                                ("bert_base", "pretraining"), ("bart_base", "seq2seq_lm"))]
    bart = {name: value for name, value in valid[-1].items() if name != "model_type"}
    valid += [{"model_type": name, **bart} for name in ("marian", "pegasus", "mbart")]

    def load(values):
        if isinstance(values, dict):
            build_model(families.config_from_hf(values))

    return Target(load, valid, mutate_json)


def tokenizer(folder: Path) -> Target:
    """The files of tokenizers: tokenizer.json, a word list, or a vocabulary and merges."""
    texts = ["the cat sat on the mat", "a dog ate the mat", "cats and dogs"] * 3
    tokenizers.train_bpe(texts, 300).save(folder / "bpe")
    tokenizer_json = (folder / "bpe" / "tokenizer.json").read_bytes()
    bpe = json.loads(tokenizer_json)["model"]
    merges = "\n".join(" ".join(m) if isinstance(m, list) else m for m in bpe["merges"])
    words = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\ncat\n##s\n"
    valid = [
        ("bert", {"vocab.txt": words}),
        ("bert", {"vocab.txt": words, "tokenizer_config.json": b'{"do_lower_case": true}'}),
        ("gpt2", {"vocab.json": json.dumps(bpe["vocab"]).encode(), "merges.txt": merges.encode()}),
        ("openai-gpt", {"vocab.json": b'{"a": 0, "b</w>": 1, "ab</w>": 2, "<unk>": 3}',
                        "merges.txt": b"#version: 0.2\na b</w>\n"}),
        ("gpt2", {"tokenizer.json": tokenizer_json})]
    loaded_folder = folder / "loaded"
    loaded_folder.mkdir()

    def load(value):
        model_type, files = value
        for path in loaded_folder.iterdir():
            path.unlink()
        for name, data in files.items():
            (loaded_folder / name).write_bytes(data)
        loaded = pretrained_tokenizer.load(loaded_folder, {"model_type": model_type})
        if loaded is not None:
            loaded.decode(loaded.encode("the cats"))

    def mutate(value, rng):
        model_type, files = value
        name = rng.choice(list(files))
        mutate_file = mutate_json_bytes if name.endswith(".json") else mutate_bytes
        return model_type, files | {name: mutate_file(files[name], rng)}

    return Target(load, valid, mutate)


def sentencepiece(folder: Path) -> Target:
    """A SentencePiece model, in the wire format of protocol buffers."""
    def field(number, wire_type, data):
        length = bytes([len(data)]) if wire_type == 2 else b""
        return bytes([number << 3 | wire_type]) + length + data

    def piece(text, piece_type):
        return field(1, 2, field(1, 2, text) + field(2, 5, np.float32(-1.5).tobytes())
                     + field(3, 0, bytes([piece_type])))

    valid = (piece(b"<unk>", 2) + piece(b"</s>", 3) + piece("▁a".encode(), 1) + piece(b"b", 1)
             + field(2, 2, field(3, 0, b"\x01")) + field(3, 2, field(3, 0, b"\x01")))
    path = folder / "source.spm"

    def load(data):
        path.write_bytes(data)
        pretrained_tokenizer.load_sentencepiece(path)

    return Target(load, [valid], mutate_bytes)


def table(folder: Path) -> Target:
    """Labeled data in .tsv, .csv and .jsonl files."""
    tsv = b"text\tlabel\n" + b"".join(b"row %d\t%d\n" % (i, i % 2) for i in range(6))
    classes = b"".join(json.dumps({"text": f"row {i}", "label": i % 2}).encode() + b"\n"
                       for i in range(6))
    question = {"question": "who", "context": "it was me",
                "answers": {"text": ["me"], "answer_start": [7]}}
    questions = (json.dumps(question).encode() + b"\n") * 4
    valid = [(".tsv", tsv), (".csv", tsv.replace(b"\t", b",")), (".jsonl", classes),
             (".jsonl", questions)]

    def load(value):
        suffix, data = value
        path = folder / f"train{suffix}"
        path.write_bytes(data)
        load_dataset(path, validation_fraction=0.3)

    def mutate(value, rng):
        suffix, data = value
        if suffix != ".jsonl" or rng.random() < 0.5:
            return suffix, mutate_bytes(data, rng)
        lines = data.splitlines()
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(mutate_json(json.loads(lines[i]), rng)).encode()
        return suffix, b"\n".join(lines)

    return Target(load, valid, mutate)


def trainable_specs(folder: Path) -> Target:
    """Trainable specs of a small model: shapes of PEFT parameters, and the mask."""
    model = build_model(presets.bert_tiny(vocab_size=20, num_layers=2, d_model=8, num_heads=2,
                                          mlp_dim=8, max_length=8), 2, "classification")
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    valid = ["full", "head", "last_k:1", "layers:0-1", "embeddings", "bitfit+layernorm",
             "lora:2:query,value", "lora:2:all,alpha=16,dropout=0.05,rslora", "lora:2:all,dora",
             "adapter:4", "prefix:2", "prompt:2", "ia3", "regex:layer_1/.*kernel"]
    fragments = ["lora", "last_k", "layers", "regex", "adapter", ":", "+", ",", "=", "-", "all",
                 "0", "-1", "999999999999", "1e9", "nan", "(", "[", "(a+)+$", ".*", "\n"]

    def load(spec):
        with_peft = jax.eval_shape(
            lambda params: peft.add_peft_params(params, spec, jax.random.key(0)), shapes)
        select.trainable_mask(with_peft, spec)

    def mutate(spec, rng):
        if rng.random() < 0.6:
            start = rng.randrange(len(spec) + 1)
            return spec[:start] + rng.choice(fragments) + spec[start + rng.choice((0, 1, 3)) :]
        return mutate_text(spec, rng)

    return Target(load, valid, mutate)


def prompts(folder: Path) -> Target:
    """Texts that are encoded and decoded by tokenizers of each kind."""
    texts = ["the cat sat on the mat", "a dog ate it", "[CLS] the [MASK] [SEP]", ""]
    trained = [tokenizers.train_bpe(texts * 3, 300), tokenizers.train_wordpiece(texts * 3, 120),
               tokenizers.train_chars(texts)]

    def load(text):
        for tokenizer in trained:
            tokenizer.decode(tokenizer.encode(text))

    return Target(load, texts, mutate_text)


TARGETS = {f.__name__: f for f in (weights, index, config, tokenizer, sentencepiece, table,
                                   trainable_specs, prompts)}


# Trial --------------------------------------------------------------------------------------------


def try_input(target: Target, value: Any) -> str | None:
    """Loads an input; returns a description of an undocumented error, or None."""
    try:
        signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            target.load(value)
    except EXPECTED_ERRORS as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        # A UnicodeError is a ValueError too, but its message does not help the user.
        is_documented = type(error) in (*EXPECTED_ERRORS, json.JSONDecodeError)
        return None if is_documented else describe_error(error)
    except BaseException as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if isinstance(error, KeyboardInterrupt):
            raise
        return describe_error(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def describe_error(error: BaseException) -> str:
    """Returns the type, the last line of this library in the traceback, and the message."""
    frames = [f for f in traceback.extract_tb(error.__traceback__)
              if "transformer_jax" in f.filename]
    location = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {location}: {str(error)[:100]}"


def run_target(name: str, inputs: int, seed: int = 0) -> dict[str, Any]:
    """Tries a number of inputs on one target.

    Returns:
        "inputs", "failures" (description -> count), "longest_seconds" of an input, and "seconds".
    """
    failures, began, longest = collections.Counter(), time.time(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        target = TARGETS[name](Path(folder))
        for value in target.valid_inputs:
            target.load(value)
        for number in range(inputs):
            rng = random.Random(f"{name} {seed} {number}")
            value = target.mutate(rng.choice(target.valid_inputs), rng)
            input_began = time.perf_counter()
            failure = try_input(target, value)
            longest = max(longest, time.perf_counter() - input_began)
            if failure is not None:
                if failure not in failures:
                    print(f"{name}, seed {seed}, input {number}: {failure}\n  "
                          f"{str(value)[:300]!r}", flush=True)
                failures[failure] += 1
    return {"inputs": inputs, "failures": dict(failures), "longest_seconds": round(longest, 2),
            "seconds": round(time.time() - began)}


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Limits the additional memory of this process, and raises `FuzzTimeoutError` on a timer."""
    def on_alarm(*_):
        raise FuzzTimeoutError(f"more than {MAX_SECONDS} s")

    handler = signal.signal(signal.SIGALRM, on_alarm)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used_kib = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * used_kib + MAX_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGALRM, handler)


def main(inputs: int, targets: Sequence[str], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Runs the trial of each target and prints its results as JSON."""
    results = {}
    with limits():
        for name in targets:
            results[name] = run_target(name, inputs, seed)
            print(name, json.dumps(results[name]), flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    results = main(**vars(parser.parse_args()))
    sys.exit(1 if any(result["failures"] for result in results.values()) else 0)
