import io
import logging
import re
import warnings
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_align.console import Screen, clock, inert, library_log, rate, table


@given(st.text())
def test_no_text_reaches_a_terminal_as_a_command(text: str) -> None:
    shown = inert(text)
    assert not any(ord(c) < 0x20 and c not in "\n\t" for c in shown)
    assert not any(0x7F <= ord(c) < 0xA0 for c in shown)
    assert inert(shown) == shown


def test_harmless_text_is_shown_as_it_is() -> None:
    text = "Grüße, 你好 [bold]not markup[/bold] <b>\n\ttab"
    assert inert(text) == text
    assert inert("\x1b[31mred\x07\u202e") == "\\x1b[31mred\\x07\\u202e"


def test_progress_away_from_a_terminal_is_lines() -> None:
    out = io.StringIO()
    with redirect_stderr(out), Screen().progress("dpo", 2) as progress:
        progress.show(1, {"loss": "0.5"})
        progress.show(2, {"loss": "0.4"})
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"dpo  1/2  loss 0\.5  \d+/s  \d+ s left", lines[0])
    assert lines[1] == "dpo  2/2  loss 0.4"


def test_tables_and_clocks() -> None:
    assert table(["a", "n"], [["x", "-1"], ["long", "20"]]).splitlines()[2:] == ["x     -1", "long  20"]
    assert table(["what", "found"], [["one", "1"], ["two", "a b c"], ["three", "2 of c"]]).splitlines()[2] == "one    1"
    assert table(["name"], []).splitlines() == ["name", "────"]
    assert [clock(s) for s in (5, 200, 7500)] == ["5 s", "3 min 20 s", "2 h 05 min"]
    assert [rate(s) for s in (0.004, 0.3125, 4.1)] == ["250/s", "3.2/s", "4.1 s each"]


def test_what_libraries_say_goes_to_a_file_made_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "not" / "there" / "log.txt"
    with library_log(log):
        logging.getLogger("somebody").warning("odd thing")
        warnings.warn("odder thing", stacklevel=1)
    assert "odd thing" in log.read_text()
    assert "odder thing" in log.read_text()
    assert capsys.readouterr().err == ""
    outer, inner = tmp_path / "outer.txt", tmp_path / "inner.txt"
    with library_log(outer):
        with library_log(inner):
            warnings.warn("inside", stacklevel=1)
        warnings.warn("after it", stacklevel=1)
    assert "inside" in inner.read_text()
    assert "after it" in outer.read_text()
    assert capsys.readouterr().err == ""
    (tmp_path / "file").write_text("")
    with library_log(tmp_path / "file" / "log.txt"):
        logging.getLogger("somebody").warning("odd thing")
    assert "cannot write" in capsys.readouterr().err
