import subprocess
import sys

CODE = """
import threading, outdated
asked = []
outdated.check_outdated = lambda *question: asked.append(question) or (False, "")
{}
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join(20)
print(len(asked))
"""


def questions(statement: str) -> int:
    """How often wilds asks for its newest release while the statement runs."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE.format(statement)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_importing_wilds_asks_nobody() -> None:
    assert questions("from domainbed.datasets.wilds import import_wilds; import_wilds()") == 0


def test_the_question_that_is_silenced_exists() -> None:
    assert questions("import wilds") == 1
