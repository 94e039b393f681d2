"""Trains a tiny GPT in one of several processes, which `test_processes` starts.

    python processes.py DEVICES MESH OUT [STEPS]

The environment variables of `distributed.initialize` are set if there are several processes.
"""

import functools
import json
import sys

import jax

from transformer_jax import distributed, sharding
from transformer_jax.data import batching, packing
from transformer_jax.models import GPTConfig, build_model, init_params
from transformer_jax.objectives import causal_lm
from transformer_jax.train import Checkpointer, Logging, loop, optimizers, step

CONFIG = GPTConfig(vocab_size=40, max_length=8, num_layers=1, d_model=16, num_heads=2, mlp_dim=32,
                   dropout_rate=0.1, attention_dropout_rate=0.0, norm_first=True)


class Rows:
    """64 rows of tokens, computed from their indices."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = (3 * i + 7 * jax.numpy.arange(9) ** 2) % 40
        return packing.shift_tokens(jax.device_get(ids), jax.device_get(0 * ids + 1))


def main(devices: int, sizes: dict, out: str, num_steps: int = 5) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    distributed.initialize()
    mesh = sharding.make_mesh(**sizes)
    shard = sharding.process_data_shard(mesh)
    batches = batching.make_loader(Rows(), 16, seed=3, process_index=shard.index,
                                   process_count=shard.count)
    model = build_model(CONFIG)
    params = sharding.init_sharded(functools.partial(init_params, model), jax.random.key(0), mesh)
    optimizer = optimizers.make_optimizer(1e-2)
    state, history = loop.fit(
        step.init_state(params, optimizer),
        step.make_train_step(functools.partial(causal_lm.loss, model.apply), optimizer),
        batches, rng=jax.random.key(1), num_steps=num_steps, mesh=mesh,
        checkpoint=Checkpointer(f"{out}.checkpoints", save_every=10),
        callbacks=[Logging(every=1), lambda row: print(row["step"], flush=True)])
    squared_norm = jax.jit(lambda p: sum((x**2).sum() for x in jax.tree.leaves(p)))(state.params)
    if jax.process_index() == 0:
        results = {"losses": [row["loss"] for row in history],
                   "squared_norm": float(squared_norm), "processes": jax.process_count(),
                   "data_shard": shard}
        with open(out, "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
