"""What is asked of the Cloud TPU API, what becomes of it where something goes wrong meanwhile, and what `gc` finds."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from xmanager import xm

from launch import jobs
from launch.backends import cloud_tpu as backend
from launch.backends import cloud_tpu_api
from launch.errors import UserError
from launch.record import read_record, write_record
from launch.request import requests_for
from launch.run_dir import RunDir
from launch.submission import carry_out
from launch.xm import CloudTpu as Executor
from launch.xm import create_experiment
from tests.clusters.cloud_tpu import CloudTpu
from tests.launch.checkouts import wait_until
from tests.launch.tpus import planned, rent_first, requested


@pytest.fixture
def cloud(cloud_tpu: CloudTpu, monkeypatch: pytest.MonkeyPatch) -> CloudTpu:
    """A cloud whose resources get no VMs; this process reaches its API."""
    for name, value in cloud_tpu.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    cloud_tpu.hold("WAITING_FOR_RESOURCES")
    return cloud_tpu


def find(tree: Any, path: str) -> Any:
    """What stands in a tree of dictionaries and lists at `a.b.0.c`, None where there is nothing."""
    for part in path.split("."):
        nodes = dict(enumerate(tree)) if isinstance(tree, list) else tree or {}
        tree = nodes.get(int(part) if part.isdecimal() else part)
    return tree


NODE = "tpu.nodeSpec.0.node"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"spot": None, "guaranteed": None, "reservationName": None, f"{NODE}.networkConfig.network": None,
              f"{NODE}.networkConfig.enableExternalIps": True, f"{NODE}.serviceAccount": None,
              f"{NODE}.labels": {"jasmine": "r"}, f"{NODE}.runtimeVersion": "v2-alpha-tpuv5-lite"}),
        (["provisioning=spot"], {"spot": {}, "guaranteed": None}),
        (["provisioning=reserved", "reservation=mine"],
         {"spot": None, "guaranteed": {}, "reservationName": "projects/lab/locations/us-west4-a/reservations/mine"}),
        (["provisioning=reserved", "reservation=projects/p/locations/z/reservations/ours"],
         {"reservationName": "projects/p/locations/z/reservations/ours"}),
        (["network=inner", "subnetwork=below", "external_ips=false"],
         {f"{NODE}.networkConfig.network": "inner", f"{NODE}.networkConfig.subnetwork": "below",
          f"{NODE}.networkConfig.enableExternalIps": None}),  # false is what it is without
        (["service_account=vm@lab.iam.gserviceaccount.com"],
         {f"{NODE}.serviceAccount.email": "vm@lab.iam.gserviceaccount.com",
          f"{NODE}.serviceAccount.scope": ["https://www.googleapis.com/auth/cloud-platform"]}),
        (["labels={team: worlds}"], {f"{NODE}.labels": {"team": "worlds", "jasmine": "r"}}),
        (["slices=2"], {"tpu.nodeSpec.0.multisliceParams.nodeCount": 2, "tpu.nodeSpec.0.nodeId": None}),
        (["runtime_version=tpu-vm-base"], {f"{NODE}.runtimeVersion": "tpu-vm-base"}),
    ],
)  # fmt: skip
def test_the_cluster_file_is_what_is_asked_for(
    tmp_path: Path, overrides: list[str], expected: dict[str, object]
) -> None:
    body = yaml.safe_load(backend.preview([requested(tmp_path, *overrides).plan()]))["body"]
    assert {path: find(body, path) for path in expected} == expected


def test_a_resource_of_that_name_is_ones_own_or_waited_for_or_left_alone(
    tmp_path: Path, cloud: CloudTpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = planned(tmp_path)
    first = rent_first(gone)
    shutil.rmtree(gone.run_dir)
    again = planned(tmp_path)
    assert rent_first(again).id == first.id  # the same request: as if its first answer had been lost

    shutil.rmtree(again.run_dir)
    other = planned(tmp_path, "accelerator_type=v5litepod-8")
    with pytest.raises(UserError, match=f"has a resource {first.id} in us-west4-a already, of another request"):
        rent_first(other)
    assert cloud.state(first.id) == "WAITING_FOR_RESOURCES"
    backend.give_back([other])  # as whoever submits does: it is not theirs to delete
    assert cloud.state(first.id) == "WAITING_FOR_RESOURCES"

    cloud.hold("DELETING")
    cloud_tpu_api.Tpus("lab").delete("us-west4-a", first.id)
    monkeypatch.setattr(cloud_tpu_api, "GONE_SECONDS", 0.5)
    with pytest.raises(UserError, match="still has what an earlier run of that name rented"):
        backend.start(other)
    monkeypatch.setattr(cloud_tpu_api, "GONE_SECONDS", 60.0)
    threading.Timer(1.0, lambda: cloud.hold("DELETING", on=False)).start()
    assert rent_first(other).id == first.id.removesuffix("1") + "2"  # it has been asked for, in vain
    RunDir.at(other.run_dir).tpu_resource.unlink()
    assert rent_first(other).id == first.id
    sent = [one for one in cloud.requests if one["method"] == "POST" and one["status"] == 200]
    assert "v5litepod-8" in sent[-1]["body"]
    assert (
        capsys.readouterr().err.count(f"{first.id} in us-west4-a, of an earlier run of that name, is still being") == 1
    )


def broken_watcher(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_what_was_rented_for_runs_that_do_not_start_is_given_back(
    tmp_path: Path, cloud: CloudTpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path, name="not-submitted")  # for its cluster file and its job
    monkeypatch.setattr(backend, "start_watcher", broken_watcher)
    sweep = requests_for(
        [plan.job],
        cluster=plan.cluster,
        overrides=(),
        name="s",
        sweep=["seed=0..1"],
        after=(),
        cwd=tmp_path,
        reserved=(),
    )
    with pytest.raises(UserError, match="No space left on device"):
        carry_out(sweep, wait=False)
    with pytest.raises(UserError, match="No space left on device"):
        launch_unit(tmp_path, plan.cluster, {})
    assert any(one["method"] == "POST" and one["status"] == 200 for one in cloud.requests)
    wait_until(lambda: not cloud.resources())
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["not-submitted"]


def launch_unit(folder: Path, cluster: str, env_vars: dict[str, str]) -> None:
    """Launch a work unit as an XManager script does."""
    with create_experiment("x") as experiment:
        executor = Executor(cluster, settings={"storage": str(folder / "runs")})
        spec = xm.Binary(path=str(folder / "job.py"))
        [executable] = experiment.package([xm.Packageable(spec, executor.Spec(), env_vars=env_vars)])
        experiment.add(xm.Job(executable, executor))


@pytest.mark.parametrize(
    ("variable", "message"),
    [("API_KEY", "API_KEY looks like a secret"), ("JASMINE_RUN_DIR", "JASMINE_RUN_DIR is set by the launcher")],
)
def test_variables_of_an_xmanager_job_are_held_to_the_same_rules(
    tmp_path: Path, cloud: CloudTpu, variable: str, message: str
) -> None:
    plan = planned(tmp_path)
    with pytest.raises(UserError, match=message) as refused:
        launch_unit(tmp_path, plan.cluster, {variable: "hunter2"})
    assert "hunter2" not in str(refused.value)
    assert not cloud.resources()


# --- gc -------------------------------------------------------------------------------------------------------------------


def test_gc_asks_wherever_runs_have_been_and_spares_what_it_cannot_see(
    tmp_path: Path, cloud: CloudTpu, capsys: pytest.CaptureFixture[str]
) -> None:
    lives = planned(tmp_path, name="needed")
    needed = rent_first(lives)
    plan = planned(tmp_path, "zone=europe-west4-b", "project=elsewhere", name="ended")
    ended = rent_first(plan)
    run = RunDir.at(plan.run_dir)
    record = read_record(run)
    assert record is not None
    record.state = "failed"
    write_record(run, record)
    hidden = planned(tmp_path, name="hidden")
    unseen = rent_first(hidden)
    shutil.rmtree(hidden.run_dir)
    damaged = planned(tmp_path, name="damaged")
    unclear = rent_first(damaged)
    RunDir.at(damaged.run_dir).record.write_text("{")

    cloud.wait(unclear.id, "WAITING_FOR_RESOURCES")
    gc = ["gc", "--storage", str(tmp_path / "runs")]
    assert jobs.main(gc) == 0
    told = capsys.readouterr()
    assert "asked: elsewhere/europe-west4-b, lab/us-west4-a\n" in told.out
    assert f"{ended.id} in europe-west4-b: WAITING_FOR_RESOURCES, run 'ended' is failed\n" in told.out
    assert (
        f"{unseen.id} in us-west4-a: WAITING_FOR_RESOURCES, there is no run in {hidden.run_dir} (seen from" in told.out
    )
    assert f"{unclear.id} in us-west4-a: WAITING_FOR_RESOURCES, whether its run needs it cannot be told" in told.out
    assert f"--delete {unseen.id}\n" in told.out
    assert needed.id not in told.out
    assert "$GOOGLE_CLOUD_PROJECT is not set" in told.err

    with pytest.raises(UserError, match=r"--delete j-none: it is not listed here.*; nothing was deleted"):
        jobs.main([*gc, "--delete", "j-none", ended.id])
    assert jobs.main([*gc, "--delete"]) == 0
    assert f"{ended.id}: deleted\n" in capsys.readouterr().out
    left = {name.rpartition("/")[2] for name in cloud.resources()}
    assert left == {needed.id, unseen.id, unclear.id}
    assert jobs.main([*gc, "--delete", unseen.id]) == 0
    assert {name.rpartition("/")[2] for name in cloud.resources()} == {needed.id, unclear.id}

    shutil.rmtree(lives.run_dir)  # another run of that name, which needs another TPU
    planned(tmp_path, "accelerator_type=v5litepod-8", name="needed")
    assert jobs.main([*gc, "--delete"]) == 0
    assert f"{needed.id} in us-west4-a: WAITING_FOR_RESOURCES, it is of another run than" in capsys.readouterr().out
    assert cloud.state(needed.id) == "WAITING_FOR_RESOURCES"


def test_gc_says_nothing_of_what_it_could_not_ask(
    tmp_path: Path, cloud: CloudTpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    gc = ["gc", "--storage", str(tmp_path / "runs")]
    with pytest.raises(UserError, match=r"\$GOOGLE_CLOUD_PROJECT is not set here, so nothing was asked"):
        jobs.main(gc)
    assert not cloud.requests
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "lab")
    assert jobs.main([*gc, "--cluster", "tpu-v5-16"]) == 0
    asked = "lab/us-west4-a"
    assert capsys.readouterr().out == f"asked: {asked}\nnothing leaks there\n"
    cloud.fail_next(403, 1)
    assert jobs.main([*gc, "--cluster", "tpu-v5-16"]) == 1
    told = capsys.readouterr()
    assert "nothing leaks" not in told.out
    assert f"warning: {asked}: Cloud TPU does not answer" in told.err
