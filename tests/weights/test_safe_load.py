"""Weight files that were damaged, or made to harm."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from conv2former import CheckpointError
from conv2former.weights import safe_load
from conv2former.weights.reading import read_checkpoint


@pytest.fixture
def content() -> dict:
    return {"weight": torch.arange(1000.0), "twice": torch.zeros(10), "epoch": 3, "names": ["a", "b"]}


@pytest.fixture
def path(tmp_path, content) -> Path:
    torch.save(content, tmp_path / "file.pt")
    return tmp_path / "file.pt"


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def rewritten(path: Path, compression: int = zipfile.ZIP_STORED, **contents: bytes) -> None:
    """Writes the archive anew, with other contents of some entries, named without their folder and ending."""
    made = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, contents.get(Path(entry.filename).stem, old.read(entry)))
    path.write_bytes(made.getvalue())


def test_what_is_right_is_read(path, content):
    found = read_checkpoint(path)
    assert torch.equal(found["weight"], content["weight"])
    assert found["names"] == content["names"]
    shared = torch.arange(2.0**18)  # tied weights, and views of one tensor, are stored once
    torch.save({str(i): shared[i:] for i in range(4)}, path)
    assert len(read_checkpoint(path)) == 4
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(path)["weight"], content["weight"])


def test_every_flipped_bit_of_a_tensor_is_seen(path):
    data = path.read_bytes()
    place = data.index(torch.arange(1000.0).numpy().tobytes())
    for offset in (0, 1999, 3999):
        path.write_bytes(data[: place + offset] + bytes([data[place + offset] ^ 4]) + data[place + offset + 1 :])
        refused(path, "is damaged: 'file/data/0' in it does not match its checksum")


def test_a_compressed_archive(path):
    rewritten(path, zipfile.ZIP_DEFLATED)
    refused(path, "it is compressed")


def test_entries_that_share_bytes(path):
    """Each claims nearly all of the archive, so that together they are many times as large as it."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as new:
        new.writestr("a/data.pkl", pickle.dumps({}, protocol=2))
        new.writestr("a/data/0", bytes(100_000))
        for i in range(1, 50):
            new.filelist.append(new.getinfo("a/data/0"))
            new.NameToInfo[f"a/data/{i}"] = new.getinfo("a/data/0")
    path.write_bytes(made.getvalue())
    refused(path, "claim more bytes than the file has")


def test_a_view_of_petabytes(path):
    torch.save({"weight": torch.zeros(1).expand(10**15)}, path)
    refused(path, "bytes claim 4,000,000,000,000,000 bytes of tensors")


def test_many_views_of_the_same_bytes(path):
    one = torch.zeros(2**18)
    torch.save({str(i): one.view(2**9, 2**9) for i in range(2000)}, path)
    refused(path, "bytes claim 2,097,152,000 bytes of tensors")


def test_a_storage_that_claims_more_than_is_there(path):
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("file/data.pkl")
    assert pickled.count(b"M\xe8\x03") == 2  # 1000, of the storage and of the shape
    rewritten(path, data=pickled.replace(b"M\xe8\x03", b"J\0\0\0\x7f"))
    refused(path, "claims|truncated")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_of_more_entries_than_any_checkpoint_has(path, monkeypatch, legacy):
    monkeypatch.setattr(safe_load, "MAX_OPERATIONS", 1000)
    torch.save({"names": ["x"] * 2000}, path, _use_new_zipfile_serialization=not legacy)
    refused(path, "more than 1,000 entries")


class _Planted:
    def __reduce__(self):
        return os.system, ("touch planted",)


@pytest.mark.parametrize("write", [torch.save, "legacy", "pickle", "protocol 4"])
def test_code_is_refused_by_its_name(path, monkeypatch, write):
    monkeypatch.chdir(path.parent)
    content = {"state_dict": {}, "hook": _Planted()}
    if write == torch.save:
        torch.save(content, path)
    elif write == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(content, protocol=4 if write == "protocol 4" else 2))
    refused(path, rf"refused: it refers to code, {os.name}.system, which is not run; .* save the weights alone")
    assert not Path("planted").exists()


class _Hub:
    def __reduce__(self):
        return torch.hub.load, ("owner/name", "model")


class _Second:
    def __reduce__(self):
        return os.popen, ("touch planted",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_of_torch_itself_is_refused_by_its_name(path, legacy):
    content = {"state_dict": {"weight": torch.zeros(2)}, "hook": _Hub()}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    refused(path, r"it refers to code, torch\.hub\.load, which is not run")


def test_names_that_a_pickle_takes_from_its_memo(path):
    path.write_bytes(pickle.dumps({"a": _Planted(), "b": _Second(), "c": _Planted()}, protocol=4))
    refused(path, rf"refers to code, os.popen, {os.name}.system, which")
    same = pickle.PROTO + b"\x04" + b"\x8c\x02os\x94" + b"\x8c\x06system\x94\x930" + b"h\x00\x8c\x05popen\x94\x93."
    path.write_bytes(same)  # the module's name stands there once
    refused(path, r"refers to code, os.popen, os.system, which")


@pytest.mark.parametrize("damage", ["cut", "old operation"])
def test_code_in_a_pickle_that_ends_early(path, damage):
    """What torch raises is about the damage, or about an operation that it does not know."""
    data = b"(cos\nsystem\n" if damage == "cut" else b"(S'touch planted'\nios\nsystem\n."
    path.write_bytes(data)
    refused(path, "refers to code, os.system, which is not run")


def test_the_oldest_format(path):
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            tar.addfile(tarfile.TarInfo(name))
    refused(path, "is a tar archive, as torch wrote before 0.2: .* save the weights alone")


def test_names_in_a_refusal_are_escaped_and_cut(path):
    path.write_bytes(b"cos\x1b[31m\n" + b"x" * 100_000 + b"\n.")
    refused(path, r"refers to code, os\\x1b\[31m\.x{100,200}\.\.\., which")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file(tmp_path, kind):
    path = tmp_path / "pipe.pt"
    if kind == "pipe":
        os.mkfifo(path)
    refused(path if kind == "pipe" else Path("/dev/zero"), "not a file")


def test_whatever_torch_raises_is_one_message(path, monkeypatch):
    for error in (
        TypeError("'int' object is not callable"),
        AssertionError(),
        MemoryError(),
        RecursionError("deep down"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(torch, "load", fail)
        refused(path, "truncated or not a checkpoint|more memory than this machine has")
