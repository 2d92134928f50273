"""How many floating-point operations a step needs, and how many the device could do: for MFU and reports."""

import math
from collections.abc import Callable
from typing import Any

import jax

from jasmine.models.layers import unfused_attention
from jasmine.training.state import ModelDefinition
from jasmine.training.step import FrozenParams, frozen_modules
from jasmine.training.task import BaseTask, Batch, Keys

# Peak dense bfloat16 FLOP/s of one device, by the start of jax's `device_kind`; longer names first. Vendors' data sheets.
PEAK_FLOPS = {
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak bfloat16 FLOP/s of a device; None where it is not known (CPUs, other GPUs)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if device.device_kind.startswith(name)), None)


def step_flops(task: BaseTask, definition: ModelDefinition, frozen: FrozenParams, batch: Batch) -> float:
    """FLOPs of the matrix products of one update: those of the frozen parts, and three times those of the loss, as usual for
    MFU (one forward pass, and two products for each in the backward pass; recomputation does not count).

    Counted from the traced program and not by the compiler, whose count leaves out the repeats of a scan.
    """

    def prepare(frozen: FrozenParams, batch: Batch) -> Batch:
        return task.prepare(frozen_modules(task, frozen), batch)

    def loss(params: Any, batch: Batch) -> Any:
        return task.loss(definition.module(params), batch, Keys(jax.random.key(0)))

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (frozen, batch))
    with unfused_attention():  # the fused kernel hides its products from the count
        return product_flops(prepare, *shapes) + 3 * product_flops(
            loss, definition.shapes, jax.eval_shape(prepare, *shapes)
        )


def product_flops(function: Callable, *args: Any) -> float:
    """FLOPs of the matrix products that a traced function asks for."""
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracting)
            continue
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inner = [_count(sub) for sub in _sub_programs(equation.params)]
        total += repeats * (max(inner, default=0.0) if equation.primitive.name == "cond" else sum(inner))
    return total


def _sub_programs(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found
