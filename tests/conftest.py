"""What all tests share: eight CPU devices in this process, one compilation cache for all processes, a tiny dataset."""

import os
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent

# Before anything imports jax. Child processes choose their own device count.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("JASMINE_COMPILATION_CACHE_DIR", str(REPO / ".pytest_cache" / "xla"))
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["JASMINE_COMPILATION_CACHE_DIR"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
for name in ("JASMINE_RUN_DIR", "JASMINE_STORAGE", "JASMINE_ATTEMPT", "JASMINE_DATA_DIR"):
    os.environ.pop(name, None)

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from jasmine.data.writer import EpisodeWriter  # noqa: E402
from tests.jobs import QUICK_COMPILE, Family  # noqa: E402

os.environ.update(QUICK_COMPILE)  # in time for XLA, which reads it when it is used first

pytest_plugins = ["tests.clusters.fixtures"]

_APART = ("launch", "clusters", "chaos", "baselines")  # folders whose tests any worker runs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--jobs",
        choices=("with", "without", "only"),
        default="with",
        help="tests that start jobs of several processes and hold them to deadlines; they suffer from neighbours",
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keeps those tests together in one worker that share the family of runs or the fixtures of a file, except where each of
    a file's tests takes long and the fixtures do not."""
    if "family" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.xdist_group("family"))
    elif item.path.name == "test_learning.py" or item.path.relative_to(REPO / "tests").parts[0] not in _APART:
        item.add_marker(pytest.mark.xdist_group(item.path.name))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves tests out as `--jobs` says."""
    wanted = {"with": (True, False), "without": (False,), "only": (True,)}[config.getoption("--jobs")]
    if left_out := [item for item in items if _is_job(item) not in wanted]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _is_job(item) in wanted]


def _is_job(item: pytest.Item) -> bool:
    folder = item.path.relative_to(REPO / "tests").parts[0]
    files = ("test_end_to_end.py", "test_resume.py", "test_distributed.py", "test_gcs.py")
    return (
        folder in ("launch", "clusters", "chaos")
        or item.path.name in files
        or item.name.endswith(("[slurm]", "[cloud_tpu]"))
    )


def moving_squares(rng: np.random.Generator, frames: int, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """A bright square that takes the step that its action names; every frame of every clip differs from the others."""
    steps = np.array([(0, 1), (0, -1), (1, 0), (-1, 0)])
    actions = rng.integers(0, 4, frames)
    places = (rng.integers(0, size, 2) + np.concatenate([[(0, 0)], np.cumsum(steps[actions[:-1]], 0)])) % size
    video = rng.integers(0, 60, (frames, size, size, 3), dtype=np.uint8)
    for frame, (y, x) in enumerate(places):
        rows, columns = (y + np.arange(4)) % size, (x + np.arange(4)) % size
        video[frame][np.ix_(rows, columns)] = (255, 200, 40)
    return video, actions.astype(np.int32)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 16×16 frames with `train` (12 episodes of 20 to 31 frames) and `val` (3)."""
    root = tmp_path_factory.mktemp("tiny-data")
    for split, episodes in (("train", 12), ("val", 3)):
        rng = np.random.default_rng([7, episodes])
        with EpisodeWriter(root / split, frame_shape=(16, 16, 3), fps=15, encoding="raw", num_actions=4) as writer:
            for index in range(episodes):
                writer.write(*moving_squares(rng, 20 + index))
    return root


def scrolling_tiles(rng: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """16×16 frames of coloured tiles that scroll as their actions say: even untrained, models tell them apart."""
    picture = np.kron(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), np.ones((4, 4, 1), np.uint8))
    steps = np.array([(0, 2), (0, -2), (2, 0), (-2, 0)])
    actions = rng.integers(0, 4, frames)
    places = np.concatenate([[(0, 0)], np.cumsum(steps[actions[:-1]], 0)])
    return np.stack([np.roll(picture, place, (0, 1)) for place in places]), actions.astype(np.int32)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A brief run of every baseline, by the names of `tests.jobs.FAMILY`."""
    root = tmp_path_factory.mktemp("family")
    for split, episodes in (("train", 12), ("val", 3)):
        rng = np.random.default_rng([7, episodes])
        with EpisodeWriter(
            root / "data" / split, frame_shape=(16, 16, 3), fps=15, encoding="raw", num_actions=4
        ) as out:
            for index in range(episodes):
                out.write(*scrolling_tiles(rng, 20 + index))
    return Family(root / "data", root)
