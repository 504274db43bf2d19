"""Tables: what is written is read, in any form, and each defect is named by line and column."""

import csv
import itertools
import json
import sys

import numpy as np
import pytest

from cnf.data.csv_files import to_csv
from cnf.data.table_files import (
    Table,
    check_for_training,
    read_table,
    warn_of_fill_values,
    write_table,
)

FLOAT32_MAX = float(np.finfo(np.float32).max)


def file_of(folder, content, name="data.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".npy"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", [(7, 3), (1, 1), (5, 1), (1, 4)], ids=str)
def test_what_is_written_is_read_to_the_last_bit(tmp_path, suffix, dtype, shape):
    rng = np.random.default_rng(0)
    values = (rng.normal(size=shape) * 10.0 ** rng.integers(-30, 30, shape)).astype(dtype)
    names = tuple("abcdef"[: shape[1]])
    path = tmp_path / f"table{suffix}"
    write_table(path, values, names)
    table = read_table(path)
    assert table.values.dtype == np.float64
    assert (table.values.astype(dtype) == values).all()
    assert table.columns == (("x1", "x2", "x3", "x4")[: shape[1]] if suffix == ".npy" else names)


def test_text_is_short(tmp_path):
    for dtype in (np.float32, np.float64):
        write_table(tmp_path / "t.csv", np.array([[0.1, 2.0]], dtype))
        assert (tmp_path / "t.csv").read_text() == "0.1,2.0\n"
    write_table(tmp_path / "t.csv", np.array([[1, 2]]), ["a,b", "c"])
    assert (tmp_path / "t.csv").read_text() == '"a,b",c\n1,2\n'


EXPECTED = [[1.5, -2.0], [3e5, 4.0]]


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("a,b\n1.5,-2\n3e5,4\n", ("a", "b")),
        ("a,b\r\n1.5,-2\r\n3e5,4\r\n", ("a", "b")),
        ("a,b\n1.5,-2\n3e5,4", ("a", "b")),
        ("a;b\n1.5;-2\n3e5;4\n", ("a", "b")),
        ("a\tb\n1.5\t-2\n3e5\t4\n", ("a", "b")),
        ("width, m;b\n1.5;-2\n3e5;4\n", ("width, m", "b")),
        ('"a","b"\n"1.5","-2"\n"3e5",4\n', ("a", "b")),
        ('"a, or ""A""","b; B"\n1.5,-2\n3e5,4\n', ('a, or "A"', "b; B")),
        (" a , b \n 1.5 , -2 \n 3e5 ,+4.\n", ("a", "b")),
        ("\n\na,b\n\n1.5,-2\n\n\n3e5,4\n\n", ("a", "b")),
        ("\ufeffa,b\n1.5,-2\n3e5,4\n", ("a", "b")),
        ("\r\n1.5,-2\r3e5,4\r\n", ("x1", "x2")),
        ("\ufeff1.5,-2\n3e5,4\n", ("x1", "x2")),
        ("größe,b#\n1.5,-2\n3e5,4\n", ("größe", "b#")),
        ("# a,b\n1.5,-2\n3e5,4\n", ("a", "b")),
        ("#a,b\n1.5,-2\n3e5,4\n", ("a", "b")),
        ("\n ## a , b\n1.5,-2\n3e5,4\n", ("a", "b")),
        ("\ufeff# a;b\r\n1.5;-2\r\n3e5;4\r\n", ("a", "b")),
        ('# "a","b, B"\n1.5,-2\n3e5,4\n', ("a", "b, B")),
        ('"# a",b\n1.5,-2\n3e5,4\n', ("# a", "b")),
        ("#,b\n1.5,-2\n3e5,4\n", ("#", "b")),
        ("1.5,-2\n3e5,4\n", ("x1", "x2")),
        ("1.5\t-2\n3e5\t4\n", ("x1", "x2")),
    ],
)
def test_many_forms_of_text_are_the_same_table(tmp_path, content, columns):
    header = columns != ("x1", "x2")
    for known in (header,) if not header else (header, None):
        table = read_table(file_of(tmp_path, content), header=known)
        assert table.values.tolist() == EXPECTED
        assert table.columns == columns


@pytest.mark.parametrize("names", list(itertools.permutations("abc")), ids="".join)
def test_all_columns_come_in_the_order_asked_for(tmp_path, names):
    table = read_table(file_of(tmp_path, "a,b,c\n1,2,3\n4,5,6\n"), names)
    assert table.columns == names
    row = {"a": 1, "b": 2, "c": 3}
    assert table.values.tolist() == [
        [row[name] for name in names],
        [row[name] + 3 for name in names],
    ]


def test_columns_are_chosen_by_name_and_order_whatever_the_others_hold(tmp_path):
    path = file_of(tmp_path, 'name,a,b,note\nA,1,2,"x, y"\nB,3,4,\n')
    table = read_table(path, ["b", "a"])
    assert table.columns == ("b", "a")
    assert table.values.tolist() == [[2, 1], [4, 3]]
    assert read_table(path, ("a",)).values.tolist() == [[1], [3]]
    path = file_of(tmp_path, "1,2\n3,4\n")
    assert read_table(path, ["x2"], header=False).values.tolist() == [[2], [4]]


def test_a_row_alone_and_a_column_alone_are_tables(tmp_path):
    assert read_table(file_of(tmp_path, "a,b\n1,2\n")).values.tolist() == [[1, 2]]
    assert read_table(file_of(tmp_path, "a\n1\n2\n")).values.tolist() == [[1], [2]]


LATIN = "a,größe\n1,2\n".encode("latin-1")
LATER_LATIN = b"a,b\n" + b"1,2\n" * 5000 + b"1,2\xb5\n"

DEFECTS = {
    "empty": ("", r"line 1: .* the file is empty"),
    "blank": ("\n \n\n", r"line 1: .* the file is empty"),
    "numbered columns": (
        "0,1\n3,4\n5,6\n",
        r"line 1: .*0, 1 may be either.*header=True if it holds names",
    ),
    "years": ("name,2019\n3,4\n", r"line 1, column 'x1': .* got 'name'.*say so by header=True\."),
    "header only": ("a,b\n", r"line 2: must hold numbers; the file ends after the header"),
    "text": ("a,b\n1,2\n3,red\n", r"line 3, column 'b': must be a number; got 'red'"),
    "text in the first line": ("1,red\n2,3\n", r"line 1, column 'x2': .* got 'red'"),
    "long text": ("a\n" + "z" * 90 + "\n", r"line 2, column 'a': .* got 'z{40}…'"),
    "quoted text": ('a,b\n1,"x, y"\n', r"line 2, column 'b': .* got 'x, y'"),
    "after blank lines": (
        "\na,b\n\n1,2\n\n3,?\n",
        r"line 6, column 'b': .* got \?, which stands for a missing",
    ),
    "lines in a cell": ('"a\nA",b\n1,2\n3,4\n', r"line 1: must have quotes around whole cells"),
    "lines in a later cell": ('a,b\n1,"2\n"\n3,4\n', r"line 2: .*cannot hold a line break"),
    "quote within a cell": ('a,b\n1,2"\n', r"line 2: must have quotes .* got '1,2\"'"),
    "quote after a space": ('a,b\n1, "2"\n', r"line 2: must have quotes around whole cells"),
    "text after a quote": ('a,b\n1,"2"0\n', r"line 2: must have quotes around whole cells"),
    "decimal comma": ("a;b\n1,5;2\n", r"line 2, column 'a': .* got '1,5'.* by a point"),
    "spaces": ("a b\n1 2\n", r"line 2, column 'a b': .* got '1 2'. Separate cells by comma"),
    "comment": ("a,b\n1,2\n# 3,4\n", r"line 3, column 'a': .* got '# 3'.*grep -v '\^ \*#'"),
    "underscore": ("a,b\n1_0,2\n", r"line 2, column 'a': .* got '1_0'"),
    "foreign digits": ("a,b\n1,٢\n", r"line 2, column 'b': .* got '٢'"),
    "hexadecimal": ("a,b\n1,0x10\n", r"line 2, column 'b': .* got '0x10'"),
    "complex": ("a,b\n1,1j\n", r"line 2, column 'b': .* got '1j'"),
    "date": ("a,b\n1,2024-01-01\n", r"line 2, column 'b': .* got '2024-01-01'"),
    "empty cell": (
        "a,b\n1,2\n,4\n",
        r"line 3, column 'a': .* the cell is empty, a missing value. Fill it",
    ),
    "cell of spaces": ("a,b\n1,2\n3, \n", r"line 3, column 'b': .* the cell is empty"),
    "short line": ("a,b,c\n1,2,3\n4,5\n", r"line 3, column 2: .* of 3 cells.*the line has 2"),
    "long line": ("a,b\n1,2\n3,4,5\n", r"line 3, column 2: .* of 2 cells.*the line has 3"),
    "every line longer": ("a,b\n1,2,3\n4,5,6\n", r"line 2, column 2: .*the line has 3"),
    "line of text": ("a,b\n1,2\nend of file\n", r"line 3, column 1: .*the line has 1"),
    "NaN": (
        "a,b\n1,2\n3,NaN\n",
        r"line 3, column 'b': .*got NaN, which stands for a missing value",
    ),
    "inf": ("a,b\n1,2\n-inf,4\n", r"line 3, column 'a': must be a finite number; got -inf"),
    "beyond double": ("a\n1\n1e400\n", r"line 3, column 'a': .* finite number; got 1e400"),
    "beyond single": ("a\n1\n-4e38\n", r"line 3, column 'a': .* single precision; got -4e38"),
    "same name": ("a,b,a\n1,2,3\n", r"line 1, column 3: .* column 1 is called 'a' too"),
    "no name": (",a\n0,1\n", r"line 1, column 1: must have a name; .*index=False"),
    "UTF-16": ("a,b\n1,2\n".encode("utf-16"), r"line 1, column 1: must be UTF-8 .*iconv"),
    "UTF-16 without mark": ("a,b\n1,2\n".encode("utf-16-le"), r"line 1, column 1: .*UTF-16"),
    "latin-1": (LATIN, r"line 1, column 2: must be UTF-8 text; got the byte 0xf6.* LATIN1"),
    "latin-1 far down": (LATER_LATIN, r"line 5002, column 2: .*UTF-8 text; got the byte 0xb5"),
    "binary": (b"a,b\n\x00\x00\n", r"line 1, column 1: must be UTF-8"),
    "NUL": (b"a,b\n1,2\n3,\x004\n5,6\n", r"line 3: must be text; it holds a NUL"),
    "NUL far down": (b"a,b\n" + b"1,2\n" * 5000 + b"\x003,4\n", r"line 5002: .* holds a NUL"),
    "open quote": ('a,b\n1,"2\n3,4\n', r"line 2: must have quotes .* closed in its line"),
    "comment in front": ("# by A. B.\na,b\n1,2\n", r"line 2, .*grep -v '\^ \*#' data.csv"),
    "comment with commas": ("# 3,4\na,b\n1,2\n", r"line 1, .* got '# 3'.*grep -v"),
    "comment of one cell": ("# by A\n1,2\n", r"line 2, .*grep -v '\^ \*#' data.csv"),
    "comment after the header": ("a,b\n# c,d\n1,2\n", r"line 2, .* got '# c'.*grep -v"),
    "comment after a comment": ("# by A\n# a,b\n1,2\n", r"line 2, .*grep -v"),
    "comment with a quote": ('a,b\n# by "A"\n1,2\n', r"line 2: .*grep -v"),
    "only missing values": (
        "?,NA\n1,2\n",
        r"line 1: must be clearly names or a row of numbers; \?, NA may",
    ),
    "digits": ("a\n9007199254740993\n", r"line 2, column 'a': .*become 9007199254740992"),
    "digits, a point": (
        "a\n9007199254740993.00\n",
        r"line 2, column 'a': .* got 9007199254740993,",
    ),
    "more digits": ("a\n1\n-0123456789012345678901\n", r"line 3, column 'a': .* got -1234567890"),
}


@pytest.mark.parametrize(("content", "message"), DEFECTS.values(), ids=DEFECTS)
def test_a_defect_is_named_with_file_line_and_column(tmp_path, content, message):
    path = file_of(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        read_table(path)
    assert str(caught.value).startswith(f"{path}, line ")
    assert "\n" not in str(caught.value)


def test_only_chosen_columns_must_be_numbers_but_each_line_whole(tmp_path):
    path = file_of(tmp_path, "a,b,c\n1,2,x\n3,4,5,6\n")
    with pytest.raises(ValueError, match=r"line 3, column 3: must be the last of 3 cells"):
        read_table(path, ["a"])
    path = file_of(tmp_path, "a,b,c\n1,2,x\n3,y,z\n")
    with pytest.raises(ValueError, match=r"line 3, column 'b': .* got 'y'"):
        read_table(path, ["b"])


def test_a_cell_too_long_for_a_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be text of cells and lines"):
        read_table(file_of(tmp_path, "a\n" + "1" * (csv.field_size_limit() + 1) + "\n"))


def test_a_quote_left_open_in_a_column_of_text_swallows_no_rows(tmp_path):
    rows = [f"{i},name {i}\n" for i in range(100)]
    for wrong in ('3,"name 3\n', '3,name "3\n', '3,"name\n'):
        text = "a,b\n" + "".join([*rows[:3], wrong, *rows[4:60], '60,"name"\n', *rows[61:]])
        with pytest.raises(ValueError, match="line 5: must have quotes around whole cells only"):
            read_table(file_of(tmp_path, text), ["a"])
    good = "a,b\n" + "".join(rows).replace("name 7\n", '"name, ""7"""\n')
    assert read_table(file_of(tmp_path, good), ["a"]).values[:, 0].tolist() == list(range(100))


@pytest.mark.parametrize(
    "missing", ["", " ", "NULL", "NA", "na", "N/A", "#N/A", "None", "?", "-", ".", "nan", r"\N"]
)
def test_missing_values_are_named_as_such(tmp_path, missing):
    path = file_of(tmp_path, f"a,b\n1,2\n3,{missing}\n")
    with pytest.raises(ValueError, match=r"line 3, column 'b': must be a number; .*missing value"):
        read_table(path)


@pytest.mark.parametrize(
    "scale", ["0 1 2 3", "1 2 3 4", "2019 2020 2021 2022", "1100 1102 1104 1106"]
)
def test_a_header_of_numbers_is_no_row(tmp_path, scale):
    names = scale.split()
    rows = np.random.default_rng(0).uniform(0, 0.9, (5, 4)) - 1
    path = file_of(tmp_path, to_csv(rows, names, delimiter=","))
    with pytest.raises(
        ValueError,
        match=r"must be clearly names or a row .*header=True if it holds names, header=False",
    ):
        read_table(path)
    assert read_table(path, header=True).columns == tuple(names)
    assert read_table(path, header=True).values.tolist() == rows.tolist()
    assert read_table(path, names[1:3]).values.tolist() == rows[:, 1:3].tolist()
    assert read_table(path, header=False).values.shape == (6, 4)


@pytest.mark.parametrize("text", ["1,1\n3,4\n", "3,2\n4,5\n", "3,4\n2,3\n4,5\n", "7\n8\n"])
def test_a_first_row_that_may_be_a_row_is_pointed_out(tmp_path, text):
    path = file_of(tmp_path, text)
    with pytest.warns(UserWarning, match=r"data.csv, line 1 holds numbers and was read as a row"):
        table = read_table(path)
    assert len(table.values) == text.count("\n")
    assert len(read_table(path, header=False).values) == text.count("\n")
    if text[0] != text[2]:
        assert len(read_table(path, header=True).values) == text.count("\n") - 1


def test_only_text_has_a_header(tmp_path):
    np.save(tmp_path / "data.npy", np.eye(2))
    with pytest.raises(ValueError, match="header must be None unless the file is text; got True"):
        read_table(tmp_path / "data.npy", header=True)


def test_columns_left_out_need_no_name_of_their_own(tmp_path):
    path = file_of(tmp_path, ",a,b,b,\n0,1,2,3,\n1,4,5,6,\n")
    assert read_table(path, ["a"]).values.tolist() == [[1], [4]]
    with pytest.raises(ValueError, match=r"column 4: .* column 3 is called 'b' too"):
        read_table(path, ["a", "b"])
    with pytest.raises(ValueError, match=r"column 1: must have a name; .*choose other columns"):
        read_table(path)


def test_wide_tables_do_not_flood_a_message(tmp_path):
    names = [f"{'wave' * 30}{i}" for i in range(1024)]
    path = file_of(tmp_path, to_csv(np.zeros((2, 1024)), names, delimiter=","))
    with pytest.raises(ValueError, match=r"has no column 'b'; .*… \(1024 in all\)") as absent:
        read_table(path, ["b"])
    with pytest.raises(ValueError, match=r"always 0.*… \(1024 in all\)") as constant:
        check_for_training(read_table(path))
    with pytest.raises(ValueError, match=r"different names; got .*… \(2048 in all\)") as repeated:
        read_table(path, names * 2)
    for caught in (absent, constant, repeated):
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[1], [2**53 + 1]]), r"row 2 .* got 9007199254740993, which would become"),
        (np.array([[0, -(2**63) + 1]]), r"row 1 .* got -9223372036854775807, which would become"),
        (np.array([[1, 2**64 - 1]], np.uint64), r"column 'x2': .* got 18446744073709551615"),
    ],
)
def test_whole_numbers_keep_their_digits_or_are_refused(tmp_path, values, message):
    np.save(tmp_path / "data.npy", values)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "data.npy")
    held = values - values % 2**12
    np.save(tmp_path / "data.npy", held)
    assert [
        int(x) for x in read_table(tmp_path / "data.npy").values.flat
    ] == held.flatten().tolist()
    path = file_of(tmp_path, to_csv(held, "abc"[: held.shape[1]], delimiter=","))
    assert [int(x) for x in read_table(path).values.flat] == held.flatten().tolist()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["a", "c"], r"line 1: has no column 'c'; it has 'a', 'b'"),
        (["a", "a"], r"columns must be one or more different names; got 'a', 'a'"),
        ([], r"columns must be one or more different names; got none"),
    ],
)
def test_columns_that_are_not_there_are_refused(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        read_table(file_of(tmp_path, "a,b\n1,2\n"), columns)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("header", [0, 1, "infer", np.True_])
def test_a_header_is_there_or_not(tmp_path, header):
    with pytest.raises(TypeError, match="header must be True, False or None; got"):
        read_table(file_of(tmp_path, "1,2\n3,4\n"), header=header)


@pytest.mark.usefixtures("shapes_unchecked")
def test_one_name_is_no_list_of_names(tmp_path):
    with pytest.raises(TypeError, match="columns must be a list of names; got the text 'ab'"):
        read_table(file_of(tmp_path, "a,b\n1,2\n"), "ab")


def test_what_is_no_table_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_table(tmp_path / "absent.csv")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_table(tmp_path)
    with pytest.raises(ValueError, match=r"must be one of .csv, .*; got the suffix '.xlsx'"):
        read_table(file_of(tmp_path, "a", "data.xlsx"))
    for name in ("data.npy", "data.npz", "data.parquet"):
        with pytest.raises(ValueError, match=r"line 1: .* the file is empty"):
            read_table(file_of(tmp_path, "", name))
        with pytest.raises(ValueError, match=rf"{name} must be a"):
            read_table(file_of(tmp_path, "garbage", name))


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8, bool])
def test_arrays_of_any_real_dtype_are_tables(tmp_path, dtype):
    values = np.array([[0, 1], [1, 1], [1, 0]], dtype)
    np.save(tmp_path / "a.npy", values)
    assert read_table(tmp_path / "a.npy").values.tolist() == values.tolist()
    np.save(tmp_path / "a.npy", values[:, 0])
    assert read_table(tmp_path / "a.npy").values.tolist() == values[:, :1].tolist()


def test_an_npz_has_one_table_or_names_it(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, data=np.eye(2), columns=["a", "b"], seed=np.array(3))
    assert read_table(path).columns == ("a", "b")
    assert read_table(path, ["b"]).values.tolist() == [[0], [1]]
    np.savez(path, train=np.eye(2), test=np.zeros((3, 2)), columns=[1, 2])
    assert read_table(path, array="test") == Table(pytest.approx(np.zeros((3, 2))), ("x1", "x2"))
    shapes = (
        r"one array of two axes; it has train \(2, 2\), test \(3, 2\), .*numpy.save\(path, array\)"
    )
    with pytest.raises(ValueError, match=shapes):
        read_table(path)
    with pytest.raises(ValueError, match="has no array 'tst'; it has train, test, columns"):
        read_table(path, array="tst")
    with pytest.raises(ValueError, match="array must be None unless"):
        read_table(file_of(tmp_path, "1,2\n"), array="a")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            np.array([[1.0, np.nan]]),
            r"row 1 \(from 1\), column 'x2': .* finite number; got nan, a missing value",
        ),
        (np.array([[1.0], [np.inf]]), r"row 2 \(from 1\), column 'x1': .* finite number; got inf"),
        (np.array([[1.0], [1e39]]), r"row 2 .* single precision; got 1e\+39"),
        (np.array([["a", "b"]]), "must hold real numbers; the array holds <U1"),
        (np.array([[1j]]), "must hold real numbers; the array holds complex128"),
        (np.zeros((2, 2, 2)), r"must have shape \(rows, columns\); the array has \(2, 2, 2\)"),
        (np.array(1.0), r"must have shape \(rows, columns\); the array has \(\)"),
        (np.zeros((0, 3)), r"must have rows and columns; got the shape \(0, 3\)"),
    ],
)
def test_arrays_that_are_no_tables_are_refused(tmp_path, values, message):
    np.save(tmp_path / "data.npy", values)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "data.npy")


def test_a_file_of_python_objects_is_refused_unread(tmp_path):
    np.save(tmp_path / "data.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match="holds Python objects"):
        read_table(tmp_path / "data.npy")
    np.savez(tmp_path / "data.npz", x=np.array([[None]], object))
    with pytest.raises(ValueError, match="holds Python objects"):
        read_table(tmp_path / "data.npz")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "data.parquet"

    def write(**columns):
        parquet.write_table(pyarrow.table(columns), path)

    write(name=["A", "B"], a=[1, 2], b=[0.5, 1.5])
    assert read_table(path, ["b", "a"]).values.tolist() == [[0.5, 1], [1.5, 2]]
    with pytest.raises(ValueError, match=r"column 'name': must hold numbers; got string"):
        read_table(path)
    write(a=[1, 2], b=[0.5, None])
    with pytest.raises(ValueError, match=r"row 2 \(from 1\), column 'b': .* the cell is empty"):
        read_table(path)
    write(a=[1, 2], b=[0.5, np.nan])
    with pytest.raises(ValueError, match=r"row 2 \(from 1\), column 'b': .* got nan"):
        read_table(path)
    write(a=[1, 2], b=[0, 2**53 + 1])
    with pytest.raises(ValueError, match=r"row 2 \(from 1\), column 'b': .*which would become"):
        read_table(path)
    kept = {"pandas": json.dumps({"index_columns": ["__index_level_0__"]})}
    frame = pyarrow.table({"a": [1, 2], "__index_level_0__": [5, 7]}).replace_schema_metadata(kept)
    parquet.write_table(frame, path)
    with pytest.raises(
        ValueError, match=r"'__index_level_0__'.*index of a pandas frame.*index=False"
    ):
        read_table(path)
    assert read_table(path, ["a"]).values.tolist() == [[1], [2]]
    parquet.write_table(frame.replace_schema_metadata(None), path)
    with pytest.raises(ValueError, match="index of a pandas frame"):
        read_table(path)
    kept = {"pandas": json.dumps({"index_columns": [{"kind": "range"}]})}
    parquet.write_table(pyarrow.table({"a": [1, 2]}).replace_schema_metadata(kept), path)
    assert read_table(path).columns == ("a",)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="must be a Parquet file"):
        read_table(path)


def test_without_pyarrow_parquet_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow, .* pip install pyarrow"):
        read_table(file_of(tmp_path, "PAR1", "data.parquet"))


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .csv, .tsv or .npy; got '.doc'"):
        write_table(tmp_path / "t.doc", np.eye(2))
    with pytest.raises(ValueError, match=r"columns must be names of one line; got 'a\\nb'"):
        write_table(tmp_path / "t.csv", np.eye(2), ["a\nb", "c"])
    with pytest.raises(ValueError, match="columns must be 2 names; got 1"):
        write_table(tmp_path / "t.csv", np.eye(2), ["a"])
    with pytest.raises(ValueError, match=r"values must have shape \(rows, columns\); got \(2,\)"):
        write_table(tmp_path / "t.csv", [1.0, 2.0])
    with pytest.raises(ValueError, match="values must have no masked values; got 1"):
        write_table(tmp_path / "t.csv", np.ma.masked_equal([[1.0, -999.0]], -999))
    with pytest.raises(ValueError, match="values must hold numbers; got text"):
        write_table(tmp_path / "t.csv", [["1", "2"]])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_table(tmp_path / "absent" / "t.csv", np.eye(2))
    assert list(tmp_path.iterdir()) == []


def test_no_data_without_fill_values_are_pointed_out():
    rng = np.random.default_rng(0)
    columns = {
        "normal": rng.normal(size=500),
        "exponential": rng.exponential(size=500),
        "heavy": rng.standard_t(2, 500),
        "lognormal": rng.lognormal(sigma=2, size=500),
        "counts": rng.poisson(1, 500),
        "mostly zero": rng.poisson(0.02, 500) * rng.exponential(size=500),
        "two": rng.integers(0, 2, 500),
        "percent": np.append(rng.integers(0, 99, 499), 99),
        "clipped": rng.normal(size=500).clip(-1, 1),
    }
    warn_of_fill_values(Table(np.column_stack(list(columns.values())), tuple(columns)))


def test_what_cannot_be_trained_on_is_refused(tmp_path):
    check_for_training(Table(np.eye(2), ("a", "b")))
    with pytest.raises(ValueError, match=r"t.csv must have at least 2 rows to fit; got 1"):
        check_for_training(Table(np.eye(1), ("a",)), "t.csv")
    constant = np.array([[0.0, 0.1, 3.0], [1.0, 0.1, 3.0]])
    with pytest.raises(ValueError, match=r"in 'b' \(always 0.1\), 'c' \(always 3\). Leave"):
        check_for_training(Table(constant, ("a", "b", "c")))


def test_the_header_of_savetxt_names_the_columns(tmp_path):
    """It comes behind a #, as a comment; also of numbers, if it is said to be a header."""
    path = tmp_path / "data.csv"
    np.savetxt(path, EXPECTED, delimiter=",", header="a,b")
    table = read_table(path, ["b", "a"])
    assert table.columns == ("b", "a")
    assert table.values.tolist() == np.asarray(EXPECTED)[:, ::-1].tolist()
    np.savetxt(path, EXPECTED, delimiter=",", header="1100,1200")
    with pytest.raises(ValueError, match=r"line 1, column 'x1': .* got '# 1100'"):
        read_table(path)
    assert read_table(path, header=True).columns == ("1100", "1200")


@pytest.mark.parametrize("names", [("# a", "b"), ("#", "b"), ("#a", 'b, "B"')])
def test_names_that_begin_with_a_mark_of_comments_come_back(tmp_path, names):
    path = tmp_path / "data.csv"
    write_table(path, np.asarray(EXPECTED), names)
    assert read_table(path).columns == names
