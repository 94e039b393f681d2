"""Pre-train GPT, BERT or BART on plain text.

    python experiments/pretrain.py gpt_python_docs --out runs/gpt
    python experiments/pretrain.py bert_python_docs --out runs/bert --mesh.fsdp 8
    python experiments/pretrain.py char_shakespeare --data input.txt --out runs/chars

The first word names a file in `experiments/configs`; every setting in it can be changed by a flag
(`--help`). The same command resumes a run that was stopped. Hardware, time and expected loss stand
in each config's docstring.
"""

import dataclasses
import functools
import json
import time

import common
import configs
import jax
import tyro
from settings import Pretrain
from tensorboardX import SummaryWriter

from transformer_jax import metrics, sharding, tree
from transformer_jax.data import batching, tokenizers
from transformer_jax.models import build_model, config_to_dict, init_params
from transformer_jax.report import plots
from transformer_jax.train import loop, step


def pretrain(c: Pretrain) -> dict:
    """Run it; returns what `results.json` holds. Resumes from `<out>/checkpoints`."""
    began = time.perf_counter()
    train_texts, held_out_texts = common.load_texts(c)
    saved = c.out / "tokenizer"
    tokenizer = tokenizers.load(saved) if saved.is_dir() else common.make_tokenizer(c, train_texts)
    c = dataclasses.replace(c, model=common.fit_to(c.model, tokenizer))
    common.save_run_config(c.out, c.model, tokenizer)
    train, held_out = (
        common.objective_rows(c, texts, tokenizer, name)
        for name, texts in (("train", train_texts), ("held_out", held_out_texts))
    )
    mesh = c.mesh.make()
    batches = train.loader(c.batch_size, mesh, seed=c.seed)
    held_out_batches = held_out.evaluation(c.batch_size, c.eval_batches, mesh)

    model = build_model(c.model)

    def init(rng):
        params = init_params(model, rng)
        return tree.stack_layers(params) if c.scan_layers else params

    params = sharding.init_sharded(init, jax.random.key(c.seed), mesh)
    loss_fn = functools.partial(common.LOSSES[c.objective], model.apply)
    optimizer = c.optimizer.make(c.num_steps)
    train_step = step.make_train_step(loss_fn, optimizer, accumulate=c.accumulate)
    eval_step = step.make_eval_step(loss_fn)

    def held_out_loss(params):
        return step.evaluate(eval_step, params, held_out_batches, mesh)

    print(f"{tree.count(params):,} parameters, {len(train.rows):,} rows of {c.length} tokens, "
          f"global batch {c.batch_size} = {c.batch_size // sharding.num_batch_shards(mesh)} a device, "
          f"{c.num_steps} steps, {len(held_out.rows):,} rows held out", flush=True)
    for batch in held_out_batches:
        batching.check_batch_ids(batch, c.model.vocab_size, c.model.max_length)
    before = None if c.replay else held_out_loss(params)
    with SummaryWriter(str(c.out / "events")) as writer:
        state, history = loop.fit(
            step.init_state(params, optimizer), train_step, batches,
            rng=jax.random.key(c.seed + 1), num_steps=c.num_steps, mesh=mesh,
            eval_fn=held_out_loss, eval_every=c.eval_every, save_every=c.save_every,
            log_every=c.log_every, checkpoint_dir=c.out / "checkpoints", writer=writer,
            tokens_per_batch=c.batch_size * train.tokens_per_row,
            metadata={"model": config_to_dict(c.model)} | common.identity(c, train.rows),
            allow_config_mismatch=c.allow_config_mismatch, policy=c.policy, keep_best=("loss", "min"),
            replay_step=c.replay,
            profile=(c.out / "trace", c.profile) if c.profile else None,
        )
    if c.replay is not None:
        print(json.dumps(history[-1]))
        return history[-1]
    after = held_out_loss(state.params)
    measured = {"held_out_before": before, "held_out": after, "history": history}
    if c.objective == "causal_lm":
        measured["perplexity"] = metrics.perplexity(after["loss"])
    print(f"held-out loss before {before['loss']:.3f}, after {after['loss']:.3f}", flush=True)
    if waits := [h["data_wait_fraction"] for h in history if "data_wait_fraction" in h]:
        measured["data_wait_fraction"] = sum(waits) / len(waits)
        print(f"at most {100 * measured['data_wait_fraction']:.2f} % of a step's time devices waited for "
              "the host", flush=True)
    plots.curves(c.out / "loss.png", loss_curves(history, before),
                title=f"Pre-training by {c.objective}")
    return common.write_results(c.out, c, measured, time.perf_counter() - began)


def loss_curves(history: list[dict], before: dict) -> dict:
    """Training and held-out loss over steps, as `draw.curves` takes them."""
    train = [(h["step"], h["loss"]) for h in history if "loss" in h]
    held_out = [(0, before["loss"])]
    held_out += [(h["step"], h["eval_loss"]) for h in history if "eval_loss" in h]
    named = {"training": train, "held-out": held_out}
    return {name: tuple(zip(*points)) for name, points in named.items() if points}


if __name__ == "__main__":
    config = tyro.extras.overridable_config_cli(configs.load(Pretrain))
    common.start()
    pretrain(config)
