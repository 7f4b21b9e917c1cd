"""The verb plan, and the timing of jobs behind it."""

import math
import re
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest

from domainbed import plans, training
from domainbed.jobs import Job
from domainbed.scripts import BadInput, calibrate, sweep_plan, torch_process

HPARAMS = '{"batch_size": 4}'


def job(state=Job.NOT_LAUNCHED, dataset="Debug28", algorithm="ERM", test_envs=(0,), hparams_seed=0, **more):
    seeds = {"hparams_seed": hparams_seed, "trial_seed": 0, "seed": 0, "test_envs": list(test_envs)}
    args = {"dataset": dataset, "algorithm": algorithm, "hparams": HPARAMS, "output_dir": "o/x", **seeds, **more}
    return SimpleNamespace(train_args=args, state=state)


def options(**more):
    return Namespace(**{"workers": 2, "threads": None, "no_calibration": False, **more})


def cells(text):
    """The table's cells by row and dataset."""
    lines = [re.split("  +", line) for line in text.splitlines()]
    return {(line[0], line[1]): line[2:] for line in lines if len(line) == 10}


def test_plan(capsys, tmp_path):
    """For real: one kind that can be timed, one that can't, and one of which all is done."""
    jobs = [job(Job.DONE, steps=3), job(steps=3, test_envs=[1]), job(Job.DONE, algorithm="IRM", steps=2)]
    jobs.append(job(Job.INCOMPLETE, "PACS", steps=4, data_dir=str(tmp_path)))
    assert sweep_plan.plan(options(), jobs) == 0
    out = capsys.readouterr().out
    found = cells(out)
    assert found["ERM steps=3", "Debug28"][:3] == ["2", "1", "3"]
    assert found["IRM steps=2", "Debug28"] == ["1", "0", "2", "-", "2", "-", "-", "-"]
    assert found["ERM steps=4", "PACS"] == ["1", "1", "4", "-", "2", "-", "-", "-"]
    assert "-" not in found["ERM steps=3", "Debug28"]
    assert "4 jobs: 2 done, 2 to do, 7 steps.\n" in out
    assert "with 2 at a time (--workers). Timed on " in out
    assert "Left out of the hours, 1 jobs: ERM steps=4 on PACS: not known: " in out


def test_plan_without_timing(capsys, monkeypatch):
    monkeypatch.delattr(torch_process, "ask")
    assert sweep_plan.plan(options(no_calibration=True), [job(steps=3), job(algorithm="IRM", epochs=2)]) == 0
    out = capsys.readouterr().out
    assert cells(out)["ERM steps=3", "Debug28"] == ["1", "1", "3", "-", "2", "-", "-", "-"]
    assert out.endswith("\n2 jobs: 0 done, 2 to do, 3 steps, without those of 1 jobs.\n")


def test_budgets_are_lines_of_their_own(capsys):
    """No sample of a row's budgets is timed for another one, whose minibatches may be others."""
    given = [{}, {"annotation_budget": 0.0, "validation_budget": 0.0}, {"annotation_budget": 0.05}]
    sweep_plan.plan(options(no_calibration=True), [job(steps=3, **budgets) for budgets in given for _ in range(2)])
    found = cells(capsys.readouterr().out)
    assert {row: cell[:3] for (row, _), cell in found.items() if row.startswith("ERM")} == {
        "ERM": ["2", "2", "3"],
        "ERM budget=0.0 val_budget=0.0": ["2", "2", "3"],
        "ERM budget=0.05": ["2", "2", "3"],
    }


def test_questions(monkeypatch, capsys):
    """Each kind is asked for once, with its name, some of its draws, and the threads that a job has."""
    asked = []

    def ask(*question):
        asked.append(question)
        timing = {"steps": 7, "checkpoint_freq": 7, "step_s": 3600.0, "evaluation_s": 0.0, "start_s": 0.0}
        return {"device": "abacus", "import_s": 2.5, "kinds": [timing, {"reason": "why not"}]}

    monkeypatch.setattr(torch_process, "ask", ask)
    jobs = [job(hparams_seed=h) for h in range(150)] + [job(algorithm="IRM", hparams_seed=h) for h in range(2)]
    jobs.append(job(dataset="PACS", data_dir="nowhere"))
    sweep_plan.plan(options(threads=2, workers=150), jobs)
    [(module, question, environment)] = asked
    assert module == calibrate.__name__
    assert environment == {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    seeds = [[args["hparams_seed"] for args in kind["draws"]] for kind in question["kinds"]]
    assert seeds == [list(range(0, 150, 8)), [0, 1]]
    assert [kind["name"] for kind in question["kinds"]] == ["ERM on Debug28", "IRM on Debug28"]
    out = capsys.readouterr().out
    assert "1,050.00 hours of jobs, one after the other; about 7.0 h with 150 at a time" in out
    assert "Timed on abacus, 2 CPU threads a job; the start of Python and torch, 2.5 s a job, comes on top." in out
    assert "2 jobs: IRM on Debug28: not known: why not" in out
    assert "1 jobs: ERM on PACS: not known: --data_dir nowhere is no directory" in out


def test_timing_that_fails_as_a_whole(monkeypatch):
    monkeypatch.setattr(torch_process, "ask", lambda *_: (_ for _ in ()).throw(torch_process.Failed("status 1")))
    with pytest.raises(BadInput, match="could not be timed: status 1; --no_calibration plans without hours"):
        sweep_plan.plan(options(), [job()])


def test_the_typical_draw_is_that_of_the_mean_batch_size():
    draws = [job(hparams=f'{{"batch_size": {size}}}').train_args for size in (8, 16, 24, 512)]
    args, hparams = calibrate.typical(draws)
    assert hparams["batch_size"] == 24  # 140 is the mean
    assert args["partition"] == "environment"


def test_what_timing_finds():
    """Steps and cadence as the run itself would have them, also where only the data tell."""
    found = calibrate.timing([job(epochs=2, hparams='{"batch_size": 4, "patience": 3}').train_args])
    timing = plans.Timing(**found)
    # Debug28 has 16 images an environment, 20 % of them held out: two environments of 13 are trained on
    assert (timing.steps, timing.checkpoint_freq) == (2 * math.ceil(26 / 8), math.ceil(26 / 8))
    assert timing.stops_early
    assert not timing.extrapolated
    assert min(timing.step_s, timing.evaluation_s, timing.start_s) > 0


class Clock:
    """A clock that goes on only where work is done."""

    now = 0.0

    def __call__(self):
        return self.now


class Worker:
    """An algorithm of which every update takes so long, but the first."""

    def __init__(self, clock, first, seconds):
        self.clock, self.next, self.seconds, self.updates = clock, first, seconds, 0

    def update(self, minibatches, unlabeled=None):
        self.clock.now += self.next
        self.next, self.updates = self.seconds, self.updates + 1
        return {"loss": 0.0}


@pytest.mark.parametrize(
    ("first", "seconds", "expected", "updates"),
    [
        (9.0, 1.0, 9.0, 1),
        (1.0, 2.0, 2.0, 4),
        (0.5, 0.25, 0.25, 4),
        (0.5, 0.125, 0.125, 6),
        (0.0, 2.0**-20, 2.0**-20, 201),
    ],
)
def test_seconds_of_an_update(monkeypatch, first, seconds, expected, updates):
    clock = Clock()
    monkeypatch.setattr(training.time, "perf_counter", clock)
    worker = Worker(clock, first, seconds)
    plan = training.Plan(5, 1, 1.0, [], 2, 1)
    run = SimpleNamespace(
        algorithm=worker,
        stages=[SimpleNamespace(minibatches=lambda odds: iter(lambda: [], None))],
        unlabeled=None,
        plan=plan,
        device=calibrate.train_building.device(),
    )
    assert calibrate.step_seconds(run) == expected
    assert worker.updates == updates


@pytest.mark.parametrize(
    ("each", "total", "expected", "extrapolated", "seen"),
    [
        (0.01, 100, 1.0, False, [50, 100]),  # the first split is smaller than the first part
        (0.01, 2000, 20.0, True, [64, 256]),  # 2.56 s for 256 images are enough to tell
        (1.0, 2000, 2000.0, True, [64]),
        (0.002, 10000, 20.0, True, [64, 256, 1024]),
    ],
)
def test_seconds_of_an_evaluation(monkeypatch, each, total, expected, extrapolated, seen):
    clock, images = Clock(), []

    def evaluate(algorithm, splits, *_):
        images.append(sum(map(len, splits)))
        clock.now += each * images[-1]

    monkeypatch.setattr(calibrate.time, "perf_counter", clock)
    monkeypatch.setattr(calibrate.evaluation, "evaluate", evaluate)
    splits = [calibrate.training.Split(e, "in", None, np.arange(total // 2), e) for e in (0, 1)]
    run = SimpleNamespace(algorithm=None, plan=training.Plan(5, 1, 1.0, splits, 2, 1), device=None)
    found = calibrate.evaluation_seconds(run)
    assert found == (pytest.approx(expected), extrapolated)
    assert images == seen
