# ruff: noqa: E501
"""Collectives parsed from compiled programs, against the collectives that were called."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from transformer_jax import sharding
from transformer_jax.planner import hlo

MESH = sharding.make_mesh(data=2, fsdp=4)


def compiled(fn, in_specs, out_specs, *shapes) -> str:
    mapped = jax.shard_map(fn, mesh=MESH, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(mapped).lower(*args).compile().as_text()


def only_collective(text: str) -> hlo.Collective:
    (found,) = hlo.parse_collectives(text)
    return found


def test_all_gather():
    text = compiled(lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), P("fsdp"), P(), (32, 8))
    found = only_collective(text)
    assert found[:4] == ("all-gather", 32 * 8 * 4, 4, 1)
    assert found.bytes_sent == 32 * 8 * 4 * 3 / 4


def test_all_reduce_over_one_axis_and_over_both():
    text = compiled(lambda x: jax.lax.psum(x, "fsdp"), P(), P(), (32, 8))
    assert only_collective(text)[:4] == ("all-reduce", 1024, 4, 1)
    assert only_collective(text).bytes_sent == 2 * 1024 * 3 / 4
    text = compiled(lambda x: jax.lax.psum(x, ("data", "fsdp")), P(), P(), (32, 8))
    assert only_collective(text)[:4] == ("all-reduce", 1024, 8, 1)


def test_reduce_scatter_counts_the_full_array():
    scatter = functools.partial(jax.lax.psum_scatter, axis_name="fsdp", tiled=True)
    found = only_collective(compiled(scatter, P(), P("fsdp"), (32, 8)))
    assert found[:4] == ("reduce-scatter", 1024, 4, 1)


def test_collectives_in_loops_count_every_iteration():
    def run(x):
        def body(x, _):
            return jnp.sin(jax.lax.psum(x, "data")), None

        def outer(x, _):
            return jax.lax.scan(body, x, None, length=5)[0], None

        return jax.lax.scan(outer, x, None, length=3)[0]

    found = only_collective(compiled(run, P(), P(), (16,)))
    assert found[:4] == ("all-reduce", 64, 2, 15)


def test_a_program_on_one_device_has_no_collectives():
    text = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile().as_text()
    assert hlo.parse_collectives(text) == []


TPU = """HloModule jit_step, num_partitions=8

%all-reduce-scatter.1 (input: bf16[16,64]) -> bf16[4,64] {
  %all-reduce.5 = bf16[16,64]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%fused.1 (p: bf16[4,64]) -> bf16[16,64] {
  %all-gather.1 = bf16[16,64]{1,0} all-gather(%p), channel_id=9, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, metadata={op_name="layer/wi"}
}

%fused.2 (p: bf16[4,64]) -> bf16[16,64] {
  %all-gather.2 = bf16[16,64]{1,0} all-gather(%p), channel_id=9, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, metadata={op_name="layer/wi"}
}

%condition (t: (s32[], bf16[4,64])) -> pred[] {
  %bound = s32[]{:T(128)} constant(48)
}

%body (t: (s32[], bf16[4,64])) -> (s32[], bf16[4,64]) {
  %a = bf16[16,64] fusion(%x), kind=kCustom, calls=%fused.1
  %b = bf16[16,64] fusion(%a), kind=kCustom, calls=%fused.2
  %c = bf16[4,64] fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
}

ENTRY %main.1 (x: bf16[4,64]) -> bf16[4,64] {
  %w = (s32[], bf16[4,64]) while(%t), condition=%condition, body=%body
  %p = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%q), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %r = (f32[100]{0}, f32[200]{0}) all-reduce-start(%q, %q), channel_id=4, replica_groups={}, to_apply=%add
  %s = ((f32[4]{0}, f32[6]{0}), (f32[32]{0}, f32[48]{0})) all-gather-start(%q, %q), channel_id=5, replica_groups=[1,8]<=[8]
}
"""


def test_hlo_of_a_tpu_program():
    """Operations with one channel id count once; a reduce-scatter is a fusion of that name."""
    *found, reduced, gathered = hlo.parse_collectives(TPU)
    assert reduced[:4] == ("all-reduce", 1200, 8, 1)
    assert gathered[:4] == ("all-gather", 320, 8, 1)
    found = {c.kind: c for c in found}
    assert found["all-gather"] == ("all-gather", 2048, 4, 48, "layer/wi")
    assert found["reduce-scatter"][:4] == ("reduce-scatter", 2048, 4, 48)
    assert found["collective-permute"][:2] == ("collective-permute", 32)
    assert found["collective-permute"].bytes_sent == 32
    assert len(found) == 3


@pytest.mark.parametrize(("line", "group"), [
    ("replica_groups={{0,4},{1,5}}", 2), ("replica_groups=[2,8]<=[16]", 8),
    ("replica_groups=[4,4]<=[4,4]T(1,0)", 4), ("source_target_pairs={{0,1}}", 1),
    ("replica_groups=mesh['a'=4,'b'=1,'c'=4], device_ids=([4,4]T(1,0)) {'c'}", 4)])
def test_group_size_in_every_notation(line, group):
    assert hlo._group_size(line) == group


GPU = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %left.1 = bf16[64,128]{1,0} get-tuple-element(%p), index=1
  %right.2 = bf16[32,128]{1,0} get-tuple-element(%p), index=2
  %product.3 = (f32[64,32]{1,0}, s8[4096]{0}) custom-call(%left.1, %right.2), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_batch_dimensions":[],"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
}

%condition (p: (s32[], bf16[64,32])) -> pred[] {
  %bound = s32[] constant(3)
}

ENTRY %main (a: bf16[8,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %attention = (bf16[8,16]{1,0}, s8[0]{0}) custom-call(%a, %a, %a), custom_call_target="__cudnn$fmhaSoftmax"
  %loop = (s32[], bf16[64,32]) while(%a), condition=%condition, body=%body
}
"""


def test_costs_of_gpu_library_calls():
    flops, bytes_accessed = hlo.library_call_costs(GPU)
    assert flops == 3 * 2 * 64 * 32 * 128
    assert bytes_accessed == 3 * (64 * 32 * 4 + (64 + 32) * 128 * 2) + 4 * 8 * 16 * 2
    assert hlo.library_call_costs("HloModule nothing") == (0, 0)
