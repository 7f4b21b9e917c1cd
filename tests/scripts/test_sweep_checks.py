"""What is checked before a launch, and the process that is asked."""

from types import SimpleNamespace

import pytest

from domainbed.scripts import BadInput, check_jobs, sweep_checks, torch_process


def job(dataset="Debug28", algorithm="ERM", test_envs=(0,), hparams_seed=0, trial_seed=0, seed=0, **more):
    seeds = {"hparams_seed": hparams_seed, "trial_seed": trial_seed, "seed": seed, "test_envs": list(test_envs)}
    args = {"dataset": dataset, "algorithm": algorithm, "output_dir": f"o/{seed}", **seeds, **more}
    return SimpleNamespace(train_args={key: value for key, value in args.items() if value is not None})


@pytest.fixture
def asked(monkeypatch):
    """The questions that were asked of another process; the answer is made in this one."""
    questions = []

    def ask(module, question):
        assert module == check_jobs.__name__
        questions.append(question)
        return [check_jobs.problem(args) for args in question]

    monkeypatch.setattr(torch_process, "ask", ask)
    return questions


def test_one_question_with_one_job_of_a_kind(asked):
    draws = [(h, t, e) for h in range(4) for t in range(3) for e in range(3)]
    jobs = [job(hparams_seed=h, trial_seed=t, test_envs=[e], seed=h + 7 * t + 99 * e) for h, t, e in draws]
    sweep_checks.check([*jobs, job(algorithm="IRM"), job(partition="random")])
    [question] = asked
    assert [(args["algorithm"], args["hparams_seed"]) for args in question] == [
        *[("ERM", 0), ("ERM", 1)],
        *[("IRM", 0), ("ERM", 0)],
    ]
    sweep_checks.check([])
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hparams": '{"lrr": 1}'}, "hparam of ERM not found: lrr; did you mean lr?"),
        ({"hparams": '{"lr": "x"}'}, "hparam lr is 'x'"),
        ({"ranges": '{"lrr": "U(0, 1)"}', "hparams_seed": 1}, "hparam of ERM on Debug28 to draw not found: lrr"),
        ({"ranges": '{"batch_size": "U(1, 2)"}', "hparams_seed": 1}, "hparam batch_size is 1"),
        ({"hparams": '{"patience": 0}'}, "patience 0"),
        ({"hparams": '{"backbone": "resnet5"}'}, "backbone not found: resnet5; did you mean resnet50"),
        ({"hparams": '{"backbone": "tim:x"}'}, "backbone not found: tim:x"),
        ({"confounders": ["a"]}, "Debug28 leaves no choice of --confounders"),
        ({"task": "domain_adaptation"}, "needs unlabelled images; give --uda_holdout_fraction 0.5"),
        ({"task": "domain_adaptation", "uda_holdout_fraction": 1.0}, "are fractions below 1"),
        ({"algorithm": "DANN", "partition": "random"}, "DANN compares at least 2 minibatches, partition random makes"),
        ({"steps": 0}, "--steps 0: give 1 or more"),
    ],
)
def test_what_no_job_can_run_with(asked, more, message):
    with pytest.raises(BadInput, match=r"nothing was launched, for some jobs can't run:\n  (ERM|DANN:random)") as error:
        sweep_checks.check([job(**more)])
    assert message in str(error.value)


def test_adaptation_may_run(asked):
    sweep_checks.check([job(task="domain_adaptation", uda_holdout_fraction=0.5)])


@pytest.mark.parametrize("hparams", ['{"backbone": "timm:x"}', '{"patience": 1, "lr": 1}', None])
def test_what_may_run(asked, hparams):
    sweep_checks.check([job(hparams=hparams)])


def test_a_problem_is_told_once(asked):
    impatient = job(hparams='{"patience": 0}')
    jobs = [job(dataset=d, hparams='{"lr": "x"}', hparams_seed=h) for d in ("Debug28", "DigitsM2M") for h in (0, 1)]
    with pytest.raises(BadInput) as error:
        sweep_checks.check([*jobs, job(), impatient])
    lines = str(error.value).splitlines()
    assert lines[1:] == [
        "  ERM lr=x on Debug28 and 1 more: hparam lr is 'x'; give a value like its default, 0.001",
        f"  ERM patience=0 on Debug28: {check_jobs.problem(impatient.train_args)}",
    ]


def test_directories(asked, tmp_path):
    here, nowhere = str(tmp_path), str(tmp_path / "nowhere")
    with pytest.raises(BadInput) as error:
        sweep_checks.check([job("PACS", seed=s, data_dir=nowhere, mask_dir=nowhere) for s in range(3)])
    assert str(error.value).splitlines()[1:] == [
        f"  --{flag} {nowhere} is no directory; name the one that holds the files" for flag in ("mask_dir", "data_dir")
    ]
    assert not asked
    sweep_checks.check([job("PACS", data_dir=here, mask_dir=here), job("Debug28", data_dir=nowhere)])


def test_another_process_checks_and_says_each_warning_once(capfd):
    """For real; and without torch here it would be no slower."""
    unread = '{"lr": 1.0}'
    bad = [job("DigitsM2M", "EX2L_MAE", hparams=unread), job("DigitsM2M", "EX2L_MAE", hparams=unread, hparams_seed=1)]
    with pytest.raises(BadInput, match="hparam of ERM not found: lrr"):
        sweep_checks.check([*bad, job(hparams='{"lrr": 1}')])
    out, err = capfd.readouterr()
    assert (out, err.count("EX2L_MAE does not read lr")) == ("", 1)


def test_a_process_that_fails(monkeypatch, tmp_path, capfd):
    (tmp_path / "broken.py").write_text("raise SystemExit('out of order')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(torch_process.Failed, match="python -m broken ended with exit status 1"):
        torch_process.ask("broken", 5)
    assert "out of order" in capfd.readouterr().err
    monkeypatch.setattr(torch_process, "ask", lambda *_: (_ for _ in ()).throw(torch_process.Failed("status 1")))
    with pytest.raises(BadInput, match="nothing was launched, for the jobs could not be checked: status 1"):
        sweep_checks.check([job()])


def test_what_is_printed_is_no_part_of_the_answer(tmp_path, monkeypatch, capfd):
    (tmp_path / "echo.py").write_text(
        "import os\nfrom domainbed.scripts import torch_process\n"
        "torch_process.answer(lambda question: print('noise') or [question, os.environ['OF_OURS']])"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert torch_process.ask("echo", {"a": [1]}, {"OF_OURS": "x"}) == [{"a": [1]}, "x"]
    assert capfd.readouterr() == ("", "noise\n")
