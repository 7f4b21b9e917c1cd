"""Sweep files: where their keys stand, and that what is wrong is said with its line."""

import functools
import tomllib
from pathlib import Path

import pytest

from domainbed.scripts import sweep_arguments
from domainbed.scripts.sweep_file import read_sweep_file
from domainbed.scripts.toml_lines import key_lines, syntax_error
from domainbed.sweep_rows import SweepRow

SWEEPS = Path(__file__).parents[2] / "sweeps"


def read(tmp_path, text):
    path = tmp_path / "a.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_sweep_file(str(path), sweep_arguments.make_parser(), left_out=["skip_confirmation"])


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_place_has_its_line(newline):
    text = '''# comment, not = 1
a = """
b = 1
[[rows]]
"""
'b c'."d" = [
  [1, 2],  # ] =
  "]",
]

[[rows]]
x = 1
on.D.ranges = { y = 1, z = { w = 2 } }
[rows.hparams]
x = 2
[[rows]]
  [[rows.inner]]
  x = 3
  [[rows.inner]]
  x = 4
[last . "table"] # [x]
'''
    assert tomllib.loads(text)["rows"][1]["inner"][1] == {"x": 4}
    row, inner = ("rows", 1), ("rows", 1, "inner")
    assert key_lines(text.replace("\n", newline)) == {
        ("a",): 2,
        **dict.fromkeys([("b c",), ("b c", "d"), ("b c", "d", 0), ("b c", "d", 0, 0), ("b c", "d", 0, 1)], 6),
        ("b c", "d", 1): 6,
        **{("rows",): 11, ("rows", 0): 11, ("rows", 0, "x"): 12},
        **{("rows", 0, "on", *rest): 13 for rest in ((), ("D",), ("D", "ranges"), ("D", "ranges", "y"))},
        **{("rows", 0, "on", "D", "ranges", "z", *rest): 13 for rest in ((), ("w",))},
        **{("rows", 0, "hparams"): 14, ("rows", 0, "hparams", "x"): 15},
        **{row: 16, inner: 17, (*inner, 0): 17, (*inner, 0, "x"): 18, (*inner, 1): 19, (*inner, 1, "x"): 20},
        **{("last",): 21, ("last", "table"): 21},
    }


def places(value, path=()):
    yield path
    for key, inside in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(inside, (*path, key))


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.toml")), ids=lambda path: path.stem)
def test_lines_of_our_own_files(path):
    text = path.read_text()
    lines, written = key_lines(text), text.splitlines()
    assert set(lines) == set(places(tomllib.loads(text))) - {()}
    for place, line in lines.items():
        name = next(key for key in reversed(place) if isinstance(key, str))
        element = functools.reduce(lambda value, key: value[key], place, tomllib.loads(text))
        assert name in written[line - 1] or (isinstance(place[-1], int) and str(element) in written[line - 1])


@pytest.mark.parametrize(
    ("text", "line"),
    [("a = 1\nb =\n", 2), ("a = 1\na = 2\nb = 3", 2), ("[x]\n\n[x]\n", 3), ("a = 1\nb = [\n1,\n\n", 3)],
)
def test_lines_of_what_is_no_toml(text, line):
    with pytest.raises(tomllib.TOMLDecodeError) as error:
        tomllib.loads(text)
    found, message = syntax_error(text, error.value)
    assert found == line
    assert "(at" not in message


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("n_trials = 1\ndatasets = [", 2, "Invalid value"),
        (b"# \xe4\n", 1, "not UTF-8"),
        ("\n\ndataset = 'x'", 3, "key not found: dataset; did you mean datasets"),
        ("help = true", 1, "key not found: help"),
        ("steps = 1\nskip_confirmation = true", 2, "key not found: skip_confirmation"),
        ("steps = 5\n\nn_trials = 'three'", 3, "n_trials must be a whole number; got 'three'"),
        ("n_trials = '3'", 1, "n_trials must be a whole number; got '3'"),
        ("n_trials = true", 1, "n_trials must be a whole number; got true"),
        ("n_trials = [1]", 1, "n_trials must be a whole number; got [1]"),
        ("steps = 1.5", 1, "steps must be a whole number; got 1.5"),
        ("epochs = 0", 1, "epochs: 0 is below 1"),
        ("holdout_fraction = '.2'", 1, "holdout_fraction must be a number; got '.2'"),
        ("\nsingle_test_envs = 'yes'", 2, "single_test_envs must be true or false; got 'yes'"),
        ("label = 5", 1, "label must be a text in quotes; got 5"),
        ("slurm_time = 01:00:00", 1, "slurm_time must be a text in quotes; got datetime.time(1, 0)"),
        ("task = 'dg'", 1, "task is 'dg'; allowed: domain_generalization, domain_adaptation"),
        ("datasets = { a = 1 }", 1, "datasets must be a text in quotes; got {'a': 1}"),
        ("seeds = [\n1,\n'x']", 3, "seeds must be a whole number; got 'x'"),
        ("seeds = []", 1, "seeds is empty"),
        ("steps = 1\nhparams = '{lr'", 2, "hparams are a JSON object"),
        ("hparams = 5", 1, "hparams must be a text in quotes; got 5"),
        ("[hparams]\nlr = 1\nwd = 01:00:00", 3, "wd must be a number, text, true, false, or a list; got 01:00:00"),
        ("ranges = '{\"lr\": 5}'", 1, "range of lr is 5"),
        ("[ranges]\nlr = 'U(0, 1)'\nwd = 'N(0, 1)'", 3, "range of wd is"),
        ("datasets = [\n'Debug28',  # 'Debug29'\n'Debug29'\n]", 3, "dataset not found: Debug29; did you mean Debug28"),
        ("n_trials = 1\ndatasets = ['Debug28', 'Debug28']", 2, "dataset Debug28 is named twice"),
        ("algorithms = ['ERM', 'ERN']", 1, "algorithm not found: ERN; did you mean ERM"),
        ("algorithms = ['ERM:grup']", 1, "partition not found: grup; did you mean group"),
        ("algorithms = ['ERM', 'ERM:environment']", 1, "ERM is the same row as in line 1"),
        (
            "datasets = ['Debug28']\ntest_envs_list = [0, [1, 3]]",
            2,
            "Debug28: test environments [1, 3] are not possible",
        ),
        ("test_envs_list = [0, '1;2']", 1, "test_envs_list: '1;2' is no list of environments such as 0 or 1,2"),
        ("test_envs_list = [[0, true]]", 1, "test_envs_list: '0,True' is no list of environments"),
        ("steps = 1\n\nepochs = 2", 3, "epochs and steps (line 1) exclude each other"),
        (
            "official_test_envs = true\ntest_envs_list = [0]",
            1,
            "official_test_envs and test_envs_list (line 2) exclude",
        ),
        ("n_trials = 1\nbudgets = [\n0,\n2]", 4, "budgets: '2' is no share from 0 to 1, nor two: training,validation"),
        ("budgets = [[0, 1], [0, 1, 1]]", 1, "budgets: '0,1,1' is no share from 0 to 1, nor two"),
        ("budgets = [true]", 1, "budgets must be a share, or a list of two: training, validation; got true"),
        ("budgets = []", 1, "budgets is empty"),
        ("budgets = 0.5\nannotation_budget = 1", 2, "annotation_budget and budgets (line 1) exclude each other"),
        ("validation_budget = 1\nbudgets = [0.5]", 1, "validation_budget and budgets (line 2) exclude each other"),
        ("rows = ['ERM']", 1, "each [[rows]] must be a table"),
        ("[rows]\nalgorithm = 'ERM'", 1, "each [[rows]] must be a table"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, text, line, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- its text is compared below
        read(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path}/a.toml:{line}: {message}")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("label = 'x'", 3, "each [[rows]] must be a table that names an algorithm"),
        ("algorithm = 5", 4, "algorithm of a row must be a text in quotes; got 5"),
        ("algorithm = 'ERM'\npartion = 'x'", 5, "key of [[rows]] not found: partion; did you mean partition"),
        ("algorithm = 'ERM'\nlabel = 5", 5, "label of a row must be a text in quotes; got 5"),
        ("algorithm = 'ERM'\nlabel = ''", 5, "label of a row must be a text in quotes; got ''"),
        ("algorithm = 'ERM'\nhparams = '{}'", 5, "hparams of a row must be a table; got '{}'"),
        ("algorithm = 'ERM'\n[rows.hparams]\nlr = 1979-05-27", 6, "lr must be a number"),
        ("algorithm = 'ERM'\nranges.lr = []", 5, "range of lr is []"),
        ("algorithm = 'ERM'\nbudgets = 1", 5, "budgets of a row must be a list of shares; got 1"),
        ("algorithm = 'ERM'\nbudgets = []", 5, "budgets of a row must be a list of shares; got []"),
        ("algorithm = 'ERM'\nbudgets = [0, 'much']", 5, "'much' is no share from 0 to 1, nor two"),
        ("algorithm = 'ERM'\nbudgets = [[0, 1], [0, 5]]", 5, "'0,5' is no share from 0 to 1, nor two"),
        ("algorithm = 'ERM'\nconfounders = 'sex'", 5, "confounders of a row must be a list of texts; got 'sex'"),
        ("algorithm = 'ERM'\ncontrol = 'yes'", 5, "control of a row must be true or false; got 'yes'"),
        ("algorithm = 'ERM'\non.Debug28.steps = 5", 5, "on.Debug28 of a row must hold tables hparams or ranges"),
        ("algorithm = 'ERM'\ncontrol = true", 5, "controls are asked for, and none of ERM has one"),
        ("algorithm = 'ERM'\n\non.Debug29.hparams = {}", 6, "dataset not found: Debug29"),
        ("algorithm = 'ERM'\n[rows.on.Debug28.ranges]\nlr = 'x'", 6, "range of lr is"),
        ("label = 'x'\nalgorithm = 'ERN'", 5, "algorithm not found: ERN"),
        ("algorithm = 'ERM'\npartition = 'grup'", 5, "partition not found: grup"),
        ("\nalgorithm = 'IRM'\npartition = 'environment'\ncontrol = false", 3, "IRM is the same row as in line 1"),
        (
            "algorithm = 'ERM'\nhparams.lr = 1\n[[rows]]\nalgorithm = 'ERM'\nhparams = { lr = 1.0 }",
            6,
            "ERM is the same",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_line(tmp_path, text, line, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- its text is compared below
        read(tmp_path, f"[[rows]]\nalgorithm = 'IRM'\n[[rows]]\n{text}")
    assert str(error.value).startswith(f"{tmp_path}/a.toml:{line}: {message}")


@pytest.mark.parametrize("key", ["annotation_budget", "validation_budget"])
def test_budgets_of_a_row_beside_one_for_all(tmp_path, key):
    with pytest.raises(ValueError, match=rf"a.toml:4: budgets and {key} \(line 1\) exclude each other; leave one out"):
        read(tmp_path, f"{key} = 0.5\n[[rows]]\nalgorithm = 'ERM'\nbudgets = [0]")


def test_budgets(tmp_path):
    rows = "[[rows]]\nalgorithm = 'RWG'\nconfounders = ['inferred:george']\nbudgets = [0, '0.05', [0.2, 1]]"
    words, [row] = read(tmp_path, f"budgets = [0, [0.05, 1], '1']\n{rows}")
    assert words == ["--budgets", "0", "0.05,1", "1"]
    assert row == SweepRow("RWG", confounders=["inferred:george"], budgets=[(0, 0), (0.05, 0.05), (0.2, 1)])
    launch = ["launch", str(tmp_path / "a.toml"), "--output_dir", "o", "--command_launcher", "dummy"]
    assert sweep_arguments.parse(launch).budgets == [(0, 0), (0.05, 1), (1, 1)]
    assert sweep_arguments.parse([*launch, "--budgets", "0.2"]).budgets == [(0.2, 0.2)]
    typed = sweep_arguments.parse([*launch, "--annotation_budget", "0.2"])
    assert (typed.budgets, typed.annotation_budget) == (None, 0.2)
    with pytest.raises(SystemExit):
        sweep_arguments.parse([*launch, "--budgets", "2"])


def test_no_flag_takes_anything(tmp_path):
    for flag in sweep_arguments.make_parser().flags():
        for value in ("{ a = 01:00:00 }", "01:00:00", "[]"):
            with pytest.raises(ValueError, match=r"a\.toml:2: "):
                read(tmp_path, f"# comment\n{flag} = {value}")


def test_one_may_stand_for_a_list_of_one(tmp_path):
    words, _ = read(tmp_path, "datasets = 'Debug28'\ntest_envs_list = '1,2'\nalgorithms = 'ERM:group'\nseeds = 5")
    assert words == ["--datasets=Debug28", "--test_envs_list=1,2", "--algorithms=ERM:group", "--seeds=5"]


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml: no such sweep file"):
        read_sweep_file("nowhere.toml", sweep_arguments.make_parser())
