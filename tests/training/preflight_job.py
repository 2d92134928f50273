"""A process that is nothing but its preflight, on a node of its own, with one fault from the environment: FAULT=name@process.

clock: runs 100 s ahead · code: from another tree (OTHER_CODE) · late: has joined, and then says nothing · absent: never
comes to the all-reduce · stopped: SIGSTOP in it · wrong: gets a wrong number from it
"""

import os
import signal
import sys
import time

me = os.environ["JAX_PROCESS_ID"]
fault = {me: "none"} | {process: name for name, _, process in [os.environ.get("FAULT", "none@0").partition("@")]}
os.environ["SLURMD_NODENAME"] = f"node-{me}"
if fault[me] == "code":
    sys.path.insert(0, os.environ["OTHER_CODE"])

from etils import epath  # noqa: E402

from jasmine.training import distributed, preflight  # noqa: E402

all_reduce = preflight._all_reduce
clock = time.time


def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


def absent():
    time.sleep(120)


with distributed.exit_with_job():
    distributed.initialize()
    if fault[me] == "clock":
        time.time = lambda: clock() + 100
    if fault[me] == "late":
        time.sleep(120)
    if fault[me] in ("stopped", "absent"):
        preflight._all_reduce = {"stopped": stopped, "absent": absent}[fault[me]]
    if fault[me] == "wrong":
        preflight._all_reduce = lambda: (*all_reduce()[:2], False)
    preflight.preflight(epath.Path(sys.argv[1]))
