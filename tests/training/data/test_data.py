"""Sources, tokens, the held-out split, batches and baselines."""

import bz2
import gzip
import json
import lzma
import math
import random
import re
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import assert_close, spread_params, tiny_config
from tiny_onn_func.decoder import forward
from tiny_onn_func.tree import stack
from training.data.baselines import baselines
from training.data.batches import batch_at, held_out_batches, scored_span
from training.data.corpus import Corpus, Splits, open_corpus, whole
from training.data.hf_tokenizer import open_tokenizer
from training.data.readers import Segment
from training.data.sources import documents, find_source
from training.data.streams import decode, encode, is_held_out, tokenized
from training.data.tokenizer import BOUNDARY, VOCAB_SIZE
from training.data.train_tokenizer import train_tokenizer
from training.errors import UserError
from training.step.batch import IGNORE_INDEX, Batch
from training.storage.atomic import cache_folder


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def opened(source: Path | str, tmp_path: Path, *, sequence_length: int = 4, **options: object) -> Splits:
    return open_corpus(str(source), sequence_length=sequence_length, cache_dir=tmp_path / "cache", **options)


def corpus(tokens: list[int], targets: list[int] | None = None) -> Corpus:
    flags = np.array([1] * len(tokens) if targets is None else targets, np.uint8)
    stream = np.array(tokens, np.uint16)
    count = int((stream != BOUNDARY).sum())
    return Corpus(stream, flags, count, int(flags[1:].sum()), int((stream == BOUNDARY).sum()))


def pieces(side: Corpus) -> list[bytes]:
    """The documents of a side, from its tokens alone."""
    documents = [[]]
    for token in side.tokens.tolist():
        if token == BOUNDARY:
            documents.append([])
        else:
            documents[-1].append(token)
    return [bytes(document) for document in documents if document]


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# Tokens ---------------------------------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_decoding_undoes_encoding_for_all_text(text: str):
    assert decode(encode(text)) == text
    assert encode(text).tobytes() == np.frombuffer(text.encode(), np.uint8).astype(np.uint16).tobytes()


@given(st.binary())
def test_bytes_that_are_no_utf8_come_back_as_they_were(data: bytes):
    assert encode(data.decode("utf-8", "surrogateescape")).astype(np.uint8).tobytes() == data


@given(st.text(st.characters(categories=("Cs", "Ll"))))
def test_encoding_is_total(text: str):
    assert encode(text).max(initial=0) < BOUNDARY


def test_decoding_spells_out_the_boundary_and_replaces_what_is_no_text():
    assert decode([104, 105, BOUNDARY, 0xFF, 300]) == "hi<|endoftext|>\ufffd\ufffd"


# Sources --------------------------------------------------------------------------------------------------------------


def test_stdlib_has_the_modules_of_the_standard_library_and_no_tests():
    files = find_source("stdlib").files
    names = [file.as_posix() for file in files]
    assert 500 < len(files) < 1000
    assert any(name.endswith("/json/decoder.py") for name in names)
    root = Path(json.__file__).parent.parent
    inside = [file.relative_to(root) for file in files]
    assert inside == sorted(inside, key=Path.as_posix)
    assert not {"test", "tests", "idle_test", "site-packages", "__pycache__"} & {
        part for f in inside for part in f.parts
    }


def test_stdlib_is_the_same_set_wherever_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = []
    for place in ("usr/lib", "Opt/Tests/test/site-packages"):
        root = tmp_path / place
        for name in ("abc.py", "json/decoder.py", "json/tests/test_all.py", "Zebra.py", "idlelib/idle_test/x.py"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"# {name}\n")
        (root / f"_sysconfigdata_{len(place)}.py").write_text("build_time_vars = {}\n")
        (root / "sitecustomize.py").write_text("import distribution\n")
        (root / "site-packages").mkdir()
        (root / "site-packages/abc.py").write_text("# not mine\n")
        (root / "token.py").write_bytes(b"\xff\xfe no UTF-8")
        (root / "ast.py").write_bytes(b"x\r\ny\n")
        monkeypatch.setattr("sysconfig.get_paths", lambda root=root: {"stdlib": str(root)})
        texts.append([part.text for document in documents(find_source("stdlib")) for part in document])
    assert texts[0] == texts[1] == ["# abc.py\n", "x\ny\n", "# json/decoder.py\n"]


def test_a_folder_is_all_text_files_below_it_sorted_by_relative_path(tmp_path: Path):
    folder = tmp_path / "folder"
    for name in ("b.txt", "a/z.md", "a/b/c", "a.txt", ".git/config", "a/.hidden", "empty.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("" if name == "empty.txt" else name)
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (folder / "loop").symlink_to(folder)
    (folder / "nowhere.txt").symlink_to(folder / "missing")
    write_jsonl(folder / "lines.jsonl", [{"text": "one"}, {"text": "two"}])
    contents = [document[0].text for document in documents(find_source(str(folder)))]
    assert contents == ["a.txt", "a/b/c", "a/z.md", "b.txt", "one", "two"]


def test_a_glob_is_the_files_that_match(tmp_path: Path):
    for name in ("x/one.txt", "x/y/two.txt", "x/three.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d[0].text for d in documents(find_source(f"{tmp_path}/**/*.txt"))] == ["x/one.txt", "x/y/two.txt"]


def test_a_file_with_brackets_in_its_name_is_that_file(tmp_path: Path):
    (tmp_path / "a[1].txt").write_text("brackets")
    assert [d[0].text for d in documents(find_source(f"{tmp_path}/a[1].txt"))] == ["brackets"]


def test_latin1_text_is_kept_byte_for_byte(tmp_path: Path):
    text = "Übergröße ".encode("latin-1") * 20
    (tmp_path / "latin.txt").write_bytes(text)
    splits = opened(tmp_path / "latin.txt", tmp_path)
    assert b"".join(pieces(splits.train) + pieces(splits.held_out)) == text


def test_only_the_assistant_turns_of_a_chat_are_targets(tmp_path: Path):
    turns = [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "Hm?"), ("assistant", "Four.")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    path = write_jsonl(tmp_path / "chat.jsonl", [chat, {"messages": [{"role": "assistant", "content": "hi"}]}] * 40)
    side = opened(path, tmp_path, split="tail").train
    start = next(i for i, token in enumerate(side.tokens) if token == BOUNDARY) + 1
    first, flags = side.tokens[:start], side.targets[:start]
    template = "<|system|>\nBe brief.<|end|>\n<|user|>\n2+2?<|end|>\n<|assistant|>\n4<|end|>\n"
    template += "<|user|>\nHm?<|end|>\n<|assistant|>\nFour.<|end|>\n<|endoftext|>"
    assert decode(first) == template
    assert decode(first[flags == 1]) == "4<|end|>\nFour.<|end|>\n<|endoftext|>"


def test_a_chat_that_ends_with_the_user_does_not_learn_to_end_there(tmp_path: Path):
    chat = {"messages": [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "bye"}]}
    side = opened(write_jsonl(tmp_path / "chat.jsonl", [chat] * 9), tmp_path, split="tail").train
    assert not side.targets[side.tokens == BOUNDARY].any()


# Packed files and rows ------------------------------------------------------------------------------------------------


def write_parquet(path: Path, columns: dict[str, list[object]], rows: int = 2) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path, row_group_size=rows)
    return path


def texts(source: Path) -> list[str]:
    return [document[0].text for document in documents(find_source(str(source)))]


def test_packed_text_and_lines_are_read_as_if_they_were_not_packed(tmp_path: Path):
    path = write_jsonl(tmp_path / "lines.jsonl", [{"text": "one"}, {"text": "two"}])
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "some.txt.gz").write_bytes(gzip.compress("Übergröße".encode("latin-1")))
    assert texts(tmp_path / "lines.jsonl.gz") == texts(path) == ["one", "two"]
    assert texts(tmp_path / "some.txt.gz") == ["\udcdcbergr\udcf6\udcdfe"]


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_rows_of_parquet_are_documents_in_their_order(rows: int, tmp_path: Path):
    path = write_parquet(
        tmp_path / "rows.parquet", {"id": [*range(150)], "text": [f"row {i}" for i in range(150)]}, rows
    )
    assert texts(path) == [f"row {i}" for i in range(150)]


def test_a_chat_is_the_same_in_parquet_and_in_lines(tmp_path: Path):
    chats = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}] for i in range(9)]
    from_parquet = opened(write_parquet(tmp_path / "chat.parquet", {"messages": chats}), tmp_path, split="tail")
    from_lines = opened(
        write_jsonl(tmp_path / "chat.jsonl", [{"messages": chat} for chat in chats]), tmp_path, split="tail"
    )
    assert from_parquet.train.tokens.tolist() == from_lines.train.tokens.tolist()
    assert from_parquet.train.targets.tolist() == from_lines.train.targets.tolist()


def test_a_folder_mixes_all_kinds_and_passes_over_binary_ones_packed_or_not(tmp_path: Path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_parquet(folder / "a.parquet", {"text": ["row one", "row two"]})
    (folder / "b.py.gz").write_bytes(gzip.compress(b"code"))
    (folder / "c.tar.gz").write_bytes(gzip.compress(b"x" * 3_000_000 + b"\0"))
    (folder / "d.md").write_text("page")
    write_jsonl(folder / "e.jsonl", [{"text": "line"}])
    (folder / "f.bin").write_bytes(b"\0")
    assert texts(folder) == ["row one", "row two", "code", "page", "line"]


def test_a_folder_with_packed_files_has_an_entry_of_its_own(tmp_path: Path):
    """Before, folders passed over them as binary."""
    (tmp_path / "a.txt").write_text("x" * 99)
    plain = opened(tmp_path / "a.txt", tmp_path).folder
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x" * 99))
    import training.data.corpus

    keys = [
        training.data.corpus._key(find_source(f"{tmp_path}/a.txt*"), 0.1, "auto", training.data.corpus.BYTES)
        for _ in range(2)
    ]
    assert keys[0] == keys[1] != plain.name


def test_an_entry_of_the_bytes_is_called_what_it_always_was(text: Path, tmp_path: Path):
    """Or every user would tokenize anew."""
    import hashlib

    stat = text.stat()
    file = [str(text.parent.resolve()), text.name, stat.st_size, stat.st_mtime_ns]
    known = hashlib.blake2b(json.dumps([1, None, "_read_file", "auto", 0.1, [file]]).encode(), digest_size=16)
    assert opened(text, tmp_path).folder.name == known.hexdigest()


def test_of_parquet_a_few_rows_are_in_memory(tmp_path: Path):
    arrow = pytest.importorskip("pyarrow")
    noise = random.Random(0)
    path = write_parquet(tmp_path / "big.parquet", {"text": [noise.randbytes(50_000).hex() for _ in range(160)]}, 4)
    before = arrow.total_allocated_bytes()
    held = [arrow.total_allocated_bytes() - before for _ in documents(find_source(str(path)))]
    assert path.stat().st_size > 6e6
    assert len(held) == 160
    assert max(held) < 3e6


def test_a_damaged_packed_file_is_named_and_nothing_is_written(tmp_path: Path):
    whole = gzip.compress(b"x" * 10_000)
    for name, content, match in (
        ("short.txt.gz", whole[:-10], "ended before the end-of-stream marker"),
        ("short.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-10], "ended before the end-of-stream marker"),
        ("plain.txt.gz", b"no gzip", "Not a gzipped file"),
        ("bad.txt.gz", whole[:10] + b"\xff" * 10, "invalid"),
        ("sum.txt.gz", whole[:-8] + b"\0" * 8, "CRC check failed"),
        ("late.jsonl.gz", gzip.compress(b'{"text": "a"}\noops'), "line 2: expected a JSON object"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(match, tmp_path / name, tmp_path)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_damaged_or_foreign_parquet_file_is_named_with_the_column(tmp_path: Path):
    good = write_parquet(tmp_path / "good.parquet", {"text": ["x" * 500] * 20}).read_bytes()
    (tmp_path / "no.parquet").write_bytes(b"PAR1 no PAR1")
    (tmp_path / "cut.parquet").write_bytes(good[: len(good) // 2])
    (tmp_path / "torn.parquet").write_bytes(good[:8] + b"\xff" * 200 + good[208:])
    (tmp_path / "empty.parquet").write_bytes(b"")
    for name in ("no", "cut", "torn", "empty"):
        refused("expected a Parquet file, got", tmp_path / f"{name}.parquet", tmp_path)
    write_parquet(tmp_path / "named.parquet", {"content": ["a"], "id": [1]})
    refused("expected the column `text` or `messages`, got content, id", tmp_path / "named.parquet", tmp_path)
    write_parquet(tmp_path / "null.parquet", {"text": ["a", None]})
    refused("row 2: expected `text` to be a string, got null", tmp_path / "null.parquet", tmp_path)
    write_parquet(tmp_path / "bytes.parquet", {"text": [b"a"]})
    refused("row 1: expected `text` to be a string, got bytes", tmp_path / "bytes.parquet", tmp_path)
    write_parquet(tmp_path / "turns.parquet", {"messages": [[{"role": "user"}]]})
    refused(r"row 1: expected messages\[0\].content to be a string", tmp_path / "turns.parquet", tmp_path)
    assert not list((tmp_path / "cache").glob("*"))


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_parquet(tmp_path / "rows.parquet", {"text": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(r"pip install tiny-onn-func\[data\]", path, tmp_path)


# Split ----------------------------------------------------------------------------------------------------------------


@SHARED
@given(st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=60), st.floats(0.05, 0.95), st.randoms())
def test_no_document_is_on_both_sides_and_none_is_lost(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], holdout: float, order: random.Random
):
    def sides(texts: list[str]) -> tuple[list[bytes], list[bytes]] | None:
        folder = tmp_path_factory.mktemp("split")
        path = write_jsonl(folder / "lines.jsonl", [{"text": text} for text in texts])
        try:
            splits = opened(path, folder, sequence_length=1, holdout=holdout, split="document")
        except UserError:  # one side has no document
            return None
        return pieces(splits.train), pieces(splits.held_out)

    texts = texts + texts[:3]
    if (split := sides(texts)) is None:
        return
    train, held_out = split
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(text.encode("utf-8", "replace") for text in texts)
    shuffled = [*texts, "another document"]
    order.shuffle(shuffled)
    again = sides(shuffled)
    assert again is not None
    assert set(train) <= set(again[0])
    assert set(held_out) <= set(again[1])


def test_about_the_share_holdout_of_the_documents_is_held_out(tmp_path: Path):
    path = write_jsonl(tmp_path / "many.jsonl", [{"text": f"document {i}"} for i in range(1000)])
    small, large = (opened(path, tmp_path, holdout=holdout) for holdout in (0.1, 0.3))
    for splits, holdout in ((small, 0.1), (large, 0.3)):
        share = splits.held_out.num_documents / 1000
        assert abs(share - holdout) < 4 * math.sqrt(holdout * (1 - holdout) / 1000)
    assert set(pieces(small.held_out)) < set(pieces(large.held_out))


def test_halves_of_surrogate_pairs_do_not_hide_that_two_documents_are_equal(tmp_path: Path):
    broken = [{"text": f"{i} \ud83d"} for i in range(60)]
    whole = [{"text": f"{i} \ufffd"} for i in range(60)]
    splits = opened(write_jsonl(tmp_path / "pairs.jsonl", broken + whole), tmp_path, split="document")
    assert splits.train.num_documents + splits.held_out.num_documents == 120
    assert not set(pieces(splits.train)) & set(pieces(splits.held_out))


@SHARED
@given(size=st.integers(60, 400), holdout=st.floats(0.1, 0.9))
def test_one_text_is_held_out_at_its_tail(tmp_path_factory: pytest.TempPathFactory, size: int, holdout: float):
    folder = tmp_path_factory.mktemp("tail")
    text = bytes(random.Random(size).choices(range(1, 128), k=size))
    (folder / "text.txt").write_bytes(text)
    splits = opened(folder / "text.txt", folder, holdout=holdout)
    cut = int(size * (1 - holdout))
    assert splits.split == "tail"
    assert splits.train.tokens.tolist() == list(text[:cut])
    assert splits.held_out.tokens.tolist() == [*text[cut:], BOUNDARY]
    assert (splits.train.num_bytes, splits.held_out.num_bytes) == (cut, size - cut)
    assert (splits.train.num_targets, splits.held_out.num_targets) == (cut - 1, size - cut)


def test_the_first_90_percent_of_a_text_train(tmp_path: Path):
    (tmp_path / "text.txt").write_text("a" * 1_115_394)  # the length of tinyshakespeare
    splits = opened(tmp_path / "text.txt", tmp_path)
    assert (splits.train.num_bytes, splits.held_out.num_bytes) == (1_003_854, 111_540)


def test_auto_is_tail_for_one_document_and_document_for_more(tmp_path: Path):
    single = write_jsonl(tmp_path / "one.jsonl", [{"text": "x" * 100}])
    more = write_jsonl(tmp_path / "more.jsonl", [{"text": f"text number {i}"} for i in range(100)])
    assert opened(single, tmp_path).split == "tail"
    assert opened(more, tmp_path).split == "document"
    assert opened(more, tmp_path, split="tail").split == "tail"


# Cache ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return path


def test_an_entry_is_read_again_and_not_made_again(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = opened(text, tmp_path)
    monkeypatch.setattr("training.data.corpus.write_streams", None)
    second = opened(text, tmp_path)
    assert isinstance(second.train.tokens, np.memmap)
    assert second.folder == first.folder
    assert second.held_out.tokens.tolist() == first.held_out.tokens.tolist()


def test_a_changed_file_or_setting_gives_a_new_entry(text: Path, tmp_path: Path):
    entries = {opened(text, tmp_path).folder, opened(text, tmp_path, holdout=0.2).folder}
    entries.add(opened(text, tmp_path, split="tail").folder)
    text.write_text(text.read_text().upper())
    changed = opened(text, tmp_path)
    assert len(entries | {changed.folder}) == 4
    assert decode(changed.train.tokens[:9]) == "THE QUICK"


def damage_record(entry: Path) -> None:
    (entry / "entry.json").write_text('{"split": "ta')


def remove_record(entry: Path) -> None:
    (entry / "entry.json").unlink()


def empty_record(entry: Path) -> None:
    (entry / "entry.json").write_text("[]")


def shorten_tokens(entry: Path) -> None:
    with (entry / "train.tokens").open("r+b") as file:
        file.truncate(100)


def lengthen_targets(entry: Path) -> None:
    with (entry / "held_out.targets").open("ab") as file:
        file.write(b"\1")


def odd_tokens(entry: Path) -> None:
    with (entry / "train.tokens").open("ab") as file:
        file.write(b"\1")


def empty_both(entry: Path) -> None:
    for part in ("tokens", "targets"):
        (entry / f"held_out.{part}").write_bytes(b"")


def make_it_a_file(entry: Path) -> None:
    for path in entry.iterdir():
        path.unlink()
    entry.rmdir()
    entry.write_text("no folder")


DAMAGES = [
    damage_record,
    remove_record,
    empty_record,
    shorten_tokens,
    lengthen_targets,
    odd_tokens,
    empty_both,
    make_it_a_file,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(text: Path, tmp_path: Path, damage: Callable[[Path], None]):
    first = opened(text, tmp_path)
    streams = [stream.tolist() for side in first[:2] for stream in (side.tokens, side.targets)]
    damage(first.folder)
    second = opened(text, tmp_path)
    assert [stream.tolist() for side in second[:2] for stream in (side.tokens, side.targets)] == streams
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [second.folder.name]


def test_an_interrupted_build_leaves_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.data.cache.publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            opened(text, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []
    assert opened(text, tmp_path).train.num_bytes == 810


def test_two_builders_of_one_entry_agree(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import training.data.cache

    publish = training.data.cache.publish

    def overtaken(draft: Path, entry: Path) -> None:
        monkeypatch.setattr("training.data.cache.publish", publish)
        opened(text, tmp_path)  # somebody else is first
        publish(draft, entry)

    monkeypatch.setattr("training.data.cache.publish", overtaken)
    assert opened(text, tmp_path).train.num_bytes == 810
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_cache_folder_comes_from_the_environment(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "elsewhere"))
    assert open_corpus(str(text), sequence_length=4).folder.parent == tmp_path / "elsewhere"


def test_the_cache_folder_is_where_the_system_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TINY_ONN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "tiny-onn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_folder() == tmp_path / "caches" / "tiny-onn"


def test_a_user_without_a_home_is_told_to_name_a_cache_folder(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: object) -> None:
        raise KeyError

    for name in ("HOME", "TINY_ONN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(UserError, match="TINY_ONN_CACHE: expected a folder, got none"):
        open_corpus(str(text), sequence_length=4)


def test_documents_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_jsonl(tmp_path / "big.jsonl", [{"text": f"{i} " + "x" * 100_000} for i in range(60)])  # 6 MB
    monkeypatch.setattr("training.data.cache.CHUNK", 1 << 16)
    tracemalloc.start()
    opened(path, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


@pytest.mark.parametrize("name", ["long.txt", "long.txt.gz"])
def test_a_long_text_is_read_piece_by_piece_into_the_same_tokens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = random.Random(0)
    lines = [f"{'é€x'[words.randrange(3)] * words.randrange(40)}, {i}\n" for i in range(60_000)]
    data = "".join(lines).encode() + b"caf\xe9 \xff\n" * 1000 + b"x" * 100_000 + b"\xe2\x82"  # cut within a letter
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    whole = opened(path, tmp_path)
    for piece in (1 << 16, 4099):
        monkeypatch.setattr("training.data.readers.PIECE", piece)
        monkeypatch.setattr("training.data.readers.LONG", 1 << 16)
        monkeypatch.setattr("training.data.streams.CHUNK", 1 << 16)
        monkeypatch.setattr("training.data.cache.CHUNK", 1 << 16)
        tracemalloc.start()
        pieces = open_corpus(str(path), sequence_length=4, cache_dir=tmp_path / f"other{piece}")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        for expected, actual in zip((whole.train, whole.held_out), (pieces.train, pieces.held_out), strict=True):
            assert np.array_equal(expected.tokens, actual.tokens)
            assert np.array_equal(expected.targets, actual.targets)
        assert bytes(np.concatenate((whole.train.tokens, whole.held_out.tokens))[:-1].astype(np.uint8)) == data
        assert peak < 2e6 < len(data), f"{peak} bytes for a text of {len(data)}"


def test_a_long_text_in_other_tokens_is_cut_where_no_token_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tokenizers")
    text = "".join(f"def name_{i}(x):\n    return x * {i}\n" for i in range(3000))
    (tmp_path / "long.py").write_text(text)
    train_tokenizer(str(tmp_path / "long.py"), tmp_path / "bpe", 300)
    tokenizer = open_tokenizer(tmp_path / "bpe")
    (whole,) = documents(find_source(str(tmp_path / "long.py")))
    monkeypatch.setattr("training.data.readers.PIECE", 5000)
    monkeypatch.setattr("training.data.readers.LONG", 1)
    (pieces,) = documents(find_source(str(tmp_path / "long.py")))
    assert len([*pieces]) > 20
    assert is_held_out(whole, 0.5) == is_held_out(pieces, 0.5)
    at_once, in_pieces = (
        np.concatenate([part for part, _ in tokenized(document, tokenizer)]) for document in (whole, pieces)
    )
    assert np.array_equal(at_once, in_pieces)


def test_a_late_nul_byte_makes_a_long_file_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.data.readers.PIECE", 100)
    monkeypatch.setattr("training.data.readers.LONG", 1000)
    (tmp_path / "late.txt").write_bytes(b"text\n" * 1000 + b"\0")
    with pytest.raises(UserError, match=r"late\.txt: expected a text file, got a binary one"):
        opened(tmp_path / "late.txt", tmp_path)


def test_a_bar_is_drawn_on_the_error_stream_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("training.terminal.EVERY", 0.0)
    path = write_jsonl(tmp_path / "lines.jsonl", [{"text": f"line {i}"} for i in range(99)])
    opened(path, tmp_path)
    assert capsys.readouterr() == ("", "")
    opened(path, tmp_path, holdout=0.2, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"^tokenizing .*: (\S+)B of \1B, 00:00 left$", err, re.MULTILINE)


# Batches --------------------------------------------------------------------------------------------------------------

ALPHABET = corpus(list(range(256)) * 4)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6), st.integers(0, 2**63 - 1))
def test_a_batch_depends_on_seed_and_step_alone(steps: list[int], seed: int):
    first = {step: batch_at(ALPHABET, seed, step, 3, 8) for step in steps}
    for step in reversed(steps):
        for before, again in zip(first[step], batch_at(ALPHABET, seed, step, 3, 8), strict=True):
            assert torch.equal(before, again)


def test_other_steps_and_other_seeds_give_other_batches():
    drawn = {tuple(batch_at(ALPHABET, s, t, 4, 8).input_ids[:, 0].tolist()) for s in range(10) for t in range(10)}
    assert len(drawn) == 100


def test_a_batch_is_windows_of_the_stream_with_labels_shifted_by_one():
    batch = batch_at(ALPHABET, 1, 2, 5, 16)
    assert batch.input_ids.shape == batch.labels.shape == batch.attention_mask.shape == (5, 16)
    assert {part.dtype for part in batch} == {torch.int64}
    assert torch.equal(batch.labels, (batch.input_ids + 1) % 256)
    assert batch.attention_mask.all()


def test_every_window_of_the_stream_is_drawn_equally_often():
    small = corpus(list(range(20)))
    starts = torch.cat([batch_at(small, 0, step, 100, 10).input_ids[:, 0] for step in range(100)])
    counts = torch.bincount(starts, minlength=10)
    assert counts.shape == (10,)  # the last window is that of tokens 9 to 19
    assert ((counts - 1000).abs() < 5 * math.sqrt(1000)).all()


@given(st.lists(st.integers(0, 1), min_size=30, max_size=60).filter(lambda flags: any(flags[1:])), st.integers(0, 99))
def test_no_row_is_without_a_target_and_no_label_is_a_context_token(flags: list[int], step: int):
    stream = corpus(list(range(len(flags))), flags)
    batch = batch_at(stream, 0, step, 8, 6)
    assert (batch.labels != IGNORE_INDEX).any(dim=1).all()
    learned = torch.tensor(flags)[batch.input_ids + 1] == 1
    assert torch.equal(batch.labels, torch.where(learned, batch.input_ids + 1, IGNORE_INDEX))


@pytest.mark.parametrize("place", [1, 70_000, 99_999])
def test_a_lone_target_in_a_long_text_is_found(place: int):
    flags = [0] * 100_000
    flags[place] = 1
    stream = corpus([7] * place + [8] + [7] * (99_999 - place), flags)
    batch = batch_at(stream, 0, 0, 16, 5)
    assert (batch.labels == 8).sum(dim=1).tolist() == [1] * 16
    assert torch.equal(batch.labels, batch_at(stream, 0, 0, 16, 5).labels)


# Packing --------------------------------------------------------------------------------------------------------------


def documents_of(row: torch.Tensor) -> list[list[int]]:
    """Places of each document in a row: a boundary opens one."""
    spans: list[list[int]] = [[]]
    for place, token in enumerate(row.tolist()):
        spans += [[]] if token == BOUNDARY and spans[-1] else []
        spans[-1].append(place)
    return spans


SHORT = corpus([*b"one two", BOUNDARY, *b"three", BOUNDARY, BOUNDARY, *b"four five six", BOUNDARY, *b"seven"] * 9)
SMALL = tiny_config(vocab_size=257, hidden_size=16, num_hidden_layers=2)


def logits_of(params: dict, batch: Batch, **changes: object) -> torch.Tensor:
    return forward(params, batch.input_ids, SMALL, attention_mask=batch.attention_mask, **changes)[0]


def test_a_packed_row_is_each_of_its_documents_alone():
    params = spread_params(SMALL, dtype=torch.float32)
    batch = batch_at(SHORT, 0, 0, 6, 24, pack=True)
    packed = logits_of(params, batch)
    rows = [(row, places) for row in range(6) for places in documents_of(batch.input_ids[row])]
    assert len(rows) > 12
    for row, places in rows:
        alone = forward(params, batch.input_ids[row : row + 1, places], SMALL)[0]
        assert_close(packed[row : row + 1, places], alone, 1e-5, "logits")
    unpacked = logits_of(params, batch._replace(attention_mask=torch.ones_like(batch.attention_mask)))
    assert (unpacked - packed).abs().max() > 0.1


def test_packing_changes_neither_tokens_nor_labels():
    plain, packed = (batch_at(SHORT, 3, 4, 5, 20, pack) for pack in (False, True))
    assert torch.equal(plain.input_ids, packed.input_ids)
    assert torch.equal(plain.labels, packed.labels)
    assert plain.attention_mask.unique().tolist() == [1]


def test_a_change_in_one_document_leaves_the_loss_and_gradient_of_the_others():
    params = spread_params(SMALL, dtype=torch.float64)
    batch = batch_at(SHORT, 1, 0, 1, 40, pack=True)
    first, second = documents_of(batch.input_ids[0])[:2]
    labels = torch.full_like(batch.labels, IGNORE_INDEX)
    labels[0, second] = batch.labels[0, second]
    changed = batch.input_ids.clone()
    changed[0, first[-1]] = (changed[0, first[-1]] + 1) % 256
    original, edited = (batch._replace(input_ids=ids, labels=labels) for ids in (batch.input_ids, changed))
    losses = [torch.nn.functional.cross_entropy(logits_of(params, b)[0], b.labels[0]) for b in (original, edited)]
    assert_close(losses[0], losses[1], 1e-12, "loss")
    free = [b._replace(attention_mask=torch.ones_like(labels)) for b in (original, edited)]
    losses = [torch.nn.functional.cross_entropy(logits_of(params, b)[0], b.labels[0]) for b in free]
    assert (losses[0] - losses[1]).abs() > 1e-6


def test_packed_batches_stack_and_map_like_a_loop():
    params = spread_params(SMALL, dtype=torch.float32)
    batches = [batch_at(SHORT, 0, step, 2, 16, pack=True) for step in range(3)]
    mapped = torch.func.vmap(lambda batch: logits_of(params, batch))(stack(batches))
    for logits, batch in zip(mapped, batches, strict=True):
        assert_close(logits, logits_of(params, batch), 1e-5, "logits")


@given(st.integers(1, 3), st.integers(2, 20), st.none() | st.integers(1, 99), st.integers(1, 4))
def test_held_out_rows_number_their_documents_and_score_the_same_targets(
    rows: int, length: int, max_bytes: int | None, stride: int
):
    stride = min(stride, length)
    plain = [*held_out_batches(SHORT, rows, length, max_bytes, stride)]
    packed = [*held_out_batches(SHORT, rows, length, max_bytes, stride, pack=True)]
    for plain_batch, packed_batch in zip(plain, packed, strict=True):
        assert torch.equal(plain_batch.labels, packed_batch.labels)
        assert torch.equal(plain_batch.attention_mask != 0, packed_batch.attention_mask != 0)
        for ids, mask in zip(packed_batch.input_ids, packed_batch.attention_mask, strict=True):
            count = 1
            for token, number in zip(ids.tolist(), mask.tolist(), strict=True):
                count += token == BOUNDARY
                assert number in (0, count)


# Scoring --------------------------------------------------------------------------------------------------------------

STREAMS = st.lists(st.tuples(st.integers(0, BOUNDARY), st.integers(0, 1)), min_size=3, max_size=120).map(
    lambda rows: corpus([token for token, _ in rows], [flag for _, flag in rows])
)


def has_text_to_score(stream: Corpus) -> bool:
    return bool(((stream.tokens != BOUNDARY) & (stream.targets != 0))[1:].any())


@given(
    STREAMS.filter(has_text_to_score),
    st.integers(1, 4),
    st.integers(1, 20),
    st.none() | st.integers(1, 100),
    st.data(),
)
def test_every_target_is_scored_once_with_the_context_that_was_promised(
    stream: Corpus, batch_size: int, length: int, max_bytes: int | None, data: st.DataObject
):
    stride = data.draw(st.none() | st.integers(1, length))
    places = Corpus(np.arange(1, len(stream.tokens) + 1, dtype=np.uint16), *stream[1:])  # tokens that tell their place
    end, num_targets, num_bytes = scored_span(stream, max_bytes)
    wanted = [i for i in range(1, end) if stream.targets[i]]
    limit = len(stream.tokens) if max_bytes is None else max_bytes
    bytes_up_to = [i for i in range(1, len(stream.tokens)) if stream.targets[i] and stream.tokens[i] != BOUNDARY]
    assert num_bytes == min(limit, len(bytes_up_to))
    assert num_targets == len(wanted)
    if len(bytes_up_to) >= limit:
        assert end == bytes_up_to[limit - 1] + 1

    pinned = places._replace(targets=np.where(np.arange(len(stream.tokens)) < end, stream.targets, 0).astype(np.uint8))
    positions = []
    for batch in held_out_batches(pinned, batch_size, length, None, stride):
        assert {part.shape for part in batch} == {(batch_size, length)}
        real = batch.attention_mask == 1
        assert not (~real[:, :-1] & real[:, 1:]).any()  # padding is on the right
        assert (batch.input_ids[~real] == 0).all()
        assert (batch.labels[~real] == IGNORE_INDEX).all()
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            scored = (labels != IGNORE_INDEX).nonzero().flatten().tolist()
            assert all(labels[i] == ids[i] + 1 for i in scored)
            reach = length - (max(1, length // 2) if stride is None else stride)
            assert all(i >= min(reach, int(labels[i]) - 2) for i in scored)
            positions += [int(labels[i]) - 1 for i in scored]
    assert positions == wanted


@given(STREAMS.filter(has_text_to_score), st.integers(1, 60))
def test_the_labels_under_a_byte_limit_are_the_targets_of_the_span(stream: Corpus, max_bytes: int):
    span = scored_span(stream, max_bytes)
    batches = list(held_out_batches(stream, 2, 7, max_bytes))
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    scored = labels[labels != IGNORE_INDEX]
    kept = stream.targets[1 : span.end] != 0
    assert scored.tolist() == stream.tokens[1 : span.end][kept].tolist()
    assert int((scored != BOUNDARY).sum()) == span.num_bytes
    assert all((batch.labels != IGNORE_INDEX).any() for batch in batches)


def test_spans_and_counts_do_not_depend_on_the_size_of_the_chunks(monkeypatch: pytest.MonkeyPatch):
    noise = random.Random(0)
    stream = corpus([noise.choice((65, 66, BOUNDARY)) for _ in range(500)], [noise.randrange(2) for _ in range(500)])
    whole = [scored_span(stream, limit) for limit in (None, 1, 50, 120)], baselines(stream, stream, 120)
    monkeypatch.setattr("training.data.batches.CHUNK", 7)
    assert whole == ([scored_span(stream, limit) for limit in (None, 1, 50, 120)], baselines(stream, stream, 120))


# Baselines ------------------------------------------------------------------------------------------------------------


@given(STREAMS, STREAMS.filter(has_text_to_score), st.none() | st.integers(1, 60))
def test_baselines_are_the_cost_of_the_scored_targets(train: Corpus, held_out: Corpus, max_bytes: int | None):
    end, num_targets, num_bytes = scored_span(held_out, max_bytes)
    learned = [i for i in range(1, len(train.tokens)) if train.targets[i]]
    scored = [i for i in range(1, end) if held_out.targets[i]]
    unigram = bigram = 0.0
    for i in scored:
        before, token = held_out.tokens[i - 1], held_out.tokens[i]
        behind = [j for j in learned if train.tokens[j - 1] == before]
        unigram -= math.log2((sum(train.tokens[j] == token for j in learned) + 1) / (len(learned) + VOCAB_SIZE))
        bigram -= math.log2((sum(train.tokens[j] == token for j in behind) + 1) / (len(behind) + VOCAB_SIZE))
    text = bytes(int(held_out.tokens[i]) for i in scored if held_out.tokens[i] != BOUNDARY)
    costs = baselines(train, held_out, max_bytes)
    assert list(costs) == ["uniform", "unigram", "bigram", "gzip -9", "bzip2 -9", "xz -9e"]
    assert costs["uniform"] == pytest.approx(math.log2(257) * num_targets / num_bytes)
    assert costs["unigram"] == pytest.approx(unigram / num_bytes)
    assert costs["bigram"] == pytest.approx(bigram / num_bytes)
    compressed = {
        "gzip -9": gzip.compress(text, 9, mtime=0), "bzip2 -9": bz2.compress(text, 9),
        "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    }  # fmt: skip
    for name, data in compressed.items():
        assert costs[name] == pytest.approx(8 * len(data) / len(text))


def test_the_better_baseline_wins_on_english(text: Path, tmp_path: Path):
    splits = opened(text, tmp_path)
    costs = baselines(splits.train, splits.held_out, None)
    assert costs["bigram"] < costs["unigram"] < costs["uniform"]


# Mistakes -------------------------------------------------------------------------------------------------------------

NO_USER = {"messages": [{"role": "user", "content": "?"}]}
LINES: list[tuple[str, str]] = [
    ('{"text": "a"}\n{"text": ', "line 2: expected a JSON object, got no JSON"),
    ("\xff", "line 1: expected a JSON object, got no JSON"),
    ("[" * 100_000, "line 1: expected a JSON object, got no JSON"),
    ("[1, 2]", "line 1: expected a JSON object with `text` or `messages`, got a list"),
    ("null", "line 1: expected a JSON object with `text` or `messages`, got null"),
    ('\n\n{"content": "x", "id": 1}', "line 3: expected the key `text` or `messages`, got content, id"),
    ("{}", "line 1: expected the key `text` or `messages`, got no key at all"),
    ('{"text": 5}', "line 1: expected `text` to be a string, got a number"),
    ('{"messages": "hi"}', "line 1: expected `messages` to be a list of turns, got a string"),
    ('{"messages": []}', "line 1: expected `messages` to be a list of turns, got an empty list"),
    ('{"messages": ["hi"]}', r"line 1: expected messages\[0\] to be an object, got a string"),
    ('{"messages": [{"role": "user"}]}', r"messages\[0\].content to be a string, got no such key"),
    ('{"messages": [{"role": "user", "content": null}]}', r"messages\[0\].content to be a string, got null"),
    ('{"messages": [{"role": true, "content": "x"}]}', r"messages\[0\].role to be a string, got a boolean"),
    (json.dumps(NO_USER), "expected chats with assistant turns .*, got none"),
    ("\n  \n", "expected text, got none in 1 file"),
    ("", "expected text, got an empty file"),
]


def refused(match: str, source: Path | str, tmp_path: Path, **options: object) -> None:
    """The source is refused in one line that names it, and nothing is left in the cache."""
    with pytest.raises(UserError, match=match) as caught:
        opened(source, tmp_path, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400 + len(str(source))
    assert str(source) in message or repr(str(source)) in message


@pytest.mark.parametrize(("content", "match"), LINES)
def test_a_bad_line_is_named_with_its_file_and_number(content: str, match: str, tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content.encode("latin-1"))
    refused(match, path, tmp_path)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_bad_line_behind_good_ones_leaves_no_entry(tmp_path: Path):
    path = tmp_path / "late.jsonl"
    path.write_text('{"text": "some text"}\n' * 500 + "oops\n")
    refused("line 501", path, tmp_path)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_byte_order_mark_before_json_is_no_mistake(tmp_path: Path):
    (tmp_path / "bom.jsonl").write_text('\ufeff{"text": "hello"}\n')
    assert [document[0].text for document in documents(find_source(f"{tmp_path}/bom.jsonl"))] == ["hello"]


def test_sources_that_are_no_text_are_refused(tmp_path: Path):
    import os

    folder = tmp_path / "folder"
    (folder / "sub.jsonl").mkdir(parents=True)
    refused("expected text, got none in 0 file", folder, tmp_path)
    (folder / "binary").write_bytes(b"\0\1")
    (folder / "empty").write_bytes(b"")
    refused("expected text, got none in 2 file", folder, tmp_path)
    refused("expected a text file, got a binary one", folder / "binary", tmp_path)
    refused("expected text, got an empty file", folder / "empty", tmp_path)
    refused("expected a .jsonl file, got a folder", folder / "sub.jsonl", tmp_path)
    refused("got no such thing", folder / "missing.txt", tmp_path)
    refused("got no such thing", folder / "empty" / "below", tmp_path)
    refused("got no such thing", folder / "new\nline", tmp_path)
    refused("got no match", f"{folder}/*.txt", tmp_path)
    refused("got folders only", f"{folder}/s*", tmp_path)
    refused("can be read, got: File name too long", "x" * 300, tmp_path)
    os.mkfifo(folder / "pipe")
    refused("expected a regular file", folder / "pipe", tmp_path)
    for spec in ("", "a\0b"):
        with pytest.raises(UserError, match="got no such thing"):
            find_source(spec)


@pytest.mark.parametrize("kind", ["file", "member", "jsonl"])
def test_a_file_that_may_not_be_read_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "folder" / ("secret.jsonl" if kind == "jsonl" else "secret.txt")
    path.parent.mkdir()
    path.write_text("x" * 100)

    def forbid(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", forbid)  # the tests may run as root, who may read everything
    with pytest.raises(UserError, match=r"secret\.\w+: expected a file that can be read, got: Permission denied"):
        opened(path.parent if kind == "member" else path, tmp_path)


def test_a_folder_that_may_not_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def forbid(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    (tmp_path / "secret").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", forbid)
        with pytest.raises(UserError, match="secret: expected a file that can be read, got: Permission denied"):
            find_source(f"{tmp_path}/secret")


def test_a_text_shorter_than_a_sequence_is_refused_with_both_numbers(tmp_path: Path):
    (tmp_path / "short.txt").write_text("x" * 100)
    opened(tmp_path / "short.txt", tmp_path, sequence_length=10)
    match = r"expected at least 12 tokens \(sequence_length \+ 1\) on each side, got 90 .* and 11 held out.* 100 bytes"
    refused(match, tmp_path / "short.txt", tmp_path, sequence_length=11)


def test_a_side_without_documents_is_refused_with_a_way_out(tmp_path: Path):
    path = write_jsonl(tmp_path / "two.jsonl", [{"text": "some text that trains"}] * 2)
    refused("and 0 held out.*split: tail", path, tmp_path, holdout=0.01, split="document")
    opened(path, tmp_path, holdout=0.3, split="tail")


def test_few_documents_that_would_all_be_on_one_side_are_split_by_the_tail(tmp_path: Path):
    """A folder of 13 small files: one in four of such folders has none that its hash holds out."""
    folder = tmp_path / "notes"
    folder.mkdir()
    names = (f"note {i}, which is about this and that\n" * 9 for i in range(99))
    kept = [text for text in names if not is_held_out((Segment(text, True),), 0.1)][:13]
    for i, text in enumerate(kept):
        (folder / f"{i:02}.txt").write_text(text)
    splits = opened(folder, tmp_path)
    size = sum(map(len, kept)) + len(kept)
    assert splits.split == "tail"
    assert (splits.train.tokens.size, splits.held_out.tokens.size) == (cut := int((size - 1) * 0.9), size - cut)
    assert b"".join(pieces(splits.train) + pieces(splits.held_out)) == "".join(kept).encode()
    refused("and 0 held out", folder, tmp_path, split="document")


def test_both_sides_as_one_are_the_text(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"text number {i}"} for i in range(30)])
    both = whole(opened(path, tmp_path, split="tail"))
    assert pieces(both) == [f"text number {i}".encode() for i in range(30)]
    assert (both.num_documents, both.num_bytes) == (30, int((both.tokens != BOUNDARY).sum()))
    assert both.num_targets == both.tokens.size - 1


def test_a_side_without_assistant_turns_is_refused(tmp_path: Path):
    chat = {"messages": [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "x" * 500}]}
    refused(
        "expected assistant turns on each side, got 10 .* 0 held out",
        write_jsonl(tmp_path / "a.jsonl", [chat]),
        tmp_path,
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"holdout": 0.0}, "holdout: expected more than 0 and less than 1, got 0.0"),
        ({"holdout": 1.0}, "holdout: expected more than 0 and less than 1, got 1.0"),
        ({"holdout": math.nan}, "holdout: expected more than 0 and less than 1, got nan"),
        ({"split": "head"}, "split: expected auto, document or tail, got 'head'"),
        ({"sequence_length": 0}, "sequence_length: expected 1 or more, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, object], match: str, text: Path, tmp_path: Path):
    with pytest.raises(UserError, match=match):
        opened(text, tmp_path, **options)


def test_a_cache_that_cannot_be_written_is_refused(text: Path, tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cache: expected a folder to cache tokens in, got: .*TINY_ONN_CACHE"):
        opened(text, tmp_path)


def test_batches_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="expected a text of at least 11 tokens"):
        batch_at(corpus(list(range(10))), 0, 0, 1, 10)
    with pytest.raises(UserError, match="got 10 tokens and 0 targets"):
        batch_at(corpus(list(range(10)), [1] + [0] * 9), 0, 0, 1, 4)
    with pytest.raises(UserError, match="stride: expected 1 to sequence_length"):
        next(held_out_batches(ALPHABET, 1, 4, None, 5))
    with pytest.raises(UserError, match="max_bytes: expected 1 or more"):
        scored_span(ALPHABET, 0)
    with pytest.raises(UserError, match="expected a byte to score"):
        scored_span(corpus([1, BOUNDARY]))
