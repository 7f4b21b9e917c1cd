import csv
import json
import re
import subprocess
import sys

import pytest

from domainbed.model_selection import IIDAccuracySelectionMethod
from domainbed.scripts import BadInput, collect_results


def record(step=0, trial_seed=0, args=(), **values):
    run = {"algorithm": "ERM", "dataset": "ColoredMNIST", "test_envs": [0], "hparams_seed": 0, "seed": 0}
    return {"args": run | {"trial_seed": trial_seed} | dict(args), "step": step} | values


PLAIN = {"env0_in_acc": 0.25, "env0_out_acc": 0.5, "env1_out_acc": 0.75, "env2_out_acc": 0.75}
GROUPS = {
    f"env{env}_{split}_{name}": value
    for env, split in ((0, "in"), (1, "out"), (2, "out"))
    for name, value in {"wga": 0.5, "g0_acc": 0.5, "g0_n": 4, "g3_acc": 1.0, "g3_n": 4}.items()
}


@pytest.fixture
def sweep(tmp_path):
    """Writes jobs, one list of records each, and returns their directory."""

    def write(*jobs, tail=""):
        for number, records in enumerate(jobs):
            directory = tmp_path / f"job{number}"
            directory.mkdir()
            text = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
            (directory / "results.jsonl").write_text(text + tail)
        return tmp_path

    return write


class TestMain:
    def test_prints_and_writes_domainbeds_tables(self, sweep, capsys):
        directory = sweep([record(**PLAIN)], [record(trial_seed=1, **PLAIN | {"env0_in_acc": 0.75})])
        assert collect_results.main(["--input_dir", str(directory)]) == 0
        printed = capsys.readouterr().out
        assert (directory / "results.txt").read_bytes() == printed.encode()
        assert printed.startswith(
            "Total records: 2\n\n-------- Dataset: ColoredMNIST, model selection method: training-"
        )
        assert (
            "\nERM                   50.0 +/- 17.7         X                     X                     X   " in printed
        )
        assert [path.name for path in directory.glob("*.t*")] == ["results.txt"]

    def test_groups_follow_and_have_a_file_of_their_own(self, sweep, capsys):
        directory = sweep([record(**PLAIN, **GROUPS)])
        collect_results.main(["--input_dir", str(directory)])
        results, groups = ((directory / name).read_text(encoding="utf-8") for name in ("results.txt", "groups.txt"))
        assert capsys.readouterr().out == results + groups
        assert "WGA" not in results
        assert "ERM        Uniform Env.  75.0             50.0" in groups

    def test_several_test_environments_follow_and_have_a_file_of_their_own(self, sweep, capsys):
        both = record(args={"test_envs": [0, 2]}, env2_in_acc=0.75, **PLAIN, **GROUPS, env2_in_wga=0.5)
        directory = sweep([both | {"env2_in_g0_acc": 0.75, "env2_in_g0_n": 4}])
        collect_results.main(["--input_dir", str(directory)])
        names = ("results.txt", "several_test_envs.txt", "groups.txt")
        results, several, groups = ((directory / name).read_text(encoding="utf-8") for name in names)
        assert capsys.readouterr().out == results + several + groups
        assert "trained on" not in results
        assert "-------- ColoredMNIST, trained on +80%, tested on +90%, -90%: accuracy" in several
        assert "ERM        Uniform Env.  25.0  75.0  50.0" in several

    def test_auto_lr_reports_the_second_stage_on_several_test_environments_too(self, sweep, capsys):
        first = record(0, args={"holdout_fraction": 0.2, "test_envs": [0, 2]}, env2_in_acc=0.5, **PLAIN)
        second = record(0, args={"holdout_fraction": 0.0, "test_envs": [0, 2]}, fd_env0_in_acc=0.875, fd_env2_in_acc=1)
        collect_results.main(["--input_dir", str(sweep([first, second])), "--auto_lr"])
        assert "ERM        Uniform Env.  87.5  100.0  93.8" in capsys.readouterr().out

    def test_controls_follow_the_groups_and_have_a_file_of_their_own(self, sweep, capsys):
        rows = ({"algorithm": "EX2L_MAE"}, {"algorithm": "EX2L_MAE", "hparams": '{"map_gradient": "none"}'})
        directory = sweep(*([record(args=args, **PLAIN, **GROUPS)] for args in rows))
        collect_results.main(["--input_dir", str(directory)])
        names = ("results.txt", "groups.txt", "controls.txt")
        assert capsys.readouterr().out == "".join((directory / name).read_text(encoding="utf-8") for name in names)
        controls = (directory / "controls.txt").read_text(encoding="utf-8")
        assert controls.count("EX2L_MAE  EX2L_MAE map_gradient=none  1  75.0") == 4

    def test_compare_and_screening_come_last(self, sweep, capsys):
        train = {key.replace("out", "in"): value for key, value in GROUPS.items() if "out" in key}
        rows = ({"algorithm": "EX2L_MAE"}, {"partition": "group"})
        directory = sweep(*([record(args=args, **PLAIN, **GROUPS, **train)] for args in rows))
        words = ["--input_dir", str(directory), "--compare", "EX2L_MAE", "ERM:group", "--screening"]
        collect_results.main(words)
        out = capsys.readouterr().out
        comparison, screening = ((directory / f"{name}.txt").read_text("utf-8") for name in ("comparison", "screening"))
        assert out.endswith(comparison + screening)
        assert comparison.startswith("\n-------- EX2L_MAE minus ERM:group; ")
        assert "EX2L_MAE (Uniform Group) 50.0" in screening
        collect_results.main([*words, "--latex"])
        assert {path.name for path in directory.glob("*.tex")} >= {"comparison.tex", "screening.tex"}

    def test_what_can_not_be_compared_or_screened_is_bad_input(self, sweep):
        directory = str(sweep([record(**PLAIN, **GROUPS)]))
        with pytest.raises(BadInput, match="row not found: IRM; known: 'ERM'"):
            collect_results.main(["--input_dir", directory, "--compare", "IRM", "ERM"])
        with pytest.raises(BadInput, match="--eval_splits all"):
            collect_results.main(["--input_dir", directory, "--screening"])

    def test_latex(self, sweep, capsys):
        directory = sweep([record(**PLAIN, **GROUPS)])
        collect_results.main(["--input_dir", str(directory), "--latex"])
        texts = [(directory / name).read_text(encoding="utf-8") for name in ("results.tex", "groups.tex")]
        assert capsys.readouterr().out == texts[0]  # one document, which compiles
        assert all(text.startswith("\\documentclass") and text.endswith("\\end{document}\n") for text in texts)
        assert "% Total records: 1\n" in texts[0]

    @pytest.mark.parametrize("flag", ["--latex", "--l", "--la"])
    def test_domainbeds_flag_and_its_prefixes_are_a_format(self, sweep, capsys, flag):
        directory = str(sweep([record(**PLAIN)]))
        collect_results.main(["--input_dir", directory, "--format", "latex"])
        expected = capsys.readouterr().out
        collect_results.main(["--i", directory, flag])
        assert capsys.readouterr().out == expected
        assert collect_results.parser().parse_args(["--i", directory, "--a"]).auto_lr
        with pytest.raises(SystemExit):
            collect_results.main(["--input_dir", directory, flag, "--format", "csv"])

    def test_json_is_one_document_on_the_console_and_one_in_each_file(self, sweep, capsys):
        directory = sweep([record(**PLAIN, **GROUPS)], [record(trial_seed=1, **PLAIN | {"env0_in_acc": float("nan")})])
        collect_results.main(["--input_dir", str(directory), "--format", "json"])
        printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        files = {name: json.loads((directory / f"{name}.json").read_text("utf-8")) for name in ("results", "groups")}
        assert printed == files
        (line,) = files["groups"]["tables"][0]["rows"]
        assert line["Algorithm"]["text"] == "ERM"
        assert line["ColoredMNIST WGA"]["mean"] == 0.5
        first = files["results"]["tables"][0]
        assert first["rows"][0]["+90%"] == {"text": "nan +/- nan", "mean": None, "standard error": None, "n": 2}

    def test_csv_holds_domainbeds_numbers_and_ours(self, sweep, capsys):
        directory = sweep([record(**PLAIN, **GROUPS)], [record(trial_seed=1, **PLAIN | {"env0_in_acc": 0.75})])
        collect_results.main(["--input_dir", str(directory), "--format", "csv"])
        results, groups = ((directory / f"{name}.csv").read_text("utf-8") for name in ("results", "groups"))
        assert capsys.readouterr().out == f"{results}\n{groups}"
        first, averages = (line for line in csv.DictReader(results.splitlines()) if "training-domain" in line["table"])
        assert all(line["notes"].endswith("accuracies are fractions.") for line in (first, averages))
        (protocol, *_) = csv.DictReader(groups.splitlines())
        assert "Protocol: one draw of the hparams, seed 0 " in protocol["notes"]
        assert first["Algorithm"] == "ERM"
        assert float(first["+90% mean"]) == 0.5
        assert float(first["+90% standard error"]) == pytest.approx(0.25 / 2**0.5)
        assert (first["+90% n"], first["+80%"]) == ("2", "")
        assert [line["ColoredMNIST WGA mean"] for line in csv.DictReader(groups.splitlines())] == ["0.5", "0.5"]

    def test_markdown(self, sweep, capsys):
        directory = sweep([record(**PLAIN, **GROUPS)])
        collect_results.main(["--input_dir", str(directory), "--format", "markdown"])
        text = capsys.readouterr().out
        assert (
            "| Algorithm | +90% | +80% | -90% | Avg |\n| --- | --- | --- | --- | --- |\n| ERM | 25.0 +/- 0.0 | X |"
            in text
        )
        assert text == "".join((directory / f"{name}.md").read_text("utf-8") for name in ("results", "groups"))

    def test_more_tables_on_request(self, sweep, capsys):
        others = ({"algorithm": "IRM"}, {"algorithm": "IRM", "annotation_budget": 0.05})
        directory = sweep(*([record(args=args, **PLAIN, **GROUPS)] for args in ((), *others)))
        names = [*collect_results.NAMED]
        collect_results.main(["--input_dir", str(directory), "--tables", "ranks", "paper"])
        made = {path.stem for path in directory.glob("*.txt")}
        assert made == {"results", "groups", "ranks", "paper"}
        collect_results.main(["--input_dir", str(directory), "--tables", "all", "--reference", "IRM"])
        assert {path.stem for path in directory.glob("*.txt")} == {"results", "groups", *names}
        assert "Ratios of the means to IRM" in capsys.readouterr().out
        with pytest.raises(BadInput, match="row not found: MMD; known: 'ERM', 'IRM'"):
            collect_results.main(["--input_dir", str(directory), "--tables", "all", "--reference", "MMD"])

    def test_a_table_that_has_nothing_to_show_is_said(self, sweep, caplog):
        directory = sweep([record(**PLAIN)])
        collect_results.main(["--input_dir", str(directory), "--tables", "paper"])
        assert "--tables paper: nothing to show" in caplog.text
        assert not (directory / "paper.txt").exists()

    def test_budgets(self, sweep, capsys, caplog):
        directory = sweep([record(**PLAIN, **GROUPS)], [record(args={"validation_budget": 0.2}, **PLAIN, **GROUPS)])
        collect_results.main(["--input_dir", str(directory), "--tables", "budgets"])
        (_, table) = (directory / "budgets.txt").read_text("utf-8").strip().split("-------- ")
        assert table.startswith("ColoredMNIST: worst-group accuracy by annotation budget, model selection: (AA + WGA)")
        assert re.search(r"Algorithm +Sampling +100 % +100 / 20 %\nERM +Uniform Env. +50.0 +50.0\Z", table)
        (directory / "job1/results.jsonl").unlink()
        collect_results.main(["--input_dir", str(directory), "--tables", "budgets"])
        assert "--tables budgets: nothing to show; it needs runs at two annotation budgets or more" in caplog.text

    def test_intervals(self, sweep, capsys):
        jobs = [
            [record(trial_seed=trial, **PLAIN, **GROUPS | {"env0_in_g0_acc": acc})] for trial, acc in ((0, 0), (1, 1))
        ]
        directory = sweep(*jobs)
        collect_results.main(["--input_dir", str(directory)])
        assert "t interval of the mean over seeds" not in capsys.readouterr().out
        collect_results.main(["--input_dir", str(directory), "--intervals"])
        assert "75.0 ± 35.4 [-242.7, 392.7]" in capsys.readouterr().out  # 12.706 standard errors of 25 points

    def test_compare_all(self, sweep, capsys):
        rows = ({"algorithm": "IRM"}, {"algorithm": "GroupDRO"}, {})
        directory = sweep(*([record(args=args, **PLAIN, **GROUPS)] for args in rows))
        collect_results.main(["--input_dir", str(directory), "--compare_all", "ERM"])
        text = (directory / "comparisons.txt").read_text("utf-8")
        assert capsys.readouterr().out.endswith(text)
        assert text.count("too few seeds") == 2 * text.count("-------- Every other row minus ERM;") > 0

    def test_earlier_tables_are_replaced(self, sweep):
        directory = sweep([record(**PLAIN)])
        (directory / "results.txt").write_text("x" * 10_000)
        collect_results.main(["--input_dir", str(directory)])
        assert "x" * 10 not in (directory / "results.txt").read_text()

    def test_a_sweep_that_can_not_be_written_to_is_printed_all_the_same(self, sweep, capsys):
        directory = sweep([record(**PLAIN, **GROUPS)])
        (directory / "results.txt").mkdir()
        with pytest.raises(BadInput, match=r"Is a directory.*results\.txt"):
            collect_results.main(["--input_dir", str(directory)])
        printed = capsys.readouterr().out
        assert printed.startswith("Total records: 1\n")
        assert "Average (AA) and worst-group (WGA) accuracy" in printed

    def test_files_are_written_though_nobody_reads_what_is_printed(self, sweep, monkeypatch):
        directory = sweep([record(**PLAIN, **GROUPS)])

        def closed(*_args, **_kwargs):
            raise BrokenPipeError

        monkeypatch.setattr("builtins.print", closed)
        with pytest.raises(BrokenPipeError):
            collect_results.main(["--input_dir", str(directory)])
        assert {path.name for path in directory.glob("*.txt")} == {"results.txt", "groups.txt"}

    def test_a_torn_line_does_not_matter(self, sweep, capsys, caplog):
        directory = sweep([record(**PLAIN)], [record(trial_seed=1, **PLAIN)], tail='{"args": {"algo')
        collect_results.main(["--input_dir", str(directory)])
        assert capsys.readouterr().out.startswith("Total records: 2\n")
        assert re.search(
            r"skipped 2 line\(s\) that hold no record, in .*results.jsonl and 1 more file\(s\)", caplog.text
        )

    def test_auto_lr_joins_the_two_stages(self, sweep, capsys):
        first = record(0, args={"holdout_fraction": 0.2}, **PLAIN)
        second = record(0, args={"holdout_fraction": 0.0}, fd_env0_in_acc=0.875)
        directory = sweep([first, second])
        collect_results.main(["--input_dir", str(directory), "--auto_lr"])
        printed = capsys.readouterr().out
        assert "auto lr training-domain validation set" in printed
        assert "ERM                   87.5 +/- 0.0" in printed

    def test_a_directory_without_records_is_an_error_and_gets_no_file(self, sweep):
        directory = sweep([])
        with pytest.raises(BadInput, match=r"holds no records \(\*/results.jsonl\); name the --output_dir of a sweep"):
            collect_results.main(["--input_dir", str(directory)])
        with pytest.raises(BadInput, match="nowhere is no directory"):
            collect_results.main(["--input_dir", str(directory / "nowhere")])
        assert {path.name for path in directory.iterdir()} == {"job0"}

    def test_as_a_command(self, sweep):
        directory = sweep([])
        command = [sys.executable, "-m", "domainbed.scripts.collect_results", "--input_dir", str(directory)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: --input_dir ")
        assert done.stderr.count("\n") == 1

    def test_never_imports_torch_nor_scipy_where_there_are_no_pairs(self, sweep):
        directory = sweep([record(**PLAIN, **GROUPS)])
        code = (
            "import sys; from domainbed.scripts import collect_results; "
            f"collect_results.main(['--input_dir', {str(directory)!r}]); print({{'torch', 'scipy'}} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "set()"


class TestWhatOthersImport:
    def test_print_table(self, capsys):
        collect_results.print_table([["a", "b"]], "a title", ["row"], ["", "c", "d"], colwidth=3, latex=False)
        assert capsys.readouterr().out == "\n-------- a title\n     c    d   \nrow  a    b   \n"

    def test_print_results_tables(self, capsys):
        collect_results.print_results_tables([record(**PLAIN)], IIDAccuracySelectionMethod, False)
        out = capsys.readouterr().out
        assert out.startswith("\n-------- Dataset: ColoredMNIST,")
        assert out.endswith("ERM                        25.0 +/- 0.0               25.0                      \n")

    def test_format_mean(self):
        assert collect_results.format_mean([0.5], False) == (50.0, 0.0, "50.0 +/- 0.0")

    def test_remove_key_leaves_the_original_alone(self):
        original = {"a": 1, "b": {"a": 2}}
        assert collect_results.remove_key(original, "a") == {"b": {"a": 2}}
        assert collect_results.remove_key(original, "c") == original == {"a": 1, "b": {"a": 2}}

    def test_recursive_freeze_is_equal_for_equal_contents_only(self):
        one = {"a": [1, {"b": 2}], "c": None}
        same = {"c": None, "a": [1, {"b": 2}]}
        other = {"a": [{"b": 2}, 1], "c": None}
        freeze = collect_results.recursive_freeze
        assert len({freeze(one), freeze(same), freeze(other)}) == 2

    def test_merge_records_keeps_the_first_value_and_other_runs_apart(self):
        records = [
            record(0, args={"holdout_fraction": 0.2}, loss=1.0),
            record(1, args={"holdout_fraction": 0.2}, loss=2.0),
            record(0, args={"holdout_fraction": 0.0}, loss=3.0, fd_env0_in_acc=0.5),
            record(0, args={"holdout_fraction": 0.0, "seed": 1}, loss=4.0),
        ]
        merged = collect_results.merge_records(records)
        assert merged.map(lambda r: (r["step"], r["loss"], r.get("fd_env0_in_acc"))) == [
            (0, 1.0, 0.5), (1, 2.0, None), (0, 4.0, None),
        ]  # fmt: skip
        assert merged[0]["args"]["holdout_fraction"] == 0.2
