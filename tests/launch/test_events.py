"""The schema of events: what it refuses, and that all that the code writes is in it. Real runs are checked where they are."""

import ast
import json
from pathlib import Path

import pytest

from launch.events import COMMON, FIELDS, KINDS, problem
from launch.run_dir import RunDir
from tests.jobs import REPO

GOOD = {"time": 1.5, "event": "host_exited", "attempt": 1, "hostname": "a", "host": 0, "code": 137, "signal": "SIGKILL"}
# Calls that write an event, and which of their arguments is its kind.
WRITERS = {"append_event": 0, "log_event": 1, "_event": 0, "_mark": 0}


def test_what_an_event_has_to_have() -> None:
    assert problem(GOOD) is None
    assert problem({**GOOD, "node": None}) is None, "null is absence"
    assert (
        problem({**GOOD, "event": "evaluated", "host": None, "code": None, "signal": None}) == "evaluated: has no step"
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"code": "137"}, "host_exited: code is '137'"),
        ({"host": True}, "host_exited: host is True"),
        ({"hostname": None}, "host_exited: has no hostname"),
        ({"step": 3}, "host_exited: step is no field of it"),
        ({"event": "exploded"}, "no kind of event: 'exploded'"),
        ({"event": ["x"]}, "no kind of event: ['x']"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_event_is_said(wrong: dict[str, object], said: str) -> None:
    assert problem({**GOOD, **wrong}) == said


def written() -> dict[str, set[str]]:
    """The kinds that the code writes, with the fields that stand in the calls themselves."""
    found: dict[str, set[str]] = {}
    for path in [*(REPO / "launch").rglob("*.py"), *(REPO / "jasmine").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            place = WRITERS.get(node.func.attr)
            if place is None or len(node.args) <= place:
                continue
            kinds = [leaf.value for leaf in ast.walk(node.args[place]) if isinstance(leaf, ast.Constant)]
            for kind in kinds:
                assert isinstance(kind, str)
                found.setdefault(kind, set()).update(word.arg for word in node.keywords if word.arg is not None)
    return found


def test_all_that_the_code_writes_is_in_the_schema() -> None:
    found = written()
    assert len(found) > 25, "the writers are called otherwise now"
    by_state = {"finished", "cancelled", "saved", "failed", "preempted"}  # some of them by the name of a state
    assert found.keys() <= KINDS.keys()
    assert KINDS.keys() - by_state <= found.keys(), "nothing writes it"
    for kind, fields in found.items():
        assert fields <= {*COMMON, *KINDS[kind].has, *KINDS[kind].may_have}, kind


def test_every_field_has_a_meaning_and_a_use() -> None:
    used = {*COMMON, "process", *(field for kind in KINDS.values() for field in (*kind.has, *kind.may_have))}
    assert used == FIELDS.keys()


def test_readers_pass_over_lines_that_are_not_whole(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.append_event("submitted", 1, cluster="local", snapshot="c")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "event": "unheard of"}\n[1]\n{"time": 2, "ev')
    assert [event["event"] for event in run.events()] == ["submitted", "unheard of"]
    assert problem(json.loads((tmp_path / "events.jsonl").read_text().splitlines()[0])) is None
