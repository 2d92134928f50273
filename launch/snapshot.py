"""Copies the working tree, committed or not, so that a queued run does not change when a file is edited.

The user's checkout is only read: no commit, no stash, no index refresh. A snapshot holds what git tracks plus what it
does not ignore, but for files of credentials; its name is a hash of its contents, so equal trees are stored once
in a run directory.
"""

import hashlib
import io
import os
import re
import shutil
import stat
import subprocess
import tarfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.cache import prune, used
from launch.errors import UserError
from launch.objects import cache_dir, is_object

# Source code is far smaller than this; a tree that is not has a data set or a checkpoint in it.
MAX_BYTES = 200 * 1024**2

# Of the code of runs in Cloud Storage, this machine keeps the trees used last, and those of the last days.
KEPT, KEPT_DAYS = 20, 7

# Where a script from outside the checkout goes in the snapshot.
SCRIPT_DIR = "_script"

# Files that hold credentials by their names. They are shipped only where git tracks them, which is to have published them.
_PRIVATE = re.compile(
    r"\.env(\..*)?|\.netrc|\.pypirc|\.npmrc|\.git-credentials|id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|key|p12|pfx|keystore)"
    r"|(application_default_)?credentials.*\.json|.*service[-_]account.*\.json",
    re.IGNORECASE,
)

# Skipped where there is no git to say what is ignored.
_IGNORED = {"venv", "__pycache__", "runs", "wandb", "dist", "build"}


@dataclass(frozen=True)
class Code:
    """What a run's code is: enough to find it in `code/` and in git.

    Attributes:
        hash: the first 12 hex digits of the SHA-256 of paths, modes and contents; the directory's name under `code/`.
        files: how many files.
        bytes: their total size.
        commit: the checkout's commit, None outside git.
        dirty: whether the tree differed from that commit, None outside git.
    """

    hash: str
    files: int
    bytes: int
    commit: str | None
    dirty: bool | None


@dataclass(frozen=True)
class _File:
    path: str
    contents: bytes
    mode: int


@dataclass(frozen=True)
class Snapshot:
    """A tree held in memory: hashed and written from the same bytes, so an edit in between cannot split the two."""

    code: Code
    script: str
    files: tuple[_File, ...]

    def write(self, code_dir: Path) -> Path:
        """Store the tree as `code_dir/<hash>/` and return that directory; an equal one that is there already is kept.

        In Cloud Storage it is the tarball `code_dir/<hash>.tar.gz`, which `fetch_code` unpacks.

        Raises:
            OSError: the directory cannot be written.
        """
        target = code_dir / self.code.hash
        if is_object(target):
            tarball = target.with_name(f"{target.name}.tar.gz")
            if not tarball.exists():
                tarball.write_bytes(self._tarball())
            return code_dir / self.code.hash
        if target.exists():
            return target
        partial = code_dir / f".{self.code.hash}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        for file in self.files:
            path = partial / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            if stat.S_ISLNK(file.mode):
                path.symlink_to(os.fsdecode(file.contents))
            else:
                path.write_bytes(file.contents)
                # Read-only, because a traceback leads an editor here, and edits belong in the checkout.
                path.chmod(0o555 if file.mode & stat.S_IXUSR else 0o444)
        partial.rename(target)
        return target

    def _tarball(self) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for file in self.files:
                entry = tarfile.TarInfo(file.path)
                entry.mode = 0o555 if file.mode & stat.S_IXUSR else 0o444
                if stat.S_ISLNK(file.mode):
                    entry.type, entry.linkname = tarfile.SYMTYPE, os.fsdecode(file.contents)
                    tar.addfile(entry)
                else:
                    entry.size = len(file.contents)
                    tar.addfile(entry, io.BytesIO(file.contents))
        return buffer.getvalue()


def fetch_code(code_dir: Path) -> Path:
    """Return where the code of a run lies on this machine: in its run directory, or unpacked from there into the cache.

    Args:
        code_dir: `code/<hash>` in the run directory.

    Raises:
        UserError: it is not there, or cannot be unpacked.
    """
    if not is_object(code_dir):
        if not code_dir.is_dir():
            raise UserError(f"{code_dir}: the run's code is gone; resume with --new-code to take this checkout's")
        return code_dir
    here = cache_dir() / "code" / code_dir.name
    if here.is_dir():
        used(here)
        return here
    prune(here.parent, keep=KEPT, days=KEPT_DAYS)
    tarball = code_dir.with_name(f"{code_dir.name}.tar.gz")
    partial = here.with_name(f".{here.name}.{uuid.uuid4().hex}.partial")
    try:
        with tarfile.open(fileobj=io.BytesIO(tarball.read_bytes()), mode="r:gz") as tar:
            tar.extractall(partial, filter="tar")
        try:
            partial.rename(here)
        except OSError:
            if not here.is_dir():
                raise
            shutil.rmtree(partial)  # another process was faster
    except FileNotFoundError as error:
        raise UserError(f"{tarball}: the run's code is gone; resume with --new-code to take this checkout's") from error
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{tarball}: cannot be unpacked in {here.parent}: {error}") from error
    return here


def take_snapshot(root: Path, script: Path) -> Snapshot:
    """Read the tree at `root` and the job's script.

    Args:
        root: the checkout.
        script: absolute path of the script the job runs. One that the tree does not hold (outside of it, or ignored by
            git) is added under `_script/`, alone.

    Raises:
        UserError: the tree is too large to be source code, or a file cannot be read.
    """
    listed = _git_files(root)
    files: list[_File] = []
    total, largest = 0, ("", 0)
    for relative in sorted(set(listed if listed is not None else _walk(root, root))):
        path = root / relative
        try:
            info = path.lstat()
            if stat.S_ISLNK(info.st_mode):
                files.append(_File(relative, os.fsencode(os.readlink(path)), info.st_mode))
            elif stat.S_ISREG(info.st_mode):
                total += info.st_size
                largest = max(largest, (relative, info.st_size), key=lambda item: item[1])
                if total > MAX_BYTES:
                    raise UserError(
                        f"{root}: the code to ship is over {MAX_BYTES >> 20} MiB; its largest file is {largest[0]} "
                        f"({largest[1] >> 20} MiB): move it out of the checkout, or name it in .gitignore"
                    )
                files.append(_File(relative, path.read_bytes(), info.st_mode))
        except FileNotFoundError:
            continue  # tracked by git, deleted in the working tree
        except OSError as error:
            raise UserError(f"{path}: cannot be read for the code snapshot: {error.strerror}") from error
    held = {file.path for file in files}
    inside = script.relative_to(root).as_posix() if script.is_relative_to(root) else None
    if inside not in held:
        inside = f"{SCRIPT_DIR}/{script.name}"
        files.append(_File(inside, script.read_bytes(), stat.S_IFREG | 0o644))
    assert inside is not None
    digest = hashlib.sha256()
    for file in files:
        kind = "l" if stat.S_ISLNK(file.mode) else "x" if file.mode & stat.S_IXUSR else "f"
        digest.update(f"{file.path}\0{kind}{len(file.contents)}\0".encode("utf-8", "surrogateescape"))
        digest.update(file.contents)
    commit = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain") if commit is not None else None
    code = Code(
        hash=digest.hexdigest()[:12],
        files=len(files),
        bytes=sum(len(file.contents) for file in files),
        commit=commit.strip() if commit is not None else None,
        dirty=bool(status.strip()) if status is not None else None,
    )
    return Snapshot(code, inside, tuple(files))


def _git(root: Path, *arguments: str) -> str | None:
    """Return git's output, or None without git, outside a checkout, or before the first commit."""
    # With its optional locks `git status` would rewrite the index, to refresh its cache.
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return os.fsdecode(done.stdout)


def _git_files(root: Path) -> list[str] | None:
    """Return paths that are tracked, or neither tracked nor ignored; None where git does not know this tree."""
    tracked = _git(root, "ls-files", "-z", "--cached")
    others = _git(root, "ls-files", "-z", "--others", "--exclude-standard")
    if not tracked and not others:  # also a copy that lies, ignored, inside some other checkout
        return None
    files: list[str] = []
    shared = [name for name in (others or "").split("\0") if not _PRIVATE.fullmatch(os.path.basename(name))]
    for name in filter(None, [*(tracked or "").split("\0"), *shared]):
        path = root / name
        if path.is_dir() and not path.is_symlink():  # a submodule is listed as one entry
            files.extend(_walk(path, root))
        else:
            files.append(name)
    return files


def _walk(top: Path, root: Path) -> Iterator[str]:
    for directory, subdirectories, names in os.walk(top):
        subdirectories[:] = [name for name in subdirectories if name not in _IGNORED and name[0] != "."]
        for name in names:
            if _PRIVATE.fullmatch(name):
                continue
            yield (Path(directory) / name).relative_to(root).as_posix()
