"""Lines on consoles of any encoding."""

import io

import pytest

from fastdpo.system.console import print_line

TEXT = "Once ☃ yes 😀."


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "cp437"])
def test_a_character_that_the_console_lacks_is_replaced(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding))
    print_line(TEXT)
    print_line("plain é" if encoding != "ascii" else "plain")
    assert raw.getvalue().decode(encoding).splitlines()[0] == "Once ? yes ?."
    assert raw.getvalue().decode(encoding).splitlines()[1].startswith("plain")


def test_utf_8_is_left_as_it_is(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    print_line(TEXT)
    assert raw.getvalue().decode().rstrip("\r\n") == TEXT
