"""Training on machines that are not here: does it fit, and how fast can it be?

The real training step is compiled for the real machine, by the compiler that will compile it there;
nothing is allocated and no TPU is needed (`jax[tpu]` brings the compiler). What comes out is what
the program says of itself: its memory, its arithmetic, what it reads and what it sends. From these
follow three times of a step: for arithmetic and network, which no run can beat, and for memory, as
if no result of an operation stayed on the chip for the next, which is too much where one does. The
step is taken to last as long as the longest (all overlap); their sum is what it takes if none do.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from transformer_jax import hlo, sharding, tree
from transformer_jax.models import build_model, init_params
from transformer_jax.models.config import BERTConfig, Config, GPTConfig, TransformerConfig
from transformer_jax.nn import kernels
from transformer_jax.nn.attention import Mask
from transformer_jax.objectives import causal_lm, mlm_nsp, seq2seq
from transformer_jax.train import optim, step


class Chip(NamedTuple):
    """What one device can do, from its maker's data sheet."""

    flops: float  # a second, in products of bfloat16
    memory: int  # bytes
    bandwidth: float  # of the memory, bytes a second
    network: float  # bytes a second that a ring along one axis of the slice moves, both ways


# cloud.google.com/tpu/docs, system architecture of each; network: two links of an axis (Austin et
# al. 2025, "How to Scale Your Model", chapter 2).
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 9e10),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 9e10),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 1.8e11),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 1.8e11),
}


class Setting(NamedTuple):
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

    setting: Setting
    devices: int
    parameters: int  # in all
    state_bytes: int  # parameters and optimizer state that it keeps
    temporary_bytes: int  # activations, gradients and all else that lives within a step
    total_bytes: int  # the compiler's own peak
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


def devices_of(topology: str) -> Sequence[Any]:
    """The devices of a TPU slice that need not exist, such as "v5e:16x16".

    Raises:
      ValueError: there is no such slice, or the compiler is missing.
    """
    from jax.experimental import topologies

    if topology.partition(":")[0] not in CHIPS:
        raise ValueError(f"topology {topology!r} is of no known chip; give one of "
                         f"{', '.join(CHIPS)} and its shape, such as v5e:16x16")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # of many types
        raise ValueError(
            f"topology {topology!r} cannot be described: {str(error).splitlines()[0]}; it needs "
            "the TPU compiler (pip install 'transformer_jax[tpu]'), JAX_PLATFORMS=cpu and "
            "TPU_SKIP_MDS_QUERY=1 where there is no TPU, and a shape that slices have"
        ) from error


def make(setting: Setting, devices: Sequence[Any], chip: Chip) -> Plan:
    """Compiles the step and reads what it costs.

    Memory and collectives are those of the whole step, run as it would be, with its layers scanned.
    XLA counts the arithmetic of a loop's body once, so arithmetic and bytes are taken from steps of
    one and two unrolled layers: their difference is a layer.

    Raises:
      ValueError: the mesh does not fit the devices, or the rows not the mesh.
    """
    _check(setting, devices)
    began = time.perf_counter()
    compiled, state = compile_step(setting, devices, scan=True)
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    sent: dict[str, float] = {}
    for found in hlo.collectives(compiled.as_text()):
        sent[found.kind] = sent.get(found.kind, 0.0) + found.sent
    flops, read = _by_layers(setting, devices)
    temporary = memory.temp_size_in_bytes
    return Plan(
        setting, len(devices), tree.count(state.params), memory.argument_size_in_bytes, temporary,
        getattr(memory, "peak_memory_in_bytes", 0) or memory.argument_size_in_bytes + temporary,
        model_flops(setting) / len(devices), flops + _kernel_flops(setting) / len(devices), read,
        sent, chip, seconds)


def _check(setting: Setting, devices: Sequence[Any]) -> None:
    mesh = sharding.make_mesh(**setting.mesh, devices=devices)
    parts = sharding.batch_parts(mesh) * setting.accumulate
    if setting.rows % parts:
        raise ValueError(f"{setting.rows} rows cannot be shared by {parts} (devices that cut the "
                         f"batch, times microbatches); use a multiple of {parts}")
    if setting.length > setting.config.max_length:
        raise ValueError(f"length {setting.length} is more than the model's "
                         f"{setting.config.max_length} positions; shorten it")


LOSSES: dict[type, Callable] = {
    GPTConfig: causal_lm.loss, BERTConfig: mlm_nsp.loss, TransformerConfig: seq2seq.loss}


def compile_step(setting: Setting, devices: Sequence[Any], scan: bool):
    """(the compiled training step, its abstract state), for these devices."""
    mesh = sharding.make_mesh(**setting.mesh, devices=devices)
    model = build_model(setting.config)
    kind = next(kind for kind in LOSSES if isinstance(setting.config, kind))
    optimizer = optim.make_optimizer(1e-4)
    train_step = step.make_train_step(
        functools.partial(LOSSES[kind], model.apply), optimizer, accumulate=setting.accumulate)

    def init(rng):
        params = init_params(model, rng)
        return step.init_state(tree.stack_layers(params) if scan else params, optimizer)

    state = jax.eval_shape(init, jax.random.key(0))
    placed = _placed(state, sharding.param_shardings(state, mesh))
    batch = batch_shapes(setting)
    batch = _placed(batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch))
    rng = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        lowered = jax.jit(train_step, donate_argnums=0).lower(placed, batch, rng)
        return lowered.compile(), state


def _placed(shapes, shardings):
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
                        shapes, shardings)


def batch_shapes(setting: Setting) -> dict[str, jax.ShapeDtypeStruct]:
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


def _by_layers(setting: Setting, devices: Sequence[Any]) -> tuple[float, float]:
    """FLOPs and bytes of a step on one device, from steps of few layers."""
    c = setting.config
    depths = {"num_layers": c.num_layers}
    if isinstance(c, TransformerConfig):
        depths["num_decoder_layers"] = c.decoder_stack.num_layers

    def cost(**layers) -> np.ndarray:
        few = setting._replace(config=c.replace(**layers))
        found = compile_step(few, devices, scan=False)[0].cost_analysis()
        return np.array([found["flops"], found["bytes accessed"]])

    one = dict.fromkeys(depths, 1)
    total = base = cost(**one)
    for name, depth in depths.items():
        total = total + (cost(**one | {name: 2}) - base) * (depth - 1)
    return float(total[0]), float(total[1])


def model_flops(setting: Setting) -> float:
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


def _attention(setting: Setting, causal_share: float) -> float:
    """FLOPs of the two products of attention in one forward pass; a causal mask hides all but
    `causal_share` of the scores from what does the products."""
    c = setting.config
    whole = 4.0 * setting.rows * setting.length**2 * c.d_model
    if isinstance(c, GPTConfig):
        return c.num_layers * whole * causal_share
    if isinstance(c, TransformerConfig):
        return (c.num_layers + c.decoder_stack.num_layers * (1 + causal_share)) * whole
    return c.num_layers * whole


def _kernel_flops(setting: Setting) -> float:
    """What a Pallas kernel does, of which XLA knows nothing: forward two products, again under
    remat; backward five (`splash` computes the scores anew); of causal scores, half."""
    c = setting.config
    query = jax.ShapeDtypeStruct((setting.rows, setting.length, c.num_heads, c.stack.head_dim),
                                 c.compute_dtype)
    if kernels.choose(c.kernel, query, query, Mask(), c.attention_dropout_rate > 0) != "splash":
        return 0.0
    passes = 1 + (c.remat != "none") + 5 / 2
    return passes * _attention(setting, causal_share=0.5)


def settings(
    config: Config,
    devices: int,
    *,
    meshes: dict[str, Sequence[int]],
    rows: Sequence[int] = (),
    length: int | None = None,
    remat: Sequence[str] = ("none",),
    accumulate: Sequence[int] = (1,),
) -> list[Setting]:
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
            found += [Setting(config.replace(remat=kept), mesh, n, length or config.max_length,
                              steps) for n in rows or (4 * parts * steps,)]
    if not found:
        raise ValueError(f"no mesh of {meshes} has {devices} devices; the product of the sizes "
                         "must be their number")
    return found


def best(plans: Sequence[Plan]) -> Plan | None:
    """Of those that fit, the one with the most tokens a day."""
    fitting = [plan for plan in plans if plan.fits]
    return max(fitting, key=lambda plan: plan.tokens_per_day, default=None)


def show(plans: Sequence[Plan], title: str) -> None:
    """The plans as a table, and which is best."""
    table = Table(title=title,
                  caption="GiB of one device; ms of a step, each if nothing else took time")
    for heading in ("setting", "state", "temporary", "total", "has", "FLOPs / model's",
                    "arithmetic", "memory", "network", "sum", "MFU", "tokens a day"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for plan in plans:
        sizes = (plan.state_bytes, plan.temporary_bytes, plan.total_bytes, plan.chip.memory)
        table.add_row(
            str(plan.setting), *(f"{size / 2**30:.2f}" for size in sizes),
            f"{plan.compiled_flops / plan.model_flops:.2f}",
            *(f"{1000 * t:.0f}" for t in (*plan.times.values(), sum(plan.times.values()))),
            f"{plan.mfu:.2f}", f"{plan.tokens_per_day:.3g}", style=None if plan.fits else "red")
    console = Console(width=150)
    console.print(table)
    for plan in plans:
        sent = ", ".join(f"{kind} {n / 2**20:,.0f} MiB" for kind, n in plan.collectives.items())
        console.print(f"{plan.setting}: each device sends {sent or 'nothing'}")
    chosen = best(plans)
    if chosen is None:
        console.print("none of these fits; try more devices, remat full, or fewer rows")
    else:
        console.print(f"best that fits: {chosen.setting}, {chosen.tokens_per_day:.3g} tokens a day")


def bars(plans: Sequence[Plan]) -> dict[str, dict[str, float]]:
    """For `draw.plans`."""
    return {str(plan.setting): {
        "state": plan.state_bytes / 2**30, "temporary": plan.temporary_bytes / 2**30,
        **{name: 1000 * t for name, t in plan.times.items()}} for plan in plans}


def report(plan: Plan) -> dict[str, Any]:
    """A plan as plain numbers, for JSON."""
    found = plan._asdict() | {"setting": str(plan.setting), "chip": plan.chip._asdict()}
    return found | {"model": dataclasses.asdict(plan.setting.config), "times": plan.times,
                    "fits": plan.fits, "mfu": plan.mfu, "step_seconds": plan.step_seconds,
                    "tokens_per_day": plan.tokens_per_day}
