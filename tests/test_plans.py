"""What a sweep will take, from timings that are given."""

import re

import pytest

from domainbed import plans
from domainbed.plans import Kind, Timing


def job(algorithm="ERM", test_envs=(0,), hparams_seed=0, trial_seed=0, **more):
    seeds = {"hparams_seed": hparams_seed, "trial_seed": trial_seed, "seed": hash((hparams_seed, trial_seed))}
    return {"dataset": "Debug28", "algorithm": algorithm, "test_envs": list(test_envs), **seeds, **more}


def timed(jobs, seconds, to_do=None, algorithm="ERM", **more):
    """A kind of jobs of ten steps of which each takes so long."""
    to_do = jobs if to_do is None else to_do
    return Kind({(0, 0): job(algorithm, **more)}, jobs, to_do, Timing(10, 5, seconds / 10, 0.0, 0.0))


@pytest.mark.parametrize(("steps", "freq"), [(1, 1), (5, 1), (6, 5), (10, 5), (11, 5), (5001, 300), (3, 100)])
def test_records_are_counted_as_training_writes_them(steps, freq):
    written = [step for step in range(steps) if step % freq == 0 or step == steps - 1]
    assert plans.records(steps, freq) == len(written)


def test_seconds_of_a_job():
    assert Timing(11, 5, 2.0, 3.0, 100.0).job_s == 100 + 11 * 2 + 3 * 3


def test_kinds_differ_in_what_costs_time_and_not_in_seeds_or_in_which_environment_is_tested():
    args = [job(test_envs=[env], hparams_seed=h, trial_seed=t) for env in (0, 1) for h in (0, 1) for t in (0, 1)]
    args += [job(test_envs=[0, 1]), job(partition="group"), job(hparams='{"lr": 1}')]
    found = plans.kinds(args, [i < 3 for i in range(len(args))])
    assert [(kind.jobs, kind.to_do) for kind in found] == [(8, 5), (1, 1), (1, 1), (1, 1)]
    # the default draw is the same in every trial
    assert list(found[0].draws) == [(0, 0), (1, 0), (1, 1)]


def test_length_is_what_arguments_say_or_the_dataset(monkeypatch):
    assert plans.declared_length(job(steps=7, checkpoint_freq=3)) == (7, 3)
    assert plans.declared_length({**job(), "dataset": "PACS"}) == (5001, 300)
    assert plans.declared_length(job(epochs=2)) is None
    monkeypatch.setattr(plans.registry, "attribute", lambda *_: None)  # as of a dataset that is a CSV file
    assert plans.declared_length(job(steps=7)) is None


def test_hours():
    several = [timed(4, 1800, to_do=3), timed(2, 7200), Kind({(0, 0): job()}, 5, 5, reason="x")]
    assert plans.hours(several) == pytest.approx(3 * 0.5 + 2 * 2)
    assert plans.wall_hours(several, 2) == pytest.approx(5.5 / 2)
    assert plans.wall_hours(several, 100) == pytest.approx(2)  # the longest job


def test_table():
    one, other = timed(3, 60, to_do=2), timed(1, 300, test_envs=[0, 1])
    unknown = Kind({(0, 0): job("IRM", epochs=3)}, 1200, 1200)
    group = timed(1, 3 * 3600, partition="group")
    lines = plans.table([one, unknown, other, group]).splitlines()
    assert [re.split("  +", line) for line in lines[lines.index("Means over the jobs of a line.") + 1 :]] == [
        ["Row", "Dataset", "Jobs", "To do", "Steps", "s/step", "Records", "s/record", "A job", "To do in all"],
        ["ERM", "Debug28", "4", "3", "10", "12", "3", "0", "2.0 min", "7.0 min"],
        ["IRM epochs=3", "Debug28", "1,200", "1,200", "-", "-", "-", "-", "-", "-"],
        ["ERM:group", "Debug28", "1", "1", "10", "1,080", "3", "0", "3.0 h", "3.0 h"],
    ]


def test_summary_says_what_it_leaves_out():
    several = [timed(4, 1800, to_do=3), Kind({(0, 0): job("IRM", epochs=2, explain=5)}, 2, 2, reason="x")]
    several.append(Kind({(0, 0): job("CORAL")}, 1, 0))
    several[0].timing = Timing(10, 5, 180, 0, 0, extrapolated=True, stops_early=True)
    assert plans.summary(several, 3, "cpu") == (
        "7 jobs: 2 done, 5 to do, 30 steps, without those of 2 jobs.\n"
        "1.50 hours of jobs, one after the other; about 30.0 min with 3 at a time (--workers). Timed on cpu.\n"
        "Left out of the hours, 2 jobs: IRM epochs=2 on Debug28: not known: x\n"
        "Some evaluations are extrapolated from part of their images.\n"
        "Rows with a patience are counted with all their steps: an upper bound.\n"
        "What --explain takes is not counted.\n"
    )
    assert plans.summary(several, 3, None) == "7 jobs: 2 done, 5 to do, 30 steps, without those of 2 jobs.\n"


def test_what_is_left_out_for_one_reason_is_said_once():
    several = [Kind({(0, 0): job(name)}, 2, 2, reason="x") for name in ("ERM", "IRM", "MMD")]
    several += [Kind({(0, 0): job("CORAL")}, 2, 2, reason="y"), Kind({(0, 0): job("VREx")}, 2, 0)]
    assert plans.summary(several, 3, "cpu").splitlines()[1:] == [
        "Left out of the hours, 6 jobs: ERM and 2 more rows on Debug28: not known: x",
        "Left out of the hours, 2 jobs: CORAL on Debug28: not known: y",
    ]
