"""Launchers with commands that say where and how they ran."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from domainbed import command_launchers
from domainbed.command_launchers import dummy_launcher, local_launcher, multi_gpu_launcher
from domainbed.commands import Command


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def python(code, *args):
    return " ".join(["python -c", *map(shlex.quote, [code, *map(str, args)])])


def append(path):
    """A command that appends this interpreter's path and three settings to a file."""
    keys = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    code = f"import os, sys; print(sys.executable, *map(os.environ.get, {keys}), file=open(sys.argv[1], 'a'))"
    return python(code, path)


def test_exit_codes_come_in_the_commands_order(capfd):
    commands = ["sleep 0.2; exit 3", "exit 0", "echo hello; kill -9 $$", "echo one >&2; echo two >&2; exit 1"]
    given = list(commands)
    assert local_launcher(commands, workers=4) == [3, 0, -9, 1]
    assert commands == given
    out, err = capfd.readouterr()
    assert out == ""
    assert f"exit status 1: {commands[3]}\none\ntwo\n" in err
    assert "4/4" in err
    assert "failed=3" in err


def test_only_the_first_failures_are_shown(capfd):
    assert local_launcher(["exit 1"] * 7, workers=2) == [1] * 7
    assert capfd.readouterr().err.count("exit status 1: exit 1\n") == 5


def test_no_commands():
    assert local_launcher([]) == []


def test_python_is_this_interpreter_with_one_thread(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    assert local_launcher([append(tmp_path / "a")], workers=1) == [0]
    assert local_launcher([append(tmp_path / "b")], workers=1, threads=3) == [0]
    assert local_launcher([append(tmp_path / "c")], workers=1, threads=0) == [0]
    read = {name: (tmp_path / name).read_text().split() for name in "abc"}
    assert os.path.dirname(read["a"][0]) == os.path.dirname(sys.executable)
    assert [read[name][1:] for name in "abc"] == [["1", "1"], ["3", "3"], ["None", "7"]]


MEET = """
import pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
for _ in range(1000):
    if other.exists(): sys.exit(0)
    time.sleep(0.01)
sys.exit(9)
"""


def test_two_workers_run_side_by_side(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    assert local_launcher([python(MEET, a, b), python(MEET, b, a)], workers=2) == [0, 0]


def test_one_worker_runs_one_after_the_other(tmp_path):
    log = tmp_path / "log"
    local_launcher([f"echo {i} >> {log}; sleep 0.05; echo {i} >> {log}" for i in range(4)], workers=1)
    assert log.read_text().split() == list("00112233")


@pytest.mark.parametrize(("workers", "threads"), [(0, 1), (1, -1)])
def test_impossible_numbers(workers, threads):
    with pytest.raises(ValueError, match="workers must be >= 1 and threads >= 0; got"):
        local_launcher([], workers=workers, threads=threads)
    with pytest.raises(ValueError, match="retries must be >= 0 and isolation one of fork, process; got -1 and fork"):
        local_launcher([], retries=-1, isolation="fork")
    with pytest.raises(ValueError, match="got 1 and thread"):
        local_launcher([], isolation="thread")
    with pytest.raises(ValueError, match="jobs_per_gpu must be >= 1; got 0"):
        multi_gpu_launcher([], jobs_per_gpu=0)


def test_a_command_that_knows_its_words_runs_without_a_shell(tmp_path):
    word = f"$HOME; touch {tmp_path}/x"
    code = "import sys; open(sys.argv[1], 'w').write(sys.executable + sys.argv[2])"
    command = Command(["python", "-c", code, str(tmp_path / "out"), word], str(tmp_path / "job"))
    assert local_launcher([command]) == [0]
    assert (tmp_path / "out").read_text() == sys.executable + word
    assert not (tmp_path / "x").exists()


def test_default_is_one_worker_a_core(monkeypatch):
    seen = []
    monkeypatch.setattr(command_launchers, "child_environments", lambda *args: seen.append(args) or [{}])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    local_launcher([])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    local_launcher([])
    multi_gpu_launcher([], threads=2)
    assert seen == [(3, 1, []), (2, 1, ["4", "6"]), (2, 2, ["4", "6"])]


def test_each_worker_has_its_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    for launcher in (local_launcher, multi_gpu_launcher):
        log = tmp_path / launcher.__name__
        assert launcher([f"echo $CUDA_VISIBLE_DEVICES >> {log}"] * 2) == [0, 0]
        assert sorted(log.read_text().split()) == ["3", "5"]
    log = tmp_path / "two a GPU"
    meet = [f"echo $CUDA_VISIBLE_DEVICES >> '{log}'; until [ $(wc -l < '{log}') = 4 ]; do sleep .01; done"] * 4
    assert multi_gpu_launcher(meet, jobs_per_gpu=2) == [0] * 4
    assert sorted(log.read_text().split()) == ["3", "3", "5", "5"]
    environments = command_launchers.child_environments(3, 1, ["3", "5"])
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == ["3", "5", "3"]


def test_gpus_from_the_variable_or_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for value, gpus in (("0, 2,", ["0", "2"]), ("", []), ("-1", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert command_launchers.visible_gpus() == gpus

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert command_launchers.visible_gpus() == []  # no nvidia-smi
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho '  MIG 1g Device 0: y'\necho 'GPU 1: A (UUID: z)'\n")
    tool.chmod(0o755)
    assert command_launchers.visible_gpus() == ["0", "1"]
    tool.write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    assert command_launchers.visible_gpus() == []


def test_multi_gpu_without_gpus():
    with pytest.raises(command_launchers.Unavailable, match="no GPU is visible"):
        multi_gpu_launcher(["exit 0"])


def test_dummy_prints(tmp_path, capsys):
    assert dummy_launcher([f"touch {tmp_path}/x", "b"]) is None
    assert capsys.readouterr().out == f"Dummy launcher: touch {tmp_path}/x\nDummy launcher: b\n"
    assert not (tmp_path / "x").exists()


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("nothing happened in 10 s")


def has_ended(pid):
    """Gone, or a zombie that nobody has taken in yet."""
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


LEAVES = "import pathlib, sys, os, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_launcher_ends_its_children(tmp_path, number):
    pids = [tmp_path / "a", tmp_path / "b"]
    commands = [python(LEAVES, pid) for pid in pids] + [f"touch {tmp_path}/third"]
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background shell\n"
        f"from domainbed.command_launchers import local_launcher; local_launcher({commands!r}, workers=2)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    wait_for(lambda: all(pid.exists() and pid.read_text() for pid in pids))

    launcher.send_signal(number)
    _, err = launcher.communicate(timeout=30)

    assert launcher.returncode in (128 + number, -number)  # an uncaught KeyboardInterrupt ends by the signal itself
    assert b"Ending 2 running commands" in err
    assert all(has_ended(pid.read_text()) for pid in pids)
    assert not (tmp_path / "third").exists()


def test_more_workers_than_files_are_refused(monkeypatch):
    monkeypatch.setattr(command_launchers.resource, "getrlimit", lambda which: (52, 1024))
    with pytest.raises(ValueError, match=r"3 workers are too many for `ulimit -n` 52"):
        local_launcher(["true"] * 3, workers=3)
    assert local_launcher(["true"], workers=3) == [0]


def test_find_binds_options(monkeypatch):
    def third_party(commands):
        return len(commands)

    monkeypatch.setitem(command_launchers.REGISTRY, "mine", third_party)
    assert command_launchers.find("mine", {"workers": None}) is third_party
    with pytest.raises(ValueError, match="launcher mine has no option --threads; it takes: none"):
        command_launchers.find("mine", {"workers": None, "threads": 2})
    with pytest.raises(ValueError, match="launcher multi_gpu has no option --workers; it takes: --threads, --jobs"):
        command_launchers.find("multi_gpu", {"workers": 1, "threads": None, "jobs_per_gpu": None})
    with pytest.raises(ValueError, match="got 0 and 1"):
        command_launchers.find("local", {"workers": 0, "threads": None})([])


def test_unknown_launcher():
    with pytest.raises(NotImplementedError, match="launcher not found: locl; did you mean local"):
        command_launchers.find("locl", {})


FAR = """
from domainbed.command_launchers import REGISTRY, register

def far(commands, *, retries=0):
    return [retries] * len(commands)

register("far", len)  # DomainBed's kind
register("farther", far)
REGISTRY["farthest"] = len
"""


def test_launchers_from_a_plugin(tmp_path, monkeypatch):
    plugin = tmp_path / "far_launchers.py"
    plugin.write_text(FAR)
    monkeypatch.setenv("DOMAINBED_PLUGINS", str(plugin))
    monkeypatch.setattr(command_launchers, "REGISTRY", dict(command_launchers.REGISTRY))
    assert command_launchers.find("far", {}) is len
    assert command_launchers.find("farther", {"retries": 3, "workers": None})(["a", "b"]) == [3, 3]
    assert command_launchers.find("farthest", {})(["a", "b"]) == 2
    with pytest.raises(ValueError, match="launcher farther has no option --workers; it takes: --retries"):
        command_launchers.find("farther", {"workers": 3, "retries": None})
    (name,) = [name for name in sys.modules if name.startswith("domainbed_plugin_far_launchers")]
    del sys.modules[name]


def test_a_name_is_given_once(monkeypatch):
    monkeypatch.setattr(command_launchers, "REGISTRY", dict(command_launchers.REGISTRY))
    command_launchers.register("mine", len)
    command_launchers.register("mine", len)  # a plugin may be imported twice
    with pytest.raises(ValueError, match="launcher registered twice: local; give one of them another name"):
        command_launchers.register("local", len)
    assert command_launchers.REGISTRY["local"] is local_launcher


def test_facebook_hook(tmp_path):
    (tmp_path / "facebook.py").write_text("def register_command_launchers(registry): registry['cluster'] = print")
    code = (
        f"import domainbed; domainbed.__path__.append({str(tmp_path)!r})\n"
        "from domainbed import command_launchers; print(*command_launchers.REGISTRY)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "local dummy multi_gpu slurm cluster\n"
