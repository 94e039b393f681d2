"""Masks: a language model that sees the future learns to copy it, and cannot write.

    python experiments/study.py masks

Claims: a decoder has to be trained under the causal mask, for without it the loss is low because
the answer is in the input, and what is written then is no language; an encoder looks both ways, a
decoder back only, and cross-attention says which word of the source a word of the target is about.

The same GPT is trained twice on the characters of Python's documentation, with the mask and without
it. A small Transformer learns to spell the words there backwards: what it looks at is known.

One core of an AMD EPYC: 195 s. Without the mask the training loss is 0.04 nats a character and 5.97
once the future is hidden; with it 1.49, and 1.64 on unseen text. After "Return the " the one writes
"contains a statement the set the self.", the other "RernRererunett Renennunen". All 256 words that
the Transformer had not seen are spelt backwards, and for every letter that it writes the mean head
looks most at that letter in the source.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from studies import small
from studies.pictures import Bars, Line, Lines, show
from transformer_jax.data import sources
from transformer_jax.data.batching import make_loader
from transformer_jax.models import GPT, Transformer, init_params, presets
from transformer_jax.nn.attention import Mask
from transformer_jax.nn.blocks import Stack
from transformer_jax.objectives import causal_lm, seq2seq
from transformer_jax.recipes.config import OptimizerConfig
from transformer_jax.recipes.pretraining import PretrainConfig
from transformer_jax.report import plots
from transformer_jax.train import step

PROMPT = "Return the "
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAD, START, END = 0, 1, 2  # then the letters


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Attributes:
        num_steps: of both GPTs; spelling_steps: of the Transformer.
        written: characters to write.
        word: what the pictures of attention are of.
    """

    out: Path = Path("runs/masks")
    num_layers: int = 2
    d_model: int = 128
    length: int = 64
    batch_size: int = 32
    num_steps: int = 600
    spelling_steps: int = 1500
    spelling_width: int = 64
    peak_lr: float = 2e-3
    written: int = 80
    word: str = "documentation"
    seed: int = 0


def config() -> Masks:
    return Masks()


def large() -> Masks:
    return Masks(num_layers=6, d_model=384, length=256, batch_size=64, num_steps=5000,
                 spelling_steps=5000, spelling_width=256)


def smallest() -> Masks:
    return Masks(num_layers=1, d_model=16, length=16, batch_size=4, num_steps=4, spelling_steps=4,
                 spelling_width=16, written=4)


def apply_under(model: GPT, mask: Mask):
    """`model.apply` under another mask than the causal one: a mask is data, and the parameters do
    not know which they are used with."""
    stack = Stack(model.config.stack)

    def apply(variables, tokens, **_):
        params = variables["params"]
        x = params["token_embed"]["embedding"][tokens]
        x = x + params["position_embed"]["embedding"][: tokens.shape[1]]
        hidden = stack.apply({"params": params["decoder"]}, x, mask).hidden
        return SimpleNamespace(logits=hidden @ params["token_embed"]["embedding"].T)

    return apply


def write_text(model: GPT, params, tokenizer, causal: bool, count: int, length: int) -> str:
    """The likeliest character, again and again, each from all before it: what comes after is not
    there yet, so it is hidden whatever the mask of training was."""

    @jax.jit
    def following(tokens, n):
        real = jnp.arange(length)[None] < n
        apply = apply_under(model, Mask(causal=causal, padding_mask=real))
        return apply({"params": params}, tokens).logits[0, n - 1].argmax()

    ids = tokenizer.encode(PROMPT)
    for _ in range(count):
        seen = ids[-length:]
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(seen)] = seen
        ids.append(int(following(tokens, len(seen))))
    return tokenizer.decode(ids)


def both_masks(c: Masks) -> tuple[dict, dict[str, small.Trained]]:
    """Numbers and curves of the GPT that is trained with the mask and of the one without."""
    corpus = small.read(PretrainConfig(
        model=presets.gpt2(num_layers=c.num_layers, d_model=c.d_model, num_heads=4,
                           mlp_dim=4 * c.d_model, max_length=c.length, dropout_rate=0.0,
                           attention_dropout_rate=0.0, init_std=0.05),
        objective="causal_lm", tokenizer="chars", max_length=c.length, batch_size=c.batch_size,
        num_steps=c.num_steps, out=c.out))
    model = GPT(corpus.settings.model)
    held_out = corpus.held_out.evaluation_batches(c.batch_size, max_batches=32)
    found, trained = {}, {}
    for name, causal in (("with the causal mask", True), ("without it", False)):
        loss = functools.partial(causal_lm.loss, apply_under(model, Mask(causal=causal)))
        trained[name] = small.train(
            name, loss, init_params(model, jax.random.key(c.seed)),
            corpus.train.loader(c.batch_size, seed=c.seed), c.num_steps,
            OptimizerConfig(peak_lr=c.peak_lr, warmup_steps=c.num_steps // 10), seed=c.seed)
        # What counts: the next character where nothing of what follows is there.
        hidden = step.make_eval_step(functools.partial(
            causal_lm.loss, apply_under(model, Mask(causal=True))))
        params = trained[name].params
        text = write_text(model, params, corpus.tokenizer, causal, c.written, c.length)
        found[name] = {
            "training_loss": trained[name].history[-1]["loss"],
            "loss_without_the_future": step.evaluate(hidden, params, held_out)["loss"],
            "writes": text}
        print(f"  {found[name]}", flush=True)
    return found, trained


def words_of(corpus_text: str, longest: int) -> list[str]:
    found = {word.strip(".,;:()'\"`").lower() for word in corpus_text.split()}
    return sorted(w for w in found if 3 < len(w) <= longest and set(w) <= set(LETTERS))


def spell(c: Masks) -> tuple[dict, dict[str, np.ndarray]]:
    """The Transformer that spells backwards: its share of right words, and its attention."""
    source = sources.load_source("python_docs/documents", "train")
    longest = 14
    words = words_of(" ".join(source[i]["text"] for i in range(len(source))), longest)
    words = [w for w in words if w != c.word]
    order = np.random.default_rng(c.seed).permutation(len(words))
    ids = [np.array([LETTERS.index(ch) + 3 for ch in words[i]]) for i in order]
    rows = [{"source": word, "target": word[::-1]} for word in ids]
    prepare = functools.partial(seq2seq.prepare, source_length=longest + 2,
                                target_length=longest + 2, start_id=START, eos_id=END, pad_id=PAD)
    held_out, rows = rows[:256], rows[256:]
    model = Transformer(presets.transformer_base(
        num_layers=2, d_model=c.spelling_width, num_heads=2, mlp_dim=2 * c.spelling_width,
        vocab_size=len(LETTERS) + 3, max_length=longest + 2, dropout_rate=0.0))
    trained = small.train(
        "spelling backwards", functools.partial(seq2seq.loss, model.apply),
        init_params(model, jax.random.key(c.seed)),
        make_loader(rows, 64, transform=prepare, seed=c.seed), c.spelling_steps,
        OptimizerConfig(peak_lr=2e-3, warmup_steps=c.spelling_steps // 10, clip_norm=1.0), seed=c.seed)

    def stacked(some):
        made = [prepare(row) for row in some]
        return {name: np.stack([row[name] for row in made]) for name in made[0]}

    run = jax.jit(lambda batch: model.apply(
        {"params": trained.params}, batch["tokens"], batch["decoder_tokens"],
        padding_mask=batch["padding_mask"]))
    batch = stacked(held_out)
    right = np.asarray(run(batch).logits.argmax(-1)) == batch["targets"]
    shown = np.array([LETTERS.index(ch) + 3 for ch in c.word])
    out = run(stacked([{"source": shown, "target": shown[::-1]}] * 2))
    n = len(c.word) + 1
    maps = {name: np.asarray(getattr(out, name)[-1][0]).mean(0)[:n, :n]
            for name in ("encoder_attention", "attention", "cross_attention")}
    weighed = np.fliplr(maps["cross_attention"][: n - 1, : n - 1])
    return {"words_right": float((right | (batch["weights"] == 0)).all(1).mean()),
            "looks_at_its_letter": float((weighed.argmax(1) == np.arange(n - 1)).mean()),
            "curve": trained.curve()}, maps


def run(c: Masks) -> dict:
    found, trained = both_masks(c)
    spelled, maps = spell(c)
    colors = {"with the causal mask": "C0", "without it": "C3"}
    show(c.out / "masks.png", {
        "A training loss that is too good": Lines({
            name: Line(*trained[name].curve(), color=color) for name, color in colors.items()},
            ylabel="training loss (nats a character)"),
        "The same two models, asked what comes next": Bars(
            {name: [found[name]["training_loss"], found[name]["loss_without_the_future"]]
             for name in colors}, ["as it was trained", "the future hidden"], format="{:.2f}",
            colors=colors, ylabel="loss (nats a character)"),
    }, title="What they write: " + "\n".join(
        f"{name}, {found[name]['writes'][:68]!r}" for name in colors))
    letters, backwards = [*c.word, "END"], [*c.word[::-1], "END"]
    plots.attention(c.out / "encoder.png", {
        "looks both ways": maps["encoder_attention"]}, letters, title="Encoder, last layer")
    plots.attention(c.out / "decoder.png", {
        "looks back only": maps["attention"]}, ["START", *backwards[:-1]],
        title="Decoder, last layer")
    plots.attention(c.out / "cross_attention.png", {
        "to write (down), read (across)": maps["cross_attention"]}, backwards, letters,
        title="Cross-attention, spelling backwards")
    return {"gpt": found, "spelling": spelled}
