import io
import json
import logging
import re
import sys
import warnings
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_align.console import Screen, clock, count, library_log, rate, table
from lora_align.errors import inert
from lora_align.line_wrapping import Wrapper, cell_width
from support import Terminal


@given(st.text())
def test_inert_escapes_all_control_characters(text: str) -> None:
    shown = inert(text)
    assert not any(ord(c) < 0x20 and c not in "\n\t" for c in shown)
    assert not any(0x7F <= ord(c) < 0xA0 for c in shown)
    assert inert(shown) == shown


def test_inert_keeps_printable_text() -> None:
    text = "Grüße, 你好 [bold]not markup[/bold] <b>\n\ttab"
    assert inert(text) == text
    assert inert("\x1b[31mred\x07\u202e") == "\\x1b[31mred\\x07\\u202e"


EVIL = "\x1b[31mred\u202e \ud800 name"


def test_stdout_is_inert_for_results_tables_and_streams(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().result(EVIL, {})
    Screen().show(table(["name"], [[EVIL]]))
    with Screen().streaming() as show:
        show(EVIL)
    out = capsys.readouterr().out
    assert out.count("\\x1b[31mred\\u202e \\ud800 name\n") == 3
    assert not {"\x1b", "\u202e"} & set(out)


def test_json_on_stdout_is_inert_and_still_json(capsys: pytest.CaptureFixture[str]) -> None:
    data = {EVIL: [EVIL, "Grüße, 你好 \x85\x7f \t\n"]}
    Screen(as_json=True).result("", data)
    out = capsys.readouterr().out
    assert inert(out) == out
    assert "Grüße, 你好" in out
    assert json.loads(out) == data


def test_progress_names_are_inert() -> None:
    out = io.StringIO()
    with redirect_stderr(out), Screen().progress(EVIL, 2) as progress:
        progress.show(2, {EVIL: EVIL})
    assert out.getvalue().count("\\x1b[31mred\\u202e") == 3


def test_tables_align_with_wide_and_escaped_text() -> None:
    rows = [["你好", "x"], ["a\x1b", "y"], ["abcdefgh", "z"]]
    forged = table(["n", "m"], [["x\nmix/trusted", "1"]])
    assert forged.splitlines()[2:] == ["x\\nmix/trusted  1"], "a cell makes no line of its own"
    assert table(["n", "m"], rows).splitlines()[2:] == ["你好      x", "a\\x1b     y", "abcdefgh  z"]


words = st.text(st.sampled_from("ab c你\u0301 \n"), max_size=80)


@given(st.lists(words), st.integers(4, 30))
def test_streamed_lines_break_between_words(pieces: list[str], columns: int) -> None:
    lines, text = Wrapper(columns), "".join(pieces)
    shown = "".join([*map(lines.feed, pieces), lines.flush()])
    assert shown.replace(" ", "").replace("\n", "") == text.replace(" ", "").replace("\n", "")
    assert re.findall(r"[abc]+", shown) == re.findall(r"[abc]+", text)
    whole = Wrapper(columns)
    assert shown == whole.feed(text) + whole.flush()
    for line in shown.split("\n"):
        cells = sum(1 + (c == "你") - (c == "\u0301") for c in line.rstrip())
        assert cells <= columns or max(map(len, re.findall("[abc]+", line.replace("\u0301", "")))) > columns


SHOWN = """
import time
from lora_align.console import Screen
screen = Screen()
screen.warn("the first ten words " * 8 + "then `lora-align dpo --pref helpful --direction both` or "
            "/a/path/" + "long/" * 30 + "end of it " + "你好世界" * 30)
with screen.streaming() as show:
    for piece in ["The qui", "ck brown"] * 20:
        show(piece)
with screen.progress("helpful pos", 300) as progress:
    figures = {"loss": "0.693", "margin": "0.012", "accuracy": "0.500", "grad": "1.250", "tok/s": "12,345"}
    time.sleep(0.3)
    progress.show(100, figures)
    time.sleep(0.3)
    progress.show(101, figures)
    time.sleep(0.3)
with screen.progress("a name [red] " * 20, 300) as progress:
    progress.show(100, {})
"""


@pytest.mark.parametrize("columns", [80, 120])
def test_lines_fit_a_terminal_and_show_the_time_left(columns: int, tmp_path: Path) -> None:
    shown = Terminal(tmp_path, "-c", SHOWN, columns=columns, program=sys.executable).rest()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    lines = [line for line in re.split(r"[\r\n]+", plain) if line]
    too_long = [line for line in lines if len(line) + len(re.findall("[你好世界]", line)) > columns]
    assert [line.split(" ")[0] for line in too_long] == ["/a/path/" + "long/" * 30 + "end"]
    for whole in ("`lora-align dpo --pref helpful --direction both`", "ck brownThe quick brown"):
        assert whole in plain
    last = next(line for line in lines if "101/300" in line)
    assert re.search(r"101/300 .*/s loss 0\.693 margin 0\.012 .*\d:\d\d$", last.rstrip()), last
    assert ("accuracy" in last) == (columns == 120)
    assert any("a name [red] a name" in line and "…" in line and "100/300" in line for line in lines)


def test_pipes_get_unbroken_lines(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().warn("word " * 100)
    with Screen().streaming() as show:
        show("word " * 100)
    captured = capsys.readouterr()
    assert captured.err.count("\n") == captured.out.count("\n") == 1


def test_progress_prints_lines_without_a_terminal() -> None:
    out = io.StringIO()
    with redirect_stderr(out), Screen().progress("dpo", 2) as progress:
        progress.show(1, {"loss": "0.5"})
        progress.show(2, {"loss": "0.4"})
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"dpo  1/2  loss 0\.5  \d+/s  \d+ s left", lines[0])
    assert lines[1] == "dpo  2/2  loss 0.4"


def test_tables_clocks_and_rates_are_formatted() -> None:
    assert table(["a", "n"], [["x", "-1"], ["long", "20"]]).splitlines()[2:] == ["x     -1", "long  20"]
    assert table(["what", "found"], [["one", "1"], ["two", "a b c"], ["three", "2 of c"]]).splitlines()[2] == "one    1"
    assert table(["name"], []).splitlines() == ["name", "────"]
    assert [clock(s) for s in (5, 200, 7500, 259_000)] == ["5 s", "3 min 20 s", "2 h 05 min", "3 days"]
    assert [rate(s) for s in (0.004, 0.3125, 4.1)] == ["250/s", "3.2/s", "4.1 s each"]


def test_count_uses_the_singular_for_one() -> None:
    assert [count(n, "pair") for n in (0, 1, 2, 1024)] == ["0 pairs", "1 pair", "2 pairs", "1,024 pairs"]


def test_library_log_collects_records_and_warnings_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_tabs_count_as_several_columns() -> None:
    lines = Wrapper(20)
    shown = lines.feed("\tif x:\n\t\treturn alpha beta gamma\n") + lines.flush()
    assert max(len(line.expandtabs(8)) for line in shown.splitlines()) <= 20


def test_table_wraps_cells_to_the_width_and_keeps_intervals_whole() -> None:
    cells = ["0.88 (0.62 to 1.00)", "0.61 (0.35 to 0.85)", "demo:conversations?rows=3000&risky=0.25", "你好" * 15]
    columns, rows = ["", "a", "b", "c", "d"], [["oracle: harmless", *cells]]
    assert len(table(columns, rows).splitlines()) == 3, "a pipe has no width"
    lines = table(columns, rows, 110).splitlines()
    assert max(map(cell_width, lines)) <= 110
    assert all(interval in "\n".join(lines) for interval in ("(0.62 to 1.00)", "(0.35 to 0.85)"))
    assert "".join("".join(lines).split()).count("你") == 15
    assert table(columns, rows, 200) == table(columns, rows)
