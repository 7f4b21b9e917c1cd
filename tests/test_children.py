"""Forked trainings against processes of their own: with a stand-in for train that does as it is told, and for real."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from domainbed import children
from domainbed.children import ForkServer, ProcessChild
from domainbed.commands import TRAIN, Command, train_command

STAND_IN = """
import sys
from domainbed.scripts import BadInput, run_cli

def main(argv):
    name, output_dir, code, *more = argv
    found = {"argv": argv, "output_dir": output_dir, "BadInput": BadInput}
    exec(code, found)
    return found.get("status")

if __name__ == "__main__":
    run_cli(main)
"""

# Takes train's place in a server that finds it on its path, and spares it what train imports.
SITE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("domainbed.scripts.train", {path!r})
sys.modules["domainbed.scripts.train"] = importlib.util.module_from_spec(spec)
sys.modules |= dict.fromkeys(["torch", "torchvision", "sklearn", "skimage"])
spec.loader.exec_module(sys.modules["domainbed.scripts.train"])
"""


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("nothing happened in a minute")


def ended(child):
    wait_for(lambda: child.poll() is not None)
    return child.poll()


def is_gone(pid):
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE.format(path=str(tmp_path / "stand_in.py")))
    root = str(Path(children.__file__).parents[1])
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), root])}


@pytest.fixture
def server(environment):
    server = ForkServer(environment)
    yield server
    server.close()


def forked(code, output_dir, *more):
    return Command([*TRAIN, "--output_dir", str(output_dir), code, *map(str, more)], str(output_dir))


def afresh(code, output_dir, tmp_path):
    return Command(["python", str(tmp_path / "stand_in.py"), "--output_dir", str(output_dir), code], str(output_dir))


ENDS = [
    ("pass", 0),
    ("status = 73", 73),
    ("status = 75", 75),
    ("raise BadInput('no such thing')", 2),
    ("1 / 0", 1),
    ("raise SystemExit('a text')", 1),
    ("import sys; sys.exit(-1)", 255),
    ("raise KeyboardInterrupt", -2),
    ("import os; os.kill(os.getpid(), 9)", -9),
    ("import os; os.kill(os.getpid(), 15)", -15),
    ("import os; os._exit(4)", 4),
    ("import logging; logging.getLogger('x').info('what the library logs')", 0),
]


def test_it_ends_as_a_process_of_its_own(server, environment, tmp_path):
    of_forks = [server.start(forked(code, tmp_path / "x"), environment) for code, _ in ENDS]
    of_processes = [ProcessChild(afresh(code, tmp_path / "x", tmp_path), environment) for code, _ in ENDS]
    for (code, status), fork, process in zip(ENDS, of_forks, of_processes, strict=True):
        assert (code, ended(fork)) == (code, status)
        assert ended(process) == status
        assert fork.last_lines(1) == process.last_lines(1)
        assert fork.why() == process.why()
        fork.close()
        process.close()


LOOKS = """
import atexit, json, os, signal, sys
facts = {
    "argv": sys.argv[1:], "cwd": os.getcwd(), "path0": sys.path[0] == os.getcwd(), "gpu": os.environ["GPU"],
    "leads": os.getsid(0) == os.getpgid(0) == os.getpid(), "stdin": sys.stdin.read(),
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "default": [signal.getsignal(n) == signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1)],
    "descriptors": len(os.listdir("/proc/self/fd")),
}
print("printed")
file = open(output_dir + ".json", "w")  # never closed
atexit.register(lambda: json.dump(facts, file))
"""


def test_it_finds_what_a_process_of_its_own_finds(server, environment, tmp_path, capfd):
    environment = environment | {"GPU": "7"}
    fork = server.start(forked(LOOKS, tmp_path / "fork"), environment)
    process = ProcessChild(afresh(LOOKS, tmp_path / "process", tmp_path), environment)
    assert (ended(fork), ended(process)) == (0, 0)
    facts, expected = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("fork", "process"))
    assert facts.pop("argv") == ["--output_dir", str(tmp_path / "fork"), LOOKS]
    assert expected.pop("argv")[:1] == ["--output_dir"]
    assert facts.pop("path0")  # as python -m has it
    del expected["path0"]
    assert facts == expected
    assert facts["leads"]
    assert facts["gpu"] == "7"
    assert capfd.readouterr().out == ""
    fork.close()
    process.close()


WAITS = """
import os, pathlib, time
pathlib.Path(output_dir + ".pid").write_text(str(os.getpid()))
while not os.path.exists(output_dir + ".go"): time.sleep(.01)
os.makedirs(output_dir); pathlib.Path(output_dir, "done").write_text("done")
status = 5
"""


def pid_of(output_dir):
    path = Path(f"{output_dir}.pid")
    wait_for(lambda: path.exists() and path.read_text())
    return int(path.read_text())


def test_the_group_gets_signals(server, environment, tmp_path):
    child = server.start(forked(WAITS, tmp_path / "x"), environment)
    assert pid_of(tmp_path / "x") == child.pid
    assert child.signal_group(signal.SIGTERM)
    assert ended(child) == -signal.SIGTERM
    assert child.why() == "killed by SIGTERM"
    child.close()


def test_a_server_that_dies_leaves_its_children_alone(environment, tmp_path):
    server = ForkServer(environment)
    child = server.start(forked(WAITS, tmp_path / "x"), environment)
    pid = pid_of(tmp_path / "x")
    os.kill(server._process.pid, signal.SIGKILL)
    wait_for(lambda: server.pid(0) is None and server.ended)
    assert child.poll() is None
    assert server.epitaph() == "exit status -9"
    late = server.start(forked(WAITS, tmp_path / "y"), environment)
    assert late.poll() == 75  # never started
    (tmp_path / "x.go").touch()
    assert ended(child) == 0  # so says its directory; nobody could hear its exit code
    assert is_gone(pid)
    for each in (child, late, server):
        each.close()


def test_a_launcher_that_dies_leaves_them_alone_and_the_server_ends_with_the_last(environment, tmp_path):
    code = (
        "import os, signal, sys, time\n"
        "from domainbed.children import ForkServer\nfrom domainbed.commands import Command\n"
        "server = ForkServer(dict(os.environ)); words, directory = sys.argv[2:], sys.argv[1]\n"
        "child = server.start(Command(words, directory), os.environ)\n"
        "while child.pid is None: time.sleep(.01)\n"
        "print(server._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = forked(WAITS, tmp_path / "x")
    launcher = subprocess.run(
        [sys.executable, "-c", code, command.output_dir, *command.argv], env=environment, capture_output=True, text=True
    )
    assert launcher.returncode == -signal.SIGKILL
    server, child = int(launcher.stdout), pid_of(tmp_path / "x")
    assert not is_gone(server)
    assert not is_gone(child)
    (tmp_path / "x.go").touch()
    wait_for(lambda: is_gone(child) and is_gone(server))
    assert (tmp_path / "x" / "done").exists()


def test_what_was_asked_for_is_not_started_after_a_stop(environment, tmp_path):
    server = ForkServer(environment)
    child = server.start(forked(WAITS, tmp_path / "x"), environment)
    server.stop()
    assert ended(child) == 75
    assert child.pid is None
    server.close()
    child.close()
    assert not (tmp_path / "x.pid").exists()


def test_what_waits_in_the_channel_is_not_started_after_a_stop(server, environment, tmp_path):
    runs = server.start(forked(WAITS, tmp_path / "x"), environment)
    wait_for(lambda: runs.pid is not None)
    os.kill(server._process.pid, signal.SIGSTOP)
    waits = server.start(forked(WAITS, tmp_path / "y"), environment)
    server.stop()
    os.kill(server._process.pid, signal.SIGCONT)
    (tmp_path / "x.go").touch()
    (tmp_path / "y.go").touch()
    assert (ended(runs), ended(waits)) == (5, 75)
    assert not (tmp_path / "y.pid").exists()
    runs.close()
    waits.close()


def add_to_site(tmp_path, code):
    with open(tmp_path / "site" / "sitecustomize.py", "a") as file:
        file.write(code)


def test_a_server_that_is_not_ready_is_stopped_at_once(environment, tmp_path):
    add_to_site(tmp_path, "import time; time.sleep(600)")
    server = ForkServer(environment)
    child = server.start(forked("pass", tmp_path / "x"), environment)
    server.stop()
    assert ended(child) == 75
    assert server.epitaph() == "exit status -9"
    child.close()
    server.close()


def test_a_server_whose_forks_would_lack_threads_says_so(environment, tmp_path):
    add_to_site(
        tmp_path, "import threading, time; threading.Thread(target=time.sleep, args=[600], daemon=True).start()"
    )
    server = ForkServer(environment)
    wait_for(lambda: server.code(0) is None and server.ended)
    assert not server.ready
    assert server.epitaph().startswith(
        "exit status 1\nwhat trainings import, a plugin perhaps, has computed on several"
    )
    server.close()


def test_a_fork_that_fails_is_told(environment, tmp_path):
    fails = (
        "import os; forks = [os.fork]\ndef fork():\n    if forks: return forks.pop()()\n    raise OSError(11, 'no')\n"
    )
    add_to_site(tmp_path, f"{fails}os.fork = fork")  # once, to look for threads, it may
    server = ForkServer(environment)
    child = server.start(forked("pass", tmp_path / "x"), environment)
    assert ended(child) == 1
    assert child.why() == "error: can't fork: no"
    child.close()
    server.close()


def test_signals_are_left_to_the_jobs(server, environment, tmp_path):
    wait_for(lambda: server.code(0) is None and server.ready)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(server._process.pid, number)
    child = server.start(forked("pass", tmp_path / "x"), environment)
    assert ended(child) == 0
    child.close()


def test_more_requests_than_the_channel_holds(server, environment, tmp_path):
    """The server may be waiting for us meanwhile, or not be there yet."""
    wait_for(lambda: server.code(0) is None and server.ready)
    os.kill(server._process.pid, signal.SIGSTOP)
    started = [server.start(forked(f"pass  # {'x' * 50_000}", tmp_path / "x"), environment) for _ in range(20)]
    os.kill(server._process.pid, signal.SIGCONT)
    assert [ended(child) for child in started] == [0] * 20
    for child in started:
        child.close()


def test_a_request_that_is_too_long_fails(server, environment, tmp_path):
    child = server.start(forked("x" * 2_000_000, tmp_path / "x"), environment)
    after = server.start(forked("pass", tmp_path / "x"), environment)
    assert ended(child) == 127
    assert child.why() == "error: can't be asked for: Message too long"
    assert ended(after) == 0
    child.close()
    after.close()


def test_out_of_memory_is_named(monkeypatch):
    counts = iter([3, 4, 3, 3])
    monkeypatch.setattr(children, "oom_kills", lambda: next(counts))
    messages = []
    for _ in range(2):
        child = ProcessChild("kill -9 $$", dict(os.environ))
        ended(child)
        messages.append(child.why())
        child.close()
    assert messages[0].startswith("out of memory: the kernel killed it (SIGKILL)")
    assert messages[1] == "killed by SIGKILL"


def test_the_kernel_counts_what_it_kills(tmp_path, monkeypatch):
    files = {"proc/self/cgroup": "0::/group\n", "sys/fs/cgroup/group/memory.events": "low 0\noom_kill 3\n"}
    files["proc/vmstat"] = "nr_free_pages 5\noom_kill 8\n"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(children, "Path", lambda *parts: Path(tmp_path, *(part.lstrip("/") for part in parts)))
    assert children.oom_kills() == 3
    (tmp_path / "sys/fs/cgroup/group/memory.events").unlink()
    assert children.oom_kills() == 8
    (tmp_path / "proc/vmstat").unlink()
    assert children.oom_kills() == 0


def without_times(path):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("step_time", "mem_gb")} for record in records]


PLUGIN = """
import os, torch
def note(name, result=0):
    print(name, os.getpid(), file=open(os.environ["NOTES"], "a"))
    return result
note("plugin")
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    setattr(torch._C, name, lambda name=name: note(name))
"""


def test_real_trainings_give_equal_results(tmp_path, monkeypatch):
    (tmp_path / "plugin.py").write_text(PLUGIN)
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment |= {"DOMAINBED_PLUGINS": str(tmp_path / "plugin.py"), "NOTES": str(tmp_path / "notes")}
    args = {"dataset": "Debug28", "algorithm": "ERM", "test_envs": [0], "steps": 3, "checkpoint_freq": 2, "seed": 5}
    command = train_command(args | {"output_dir": "run"})  # relative: the models hold it
    for name in ("fork", "process"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "fork")
    server = ForkServer(environment)
    fork = server.start(command, environment)
    monkeypatch.chdir(tmp_path / "process")
    process = ProcessChild(command, environment)
    pid = server._process.pid
    try:
        wait_for(lambda: server.pid(1) is not None)
        assert len(os.listdir(f"/proc/{pid}/task")) == 1  # a thread would be lost to a fork, its locks would not
        assert (ended(fork), ended(process)) == (0, 0), (fork.last_lines(), process.last_lines())
    finally:
        server.close()
        fork.close()
        process.close()
    one, other = tmp_path / "fork" / "run", tmp_path / "process" / "run"
    assert [record["step"] for record in without_times(one / "results.jsonl")] == [0, 2]
    assert without_times(one / "results.jsonl") == without_times(other / "results.jsonl")
    assert (one / "model.pkl").read_bytes() == (other / "model.pkl").read_bytes()
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    assert [name for name, noted in notes if int(noted) == pid] == ["plugin"]  # and no question about GPUs
