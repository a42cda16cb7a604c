"""Files in full or not at all: what was there stays, and the error names the file."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from fxprune.tensor_files import save_tensors
from fxprune.whole_files import whole_file, write_text


def test_text_is_there_in_full(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "one")
    write_text(str(path), "zwölf")
    assert path.read_text(encoding="utf-8") == "zwölf"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_was_there_stays_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "one")

    def fail(error: BaseException) -> None:
        with whole_file(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(OSError, match=r"a\.txt: not written \(disk\); what was there is as it was$"):
        fail(OSError("disk"))
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_disk_without_room_is_named(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # as on a full disk, a write fails
    try:
        with pytest.raises(OSError, match=r"a\.txt: not written \(File too large\)"):
            write_text(tmp_path / "a.txt", "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_folders_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nowhere/a\.txt: there is no folder .*nowhere; make it first"
    ):
        write_text(tmp_path / "nowhere" / "a.txt", "one")
    with pytest.raises(IsADirectoryError, match="this is a folder; expected the name of a file"):
        write_text(tmp_path, "one")
    Path(tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_text(tmp_path / "file" / "a.txt", "one")


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_permissions_of_a_file_that_is_overwritten_stay(tmp_path: Path) -> None:
    usual, path = tmp_path / "usual", tmp_path / "a.txt"
    usual.touch()
    write_text(path, "one")
    assert permissions(path) == permissions(usual)
    for mode in (0o600, 0o640, 0o664):
        path.chmod(mode)
        write_text(path, "two")
        assert permissions(path) == mode


def test_a_new_file_of_tensors_is_read_by_whoever_reads_other_new_files(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    path = tmp_path / "a.safetensors"
    with whole_file(path) as part:
        save_tensors({"x": torch.ones(2)}, part)
    assert permissions(path) == permissions(tmp_path / "usual")


def test_links_and_devices(tmp_path: Path) -> None:
    (tmp_path / "to").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "to")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "to").read_text() == "new"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", "part")

    monkeypatch.setattr(Path, "write_text", refused)
    with pytest.raises(PermissionError, match=r"a\.txt: not written \(Permission denied\)"):
        write_text(tmp_path / "a.txt", "one")
