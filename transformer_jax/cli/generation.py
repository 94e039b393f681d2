"""Commands that generate text: `generate`, `fill`, `translate` and `summarize`."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from transformer_jax.cli.command import (
    ModelArgument,
    TextArguments,
    check_family,
    given,
    optional,
    read_texts,
)

if TYPE_CHECKING:
    import numpy as np

    from transformer_jax.models import Model


def generate(
    model: ModelArgument,
    texts: TextArguments = (),
    /,
    max_new_tokens: int = 60,
    temperature: Annotated[float | None, optional("FLOAT")] = None,
    top_k: Annotated[int | None, optional("INT")] = None,
    top_p: Annotated[float | None, optional("FLOAT")] = None,
    num_beams: int = 1,
    no_repeat_ngram_size: int = 0,
    weights: Literal["float32", "bfloat16", "int8"] = "float32",
    seed: int = 0,
) -> None:
    """Continues texts with GPT and prints them token by token.

        transformer-jax generate gpt2 "Once upon a time" --temperature 0.8 --top-p 0.95

    Args:
        model: folder of a run or a checkpoint, or an id on the Hugging Face Hub.
        texts: prompts; by default, the lines of standard input.
        max_new_tokens: maximum number of generated tokens; an end-of-text token, or the model's
            last position, ends a text earlier.
        temperature: sample with logits divided by this value; without temperature, top_k or top_p,
            decoding is greedy.
        top_k: sample from the k most probable tokens.
        top_p: sample from the most probable tokens with total probability p.
        num_beams: number of beams; 1 for no beam search. The text of a beam search is printed at
            its end.
        no_repeat_ngram_size: size of the n-grams that are not generated twice; 0 for no limit.
        weights: dtype of the parameters in memory; int8 is faster on a CPU, but less exact.
        seed: random seed of sampling.
    """
    import jax

    from transformer_jax.finetuning import frozen
    from transformer_jax.generation import generate as generate_tokens
    from transformer_jax.pretrained import load_model

    found = load_model(model, "causal_lm")
    check_family(found.model, "GPT")
    tokenizer, max_length = found.tokenizer, found.model.config.max_length
    all_frozen = jax.tree.map(lambda x: False, found.params)
    params = frozen.quantize_frozen(found.params, all_frozen, weights)[0]
    options = given(temperature=temperature, top_k=top_k, top_p=top_p)
    if options:
        options |= {"do_sample": True, "rng": jax.random.key(seed)}
    eos = found.model.config.eos_token_id
    eos = tokenizer.eos_id if eos is None else eos
    eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    for prompt in read_texts(texts):
        ids = tokenizer.encode(prompt)
        print(prompt, end="", flush=True)
        printer = TextPrinter(tokenizer.decode, set(eos_ids))
        [row] = generate_tokens(
            found.model, params, [ids],
            max_new_tokens=min(max_new_tokens, max(max_length - len(ids), 1)),
            eos_token_id=eos_ids, num_beams=num_beams,
            streamer=None if num_beams > 1 else printer,
            no_repeat_ngram_size=no_repeat_ngram_size, **options)
        if num_beams > 1:
            printer.ids = [int(i) for i in row[len(ids) :]]
        printer.finish()


class TextPrinter:
    """Prints a text while it is generated; a `streamer` of `generation.generate` for one row.

    Args:
        decode: converts token ids to text.
        eos_ids: end-of-text tokens, which are not printed.
    """

    def __init__(self, decode: Callable[[list[int]], str], eos_ids: set[int]):
        self.decode, self.eos_ids = decode, eos_ids
        self.ids: list[int] = []
        self.printed = ""

    def __call__(self, tokens: "np.ndarray") -> None:
        """Prints the next token; `tokens` is `[1]`."""
        if int(tokens[0]) in self.eos_ids:
            return
        self.ids.append(int(tokens[0]))
        text = self.decode(self.ids)
        # A multi-byte character is printed when all of its tokens have been generated.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._print(text)

    def _print(self, text: str) -> None:
        print(text[len(self.printed) :], end="", flush=True)
        self.printed = text

    def finish(self) -> None:
        """Prints the rest of the text and a line break."""
        self._print(self.decode(self.ids))
        print(flush=True)


def fill(model: ModelArgument, texts: TextArguments = (), /, top_k: int = 5) -> None:
    """Fills masks with BERT: prints the most probable words and their probabilities.

        transformer-jax fill runs/bert "I ate an [MASK] today."

    Args:
        model: folder of a run or a checkpoint, or an id on the Hugging Face Hub.
        texts: texts with the model's mask token, such as [MASK] or <mask>; by default, the lines
            of standard input.
        top_k: number of words for each mask.
    """
    from transformer_jax.generation import fill_mask
    from transformer_jax.objectives.input_format import pack_bert_input
    from transformer_jax.pretrained import load_model

    found = load_model(model, "masked_lm")
    check_family(found.model, "BERT")
    tokenizer = found.tokenizer
    if tokenizer.mask_id is None:
        raise ValueError(f"the vocabulary of {model} has no mask token; use a model that was "
                         "pre-trained by masked language modeling")
    for text in read_texts(texts):
        ids = tokenizer.encode(text)
        row = pack_bert_input(
            ids, length=len(ids) + 2, cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id)
        print(text)
        for mask in fill_mask(found.model, found.params, row["tokens"],
                              mask_id=tokenizer.mask_id, top_k=top_k):
            words = [tokenizer.decode([int(i)]).strip() for i in mask.token_ids]
            print("  " + ", ".join(f"{w} {p:.3f}" for w, p in zip(words, mask.probabilities)))


def translate(
    model: ModelArgument,
    texts: TextArguments = (),
    /,
    num_beams: Annotated[int | None, optional("INT")] = None,
    length_penalty: Annotated[float | None, optional("FLOAT")] = None,
    max_new_tokens: Annotated[int | None, optional("INT")] = None,
    no_repeat_ngram_size: Annotated[int | None, optional("INT")] = None,
) -> None:
    """Translates texts with an encoder-decoder and prints one translation per line.

        transformer-jax translate runs/multi30k_de_en "Zwei Hunde spielen im Schnee."

    The defaults of the options are those of the checkpoint; if it has none: 5 beams, a length
    penalty of 0.6 and at most 128 tokens.

    Args:
        model: folder of a run or a checkpoint, or an id on the Hugging Face Hub.
        texts: source texts; by default, the lines of standard input.
        num_beams: number of beams; 1 for greedy decoding.
        length_penalty: exponent of the length by which scores are divided; larger values favor
            longer texts.
        max_new_tokens: maximum number of generated tokens.
        no_repeat_ngram_size: size of the n-grams that are not generated twice; 0 for no limit.
    """
    options = {"num_beams": num_beams, "length_penalty": length_penalty,
               "max_new_tokens": max_new_tokens, "no_repeat_ngram_size": no_repeat_ngram_size}
    defaults = {"num_beams": 5, "length_penalty": 0.6, "max_length": 129}
    for line in _generate_targets(model, read_texts(texts), options, defaults):
        print(line, flush=True)


def summarize(
    model: ModelArgument,
    texts: TextArguments = (),
    /,
    num_beams: Annotated[int | None, optional("INT")] = None,
    length_penalty: Annotated[float | None, optional("FLOAT")] = None,
    max_new_tokens: Annotated[int | None, optional("INT")] = None,
    min_new_tokens: Annotated[int | None, optional("INT")] = None,
    no_repeat_ngram_size: Annotated[int | None, optional("INT")] = None,
) -> None:
    """Summarizes texts with an encoder-decoder.

        transformer-jax summarize facebook/bart-large-cnn < article.txt

    The defaults of the options are those of the checkpoint; if it has none: 4 beams, a length
    penalty of 2, at most 142 tokens, and no repeated trigrams.

    Args:
        model: folder of a run or a checkpoint, or an id on the Hugging Face Hub.
        texts: texts to summarize; by default, all of standard input as one text.
        num_beams: number of beams; 1 for greedy decoding.
        length_penalty: exponent of the length by which scores are divided; larger values favor
            longer texts.
        max_new_tokens: maximum number of generated tokens.
        min_new_tokens: minimum number of generated tokens.
        no_repeat_ngram_size: size of the n-grams that are not generated twice; 0 for no limit.
    """
    options = {"num_beams": num_beams, "length_penalty": length_penalty,
               "max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens,
               "no_repeat_ngram_size": no_repeat_ngram_size}
    defaults = {"num_beams": 4, "length_penalty": 2.0, "max_length": 143,
                "no_repeat_ngram_size": 3}
    for line in _generate_targets(model, read_texts(texts, single=True), options, defaults):
        print(line, flush=True)


def _generate_targets(
    model_name: str, texts: Sequence[str], options: dict[str, Any], defaults: dict[str, Any], *,
    batch_size: int = 16,
) -> Iterator[str]:
    """Yields the target of each text. Sources longer than the model's max_length are truncated,
    with a message on standard error."""
    from transformer_jax.pretrained import load_model

    model, params, tokenizer, _ = load_model(model_name, "seq2seq_lm")
    check_family(model, "Transformer")
    max_length = model.config.max_length
    options = target_options(model, options, defaults)
    for start in range(0, len(texts), batch_size):
        rows = tokenizer.encode_batch(texts[start : start + batch_size], add_special_tokens=True)
        for i, row in enumerate(rows):
            if len(row) > max_length:
                print(f"text {start + i + 1} has {len(row)} tokens and is truncated to the "
                      f"model's {max_length} positions", file=sys.stderr)
                rows[i] = [*row[: max_length - 1], row[-1]]
        yield from generate_texts(
            model, params, tokenizer, rows, batch_size=len(rows), **options)


def target_options(
    model: "Model", options: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, Any]:
    """Returns the options of `generation.generate` for one target text per source.

    Args:
        model: the model, which holds the options of its checkpoint.
        options: options that replace those of the checkpoint unless they are None.
        defaults: values of options that neither `options` nor the checkpoint has.
    """
    from transformer_jax.generation.options import drop_unused_options, generation_options

    single_text = {"do_sample": False, "num_return_sequences": 1}
    options = drop_unused_options(
        defaults | generation_options(model) | given(**options) | single_text)
    max_length = model.config.max_length
    limits = {"max_new_tokens": max_length - 1, "max_length": max_length}
    return options | {
        name: min(options[name], limit) for name, limit in limits.items() if name in options}
