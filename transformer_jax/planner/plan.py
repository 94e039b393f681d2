"""Ahead-of-time (AOT) compilation of training steps for target hardware: memory and roofline.

The full training step is compiled by the compiler of the target hardware. No arrays are allocated,
and no TPU is needed (the package `jax[tpu]` contains the compiler). The roofline of the step
consists of three durations, computed from the compiled program:

- compute: FLOPs divided by the peak rate. This is a lower bound of the step time.
- hbm: bytes accessed by all operations divided by the memory bandwidth. This is too long if the
  compiler keeps results in on-chip memory for the next operation.
- interconnect: bytes sent divided by the bandwidth of one ring. This is too long if the collectives
  can use several rings of the slice.

The step time is estimated as the longest of the three, which assumes that they overlap fully.
"""

import collections
import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from transformer_jax import sharding, tree
from transformer_jax.models import build_model, init_params
from transformer_jax.models.config import BERTConfig, Config, GPTConfig, TransformerConfig
from transformer_jax.nn import backends
from transformer_jax.nn.attention import Mask
from transformer_jax.nn.backends import gpu, tpu
from transformer_jax.objectives import causal_lm, mlm_nsp, seq2seq
from transformer_jax.planner import hlo
from transformer_jax.planner.chips import Chip
from transformer_jax.planner.plan_config import PlanConfig
from transformer_jax.train import optimizers, step


class Plan(NamedTuple):
    """Costs of a compiled training step, per step and device unless stated otherwise.

    Attributes:
        config: the model, mesh and batch size of the step.
        num_devices: number of devices in the mesh.
        num_params: number of parameters of the model, on all devices together.
        state_bytes: size of the parameters and optimizer state.
        temporary_bytes: size of arrays that exist only during a step, such as activations.
        peak_bytes: peak memory use; on TPUs the value that the compiler reports, elsewhere
            `state_bytes + temporary_bytes`.
        model_flops: FLOPs of the matrix products, without recomputation; see `model_flops`.
        compiled_flops: FLOPs of the compiled program, including recomputation.
        bytes_accessed: size of the operands and results of all operations of the program.
        collective_bytes: kind of collective -> bytes that the device sends.
        chip: peak rates and memory of the device.
        compile_seconds: compilation time of the full step.
    """

    config: PlanConfig
    num_devices: int
    num_params: int
    state_bytes: int
    temporary_bytes: int
    peak_bytes: int
    model_flops: float
    compiled_flops: float
    bytes_accessed: float
    collective_bytes: dict[str, float]
    chip: Chip
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of a device."""
        return self.peak_bytes <= self.chip.memory_bytes

    @property
    def roofline_seconds(self) -> dict[str, float]:
        """Resource ("compute", "hbm" or "interconnect") -> step time limited by it alone."""
        return {"compute": self.compiled_flops / self.chip.flops_per_second,
                "hbm": self.bytes_accessed / self.chip.memory_bandwidth,
                "interconnect": (sum(self.collective_bytes.values())
                                 / self.chip.interconnect_bandwidth)}

    @property
    def step_seconds(self) -> float:
        """Estimated step time if compute, HBM and interconnect time overlap fully."""
        return max(self.roofline_seconds.values())

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization at `step_seconds` (Chowdhery et al. 2022, "PaLM", appendix B)."""
        return self.model_flops / self.chip.flops_per_second / self.step_seconds

    @property
    def tokens_per_day(self) -> float:
        """Tokens of the global batch per day at `step_seconds`."""
        return self.config.batch_size * self.config.length / self.step_seconds * 86_400


def compile_plan(config: PlanConfig, devices: Sequence[Any], chip: Chip) -> Plan:
    """Compiles a training step for target devices (`chips.get_devices`) and returns its costs.

    Memory and collectives are those of the full step, compiled as in training, with a scan over the
    layers. XLA counts the FLOPs of a loop body once, so FLOPs and bytes accessed are extrapolated
    from models with two and three unrolled layers. If the program does not fit into device memory,
    the plan has no collectives, and its memory is taken from the error message of the compiler.

    Raises:
        ValueError: the mesh does not have as many devices as given, the batch size is not a
            multiple of batch shards times microbatches, or the sequences are too long.
        jax.errors.JaxRuntimeError: the compiler failed, for another reason than memory.
    """
    config = _resolve_attention_impl(config, devices)
    mesh = _make_mesh(config, devices)
    train_step, state, batch = abstract_train_step(config, mesh, scan=True)
    state_bytes = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
                      for x in jax.tree.leaves(state))
    collective_bytes: collections.Counter = collections.Counter()
    started = time.perf_counter()
    try:
        compiled = _compile(train_step, state, batch, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # If a program does not fit into memory, the compiler reports the size that it needs.
        peak_bytes = _bytes_needed(str(error))
        temporary_bytes = max(peak_bytes - state_bytes, 0)
    else:
        memory = compiled.memory_analysis()
        temporary_bytes = memory.temp_size_in_bytes
        peak_bytes = state_bytes + temporary_bytes
        if devices[0].platform == "tpu":  # other backends omit donated buffers from the peak
            peak_bytes = memory.peak_memory_in_bytes
        for collective in hlo.parse_collectives(compiled.as_text()):
            collective_bytes[collective.kind] += collective.bytes_sent
    seconds = time.perf_counter() - started
    flops, bytes_accessed = _per_device_cost(config, mesh)
    return Plan(
        config, len(devices), tree.count(state.params), state_bytes, temporary_bytes, peak_bytes,
        model_flops(config) / len(devices),
        flops + _fused_attention_flops(config, mesh) / len(devices),
        bytes_accessed, dict(collective_bytes), chip, seconds)


def _resolve_attention_impl(config: PlanConfig, devices: Sequence[Any]) -> PlanConfig:
    """Replaces "auto" by "splash" for TPUs; on this machine's devices, "auto" selects by itself."""
    c = config.model
    if c.attention_impl == "auto" and devices[0].platform == "tpu":
        return config._replace(model=c.replace(attention_impl="splash"))
    return config


def _bytes_needed(message: str) -> int:
    """Bytes in a compiler error such as "Used 18.70G of 15.75G hbm"; 2**63 if it does not say."""
    match = re.search(r"Used ([\d.]+)([KMGT]) of", message)
    return int(float(match[1]) * 2 ** (10 * (1 + "KMGT".index(match[2])))) if match else 2**63


def _make_mesh(config: PlanConfig, devices: Sequence[Any]) -> Mesh:
    """Makes the mesh of a config and checks its batch size and length."""
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    divisor = sharding.num_batch_shards(mesh) * config.accumulate
    if config.batch_size % divisor:
        raise ValueError(f"batch size is {config.batch_size}; it must be a multiple of {divisor} "
                         "(batch shards of the mesh times microbatches)")
    if config.length > config.model.max_length:
        raise ValueError(f"length is {config.length}; it must be at most the model's max_length, "
                         f"{config.model.max_length}")
    return mesh


PRETRAINING_LOSSES: dict[type, Callable] = {
    GPTConfig: causal_lm.loss, BERTConfig: mlm_nsp.loss, TransformerConfig: seq2seq.loss}


def pretraining_loss(config: Config) -> Callable:
    """Loss function of the pre-training objective of a model family."""
    return next(loss for kind, loss in PRETRAINING_LOSSES.items() if isinstance(config, kind))


def abstract_train_step(config: PlanConfig, mesh: Mesh, scan: bool, **loss_options):
    """(train_step, state, batch) with `jax.ShapeDtypeStruct` leaves sharded over a mesh.

    With `scan`, the layers are stacked and the step scans over them.
    """
    model = build_model(config.model)
    optimizer = optimizers.make_optimizer(1e-4)
    loss = functools.partial(pretraining_loss(config.model), model.apply, **loss_options)
    train_step = step.make_train_step(loss, optimizer, accumulate=config.accumulate)

    def init(rng):
        params = init_params(model, rng)
        return step.init_state(tree.stack_layers(params) if scan else params, optimizer)

    state = jax.eval_shape(init, jax.random.key(0))
    state = _with_shardings(state, sharding.param_shardings(state, mesh))
    batch = abstract_batch(config)
    batch = _with_shardings(batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch))
    return train_step, state, batch


def _compile(train_step: Callable, state, batch, mesh: Mesh):
    rng = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        return jax.jit(train_step, donate_argnums=0).lower(state, batch, rng).compile()


def _with_shardings(shapes, shardings):
    return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, shardings)


def abstract_batch(config: PlanConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract batch of the pre-training objective of a model family.

    Encoder-decoders have a source and a target of `config.length` tokens each.

    Example:
        >>> from transformer_jax.models import presets
        >>> abstract_batch(PlanConfig(presets.get("gpt2"), {}, 8, 128))["tokens"].shape
        (8, 128)
    """
    batch_size, length = config.batch_size, config.length

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

    ids, weights = array(jnp.int32, length), array(jnp.float32, length)
    if isinstance(config.model, GPTConfig):
        return {"tokens": ids, "targets": ids, "positions": ids, "document_ids": ids,
                "weights": weights}
    padding_mask = array(jnp.bool_, length)
    if isinstance(config.model, BERTConfig):
        num_masked = _num_masked(length)
        return {"tokens": ids, "segment_ids": ids, "padding_mask": padding_mask,
                "masked_positions": array(jnp.int32, num_masked),
                "masked_targets": array(jnp.int32, num_masked),
                "masked_weights": array(jnp.float32, num_masked), "nsp_labels": array(jnp.int32),
                "nsp_weights": array(jnp.float32)}
    return {"tokens": ids, "decoder_tokens": ids, "targets": ids, "padding_mask": padding_mask,
            "weights": weights}


def _num_masked(length: int) -> int:
    return max(round(mlm_nsp.MASK_RATE * length), 1)


def _per_device_cost(config: PlanConfig, mesh: Mesh) -> tuple[float, float]:
    """(FLOPs, bytes accessed) of a step on one device, extrapolated from models of few layers.

    The cost of a layer is the difference between three and two layers, because in a model of one
    layer, XLA fuses this layer with both the embedding and the output layer. To avoid loops, the
    steps of these models have one microbatch, unrolled layers and unchunked logits; the bytes
    therefore do not include reading the parameters again in each microbatch.
    """
    c = config.model
    num_layers = {"num_layers": c.num_layers}
    if isinstance(c, TransformerConfig):
        num_layers["num_decoder_layers"] = c.decoder_stack.num_layers

    few_layers = {name: min(number, 2) for name, number in num_layers.items()}
    total = few_layers_cost = _unrolled_cost(config, mesh, **few_layers)
    for name, number in num_layers.items():
        if number > 2:
            more = _unrolled_cost(config, mesh, **few_layers | {name: 3})
            total = total + (more - few_layers_cost) * (number - 2)
    return float(total[0]), float(total[1])


def _unrolled_cost(config: PlanConfig, mesh: Mesh, **num_layers: int) -> np.ndarray:
    """FLOPs and bytes accessed of a step without loops on one device."""
    config = config._replace(model=config.model.replace(**num_layers), accumulate=1)
    compiled = _compile(
        *abstract_train_step(config, mesh, scan=False, logits_per_chunk=2**62), mesh)
    analysis = compiled.cost_analysis()
    return (np.array([analysis["flops"], analysis["bytes accessed"]])
            + hlo.library_call_costs(compiled.as_text()))


def model_flops(config: PlanConfig) -> float:
    """FLOPs of the matrix products of a training step on all devices, without recomputation.

    In the forward pass, a kernel takes 2 FLOPs per parameter and token, and attention of T queries
    to S keys of a layer with width D takes 4 T S D. The backward pass takes twice as many as the
    forward pass. Embedding lookups are not counted.
    """
    c, num_tokens = config.model, config.batch_size * config.length
    shapes = jax.eval_shape(lambda: init_params(build_model(c), jax.random.key(0)))
    num_masked = config.batch_size * _num_masked(config.length)
    forward = 0.0
    rows = [("^(pooler|nsp_head)/", config.batch_size), ("^mlm_head/", num_masked),
            ("", num_tokens)]
    for path, leaf in tree.flatten_paths(shapes).items():
        if path.endswith("kernel"):
            forward += 2 * math.prod(leaf.shape) * tree.first_match(rows, path)
    num_predicted = num_masked if isinstance(c, BERTConfig) else num_tokens
    forward += 2 * num_predicted * c.vocab_size * c.d_model
    return 3 * (forward + _attention_flops(config, causal_fraction=1.0))


def _attention_flops(config: PlanConfig, causal_fraction: float) -> float:
    """FLOPs of attention in one forward pass, of which `causal_fraction` is computed under causal
    masks.
    """
    c = config.model
    unmasked = 4.0 * config.batch_size * config.length**2 * c.d_model
    if isinstance(c, GPTConfig):
        return c.num_layers * unmasked * causal_fraction
    if isinstance(c, TransformerConfig):
        return (c.num_layers + c.decoder_stack.num_layers * (1 + causal_fraction)) * unmasked
    return c.num_layers * unmasked


def _fused_attention_flops(config: PlanConfig, mesh: Mesh) -> float:
    """FLOPs of a fused attention implementation, which XLA's cost analysis omits.

    There are two matrix products in the forward pass, two more with rematerialization, and five in
    the backward pass. With a causal mask, only the blocks on and below the diagonal are computed.
    """
    c = config.model
    query = jax.ShapeDtypeStruct((config.batch_size, config.length, c.num_heads, c.stack.head_dim),
                                 c.compute_dtype)
    with jax.set_mesh(mesh):
        rng = jax.ShapeDtypeStruct((), jax.dtypes.prng_key) if c.attention_dropout_rate else None
        implementation = backends.select(
            "dot_product_attention", query, query, query, Mask(), attention_impl=c.attention_impl,
            dropout_rate=c.attention_dropout_rate, dropout_rng=rng)
    if implementation not in (tpu.splash_attention, gpu.cudnn_attention):
        return 0.0
    forward_passes = 1 + (c.remat != "none") + 5 / 2
    block_size = tpu.LANES
    if implementation is tpu.splash_attention:
        block_size = tpu.splash_block_size(config.length)
    num_blocks = math.ceil(config.length / block_size)
    return forward_passes * _attention_flops(
        config, causal_fraction=(num_blocks + 1) / (2 * num_blocks))


def best_plan(plans: Sequence[Plan]) -> Plan | None:
    """The plan with the most tokens per day among those that fit into memory; None if none fits."""
    fitting = [plan for plan in plans if plan.fits]
    return max(fitting, key=lambda plan: plan.tokens_per_day, default=None)


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Converts a plan and its derived quantities to a dict of JSON values."""
    return plan._asdict() | {
        "config": str(plan.config), "chip": plan.chip._asdict(),
        "model": dataclasses.asdict(plan.config.model), "roofline_seconds": plan.roofline_seconds,
        "fits": plan.fits, "mfu": plan.mfu, "step_seconds": plan.step_seconds,
        "tokens_per_day": plan.tokens_per_day}


# Table of plans -----------------------------------------------------------------------------------


_COLUMNS = ("config", "state", "temporary", "peak", "available", "FLOPs / model FLOPs", "compute",
            "HBM", "interconnect", "sum", "MFU", "tokens per day")


def print_plans(plans: Sequence[Plan], title: str) -> None:
    """Prints a table of plans, the bytes that each device sends, and the best plan that fits."""
    table = Table(title=title,
                  caption="memory in GiB per device; times in ms per step, limited by each "
                          "resource alone")
    for heading in _COLUMNS:
        table.add_column(heading, justify="left" if heading == "config" else "right")
    for plan in plans:
        sizes = (plan.state_bytes, plan.temporary_bytes, plan.peak_bytes, plan.chip.memory_bytes)
        seconds = plan.roofline_seconds.values()
        table.add_row(
            str(plan.config), *(f"{size / 2**30:.2f}" for size in sizes),
            f"{plan.compiled_flops / plan.model_flops:.2f}",
            *(f"{1000 * t:.0f}" for t in (*seconds, sum(seconds))),
            f"{plan.mfu:.2f}", f"{plan.tokens_per_day:.3g}", style=None if plan.fits else "red")
    console = Console(width=150)
    console.print(table)
    for plan in plans:
        sent = ", ".join(
            f"{kind} {size / 2**20:,.0f} MiB" for kind, size in plan.collective_bytes.items())
        console.print(f"{plan.config}: each device sends {sent or 'nothing'}")
    best = best_plan(plans)
    console.print(
        "no plan fits into memory; try more devices, remat full, or a smaller batch size"
        if best is None else
        f"best that fits: {best.config}, {best.tokens_per_day:.3g} tokens per day")


def bar_chart_data(plans: Sequence[Plan]) -> dict[str, dict[str, float]]:
    """Memory in GiB and roofline times in ms of each plan, the data of `report.plots.plans`."""
    return {str(plan.config): {
        "state": plan.state_bytes / 2**30, "temporary": plan.temporary_bytes / 2**30,
        **{name: 1000 * t for name, t in plan.roofline_seconds.items()}} for plan in plans}
