"""Hostile input for everything that reads what others wrote: weights, configs, tokenizers, data,
recipes and prompts.

    python tests/endurance/fuzz.py --inputs 100000
    python tests/endurance/fuzz.py --inputs 1000 --targets config recipes

Each input is a good one, changed a few times by chance: bits, cuts, copies and splices of bytes,
and of JSON other values in the place of its own. What a reader may raise is ValueError or
FileNotFoundError, the errors that it documents, within five seconds and two GiB. Anything else is
printed with the seed that makes it again. Hardware: a CPU core does 500 to 20,000 inputs a second.
"""

import argparse
import collections
import contextlib
import copy
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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from transformer_jax.data import load_dataset, tokenizers
from transformer_jax.finetuning import peft, select
from transformer_jax.models import build_model, init_params, presets
from transformer_jax.pretrained import config_conversion, safetensors_io, sentencepiece_model
from transformer_jax.pretrained import tokenizer as pretrained_tokenizer

SECONDS, MEMORY = 5, 2 * 2**30
EXPECTED = (ValueError, FileNotFoundError)
# Values that have hurt readers before.
VALUES = (None, True, False, 0, 1, -1, 2**31, 2**63, -(2**70), 10**10, 1e308, -0.0, float("nan"),
          float("inf"), "", "a", "\x00", "\ud800", "é" * 50, [], {}, [[]], [None], {"a": {}},
          [1, 2, 3], "1" * 5000, 3.5)


class TooLong(Exception):
    """A reader took more than its time."""


class Target(NamedTuple):
    """A reader, good inputs for it, and how they are changed."""

    read: Callable
    good: list
    change: Callable[[object, random.Random], object]


# How input goes bad -------------------------------------------------------------------------------


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bits, cuts, copies, splices, numbers."""
    new = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        place = rng.randrange(len(new) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 32))
        match rng.randrange(7):
            case 0 if new:
                new[place % len(new)] ^= 1 << rng.randrange(8)
            case 1:
                del new[place : place + length]
            case 2:
                new[place:place] = new[place : place + length] * rng.choice((1, 2, 50))
            case 3:
                new[place:place] = rng.randbytes(length)
            case 4:
                new[place : place + length] = rng.choice((b"\xff", b"\x00", b"\x80")) * length
            case 5:
                other = rng.randrange(len(new) + 1)
                new[place:place] = new[other : other + length]
            case 6:
                new[place:place] = rng.choice((b"[", b"{", b'"', b"\t", b"\n", b"\r", b"[[" * 30000,
                                               b"9" * 5000, b"\xed\xa0\x80", b"\\ud800", b"1e999"))
    return bytes(new)


def change_json(value, rng: random.Random):
    """Another value somewhere in it, a field less, or one more."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = value
        while isinstance(at, dict | list) and at:
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            if not isinstance(at[key], dict | list) or not at[key] or rng.random() < 0.3:
                break
            at = at[key]
        if not isinstance(at, dict | list) or not at:
            return copy.deepcopy(rng.choice(VALUES))
        action = rng.random()
        if action < 0.15:
            del at[key]
        elif action < 0.25 and isinstance(at[key], int | float):
            at[key] = at[key] * rng.choice((-1, 0, 2, 0.5, 10**9))
        elif action < 0.35:
            other = value[rng.choice(list(value))] if isinstance(value, dict) and value else None
            at[key] = json.loads(json.dumps(other))
        else:
            at[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def change_text(text: str, rng: random.Random) -> str:
    """As bytes, and read again; also characters of every plane."""
    if rng.random() < 0.3:
        place = rng.randrange(len(text) + 1)
        more = "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x110000))))
                       for _ in range(rng.randint(1, 8)))
        return text[:place] + more + text[place:]
    return change_bytes(text.encode(errors="surrogatepass"), rng).decode(errors="replace")


# What is read -------------------------------------------------------------------------------------


def weights(folder: Path) -> Target:
    """A safetensors file, of which every tensor that its header has is read."""
    values = [np.arange(12, dtype=np.float32).reshape(3, 4), np.ones(5, np.float16),
              np.array(3, np.int64)]
    plan = [safetensors_io.TensorSpec(name, x.dtype, x.shape) for name, x in zip("abc", values)]
    safetensors_io.save_tensors(folder, plan, values, 10**9)
    path = folder / safetensors_io.WEIGHTS_FILE
    good = path.read_bytes()

    def read(data):
        path.write_bytes(data)
        for entry in safetensors_io.list_tensors(folder).values():
            safetensors_io.load_tensor(entry)

    def change(data, rng):
        if rng.random() < 0.5:
            return change_bytes(data, rng)
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(change_json(json.loads(data[8 : 8 + length]), rng)).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + length :]

    return Target(read, [good], change)


def index(folder: Path) -> Target:
    """An index of two shards."""
    values = [np.ones(5, np.float32), np.zeros(7, np.float32)]
    plan = [safetensors_io.TensorSpec(name, x.dtype, x.shape) for name, x in zip("ab", values)]
    safetensors_io.save_tensors(folder, plan, values, 21)
    path = folder / safetensors_io.INDEX_FILE

    def read(data):
        path.write_bytes(data)
        for entry in safetensors_io.list_tensors(folder).values():
            assert entry.file.parent == folder, f"a shard outside: {entry.file}"

    return Target(read, [path.read_bytes()], json_or_bytes)


def json_or_bytes(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return change_bytes(data, rng)
    return json.dumps(change_json(json.loads(data), rng)).encode()


def config(folder: Path) -> Target:
    """config.json of each family, and the model that it asks for, without its parameters."""
    tiny = {"num_layers": 1, "d_model": 8, "num_heads": 2, "mlp_dim": 32, "vocab_size": 20}
    good = [config_conversion.config_to_hf(presets.get(name, **tiny), task, 0)
            for name, task in (("gpt2", "causal_lm"), ("gpt1", "causal_lm"),
                               ("bert_base", "pretraining"), ("bart_base", "seq2seq_lm"))]
    good += [{"model_type": name, **{k: v for k, v in good[-1].items() if k != "model_type"}}
             for name in ("marian", "pegasus", "mbart")]

    def read(values):
        if isinstance(values, dict):
            build_model(config_conversion.config_from_hf(values))

    return Target(read, good, change_json)


def tokenizer(folder: Path) -> Target:
    """Files of tokenizers: a tokenizer.json, a word list, words and merges."""
    texts = ["the cat sat on the mat", "a dog ate the mat", "cats and dogs"] * 3
    tokenizers.train_bpe(texts, 300).save(folder / "bpe")
    whole = (folder / "bpe" / "tokenizer.json").read_bytes()
    vocab = json.loads(whole)["model"]["vocab"]
    merges = "\n".join(" ".join(m) if isinstance(m, list) else m
                       for m in json.loads(whole)["model"]["merges"])
    words = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\ncat\n##s\n"
    good = [("bert", {"vocab.txt": words}),
            ("bert", {"vocab.txt": words, "tokenizer_config.json": b'{"do_lower_case": true}'}),
            ("gpt2", {"vocab.json": json.dumps(vocab).encode(), "merges.txt": merges.encode()}),
            ("openai-gpt", {"vocab.json": b'{"a": 0, "b</w>": 1, "ab</w>": 2, "<unk>": 3}',
                            "merges.txt": b"#version: 0.2\na b</w>\n"}),
            ("gpt2", {"tokenizer.json": whole})]
    place = folder / "read"
    place.mkdir()

    def read(value):
        family, files = value
        for path in place.iterdir():
            path.unlink()
        for name, data in files.items():
            (place / name).write_bytes(data)
        made = pretrained_tokenizer.load(place, {"model_type": family})
        if made is not None:
            made.decode(made.encode("the cats"))

    def change(value, rng):
        family, files = value
        name = rng.choice(list(files))
        how = json_or_bytes if name.endswith(".json") else change_bytes
        return family, files | {name: how(files[name], rng)}

    return Target(read, good, change)


def pieces(folder: Path) -> Target:
    """A SentencePiece model, in the wire format of protocol buffers."""
    def field(number, kind, data):
        return bytes([number << 3 | kind]) + (bytes([len(data)]) if kind == 2 else b"") + data

    def piece(text, kind):
        return field(1, 2, field(1, 2, text) + field(2, 5, np.float32(-1.5).tobytes())
                     + field(3, 0, bytes([kind])))

    good = (piece(b"<unk>", 2) + piece(b"</s>", 3) + piece("▁a".encode(), 1) + piece(b"b", 1)
            + field(2, 2, field(3, 0, b"\x01")) + field(3, 2, field(3, 0, b"\x01")))
    path = folder / "source.spm"

    def read(data):
        path.write_bytes(data)
        sentencepiece_model.load_model(path)

    return Target(read, [good], change_bytes)


def table(folder: Path) -> Target:
    """Annotated rows in .tsv, .csv and .jsonl."""
    tsv = b"text\tlabel\n" + b"".join(b"row %d\t%d\n" % (i, i % 2) for i in range(6))
    lines = b"".join(json.dumps({"text": f"row {i}", "label": i % 2}).encode() + b"\n"
                     for i in range(6))
    spans = b"".join(json.dumps({
        "question": "who", "context": "it was me", "answers": {"text": ["me"],
                                                               "answer_start": [7]}}).encode()
        + b"\n" for _ in range(4))
    good = [(".tsv", tsv), (".csv", tsv.replace(b"\t", b",")), (".jsonl", lines),
            (".jsonl", spans)]

    def read(value):
        kind, data = value
        path = folder / f"train{kind}"
        path.write_bytes(data)
        load_dataset(path, validation_fraction=0.3)

    def change(value, rng):
        kind, data = value
        if kind != ".jsonl" or rng.random() < 0.5:
            return kind, change_bytes(data, rng)
        rows = data.splitlines()
        place = rng.randrange(len(rows))
        rows[place] = json.dumps(change_json(json.loads(rows[place]), rng)).encode()
        return kind, b"\n".join(rows)

    return Target(read, good, change)


def recipes(folder: Path) -> Target:
    """Recipes on a small model, with the parameters that they add, described and not made."""
    model = build_model(presets.bert_tiny(vocab_size=20, num_layers=2, d_model=8, num_heads=2,
                                          mlp_dim=8, max_length=8), 2, "classification")
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    good = ["full", "head", "last_k:1", "layers:0-1", "embeddings", "bitfit+layernorm",
            "lora:2:query,value", "lora:2:all,alpha=16,dropout=0.05,rslora", "lora:2:all,dora",
            "adapter:4", "prefix:2", "prompt:2", "ia3", "regex:layer_1/.*kernel"]

    def read(text):
        changed = jax.eval_shape(lambda p: peft.add_peft_params(p, text, jax.random.key(0)), shapes)
        select.trainable_mask(changed, text)

    def change(text, rng):
        words = ["lora", "last_k", "layers", "regex", "adapter", ":", "+", ",", "=", "-", "all",
                 "0", "-1", "999999999999", "1e9", "nan", "(", "[", "(a+)+$", ".*", "\n"]
        if rng.random() < 0.6:
            place = rng.randrange(len(text) + 1)
            return text[:place] + rng.choice(words) + text[place + rng.choice((0, 1, 3)) :]
        return change_text(text, rng)

    return Target(read, good, change)


def prompts(folder: Path) -> Target:
    """Texts into tokens and back."""
    texts = ["the cat sat on the mat", "a dog ate it", "[CLS] the [MASK] [SEP]", ""]
    made = [train(texts * 3, size) for train, size in (
        (tokenizers.train_bpe, 300), (tokenizers.train_wordpiece, 120))]
    made.append(tokenizers.train_chars(texts))

    def read(text):
        for tokenizer in made:
            tokenizer.decode(tokenizer.encode(text))

    return Target(read, texts, change_text)


TARGETS = {f.__name__: f for f in (weights, index, config, tokenizer, pieces, table, recipes,
                                   prompts)}


# The trial ----------------------------------------------------------------------------------------


def attempt(target: Target, value) -> str | None:
    """What went wrong, where it was not an error of ours: its last line and place."""
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            target.read(value)
    except EXPECTED as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        # A UnicodeError is a ValueError that says nothing to whoever wrote the file.
        return None if type(error) in (*EXPECTED, json.JSONDecodeError) else _where(error)
    except BaseException as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if isinstance(error, KeyboardInterrupt):
            raise
        return _where(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def _where(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__)
              if "transformer_jax" in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {place}: {str(error)[:100]}"


def trial(name: str, inputs: int, seed: int = 0) -> dict:
    """So many inputs for a reader: how many it took, and what it could not."""
    found, took, longest = collections.Counter(), time.time(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        target = TARGETS[name](Path(folder))
        for value in target.good:
            target.read(value)
        for number in range(inputs):
            rng = random.Random(f"{name} {seed} {number}")
            value = target.change(rng.choice(target.good), rng)
            began = time.perf_counter()
            wrong = attempt(target, value)
            longest = max(longest, time.perf_counter() - began)
            if wrong is not None:
                if wrong not in found:
                    print(f"{name}, seed {seed}, input {number}: {wrong}\n  {str(value)[:300]!r}",
                          flush=True)
                found[wrong] += 1
    return {"inputs": inputs, "wrong": dict(found), "longest_seconds": round(longest, 2),
            "seconds": round(time.time() - took)}


def main(inputs: int, targets: list[str], seed: int = 0) -> dict:
    """All of them, in bounded memory."""
    def late(*_):
        raise TooLong(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    held = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, limits[1]))
    try:
        results = {}
        for name in targets:
            results[name] = trial(name, inputs, seed)
            print(name, json.dumps(results[name]), flush=True)
        return results
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    failed = any(r["wrong"] for r in main(**vars(arguments)).values())
    sys.exit(1 if failed else 0)
