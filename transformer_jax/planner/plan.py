"""Training on machines that are not here, or are: does it fit, and how fast can it be?

The real training step is compiled for the real machine, by the compiler that will compile it there;
nothing is allocated and no TPU is needed (`jax[tpu]` brings the compiler). What comes out is what
the program says of itself: its memory, its arithmetic, what it reads and what it sends. From these
follow three times of a step: for arithmetic, which no run can beat; for memory, as if no result of
an operation stayed on the chip for the next; and for network, as if each exchange went around one
ring: both are too much where the compiler and the slice do better. The step is taken to last as
long as the longest (all overlap); their sum is what it takes if none do.
"""

import dataclasses
import functools
import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from transformer_jax import sharding, tree
from transformer_jax.models import build_model, init_params
from transformer_jax.models.config import BERTConfig, Config, GPTConfig, TransformerConfig
from transformer_jax.nn import fused_attention
from transformer_jax.nn.attention import Mask
from transformer_jax.objectives import causal_lm, mlm_nsp, seq2seq
from transformer_jax.planner import hlo
from transformer_jax.planner.chips import Chip
from transformer_jax.train import optimizers, step


class PlanConfig(NamedTuple):
    """One way to train: a model and how its step is run."""

    config: Config
    mesh: dict[str, int]
    rows: int  # of the global batch
    length: int
    accumulate: int = 1

    def __str__(self) -> str:
        cut = " x ".join(f"{name} {size}" for name, size in self.mesh.items() if size != 1)
        more = f", {self.accumulate} microbatches" if self.accumulate > 1 else ""
        return f"{cut or 'one device'}, {self.rows} rows, remat {self.config.remat}{more}"


class Plan(NamedTuple):
    """What a compiled step says of itself. Numbers are of one device and one step, in bytes, FLOPs
    and seconds, unless they say otherwise."""

    setting: PlanConfig
    devices: int
    parameters: int  # in all
    state_bytes: int  # parameters and optimizer state that it keeps
    temporary_bytes: int  # activations, gradients and all else that lives within a step
    total_bytes: int  # on TPUs the compiler's own peak
    model_flops: float  # of all products of the model, forward and backward, each done once
    compiled_flops: float
    bytes_read: float  # operands and results of every operation of the program
    collectives: dict[str, float]  # bytes sent, by kind
    chip: Chip
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.chip.memory

    @property
    def times(self) -> dict[str, float]:
        """Seconds of a step by what it needs."""
        return {"arithmetic": self.compiled_flops / self.chip.flops,
                "memory": self.bytes_read / self.chip.bandwidth,
                "network": sum(self.collectives.values()) / self.chip.network}

    @property
    def step_seconds(self) -> float:
        """If all three overlap; `sum(times.values())` if nothing does."""
        return max(self.times.values())

    @property
    def mfu(self) -> float:
        """The share of the peak rate that the model's own products can reach (Chowdhery et al.
        2022, "PaLM", appendix B), if all overlaps."""
        return self.model_flops / self.chip.flops / self.step_seconds

    @property
    def tokens_per_day(self) -> float:
        return self.setting.rows * self.setting.length / self.step_seconds * 86_400


def compile_plan(setting: PlanConfig, devices: Sequence[Any], chip: Chip) -> Plan:
    """Compiles the step and reads what it costs.

    Memory and collectives are those of the whole step, run as it would be, with its layers scanned.
    XLA counts the arithmetic of a loop's body once, so arithmetic and bytes are taken from steps of
    one and two unrolled layers: their difference is a layer.

    Raises:
      ValueError: the mesh does not fit the devices, or the rows not the mesh.
    """
    setting = _resolved(setting, devices)
    mesh = _check(setting, devices)
    train_step, state, batch = abstract_step(setting, mesh, scan=True)
    kept = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
               for x in jax.tree.leaves(state))
    sent: dict[str, float] = {}
    began = time.perf_counter()
    try:
        compiled = _compile(train_step, state, batch, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # The compiler stops where a program does not fit, and says what it would have needed.
        total = _needed(str(error))
        temporary = max(total - kept, 0)
    else:
        memory = compiled.memory_analysis()
        temporary = memory.temp_size_in_bytes
        total = kept + temporary
        if devices[0].platform == "tpu":  # others leave out what is donated
            total = getattr(memory, "peak_memory_in_bytes", 0) or total
        for found in hlo.collectives(compiled.as_text()):
            sent[found.kind] = sent.get(found.kind, 0.0) + found.sent
    seconds = time.perf_counter() - began
    flops, read = _by_layers(setting, mesh)
    return Plan(
        setting, len(devices), tree.count(state.params), kept, temporary, total,
        model_flops(setting) / len(devices), flops + _kernel_flops(setting, mesh) / len(devices),
        read, sent, chip, seconds)


def _resolved(setting: PlanConfig, devices: Sequence[Any]) -> PlanConfig:
    """With the attention kernel that "auto" would be on these devices."""
    c = setting.config
    if c.attention_impl == "auto" and devices[0].platform == "tpu":
        return setting._replace(config=c.replace(attention_impl="splash"))
    return setting


def _needed(message: str) -> int:
    """Bytes that a program which does not fit would have used, of what the compiler says: "Used
    18.70G of 15.75G hbm"."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of", message)
    return int(float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2])))) if found else 2**63


def _check(setting: PlanConfig, devices: Sequence[Any]) -> Mesh:
    mesh = sharding.make_mesh(**setting.mesh, devices=devices)
    parts = sharding.num_batch_shards(mesh) * setting.accumulate
    if setting.rows % parts:
        raise ValueError(f"{setting.rows} rows cannot be shared by {parts} (devices that cut the "
                         f"batch, times microbatches); use a multiple of {parts}")
    if setting.length > setting.config.max_length:
        raise ValueError(f"length {setting.length} is more than the model's "
                         f"{setting.config.max_length} positions; shorten it")
    return mesh


LOSSES: dict[type, Callable] = {
    GPTConfig: causal_lm.loss, BERTConfig: mlm_nsp.loss, TransformerConfig: seq2seq.loss}


def pretraining_loss(config: Config) -> Callable:
    """The loss of the model's own objective."""
    return next(loss for kind, loss in LOSSES.items() if isinstance(config, kind))


def abstract_step(setting: PlanConfig, mesh: Mesh, scan: bool, **options):
    """(the training step, its abstract state and batch), placed on a mesh; `options` are the
    loss's."""
    model = build_model(setting.config)
    optimizer = optimizers.make_optimizer(1e-4)
    train_step = step.make_train_step(
        functools.partial(pretraining_loss(setting.config), model.apply, **options), optimizer,
        accumulate=setting.accumulate)

    def init(rng):
        params = init_params(model, rng)
        return step.init_state(tree.stack_layers(params) if scan else params, optimizer)

    state = jax.eval_shape(init, jax.random.key(0))
    state = _placed(state, sharding.param_shardings(state, mesh))
    batch = batch_shapes(setting)
    batch = _placed(batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch))
    return train_step, state, batch


def _compile(train_step: Callable, state, batch, mesh: Mesh):
    rng = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        return jax.jit(train_step, donate_argnums=0).lower(state, batch, rng).compile()


def _placed(shapes, shardings):
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
                        shapes, shardings)


def batch_shapes(setting: PlanConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """A pre-training batch of the model's own objective; encoder-decoders have source and target of
    `length` each, BERT predicts 15 % of the words."""
    rows, length = setting.rows, setting.length

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    ids, weights = of(jnp.int32, length), of(jnp.float32, length)
    if isinstance(setting.config, GPTConfig):
        return {"tokens": ids, "targets": ids, "positions": ids, "document_ids": ids,
                "weights": weights}
    real = of(jnp.bool_, length)
    if isinstance(setting.config, BERTConfig):
        P = _predictions(length)
        return {"tokens": ids, "segment_ids": ids, "padding_mask": real,
                "masked_positions": of(jnp.int32, P), "masked_targets": of(jnp.int32, P),
                "masked_weights": of(jnp.float32, P), "nsp_labels": of(jnp.int32),
                "nsp_weights": of(jnp.float32)}
    return {"tokens": ids, "decoder_tokens": ids, "targets": ids, "padding_mask": real,
            "weights": weights}


def _predictions(length: int) -> int:
    return max(round(mlm_nsp.MASK_RATE * length), 1)


def _by_layers(setting: PlanConfig, mesh: Mesh) -> tuple[float, float]:
    """FLOPs and bytes of a step on one device, from steps of few layers without any loop: all
    microbatches at once, and all logits. (So bytes leave out that each microbatch reads the
    parameters anew.)"""
    c = setting.config
    depths = {"num_layers": c.num_layers}
    if isinstance(c, TransformerConfig):
        depths["num_decoder_layers"] = c.decoder_stack.num_layers

    def cost(**layers) -> np.ndarray:
        few = setting._replace(config=c.replace(**layers), accumulate=1)
        step_of_few = abstract_step(few, mesh, scan=False, chunk_logits=2**62)
        compiled = _compile(*step_of_few, mesh)
        found = compiled.cost_analysis()
        return np.array([found["flops"], found["bytes accessed"]]) + hlo.library_calls(
            compiled.as_text())

    one = dict.fromkeys(depths, 1)
    total = base = cost(**one)
    for name, depth in depths.items():
        total = total + (cost(**one | {name: 2}) - base) * (depth - 1)
    return float(total[0]), float(total[1])


def model_flops(setting: PlanConfig) -> float:
    """Products of a whole step: twice a kernel's size for each token it is applied to, and 4 T S D
    for attention of T queries to S keys; three times as many with the way back. Looking up
    embeddings costs none."""
    c, tokens = setting.config, setting.rows * setting.length
    shapes = jax.eval_shape(lambda: init_params(build_model(c), jax.random.key(0)))
    forward = 0.0
    for path, leaf in tree.flatten_paths(shapes).items():
        size = math.prod(leaf.shape)
        if path.startswith(("pooler/", "nsp_head/")):
            size *= setting.rows
        elif path.startswith("mlm_head/"):
            size *= setting.rows * _predictions(setting.length)
        else:
            size *= tokens
        forward += 2 * size if path.endswith("kernel") else 0
    predicted = tokens
    if isinstance(c, BERTConfig):
        predicted = setting.rows * _predictions(setting.length)
    forward += 2 * predicted * c.vocab_size * c.d_model
    return 3 * (forward + _attention(setting, causal_share=1.0))


def _attention(setting: PlanConfig, causal_share: float) -> float:
    """FLOPs of the two products of attention in one forward pass; a causal mask hides all but
    `causal_share` of the scores from what does the products."""
    c = setting.config
    whole = 4.0 * setting.rows * setting.length**2 * c.d_model
    if isinstance(c, GPTConfig):
        return c.num_layers * whole * causal_share
    if isinstance(c, TransformerConfig):
        return (c.num_layers + c.decoder_stack.num_layers * (1 + causal_share)) * whole
    return c.num_layers * whole


def _kernel_flops(setting: PlanConfig, mesh: Mesh) -> float:
    """What an attention kernel does, of which XLA knows nothing: forward two products, again under
    remat; backward five (scores are computed anew); of causal scores, the blocks on and below the
    diagonal."""
    c = setting.config
    query = jax.ShapeDtypeStruct((setting.rows, setting.length, c.num_heads, c.stack.head_dim),
                                 c.compute_dtype)
    with jax.set_mesh(mesh):
        chosen = fused_attention.select_implementation(c.attention_impl, query, query, Mask(), c.attention_dropout_rate > 0)
    if chosen == "xla":
        return 0.0
    passes = 1 + (c.remat != "none") + 5 / 2
    size = fused_attention.splash_block_size(setting.length) if chosen == "splash" else fused_attention.LANES
    blocks = math.ceil(setting.length / size)
    return passes * _attention(setting, causal_share=(blocks + 1) / (2 * blocks))


def enumerate_configs(
    config: Config,
    devices: int,
    *,
    meshes: dict[str, Sequence[int]],
    rows: Sequence[int] = (),
    length: int | None = None,
    remat: Sequence[str] = ("none",),
    accumulate: Sequence[int] = (1,),
) -> list[PlanConfig]:
    """All that the given choices make and `devices` allow.

    Args:
      meshes: sizes to try for each axis of `sharding.make_mesh`, of which one may be -1.
      rows: of the global batch; none for four for each part it is cut into.

    Raises:
      ValueError: no mesh fits.
    """
    found = []
    for sizes in itertools.product(*meshes.values()):
        known = math.prod(size for size in sizes if size != -1)
        sizes = [devices // known if size == -1 else size for size in sizes]
        mesh = dict(zip(meshes, sizes))
        if math.prod(sizes) != devices:
            continue
        parts = math.prod(mesh.get(axis, 1) for axis in sharding.BATCH_AXES)
        for kept, steps in itertools.product(remat, accumulate):
            found += [PlanConfig(config.replace(remat=kept), mesh, n, length or config.max_length,
                              steps) for n in rows or (4 * parts * steps,)]
    if not found:
        raise ValueError(f"no mesh of {meshes} has {devices} devices; the product of the sizes "
                         "must be their number")
    return found


def best_plan(plans: Sequence[Plan]) -> Plan | None:
    """Of those that fit, the one with the most tokens a day."""
    fitting = [plan for plan in plans if plan.fits]
    return max(fitting, key=lambda plan: plan.tokens_per_day, default=None)


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """A plan as plain numbers, for JSON."""
    found = plan._asdict() | {"setting": str(plan.setting), "chip": plan.chip._asdict()}
    return found | {"model": dataclasses.asdict(plan.setting.config), "times": plan.times,
                    "fits": plan.fits, "mfu": plan.mfu, "step_seconds": plan.step_seconds,
                    "tokens_per_day": plan.tokens_per_day}
