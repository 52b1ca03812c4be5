"""metrics.csv: reading it, and continuing a damaged one."""

import pytest

from utils.errors import UserError
from utils.records.metrics_file import MetricsFile, required_columns
from utils.records.run_folder import read_metrics

COLUMNS = required_columns(())
HEADER = ",".join(COLUMNS)
ROWS = [f"{step},0.5,0.25,100,{10 * step},0.5,0.25" for step in (2, 4, 6, 8)]
WHOLE = "\r\n".join([HEADER, *ROWS, ""]).encode()
# Content of a file, the steps of the rows up to step 6 that are kept, and what the message says.
DAMAGES = {
    "empty": (b"", [], "line 1 has no column step"),
    "truncated within a number": (WHOLE[:-3], [2, 4, 6], "its last line is incomplete"),
    "truncated after a line": (WHOLE[: WHOLE.index(b"8,0.5") - 1], [2, 4], "its last line is incomplete"),
    "truncated within a line": (WHOLE[: WHOLE.index(b"6,0.5") + 5], [2, 4], "its last line is incomplete"),
    "garbage": (bytes(range(256)) * 4, [], "line 1 has no column step"),
    "garbage in a line": (WHOLE.replace(b"4,0.5", b"4,\xff\x80"), [2, 6], "line 3 is not a step and its numbers"),
    "NUL": (WHOLE.replace(b"4,0.5", b"\0\0\0\0\0"), [2, 6], "line 3 is not a step and its numbers"),
    "NULs at the end": (WHOLE + bytes(4096), [2, 4, 6], "its last line is incomplete"),
    "no step": (WHOLE.replace(b"step", b"time"), [], "line 1 has no column step"),
    "text": (WHOLE.replace(b"4,0.5", b"4,much"), [2, 6], "line 3 is not a step and its numbers"),
    "a step that is not whole": (WHOLE.replace(b"\n4,", b"\nnan,"), [2, 6], "line 3 is not a step and its numbers"),
    "a long line": (WHOLE.replace(b"4,0.5", b"4,0.5,1"), [2, 6], "line 3 is not a step and its numbers"),
    "a long cell": (WHOLE.replace(b"4,0.5", b"4," + b"1" * 200_000), [2, 6], "line 3 is not a step and its numbers"),
    "a quote": (WHOLE.replace(b"4,0.5", b'4,"0.5'), [2, 6], "line 3 is not a step and its numbers"),
}


@pytest.mark.parametrize("content, kept, damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_kept_and_its_readable_rows_continue(content, kept, damage, tmp_path, capsys):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    file = MetricsFile(path, first_step=6)
    file.write()
    copy = tmp_path / "metrics-damaged.csv"
    assert copy.read_bytes() == content
    assert capsys.readouterr().out == (
        f"warning: {path} is damaged ({damage}); kept as {copy}, {len(kept)} of its rows remain\n"
    )
    assert read_metrics(tmp_path).get("step", []) == kept
    file.add(dict.fromkeys(COLUMNS, 1) | {"step": 8})
    file.write()
    assert read_metrics(tmp_path)["step"] == [*kept, 8]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content, kept, damage", DAMAGES.values(), ids=DAMAGES)
def test_reading_a_damaged_file_is_an_error_of_one_line(content, kept, damage, tmp_path):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"metrics.csv is damaged: it needs numbers in the columns step, .*{damage}$"):
        read_metrics(tmp_path)


def test_a_second_damaged_file_does_not_replace_the_first(tmp_path):
    for content in (b"first", b"second", b"third"):
        (tmp_path / "metrics.csv").write_bytes(content)
        MetricsFile(tmp_path / "metrics.csv", first_step=6).write()
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert kept == {
        "metrics-damaged.csv": b"first",
        "metrics-damaged-2.csv": b"second",
        "metrics-damaged-3.csv": b"third",
    }


def test_a_damaged_file_that_can_not_be_renamed_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"damaged")
    file = MetricsFile(path, first_step=6)
    file.add(dict.fromkeys(COLUMNS, 1))

    def rename(*_):
        raise PermissionError

    with monkeypatch.context() as broken:
        broken.setattr(type(path), "rename", rename)
        with pytest.raises(PermissionError):
            file.write()
    assert path.read_bytes() == b"damaged"
    file.write()
    assert read_metrics(tmp_path)["step"] == [1]
    assert (tmp_path / "metrics-damaged.csv").read_bytes() == b"damaged"


def test_whole_files_are_not_damaged(tmp_path, capsys):
    """Also one that a spreadsheet has saved: other line breaks, a byte order mark, blank lines."""
    path = tmp_path / "metrics.csv"
    for content in (WHOLE, WHOLE.replace(b"\r", b""), b"\xef\xbb\xbf" + WHOLE, WHOLE + b"\r\n"):
        path.write_bytes(content)
        assert read_metrics(tmp_path)["step"] == [2, 4, 6, 8]
        file = MetricsFile(path, first_step=6)
        file.write()
        assert read_metrics(tmp_path)["step"] == [2, 4, 6]
    MetricsFile(path, first_step=1).write()
    assert read_metrics(tmp_path) == {}
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_can_not_be_read_is_damaged(tmp_path, capsys):
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(UserError, match="it can't be read: Is a directory$"):
        read_metrics(tmp_path)
    MetricsFile(tmp_path / "metrics.csv", first_step=6).write()
    assert "metrics.csv is damaged (it can't be read: Is a directory); kept as " in capsys.readouterr().out
