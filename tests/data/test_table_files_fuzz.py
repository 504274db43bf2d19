"""Damaged files of text: every row is read, or an error of ours says where the damage is."""

import re
import warnings

import numpy as np
import pytest

from cnf.data.csv_files import to_csv
from cnf.data.table_files import read_table

FILES = 200
LINE_ENDS = re.compile(rb"\r\n|\r|\n")
CELL = re.compile(r" *[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})? *", re.ASCII)

PIECES = [
    *(
        b'"',
        b'""',
        b'"x"',
        b'"\n',
        b',"',
        b'",',
        b"\0",
        b"\r",
        b"\n",
        b"\r\n",
        b"\n\n",
        b" ",
        b"\t",
    ),
    *(b",", b";", b"#", b"# note, 1\n", b"-", b"+", b".", b"e", b"1e400", b"-1e39", b"nan", b"inf"),
    *(
        b"NA",
        b"NULL",
        b"?",
        b"9007199254740993",
        b"1" * 60,
        b"1" * 5000,
        b"1_0",
        b"0x1",
        b"\xef\xbb\xbf",
    ),
    *(
        b"\xff",
        b"\xfe",
        b"\xb5",
        b"\xc3\xa4",
        b"\xed\xa0\x80",
        b"\xe2\x80\xa8",
        b"\x0b",
        b"\x0c",
        b"\x1a",
    ),
    *(b"'", b"\\", b"$", b"%s", b"{}", "٢".encode(), "−1".encode()),  # noqa: RUF001 - a minus sign
]


def damaged(rng):
    """A small table as text, changed in up to two places."""
    columns = int(rng.integers(1, 4))
    values = rng.normal(size=(int(rng.integers(1, 6)), columns)).round(2)
    second = "b" if rng.random() < 0.8 else "b, or c"
    names = ["a", second, "d"][:columns] if rng.random() < 0.7 else None
    if names and rng.random() < 0.3:
        remarks = rng.choice(["red", "1,5", 'a "b"', "", "x; y"], (len(values), 1))
        values, names = np.hstack([values.astype(object), remarks]), [*names, "remark"]
    content = to_csv(values, names, delimiter=str(rng.choice([",", ";", "\t"]))).encode()
    for _ in range(rng.integers(0, 3)):
        start = int(rng.integers(0, len(content) + 1))
        end = start + int(rng.integers(0, 4)) * int(rng.random() < 0.5)
        piece = PIECES[rng.integers(len(PIECES))] if rng.random() < 0.8 else b""
        content = content[:start] + piece + content[end:]
    change = rng.random()
    if change < 0.05:
        return content.decode(errors="replace").encode("utf-16")
    if change < 0.1:
        return b"\xef\xbb\xbf" + content
    return content.replace(b"\n", b"\r\n") if change < 0.2 else content


def plain_rows(content, *, header):
    """The rows of a file without quotes that is surely well formed; None of another."""
    try:
        lines = [line for line in re.split(r"\r\n|\r|\n", content.decode("utf-8-sig")) if line]
    except UnicodeDecodeError:
        return None
    marks = {mark for mark in ",;\t" if mark in content.decode("utf-8-sig")}
    if len(marks) > 1 or any(sign in content for sign in b'"\0') or not lines:
        return None
    rows = [line.split(*marks) if marks else [line] for line in lines]
    body = rows[header:]
    names = [name.strip() for name in rows[0]] if header else range(len(rows[0]))
    well = bool(body) and len({len(row) for row in rows}) == 1 and len(set(names)) == len(names)
    if not well or "" in names or not all(CELL.fullmatch(cell) for row in body for cell in row):
        return None
    values = [[float(cell) for cell in row] for row in body]
    return values if np.abs(values).max() < 2**53 else None


def test_a_damaged_file_is_read_whole_or_refused_with_its_line(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "data.csv"
    outcomes = []
    for _ in range(FILES):
        content = damaged(rng)
        path.write_bytes(content)
        header = [None, True, False][rng.integers(3)]
        columns = ["a"] if rng.random() < 0.3 else None
        lines = sum(map(bool, LINE_ENDS.split(content.removeprefix(b"\xef\xbb\xbf"))))
        whole = header is not None and columns is None
        expected = plain_rows(content, header=header) if whole else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*line 1 holds numbers and was read as a row")
            try:
                table = read_table(path, columns, header=header)
            except ValueError as error:
                said = str(error)
                assert re.match(rf"{re.escape(str(path))}, (line|column) ", said), (said, content)
                assert "\n" not in said
                assert len(said) < 700
                assert expected is None, (said, content)
                outcomes.append("refused")
                continue
        headers = [0, 1] if header is None else [int(header)]
        assert lines - len(table.values) in headers, content
        assert np.isfinite(table.values).all()
        if expected is not None:
            assert table.values.tolist() == expected
            outcomes.append("surely right")
    assert min(outcomes.count("refused"), outcomes.count("surely right")) > FILES / 20


@pytest.mark.parametrize(
    "content", [b'"', b'""', b'"\n"', b"\r", b",", b"#", b"\xef\xbb\xbf", b"\n\0"]
)
@pytest.mark.parametrize("header", [None, True, False])
def test_almost_empty_files_are_refused(tmp_path, content, header):
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.csv, line \d"):
        read_table(path, header=header)
