from domainbed.paper_tables import paper_tables
from domainbed.table_formats import render


def record(algorithm="ERM", dataset="DigitsM2M", step=0, test=(0.5, 0.5), val=(0.5, 0.5), values=(), **args):
    """AA and WGA on test and validation in two equal groups, 0 and 1."""
    metrics = {}
    for split, (aa, wga) in {"env1_in": test, "env0_out": val}.items():
        metrics |= {f"{split}_acc": aa, f"{split}_wga": wga, f"{split}_g0_acc": wga, f"{split}_g1_acc": 2 * aa - wga}
        metrics |= {f"{split}_g0_n": 4, f"{split}_g1_n": 4}
    run = {"algorithm": algorithm, "dataset": dataset, "test_envs": [1], "trial_seed": 0, "hparams_seed": 0, "seed": 0}
    return {"args": run | args, "step": step, **metrics, **dict(values)}


# By hand: ERM by group has WGA 50, 62.5, 75 (sd 12.5); IRM ties with it in AA and is worse in WGA.
RECORDS = [
    *(record(trial_seed=t, partition="group", test=(0.75, wga)) for t, wga in enumerate((0.5, 0.625, 0.75))),
    *(record(trial_seed=t, partition="random", test=(0.5, 0.25)) for t in range(3)),
    record("IRM", test=(0.75, 0.5)),
    record("IRM", step=1, test=(1, 1), val=(0.5, 0.25)),  # never best on validation
    record("IRM", "Cats", test=(0.5, 0.125)),
]
TEXT = """
-------- Average (AA) and worst-group (WGA) accuracy by dataset, model selection: (AA + WGA) / 2 on validation
Percent; mean ± sample sd (ddof 1) over 3 seeds; (n=...) where fewer; X: none. \
Rows with unfinished runs are counted as they are.
Protocol: one draw of the hparams, trial_seed 0, 1, 2 (fixed or refit).
*: the best of its column; +: the second best.
Algorithm  Sampling       DigitsM2M AA   DigitsM2M WGA    Cats AA        Cats WGA
ERM        Random         50.00 ± 0.00 +   25.00 ± 0.00     X              X
ERM        Uniform Group  75.00 ± 0.00 *   62.50 ± 12.50 *  X              X
IRM        Uniform Env.   75.00 (n=1) *    50.00 (n=1) +    50.00 (n=1) *  12.50 (n=1) *
"""


def test_text_by_hand():
    lines = [line.split() for line in render(paper_tables(RECORDS), "text").split("\n")]
    assert lines == [line.split() for line in TEXT.split("\n")]


def test_latex_marks_the_best_and_the_second():
    text = render(paper_tables(RECORDS), "latex")
    assert r"\textbf{62.50 $\pm$ 12.50}" in text
    assert r"\underline{50.00 (n=1)}" in text


def test_nothing_without_groups():
    assert paper_tables([{"args": RECORDS[0]["args"], "step": 0, "env1_in_acc": 0.5}]) == paper_tables([]) == []
