"""Saved models from the shell.

    python -m transformer_jax generate gpt2 "Once upon a time" --temperature 0.8 --top-p 0.95
    python -m transformer_jax fill runs/bert "I ate an [MASK] today."
    python -m transformer_jax classify runs/topics "Parse an XML document."
    python -m transformer_jax translate runs/multi30k_de_en "Zwei Hunde spielen im Schnee."
    python -m transformer_jax summarize facebook/bart-large-cnn < article.txt
    python -m transformer_jax convert runs/bert exported
    python -m transformer_jax plan gpt2_xl --topology v5e:16x16 --mesh.data 16 --mesh.fsdp 16
    python -m transformer_jax report runs/bert

MODEL is the folder of a training run, a folder in the Hugging Face format, or an id on the hub.
Texts that are not given are read from standard input, a line each (`summarize`: all of it is one).
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from transformer_jax.cli.inspect import plan, report
from transformer_jax.generation.defaults import drop_unused_options, generation_options
from transformer_jax.pretrained import load_pretrained, save_pretrained
from transformer_jax.pretrained.runs import LoadedRun, is_run, load_run

Text = tyro.conf.Positional[tuple[str, ...]]
Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]


def load(source: str, task: str | None = None) -> LoadedRun:
    """The model of a run, or of a checkpoint in the Hugging Face format.

    Raises:
        FileNotFoundError: the source is neither.
        ValueError: it has no tokenizer, or not the task's head.
    """
    if is_run(source):
        return load_run(source)
    found = load_pretrained(source, task)
    if found.tokenizer is None:
        raise ValueError(f"{source} has no tokenizer; add its tokenizer.json or vocabulary files")
    return LoadedRun(found.model, found.params, found.tokenizer, _label_names(found.model))


def _label_names(model) -> list[str]:
    """id2label of the checkpoint's own configuration, else numbers."""
    names = json.loads(model.config.source or "{}").get("id2label", {})
    return [names.get(str(i), str(i)) for i in range(model.num_classes)]


def _texts(texts: Sequence[str], whole: bool = False) -> list[str]:
    """Those given, or standard input's lines, or all of it as one."""
    if not texts:
        read = sys.stdin.read()
        texts = [read.strip()] if whole else [line for line in read.splitlines() if line.strip()]
    if not any(text.strip() for text in texts):
        raise ValueError("there is no text; give some as an argument or on standard input")
    return list(texts)


def _writes(model, kind: str) -> None:
    """Refuse a model that cannot do what was asked, by its kind's name."""
    from transformer_jax import models

    if not isinstance(model, getattr(models, kind)):
        raise ValueError(f"the model is a {type(model).__name__}; this needs a {kind}")


class Printer:
    """Prints a text as it grows: a streamer of `generate` for one row."""

    def __init__(self, decode: Callable[[list[int]], str], ends: set[int]):
        self.decode, self.ends = decode, ends
        self.ids: list[int] = []
        self.shown = ""

    def __call__(self, tokens: np.ndarray) -> None:
        if int(tokens[0]) in self.ends:
            return
        self.ids.append(int(tokens[0]))
        text = self.decode(self.ids)
        # A character of several bytes may be only begun.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.show(text)

    def show(self, text: str) -> None:
        print(text[len(self.shown) :], end="", flush=True)
        self.shown = text

    def finish(self) -> None:
        """What is left, and a line end."""
        self.show(self.decode(self.ids))
        print(flush=True)


def generate(
    model: Model,
    text: Text = (),
    /,
    max_new_tokens: int = 60,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    no_repeat_ngram_size: int = 0,
    weights: str = "float32",
    seed: int = 0,
) -> None:
    """Continue texts with GPT, each as it is written.

    Args:
        model: a run's folder, a Hugging Face folder, or a hub id.
        text: prompts.
        max_new_tokens: at most so many; an end-of-text token, or the last position, ends earlier.
        temperature: draw tokens instead of taking the best; likewise top_k and top_p.
        top_k: draw among the k best.
        top_p: draw among the best whose probability reaches p.
        num_beams: above 1, search for the best text; it is printed when it is found.
        no_repeat_ngram_size: no so many tokens come twice.
        weights: float32, bfloat16 or int8: how parameters are kept; int8 is faster on a CPU, and
            nearly the same.
        seed: of what is drawn.
    """
    import jax

    from transformer_jax.finetuning import quantize
    from transformer_jax.generation import generate as write

    found = load(model, "causal_lm")
    _writes(found.model, "GPT")
    nothing_trains = jax.tree.map(lambda x: False, found.params)
    found = found._replace(params=quantize.quantize_frozen(found.params, nothing_trains, weights)[0])
    t = found.tokenizer
    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    options = {name: value for name, value in drawn.items() if value is not None}
    if options:
        options |= {"do_sample": True, "rng": jax.random.key(seed)}
    eos = found.model.config.eos_token_id
    ends = t.eos_id if eos is None else eos
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    for prompt in _texts(text):
        ids = t.encode(prompt)
        print(prompt, end="", flush=True)
        printer = Printer(t.decode, set(ends))
        room = max(found.model.config.max_length - len(ids), 1)
        row = write(found.model, found.params, [ids], max_new_tokens=min(max_new_tokens, room),
                    eos_token_id=ends, num_beams=num_beams,
                    streamer=None if num_beams > 1 else printer,
                    no_repeat_ngram_size=no_repeat_ngram_size, **options)[0]
        if num_beams > 1:
            printer.ids = [int(i) for i in row[len(ids) :]]
        printer.finish()


def fill(model: Model, text: Text = (), /, top_k: int = 5) -> None:
    """The likeliest words for each mask of a text, with their probabilities.

    Args:
        model: a run's folder, a Hugging Face folder, or a hub id; of the BERT family.
        text: with the mask token of the model's vocabulary, such as [MASK] or <mask>.
        top_k: words for each mask.
    """
    from transformer_jax.generation import fill_mask
    from transformer_jax.objectives.input_format import pack_bert_input

    found = load(model, "masked_lm")
    _writes(found.model, "BERT")
    t = found.tokenizer
    if t.mask_id is None:
        raise ValueError(f"the vocabulary of {model} has no mask token")
    for line in _texts(text):
        ids = t.encode(line)
        row = pack_bert_input(ids, length=len(ids) + 2, cls_id=t.cls_id, sep_id=t.sep_id)
        print(line)
        for found_mask in fill_mask(found.model, found.params, row["tokens"], mask_id=t.mask_id,
                                    top_k=top_k):
            print("  " + ", ".join(f"{t.decode([int(i)]).strip()} {p:.3f}" for i, p in zip(
                found_mask.token_ids, found_mask.probabilities)))


def classify(model: Model, text: Text = (), /, top_k: int = 5) -> None:
    """The likeliest classes of each text, with their probabilities.

    Args:
        model: the folder of a fine-tuned run, a Hugging Face folder, or a hub id.
        text: to classify; a tab parts the two texts of a pair.
        top_k: classes for each text.
    """
    import jax

    from transformer_jax.objectives.classification import SpecialTokens, make_input_packer

    found = load(model, "classification")
    if not found.model.num_classes or not found.label_names:
        raise ValueError(f"{model} has no classifier; fine-tune it first (experiments/finetune.py)")
    new = "extra" in found.params["token_embed"]
    as_row = make_input_packer(found.model, found.tokenizer, found.model.config.max_length,
                      SpecialTokens.new(found.model.config.vocab_size) if new else None)
    for line in _texts(text):
        row = as_row(*map(found.tokenizer.encode, line.split("\t", 1)))
        logits = found.model.apply(
            {"params": found.params}, row["tokens"][None], method="classification_logits",
            padding_mask=row["padding_mask"][None], segment_ids=row["segment_ids"][None])
        share = np.asarray(jax.nn.softmax(logits[0]))
        best = np.argsort(-share)[:top_k]
        print(f"{line}\n  " + ", ".join(f"{found.label_names[i]} {share[i]:.3f}" for i in best))


def translate(
    model: Model,
    text: Text = (),
    /,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    max_new_tokens: int | None = None,
    no_repeat_ngram_size: int | None = None,
) -> None:
    """The targets of an encoder-decoder for texts, a line each, as batches are done.

    What is not given is as the checkpoint has it; where it does not say, 5 beams, a length penalty
    of 0.6 and at most 128 tokens.

    Args:
        model: a run's folder, a Hugging Face folder, or a hub id; of an encoder-decoder.
        text: sources.
        num_beams: of the beam search; 1 is greedy.
        length_penalty: above 0 favours long texts.
        max_new_tokens: at most so many.
        no_repeat_ngram_size: no so many tokens come twice.
    """
    given = {"num_beams": num_beams, "length_penalty": length_penalty,
             "max_new_tokens": max_new_tokens, "no_repeat_ngram_size": no_repeat_ngram_size}
    usual = {"num_beams": 5, "length_penalty": 0.6, "max_length": 129}
    for line in _write(model, _texts(text), given, usual):
        print(line, flush=True)


def summarize(
    model: Model,
    text: Text = (),
    /,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    max_new_tokens: int | None = None,
    min_new_tokens: int | None = None,
    no_repeat_ngram_size: int | None = None,
) -> None:
    """A summary of each text by an encoder-decoder.

    What is not given is as the checkpoint has it; where it does not say, 4 beams, a length penalty
    of 2, at most 142 tokens, and no three of them twice.

    Args:
        model: a run's folder, a Hugging Face folder, or a hub id; of an encoder-decoder.
        text: to summarize; standard input is one text.
        num_beams: of the beam search; 1 is greedy.
        length_penalty: above 0 favours long texts.
        max_new_tokens: at most so many.
        min_new_tokens: at least so many.
        no_repeat_ngram_size: no so many tokens come twice.
    """
    given = {"num_beams": num_beams, "length_penalty": length_penalty,
             "max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens,
             "no_repeat_ngram_size": no_repeat_ngram_size}
    usual = {"num_beams": 4, "length_penalty": 2.0, "max_length": 143, "no_repeat_ngram_size": 3}
    for line in _write(model, _texts(text, whole=True), given, usual):
        print(line, flush=True)


def _write(
    source: str, texts: list[str], given: dict, usual: dict, *, batch_size: int = 16
) -> Iterator[str]:
    """Targets for texts, in their order. Sources longer than the positions are cut, and said so."""
    from transformer_jax.generation import generate as write

    found = load(source, "seq2seq_lm")
    _writes(found.model, "Transformer")
    t, room = found.tokenizer, found.model.config.max_length
    options = writing_options(found.model.config, given, usual)
    for k in range(0, len(texts), batch_size):
        rows = t.encode_batch(texts[k : k + batch_size], add_special=True)
        for i, row in enumerate(rows):
            if len(row) > room:
                print(f"text {k + i + 1} has {len(row)} tokens; only the first {room} are read",
                      file=sys.stderr)
                rows[i] = [*row[: room - 1], row[-1]]
        for ids in write(found.model, found.params, rows, **options):
            yield t.decode(ids).strip()


def writing_options(config, given: dict, usual: dict) -> dict:
    """Of each option what is given, else what the checkpoint says, else what is usual."""
    given = {name: value for name, value in given.items() if value is not None}
    one_text = {"do_sample": False, "num_return_sequences": 1}
    options = drop_unused_options(usual | generation_options(config) | given | one_text)
    most = {"max_new_tokens": config.max_length - 1, "max_length": config.max_length}
    return options | {name: min(options[name], most[name]) for name in most if name in options}


def convert(model: Model, out: tyro.conf.Positional[Path], /, task: str | None = None) -> None:
    """Write a run or a checkpoint in the Hugging Face format, as safetensors.

    Args:
        model: a run's folder, a Hugging Face folder, or a hub id.
        out: the folder to write.
        task: the head to write, such as causal_lm; the model's own if not given.
    """
    found = load_run(model) if is_run(model) else load_pretrained(model, task)
    save_pretrained(out, found.model, found.params, found.tokenizer)
    print(f"{out}: {', '.join(sorted(path.name for path in Path(out).iterdir()))}")


COMMANDS = {"generate": generate, "fill": fill, "classify": classify, "translate": translate,
            "summarize": summarize, "convert": convert, "plan": plan, "report": report}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input is one line on standard error and exit status 2."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="python -m transformer_jax", description=__doc__, args=arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0
