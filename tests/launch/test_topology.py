"""What an accelerator type's name means, and what a user is told who gets one wrong."""

import pytest

from launch.errors import UserError
from launch.topology import GENERATIONS, find_tpu, tpu_types


@pytest.mark.parametrize(
    ("name", "shape", "chips", "hosts", "chips_per_host"),
    [
        ("v4-8", "2x2x1", 4, 1, 4),
        ("v4-64", "2x4x4", 32, 8, 4),
        ("v5p-128", "4x4x4", 64, 16, 4),
        ("v5p-1024", "8x8x8", 512, 128, 4),
        ("v5litepod-1", "1x1", 1, 1, 1),
        ("v5litepod-4", "2x2", 4, 1, 4),
        ("v5litepod-8", "2x4", 8, 1, 8),
        ("v5litepod-16", "4x4", 16, 4, 4),
        ("v5litepod-256", "16x16", 256, 64, 4),
        ("v6e-128", "8x16", 128, 32, 4),
    ],
)
def test_shapes(name: str, shape: str, chips: int, hosts: int, chips_per_host: int) -> None:
    found = find_tpu(name)
    assert (found.name, found.shape) == (name, shape)
    assert (found.chips, found.hosts, found.chips_per_host) == (chips, hosts, chips_per_host)


def test_every_slice_is_a_whole_number_of_full_hosts() -> None:
    for one in tpu_types().values():
        assert one.hosts * one.chips_per_host == one.chips
        assert one.size == one.chips * (2 if one.generation.counts_cores else 1)


def test_descriptions_say_what_a_name_counts() -> None:
    assert find_tpu("v4-8").description == "4 v4 chips (8 TensorCores) on 1 VM"
    assert find_tpu("v5litepod-256").description == "256 v5e chips on 64 VMs"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5-256", ["v5litepod-256 (256 v5e chips on 64 VMs)", "v5p-256 (128 v5p chips (256 TensorCores) on 32 VMs)"]),
        (
            "tpu-v5-256",
            ["v5litepod-256 (256 v5e chips on 64 VMs)", "v5p-256 (128 v5p chips (256 TensorCores) on 32 VMs)"],
        ),
        ("v5-4", ["write v5litepod-4 (4 v5e chips on 1 VM)"]),
        ("v5e-256", ["calls it v5litepod-256"]),
        ("tpu-v5e-16", ["'tpu-v5e-16'", "calls it v5litepod-16 (16 v5e chips on 4 VMs)"]),
        ("TPU_V5E-16", ["'TPU_V5E-16'", "calls it v5litepod-16"]),
        ("V5litepod_16", ["calls it v5litepod-16"]),
        ("tpu-v6e-200", ["the nearest is v6e-256"]),
        (
            "v2-8",
            ["v2 and v3 are not supported", "v4, v5e, v5p, v6e", "from v4-8 (4 v4 chips (8 TensorCores) on 1 VM) on"],
        ),
        ("tpu-v3-32", ["v2 and v3 are not supported"]),
        ("v4-4", ["TensorCores, two on each chip", "nearest is v4-8 (4 v4 chips"]),
        ("v5litepod-200", ["counts chips", "nearest is v5litepod-256"]),
        ("v5litpod-16", ["did you mean 'v5litepod-16'?"]),
        ("tpu7x-128", ["GKE"]),
        ("v7x-8", ["GKE"]),
        ("tpu-v7x-8", ["GKE"]),
        ("h100", ["unknown", "v5litepod-N"]),
    ],
)
def test_wrong_names(name: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        find_tpu(name)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_image_that_a_vm_boots_is_that_of_its_generation() -> None:
    """As the Cloud TPU API calls them; another generation's image does not boot."""
    assert {one.name: one.runtime for one in GENERATIONS} == {
        "v4": "tpu-ubuntu2204-base",
        "v5e": "v2-alpha-tpuv5-lite",
        "v5p": "v2-alpha-tpuv5",
        "v6e": "v2-alpha-tpuv6e",
    }
