"""Files that appear whole or not at all."""

from __future__ import annotations

import os

import pytest
from matplotlib.figure import Figure

from conv2former.engine.logging import RunLog
from conv2former.engine.terminal import say
from conv2former.errors import DataError, OutputError
from conv2former.tools.output import check_writable, replacing, save_figure, text_table


def listing(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_and_a_folder(tmp_path):
    with replacing(tmp_path / "deep" / "a.txt") as temporary:
        temporary.write_text("1")
        assert not (tmp_path / "deep" / "a.txt").exists()
    with replacing(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "b.txt").write_text("2")
    assert listing(tmp_path) == ["deep", "deep/a.txt", "model", "model/b.txt"]


@pytest.mark.parametrize("error", [DataError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_is_left_after_an_error(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)), replacing(tmp_path / "a.txt") as t:
        t.write_text("half")
        raise error
    assert listing(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for path in (tmp_path / "file" / "a.png", tmp_path / "full"):
        with pytest.raises(OutputError, match=r"cannot be written|is a folder"):
            check_writable(path)
    with pytest.raises(OutputError, match="cannot be written"), replacing(tmp_path / "full") as temporary:
        temporary.mkdir()
    check_writable(tmp_path / "new" / "a.png")
    assert listing(tmp_path) == ["file", "full", "full/x", "new"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        check_writable(tmp_path / "a.png")


def test_a_picture(tmp_path):
    save_figure(Figure(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_table():
    assert text_table(["file", "top-1"], [["a.pt", "9.5"], ["long.pt", "81.25"]]) == (
        "file     top-1\na.pt       9.5\nlong.pt  81.25"
    )


def test_a_table_with_letters_of_two_columns_and_of_none():
    table = text_table(["class", "images"], [["猫", "9"], ["कु", "8"], ["cats", "10"]])
    assert table == "class  images\n猫          9\nकु           8\ncats       10"


def test_names_from_files_do_not_reach_the_terminal_raw(tmp_path, capsys):
    name = "\x1b]0;title\x07\x1b[31m\r\x9b\nerror: disk full"
    plain = r"\x1b]0;title\x07\x1b[31m\r\x9b\nerror: disk full"
    assert str(DataError(f"folder {name}:", f"  - a{name}")) == f"folder {plain}:\n  - a{plain}"
    say(name)
    assert capsys.readouterr().out == f"{plain}\n"
    log = RunLog(tmp_path, 1, 0, False, True)
    log.say(f"classes: {name}")
    log.close()
    assert capsys.readouterr().out == f"classes: {plain}\n"
    (line,) = (tmp_path / "train.log").read_text("utf-8").splitlines()
    assert line.endswith(f"  classes: {plain}")
    assert text_table(["a"], [[name]]) == f"a\n{plain}"
