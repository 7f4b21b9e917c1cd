"""``--help`` of every script, and of every command of those that have some."""

import importlib
from pathlib import Path

import pytest

import domainbed.scripts
from domainbed.scripts import figure, sweep

FOLDER = Path(domainbed.scripts.__file__).parent
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8"))
COMMANDS = [*(("sweep", verb) for verb in sweep.COMMANDS), *(("figure", kind) for kind in figure.KINDS)]


def help_of(script: str, *words: str) -> None:
    importlib.import_module(f"domainbed.scripts.{script}").main([*words, "--help"])


def test_the_scripts_are_found() -> None:
    assert {"train", "train_autolr", "sweep", "collect_results", "list_top_hparams", "save_images"} <= {*SCRIPTS}


@pytest.mark.parametrize(("script", "words"), [*((name, ()) for name in SCRIPTS), *((s, (c,)) for s, c in COMMANDS)])
def test_help_is_a_usage_line_and_exit_status_0(
    script: str, words: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as exit:
        help_of(script, *words)
    assert exit.value.code == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("usage: ")
    assert "--" in printed.out
    assert not printed.err
