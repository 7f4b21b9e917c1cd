import pytest

from domainbed import overrides


def test_overrides():
    assert overrides.parse(None) == {}
    assert overrides.parse("") == {}
    assert overrides.parse('{"lr": 0.1, "backbone": "x"}') == {"lr": 0.1, "backbone": "x"}


@pytest.mark.parametrize("text", ["lr=0.1", "[1]", "{'lr': 1}", "3"])
def test_other_texts_are_no_overrides(text):
    with pytest.raises(ValueError, match="JSON object like") as error:
        overrides.parse(text)
    assert str(error.value).endswith(text)
