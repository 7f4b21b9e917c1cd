"""From the words of the command line to the hparams of a run."""

from typing import Any

import pytest

from domainbed.scripts.train_arguments import defaults, parser, resolve


def hparams(*words: str) -> dict[str, Any]:
    return resolve(vars(parser().parse_args(["--dataset", "Debug28", *words])))


def test_ranges_change_draws_and_nothing_else() -> None:
    ranges = ["--ranges", '{"lr": "10^U(-2, -1)", "resnet_dropout": [0.25]}']
    usual, drawn = hparams("--hparams_seed", "1"), hparams("--hparams_seed", "1", *ranges)
    assert 0.01 <= drawn["lr"] <= 0.1
    assert drawn == usual | {"lr": drawn["lr"], "resnet_dropout": 0.25}
    assert hparams(*ranges) == hparams()  # the defaults are no draw
    assert hparams("--hparams_seed", "1", *ranges, "--hparams", '{"lr": 3.0}')["lr"] == 3.0


def test_with_sgd_learning_rates_are_those_of_sgd() -> None:
    sgd = ["--hparams", '{"optimizer": "sgd"}']
    assert hparams(*sgd) == hparams() | {"lr": 1e-2, "optimizer": "sgd"}
    adams, drawn = hparams("--hparams_seed", "1"), hparams("--hparams_seed", "1", *sgd)
    assert drawn == adams | {"lr": drawn["lr"], "optimizer": "sgd"}
    assert drawn["lr"] == pytest.approx(adams["lr"] * 10**1.5)  # the same draw of a range that lies higher


def test_flags_of_ours_are_off_by_default() -> None:
    args = vars(parser().parse_args([]))
    assert (args["ranges"], args["epochs"]) == (None, None)
    resolve(args | {"dataset": "Debug28"})
    given = {key: args[key] for key in ("algorithm", "dataset", "ranges", "epochs", "steps")}
    assert defaults(given) == given
