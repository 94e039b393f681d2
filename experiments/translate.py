"""Train the Transformer on pairs of texts, translate what was held out, and score it.

    python experiments/translate.py multi30k_de_en --data multi30k --out runs/de_en
    python experiments/translate.py multi30k_de_en --data tfds:ted_hrlr_translate/pt_to_en \
        --source pt --target en --held-out-split validation

The first word names a file in `experiments/configs`; every setting in it can be changed by a flag
(`--help`). The same command resumes a run that was stopped. `<out>` gets checkpoints, the
translations, `results.json` with sacreBLEU and its signature, the curves, and a picture of the
cross-attention for one sentence.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import common
import configs
import jax
import numpy as np
import tyro
from settings_seq2seq import Translate
from tensorboardX import SummaryWriter

from transformer_jax import metrics, sharding, tree
from transformer_jax.data import pairs, tokenizers
from transformer_jax.generation import generate, transpose_kernels_for_decoding
from transformer_jax.models import Transformer, build_model, config_to_dict, init_params
from transformer_jax.objectives import seq2seq
from transformer_jax.report import plots
from transformer_jax.train import checkpointing, loop, step

TRAINERS = {
    "bpe": functools.partial(tokenizers.train_bpe, specials=tokenizers.SEQ2SEQ_SPECIALS),
    "unigram": tokenizers.train_unigram,
}


def make_tokenizer(c: Translate, texts: Sequence[dict]) -> tokenizers.Tokenizer:
    """One vocabulary for both sides, trained on them or loaded from a folder."""
    if c.tokenizer not in TRAINERS:
        return tokenizers.load(c.tokenizer)
    both = [pair[side] for side in ("source", "target") for pair in texts]
    return TRAINERS[c.tokenizer](both, c.model.vocab_size)


def batches_of(c: Translate, texts: Sequence[dict], tokenizer, mesh) -> pairs.TokenBudgetBatches:
    """Tokenized pairs in buckets, as the objective takes them."""
    sides = [tokenizer.encode_batch([pair[side] for pair in texts])
             for side in ("source", "target")]
    ids = [{"source": s, "target": t} for s, t in zip(*sides)]
    row = functools.partial(seq2seq.prepare, start_id=c.model.decoder_start_token_id,
                            eos_id=tokenizer.sep_id, pad_id=tokenizer.pad_id)
    share = sharding.process_data_shard(mesh)
    return pairs.TokenBudgetBatches(
        ids, row, buckets=c.buckets, tokens_per_batch=c.tokens_per_batch, seed=c.seed,
        rows_multiple=sharding.num_batch_shards(mesh) * c.accumulate,
        process_index=share.index, process_count=share.count)


def kept_steps(c: Translate) -> int:
    """How many checkpoints there are to average at the end."""
    return min(c.average, -(-c.num_steps // c.save_every) if c.save_every else 1)


def train(c: Translate, tokenizer, texts: Sequence[dict], held_out_texts: Sequence[dict],
          pretrained: dict | None = None):
    """The model, its averaged parameters, the history and the held-out loss.

    `pretrained` parameters are copied; None starts from new ones. Resumes from
    `<out>/checkpoints`.
    """
    mesh = c.mesh.make()
    data = batches_of(c, texts, tokenizer, mesh)
    held_out = batches_of(c, held_out_texts, tokenizer, mesh).evaluation()
    model = build_model(c.model)
    params = sharding.init_sharded(functools.partial(init_params, model),
                                   jax.random.key(c.seed), mesh)
    if pretrained is not None:
        params, report = tree.restore_partial(params, pretrained)
        print(report, flush=True)
    loss_fn = functools.partial(seq2seq.loss, model.apply, label_smoothing=c.label_smoothing)
    optimizer = c.optimizer.make(c.num_steps)
    eval_step = step.make_eval_step(loss_fn)
    print(f"{tree.count(params):,} parameters, {len(texts):,} pairs ({data.num_cut} cut to "
          f"{c.buckets[-1]} tokens), {data.batches_per_epoch} batches an epoch, "
          f"{c.num_steps} steps, {len(held_out_texts):,} pairs held out", flush=True)
    with SummaryWriter(str(c.out / "events")) as writer:
        state, history = loop.fit(
            step.init_state(params, optimizer),
            step.make_train_step(loss_fn, optimizer, accumulate=c.accumulate), data.loader(),
            rng=jax.random.key(c.seed + 1), num_steps=c.num_steps, mesh=mesh,
            eval_fn=lambda params: step.evaluate(eval_step, params, held_out, mesh),
            eval_every=c.eval_every, save_every=c.save_every, keep=c.average,
            log_every=c.log_every, checkpoint_dir=c.out / "checkpoints", writer=writer,
            metadata={"model": config_to_dict(c.model)} | common.identity(c, texts),
            allow_config_mismatch=c.allow_config_mismatch, policy=c.policy,
        )
    params = checkpointing.average_params(c.out / "checkpoints", kept_steps(c), state.params)
    return model, params, history, step.evaluate(eval_step, params, held_out, mesh)


def translate(
    model: Transformer, params: dict, tokenizer, texts: Sequence[str], *, batch_size: int = 64,
    max_source: int = 128, bos_id: int | None = None, **options,
) -> list[str]:
    """A target for each source text, which gets `bos_id` in front if given; `options` go to
    `generate`. Texts of like length share batches."""
    begin = [] if bos_id is None else [bos_id]
    ids = [[*begin, *row[: max_source - 1 - len(begin)], tokenizer.sep_id]
           for row in tokenizer.encode_batch(list(texts))]
    order = np.argsort([len(row) for row in ids], kind="stable")
    written: dict[int, str] = {}
    params = transpose_kernels_for_decoding(model, params)
    for k in range(0, len(order), batch_size):
        members = [int(i) for i in order[k : k + batch_size]]
        # The last batch is filled up, so that its shape is compiled already.
        rows = [ids[i] for i in members] + [ids[members[-1]]] * (batch_size - len(members))
        found = generate(model, params, rows, **options)
        for i, row in zip(members, found):
            written[i] = tokenizer.decode(row).strip()
    return [written[i] for i in range(len(texts))]


def cross_attention(
    path: Path, model: Transformer, params: dict, tokenizer, source: str, target: str
) -> None:
    """Where each token of the target looks in the source, by layer, mean over heads."""
    ids = [*tokenizer.encode(source), tokenizer.sep_id]
    out_ids = [*tokenizer.encode(target), tokenizer.sep_id]
    shifted = [model.config.decoder_start_token_id, *out_ids[:-1]]
    out = jax.jit(model.apply)({"params": params}, np.array([ids]), np.array([shifted]))
    maps = {f"layer {i}": np.asarray(weights)[0].mean(0)
            for i, weights in enumerate(out.cross_attention)}
    words = [[tokenizer.decode([i], skip_special=False) for i in row] for row in (out_ids, ids)]
    plots.attention(path, maps, *words, title="cross-attention: the token that is predicted, and "
                                             "where it looks")


def main(c: Translate) -> dict:
    """The command: train, average, translate, score, draw."""
    began = time.perf_counter()
    metrics.bleu(["a"], ["a"])  # a missing library is missed now, not after the training
    texts, held_out = (pairs.load_pairs(c.data, split, c.source, c.target)
                       for split in (c.train_split, c.held_out_split))
    saved = c.out / "tokenizer"
    tokenizer = tokenizers.load(saved) if saved.is_dir() else make_tokenizer(c, texts)
    c = dataclasses.replace(c, model=common.fit_to(c.model, tokenizer))
    common.save_run_config(c.out, c.model, tokenizer, average=kept_steps(c))
    model, params, history, loss = train(c, tokenizer, texts, held_out)
    print(f"held-out loss {loss['nll']:.3f} nats a token, accuracy {loss['accuracy']:.3f}, "
          "parameters averaged", flush=True)
    trained = time.perf_counter()
    held_out = held_out[: c.eval_pairs]
    written = translate(
        model, params, tokenizer, [pair["source"] for pair in held_out],
        num_beams=c.num_beams, length_penalty=c.length_penalty, max_new_tokens=c.max_new_tokens)
    references = [pair["target"] for pair in held_out]
    (c.out / "translations.jsonl").write_text("".join(
        json.dumps({**pair, "translation": text}, ensure_ascii=False) + "\n"
        for pair, text in zip(held_out, written)))
    score = metrics.bleu(written, references)
    print(f"sacreBLEU {score.score:.2f} with {c.num_beams} beams on {len(written)} held-out pairs "
          f"({score.signature}), {time.perf_counter() - trained:.0f} s", flush=True)
    for pair, text in zip(held_out[:3], written):
        print(f"  {pair['source']}\n  -> {text}\n   = {pair['target']}")
    cross_attention(c.out / "cross_attention.png", model, params, tokenizer,
                    held_out[0]["source"], written[0])
    points = {
        "training (smoothed)": [(h["step"], h["loss"]) for h in history if "loss" in h],
        "held-out": [(h["step"], h["eval_nll"]) for h in history if "eval_nll" in h],
    }
    points = {name: tuple(zip(*found)) for name, found in points.items() if found}
    if points:
        plots.curves(c.out / "loss.png", points, title=f"{c.source} to {c.target}")
    measured = {"bleu": score.score, "signature": score.signature, "held_out": loss,
               "history": history}
    return common.write_results(c.out, c, measured, time.perf_counter() - began)


if __name__ == "__main__":
    config = tyro.extras.overridable_config_cli(configs.load(Translate))
    common.start()
    main(config)
