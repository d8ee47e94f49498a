"""`alisa serve` before it serves."""

import sys

import pytest

from alisa.cli.main import main


def test_without_the_extra_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "alisa.server.run", None)
    assert main(["serve"]) == 2
    assert "pip install 'alisa[server]'" in capsys.readouterr().err


def test_help_needs_no_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--help"])
    assert "--api-key" in capsys.readouterr().out
