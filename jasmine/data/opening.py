"""Opens the data that a path means: a split or a dataset, of either format, on this machine or in a bucket.

Whoever names data that is not there is told what is, and what was probably meant.
"""

import difflib
import os

from jasmine.data import bucket
from jasmine.data.episodes import EpisodeDataset
from jasmine.data.index import INDEX_NAME
from jasmine.data.published import PublishedDataset, published_files
from jasmine.data.staging import DataCache
from jasmine.errors import UserError


def open_dataset(
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    frame_shape: tuple[int, int, int] | None = None,
    allow_unfinished: bool = False,
    cache: DataCache | None = None,
) -> EpisodeDataset | PublishedDataset:
    """Opens a split of either format; of our own also in a bucket.

    Args:
        path: a split's folder (`index.json`, or `*.array_record` files alone: the published format), or a dataset
            whose folder `split` is one. On this machine, or `gs://BUCKET/FOLDER`.
        split: which split, where `path` is a dataset.
        frame_shape: (height, width, channels), for the published format, which does not store it; checked against
            what our own format stores.
        allow_unfinished: see `EpisodeDataset`.
        cache: see `EpisodeDataset`.

    Raises:
        UserError: nothing to open there (says what is), or what is there is damaged (names file and record).
    """
    root = os.fspath(path)
    folder = _find_bucket_split(root, split) if bucket.is_bucket_url(root) else _find_split(root, split)
    if bucket.is_bucket_url(root) or os.path.exists(os.path.join(folder, INDEX_NAME)):
        dataset = EpisodeDataset(folder, allow_unfinished=allow_unfinished, cache=cache)
        if frame_shape is not None and frame_shape != dataset.frame_shape:
            raise UserError(f"{folder} holds frames of {dataset.frame_shape}, not of {frame_shape}: drop the options")
        return dataset
    return PublishedDataset(folder, frame_shape=frame_shape)


def bucket_splits(url: str) -> dict[str, str]:
    """Name to folder of the splits of our own format directly in a folder of a bucket."""
    here = bucket.list_folder(url)
    folders = {name: f"{here.url}/{name}" for name in here.folders}
    return {name: folder for name, folder in folders.items() if INDEX_NAME in bucket.list_folder(folder).objects}


def is_split(path: str) -> bool:
    """Whether a folder on this machine is a split, of either format."""
    return os.path.exists(os.path.join(path, INDEX_NAME)) or bool(published_files(path))


def _find_split(root: str, split: str) -> str:
    if not os.path.isdir(root):
        parent, name = os.path.split(os.path.abspath(root))
        near = difflib.get_close_matches(name, os.listdir(parent) if os.path.isdir(parent) else [], 1)
        hint = f": did you mean {os.path.join(parent, near[0])}?" if near else ": make or copy the data first"
        raise UserError(
            f"no data at {os.path.abspath(root)} ({'a file' if os.path.exists(root) else 'no such folder'}){hint}"
        )
    for folder in (root, os.path.join(root, split)):
        if is_split(folder):
            return folder
    inside = sorted(entry.path for entry in os.scandir(root) if entry.is_dir())
    splits = [folder for folder in inside if is_split(folder)]
    if splits:
        raise UserError(f"no split {split} in {root}: it has {', '.join(map(os.path.basename, splits))}")
    deeper = [folder for folder in (os.path.join(path, split) for path in inside) if is_split(folder)]
    hint = f": did you mean {os.path.dirname(deeper[0])}?" if deeper else ""
    raise UserError(f"no data in {root}: neither {INDEX_NAME} nor *.array_record files there or in {split}/{hint}")


def _find_bucket_split(root: str, split: str) -> str:
    here = bucket.list_folder(root)
    url = here.url
    if INDEX_NAME in here.objects:
        return url
    inside = bucket.list_folder(f"{url}/{split}").objects if split in here.folders else {}
    if INDEX_NAME in inside:
        return f"{url}/{split}"
    if any(name.endswith(".array_record") for name in (*here.objects, *inside)):
        raise UserError(
            f"{url} holds the published format, which is read off disks only: convert it (python -m jasmine.data.convert), "
            "or mount the bucket"
        )
    if here.objects or here.folders:
        if splits := bucket_splits(url):
            raise UserError(f"no split {split} in {url}: it has {', '.join(splits)}")
        raise UserError(f"no data in {url}: no {INDEX_NAME} there or in {split}/")
    parent, _, name = url.rpartition("/")
    folders = () if f"{parent}/" == bucket.SCHEME else bucket.list_folder(parent).folders
    near = difflib.get_close_matches(name, folders, 1)
    hint = f": did you mean {parent}/{near[0]}?" if near else ": upload the data first"
    raise UserError(f"no data at {url} (no such folder){hint}")
