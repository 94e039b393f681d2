"""Pre-train BART by denoising, then fine-tune it on pairs, beside the same model from scratch.

    python experiments/denoise.py bart_dialogsum --pretrain.data wikitext-2 \
        --finetune.data dialogsum --out runs/dialogsum

The first word names a file in `experiments/configs`; every setting in it can be changed by a flag
(`--help`). The same command resumes a run that was stopped. `<out>` gets `pretraining`,
`pretrained` and `scratch`, each with its checkpoints; the texts that both models wrote; the curves;
and `results.json` with the denoising loss on held-out text before and after, and ROUGE of both.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import common
import configs
import jax
import pretrain
import tyro
from settings_seq2seq import Denoise, Pairs
from tensorboardX import SummaryWriter
from translate import translate

from transformer_jax import metrics, sharding, tree
from transformer_jax.data import pairs
from transformer_jax.models import Transformer, config_to_dict, init_params
from transformer_jax.objectives import seq2seq
from transformer_jax.report import plots
from transformer_jax.train import loop, step

SIDES = ("source", "target")


class Tuned(NamedTuple):
    params: dict
    history: list[dict]
    held_out: dict[str, float]  # the loss and its measured


def joint_tokenizer(c: Denoise, texts: Sequence[dict]) -> Path:
    """The folder of one tokenizer for the plain text and the pairs."""
    folder = c.out / "tokenizer"
    if not folder.is_dir():
        both = [{"text": pair[side]} for side in SIDES for pair in texts]
        plain = common.load_texts(c.pretrain)[0]
        common.make_tokenizer(c.pretrain, [*plain, *both]).save(folder)
    return folder


def rows_of(c: Pairs, texts: Sequence[dict], tokenizer) -> common.Split:
    """Pairs as the objective takes them, of one shape; both sides begin and end as in denoising."""
    sides = [tokenizer.encode_batch([pair[side] for pair in texts]) for side in SIDES]
    row = functools.partial(
        seq2seq.prepare, source_length=c.source_length, target_length=c.target_length,
        start_id=tokenizer.sep_id, bos_id=tokenizer.cls_id, eos_id=tokenizer.sep_id,
        pad_id=tokenizer.pad_id)
    return common.Split([dict(zip(SIDES, ids)) for ids in zip(*sides)], row, c.source_length)


def finetune(c: Denoise, name: str, train_step, eval_step, train: common.Split,
             held_out: list[dict], base: common.LoadedRun, params: dict) -> Tuned:
    """Trains a copy of `params` in `<out>/<name>`."""
    out, f = c.out / name, c.finetune
    mesh = c.pretrain.mesh.make()
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    common.save_run_config(out, base.model.config, base.tokenizer)

    def held_out_loss(params):
        return step.evaluate(eval_step, params, held_out, mesh)

    with SummaryWriter(str(out / "events")) as writer:
        state, history = loop.fit(
            step.init_state(params, f.optimizer.make(f.num_steps)), train_step,
            train.loader(f.batch_size, mesh, seed=f.seed), rng=jax.random.key(f.seed + 1),
            num_steps=f.num_steps, mesh=mesh, eval_fn=held_out_loss, eval_every=f.eval_every,
            save_every=f.save_every, log_every=f.log_every, checkpoint_dir=out / "checkpoints",
            writer=writer, allow_config_mismatch=f.allow_config_mismatch, policy=f.policy,
            metadata={"model": config_to_dict(base.model.config)} | common.identity(
                f, train.rows, params))
    return Tuned(state.params, history, held_out_loss(state.params))


def write_targets(c: Denoise, model: Transformer, params: dict, tokenizer,
                  texts: Sequence[str]) -> list[str]:
    """What the model makes of each source."""
    f = c.finetune
    return translate(
        model, params, tokenizer, texts, max_source=f.source_length, bos_id=tokenizer.cls_id,
        num_beams=f.num_beams, max_new_tokens=f.target_length,
        no_repeat_ngram_size=f.no_repeat_ngram_size,
        **({"length_penalty": f.length_penalty} if f.num_beams > 1 else {}))


def main(c: Denoise) -> dict:
    """The command: both stages, the same without the first, scores, texts, pictures."""
    began = time.perf_counter()
    metrics.rouge(["a"], ["a"])  # a missing library is missed now, not after the training
    f = c.finetune
    texts, held_out_texts = (pairs.load_pairs(f.data, split, f.source, f.target)
                             for split in (f.train_split, f.held_out_split))
    folder = joint_tokenizer(c, texts)
    denoised = pretrain.pretrain(dataclasses.replace(
        c.pretrain, tokenizer=str(folder), out=c.out / "pretraining"))["metrics"]
    base = common.load_run(c.out / "pretraining")
    fresh = jax.jit(functools.partial(init_params, base.model))(jax.random.key(c.pretrain.seed))

    train = rows_of(f, texts, base.tokenizer)
    held_out = rows_of(f, held_out_texts, base.tokenizer).evaluation(
        f.batch_size, mesh=c.pretrain.mesh.make())
    loss_fn = functools.partial(seq2seq.loss, base.model.apply, label_smoothing=f.label_smoothing)
    steps = (step.make_train_step(loss_fn, f.optimizer.make(f.num_steps)),
             step.make_eval_step(loss_fn))  # made once, so that both runs share what is compiled
    scored = held_out_texts[: f.eval_pairs]
    references = [pair["target"] for pair in scored]
    print(f"{tree.count(fresh):,} parameters, {len(texts):,} pairs, {f.num_steps} steps of "
          f"{f.batch_size}, {len(held_out_texts):,} pairs held out", flush=True)

    tuned, written, scores = {}, {}, {}
    for name, params in (("pretrained", base.params), ("scratch", fresh)):
        tuned[name] = finetune(c, name, *steps, train, held_out, base, params)
        written[name] = write_targets(c, base.model, tuned[name].params, base.tokenizer,
                                      [pair["source"] for pair in scored])
        scores[name] = metrics.rouge(written[name], references)
        print(f"{name}: held-out loss {tuned[name].held_out['nll']:.3f}, "
              + ", ".join(f"{k} {v:.2f}" for k, v in scores[name].items()), flush=True)
    report(c, scored, written, {name: run.history for name, run in tuned.items()})
    measured = {
        "denoising": {key: denoised[key] for key in ("held_out_before", "held_out")},
        **{name: {"rouge": scores[name], "held_out": run.held_out, "history": run.history}
           for name, run in tuned.items()},
    }
    return common.write_results(c.out, c, measured, time.perf_counter() - began)


def report(c: Denoise, scored: Sequence[dict], written: dict[str, list[str]],
           histories: dict[str, list[dict]]) -> None:
    """Some texts for the eye, all of them in a file, and the curves of both runs."""
    lines = [{**pair, **{name: found[i] for name, found in written.items()}}
             for i, pair in enumerate(scored)]
    (c.out / "targets.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    for line in lines[:3]:
        print("\n  ".join(["", line["source"][:300].replace("\n", "\n  "),
                           *(f"{name}: {line[name]}" for name in ("target", *written))]),
              flush=True)
    points = {}
    for name, history in histories.items():
        points[f"{name}, training (smoothed)"] = [
            (h["step"], h["loss"]) for h in history if "loss" in h]
        points[f"{name}, held-out"] = [
            (h["step"], h["eval_nll"]) for h in history if "eval_nll" in h]
    points = {name: tuple(zip(*found)) for name, found in points.items() if found}
    if points:  # runs that were finished before have none
        plots.curves(c.out / "finetuning.png", points,
                    title=f"{c.finetune.source} to {c.finetune.target}")


if __name__ == "__main__":
    config = tyro.extras.overridable_config_cli(configs.load(Denoise))
    common.start()
    main(config)
