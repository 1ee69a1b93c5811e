"""Text files as editors write them."""

import io
import sys

import pytest

from mlx_deepcache.errors import Failure
from mlx_deepcache.media.files import check_writable, read_text

TEXT = "ein Märchenwald\n猫\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_with_and_without_a_mark(tmp_path, monkeypatch, encoding):
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    assert read_text(tmp_path / "a.txt") == TEXT
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode(encoding))))
    assert read_text("-") == TEXT


@pytest.mark.parametrize("data", [b"\xff\xfe\0", b"a\0b", b"\x80abc", TEXT.encode("utf-16-le"), TEXT.encode("utf-32")])
def test_what_is_no_text(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(Failure, match="cannot read .*a.txt: expected text in UTF-8"):
        read_text(tmp_path / "a.txt")


def test_standard_input_that_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(Failure, match="cannot read standard input: it is closed"):
        read_text("-")


def test_links_in_a_circle(tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "new.png").symlink_to("later.png")
    with pytest.raises(Failure, match="cannot write .*loop.png: Too many levels of symbolic links"):
        check_writable(tmp_path / "loop.png")
    check_writable(tmp_path / "new.png")
