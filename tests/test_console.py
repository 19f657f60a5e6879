import io
from contextlib import redirect_stderr

from hypothesis import given
from hypothesis import strategies as st

from lora_align.console import Screen, clock, inert, table


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
    assert lines[0].startswith("dpo  1/2  loss 0.5")
    assert lines[0].endswith("left")
    assert lines[1] == "dpo  2/2  loss 0.4"


def test_tables_and_clocks() -> None:
    assert table(["a", "n"], [["x", "-1"], ["long", "20"]]).splitlines()[2:] == ["x     -1", "long  20"]
    assert [clock(s) for s in (5, 200, 7500)] == ["5 s", "3 min 20 s", "2 h 05 min"]
