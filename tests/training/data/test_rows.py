"""CSV, WebDataset archives and .zst files: documents in their order, little memory, one line about what is wrong."""

import csv
import io
import json
import random
import resource
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.corpus import open_corpus
from training.data.readers import LINE
from training.data.sources import documents, find_source
from training.errors import UserError

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


def texts(path: Path) -> list[str]:
    return [document[0].text for document in documents(find_source(str(path)))]


def refused(match: str, path: Path) -> None:
    with pytest.raises(UserError, match=match) as caught:
        open_corpus(str(path), sequence_length=4, cache_dir=path.parent / "cache")
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))
    assert not list((path.parent / "cache").glob("*"))


def write_csv(path: Path, rows: list[list[str]], **how: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **how).writerows(rows)
    return path


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def zst(content: bytes) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    sink = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


# CSV ------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=9), st.sampled_from([(".csv", ","), (".tsv", "\t")]))
def test_every_text_comes_back_from_a_table(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], kind: tuple[str, str]
) -> None:
    suffix, separator = kind
    path = tmp_path_factory.mktemp("csv") / f"rows{suffix}"
    write_csv(path, [["id", "text"], *([other, text] for other, text in rows)], delimiter=separator)
    if any(text for _, text in rows):
        assert texts(path) == [text for _, text in rows if text]


def test_cells_are_text_as_they_stand(tmp_path: Path) -> None:
    """No NA, no number, no byte that is no UTF-8 is taken for something else."""
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbftext,id\r\nNA,1\r\n007,2\r\n\r\nnull,3\r\ncaf\xe9,4\r\n")
    assert texts(path) == ["NA", "007", "null", "caf\udce9"]


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    assert texts(write_csv(tmp_path / "rows.csv", [["text"], ["x" * 300_000]])) == ["x" * 300_000]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"content,id\na,1\n", "expected the column `text` in the first line, got content, id"),
        (b"id,text\n1,a\n2\n", "line 3: expected at least 2 fields, got 1"),
        (b'text\n"open', "line 2: expected a row of CSV, got: unexpected end of data"),
        (b'text\n"a"b\n', "line 2: expected a row of CSV"),
        (b"text\n", "expected text, got none"),
        (b"", "expected text, got an empty file"),
    ],
)
def test_a_bad_table_is_named_with_its_line(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    refused(match, tmp_path / "bad.csv")


@pytest.mark.parametrize(
    "line", [b"x" * (1 << 20), b'"x"\n' * (1 << 18), b"," * (1 << 20)], ids=["cell", "rows", "fields"]
)
def test_a_row_of_a_hundred_megabytes_is_refused_in_little_memory(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("wb") as file:
        file.write(b'text\n"' if line[:1] != b"," else b"text\n")
        for _ in range(100):
            file.write(line.replace(b'"', b'""'))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=f"expected at most {LINE:,} bytes in a row, got more"):
        list(documents(find_source(str(path))))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


# WebDataset -----------------------------------------------------------------------------------------------------------


def test_a_sample_is_its_text_or_else_its_json(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "assistant", "content": "hello"}]}
    path = write_tar(
        tmp_path / "shard.tar",
        {
            "a/0.txt": b"first", "a/0.json": b'{"width": 3}', "a/0.jpg": b"\0\1", "a/1.json": b'{"text": "second"}',
            "a/2.png": b"\0", "b/0.json": json.dumps(chat).encode(), "b/._0.txt": b"of a Macintosh", 
            "c/0.en.txt": b"caf\xe9", "README": b"no sample",
        },
    )  # fmt: skip
    assert texts(path) == ["first", "second", "hello", "caf\udce9"]


def test_a_shard_is_read_sample_by_sample(tmp_path: Path) -> None:
    noise = random.Random(0)
    files = {f"{i:05}.txt": noise.randbytes(20_000).hex().encode() for i in range(1500)}
    path = write_tar(tmp_path / "big.tar", files)
    wanted, size = len(files), path.stat().st_size
    del files
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in documents(find_source(str(path)))) == wanted
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 << 10 < size >> 10


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", {f"{i}.txt": b"x" * 600 for i in range(9)}).read_bytes()
    for name, content, match in (
        ("cut.tar", whole[:2000], "no header at byte 1536"),
        ("short.tar", whole[:2500], "unexpected end of data"),
        ("torn.tar", whole[:4096] + b"\xff" * 3000 + whole[7096:], "no header at byte|header|end of data"),
        ("no.tar", b"no archive" * 99, "expected a WebDataset archive"),
        ("empty.tar", b"", "expected a WebDataset archive"),
        ("other.tar", write_tar(tmp_path / "o.tar", {"a.py": b"code"}).read_bytes(), "expected text, got none"),
        ("json.tar", write_tar(tmp_path / "j.tar", {"a.json": b"{"}).read_bytes(), "sample a: expected a JSON object"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(match, tmp_path / name)


def test_a_header_that_claims_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    member = tarfile.TarInfo("0.txt")
    member.size = 8 << 30
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        member.type = kind
        with (tmp_path / "big.tar").open("wb") as file:
            file.write(member.tobuf(tarfile.GNU_FORMAT))
            file.truncate(9 << 30)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refused(f"{LINE:,} are the most", tmp_path / "big.tar")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 << 10


def test_nothing_of_a_shard_is_written_to_the_disk(tmp_path: Path) -> None:
    files = {"../escaped.txt": b"up", "/tmp/escaped.txt": b"root", "a/0.txt": b"in"}
    path = write_tar(tmp_path / "shard.tar", files)
    assert texts(path) == ["up", "root", "in"]
    assert [file.name for file in tmp_path.iterdir()] == ["shard.tar"]
    assert not Path("/tmp/escaped.txt").exists()


# Packed ---------------------------------------------------------------------------------------------------------------


def test_zst_files_are_read_as_if_they_were_not_packed(tmp_path: Path) -> None:
    (tmp_path / "some.txt.zst").write_bytes(zst("Übergröße".encode("latin-1")))
    (tmp_path / "lines.jsonl.zst").write_bytes(zst(b'{"text": "one"}\n') + zst(b'{"text": "two"}\n'))
    (tmp_path / "rows.csv.zst").write_bytes(zst(b"text\nthree\n"))
    assert texts(tmp_path / "some.txt.zst") == ["\udcdcbergr\udcf6\udcdfe"]
    assert texts(tmp_path / "lines.jsonl.zst") == ["one", "two"]
    assert texts(tmp_path / "rows.csv.zst") == ["three"]
    packed = zst(b"x" * 100_000)
    for name, content in (
        ("cut.txt.zst", packed[:-4]),
        ("no.txt.zst", b"no zst"),
        ("bad.txt.zst", packed[:9] + b"\xff" * 9),
    ):
        (tmp_path / name).write_bytes(content)
        refused("expected a file that can be read", tmp_path / name)


def test_a_folder_of_tables_has_an_entry_of_its_own(tmp_path: Path) -> None:
    """Before, a table was one text and an archive was passed over."""
    from training.data.corpus import _key
    from training.data.tokenizer import BYTES

    plain = write_csv(tmp_path / "rows.csv", [["text"], ["x" * 99]])
    renamed = plain.rename(tmp_path / "rows.txt")
    keys = {_key(find_source(str(renamed)), 0.1, "auto", BYTES)}
    for name in ("rows.csv", "rows.csv.gz", "rows.tar", "rows.txt.zst"):
        path = renamed.rename(tmp_path / name)
        source = find_source(str(path))
        import hashlib

        stat = path.stat()
        file = [str(path.parent.resolve()), path.name, stat.st_size, stat.st_mtime_ns]
        old = hashlib.blake2b(json.dumps([1, None, "_read_file", "auto", 0.1, [file]]).encode(), digest_size=16)
        keys |= {_key(source, 0.1, "auto", BYTES), old.hexdigest()}
        renamed = path
    assert len(keys) == 9
