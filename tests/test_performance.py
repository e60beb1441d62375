"""docs/performance.md is what the program says now, and calls its figures predictions."""

from __future__ import annotations

import re
from pathlib import Path

import performance
import pytest
from cards import PREDICTED
from performance import PAGE, PAGE_BYTES, PLOT, curves, digest, draw, page

ANEW = "write it anew: make performance"


def test_the_page_is_what_the_program_says() -> None:
    assert PAGE.read_text() == page(), ANEW


def test_the_plot_is_of_this_model() -> None:
    assert f"model {digest()}" in PLOT.read_text(), ANEW


def test_a_plot_tells_the_model_that_it_was_drawn_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not here")
    draw(tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert f"model {digest()}" in text
    for card in PREDICTED:
        assert f"{card.name}, store" in text
    before = digest()
    monkeypatch.setattr(performance, "ONE_JOB", performance.ONE_JOB // 2)
    assert digest() != before


def test_there_is_a_curve_for_each_path_and_the_limit_each_way_on_each_card() -> None:
    drawn = list(curves())
    assert len(drawn) == len(PREDICTED) * 2 * 4
    limits = {(card, way): speeds for card, way, name, speeds in drawn if name == "link"}
    for card, way, _, speeds in drawn:
        assert len(speeds) == len(PAGE_BYTES)
        limit = limits[card, way]
        assert all(0 < speed <= most for speed, most in zip(speeds, limit, strict=True))


def test_every_table_of_predictions_is_called_one() -> None:
    text = page().partition("## Predictions")[2]
    assert "**Every figure of this project on this page is a prediction.**" in page()
    tables = re.split(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)[:-1]
    links = {card.link for card in PREDICTED}
    assert len(tables) == 3 * len(links)
    assert text.count("Predicted tables: those of") == len(PREDICTED) - len(links)
    assert all("Predicted" in words for words in tables)


def test_it_prints_and_writes_what_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(performance, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(performance, "PLOT", tmp_path / "plot.svg")
    monkeypatch.setattr("sys.argv", ["performance.py", "--print"])
    assert performance.main() == 0
    assert capsys.readouterr().out == page()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(performance, "draw", lambda file: file.write_text("a plot"))
    monkeypatch.setattr("sys.argv", ["performance.py"])
    assert performance.main() == 0
    assert {file.name for file in tmp_path.iterdir()} == {"page.md", "plot.svg"}
