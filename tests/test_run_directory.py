import json
from pathlib import Path

import pytest

from domainbed import records, run_directory

ARGS = {"algorithm": "ERM", "seed": 0, "output_dir": "here", "partition": "random"}


def write(directory: Path, *lines: str) -> None:
    (directory / records.RESULTS_FILE).write_text("".join(lines))


def line(**args: object) -> str:
    return json.dumps({"step": 0, "args": ARGS | args}) + "\n"


def test_done_is_four_bytes(tmp_path: Path) -> None:
    assert not run_directory.is_done(tmp_path)
    run_directory.mark_done(tmp_path)
    assert (tmp_path / "done").read_bytes() == b"done"
    assert run_directory.is_done(tmp_path)


OWN = [[], [line()], [line(), line(), '{"torn": '], ['{"torn'], [line(output_dir="moved")]]


@pytest.mark.parametrize("content", OWN)
def test_own_directories(tmp_path: Path, content: list[str]) -> None:
    write(tmp_path, *content)
    run_directory.check_same_run(tmp_path, ARGS, {})


def test_a_foreign_run_is_named(tmp_path: Path) -> None:
    write(tmp_path, line(seed=1, precision="bf16"))
    differing = r"another run \(precision: 'bf16' there, None now; seed: 1 there, 0 now\).*--overwrite"
    with pytest.raises(ValueError, match=differing):
        run_directory.check_same_run(tmp_path, ARGS, {})


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "one\n", "two\n")
    with pytest.raises(ValueError, match="holds no run of ours"):
        run_directory.check_same_run(tmp_path, ARGS, {})


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match=r"--output_dir .* is a file"):
            run_directory.prepare(path)


def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # the tests may run as root, for whom everything is writable
    with pytest.raises(PermissionError, match="is not writable"):
        run_directory.prepare(tmp_path)


def test_a_file_is_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    place, before = tmp_path / "file", tmp_path / "before"
    for content in (b"one", b"two"):
        with run_directory.whole(place, keep_as=before) as file:
            file.write(content)
            assert place.exists() == (content == b"two")
    assert (place.read_bytes(), before.read_bytes()) == (b"two", b"one")
    with pytest.raises(TypeError), run_directory.whole(place) as file:
        file.writelines([b"three", "four"])  # type: ignore[list-item]  # fails in the middle
    assert place.read_bytes() == b"two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "file"]


def test_what_is_done_needs_no_snapshot(tmp_path: Path) -> None:
    for name in ("snapshot.pkl", "snapshot_previous.pkl", "failed", "model.pkl"):
        (tmp_path / name).write_text("")
    run_directory.mark_done(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "model.pkl"]


def test_clear_removes_results_only(tmp_path: Path) -> None:
    models = ["model.pkl", "model_best.pkl", "model_step5.pkl", "model.pkl.partial", "snapshot.pkl", "failed"]
    for name in ["done", "results.jsonl", *models, "out.txt", "mine.txt"]:
        (tmp_path / name).write_text("")
    run_directory.clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "out.txt"]


def test_what_domainbeds_records_lack_is_the_default(tmp_path: Path) -> None:
    (tmp_path / records.RESULTS_FILE).write_text(json.dumps({"args": {"algorithm": "ERM", "seed": 0}}) + "\n")
    run_directory.check_same_run(tmp_path, ARGS, {"partition": "random"})
    with pytest.raises(ValueError, match="partition: 'group' there, 'random' now"):
        run_directory.check_same_run(tmp_path, ARGS, {"partition": "group"})
