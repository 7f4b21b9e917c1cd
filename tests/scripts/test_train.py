"""The train script end to end, on Debug28 and the embedded sets."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from domainbed import algorithms, datasets
from domainbed.algorithms.base import Task, masks
from domainbed.datasets.debug import Debug28
from domainbed.rows import Row
from domainbed.scripts import BadInput, train, train_execution

QUICK = [
    "--dataset",
    "Debug28",
    "--steps",
    "3",
    "--checkpoint_freq",
    "2",
    "--hparams",
    '{"backbone": "small_cnn", "batch_size": 4}',
]


def run(output_dir: Path, *flags: str) -> list[dict[str, Any]]:
    """Runs the script in this process; returns its records."""
    assert train.main([*QUICK, "--output_dir", str(output_dir), *flags]) == 0
    return [json.loads(line) for line in (output_dir / "results.jsonl").read_text().splitlines()]


def without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    drop = {"step_time", "mem_gb", "args"}
    return [{key: value for key, value in record.items() if key not in drop} for record in records]


def test_what_a_run_leaves_behind(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    records = run(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "done", "err.txt", "lock", "model.pkl", "out.txt", "results.jsonl",
    ]  # fmt: skip
    assert (tmp_path / "run" / "done").read_bytes() == b"done"
    assert [record["step"] for record in records] == [0, 2]
    domainbeds = {f"env{e}_{kind}_acc" for e in range(3) for kind in ("in", "out")}
    assert domainbeds | {"step", "epoch", "loss", "step_time", "mem_gb", "hparams", "args"} <= records[0].keys()
    assert {"env0_in_wga", "env0_in_g0_acc", "env0_in_g0_n"} <= records[0].keys()
    assert (
        records[0]["args"] | {"algorithm": "ERM", "test_envs": [0], "steps": 3, "uda_holdout_fraction": 0}
        == records[0]["args"]
    )
    printed = capsys.readouterr().out
    assert (tmp_path / "run" / "out.txt").read_text() == printed
    header = next(line for line in printed.splitlines() if line.startswith("env0_in_acc"))
    assert "env0_in_wga" in header
    assert "_g0_" not in header


def test_equal_arguments_give_equal_runs(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a"), run(tmp_path / "b")
    assert without_time(first) == without_time(second)
    one, two = (torch.load(tmp_path / name / "model.pkl", weights_only=True)["model_dict"] for name in "ab")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_model_loads_back_into_a_predictor(tmp_path: Path) -> None:
    flags = ["--algorithm", "EX2L_MAE", "--hparams_seed", "2"]
    run(tmp_path, *flags, "--hparams", '{"backbone": "small_cnn", "batch_size": 4}')
    saved = torch.load(tmp_path / "model.pkl", weights_only=True)
    algorithm = algorithms.get_algorithm_class("EX2L_MAE").from_task(
        Task.from_dict(saved["task"]), saved["model_hparams"]
    )
    algorithm.load_state_dict(saved["model_dict"])
    assert algorithm.predict(torch.zeros(2, 3, 28, 28)).shape == (2, 2)


def test_running_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(tmp_path)
    before = (tmp_path / "results.jsonl").read_bytes()
    run(tmp_path)
    assert "already done" in capsys.readouterr().out
    assert (tmp_path / "results.jsonl").read_bytes() == before
    with pytest.raises(BadInput, match=r"another run \(seed: 0 there, 1 now\).*--overwrite"):
        run(tmp_path, "--seed", "1")
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert run(tmp_path, "--seed", "1", "--overwrite")[0]["args"]["seed"] == 1


def test_overwriting_in_vain_keeps_the_old_run(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(BadInput, match="--test_envs 7"):
        run(tmp_path, "--test_envs", "7", "--overwrite")
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert (tmp_path / "done").exists()


def test_a_finished_run_without_the_model_that_is_asked_for_is_another_run(tmp_path: Path) -> None:
    run(tmp_path, "--skip_model_save")
    with pytest.raises(BadInput, match="skip_model_save: True there, False now"):
        run(tmp_path)


def test_the_reason_of_bad_input_is_kept_where_a_sweep_looks_for_it(tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        run(tmp_path, "--hparams", '{"lrr": 1}')
    assert "hparam of ERM not found: lrr" in (tmp_path / "err.txt").read_text()


def test_the_default_test_environments_are_the_datasets_own(tmp_path: Path) -> None:
    flags = ["--dataset", "DigitsSubpop", "--steps", "1", "--hparams", '{"batch_size": 4}']
    assert run(tmp_path / "a", *flags)[0]["args"]["test_envs"] == [3]
    assert run(tmp_path / "b")[0]["args"]["test_envs"] == [0]


def test_an_unfinished_run_of_domainbed_is_started_over(tmp_path: Path) -> None:
    (record, *_) = run(tmp_path)
    ours = ("partition", "label", "precision", "eval_splits", "keep_best")
    record["args"] = {key: value for key, value in record["args"].items() if key not in ours}
    (tmp_path / "results.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "done").unlink()
    assert len(run(tmp_path)) == 2


class Foreign(torch.nn.Module):
    """Has DomainBed's four arguments, update and predict, and nothing of ours."""

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__()
        self.layer = torch.nn.LazyLinear(num_classes)

    def update(self, minibatches, unlabeled=None):
        return {"loss": self.predict(minibatches[0][0]).sum().item()}

    def predict(self, x):
        return self.layer(x.flatten(1))


def test_a_class_with_a_base_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "Foreign", Foreign, raising=False)
    assert run(tmp_path, "--algorithm", "Foreign")[0]["args"]["partition"] == "environment"


def test_an_unfinished_run_starts_over_without_doubling_records(tmp_path: Path) -> None:
    whole = run(tmp_path)
    (tmp_path / "done").unlink()
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text(lines[0] + lines[1][:50])  # killed while it wrote
    assert without_time(run(tmp_path)) == without_time(whole)


def test_a_directory_that_another_process_works_in(tmp_path: Path) -> None:
    hold = """
import sys
from domainbed import claims
with claims.claim(sys.argv[1]):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path], stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert train.main([*QUICK, "--output_dir", str(tmp_path)]) == 73
        holder.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claim.1", "lock"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--algorithm", "GroupDR0"], "algorithm not found: GroupDR0; did you mean GroupDRO"),
        (["--dataset", "Debug27"], "dataset not found: Debug27; did you mean Debug28"),
        (["--partition", "groups"], "partition not found: groups; did you mean group"),
        (["--test_envs", "3"], r"--test_envs 3: Debug28 has the test environments \[0, 1, 2\]"),
        (["--test_envs", "0", "1", "2"], "leaves no environment"),
        (["--hparams", "[1]"], "hparams are a JSON object"),
        (["--hparams", "{lr: 1}"], "hparams are a JSON object"),
        (["--hparams", '{"lrr": 1}'], "hparam of ERM not found: lrr; did you mean lr"),
        (["--algorithm", "DANN", "--partition", "random"], "DANN compares at least 2 minibatches"),
        (["--dataset", "ColoredMNIST"], "ColoredMNIST needs --data_dir"),
        (["--task", "domain_adaptation"], "needs unlabelled images"),
        (["--steps", "-1"], "--steps -1"),
        (["--steps", "0"], "--steps 0: give 1 or more"),
        (["--checkpoint_freq", "0"], "--checkpoint_freq 0: give 1 or more"),
        (["--epochs", "2"], "--steps 3 and --epochs 2: give one of them"),
        (["--epochs", "0"], "--epochs 0: give 1 or more"),
        (["--epochs", "-1"], "--epochs -1: must not be negative"),
        (["--ranges", "lr"], "ranges are a JSON object"),
        (["--ranges", '{"lr": "10^U(2, 1)"}'], "range of lr is .*lower bound above the upper"),
        (["--ranges", '{"lrr": "U(0, 1)"}'], "hparam of ERM on Debug28 to draw not found: lrr; did you mean lr"),
        (["--ranges", '{"batch_size": "U(4, 8)"}', "--hparams_seed", "1"], "hparam batch_size is"),
        (["--hparams", '{"optimizer": "sdg"}'], "hparam optimizer is 'sdg'; take adam or sgd"),
        (["--hparams", '{"patience": 0}'], "patience 0"),
        (["--hparams", '{"patience": 3}', "--holdout_fraction", "0"], "hparam patience needs groups and validation"),
        (["--test_envs", "0", "0"], "--test_envs 0 0: name each environment once"),
        (["--hparams", '{"pretrained": "no"}'], "hparam pretrained is 'no'"),
        (["--hparams", '{"backbone": 5}'], "hparam backbone is 5"),
        (["--dataset", "PACS", "--data_dir", "nowhere"], r"(.|\n)*Layout below --data_dir: .*PACS/(.|\n)*--list"),
        (["--holdout_fraction", "1.5"], "fractions below 1"),
        (["--keep_best", "aa_wga", "--holdout_fraction", "0"], "--keep_best needs groups and validation"),
        (["--partition", "group", "--hparams", '{"batch_size": 0}'], "batch_size"),
        (["--hparams", '{"batch_size": "64"}'], "hparam batch_size is '64'; give a value like its default, 64"),
        (["--hparams", '{"lr": true}'], "hparam lr is True"),
        (
            ["--algorithm", "EX2L_MAE", "--hparams", '{"map_gradient": "detached"}'],
            "map_gradient 'detached' is unknown",
        ),
        (["--algorithm", "AbstractMMD"], "algorithm not found: AbstractMMD"),
        (["--algorithm", "Algorithm"], "algorithm not found: Algorithm"),
        (["--dataset", "MultipleDomainDataset"], "dataset not found: MultipleDomainDataset"),
        (["--confounders", "sex"], "Debug28 leaves no choice of --confounders"),
        (["--input_pipeline", "cv2"], "--input_pipeline cv2 is for image files"),
        (["--mask_dir", "nowhere"], "--mask_dir nowhere: no such folder"),
        (["--mask_dir", "."], r"the masks of 3 of 3 environments can't be used:(.|\n)*env0.npy: no such file"),
        (["--annotation_budget", "2"], "--annotation_budget 2"),
        (["--dataset", "DigitsSubpop", "--test_envs", "0"], r"must contain \[3\], the official test set"),
    ],
)
def test_bad_input_is_explained_and_leaves_nothing_that_looks_complete(
    tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        run(tmp_path, *flags)
    assert not {"done", "results.jsonl", "model.pkl"} & {path.name for path in tmp_path.iterdir()}


def test_an_output_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(BadInput, match="is a file"):
        run(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_from_the_shell_bad_input_is_one_line_and_a_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "domainbed.scripts.train", "--algo", "ERMM", "--output_dir", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("error: algorithm not found: ERMM; did you mean ERM?")
    assert process.stderr.count("\n") == 1


def test_a_crash_leaves_its_traceback_and_no_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *_: Any) -> None:
        raise RuntimeError("out of ideas")

    monkeypatch.setattr(algorithms.get_algorithm_class("ERM"), "update", fail)
    with pytest.raises(RuntimeError, match="out of ideas"):
        run(tmp_path)
    assert "out of ideas" in (tmp_path / "err.txt").read_text()
    assert not (tmp_path / "done").exists()


def test_a_batch_larger_than_its_split_trains(tmp_path: Path) -> None:
    assert len(run(tmp_path, "--hparams", '{"backbone": "small_cnn", "batch_size": 64}')) == 2


def test_abbreviations_of_domainbeds_documentation(tmp_path: Path) -> None:
    assert run(tmp_path, "--test_env", "2", "--hparams_s", "0", "--algo", "ERM")[0]["args"]["test_envs"] == [2]


def test_partition_is_recorded_and_may_be_chosen(tmp_path: Path) -> None:
    assert run(tmp_path / "a", "--algorithm", "ERM")[0]["args"]["partition"] == "environment"
    assert run(tmp_path / "b", "--algorithm", "EX2L_MAE")[0]["args"]["partition"] == "group"
    assert run(tmp_path / "c", "--partition", "confounder")[0]["args"]["partition"] == "confounder"


def test_within_a_budget_only_annotated_images_have_a_confounder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[tuple[int, int, int]]] = {}

    class Watching(algorithms.ERM):
        def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
            for m in minibatches:
                seen.setdefault(type(self).__name__, set()).update(
                    zip(*(a.tolist() for a in (m.e, m.i, m.c)), strict=True)
                )
            return super().update(minibatches, unlabeled)

    class Needing(Watching):
        NEEDS_CONFOUNDERS = True

    class Taking(Needing):
        TAKES_HIDDEN = True

    for cls in (Watching, Needing, Taking):
        monkeypatch.setattr(algorithms, cls.__name__, cls, raising=False)
        flags = ["--algorithm", cls.__name__, "--annotation_budget", "0.5", "--steps", "30", "--partition", "random"]
        assert run(tmp_path / cls.__name__, *flags)[0]["args"]["annotation_budget"] == 0.5
    hidden, known = ({(e, i) for e, i, c in seen["Watching"] if (c < 0) == dark} for dark in (True, False))
    assert not hidden & known
    assert len(hidden) == len(known) == 13  # half of 2 x 13 training images
    assert {(e, i) for e, i, _ in seen["Needing"]} == known
    assert seen["Taking"] == seen["Watching"]
    with pytest.raises(BadInput, match="Needing learns from confounder labels and needs two values of them"):
        run(tmp_path / "none", "--algorithm", "Needing", "--annotation_budget", "0")


def test_at_budget_zero_balancing_groups_is_balancing_labels(tmp_path: Path) -> None:
    for by_group, by_label in (("group", "label"), ("group_subset", "label_subset"), ("confounder", "random")):
        groups = run(tmp_path / by_group, "--partition", by_group, "--annotation_budget", "0")
        labels = run(tmp_path / by_label, "--partition", by_label)
        assert without_time(groups) == without_time(labels)


class Masked(algorithms.ERM):
    """ERM that looks at its masks."""

    NEEDS_MASKS = True
    seen: ClassVar[list[torch.Tensor]] = []

    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        self.seen.append(masks(minibatches))
        return super().update(minibatches, unlabeled)


def test_masks_reach_the_algorithms_that_need_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "Masked", Masked, raising=False)
    monkeypatch.setattr(Masked, "seen", [])
    flags = ["--dataset", "DigitsSubpop", "--steps", "1", "--eval_splits", "selection"]
    (masked,) = run(tmp_path / "masked", *flags, "--algorithm", "Masked")
    (m,) = Masked.seen
    assert m.shape == (8, 36, 36)
    assert 0 < m.mean() < 0.4
    (plain,) = run(tmp_path / "plain", *flags)
    assert masked["loss"] == plain["loss"]  # the same images were drawn


def test_the_users_masks_take_the_place_of_a_datasets_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "Masked", Masked, raising=False)
    monkeypatch.setattr(Masked, "seen", [])
    with pytest.raises(BadInput, match="Masked learns from masks, and Debug28 has none; give --mask_dir"):
        run(tmp_path / "without", "--algorithm", "Masked")
    for e, environment in enumerate(Debug28(None, [0], {})):
        np.save(tmp_path / f"env{e}.npy", np.ones((len(environment), 28, 28), bool))
    records = run(tmp_path / "with", "--algorithm", "Masked", "--mask_dir", str(tmp_path))
    assert records[0]["args"]["mask_dir"] == str(tmp_path)
    assert all((m == 1).all() and m.shape == (8, 28, 28) for m in Masked.seen)
    assert Row.of(records[0]["args"]) != Row.of({**records[0]["args"], "mask_dir": "others"})


def test_minibatches_without_masks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "Masked", Masked, raising=False)
    monkeypatch.setattr(Masked, "NEEDS_MASKS", False)
    with pytest.raises(ValueError, match="minibatches came without masks; set NEEDS_MASKS"):
        run(tmp_path, "--algorithm", "Masked", "--dataset", "DigitsSubpop")


def test_groups_that_the_budget_hides_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--dataset", "DigitsSubpop", "--eval_splits", "selection"]
    run(tmp_path / "all", *flags, "--partition", "group")
    run(tmp_path / "mixed", *flags, "--annotation_budget", "0.003")  # all are drawn
    assert "no image is annotated" not in caplog.text
    run(tmp_path / "few", *flags, "--partition", "group", "--annotation_budget", "0.003")
    assert "no image is annotated of 1 training group(s): 8, brick" in caplog.text
    caplog.clear()
    run(tmp_path / "none", *flags, "--partition", "group", "--annotation_budget", "0")
    assert "no image is annotated" not in caplog.text  # which the partition's own line says


class Broken(Debug28):
    """Debug28 with something wrong, named by the hparam."""

    def __init__(self, root: str | None, test_envs: Any, hparams: dict[str, Any]):
        super().__init__(root, test_envs, hparams)
        environment = self.datasets[1]
        match hparams["data_seed"]:
            case 1:
                environment.c[[3, 5]] = 2
            case 2:
                environment.y[4] = -1
            case 3:
                self.CONFOUNDERS = ()
            case 4:
                self.datasets[1].c[:] = self.datasets[2].c[:] = 1

    HPARAMS = {"data_seed": 0}


@pytest.mark.parametrize(
    ("wrong", "flags", "message"),
    [
        (1, [], r"2 labels or confounders(.|\n)*environment 1, image 3: c is 2, allowed: 0 to 1\n.*image 5"),
        (2, [], r"environment 1, image 4: y is -1, allowed: 0 to 1"),
        (3, ["--annotation_budget", "0.5"], "Broken knows no confounder"),
        (3, ["--algorithm", "EX2L_MAE", "--partition", "random"], "learns from confounders, and Broken knows none"),
        (4, ["--partition", "group"], "partition group: the confounder is 1 in all training images"),
        (4, ["--algorithm", "EX2L_MAE", "--partition", "random"], "needs two values of them"),
    ],
)
def test_arrays_that_make_no_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int, flags: list[str], message: str
) -> None:
    monkeypatch.setattr(datasets, "Broken", Broken, raising=False)
    hparams = json.dumps({"backbone": "small_cnn", "batch_size": 4, "data_seed": wrong})
    with pytest.raises(BadInput, match=message):
        run(tmp_path, "--dataset", "Broken", "--hparams", hparams, *flags)


def test_a_release_of_another_size_is_pointed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(datasets, "Broken", Broken, raising=False)
    monkeypatch.setattr(Broken, "PUBLISHED_COUNTS", {"0": 16, "2": (10, 8), "all": 48})
    run(tmp_path, "--dataset", "Broken")
    assert "Broken is not the official release here: 2: 16 images, 18 published" in caplog.text


def test_test_groups_that_training_never_shows_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run(tmp_path, "--dataset", "DigitsM2M", "--eval_splits", "selection")
    assert "8 of 8 test groups never occur in training: 0, " in caplog.text


def test_selection_splits_leave_out_only_what_nothing_selects_by(tmp_path: Path) -> None:
    everything, few = run(tmp_path / "a"), run(tmp_path / "b", "--eval_splits", "selection")
    left_out = {key for key in everything[0].keys() - few[0].keys() if key.endswith("_in_acc")}
    assert left_out == {"env1_in_acc", "env2_in_acc"}
    assert all(everything[1][key] == few[1][key] for key in few[1] if key.startswith("env"))


def test_best_model_is_the_one_with_the_best_validation_score(tmp_path: Path) -> None:
    flags = ["--dataset", "DigitsSubpop", "--test_envs", "3", "--steps", "9", "--keep_best", "aa_wga"]
    records = run(tmp_path, *flags, "--hparams", '{"batch_size": 16}')
    scores = {r["step"]: (r["env2_in_acc"] + r["env2_in_wga"]) / 2 for r in records}  # balanced: no pooling needed
    best = torch.load(tmp_path / "model_best.pkl", weights_only=True)
    assert best["validation_aa_wga"] == pytest.approx(max(scores.values()))
    assert best["step"] == min(step for step, score in scores.items() if score == max(scores.values()))


PATIENT = '{"batch_size": 16, "patience": 2, "min_delta": 0.3, "lr": 0.0}'


def test_training_ends_when_the_validation_score_stops_rising(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.1, 0.3, 0.45, 0.6, 0.7])  # .45 counts, .6 and .7 do not, being .15 and .25 above it
    monkeypatch.setattr(train_execution, "validation_score", lambda *_: next(scores))
    flags = ["--dataset", "DigitsSubpop", "--steps", "20", "--keep_best", "aa_wga"]
    records = run(tmp_path, *flags, "--hparams", PATIENT)
    assert [record["step"] for record in records] == [0, 2, 4, 6, 8]
    assert records[0]["hparams"].items() >= {"patience": 2, "min_delta": 0.3}.items()
    line = "stopped early after step 8: 2 checkpoints brought no validation score more than 0.3 above that of step 4"
    assert line in capsys.readouterr().out
    assert (tmp_path / "done").exists()
    assert torch.load(tmp_path / "model_best.pkl", weights_only=True)["step"] == 8  # the best model needs no min_delta


def test_what_is_waited_for_is_the_pooled_validation_score(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--dataset", "DigitsSubpop", "--steps", "20"]
    records = run(tmp_path, *flags, "--hparams", PATIENT)  # nothing is learned: the first score stays
    assert [record["step"] for record in records] == [0, 2, 4]
    score = (records[0]["env2_in_acc"] + records[0]["env2_in_wga"]) / 2
    assert f"above that of step 0 ({score:.4f})" in capsys.readouterr().out


def test_an_epoch_draws_as_many_images_as_are_trained_on(tmp_path: Path) -> None:
    flags = ["--dataset", "Debug28", "--epochs", "2", "--output_dir", str(tmp_path), "--hparams"]
    assert train.main([*flags, '{"backbone": "small_cnn", "batch_size": 4}']) == 0
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 4, 7]  # 2 x 13 images, 2 x 4 of them a step: 4 steps
    assert (records[0]["args"]["epochs"], records[0]["args"]["steps"]) == (2, None)


def test_epochs_count_all_training_images_whatever_the_partition_and_the_budget(tmp_path: Path) -> None:
    flags = ["--dataset", "Debug28", "--epochs", "1", "--checkpoint_freq", "3", "--annotation_budget", "0.5"]
    flags += ["--algorithm", "EX2L_MAE", "--partition", "random"]
    flags += ["--output_dir", str(tmp_path), "--hparams", '{"backbone": "small_cnn", "batch_size": 4}']
    assert train.main(flags) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert steps == [0, 3]


def test_other_ranges_are_another_run(tmp_path: Path) -> None:
    ranges = '{"resnet_dropout": [0.25]}'
    (record, _) = run(tmp_path, "--hparams_seed", "1", "--ranges", ranges)
    assert (record["args"]["ranges"], record["hparams"]["resnet_dropout"]) == (ranges, 0.25)
    with pytest.raises(BadInput, match=r"another run .*ranges: "):
        run(tmp_path, "--hparams_seed", "1")


def test_official_validation_is_not_split(tmp_path: Path) -> None:
    (record, *_) = run(tmp_path, "--dataset", "DigitsSubpop", "--test_envs", "3", "--steps", "1", "--algorithm", "IRM")
    keys = {f"env{e}_in_{name}" for e in range(4) for name in ("acc", "adj_acc")}
    assert {key for key in record if key.endswith("_acc") and "_g" not in key} == keys


def test_domain_adaptation_gets_unlabelled_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    erm = algorithms.get_algorithm_class("ERM")

    class Adapting(erm):
        def update(self, minibatches, unlabeled=None):
            seen.append(unlabeled)
            return super().update(minibatches)

    monkeypatch.setattr(algorithms, "Adapting", Adapting, raising=False)
    flags = [
        "--task",
        "domain_adaptation",
        "--uda_holdout_fraction",
        "0.5",
        "--algorithm",
        "Adapting",
        "--test_envs",
        "1",
        "2",
    ]
    (record, *_) = run(tmp_path, *flags)
    assert [tuple(x.shape) for x in seen[0]] == [(4, 3, 28, 28)] * 2
    assert {"env0_uda_acc", "env1_uda_acc"} <= record.keys()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision(tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    erm = algorithms.get_algorithm_class("ERM")
    predict = erm.predict

    def watched(self: Any, x: torch.Tensor) -> torch.Tensor:
        logits = predict(self, x)
        seen.add(logits.dtype)
        return logits

    monkeypatch.setattr(erm, "predict", watched)
    run(tmp_path, "--precision", precision)
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_a_dataset_set_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(datasets.get_dataset_class("Debug28")):
        ENVIRONMENTS = ("a", "b", "c")

    monkeypatch.setattr(datasets, "Mine", Mine, raising=False)
    assert run(tmp_path, "--dataset", "Mine")[0]["args"]["dataset"] == "Mine"


@pytest.mark.parametrize("name", ["ColoredMNIST", "RotatedMNIST"])
def test_mnist_trains(tmp_path: Path, mnist_root: Path, name: str) -> None:
    flags = [
        "--dataset",
        name,
        "--data_dir",
        str(mnist_root),
        "--steps",
        "1",
        "--algorithm",
        "GroupDRO",
        "--partition",
        "group",
    ]
    (record,) = run(tmp_path, *flags, "--hparams", '{"backbone": "small_cnn", "batch_size": 16}')
    assert 0 <= record["env0_in_wga"] <= record["env0_in_acc"] <= 1
