"""Scripts whose reader goes away end without a traceback; other errors show."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

END = """
import os, sys
from domainbed.scripts import bad_input, run_cli

def main(argv):
    with bad_input():
        exec(argv[0])

run_cli(main)
"""


def until_a_line(*argv: str) -> tuple[int, str, str]:
    """Status, first line and stderr of a process whose reader closes its stdout, and then its stdin."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, *argv], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    process.stdout.close()
    _, error = process.communicate()
    return process.returncode, line[:1], error


@pytest.mark.parametrize(
    "code",
    [
        "print('x\\n' * 10**6)",  # at once
        "[print('x' * 99, i) for i in range(10**5)]",
        "print('x', flush=True); sys.stdin.read(); print('y')",  # what is still in the buffer at the end
        "print('x', flush=True); sys.stdin.read(); print('y'); sys.exit(0)",
    ],
)
def test_a_reader_that_goes_away(code: str) -> None:
    assert until_a_line("-c", END, code) == (1, "x", "")


def test_list_top_hparams_into_head(tmp_path: Path) -> None:
    args = {"algorithm": "ERM", "dataset": "ColoredMNIST", "test_envs": [0], "trial_seed": 0, "seed": 0}
    for seed in range(300):
        (tmp_path / str(seed)).mkdir()
        run = args | {"hparams_seed": seed, "output_dir": f"jobs/{seed}" + "x" * 400}
        record = {"args": run, "hparams": {"lr": 0.1}, "step": 0, "env0_in_acc": 0.5, "env0_out_acc": 0.5}
        line = json.dumps(record | {"env1_out_acc": 0.5, "env2_out_acc": 0.5})
        (tmp_path / str(seed) / "results.jsonl").write_text(line + "\n")
    words = ["--input_dir", str(tmp_path), "--dataset", "ColoredMNIST", "--algorithm", "ERM", "--test_env", "0"]
    assert until_a_line("-m", "domainbed.scripts.list_top_hparams", *words) == (1, "T", "")


def test_another_broken_pipe_is_an_error_that_shows() -> None:
    code = "read, write = os.pipe(); os.close(read); os.write(write, b'x')"
    found = subprocess.run([sys.executable, "-c", END, code], capture_output=True, text=True)
    assert found.returncode == 1
    assert "BrokenPipeError" in found.stderr


def test_without_a_stdout() -> None:
    found = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" "$2" >&-', sys.executable, END, "print(1)"], capture_output=True, text=True
    )
    assert (found.returncode, found.stderr) == (0, "")
