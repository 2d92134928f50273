"""The one training loop, from options to exit code. A baseline brings a `Task`; all else happens here, once.

What can be checked alone is checked before the processes meet and before the run directory is touched. All that comes after,
from the newest checkpoint to the last step, is an attempt at the run: `jasmine.training.attempt`.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from jasmine.data.bucket import is_bucket_url
from jasmine.data.episodes import EpisodeDataset, Episodes
from jasmine.data.sampling import WindowSampler
from jasmine.data.staging import DataCache
from jasmine.data.tokens import TokenDataset, open_training_data
from jasmine.errors import EXIT_SAVED, UserError
from jasmine.training import distributed, run_files
from jasmine.training.attempt import Attempt
from jasmine.training.config import TrainConfig
from jasmine.training.distributed import say
from jasmine.training.heartbeat import Heartbeat
from jasmine.training.mesh import check_batch, make_mesh
from jasmine.training.preemption import StopSignal
from jasmine.training.preflight import preflight
from jasmine.training.replay import replay
from jasmine.training.runs import CONFIG_NAME, TrainedRun, frozen_parts
from jasmine.training.task import BaseTask, DataInfo


def train(
    make_task: Callable[[Any, DataInfo, Mapping[str, TrainedRun]], BaseTask], config: TrainConfig, job: str
) -> None:
    """Trains until `num_steps` (or `stop_at_step`), or until a signal asks to save and leave.

    Args:
        make_task: from the config, what the data is and the frozen parts to the task; a baseline's `Task`.
        job: the baseline's name, for records.

    Raises:
        UserError: anything the user can mend; before the run directory is touched wherever that is possible.
        NotFiniteError: a loss or gradient is not finite, and the options do not say to go on.
        SystemExit: 75 after a signal, with everything saved.
    """
    stop_signal = StopSignal()
    config.check()
    run_dir = run_files.run_directory(config)
    dataset = _open(config.data_dir, "train", config)
    val_dataset = _open(config.val_data_dir, "val", config) if config.val_data_dir else None
    task = make_task(config, DataInfo.of(dataset), frozen_parts(config, run_dir))
    task.check()
    if config.replay_step and not (run_dir / CONFIG_NAME).exists():
        raise UserError(f"--replay_step={config.replay_step}: {run_dir} is not the directory of a run that has trained")

    # A replay may look at a run that is not its own: what the launcher is told goes where the launcher looks.
    own_dir = epath.Path(os.environ.get("JASMINE_RUN_DIR") or run_dir) if config.replay_step else run_dir
    heartbeat = Heartbeat(own_dir)
    heartbeat.doing("joining")
    distributed.initialize()
    task.check_weights()
    met = time.time()
    stop_signal.start()
    heartbeat.doing("preflight")
    preflight(own_dir)
    heartbeat.doing("restoring")
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, mesh, config.grad_accumulation_steps)
    if config.dtype == "float32":
        # Accelerators would multiply float32 in bfloat16 or TF32 by default; who asks for float32 compares curves.
        jax.config.update("jax_default_matmul_precision", "highest")
    if config.replay_step:
        say(distributed.topology())
        finished = replay(task, config, run_dir, mesh, dataset, stop_signal, heartbeat)
        stop_signal.close()
        heartbeat.close()
        if not finished:
            sys.exit(EXIT_SAVED)  # there was nothing to save; another go repeats it
        return
    lock = run_files.prepare(run_dir)
    if jax.process_index() == 0:
        seen = {
            "processes": jax.process_count(),
            "devices": jax.device_count(),
            "device_kind": jax.devices()[0].device_kind,
        }
        run_files.log_event(run_dir, "init", time=met, **seen)
    say(distributed.topology())
    say(f"mesh {' × '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}; run directory {run_dir}")
    say(
        f"data {config.data_dir}: {len(dataset.lengths):,} episodes, {dataset.num_frames:,} frames of "
        f"{'×'.join(map(str, dataset.frame_shape))}{', as tokens' if isinstance(dataset, TokenDataset) else ''}"
    )
    for data in (dataset, val_dataset):
        if isinstance(data, EpisodeDataset | TokenDataset) and data.staged is not None:
            say(f"{data.path}: {data.staged}")
    attempt = Attempt(task, config, job, run_dir, mesh, dataset, val_dataset, stop_signal, heartbeat)
    # Not closed after an error: its message must come out at once, and closing waits for sinks, saves and peers.
    attempt.restore_or_begin()
    saved_by_signal = attempt.steps()
    attempt.close()
    stop_signal.close()
    heartbeat.close()
    lock.close()
    if saved_by_signal:
        sys.exit(EXIT_SAVED)


def _open(path: str, split: str, config: TrainConfig) -> Episodes | TokenDataset:
    height, width, channels = config.image_height, config.image_width, config.image_channels
    shape = (height, width, channels) if height and width and channels else None
    cache = DataCache.of_host(config.data_cache_gib) if is_bucket_url(path) else None
    try:
        dataset = open_training_data(path, split, frame_shape=shape, cache=cache)
    except UserError as error:
        raise type(error)(f"--{'data_dir' if split == 'train' else 'val_data_dir'}: {error}") from error
    if isinstance(dataset, TokenDataset):
        dataset.check_seq_len(config.seq_len)
    WindowSampler(dataset.lengths, config.seq_len, config.seed, source=path)  # refuses clips longer than every episode
    return dataset
