"""Counts over compiled programs: loops as often as they run, exchange by what each device sends."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jasmine.training import hlo
from jasmine.training.flops import product_flops
from jasmine.training.mesh import MeshConfig, make_mesh


def compiled_text(function, *args, **options):
    return jax.jit(function, **options).lower(*args).compile().as_text()


def test_a_loop_counts_as_often_as_it_runs():
    x, w = jax.ShapeDtypeStruct((8, 64), jnp.float32), jax.ShapeDtypeStruct((5, 64, 64), jnp.float32)

    def forward(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    found = hlo.cost(compiled_text(forward, x, w))
    assert found.flops == product_flops(forward, x, w) == 5 * 2 * 8 * 64 * 64
    assert found.bytes >= 5 * 64 * 64 * 4  # each layer's weights at least
    assert found.bytes < 5 * 5 * 64 * 64 * 4  # and not the whole stack for each
    assert found.collectives == ()


def test_exchange_is_what_each_device_sends():
    mesh = make_mesh(MeshConfig(fsdp=4))
    rows, whole = NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)
    found = hlo.cost(compiled_text(lambda x: x.sum(0), x, out_shardings=whole))
    (one,) = found.collectives
    assert (one.kind, one.count, one.between_slices) == ("all-reduce", 1, False)
    assert one.bytes == 2 * 7 / 8 * 32 * 4  # a ring over eight
    found = hlo.cost(compiled_text(lambda x: x * 2, x, out_shardings=whole))
    assert [(one.kind, one.bytes) for one in found.collectives] == [("all-gather", 7 / 8 * 64 * 32 * 4)]


# As libtpu writes: no trip count but a counter from two in steps of two, a product as a padded convolution, one gather in two
# fusions that run along with other work, groups by the axes of a mesh, an array on the chip, an exchange between slices.
TPU = """
HloModule m, is_scheduled=true

%part.1 (p0: bf16[32,512]) -> bf16[128,512] {
  %p0 = bf16[32,512]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[128,512]{1,0} all-gather(%p0), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%part.2 (p0: bf16[32,512]) -> bf16[128,512] {
  %p0.2 = bf16[32,512]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[128,512]{1,0} all-gather(%p0.2), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%body (t: (u32[], bf16[32,512])) -> (u32[], bf16[32,512]) {
  %t = (u32[]{:T(128)}, bf16[32,512]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%t), index=0
  %x = bf16[32,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%t), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  %g1 = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kCustom, calls=%part.1
  %g2 = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kCustom, calls=%part.2
  ROOT %out = (u32[]{:T(128)}, bf16[32,512]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, %x)
}

%condition (t.1: (u32[], bf16[32,512])) -> pred[] {
  %t.1 = (u32[]{:T(128)}, bf16[32,512]{1,0}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%t.1), index=0
  %limit = u32[]{:T(128)} constant(8)
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: f32[16,4], b: f32[4,8]) -> f32[16,2,8] {
  %a = f32[16,4,1]{1,0,2:T(8,128)} parameter(0)
  %b = f32[4,8,2]{1,0,2:T(8,128)S(1)} parameter(1)
  %first = u32[]{:T(128)} constant(2)
  %copied = u32[]{:T(128)} copy(%first)
  %start = (u32[]{:T(128)}, bf16[32,512]{1,0:T(8,128)(2,1)S(1)}) tuple(%copied, %b)
  %loop = (u32[]{:T(128)}, bf16[32,512]{1,0:T(8,128)(2,1)S(1)}) while(%start), condition=%condition, body=%body
  %token = token[] after-all()
  %send = (f32[64]{0}, u32[], token[]) send(%a, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %conv = f32[16,8,2]{1,0,2:T(8,128)} convolution(%a, %b), window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_io0->bf0
}
"""  # noqa: E501


def test_programs_of_tpus():
    found = hlo.cost(TPU, slices=2)
    assert found.flops == 2 * 16 * 4 * 8 * 2  # of the convolution's four places, two are padding
    assert found.bytes == 16 * 4 * 4 + 16 * 8 * 2 * 4  # what lies on the chip costs no traffic
    by_kind = {(one.kind, one.between_slices): (one.count, one.bytes) for one in found.collectives}
    assert by_kind == {
        ("all-gather", False): (
            3,
            3 * 3 / 4 * 128 * 512 * 2,
        ),  # from two to eight in steps of two, over the four of axis b
        ("all-reduce", True): (1, 2 * 1 / 2 * 64 * 4),
    }
