import json

import pytest

from domainbed import registry, rows
from domainbed.rows import Row, Run, for_domainbed, replicates, row_names, runs


def args(algorithm="ERM", dataset="Debug28", test_envs=(0,), trial_seed=0, hparams_seed=0, seed=0, **more):
    seeds = {"trial_seed": trial_seed, "hparams_seed": hparams_seed, "seed": seed}
    return {"algorithm": algorithm, "dataset": dataset, "test_envs": list(test_envs), **seeds, **more}


class TestRow:
    def test_what_changes_no_number_or_tells_runs_apart_is_left_out(self):
        places = {"data_dir": "/a", "output_dir": "/b", "skip_model_save": True, "keep_best": "aa_wga"}
        flags = {"overwrite": True, "save_model_every_checkpoint": True, "eval_splits": "selection"}
        other = args(dataset="VLCS", test_envs=[1], trial_seed=3, hparams_seed=4, seed=5, **places, **flags)
        assert Row.of(other) == Row.of(args()) == Row("ERM", "environment")

    def test_a_missing_argument_is_the_default(self):
        defaults = {
            "partition": None, "label": None, "precision": "fp32", "steps": None, "checkpoint_freq": None,
            "hparams": None, "task": "domain_generalization", "holdout_fraction": 0.2, "uda_holdout_fraction": 0.0,
            "annotation_budget": 1, "input_pipeline": "pil", "confounders": None, "epochs": None, "ranges": None,
            "validation_budget": 1.0,
        }  # fmt: skip
        assert Row.of(args(**defaults)) == Row.of(args(partition="environment", auto_lr=False)) == Row.of(args())

    @pytest.mark.parametrize(
        "setting",
        [
            {"partition": "random"}, {"label": "mine"}, {"precision": "bf16"}, {"steps": 300}, {"holdout_fraction": 0},
            {"hparams": '{"lr": 1}'}, {"task": "domain_adaptation"}, {"some_new_flag": [1, 2]},
            {"annotation_budget": 0.05}, {"annotation_budget": 0.0}, {"input_pipeline": "cv2"},
            {"confounders": ["sex"]}, {"epochs": 3}, {"ranges": '{"lr": "U(0, 1)"}'}, {"validation_budget": 0.0},
        ],
    )  # fmt: skip
    def test_every_other_setting_makes_another_row(self, setting):
        assert Row.of(args(**setting)) != Row.of(args())

    def test_hparams_are_compared_by_content(self):
        texts = ['{"lr": 0.1, "b": {"x": 1}}', '{"b":{"x":1},"lr":0.1}', {"lr": 0.1, "b": {"x": 1}}]
        assert len({Row.of(args(hparams=text)) for text in texts}) == 1
        assert Row.of(args(hparams="{}")) == Row.of(args())
        assert Row.of(args(hparams="no json")).name == "ERM hparams=no json"

    def test_ranges_are_compared_by_content(self):
        texts = ['{"lr": "U(0, 1)", "b": [1]}', '{"b":[1],"lr":"U(0, 1)"}', {"lr": "U(0, 1)", "b": [1]}]
        assert len({Row.of(args(ranges=text)) for text in texts}) == 1
        assert Row.of(args(ranges="{}")) == Row.of(args())
        assert Row.of(args(ranges=texts[0])).name == 'ERM ranges={"b": [1], "lr": "U(0, 1)"}'

    def test_the_partition_defaults_to_the_algorithms_own(self, monkeypatch):
        monkeypatch.setattr(registry, "attribute", lambda package, name, attribute, default: "group")
        row = Row.of(args())
        assert row == Row.of(args(partition="group"))
        assert (row.partition, row.name) == ("group", "ERM")
        assert Row.of(args(partition="random")).name == "ERM:random"

    @pytest.mark.parametrize("error", [NotImplementedError, ImportError])
    def test_an_algorithm_that_is_not_there_partitions_by_environment(self, monkeypatch, error):
        def attribute(*_):
            raise error

        monkeypatch.setattr(registry, "attribute", attribute)
        assert Row.of(args("Lost")) == Row("Lost", "environment")

    def test_alone_its_name_says_all(self):
        assert Row.of(args(steps=300, partition="random", hparams='{"lr": 0.1, "mode": "none"}')).name == (
            "ERM:random lr=0.1 mode=none steps=300"
        )
        assert Row.of(args(steps=300, label="mine")).name == "mine"


class TestRowNames:
    def names(self, *cells, partition=True):
        given = [[Row.of(args(**settings)) for settings in cell] for cell in cells]
        found = row_names(given, partition)
        return [[found[row] for row in cell] for cell in given]

    def test_what_all_share_is_not_said(self):
        shared = {"steps": 300, "hparams": '{"batch_size": 8}'}
        assert self.names([shared, {"algorithm": "IRM", **shared}]) == [["ERM", "IRM"]]

    def test_what_varies_is_said_unless_it_is_the_default(self):
        settings = [{"steps": 300}, {"hparams": '{"lr": 1, "b": 2}'}, {}, {"partition": "random"}]
        assert self.names(settings) == [["ERM steps=300", "ERM b=2 lr=1", "ERM", "ERM:random"]]
        both = [{"hparams": '{"lr": 1, "b": 2}'}, {"hparams": '{"lr": 3, "b": 2}'}]
        assert self.names(both) == [["ERM lr=1", "ERM lr=3"]]

    def test_rows_that_never_meet_may_share_a_line(self):
        chosen = [{"hparams": '{"lr": 1}'}], [{"hparams": '{"lr": 2}'}]
        assert self.names(*chosen) == [["ERM"], ["ERM"]]
        assert self.names(*chosen, [*chosen[0], *chosen[1]]) == [["ERM lr=1"], ["ERM lr=2"], ["ERM lr=1", "ERM lr=2"]]

    def test_a_label_is_the_name(self):
        assert self.names([{"label": "a", "steps": 3}, {}], [{"label": "a", "steps": 4}]) == [["a", "ERM"], ["a"]]

    def test_rows_that_meet_under_one_label_are_told_apart(self):
        cell = [{"label": "a", "steps": 3}, {"label": "a", "steps": 4}, {"label": "b"}]
        assert self.names(cell) == [["a (ERM steps=3)", "a (ERM steps=4)", "b"]]

    def test_a_label_that_is_another_rows_name_is_told_apart(self):
        plain, labelled = Row.of(args()), Row.of(args(partition="random", label="ERM"))
        names = row_names([{plain, labelled}])
        assert names == {plain: "ERM", labelled: "ERM (ERM:random)"}

    def test_an_annotation_budget_is_always_stated(self):
        budget = {"annotation_budget": 0.05}
        assert Row.of(args(**budget, steps=3)).name == "ERM budget=0.05 steps=3"
        assert Row.of(args(**budget, steps=3, label="mine")).name == "mine budget=0.05"
        shared = [{**budget, "steps": 3}, {**budget, "steps": 3, "algorithm": "IRM"}, {**budget, "label": "mine"}]
        assert self.names(shared[:2]) == [["ERM budget=0.05", "IRM budget=0.05"]]
        assert self.names(shared[2:]) == [["mine budget=0.05"]]
        assert self.names([budget, {**budget, "annotation_budget": 0}, {}, {"annotation_budget": 1.0}]) == [
            ["ERM budget=0.05", "ERM budget=0", "ERM", "ERM"]
        ]
        assert len(self.names([{**budget, "algorithm": "EX2L_MAE"}])[0][0]) == 20  # DomainBed's tables cut there

    def test_a_validation_budget_is_always_stated(self):
        budgets = {"annotation_budget": 0.05, "validation_budget": 0.0}
        assert self.names([budgets, {"validation_budget": 0.2, "label": "mine"}]) == [
            ["ERM budget=0.05 val_budget=0.0", "mine val_budget=0.2"]
        ]

    def test_labelled_rows_of_other_budgets_need_no_more(self):
        cell = [{"label": "a", "annotation_budget": 0.1}, {"label": "a", "annotation_budget": 0.2}, {"label": "a"}]
        assert self.names(cell) == [["a budget=0.1", "a budget=0.2", "a"]]
        same = [{"label": "a", "annotation_budget": 0.1, "steps": n} for n in (3, 4)]
        assert self.names(same) == [[f"a (ERM budget=0.1 steps={n})" for n in (3, 4)]]

    def test_pipelines_and_confounders_are_said_where_they_vary(self):
        cell = [{"input_pipeline": "cv2"}, {"confounders": ["sex", "age"]}, {}]
        assert self.names(cell) == [["ERM input_pipeline=cv2", 'ERM confounders=["sex", "age"]', "ERM"]]
        assert self.names(cell[:1]) == [["ERM"]]

    def test_beside_a_column_of_partitions(self):
        cell = [{"partition": "random"}, {"partition": "group"}, {}, {"partition": "group", "steps": 3}]
        assert self.names(cell, partition=False) == [["ERM", "ERM", "ERM", "ERM steps=3"]]
        labels = [{"label": "a"}, {"label": "a", "partition": "random"}]
        assert self.names(labels, partition=False) == [["a", "a"]]
        assert self.names(labels) == [["a (ERM)", "a (ERM:random)"]]


def test_replicates_rank_the_seeds_of_a_draw():
    search = [Run.of(args(hparams_seed=draw, seed=90 - draw)) for draw in range(3)]
    again = [Run.of(args(trial_seed=1, seed=seed)) for seed in (42, 8, 777)]
    found = replicates([*search, *again])
    assert [found[run] for run in search] == [0, 0, 0]
    assert [found[run] for run in again] == [1, 0, 2]


def test_runs_gather_records_of_equal_arguments_wherever_they_lie():
    records = [
        {"args": args(output_dir="a"), "step": 0},
        {"args": args(seed=1), "step": 0},
        {"args": args(output_dir="b"), "step": 1},
    ]
    assert list(runs(records).values()) == [[records[0], records[2]], [records[1]]]
    assert [run.cell for run in runs(records)] == [("Debug28", (0,))] * 2


def test_for_domainbed_names_the_rows_and_numbers_the_trials():
    given = [args(partition="random", seed=7), args(partition="random", seed=5), args()]
    records = [{"args": args, "step": step} for step, args in enumerate(given)]
    before = json.dumps(records)

    renamed, algorithms = for_domainbed(records)

    changed = [(record["args"]["algorithm"], record["args"]["trial_seed"], record["step"]) for record in renamed]
    assert changed == [("ERM:random", (0, 1), 0), ("ERM:random", (0, 0), 1), ("ERM", (0, 0), 2)]
    assert algorithms == {"ERM:random": "ERM", "ERM": "ERM"}
    assert json.dumps(records) == before


def test_defaults_are_those_of_the_train_script():
    from domainbed.scripts import train_arguments

    parsed = vars(train_arguments.parser().parse_args([]))
    assert {key: parsed[key] for key in rows.DEFAULTS} == rows.DEFAULTS
    assert Row.of(parsed) == Row("ERM", "environment")


def test_algorithms_come_in_the_order_of_their_appearance():
    names = [f"Plugin{i}" for i in (5, 2, 9, 1, 7, 3, 8)]
    args = {"dataset": "Debug28", "test_envs": [0], "trial_seed": 0, "hparams_seed": 0, "seed": 0}
    records = [{"step": 0, "hparams": {}, "args": args | {"algorithm": name}} for name in names]
    assert list(for_domainbed(records)[1]) == names


def test_rows_that_meet_keep_the_order_of_their_runs():
    algorithms = [f"Unheard{i}" for i in (5, 3, 9, 1, 7, 2, 8, 0, 6, 4)]
    met = rows.meeting(Run.of(args(algorithm=name)) for name in algorithms)
    assert list(row_names(met.values()).values()) == algorithms
