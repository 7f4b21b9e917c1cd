"""Jobs against DomainBed's rules written out by hand, and their states on disk."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from domainbed import claims, jobs, messages, registry, run_directory, states
from domainbed.jobs import Job, make_args_list, make_jobs
from domainbed.scripts import train_arguments
from domainbed.sweep_rows import SweepRow

GOLDEN = [  # arguments of make_args_list, what DomainBed hashes for the seed and the directory, the command's flags
    (
        {"data_dir": "./data"},
        "('Debug28', 'ERM', [0], 0, 0)",
        '{"algorithm": "ERM", "data_dir": "./data", "dataset": "Debug28", "holdout_fraction": 0.2, "hparams_seed": 0, '
        '"seed": SEED, "task": "domain_generalization", "test_envs": [0], "trial_seed": 0}',
        "--algorithm ERM --data_dir ./data --dataset Debug28 --holdout_fraction 0.2 --hparams_seed 0 "
        "--output_dir out/HASH --seed SEED --task domain_generalization --test_envs 0 --trial_seed 0",
    ),
    (
        {"data_dir": "/a b", "hparams": '{"lr": 0.1}', "steps": 5, "envs": [[1, 2]], "hparams_seed": 3},
        "('Debug28', 'ERM', [1, 2], 3, 0)",
        '{"algorithm": "ERM", "data_dir": "/a b", "dataset": "Debug28", "holdout_fraction": 0.2, '
        '"hparams": "{\\"lr\\": 0.1}", "hparams_seed": 3, "seed": SEED, "steps": 5, '
        '"task": "domain_generalization", "test_envs": [1, 2], "trial_seed": 0}',
        "--algorithm ERM --data_dir '/a b' --dataset Debug28 --holdout_fraction 0.2 --hparams '{\"lr\": 0.1}' "
        "--hparams_seed 3 --output_dir out/HASH --seed SEED --steps 5 --task domain_generalization --test_envs 1 2 "
        "--trial_seed 0",
    ),
    (
        {"algorithms": ["IRM:random"], "label": "mixed", "skip_model_save": True},
        "('Debug28', 'IRM', [0], 0, 0)",
        '{"algorithm": "IRM", "dataset": "Debug28", "holdout_fraction": 0.2, "hparams_seed": 0, "label": "mixed", '
        '"partition": "random", "seed": SEED, "skip_model_save": true, "task": "domain_generalization", '
        '"test_envs": [0], "trial_seed": 0}',
        "--algorithm IRM --dataset Debug28 --holdout_fraction 0.2 --hparams_seed 0 --label mixed "
        "--output_dir out/HASH --partition random --seed SEED --skip_model_save --task domain_generalization "
        "--test_envs 0 --trial_seed 0",
    ),
]


@pytest.fixture(autouse=True)
def declared(monkeypatch):
    """Some algorithms and datasets, in place of those that the package happens to have."""
    facts = {
        "algorithms": {
            "ERM": {},
            "IRM": {},
            "Mixer": {"PARTITION": "random"},
            "Pairs": {"MIN_PARTS": 2},
            "Seer": {"NEEDS_CONFOUNDERS": True},
            "Guided": {"NEEDS_MASKS": True},
            "Penal": {"CONTROL": {"weight": 0.0}},
        },
        "datasets": {
            "Debug28": {"ENVIRONMENTS": ("0", "1", "2"), "CONFOUNDERS": ("even", "odd")},
            "Four": {"ENVIRONMENTS": ["a", "b", "c", "d"], "NEEDS_DATA_DIR": True},
            "One": {"ENVIRONMENTS": ("a",), "NEEDS_DATA_DIR": True},
            "Two": {"ENVIRONMENTS": ("a", "b"), "NEEDS_DATA_DIR": True},
            "Old": {"ENVIRONMENTS": ("a", "b", "c"), "TEST_ENVS": (0,), "NEEDS_DATA_DIR": True},
            "Masked": {"ENVIRONMENTS": ("a", "b", "c"), "HAS_MASKS": True},
            "Own": {"ENVIRONMENTS": ("a", "b", "c"), "TEST_ENVS": (2,)},
            "Official": {"ENVIRONMENTS": ("a", "b", "c", "d"), "VALIDATION_ENVS": (2,), "TEST_ENVS": (3,)},
        },
    }

    def attribute(package, name, attribute, default=None):
        if name not in facts[package]:
            raise NotImplementedError(messages.not_found(package[:-1], name, facts[package]))
        return facts[package][name].get(attribute, default)

    monkeypatch.setattr(registry, "attribute", attribute)
    monkeypatch.setattr(registry, "order", lambda package: ("Debug28", "Four", "Two", "Old"))


def grid(datasets=("Debug28",), algorithms=("ERM",), data_dir=None, hparams=None, steps=None, single=True, **extras):
    return make_args_list(
        1, datasets, algorithms, 0, 1, steps, data_dir, "domain_generalization", 0.2, single, hparams, **extras
    )


@pytest.mark.parametrize(("given", "seeded", "hashed", "flags"), GOLDEN, ids=["plain", "overrides", "own"])
def test_directory_seed_and_command_are_domainbeds(given, seeded, hashed, flags):
    given = {"algorithms": ["ERM"], "data_dir": None, "hparams": None, "steps": None, "envs": [[0]], **given}
    first = given.pop("hparams_seed", 0)
    seed = str(int(hashlib.md5(seeded.encode()).hexdigest(), 16) % 2**31)
    name = hashlib.md5(hashed.replace("SEED", seed).encode()).hexdigest()

    [args] = make_args_list(
        1, ["Debug28"], given.pop("algorithms"), first, first + 1, given.pop("steps"), given.pop("data_dir"),
        "domain_generalization", 0.2, False, given.pop("hparams"), test_envs_list=given.pop("envs"), **given,
    )  # fmt: skip
    job = Job(args, "out")

    assert job.output_dir == f"out/{name}"
    expected = flags.replace("SEED", seed).replace("HASH", name)
    assert job.command_str == f"python -m domainbed.scripts.train {expected}"
    assert job.train_args == {**json.loads(hashed.replace("SEED", seed)), "output_dir": f"out/{name}"}


def test_directory_name_as_recorded():
    [args] = grid(data_dir="./data", test_envs_list=[[0]])
    assert args["seed"] == 896409087
    assert jobs.directory_name(args) == "ede83378d19c67447f2f010c4efa6f08"


def test_order_is_trial_dataset_row_environments_hparams():
    args_list = make_args_list(
        2, ["Debug28", "Own"], ["ERM", "IRM"], 1, 3, None, None, "domain_generalization", 0.2, True, None
    )
    found = [(a["trial_seed"], a["dataset"], a["algorithm"], a["test_envs"], a["hparams_seed"]) for a in args_list]
    assert found[:8] == [
        (0, "Debug28", "ERM", [0], 1), (0, "Debug28", "ERM", [0], 2), (0, "Debug28", "ERM", [1], 1),
        (0, "Debug28", "ERM", [1], 2), (0, "Debug28", "ERM", [2], 1), (0, "Debug28", "ERM", [2], 2),
        (0, "Debug28", "IRM", [0], 1), (0, "Debug28", "IRM", [0], 2),
    ]  # fmt: skip
    assert [entry[0] for entry in found] == [0] * 16 + [1] * 16


def test_pairs_of_test_environments():
    assert jobs.all_test_env_combinations(3) == [[0], [0, 1], [0, 2], [1], [1, 2], [2]]
    args_list = grid(["Four"], data_dir="d", single=False)
    assert len(args_list) == 4 + 6  # every environment alone, and every pair


def test_two_environments_have_no_pairs(caplog):
    with pytest.raises(ValueError, match=r"at least 3 environments, got 2; pass --single_test_envs"):
        jobs.all_test_env_combinations(2)
    assert [args["test_envs"] for args in grid(["Two"], data_dir="d")] == [[0], [1]]
    assert not caplog.messages
    assert grid(["Two"], data_dir="d", single=False) == grid(["Two"], data_dir="d")
    assert caplog.messages == ["Two: pairs of test environments would leave none to train on; single ones only"]


def test_one_environment_is_too_few():
    with pytest.raises(ValueError, match="One has one environment, so that none is left to train on"):
        grid(["One"], data_dir="d")


def test_the_unlabelled_share_is_an_argument_only_where_it_is_given():
    [args] = grid(test_envs_list=[[0]])
    assert "uda_holdout_fraction" not in args
    [given] = grid(test_envs_list=[[0]], uda_holdout_fraction=0.5)
    assert given == args | {"uda_holdout_fraction": 0.5}


def test_official_test_environments_only_where_domainbed_lacks_the_dataset():
    assert [args["test_envs"] for args in grid(["Own"], single=False)] == [[2]]
    assert [args["test_envs"] for args in grid(["Old"], data_dir="d")] == [[0], [1], [2]]
    assert [args["test_envs"] for args in grid(["Own"], test_envs_list=[[0], [1, 2]])] == [[0], [1, 2]]


def test_official_test_environments_on_demand():
    args_list = grid(["Old", "Own", "Debug28"], data_dir="d", official_test_envs=True)
    assert [(a["dataset"], a["test_envs"]) for a in args_list] == [
        ("Old", [0]), ("Own", [2]), ("Debug28", [0]), ("Debug28", [1]), ("Debug28", [2]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"official_test_envs": True, "test_envs_list": [[0]]}, "--test_envs_list and --official_test_envs exclude"),
        ({"steps": 5, "epochs": 2}, "--steps and --epochs exclude"),
    ],
)
def test_two_answers_to_one_question(given, message):
    with pytest.raises(ValueError, match=message):
        grid(**given)


@pytest.mark.parametrize("envs", [[3], [-1], [0, 0], [], [0, 1, 2]])
def test_impossible_test_environments(envs):
    with pytest.raises(ValueError, match=r"Debug28: test environments .* of 0 to 2"):
        grid(test_envs_list=[envs])


@pytest.mark.parametrize("envs", [[0], [2, 3], [2]])
def test_official_splits_are_neither_trained_nor_tested_on_by_mistake(envs):
    assert [args["test_envs"] for args in grid(["Official"], test_envs_list=[[3], [0, 3]])] == [[3], [0, 3]]
    with pytest.raises(ValueError, match=r"Official: .* the official test set \[3\] and none of .* set \[2\]"):
        grid(["Official"], test_envs_list=[envs])


def test_jobs_that_leave_too_little_to_compare_are_left_out(caplog):
    args_list = grid(algorithms=["ERM", "Pairs", "Pairs:group"], single=False)
    found = {row: [a["test_envs"] for a in args_list if (a["algorithm"], a.get("partition")) == row]
             for row in (("ERM", None), ("Pairs", None), ("Pairs", "group"))}  # fmt: skip
    everything = [[0], [0, 1], [0, 2], [1], [1, 2], [2]]
    assert found == {("ERM", None): everything, ("Pairs", None): [[0], [1], [2]], ("Pairs", "group"): everything}
    assert "left out: Pairs on Debug28, test environments [0, 1], which leaves 1 of 2 to train on" in caplog.text


def test_own_partition_spelled_out_is_the_same_job():
    assert grid(algorithms=["ERM:environment", "Mixer:random"]) == grid(algorithms=["ERM", "Mixer"])
    assert grid(algorithms=["Mixer:environment"])[0]["partition"] == "environment"


def test_rows_share_the_seed():
    rows = [SweepRow("ERM", label="b", hparams={"x": 1}), SweepRow("ERM", partition="group")]
    args_list = grid(rows=rows, test_envs_list=[[0]], label="a")
    assert [args.get("label") for args in args_list] == ["a", "b", "a"]
    assert [args.get("partition") for args in args_list] == [None, None, "group"]
    assert len({args["seed"] for args in args_list}) == 1


@pytest.mark.parametrize("hparams", ["{lr: 1}", "[1]", "3"])
def test_hparams_that_are_no_object(hparams):
    with pytest.raises(ValueError, match="JSON"):
        grid(hparams=hparams)


def test_unknown_names_are_explained():
    with pytest.raises(NotImplementedError, match="dataset not found: Debug82; did you mean Debug28"):
        grid(["Debug82"])
    with pytest.raises(NotImplementedError, match="algorithm not found: ERN; did you mean ERM"):
        grid(algorithms=["ERN:random"])
    with pytest.raises(NotImplementedError, match="partition not found: groups; did you mean group"):
        grid(algorithms=["ERM:groups"])
    with pytest.raises(TypeError, match="unknown arguments: lable; known: label"):
        grid(lable="a")


def test_data_dir_only_left_out_where_nothing_is_read():
    with pytest.raises(ValueError, match="--data_dir is required: Four read"):
        grid(["Debug28", "Four"])
    assert "data_dir" not in grid(["Debug28"])[0]


def test_extras_only_where_given():
    plain = grid()
    given = {"precision": "bf16", "checkpoint_freq": 5, "eval_splits": "selection", "keep_best": "aa_wga"}
    assert grid(**given) == [args | given for args in plain]
    assert grid(**dict.fromkeys(given), skip_model_save=False) == plain
    assert grid(epochs=3, ranges='{"lr": "U(0, 1)"}') == [
        a | {"epochs": 3, "ranges": '{"lr": "U(0, 1)"}'} for a in plain
    ]


def test_ranges_reach_the_command_and_those_of_rows_lie_over_the_sweeps(tmp_path):
    row = SweepRow("IRM", ranges={"lr": [1, 2]})
    erm, irm = make_jobs(grid(rows=[row], test_envs_list=[[0]], ranges='{"lr":"U(0, 1)","x":"U(1, 2)"}'), str(tmp_path))
    assert """ --ranges '{"lr":"U(0, 1)","x":"U(1, 2)"}' """ in erm.command_str  # as typed
    assert """ --ranges '{"lr": [1, 2], "x": "U(1, 2)"}' """ in irm.command_str


def test_ranges_are_checked_before_anything_is_launched():
    with pytest.raises(ValueError, match="range of lr"):
        grid(ranges='{"lr": "10^N(0, 1)"}')
    with pytest.raises(ValueError, match="ranges are a JSON object"):
        grid(ranges="[1]")
    with pytest.raises(ValueError, match="range of lr"):
        grid(rows=[SweepRow("IRM", ranges={"lr": "U(1)"})])


def test_a_row_may_differ_on_a_dataset():
    row = SweepRow("IRM", hparams={"a": 1, "b": 1}, on={"Own": {"hparams": {"b": 2}, "ranges": {"c": "U(0, 1)"}}})
    first, second = grid(["Debug28", "Own"], [], rows=[row], test_envs_list=[[0]])
    assert (json.loads(first["hparams"]), first.get("ranges")) == ({"a": 1, "b": 1}, None)
    assert (json.loads(second["hparams"]), second["ranges"]) == ({"a": 1, "b": 2}, '{"c": "U(0, 1)"}')


def test_a_control_is_its_row_with_the_penalty_off():
    """Equal seeds, draws and splits, so that nothing else tells the two apart."""
    row = SweepRow("Penal", "group", hparams={"x": 1})
    ranges = '{"z": "U(0, 1)"}'
    method, control = grid(
        algorithms=[], hparams='{"y": 2}', rows=[row], test_envs_list=[[2]], controls=True, ranges=ranges
    )
    assert control.pop("label") == "Penal:group, control"
    assert json.loads(control.pop("hparams")) == {**json.loads(method.pop("hparams")), "weight": 0.0}
    assert control == method
    seed = int(hashlib.md5(b"('Debug28', 'Penal', [2], 0, 0)").hexdigest(), 16) % 2**31
    assert (control["seed"], control["hparams_seed"], control["trial_seed"]) == (seed, 0, 0)


def test_controls_follow_their_rows_and_leave_the_others_alone():
    plain = grid(algorithms=["ERM", "Penal", "IRM"], test_envs_list=[[0]])
    with_them = grid(algorithms=["ERM", "Penal", "IRM"], test_envs_list=[[0]], controls=True)
    assert [a.get("label") for a in with_them] == [None, None, "Penal, control", None]
    assert with_them[:2] + with_them[3:] == plain


def test_every_row_at_every_budget(tmp_path):
    """A full budget is no argument, so that its jobs are those of a sweep without budgets."""
    [plain] = grid(test_envs_list=[[0]])
    found = grid(test_envs_list=[[0]], budgets=[(0.0, 0.0), (0.05, 1.0), (1.0, 0.2), (1.0, 1.0)])
    assert found == [
        plain | {"annotation_budget": 0.0, "validation_budget": 0.0}, plain | {"annotation_budget": 0.05},
        plain | {"validation_budget": 0.2}, plain,
    ]  # fmt: skip
    assert len({job.name for job in make_jobs(found, str(tmp_path))}) == 4
    single = grid(test_envs_list=[[0]], annotation_budget=0.05)
    assert jobs.directory_name(single[0]) == jobs.directory_name(found[1])


def test_a_row_s_own_budgets_and_confounders():
    rows = [SweepRow("IRM", budgets=[(0.5, 0.5)]), SweepRow("Seer", confounders=["inferred:errors"])]
    found = grid(rows=rows, test_envs_list=[[0]], budgets=[(0.0, 1.0), (1.0, 1.0)])
    keys = ("algorithm", "annotation_budget", "validation_budget", "confounders")
    assert [tuple(args.get(key) for key in keys) for args in found] == [
        ("ERM", 0.0, None, None), ("ERM", None, None, None), ("IRM", 0.5, 0.5, None),
        ("Seer", 0.0, None, ["inferred:errors"]), ("Seer", None, None, ["inferred:errors"]),
    ]  # fmt: skip


def test_a_control_has_the_budgets_of_its_row():
    found = grid(algorithms=["Penal"], test_envs_list=[[0]], controls=True, budgets=[(0.0, 0.0), (1.0, 1.0)])
    assert [(args.get("label"), args.get("annotation_budget")) for args in found] == [
        (None, 0.0), (None, None), ("Penal, control", 0.0), ("Penal, control", None),
    ]  # fmt: skip


@pytest.mark.parametrize("flag", ["annotation_budget", "validation_budget"])
@pytest.mark.parametrize("given", [{"budgets": [(1.0, 1.0)]}, {"rows": [SweepRow("IRM", budgets=[(0.0, 1.0)])]}])
def test_budgets_of_a_sweep_or_a_row_beside_one_for_all(flag, given):
    """Where a row's full budget is no argument, the one for all would take its place."""
    with pytest.raises(ValueError, match=f"--budgets and --{flag} exclude each other"):
        grid(**given, **{flag: 0.5})


def test_a_budget_twice_is_the_same_run(tmp_path):
    with pytest.raises(ValueError, match="two jobs are the same run"):
        make_jobs(grid(budgets=[(0.0, 0.0), (0.0, 0.0)]), str(tmp_path))


def test_commands_with_budgets_and_confounders_are_what_train_takes(tmp_path):
    rows = [SweepRow("IRM", confounders=["inferred:george"], budgets=[(0.05, 0.0), (1.0, 1.0), (1e-05, 0.5)])]
    found = make_jobs(grid(algorithms=[], rows=rows, test_envs_list=[[0]]), str(tmp_path))
    for job, budgets in zip(found, [(0.05, 0), (1, 1), (1e-05, 0.5)], strict=True):
        _, module, script, *words = shlex.split(job.command_str)
        assert (module, script) == ("-m", "domainbed.scripts.train")
        args = train_arguments.parser().parse_args(words)
        assert (args.annotation_budget, args.validation_budget) == budgets
        assert args.confounders == ["inferred:george"]


def test_same_run_twice(tmp_path):
    with pytest.raises(ValueError, match=r"two jobs are the same run: .*'ERM', \[0\]"):
        make_jobs(grid(algorithms=["ERM", "ERM:environment"]), str(tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.fixture
def three(tmp_path):
    """A done, an incomplete and a new job."""
    args_list = grid()
    done, incomplete, _ = (Path(job.output_dir) for job in make_jobs(args_list, str(tmp_path)))
    done.mkdir()
    run_directory.mark_done(done)
    incomplete.mkdir()
    return make_jobs(args_list, str(tmp_path))


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


def test_states(three, held):
    assert [job.state for job in three] == [Job.DONE, Job.INCOMPLETE, Job.NOT_LAUNCHED]
    assert str(three[1]) == f"Incomplete: {three[1].output_dir} ('Debug28', 'ERM', [1], 0)"
    held(three[1].output_dir)
    assert [job.status.state for job in three] == ["done", "queued", "queued"]  # as found when they were made
    again = [Job(args, os.path.dirname(three[0].output_dir)) for args in grid()]  # one by one, as others do
    assert [job.status.state for job in again] == ["done", "running", "queued"]
    assert [job.state for job in again] == [job.state for job in three]


def test_failed_and_preempted(three):
    for job in three[1:]:
        os.makedirs(job.output_dir, exist_ok=True)
        Path(job.output_dir, "results.jsonl").write_text("{}")
    states.write_failure(three[1].output_dir, "ValueError: no", 1)
    again = make_jobs(grid(), os.path.dirname(three[0].output_dir))
    assert [job.status.state for job in again] == ["done", "failed", "preempted"]
    assert [job.state for job in again] == [Job.DONE, Job.INCOMPLETE, Job.INCOMPLETE]
    assert again[1].last_error() == "ValueError: no"


def test_row_shows_in_the_listing(tmp_path):
    [job] = make_jobs(grid(algorithms=["ERM:group"], label="mine", test_envs_list=[[0]]), str(tmp_path))
    assert str(job).endswith("('Debug28', 'ERM', [0], 0, 'group', 'mine')")


def test_arguments_are_copied(tmp_path):
    [args] = grid(test_envs_list=[[0]])
    job = Job(args, str(tmp_path))
    args["test_envs"].append(1)
    assert job.train_args["test_envs"] == [0]


def test_launch_makes_no_directories_and_sorts_outcomes(tmp_path, capsys):
    five = make_jobs(grid(algorithms=["ERM", "IRM"])[:5], str(tmp_path))
    seen = []

    def launcher(commands):
        seen.extend(commands)
        assert os.listdir(tmp_path) == []
        for job in (five[0], five[4]):
            os.makedirs(job.output_dir)
        run_directory.mark_done(five[0].output_dir)
        states.write_failure(five[4].output_dir, "ValueError: no", 1)
        codes = dict(zip([job.command_str for job in five], [0, 3, claims.EXIT_LOCKED, 75, 0], strict=True))
        return [codes[command] for command in commands]

    outcome = Job.launch(five, launcher)

    assert sorted(seen) == sorted(job.command_str for job in five)
    assert [set(jobs) for jobs in outcome] == [{five[0]}, {five[1], five[4]}, {five[2]}, {five[3]}]
    assert capsys.readouterr().out == "Launching...\nLaunched 5 jobs!\n"


def test_command_may_be_changed(three):
    three[0].command_str += " --more"
    assert three[0].command_str.endswith(" --more")


@pytest.mark.parametrize("answer", [None, 0, ["submitted"] * 3, []])
def test_launcher_without_exit_codes(three, answer):
    assert Job.launch(three, lambda commands: answer) is None


def test_launch_shuffles_a_copy(tmp_path):
    many = [Job({"algorithm": str(i)}, str(tmp_path)) for i in range(100)]
    before, seen = list(many), []
    Job.launch(many, seen.extend)
    assert many == before
    assert seen != [job.command_str for job in many]  # equal once in 100! times


def test_last_error(tmp_path):
    job = Job({"algorithm": "ERM"}, str(tmp_path))
    assert job.last_error() == "(err.txt says nothing)"
    os.makedirs(job.output_dir)
    Path(job.output_dir, "err.txt").write_bytes(b"Traceback\nValueError: \xff no\n\n")
    assert job.last_error() == "ValueError: \ufffd no"
    Path(job.output_dir, "err.txt").write_text(
        "Traceback\ndomainbed.scripts.BadInput: a.csv: 2 bad rows\n  line 3: no\n"
    )
    assert job.last_error() == "a.csv: 2 bad rows"
    Path(job.output_dir, "err.txt").write_text("killed\n")
    assert job.last_error() == "killed"


def test_delete_spares_what_runs_or_is_done(three, held, capsys):
    held(three[1].output_dir)
    assert Job.delete(three[:2]) == 0
    assert all(os.path.isdir(job.output_dir) for job in three[:2])

    os.makedirs(three[2].output_dir)
    assert Job.delete([three[2]]) == 1
    assert not os.path.exists(three[2].output_dir)
    assert Job.delete([three[2]]) == 0  # somebody else was faster
    assert "Deleted 1 jobs!\n" in capsys.readouterr().out


def test_rows_that_need_masks_are_left_out_where_there_are_none(caplog):
    assert [args["dataset"] for args in grid(["Own", "Masked"], ["Guided"], test_envs_list=[[0]])] == ["Masked"]
    assert "left out: Guided on Own, which has no masks" in caplog.text
    assert len(grid(["Own", "Masked"], ["Guided"], test_envs_list=[[0]], mask_dir="masks")) == 2


@pytest.mark.parametrize("algorithm", ["Seer", "ERM:group", "ERM:confounder"])
def test_rows_that_need_a_confounder_are_left_out_where_there_is_none(algorithm, caplog):
    assert len(grid(["Debug28", "Own"], [algorithm])) == 3
    assert f"left out: {algorithm.partition(':')[0]} on Own, which knows no confounder" in caplog.text
    assert len(grid(["Own"], [algorithm], confounders=["sex"])) == 1


def test_partitions_by_confounder_are_those_of_partitions() -> None:
    from domainbed import partitions

    assert jobs.BY_CONFOUNDER == partitions.BY_CONFOUNDER
