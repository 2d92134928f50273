"""An XManager launch script: one experiment, a work unit for each learning rate, each on a Cloud TPU of its own.

    python examples/xmanager_sweep.py --cluster tpu-v5-16 --title lr --max_lr 1e-4 --max_lr 3e-4 -- --data_dir /data/coinrun

`CloudTpu` takes what `--set` takes. The runs are called `lr.1`, `lr.2`; `python launch/jobs.py status lr` shows them
together, and everything else `jobs.py` does works on them as well.
"""

import argparse
import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from xmanager import xm

from launch.errors import Parser, run_entry_point
from launch.xm import CloudTpu, create_experiment

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str]) -> int:
    """Launch the experiment; with --wait, return 0 once all of its work units have finished, 1 if one did not."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", required=True, help="a file in cluster_configs/, by its stem, or a path")
    parser.add_argument("--title", required=True, help="the experiment's title, and the beginning of its runs' names")
    parser.add_argument("--max_lr", type=float, action="append", required=True, help="given once for each work unit")
    parser.add_argument(
        "--topology", help="such as 4x4, instead of the cluster's accelerator_type: v5e chips of that shape"
    )
    parser.add_argument("--wait", action="store_true", help="wait for all work units")
    parser.add_argument("job", nargs="*", help="arguments of the job, after --")
    options = parser.parse_args(arguments)

    requirements = xm.JobRequirements(tpu_v5e=options.topology) if options.topology else xm.JobRequirements()
    tpu = CloudTpu(options.cluster, settings={"provisioning": "spot"}, requirements=requirements)
    module = xm.ModuleName("jasmine.baselines.maskgit.train_tokenizer_vqvae")
    with create_experiment(options.title) as experiment:
        [tokenizer] = experiment.package(
            [xm.python_container(tpu.Spec(), path=str(ROOT), entrypoint=module, args=options.job)]
        )
        for max_lr in options.max_lr:
            experiment.add(xm.Job(tokenizer, tpu, args={"max_lr": max_lr}))
    for unit in experiment.work_units.values():
        print(
            f"work unit {unit.work_unit_id}: run {unit.experiment_unit_name}, {unit.get_status().message}", flush=True
        )
    return asyncio.run(_wait(experiment)) if options.wait else 0


async def _wait(experiment: xm.Experiment) -> int:
    code = 0
    for unit in experiment.work_units.values():
        try:
            await unit.wait_until_complete()
        except xm.ExperimentUnitError:
            code = 1
        print(f"work unit {unit.work_unit_id}: {unit.get_status().message}", flush=True)
    return code


if __name__ == "__main__":
    run_entry_point(main)
