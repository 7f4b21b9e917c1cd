"""The pool of the local launcher: jobs tried again, left to others, stopped, cancelled, and shown."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from domainbed import claims, job_lists, pool, states
from domainbed.command_launchers import local_launcher
from domainbed.commands import TRAIN, Command
from domainbed.pool import Pool


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(pool, "_LOOK_S", 0.02)
    monkeypatch.setattr(pool, "_ELSEWHERE_S", 0.02)


def wait_for(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("nothing happened in 30 s")


def job(directory, script):
    """A command that knows its directory: a shell script that appends its tries to a file and goes on as told."""
    directory.mkdir(parents=True, exist_ok=True)
    words = f"cd {shlex.quote(str(directory))}; echo try >> tries; n=$(wc -l < tries); {script}"
    return Command(["sh", "-c", words], str(directory))


def tries(directory):
    return (directory / "tries").read_text().count("try")


DONE = "printf done > done"


def test_a_failed_job_is_tried_again_and_its_log_kept(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    twice = job(a, f"[ $n = 2 ] && {DONE} && exit 0; echo out of luck >&2; exit 7")
    assert local_launcher([twice], retries=0) == [7]
    assert states.read(a).error == "out of luck"
    assert local_launcher([twice], retries=1) == [0]
    assert tries(a) == 2
    assert (a / "err.txt").read_text() == "exit status 7\nout of luck\n"

    assert local_launcher([job(b, "kill -9 $$")], retries=2) == [-9]
    assert tries(b) == 3
    assert (b / "err.txt").read_text() == "exit status -9: killed by SIGKILL\n" * 3
    failure = json.loads((b / "failed").read_text())
    assert (failure["error"], failure["exit_status"]) == ("killed by SIGKILL", -9)


def test_bad_input_is_not_tried_again(tmp_path):
    assert local_launcher([job(tmp_path / "a", "echo 'error: no' >&2; exit 2")], retries=5) == [2]
    assert tries(tmp_path / "a") == 1
    assert states.read(tmp_path / "a").error == "error: no"


def test_what_cannot_be_started_or_written_is_said(tmp_path, capfd):
    (tmp_path / "a" / "err.txt").mkdir(parents=True)
    commands = [Command(["no-such-program"], str(tmp_path / name)) for name in "ab"]
    assert local_launcher(commands, retries=0) == [127, 127]
    assert states.read(tmp_path / "a").error == "error: can't start no-such-program: No such file or directory"
    assert (tmp_path / "b" / "err.txt").read_text().startswith("exit status 127\nerror: can't start no-such-program")
    err = capfd.readouterr().err
    assert f"{tmp_path}/a: how it ended (exit status 127) can't be written to err.txt: Is a directory" in err


def test_a_plain_string_runs_once(tmp_path):
    assert local_launcher([f"echo >> {tmp_path}/tries; exit 75"], retries=3) == [75]
    assert (tmp_path / "tries").read_text() == "\n"


def test_a_failure_that_the_job_told_itself_is_kept(tmp_path):
    told = json.dumps({"error": "what train said", "exit_status": 1, "attempt": 1, "time": time.time()})
    assert local_launcher([job(tmp_path / "a", f"echo {shlex.quote(told)} > failed; exit 1")], retries=0) == [1]
    assert (tmp_path / "a" / "failed").read_text() == told + "\n"
    assert not (tmp_path / "a" / "err.txt").exists()


def test_an_old_failure_is_not_taken_for_this_one(tmp_path):
    (tmp_path / "a").mkdir()
    states.write_failure(tmp_path / "a", "long ago", 1)
    assert local_launcher([job(tmp_path / "a", "exit 3")], retries=0) == [3]
    assert states.read(tmp_path / "a").error == "exit status 3"


def test_an_old_failure_is_gone_once_the_job_is_tried_again(tmp_path):
    (tmp_path / "a").mkdir()
    states.write_failure(tmp_path / "a", "long ago", 1)
    assert local_launcher([job(tmp_path / "a", f"[ -e failed ] || {DONE}")], retries=0) == [0]
    assert (tmp_path / "a" / "done").exists()


def test_what_a_directory_says_counts_more_than_an_exit_code(tmp_path, monkeypatch):
    assert local_launcher([job(tmp_path / "a", f"{DONE}; kill -9 $$")], retries=0) == [0]
    assert tries(tmp_path / "a") == 1

    def settle_then_go(*args, settle=pool._settle):
        code = settle(*args)
        (tmp_path / "b" / "go").touch()
        return code

    monkeypatch.setattr(pool, "_settle", settle_then_go)
    holds = shlex.join(["setsid", sys.executable, "-c", HOLDS, "."])
    goes_on = f"(while [ ! -e go ]; do sleep .01; done; echo done) | {holds} > claimed &"
    held = f"{goes_on} while [ ! -s claimed ]; do sleep .01; done; exit 1"
    assert local_launcher([job(tmp_path / "b", held)], retries=0) == [0]
    assert tries(tmp_path / "b") == 1


@pytest.mark.parametrize("end", ["exit 75", "kill -15 $$", "kill -10 $$"])
def test_a_job_that_is_stopped_again_and_again_has_failed(tmp_path, capfd, end):
    assert local_launcher([job(tmp_path / "a", end)], retries=0) == [1]
    assert tries(tmp_path / "a") == 10
    assert states.read(tmp_path / "a").error == "was stopped 10 times in a row without getting on"
    assert "was stopped 10 times in a row" in capfd.readouterr().err


def test_a_job_that_gets_on_may_be_stopped_often(tmp_path):
    claim = """printf '{"released": true, "step": %d}' $((n / 6)) > claim.1"""
    assert local_launcher([job(tmp_path / "a", f"{claim}; [ $n -lt 22 ] && exit 75; {DONE}")], retries=0) == [0]
    assert tries(tmp_path / "a") == 22


def test_a_job_that_was_stopped_goes_to_the_end_of_the_queue(tmp_path):
    log = tmp_path / "log"
    a = job(tmp_path / "a", f"echo a$n >> {log}; [ $n = 1 ] && exit 75; {DONE}")
    b = job(tmp_path / "b", f"echo b$n >> {log}; {DONE}")
    assert local_launcher([a, b], workers=1, retries=0) == [0, 0]
    assert log.read_text().split() == ["a1", "b1", "a2"]


def test_being_stopped_is_no_failure(tmp_path):
    command = job(tmp_path / "a", f"[ $n -lt 3 ] && exit 75; [ $n = 3 ] && exit 1; {DONE}")
    assert local_launcher([command], retries=1) == [0]
    assert tries(tmp_path / "a") == 4


def test_done_jobs_are_not_started(tmp_path):
    command = job(tmp_path / "a", "exit 1")
    (tmp_path / "a" / "done").write_text("done")
    assert local_launcher([command]) == [0]
    assert not (tmp_path / "a" / "tries").exists()


def test_a_job_that_another_launcher_failed_meanwhile_is_left_failed(tmp_path, capfd):
    b = tmp_path / "b"
    other = [sys.executable, "-c", "import sys; from domainbed import states; states.write_failure(*sys.argv[1:], 1)"]
    a = job(tmp_path / "a", f"{DONE}; exec {shlex.join([*other, str(b), 'broken there'])}")
    assert local_launcher([a, job(b, DONE)], workers=1) == [0, 1]
    assert not (b / "tries").exists()
    assert "broken there" in capfd.readouterr().err


HOLDS = """
import pathlib, sys
from domainbed import claims, states
with claims.claim(sys.argv[1]):
    print("claimed", flush=True)
    ends = input()
    if ends == "done": pathlib.Path(sys.argv[1], "done").write_text("done")
    if ends == "failed": states.write_failure(sys.argv[1], "broken there", 1)
"""


@pytest.mark.parametrize(("ends", "codes", "runs_here"), [("done", [0], 0), ("failed", [1], 0), ("dies", [0], 1)])
def test_a_job_that_runs_elsewhere_is_waited_for(tmp_path, capfd, ends, codes, runs_here):
    command = job(tmp_path / "a", DONE)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "a")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "claimed\n"
    found = []
    launcher = threading.Thread(target=lambda: found.append(ThreadPool([command]).run()))
    launcher.start()
    said = []
    wait_for(lambda: said.append(capfd.readouterr().err) or "Waiting for 1 jobs that run elsewhere" in "".join(said))
    if ends == "dies":
        holder.kill()
    holder.communicate(None if ends == "dies" else f"{ends}\n")
    launcher.join(30)
    assert found == [codes]
    assert (tmp_path / "a" / "tries").exists() == runs_here


class ThreadPool(Pool):
    """A pool that leaves signal handlers, which only the main thread may set, alone."""

    def __init__(self, commands):
        super().__init__(commands, [dict(os.environ)], retries=0, fork=False)

    def run(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(signal, "signal", lambda *args: None)
            return super().run()


def test_exit_73_is_set_aside_and_asked_for_again(tmp_path):
    command = job(tmp_path / "a", f"[ $n -lt 3 ] && exit {claims.EXIT_LOCKED}; {DONE}")
    assert local_launcher([command], retries=0) == [0]
    assert tries(tmp_path / "a") == 3


def test_a_cancelled_sweep_ends_gently(tmp_path, capfd):
    saves = f"trap 'echo saved > saved; exit 75' TERM; touch {tmp_path}/cancelled; while :; do sleep .01; done"
    commands = [job(tmp_path / "a", saves), job(tmp_path / "b", DONE)]
    assert local_launcher(commands, workers=1) == [75, 75]
    assert (tmp_path / "a" / "saved").exists()
    assert not (tmp_path / "b" / "tries").exists()
    assert "The sweep was cancelled." in capfd.readouterr().err


def test_what_is_done_when_it_should_end_is_done(tmp_path):
    ends = f"trap '{DONE}; exit 0' TERM; touch {tmp_path}/cancelled; while :; do sleep .01; done"
    assert local_launcher([job(tmp_path / "a", ends)]) == [0]


def test_what_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_GRACE_S", 0.1)
    deaf = f"trap '' TERM; touch {tmp_path}/cancelled; for i in $(seq 500); do sleep .01; done; touch survived"
    assert local_launcher([job(tmp_path / "a", deaf)]) == [75]
    assert not (tmp_path / "a" / "survived").exists()


@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGUSR1, SystemExit)]
)
def test_a_signal_while_a_command_is_started_leaves_no_orphan(monkeypatch, number, end):
    children, start = [], pool.ProcessChild

    def interrupted(*args):
        children.append(start(*args))
        signal.raise_signal(number)
        return children[-1]

    monkeypatch.setattr(pool, "ProcessChild", interrupted)
    with pytest.raises(end):
        local_launcher(["exec sleep 60"])
    assert children[0].poll() == -signal.SIGTERM


def test_a_job_stopped_by_the_cancelling_is_not_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_LOOK_S", 3600)
    assert job_lists.CANCELLED_FILE == "cancelled"
    command = job(tmp_path / "a", f"touch {tmp_path}/cancelled; exit 75")
    assert local_launcher([command]) == [75]
    assert tries(tmp_path / "a") == 1


def test_lines_where_there_is_no_terminal(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(pool, "_LINE_S", 0.0)
    local_launcher([job(tmp_path / "a", DONE), "exit 1"], workers=1)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("jobs: ")]
    assert re.match(r"jobs: 0/2 \[\d\d:\d\d, done=0, failed=0, running=1, elsewhere=0\]", lines[0])
    assert re.match(r"jobs: 2/2 \[\d\d:\d\d, done=1, failed=1, running=0, elsewhere=0\]", lines[-1])


def test_a_bar_on_a_terminal(monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert local_launcher(["exit 0", "exit 1"], workers=1) == [0, 1]
    err = capfd.readouterr().err
    assert "\rjobs: " in err
    assert "2/2" in err
    assert "done=1, failed=1, running=0, elsewhere=0" in err


def fake_server(tmp_path, monkeypatch, code):
    """Has forked trainings run the code, in a server that takes no time to start."""
    (tmp_path / "site").mkdir()
    site = "import sys, types\ntrain = sys.modules['domainbed.scripts.train'] = types.ModuleType('train')\n"
    site += "sys.modules |= dict.fromkeys(['torch', 'torchvision', 'sklearn', 'skimage'])\ntrain.__file__ = 'train'\n"
    site += f"exec({code!r}, vars(train))\n"
    (tmp_path / "site" / "sitecustomize.py").write_text(site)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(Path(pool.__file__).parents[1])]))


TOUCHES = """
import os, pathlib, signal
def main(argv):
    directory = pathlib.Path(argv[0])
    if argv[1:] == ["kill"] and not directory.exists():
        directory.mkdir()
        os.kill(os.getppid(), signal.SIGKILL)
        return 0
    directory.mkdir(exist_ok=True)
    (directory / "done").write_text("done")
"""


def test_another_server_takes_over_from_one_that_died(tmp_path, monkeypatch, capfd):
    fake_server(tmp_path, monkeypatch, TOUCHES)
    names = ["a", "b", "c"]
    commands = [
        Command([*TRAIN, str(tmp_path / name), *(["kill"] * (name == "b"))], str(tmp_path / name)) for name in names
    ]
    assert local_launcher(commands, workers=1) == [0, 0, 0]
    assert "The fork server has ended (exit status -9); starting another one." in capfd.readouterr().err


def test_what_has_yet_to_begin_does_not_once_the_launcher_ends(tmp_path, monkeypatch):
    fake_server(tmp_path, monkeypatch, TOUCHES)
    path = str(tmp_path / "a")
    ending = Pool([Command([*TRAIN, path], path)], [dict(os.environ)], retries=0, fork=True)
    ending.start()
    ending.end()
    assert ending.codes == [75]
    assert not os.path.exists(path)


def test_a_server_that_never_comes_up_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    commands = [Command([*TRAIN, str(tmp_path / name)], str(tmp_path / name)) for name in "ab"]
    with pytest.raises(pool.Unavailable, match=r"fork server has ended \(exit status 1\); --isolation process"):
        local_launcher(commands, workers=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_an_ended_launcher_ends_its_forks(tmp_path, monkeypatch, number):
    saves = (
        "import os, pathlib, signal, sys, time\n"
        "def main(argv):\n"
        "    signal.signal(signal.SIGTERM, lambda *args: (pathlib.Path(argv[0] + '.saved').touch(), sys.exit(75)))\n"
        "    pathlib.Path(argv[0] + '.pid').write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
    )
    fake_server(tmp_path, monkeypatch, saves)
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background shell\n"
        "from domainbed.command_launchers import local_launcher\nfrom domainbed.commands import TRAIN, Command\n"
        "local_launcher([Command([*TRAIN, path], path) for path in sys.argv[1:]], workers=2)"
    )
    paths = [str(tmp_path / name) for name in "abc"]
    launcher = subprocess.Popen([sys.executable, "-c", code, *paths], stderr=subprocess.PIPE)
    wait_for(lambda: all(os.path.exists(f"{path}.pid") for path in paths[:2]))

    launcher.send_signal(number)
    _, err = launcher.communicate(timeout=30)

    assert launcher.returncode in (128 + number, -number)
    assert b"Ending 2 running commands" in err
    assert [os.path.exists(f"{path}.saved") for path in paths] == [True, True, False]
