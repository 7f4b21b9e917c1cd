"""Two launchers on one directory, one of them killed and started again: each job runs to completion exactly once.

The long version, 200 real trainings: ``pytest -m slow tests/test_launcher_race.py``.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from domainbed import states
from domainbed.commands import Command, train_command

LAUNCHER = """
import json, sys
from domainbed import command_launchers, pool
from domainbed.commands import Command
pool._ELSEWHERE_S = 0.1
commands = [Command(words, directory) for words, directory in json.load(open(sys.argv[1]))]
if sys.argv[2] == "backwards": commands.reverse()
sys.exit(any(command_launchers.local_launcher(commands, workers=2)))
"""

STAND_IN = """
import os, pathlib, sys, time
from domainbed import claims
directory, log = sys.argv[1:]
os.makedirs(directory, exist_ok=True)
try:
    with claims.claim(directory):
        if not os.path.exists(directory + "/done"):
            time.sleep(.03)
            with open(log, "a") as file: file.write(directory + "\\n")
            pathlib.Path(directory, "done").write_text("done")
except claims.RunLocked:
    sys.exit(claims.EXIT_LOCKED)
"""


def race(tmp_path, commands, enough):
    """Two launchers take the commands from both ends; the first is killed once enough is done, and started again."""
    (tmp_path / "commands.json").write_text(json.dumps([(command.argv, command.output_dir) for command in commands]))

    def launch(order):
        words = [sys.executable, "-c", LAUNCHER, str(tmp_path / "commands.json"), order]
        return subprocess.Popen(words, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, stderr=subprocess.PIPE)

    first, second = launch("forwards"), launch("backwards")
    while sum(os.path.exists(f"{command.output_dir}/done") for command in commands) < enough:
        time.sleep(0.01)
        assert second.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    again = launch("forwards")
    errors = [process.communicate(timeout=600)[1].decode() for process in (second, again)]
    assert (first.returncode, second.returncode, again.returncode) == (-9, 0, 0), errors


def test_each_job_runs_once(tmp_path):
    log = tmp_path / "log"
    directories = [str(tmp_path / "sweep" / str(i)) for i in range(20)]
    race(tmp_path, [Command(["python", "-c", STAND_IN, each, str(log)], each) for each in directories], enough=4)
    assert Counter(log.read_text().split()) == Counter(directories)


@pytest.mark.slow
def test_each_of_200_trainings_runs_once(tmp_path):
    args = {"dataset": "Debug28", "algorithm": "ERM", "test_envs": [0], "steps": 1, "skip_model_save": True}
    directories = [tmp_path / "sweep" / str(i) for i in range(200)]
    race(tmp_path, [train_command(args | {"output_dir": str(each), "seed": 1}) for each in directories], enough=50)
    for directory in directories:
        assert states.read(directory).state is states.State.DONE
        assert len((directory / "results.jsonl").read_text().splitlines()) == 1
        assert (directory / "out.txt").read_text().count("Environment:") == 1  # one process began, and it finished
