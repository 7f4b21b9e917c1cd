import subprocess
import sys

import pytest

from domainbed import registry
from domainbed.registry import Registry


def test_names_follow_the_literal_order_then_the_order_of_registration() -> None:
    known: Registry = Registry("thing", ("B", "A"))
    for name in ("Z", "A", "Y", "B"):
        known.register(type(name, (), {}))
    assert known.names == ["B", "A", "Z", "Y"]


def test_the_list_of_names_is_live() -> None:
    known: Registry = Registry("thing")
    names = known.names
    known.register(type("A", (), {}))
    assert names == ["A"]


def test_a_name_that_a_user_appended_is_no_entry() -> None:
    """DomainBed's users do, where they set a class on the module."""
    known: Registry = Registry("thing")
    entry = known.register(type("A", (), {}))
    known.names.append("Mine")
    assert list(known.items()) == [("A", entry)]


def test_a_name_is_registered_once() -> None:
    known: Registry = Registry("thing")
    known.register(type("A", (), {}))
    with pytest.raises(ValueError, match="thing registered twice: A"):
        known.register(type("A", (), {}))


def test_a_miss_is_explained() -> None:
    known: Registry = Registry("thing")
    known.register(type("GroupDRO", (), {}))
    with pytest.raises(
        NotImplementedError, match="thing not found: GroupDR0; did you mean GroupDRO\\? known: GroupDRO"
    ):
        known["GroupDR0"]


def test_attributes_are_inherited_and_defaulted_without_an_import() -> None:
    assert registry.attribute("datasets", "DigitsM2M", "TEST_ENVS") == (0,)
    assert registry.attribute("algorithms", "EX2L_MAE", "PARTITION") == "group"
    assert registry.attribute("algorithms", "ERM", "NO_SUCH", "default") == "default"


@pytest.fixture
def folder(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A package's folder of files that are only read."""
    (tmp_path / "things").mkdir()
    monkeypatch.setattr(registry, "_ROOT", tmp_path)
    registry._declared.cache_clear()
    yield tmp_path / "things"
    registry._declared.cache_clear()


def test_a_base_may_stand_in_a_later_file(folder) -> None:
    (folder / "base.py").write_text("class Base:\n    A = 1\n    B = 1\n")
    (folder / "one.py").write_text("@register\nclass One(Two):\n    B = 3\n")
    (folder / "two.py").write_text("class Two(Base):\n    A = 2\n    B = 2\n")
    assert registry.attribute("things", "One", "A") == 2
    assert registry.attribute("things", "One", "B") == 3


def test_a_base_from_elsewhere_is_really_imported(folder) -> None:
    (folder / "one.py").write_text("import elsewhere\n@register\nclass One(elsewhere.Two):\n    B = 3\n")
    with pytest.raises(ModuleNotFoundError, match=r"domainbed\.things"):
        registry.attribute("things", "One", "A")


def test_an_unknown_name_is_explained_after_a_real_import() -> None:
    with pytest.raises(NotImplementedError, match="did you mean DigitsM2M"):
        registry.attribute("datasets", "DigitsM2N", "TEST_ENVS")


def test_the_order_holds_all_of_domainbed() -> None:
    assert len(registry.order("algorithms")) == 34
    assert len(registry.order("datasets")) == 18


PLUGIN = """
from domainbed.algorithms.base import register
from domainbed.algorithms.erm import ERM

@register
class {}(ERM):
    PARTITION = "random"
"""


def test_plugins_are_imported_from_files_and_by_module_name(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.py").write_text(PLUGIN.format("FromFile"))
    (tmp_path / "two.py").write_text(PLUGIN.format("FromModule"))
    monkeypatch.setenv("DOMAINBED_PLUGINS", f"{tmp_path / 'one.py'}:two")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    asked = "[registry.attribute('algorithms', name, 'PARTITION') for name in ('FromFile', 'FromModule')]"
    code = f"from domainbed import registry; print({asked})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['random', 'random']"
