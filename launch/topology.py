"""Facts of accelerators: what the name of a Cloud TPU type means, and what its chips, and GPUs, can do. Nothing else in
`launch` knows these numbers.

Shapes and hosts are those of the Cloud TPU API, as Levanter (`TPU_CONFIGS`), XPK and axlearn (`system_characteristics`) and
MaxText (`accelerator_to_spec_map`) list them; memory, FLOP/s and bandwidths are those of the system architecture pages of the
Cloud TPU documentation. GPUs are by their vendor's data sheets, and memory as their driver counts it.
"""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from launch.errors import UserError

_GIB = 2**30


@dataclass(frozen=True)
class Generation:
    """What all TPUs of one generation share.

    Attributes:
        name: as compilers and people call it, such as "v5e".
        prefix: of its accelerator types, such as "v5litepod".
        counts_cores: whether the number in a type's name counts TensorCores, two a chip, and not chips.
        runtime: the image that the Cloud TPU API boots by default.
        hbm_bytes: memory of a chip.
        peak_flops: dense bfloat16 FLOP/s of a chip.
        hbm_bandwidth: bytes/s of a chip.
        ici_bandwidth: bytes/s of a chip to its neighbours, all links and both directions together.
        shapes: the chips of each size that there is, by the number in its name.
    """

    name: str
    prefix: str
    counts_cores: bool
    runtime: str
    hbm_bytes: int
    peak_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    shapes: Mapping[int, str]


_CUBES = {
    8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8",
}  # fmt: skip
_SQUARES = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip

GENERATIONS = (
    Generation("v4", "v4", True, "tpu-ubuntu2204-base", 32 * _GIB, 275e12, 1228e9, 300e9, _CUBES),
    Generation("v5e", "v5litepod", False, "v2-alpha-tpuv5-lite", 16 * _GIB, 197e12, 819e9, 200e9, _SQUARES),
    Generation("v5p", "v5p", True, "v2-alpha-tpuv5", 95 * _GIB, 459e12, 2765e9, 600e9, _CUBES),
    Generation("v6e", "v6e", False, "v2-alpha-tpuv6e", 32 * _GIB, 918e12, 1640e9, 448e9, _SQUARES),
)
# Bytes/s of one VM to another slice, over the data centre's network.
DCN_BANDWIDTH = 12.5e9
_CHIPS_PER_HOST = 4


@dataclass(frozen=True)
class Gpu:
    """Of one GPU: memory in bytes, dense bfloat16 FLOP/s, bytes/s of its memory, and of its links to the GPUs of the same
    node, both directions together."""

    name: str
    memory_bytes: int
    peak_flops: float
    bandwidth: float
    link_bandwidth: float


# Of two sizes of memory, the name that says none means the smaller.
GPUS = (
    Gpu("a100", 40 * _GIB, 312e12, 1555e9, 600e9),
    Gpu("a100-80gb", 80 * _GIB, 312e12, 2039e9, 600e9),
    Gpu("h100", 79 * _GIB, 989e12, 3350e9, 900e9),
    Gpu("h200", 140 * _GIB, 989e12, 4800e9, 900e9),
    Gpu("b200", 179 * _GIB, 2250e12, 8000e9, 1800e9),
    Gpu("l40s", 45 * _GIB, 362e12, 864e9, 64e9),
)


def find_gpu(gres_type: str) -> Gpu | None:
    """Return the GPU that a Slurm cluster's name such as "h100" or "nvidia_a100-sxm4-80gb" means; None if unknown."""
    words = set(re.split(r"[^a-z0-9]+", gres_type.lower()))
    known = [gpu for gpu in GPUS if set(gpu.name.split("-")) <= words]
    return max(known, key=lambda gpu: len(gpu.name), default=None)


@dataclass(frozen=True)
class TpuType:
    """An accelerator type: `generation`, its `size` as in the name, and the `shape` of its chips, such as "4x8"."""

    generation: Generation
    size: int
    shape: str

    @property
    def name(self) -> str:
        """The name that the Cloud TPU API takes."""
        return f"{self.generation.prefix}-{self.size}"

    @property
    def chips(self) -> int:
        """How many chips a slice has."""
        return math.prod(map(int, self.shape.split("x")))

    @property
    def hosts(self) -> int:
        """How many VMs a slice has; each is one process of a job."""
        return 1 if self.chips <= 8 and not self.generation.counts_cores else max(1, self.chips // _CHIPS_PER_HOST)

    @property
    def chips_per_host(self) -> int:
        """How many chips each VM has."""
        return self.chips // self.hosts

    @property
    def compiler_name(self) -> str:
        """The topology as libtpu's ahead-of-time compiler calls it, such as "v5e:4x8"."""
        return f"{self.generation.name}:{self.shape}"

    @property
    def description(self) -> str:
        """Chips and VMs, for people; says so where the name counts something else."""
        cores = f" ({self.size} TensorCores)" if self.generation.counts_cores else ""
        vms = f"{self.hosts} VM{'s' * (self.hosts > 1)}"
        return f"{self.chips} {self.generation.name} chip{'s' * (self.chips > 1)}{cores} on {vms}"


def tpu_types() -> dict[str, TpuType]:
    """Return every accelerator type there is, by its name."""
    types = [
        TpuType(generation, size, shape) for generation in GENERATIONS for size, shape in generation.shapes.items()
    ]
    return {one.name: one for one in types}


def find_tpu(name: str) -> TpuType:
    """Return the accelerator type called `name`.

    Raises:
        UserError: there is none; names what was probably meant, and why TPU7x, v2 and v3 cannot be had here.
    """
    types = tpu_types()
    if name in types:
        return types[name]
    meant = re.sub(r"^tpu-", "", name.strip().lower().replace("_", "-"))
    if re.match(r"(tpu|v)-?7", meant):
        raise UserError(
            f"accelerator_type {name!r}: the Cloud TPU API ends with v6e; TPU7x and later are rented through GKE, which this "
            "backend does not speak"
        )
    if re.match(r"v[23](-|$)", meant):
        names, oldest = ", ".join(one.name for one in GENERATIONS), types["v4-8"]
        raise UserError(
            f"accelerator_type {name!r}: TPU v2 and v3 are not supported; there are {names}, from {oldest.name} "
            f"({oldest.description}) on"
        )
    if found := re.fullmatch(r"v5-(\d+)", meant):
        both = [types[other] for other in (f"v5litepod-{found[1]}", f"v5p-{found[1]}") if other in types]
        choice = " or ".join(f"{one.name} ({one.description})" for one in both) or "v5litepod-256 or v5p-256"
        raise UserError(f"accelerator_type {name!r} could be two things: write {choice}")
    by_name = {alias: one for one in GENERATIONS for alias in (one.prefix, one.name)}
    prefix, _, digits = meant.partition("-")
    generation = by_name.get(prefix)
    if generation is not None and digits.isdecimal():
        size = int(digits)
        if size in generation.shapes:
            one = types[f"{generation.prefix}-{size}"]
            raise UserError(f"accelerator_type {name!r}: the Cloud TPU API calls it {one.name} ({one.description})")
        nearest = min(generation.shapes, key=lambda other: abs(math.log(other / max(size, 1))))
        one = types[f"{generation.prefix}-{nearest}"]
        unit = "TensorCores, two on each chip" if generation.counts_cores else "chips"
        sizes = ", ".join(map(str, generation.shapes))
        raise UserError(
            f"accelerator_type {name!r}: there is none of that size; {generation.prefix} counts {unit}, in {sizes}; "
            f"the nearest is {one.name} ({one.description})"
        )
    near = difflib.get_close_matches(meant, types, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    prefixes = ", ".join(f"{one.prefix}-N" for one in GENERATIONS)
    raise UserError(f"accelerator_type {name!r} is unknown{hint} (there are: {prefixes})")
