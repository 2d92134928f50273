"""Makes a token dataset (`jasmine.data.tokens`): every window of a dataset, encoded by a trained tokenizer.

    python -m jasmine.data.tokenize --tokenizer RUN --data D --output_dir OUT [--lam RUN] [--split train --split val]

RUN is the run directory of a tokenizer (and of a latent action model), or a run's name under the storage root. With stride
1, the default, training on OUT sees at each step the examples that it would see on D. Processes that find each other, as
under `srun` (`jasmine.training.distributed`), share the work. Interrupted, the same command goes on.

Invariants: a shard is a function of the data, the models and the options; which process makes it, and after how many
interruptions, changes nothing. A finished shard is never made again. What an OUT holds already is never overwritten.
"""

import dataclasses
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jasmine.data.bucket import is_bucket_url
from jasmine.data.episodes import Episodes
from jasmine.data.index import INDEX_NAME, read_index
from jasmine.data.opening import open_dataset
from jasmine.data.splits import ShapeOptions, find_splits
from jasmine.data.tokens import EncoderInfo, Origin, TokenInfo, TokenMetadata, token_metadata
from jasmine.data.writer import EpisodeWriter
from jasmine.errors import EXIT_SAVED, UserError
from jasmine.training import cli, distributed
from jasmine.training.runs import TrainedRun, load_run

TOKENIZER_JOBS = ("train_tokenizer_vqvae", "train_tokenizer_mae")
LAM_JOBS = ("train_lam",)
# A shard is what an interruption costs at most, and what processes share out: many of them, but no tiny files.
# ArrayRecord pads a file by some 100 KiB.
SHARDS, SMALLEST_SHARD, LARGEST_SHARD_BYTES = 64, 2048, 64 << 20
# Measured on CoinRun tokens: 8 windows a record take a third of the bytes of 1, as neighbours share most of their tokens,
# and are read as fast. Of latents, which no compression helps, a record is one window.
RECORD_BYTES, WINDOWS_PER_RECORD = 32 << 10, 8
PROGRESS_SECONDS = 5
_POLL_SECONDS = 2

Windows = tuple[np.ndarray, np.ndarray | None]
Encode = Callable[[np.ndarray], tuple[jax.Array, jax.Array | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ShapeOptions):
    """What to encode, with what, in which windows."""

    tokenizer: str = ""
    """Run of the tokenizer: a run directory, or a run's name under the storage root."""
    data: str = ""
    """What to encode: a dataset, or one split of it."""
    output_dir: str = ""
    """Where to write; the same splits."""
    lam: str = ""
    """Run of a latent action model, to store its actions as well."""
    split: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Which splits, each with its own --split; all if not given."""
    seq_len: int = 16
    """Frames in a window; training from the tokens takes the same."""
    stride: int = 1
    """Frames from the start of a window to that of the next. 1: every window; --seq_len: each frame once."""
    batch_size: int = 64
    """Windows encoded at once by each process, rounded up to a multiple of its devices."""
    encoding: Literal["raw", "zstd"] | None = None
    """How windows are stored. Default: zstd for tokens, raw for latents, which it hardly makes smaller."""
    windows_per_shard: int | None = None
    """After so many windows a file ends, with the episode: what an interruption costs at most. Default: a 64th of the
    split, but 2048 at least, and 64 MiB at most."""

    def check(self) -> None:
        """Raises UserError where options make no sense."""
        for name in ("tokenizer", "data", "output_dir"):
            if not getattr(self, name):
                raise UserError(f"--{name} is not set (--help lists all options)")
        if min(self.seq_len, self.batch_size, self.windows_per_shard or 1) < 1:
            raise UserError("--seq_len, --batch_size and --windows_per_shard must be at least 1")
        if self.lam and self.seq_len < 2:
            raise UserError("--lam needs windows of two frames at least: give --seq_len 2 or more")
        if not 1 <= self.stride <= self.seq_len:
            raise UserError(
                f"--stride={self.stride}: give 1 (every window) to {self.seq_len} (--seq_len, each frame once)"
            )


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Trained models on this process's devices.

    Attributes:
        encode: uint8 (B, T, H, W, C) -> tokens or latents, and latent actions (B, T - 1) with a LAM. Does not wait.
        batch_size: windows that `encode` takes.
        describe: `TokenInfo`'s fields that follow from the models.
    """

    encode: Encode
    batch_size: int
    describe: dict[str, Any]


def load_encoder(options: Options) -> Encoder:
    """Loads the models.

    Raises:
        UserError: a run that is not there or of the wrong kind, or models of frames of different shapes.
    """
    tokenizer = load_run(options.tokenizer, option="--tokenizer", jobs=TOKENIZER_JOBS)
    lam = load_run(options.lam, option="--lam", jobs=LAM_JOBS) if options.lam else None
    frame_shape = tokenizer.data.frame_shape
    if lam is not None and lam.data.frame_shape != frame_shape:
        raise UserError(
            f"--lam: {lam.path} was trained on frames of {lam.data.frame_shape}, and the tokenizer {tokenizer.path} on "
            f"{frame_shape}: choose two of the same data"
        )
    kind: Literal["tokens", "latents"] = "tokens" if tokenizer.job == "train_tokenizer_vqvae" else "latents"
    if tokenizer.config.dtype == "float32":  # as in training: accelerators would multiply in TF32 or bfloat16
        jax.config.update("jax_default_matmul_precision", "highest")
    mesh = Mesh(np.array(jax.local_devices()), ("batch",))
    split, whole = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    graph, state = nnx.split((tokenizer.module(), None if lam is None else lam.module()))
    state = jax.device_put(jax.device_get(state), whole)

    def forward(state: Any, videos_BTHWC: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        tokenizer_module, lam_module = nnx.merge(graph, state)
        videos_BTHWC = videos_BTHWC.astype(jnp.float32) / 255
        encode = tokenizer_module.encode_tokens if kind == "tokens" else tokenizer_module.encode_latents
        return encode(videos_BTHWC), None if lam_module is None else lam_module.encode_actions(videos_BTHWC)

    compiled = jax.jit(forward, in_shardings=(whole, split), out_shardings=split)
    batch_size = -(-options.batch_size // mesh.size) * mesh.size
    clip = jax.ShapeDtypeStruct((batch_size, options.seq_len, *frame_shape), jnp.uint8)
    values, _ = jax.eval_shape(forward, state, clip)
    dtype = np.min_scalar_type(tokenizer.config.num_latents - 1) if kind == "tokens" else np.dtype(np.float32)
    describe = {
        "kind": kind,
        "dtype": dtype.name,
        "shape": values.shape[2:],
        "frame_shape": frame_shape,
        "tokenizer": _encoder_info(tokenizer),
        "lam": None if lam is None else _encoder_info(lam),
    }
    return Encoder(lambda videos: compiled(state, jax.device_put(videos, split)), batch_size, describe)


def tokenize(options: Options, encoder: Encoder) -> None:
    """Encodes the splits: each process makes its share of the shards, process 0 puts them together.

    Raises:
        UserError: what is asked for cannot be had, or `output_dir` holds other data.
    """
    folders = find_splits(options.data)
    for name in options.split:
        if name not in folders:
            raise UserError(f"--split {name}: {options.data} has {', '.join(folders)}")
    for name in options.split or folders:
        dataset = open_dataset(folders[name], frame_shape=options.frame_shape())
        work = _Work.plan(options, encoder, dataset, os.path.join(options.output_dir, name))
        if work.finished:
            _say(f"{work.target}: finished before")
        else:
            work.run()
        _meet(name)  # nobody looks for parts any more
        if jax.process_index() == 0:
            shutil.rmtree(work.parts, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class _Work:
    """One split: `shards` are runs of episodes, as indices into the source; `counts` are windows by episode; `settings`
    are the writer's."""

    encoder: Encoder
    dataset: Episodes
    target: str
    metadata: TokenMetadata
    shards: tuple[np.ndarray, ...]
    counts: np.ndarray
    settings: dict[str, Any]
    finished: bool

    @classmethod
    def plan(cls, options: Options, encoder: Encoder, dataset: Episodes, target: str) -> "_Work":
        trained_on = encoder.describe["frame_shape"]
        if dataset.frame_shape != trained_on:
            raise UserError(
                f"{dataset.path} holds frames of {dataset.frame_shape}, but the tokenizer was trained on {trained_on}"
            )
        counts = np.maximum(0, (dataset.lengths - options.seq_len) // options.stride + 1)
        if not counts.any():
            raise UserError(
                f"every episode of {dataset.path} is shorter than --seq_len={options.seq_len}: "
                f"give at most {dataset.lengths.max()}, the length of the longest"
            )
        tokens = TokenInfo(
            seq_len=options.seq_len, stride=options.stride, action_shape=dataset.action_shape, **encoder.describe
        )
        window_bytes = math.prod(tokens.window_shape)
        share = min(LARGEST_SHARD_BYTES // window_bytes, max(SMALLEST_SHARD, math.ceil(counts.sum() / SHARDS)))
        share = options.windows_per_shard or max(1, share)
        skipped = tuple(np.flatnonzero(counts == 0).tolist())
        source = dataset.path if is_bucket_url(dataset.path) else os.path.abspath(dataset.path)
        origin = Origin(source, dataset.num_frames, skipped, share)
        begun, finished = _begun(target, TokenMetadata(tokens, origin))
        metadata = begun or TokenMetadata(tokens, origin)  # which is the same, but says where the models were then
        episodes = np.flatnonzero(counts)
        before = np.cumsum(counts)[episodes] - counts[episodes]
        shards = np.split(episodes, np.flatnonzero(np.diff(before // origin.windows_per_shard)) + 1)
        has_actions = dataset.num_actions is not None
        settings = {
            "frame_shape": tokens.window_shape,
            "fps": dataset.fps,
            "encoding": options.encoding or ("zstd" if tokens.kind == "tokens" else "raw"),
            "num_actions": dataset.num_actions,
            "action_shape": (options.seq_len, *dataset.action_shape) if has_actions else (),
            "frames_per_record": min(WINDOWS_PER_RECORD, max(1, RECORD_BYTES // window_bytes)),
            "env": "tokens",
            "metadata": dataclasses.asdict(metadata),
            "episodes_per_shard": sys.maxsize,
            "shard_bytes": sys.maxsize,
        }
        return cls(encoder, dataset, target, metadata, tuple(shards), counts, settings, finished)

    def run(self) -> None:
        """Makes the split; process 0 writes its index in the end."""
        if jax.process_index() == 0:
            with EpisodeWriter(self.target, **self.settings) as writer:
                self._encode_shards()
                writer.adopt([self._part(number) for number in range(len(self.shards))])
        else:
            self._encode_shards()

    @property
    def parts(self) -> str:
        """The folder of shards that are not in their place yet."""
        return os.path.join(self.target, "parts")

    def _part(self, number: int) -> str:
        return os.path.join(self.parts, f"{number:05d}")

    def _encode_shards(self) -> None:
        """Makes those of this process that are not finished, and waits until all processes have theirs."""
        mine = range(jax.process_index(), len(self.shards), jax.process_count())
        todo = [number for number in mine if not _begun(self._part(number), self.metadata)[1]]
        windows = {number: int(self.counts[self.shards[number]].sum()) for number in mine}
        progress = _Progress(self.target, sum(windows.values()), sum(windows[number] for number in todo))
        for number in todo:
            with EpisodeWriter(self._part(number), **self.settings) as writer:
                rows, actions = self._encode(self.shards[number], progress)
                ends = np.cumsum(self.counts[self.shards[number]])
                for low, high in zip([0, *ends], ends, strict=False):
                    writer.write(rows[low:high], None if actions is None else actions[low:high])
        progress.close()
        _meet(self.target)

    def _encode(self, episodes: np.ndarray, progress: "_Progress") -> Windows:
        """All windows of a shard as they are stored, and their actions. The devices encode while the next are read."""
        total = int(self.counts[episodes].sum())
        rows = np.empty((total, *self.metadata.tokens.window_shape), np.uint8)
        all_actions: list[np.ndarray] = []
        encoding: tuple[int, tuple[jax.Array, jax.Array | None]] | None = None
        done = 0

        def collect(held: int, results: tuple[jax.Array, jax.Array | None]) -> None:
            nonlocal done
            values, latent_actions = jax.device_get(results)
            latent_actions = None if latent_actions is None else latent_actions[:held]
            rows[done : done + held] = self.metadata.tokens.pack(values[:held], latent_actions)
            done += held
            progress.add(held)

        for videos, actions in self._batches(episodes):
            held = len(videos)
            missing = self.encoder.batch_size - held  # the last batch of a shard is filled up with its first window
            padded = np.concatenate([videos, np.repeat(videos[:1], missing, axis=0)]) if missing else videos
            begun = held, self.encoder.encode(padded)
            if actions is not None:
                all_actions.append(actions)
            if encoding is not None:
                collect(*encoding)
            encoding = begun
        assert encoding is not None
        collect(*encoding)
        return rows, np.concatenate(all_actions) if all_actions else None

    def _batches(self, episodes: np.ndarray) -> Iterator[Windows]:
        """The windows of episodes in order, `batch_size` at a time, fewer at the end. A frame is read once, or nearly."""
        counts = self.counts[episodes]
        ends = np.cumsum(counts)
        for low in range(0, int(ends[-1]), self.encoder.batch_size):
            high = min(low + self.encoder.batch_size, int(ends[-1]))
            pieces: list[Windows] = []
            for k in range(np.searchsorted(ends, low, side="right"), np.searchsorted(ends, high) + 1):
                first = int(ends[k] - counts[k])
                pieces.append(self._windows(int(episodes[k]), max(low - first, 0), min(high, int(ends[k])) - first))
            videos = np.concatenate([piece[0] for piece in pieces])
            actions = [piece[1] for piece in pieces if piece[1] is not None]
            yield videos, np.concatenate(actions) if actions else None

    def _windows(self, episode: int, first: int, last: int) -> Windows:
        """Windows `first` to `last` of an episode: (B, T, H, W, C) and (B, T, *action_shape)."""
        stride, seq_len = self.metadata.tokens.stride, self.metadata.tokens.seq_len
        length = (last - first - 1) * stride + seq_len
        frames, actions = self.dataset.read_window(episode, first * stride, length)

        def cut(x: np.ndarray) -> np.ndarray:
            return np.moveaxis(np.lib.stride_tricks.sliding_window_view(x, seq_len, axis=0)[::stride], -1, 1)

        return cut(frames), None if actions is None else cut(actions)


class _Progress:
    """A line every few seconds: how far this process is, how fast, how much longer."""

    def __init__(self, target: str, total: int, todo: int) -> None:
        process, processes = jax.process_index(), jax.process_count()
        self._head = f"process {process} of {processes}: {target}" if processes > 1 else target
        self._total, self._todo = total, todo
        self._done = 0
        self._begin = self._said = time.monotonic()
        if todo < total:
            print(f"{self._head}: going on after {total - todo:,} of {total:,} windows", flush=True)

    def add(self, windows: int) -> None:
        self._done += windows
        now = time.monotonic()
        if now - self._said >= PROGRESS_SECONDS:
            self._said = now
            minutes, seconds = divmod(int((self._todo - self._done) * (now - self._begin) / self._done), 60)
            print(f"{self._line()}, {minutes}m{seconds:02d}s left", flush=True)

    def close(self) -> None:
        if self._done:
            print(self._line(), flush=True)

    def _line(self) -> str:
        speed = self._done / max(1e-9, time.monotonic() - self._begin)
        done = self._total - self._todo + self._done
        return f"{self._head}: {done:,} of {self._total:,} windows, {speed:,.0f} windows/s"


def _encoder_info(run: TrainedRun) -> EncoderInfo:
    return EncoderInfo(str(run.path), run.job, run.step, run.fingerprint(), dataclasses.asdict(run.config))


def _begun(target: str, metadata: TokenMetadata) -> tuple[TokenMetadata | None, bool]:
    """What `target` was begun with, the same as `metadata`, and whether it is complete; (None, False) if it is new.

    Raises:
        UserError: it holds something else.
    """
    if not os.path.exists(os.path.join(target, INDEX_NAME)):
        return None, False
    index = read_index(target)
    found = token_metadata(index, target)
    if found is None:
        raise UserError(f"{target} holds other data ({index.env or 'frames'}): choose another --output_dir")
    for mine, theirs in ((metadata.tokens, found.tokens), (metadata.origin, found.origin)):
        for field in dataclasses.fields(mine):
            new, old = getattr(mine, field.name), getattr(theirs, field.name)
            if isinstance(new, EncoderInfo) and isinstance(old, EncoderInfo) and new.fingerprint == old.fingerprint:
                continue
            if new != old:
                raise UserError(
                    f"{target} holds windows with {field.name} {old or 'none'}, not {new or 'none'}: repeat the first "
                    "command, or choose another --output_dir"
                )
    return found, index.complete


def _leave(_number: int, _frame: FrameType | None) -> None:
    print("asked to leave: run the same command again, finished shards are kept", flush=True)
    sys.exit(EXIT_SAVED)


def _meet(name: str) -> None:
    """Waits for all processes; comes up every few seconds, since Python answers signals between calls only."""
    client = distributed.coordination_client()
    if client is None:
        return
    client.key_value_set(f"jasmine/tokenize/{name}/{jax.process_index()}", "here")
    for process in range(jax.process_count()):
        while True:
            try:
                client.blocking_key_value_get(f"jasmine/tokenize/{name}/{process}", _POLL_SECONDS * 1000)
                break
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def main(options: Options) -> None:
    """The command. Joins the job's other processes, if there are any."""
    options.check()
    distributed.initialize()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, _leave)
    tokenize(options, load_encoder(options))


if __name__ == "__main__":
    cli.run(main, Options, __doc__)
