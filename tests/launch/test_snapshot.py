"""What goes into a code snapshot."""

import subprocess
from pathlib import Path

import pytest

from launch.snapshot import take_snapshot


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "package").mkdir(parents=True)
    (root / "package" / "module.py").write_text("x = 1\n")
    (root / "run me.sh").write_text("#!/bin/sh\n")
    (root / "run me.sh").chmod(0o755)
    (root / "link").symlink_to("package/module.py")
    (root / "package" / "__pycache__").mkdir()
    (root / "package" / "__pycache__" / "module.pyc").write_text("")
    return root


def _git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


def _paths(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if not p.is_dir())


def test_a_tree_without_git(tree: Path, tmp_path: Path) -> None:
    snapshot = take_snapshot(tree, tree / "package" / "module.py")
    written = snapshot.write(tmp_path / "code")
    assert _paths(written) == ["link", "package/module.py", "run me.sh"]
    assert (written / "link").readlink() == Path("package/module.py")
    assert (written / "run me.sh").stat().st_mode & 0o777 == 0o555
    assert (snapshot.script, snapshot.code.commit, snapshot.code.dirty) == ("package/module.py", None, None)
    assert snapshot.code.files == 3


def test_a_tree_with_git_before_and_after_its_first_commit(tree: Path, tmp_path: Path) -> None:
    _git(tree, "init")
    (tree / ".gitignore").write_text("__pycache__/\n")
    fresh = take_snapshot(tree, tree / "package" / "module.py")
    assert (fresh.code.commit, fresh.code.dirty) == (None, None)
    _git(tree, "add", "-A")
    _git(tree, "commit", "-m", "all")
    clean = take_snapshot(tree, tree / "package" / "module.py")
    assert clean.code.dirty is False
    assert clean.code.hash == fresh.code.hash, "the hash is of the contents alone"
    (tree / "run me.sh").unlink()
    deleted = take_snapshot(tree, tree / "package" / "module.py")
    assert deleted.code.dirty is True
    assert "run me.sh" not in _paths(deleted.write(tmp_path / "code"))


@pytest.mark.parametrize("change", ["contents", "mode", "name", "link"])
def test_every_change_changes_the_hash(tree: Path, change: str) -> None:
    before = take_snapshot(tree, tree / "package" / "module.py").code.hash
    match change:
        case "contents":
            (tree / "run me.sh").write_text("#!/bin/sh\ntrue\n")
        case "mode":
            (tree / "run me.sh").chmod(0o644)
        case "name":
            (tree / "run me.sh").rename(tree / "run you.sh")
        case "link":
            (tree / "link").unlink()
            (tree / "link").symlink_to("run me.sh")
    assert take_snapshot(tree, tree / "package" / "module.py").code.hash != before


def test_a_script_from_elsewhere_is_taken_along(tree: Path, tmp_path: Path) -> None:
    script = tmp_path / "my job.py"
    script.write_text("print('hello')\n")
    snapshot = take_snapshot(tree, script)
    written = snapshot.write(tmp_path / "code")
    assert (written / snapshot.script).read_text() == "print('hello')\n"


def test_what_was_read_is_what_is_written(tree: Path, tmp_path: Path) -> None:
    snapshot = take_snapshot(tree, tree / "package" / "module.py")
    (tree / "package" / "module.py").write_text("x = 2\n")
    assert (snapshot.write(tmp_path / "code") / "package" / "module.py").read_text() == "x = 1\n"
