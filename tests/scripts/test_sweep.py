"""The sweep script from its arguments to what it prints, makes and returns; and the parser that scripts share."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from domainbed import claims, command_launchers, messages, registry, run_directory
from domainbed.scripts import BadInput, bad_input, run_cli, sweep, sweep_arguments, sweep_checks
from domainbed.scripts.arguments import DomainBedParser
from domainbed.sweep_rows import SweepRow

TRAIN_FLAGS = (
    "data_dir", "dataset", "algorithm", "task", "hparams", "hparams_seed", "trial_seed", "seed", "steps",
    "checkpoint_freq", "test_envs", "output_dir", "holdout_fraction", "uda_holdout_fraction", "skip_model_save",
    "save_model_every_checkpoint",
)  # fmt: skip
SWEEP_FLAGS = (
    "datasets", "algorithms", "task", "n_hparams_from", "n_hparams", "output_dir", "data_dir", "seed", "n_trials",
    "command_launcher", "steps", "hparams", "holdout_fraction", "single_test_envs", "skip_confirmation",
)  # fmt: skip


def unique_prefixes(flags):
    """Every abbreviation, with the flag it means; --help is a flag too."""
    every = [*flags, "help"]
    prefixes = {flag[:end] for flag in flags for end in range(1, len(flag))} - set(every)
    meanings = {prefix: [flag for flag in every if flag.startswith(prefix)] for prefix in prefixes}
    return sorted((prefix, meant[0]) for prefix, meant in meanings.items() if len(meant) == 1 and meant != ["help"])


@pytest.mark.parametrize("upstream", [TRAIN_FLAGS, SWEEP_FLAGS], ids=["train", "sweep"])
def test_abbreviations_survive_new_flags(upstream):
    """Each of DomainBed's flags gets two rivals that begin alike."""
    parser = DomainBedParser(upstream)
    for flag in upstream:
        parser.add_argument(f"--{flag}")
        parser.add_argument(f"--{flag}_of_ours")
        parser.add_argument(f"--{flag[:-1]}0")
    for prefix, flag in unique_prefixes(upstream):
        for words in ([f"--{prefix}", "x"], [f"--{prefix}=x"]):
            found = vars(parser.parse_args(words))
            assert {key for key, value in found.items() if value == "x"} == {flag}, prefix


def test_abbreviations_of_sweep_itself():
    sample = {"task": "domain_generalization", "command": "launch"}
    bare = ("single_test_envs", "skip_confirmation")
    assert set(sweep_arguments.DOMAINBED_FLAGS) == set(SWEEP_FLAGS)
    default = vars(sweep_arguments.make_parser().parse_args(["launch"]))
    for prefix, flag in unique_prefixes(SWEEP_FLAGS):
        words = [f"--{prefix}"] if flag in bare else [f"--{prefix}", sample.get(flag, "7")]
        found = vars(sweep_arguments.make_parser().parse_args(["launch", *words]))
        assert {key for key in found if found[key] != default[key]} <= {flag}, prefix
        assert flag == "task" or found[flag] != default[flag], prefix


def test_parser_keeps_what_was_an_error(capsys):
    parser = DomainBedParser(["steps", "seed"])
    for flag in ("--steps", "--seed", "--s_ours"):
        parser.add_argument(flag)
    with pytest.raises(SystemExit):
        parser.parse_args(["--s", "1"])
    assert "ambiguous" in capsys.readouterr().err
    assert parser.parse_args(["--s_o", "1"]).s_ours == "1"
    assert parser.parse_known_args(["--se", "1", "--", "--se"])[0].seed == "1"
    assert parser.flags() == ["steps", "seed", "s_ours"]


def test_help_with_percent_signs_and_defaults(capsys):
    parser = DomainBedParser(["x"])
    parser.add_argument_group("more").add_argument("--x", default=0, help="80 % of %(metavar)s, 5%% more", metavar="Y")
    parser.add_argument("--y", help="about 100%")
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--hel"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "80 % of Y, 5% more (default: 0)" in text
    assert text.endswith("about 100%") or "about 100% more" in text


def test_sweep_help(capsys):
    with pytest.raises(SystemExit) as end:
        sweep.main(["--help"])
    assert end.value.code == 0
    assert "--test_envs_list" in capsys.readouterr().out


def test_run_cli_turns_only_bad_input_into_a_line(monkeypatch, capsys):
    def main(argv):
        if argv == ["bad"]:
            with bad_input():
                raise ValueError("not that")
        if argv == ["bug"]:
            raise ValueError("a bug")
        return len(argv)

    for argv, status in ((["bad"], 2), ([], 0), (["x", "y", "z"], 3)):
        monkeypatch.setattr(sys, "argv", ["prog", *argv])
        with pytest.raises(SystemExit) as end:
            run_cli(main)
        assert end.value.code == status
    assert capsys.readouterr().err == "error: not that\n"
    monkeypatch.setattr(sys, "argv", ["prog", "bug"])
    with pytest.raises(ValueError, match="a bug"):
        run_cli(main)


@pytest.mark.parametrize("error", [ValueError, NotImplementedError, FileNotFoundError, ModuleNotFoundError])
def test_bad_input_converts(error):
    with pytest.raises(BadInput, match="what came"), bad_input():
        raise error("what came")
    with pytest.raises(BadInput, match=error.__name__), bad_input():
        raise error


def test_no_torch(tmp_path):
    argv = [
        "launch",
        "--datasets",
        "Debug28",
        "--algorithms",
        "ERM",
        "ERM:random",
        "--n_hparams",
        "1",
        "--n_trials",
        "1",
    ]
    argv += ["--single", "--output_dir", f"{tmp_path}/out", "--command_launcher", "dummy", "--skip_confirmation"]
    code = (
        "import sys, domainbed.scripts.sweep as sweep\n"
        "assert 'torch' not in sys.modules\n"
        f"assert sweep.main({argv!r}) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "6 jobs: 0 done, 0 incomplete, 6 not launched.\nAbout to launch 6 jobs.\n" in result.stdout


@pytest.fixture
def declared(monkeypatch):
    """Names and attributes in place of those that the package happens to have."""
    names = {"algorithms": ["ERM", "IRM", "Newer"], "datasets": ["Debug28", "Four", "Own"]}
    orders = {"algorithms": ("ERM", "Missing", "IRM"), "datasets": ("Debug28", "Missing", "Four")}

    def attribute(package, name, attribute, default=None):
        if name not in names[package]:
            raise NotImplementedError(messages.not_found(package[:-1], name, names[package]))
        facts = {
            "ENVIRONMENTS": tuple("abcd") if name == "Four" else tuple("abc"),
            "NEEDS_DATA_DIR": name == "Four",
            "CONFOUNDERS": "ab",
            "CONTROL": {"weight": 0.0} if name == "Newer" else {},
            "TEST_ENVS": (1,) if name == "Debug28" else None,
        }
        return facts.get(attribute, default)

    monkeypatch.setattr(registry, "names", names.get)
    monkeypatch.setattr(registry, "order", orders.get)
    monkeypatch.setattr(registry, "attribute", attribute)


@pytest.fixture
def run(declared, tmp_path, monkeypatch):
    """Runs sweep on Debug28 with ERM, one draw and one trial: three jobs in ``tmp_path/out``."""
    commands = []

    def recorder(given):
        commands.append(given)

    monkeypatch.setitem(command_launchers.REGISTRY, "recorder", recorder)
    monkeypatch.setattr(sweep_checks, "check", lambda jobs: None)  # knows the package's own names

    def run(command, *words, launcher="recorder"):
        grid = ["--datasets", "Debug28", "--algorithms", "ERM", "--n_hparams", "1", "--n_trials", "1", "--single"]
        place = ["--output_dir", str(tmp_path / "out"), "--command_launcher", launcher]
        return sweep.main([command, *grid, *place, *words])

    run.commands = commands
    run.out = tmp_path / "out"
    return run


def begin(commands):
    """The directories of some commands' jobs, made and with a trace of a run, in order of their names."""
    for command in commands:
        os.makedirs(command.output_dir)
        Path(command.output_dir, "results.jsonl").touch()
    return sorted(Path(command.output_dir) for command in commands)


def test_exports(declared):
    assert sweep.DATASETS == ["Four"]
    assert sweep.all_test_env_combinations(3)[:2] == [[0], [0, 1]]
    for name in ("Job", "make_args_list", "ask_for_confirmation"):
        assert callable(getattr(sweep, name))
    with pytest.raises(AttributeError, match="no attribute 'DATASET'"):
        _ = sweep.DATASET


def test_default_lists_are_domainbeds(declared):
    args = sweep.parse(["launch", "--output_dir", "o", "--command_launcher", "dummy"])
    assert (args.datasets, args.algorithms) == (["Four"], ["ERM", "IRM"])
    assert (args.task, args.n_hparams_from, args.n_hparams, args.n_trials) == ("domain_generalization", 0, 20, 3)
    assert (args.steps, args.hparams, args.holdout_fraction, args.seed) == (None, None, 0.2, 0)


def test_launch_prints_domainbeds_lines(run, capsys):
    assert run("launch", "--skip_confirmation") == 0
    out = capsys.readouterr().out
    job = r"Not launched: \S+/out/[0-9a-f]{32} \('Debug28', 'ERM', \[{}\], 0\)\n"
    expected = "".join(job.replace("{}", str(env)) for env in range(3)) + re.escape(
        "3 jobs: 0 done, 0 incomplete, 3 not launched.\nAbout to launch 3 jobs.\nLaunching...\nLaunched 3 jobs!\n"
    )
    assert re.fullmatch(expected, out)
    assert os.listdir(run.out) == ["jobs.jsonl"]  # a directory is made when its job runs
    listed = [json.loads(line)["name"] for line in Path(run.out, "jobs.jsonl").read_text().splitlines()]
    assert listed == [os.path.basename(d) for d in re.findall(r"\S+/out/\S+", out)]


@pytest.fixture
def held():
    """Claims a directory in another process until the test ends."""
    holders = []

    def hold(directory):
        code = (
            "import sys; from domainbed import claims\n"
            "with claims.claim(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        holders.append(subprocess.Popen([sys.executable, "-c", code, directory], **pipes))
        assert holders[-1].stdout.readline() == b"held\n"

    yield hold
    for holder in holders:
        holder.communicate()


def test_second_launch_starts_only_what_is_not_done(run, capsys, held):
    run("launch", "--skip")
    done, running, preempted = begin(run.commands[0])
    run_directory.mark_done(done)
    held(running)

    run("launch", "--skip")
    [launched] = run.commands[-1]
    deleted = run("delete_incomplete", "--skip")

    out = capsys.readouterr().out
    assert "3 jobs: 1 done, 2 incomplete, 0 not launched.\nAbout to launch 0 jobs.\n" in out
    assert "About to start 1 incomplete jobs again; 1 are running and are left alone.\n" in out
    assert "failed" not in out
    assert launched.output_dir == str(preempted)
    assert deleted == 0
    assert out.endswith(
        "About to delete 2 jobs.\nDeleting...\nDeleted 1 jobs!\n"
        "Left 1 jobs that are running or were completed meanwhile.\n"
    )
    assert sorted(path for path in run.out.iterdir() if path.is_dir()) == [done, running]


def test_all_done_asks_nothing(run, monkeypatch):
    run("launch", "--skip_confirmation")
    for directory in begin(run.commands[0]):
        run_directory.mark_done(directory)
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("asked"))
    assert run("launch") == 0
    assert len(run.commands) == 1


@pytest.mark.parametrize(("answer", "launched"), [("y", 1), ("Yes please", 1), ("n", 0), ("", 0)])
def test_confirmation(run, monkeypatch, capsys, answer, launched):
    prompts = []
    monkeypatch.setattr("builtins.input", lambda prompt: prompts.append(prompt) or answer)
    if launched:
        assert run("launch") == 0
    else:
        with pytest.raises(SystemExit) as end:
            run("launch")
        assert end.value.code == 0
        assert capsys.readouterr().out.endswith("Nevermind!\n")
    assert prompts == ["Are you sure? (y/n) "]
    assert run.out.exists() == bool(run.commands) == bool(launched)


def test_nobody_to_confirm(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit) as end:
        run("delete_incomplete")
    assert end.value.code == 0
    assert "--skip_confirmation" in capsys.readouterr().out


def test_failures_are_named(run, monkeypatch, capsys):
    def failing(commands):
        directories = begin(commands)
        run_directory.mark_done(directories[0])
        (directories[1] / "err.txt").write_text("Traceback\nKeyError: 'x'\n")
        locked = [f" {directories[2]} " in command for command in commands]
        return [claims.EXIT_LOCKED if is_locked else 1 for is_locked in locked]

    monkeypatch.setitem(command_launchers.REGISTRY, "failing", failing)
    assert run("launch", "--skip", launcher="failing") == 1
    out = capsys.readouterr().out
    failed = sorted(filter(Path.is_dir, run.out.iterdir()))[1]
    assert f"Failed: {failed}: KeyError: 'x'\n1 done, 1 failed, 1 running elsewhere.\n" in out


def test_few_failures_are_shown(run, monkeypatch, capsys):
    monkeypatch.setitem(command_launchers.REGISTRY, "failing", lambda commands: [1] * len(commands))
    assert run("launch", "--skip", "--n_hparams", "3", launcher="failing") == 1
    out = capsys.readouterr().out
    assert out.count("Failed: ") == 5
    assert out.endswith("... and 4 more.\n0 done, 9 failed.\n`sweep retry_failed` starts the failed ones again.\n")


def test_success_is_counted(run, monkeypatch, capsys):
    def working(commands):
        for directory in begin(commands):
            run_directory.mark_done(directory)
        return [0] * len(commands)

    monkeypatch.setitem(command_launchers.REGISTRY, "working", working)
    assert run("launch", "--skip", launcher="working") == 0
    assert capsys.readouterr().out.endswith("Launched 3 jobs!\n3 done, 0 failed.\n")


def test_interrupt(run, monkeypatch, capsys):
    def interrupted(commands):
        raise KeyboardInterrupt

    monkeypatch.setitem(command_launchers.REGISTRY, "interrupted", interrupted)
    assert run("launch", "--skip", launcher="interrupted") == 130
    assert capsys.readouterr().out.endswith("Interrupted; launch again to go on.\n")


def test_launcher_without_its_machine(run, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(BadInput, match="no GPU is visible"):
        run("launch", "--skip", launcher="multi_gpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--algorithms", "ERN"], "algorithm not found: ERN; did you mean ERM"),
        (["--datasets", "Debug29"], "dataset not found: Debug29; did you mean Debug28"),
        (["--datasets", "Four"], "--data_dir is required: Four"),
        (["--command_launcher", "recoder"], "launcher not found: recoder; did you mean recorder"),
        (["--workers", "2"], "launcher recorder has no option --workers"),
        (["--hparams", "{lr: 1}"], "hparams are a JSON object"),
        (["--test_envs_list", "0,1,2"], r"test environments \[0, 1, 2\] are not possible"),
        (["--algorithms", "ERM", "ERM:environment"], "two jobs are the same run"),
        (["--ranges", '{"lr": "N(0, 1)"}'], "range of lr"),
        (["--steps", "5", "--epochs", "2"], "--steps and --epochs exclude each other"),
        (["--test_envs_list", "0", "--official_test_envs"], "--test_envs_list and --official_test_envs exclude"),
        (["--controls"], "none of ERM has one; leave out --controls"),
    ],
)
def test_bad_input_before_anything_is_made(run, words, message):
    with pytest.raises(BadInput, match=message):
        run("launch", *words)
    assert not run.out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--test_envs_list", "0;1"], "'0;1' is no list of environments such as 0 or 1,2"),
        (["--workers", "0"], "0 is below 1"),
        (["--threads", "-1"], "-1 is below 0"),
        (["--task", "dg"], "invalid choice: 'dg'"),
        (["--epochs", "0"], "0 is below 1"),
        (["--seeds", "x"], "invalid int value: 'x'"),
        (["--criterion", "aa"], "invalid choice: 'aa'"),
    ],
)
def test_flags_are_checked(run, capsys, words, message):
    with pytest.raises(SystemExit):
        run("launch", *words)
    assert message in capsys.readouterr().err


def test_output_dir_is_a_file(run):
    run.out.write_text("")
    with pytest.raises(BadInput, match="is a file; name a directory"):
        run("launch", "--skip")


def test_output_dir_below_a_file(run, tmp_path):
    Path(tmp_path, "file").write_text("")
    with pytest.raises(BadInput, match="lies below one"):
        run("launch", "--skip", "--output_dir", str(tmp_path / "file" / "out"))


def test_flags_reach_the_commands(run):
    words = "--no_model_save --precision bf16 --eval_splits selection --keep_best aa_wga --checkpoint_freq 5 --label L"
    run("launch", "--skip", "--test_envs_list", "0", "1,2", *words.split())
    test_envs = re.findall(r"--test_envs ([\d ]+) --", "\n".join(run.commands[0]))
    assert sorted(test_envs) == ["0", "1 2"]
    expected = "--skip_model_save --task .* --test_envs"
    for command in run.commands[0]:
        assert re.search(expected, command)
        for words in ("--precision bf16 ", "--eval_splits selection ", "--keep_best aa_wga ", "--label L "):
            assert words in command


FILE = """
datasets = ["Debug28"]
algorithms = ["ERM"]
n_trials = 2
n_hparams = 1
steps = 7
holdout_fraction = 0.5
output_dir = "OUT"
command_launcher = "recorder"
skip_confirmation = true
single_test_envs = false
test_envs_list = [[1, 2], 0]
no_model_save = true
keep_best = "aa_wga"
hparams = { lr = 0.5, b = true }

[[rows]]
algorithm = "IRM"
partition = "group"
label = "by group"
hparams = { lr = 0.1 }
"""


@pytest.fixture
def sweep_file(run, tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(FILE.replace("OUT", str(run.out)))
    return str(path)


def test_sweep_file(run, sweep_file):
    args = sweep.parse(["launch", sweep_file])
    assert args.rows == [SweepRow("IRM", "group", "by group", {"lr": 0.1})]
    assert args.test_envs_list == [[1, 2], [0]]
    assert args.single_test_envs is False

    assert sweep.main(["launch", sweep_file]) == 0
    assert len(run.commands[0]) == 8  # two trials, two rows, two sets of test environments
    group = [command for command in run.commands[0] if "--algorithm IRM" in command]
    assert len(group) == 4
    for text in ("""--hparams '{"b": true, "lr": 0.1}'""", "--label 'by group'", "--partition group", "--steps 7"):
        assert all(f" {text} " in command for command in group)
    assert sum(""" --hparams '{"b": true, "lr": 0.5}' """ in command for command in run.commands[0]) == 4
    assert all(" --skip_model_save " in command for command in run.commands[0])


def test_flags_win_over_the_file(run, sweep_file):
    words = ["--n_trials", "1", "--test_envs_list", "2", "--hparams", '{"c": 1}', "--holdout_fraction", "0.2"]
    args = sweep.parse(["launch", sweep_file, *words])
    assert (args.n_trials, args.test_envs_list, args.hparams, args.steps) == (1, [[2]], '{"c": 1}', 7)
    assert args.holdout_fraction == 0.2  # DomainBed's default, but given
    assert (args.algorithms, len(args.rows)) == (["ERM"], 1)
    args = sweep.parse(["launch", sweep_file, "--algorithms", "IRM"])
    assert (args.algorithms, args.rows) == (["IRM"], [])


def test_rows_alone_are_the_sweep(declared, tmp_path):
    path = tmp_path / "rows.toml"
    path.write_text('output_dir = "o"\n[[rows]]\nalgorithm = "ERM"\n')
    args = sweep.parse(["delete_incomplete", str(path)])
    assert (args.algorithms, args.rows) == ([], [SweepRow("ERM")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset = 'x'", "key not found: dataset; did you mean datasets"),
        ("command = 'launch'", "key not found: command"),
        ("datasets = [", "a.toml:1: "),
        ("[[rows]]\nlabel = 'x'", r"each \[\[rows\]\] must be a table that names an algorithm"),
        ("rows = ['ERM']", r"each \[\[rows\]\] must be a table"),
        (
            "[[rows]]\nalgorithm = 'ERM'\npartion = 'x'",
            "not found: partion; did you mean partition",
        ),
        ("[[rows]]\nalgorithm = 'ERM'\nhparams = '{}'", "hparams of a row must be a table"),
        ("[[rows]]\nalgorithm = 'ERM'\nranges = '{}'", "ranges of a row must be a table"),
        ("[[rows]]\nalgorithm = 'ERM'\ncontrol = 'yes'", "control of a row must be true or false"),
        (
            "[[rows]]\nalgorithm = 'ERM'\non.Debug28.steps = 5",
            r"on.Debug28 of a row must hold tables hparams or ranges",
        ),
        ("n_trials = 1", "--output_dir is required, on the command line or in the sweep file"),
        ("output_dir = 'o'", "--command_launcher is required"),
    ],
)
def test_bad_sweep_files(declared, tmp_path, text, message):
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        sweep.main(["launch", str(path)])


def test_sweep_file_with_a_wrong_type(declared, tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("n_trials = 'three'")
    with pytest.raises(BadInput, match=r"a\.toml:1: n_trials must be a whole number; got 'three'"):
        sweep.main(["launch", str(path)])


def test_missing_sweep_file(declared):
    with pytest.raises(BadInput, match=r"nowhere\.toml"):
        sweep.main(["launch", "nowhere.toml"])


def test_ranges_epochs_controls_and_official_environments_from_a_file(run, tmp_path):
    path = tmp_path / "b.toml"
    path.write_text(
        'epochs = 3\nofficial_test_envs = true\ncontrols = true\nranges = { lr = "10^U(-4, -2)" }\n'
        "seeds = [42, 8]\ncriterion = 'wga'\ninput_dir = 'somewhere'\n"
        "[[rows]]\nalgorithm = 'Newer'\non.Debug28.ranges = { wd = [0.0] }\n"
        "[[rows]]\nalgorithm = 'Newer'\npartition = 'group'\ncontrol = false\n"
    )
    words = ["--datasets", "Debug28", "--n_hparams", "1", "--n_trials", "1", "--skip_confirmation"]
    words += ["--output_dir", str(run.out), "--command_launcher", "recorder"]
    assert sweep.main(["launch", str(path), *words]) == 0
    [commands] = run.commands
    assert all(" --epochs 3 " in command and " --test_envs 1 " in command for command in commands)
    assert sum(""" --ranges '{"lr": "10^U(-4, -2)", "wd": [0.0]}' """ in command for command in commands) == 2
    [control] = [command for command in commands if "--label" in command]
    assert """ --hparams '{"weight": 0.0}' """ in control
    assert " --label 'Newer, control' " in control
    assert len(commands) == 3


@pytest.mark.parametrize(
    ("kept", "typed", "expected"),
    [
        ("epochs = 3", ["--steps", "5"], {"steps": 5, "epochs": None}),
        ("steps = 3", ["--epochs", "5"], {"steps": None, "epochs": 5}),
        ("official_test_envs = true", ["--test_envs_list", "0"], {"official_test_envs": None, "test_envs_list": [[0]]}),
        ("test_envs_list = [[0]]", ["--official_test_envs"], {"official_test_envs": True, "test_envs_list": None}),
    ],
)
def test_a_flag_wins_over_the_files_other_answer(declared, tmp_path, kept, typed, expected):
    path = tmp_path / "a.toml"
    path.write_text(kept)
    args = vars(sweep.parse(["launch", str(path), "--output_dir", "o", "--command_launcher", "local", *typed]))
    assert {key: args[key] for key in expected} == expected


def checkpoint(score, **args):
    """A record of Newer on Debug28, tested on environment 1."""
    measured = {f"env{env}_{split}_{metric}": score for env in range(3) for split in ("in", "out")
                for metric in ("acc", "wga", "g0_acc")}  # fmt: skip
    counts = {f"env{env}_{split}_g0_n": 5 for env in range(3) for split in ("in", "out")}
    args = {"algorithm": "Newer", "dataset": "Debug28", "test_envs": [1], "trial_seed": 0, "hparams_seed": 0, **args}
    return {"step": 30, "hparams": {"lr": score, "weight": 1.0}, "args": {"seed": 5, **args}, **measured, **counts}


@pytest.fixture
def searched(tmp_path):
    """A search of two draws, the second one better and unfinished."""
    for draw, score in ((1, 0.25), (2, 0.5)):
        directory = tmp_path / "search" / str(draw)
        directory.mkdir(parents=True)
        (directory / "results.jsonl").write_text(json.dumps(checkpoint(score, hparams_seed=draw)) + "\n")
    run_directory.mark_done(tmp_path / "search" / "1")
    return str(tmp_path / "search")


@pytest.fixture
def refit(run):
    def refit(*words, seeds=("42", "8")):
        place = ["--output_dir", str(run.out), "--command_launcher", "recorder", "--skip_confirmation"]
        return sweep.main(["refit", *words, "--seeds", *seeds, *place])

    return refit


def test_refit(run, refit, searched, capsys, caplog):
    assert refit("--input_dir", searched, "--controls", "--steps", "9", "--no_model_save") == 0
    out = capsys.readouterr().out
    where = "Debug28, test_envs [1]: 0.5000 (trial_seed 0, hparams_seed 2, step 30)\n"
    assert out.startswith(f"Chosen by aa_wga: Newer, {where}Chosen by aa_wga: Newer, control, {where}")
    assert "4 jobs: 0 done, 0 incomplete, 4 not launched.\nAbout to launch 4 jobs.\n" in out
    assert "1 runs in" in caplog.text
    assert "are not finished" in caplog.text
    [commands] = run.commands
    for seed in (42, 8):
        for name, weight in (("Newer", "1.0"), ("'Newer, control'", "0.0")):
            hparams = f"""--hparams '{{"lr": 0.5, "weight": {weight}}}' --hparams_seed 0 --label {name} """
            rest = f"--seed {seed} --skip_model_save --steps 9 --test_envs 1 --trial_seed 0"
            assert sum(hparams in command and rest in command for command in commands) == 1


def test_refit_again_starts_only_what_is_missing(run, refit, searched, capsys):
    refit("--input_dir", searched)
    for directory in begin(run.commands[0]):
        run_directory.mark_done(directory)
    refit("--input_dir", searched, seeds=("42", "8", "777"))
    assert "3 jobs: 2 done, 0 incomplete, 1 not launched.\n" in capsys.readouterr().out


def test_refit_from_the_file_of_the_search(run, searched, tmp_path):
    """What only describes the search is passed over; what says how to train, and whom, is not."""
    path = tmp_path / "a.toml"
    path.write_text(
        f"input_dir = '{searched}'\nseeds = [42, 8]\ncriterion = 'wga'\ndatasets = ['Debug28']\nlabel = 'L'\n"
        "hparams = { lr = 9.0 }\nranges = { lr = 'U(0, 1)' }\nn_hparams = 99\nepochs = 4\nofficial_test_envs = true\n"
        "[[rows]]\nalgorithm = 'Newer'\n"
    )
    words = ["--output_dir", str(run.out), "--command_launcher", "recorder", "--skip_confirmation"]
    assert sweep.main(["refit", str(path), *words]) == 0
    [commands] = run.commands
    assert len(commands) == 2
    for command in commands:
        assert """ --epochs 4 --hparams '{"lr": 0.5, "weight": 1.0}' --hparams_seed 0 --label Newer """ in command
        assert "--ranges" not in command
    words += ["--algorithms", "IRM"]
    with pytest.raises(BadInput, match="no records of these datasets and algorithms"):
        sweep.main(["refit", str(path), *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--input_dir is required"),
        (["--input_dir", "nowhere"], "--input_dir nowhere is no directory"),
        (["--input_dir", "OUT"], "holds the search; name another one"),
        (["--input_dir", "EMPTY"], "holds no records"),
        (["--input_dir", "SEARCH", "--hparams", "{}"], "--hparams means nothing to refit"),
        (["--input_dir", "SEARCH", "--label", "L"], "--label means nothing to refit"),
        (["--input_dir", "SEARCH", "--datasets", "Four"], "no records of these datasets"),
        (["--input_dir", "SEARCH", "--steps", "1", "--epochs", "1"], "--steps and --epochs exclude each other"),
    ],
)
def test_what_refit_refuses(run, refit, searched, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    places = {"OUT": str(run.out) + "/.", "EMPTY": str(tmp_path / "empty"), "SEARCH": searched}
    with pytest.raises(BadInput, match=message):
        refit(*(places.get(word, word) for word in words))
    assert not run.out.exists()


@pytest.mark.parametrize("words", [["--seeds", "42", "8"], ["--input_dir", "D"]])
def test_launch_refuses_what_only_refit_reads(words):
    with pytest.raises(BadInput, match=f"{words[0]} is for refit; launch does not read it"):
        sweep.main(["launch", "--output_dir", "o", "--command_launcher", "dummy", *words])


def test_refit_needs_groups(refit, searched):
    path = Path(searched, "1", "results.jsonl")
    Path(searched, "2", "results.jsonl").unlink()
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if "_g" not in k and "wga" not in k})
    )
    with pytest.raises(BadInput, match="none of 1 records has what aa_wga goes by"):
        refit("--input_dir", searched)
