"""The files that a command writes: none may cost one that it reads, another output, or a picture from before."""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import stat
import string
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path

from ..errors import Failure, UsageError
from ..fields import suggest
from ..generation.kinds import KINDS
from ..generation.record import read, recorded
from ..media.files import check_writable, is_stream
from .flags import Named

STEP = re.compile(r"(\d+-)?step-\d{3,}\.png")  # as a `Watcher` calls them
LONGEST = 120  # bytes that a field has in a file's name, which may have 255


def check(
    parser: argparse.ArgumentParser, args: argparse.Namespace, others: tuple[str, ...] = ()
) -> dict[Hashable, str]:
    """Look at all files that flags name, before any work: what is written is nothing that is read, and nothing else
    that is written; others: suffixes that --output may have beside its own.

    Returns: by what each file is known, and the flag that names it.

    Raises:
        Failure: an output cannot be written.
        UsageError: an output has another suffix than it should, or is named by two flags.
    """
    read: dict[Hashable, str] = {}
    outputs = []
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if not isinstance(action.type, Named) or value is None:
            continue
        flag, files = action.option_strings[0], [Path(action.type.file(v)) for v in (_list(value))]
        if action.type.written:
            outputs += [(flag, file, action.type.suffix, value is action.default) for file in files]
        else:
            read |= {mark: flag for file in files for mark in [*_marks(file), *_marks_within(file)]}
    written: dict[Hashable, str] = {}
    for flag, file, suffix, default in outputs:
        if suffix:
            suffixes = (suffix, *others) if flag == "--output" else (suffix,)
            folder = "" in suffixes and not file.suffix and file.is_dir()  # of frames
            if file.name:  # which an empty text lacks
                check_writable(file / "frame-001.png" if folder else file)
            if not is_stream(file) and file.suffix.lower() not in suffixes:
                known = ", ".join(dict.fromkeys(filter(None, suffixes))) + " or be a folder" * ("" in suffixes)
                raise UsageError(f"{flag} should end in {known}, got {str(file)!r}")
        known = written if default and not getattr(args, "overwrite", True) else read | written
        for mark in _marks(file):
            other = known.get(mark)  # what a whole folder is written from is looked at by who writes it
            if other is not None and (suffix or os.path.isfile(file) or other in written.values()):
                raise UsageError(f"{flag} and {other} name the same file, {file}")
        written |= dict.fromkeys(_marks(file), flag)
    return read | written


def _list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def _marks(file: Path) -> list[Hashable]:
    """By what a file is known whatever it is called: where its path leads, and its place on the disk. Devices are not
    told apart: what one of them is told is not lost to another."""
    try:
        found = os.stat(file)
    except OSError:
        return [os.path.realpath(file)]
    except ValueError:  # a null character
        return []
    return [] if stat.S_ISCHR(found.st_mode) else [os.path.realpath(file), (found.st_dev, found.st_ino)]


def _marks_within(folder: Path) -> Iterator[Hashable]:
    """The same for what a model's folder holds, as far down as models go; of pictures none reads any."""
    for pattern in ("*", "*/*") if os.path.isdir(folder) else ():
        for file in folder.glob(pattern):
            if file.suffix.lower() != ".png":
                yield from _marks(file)


def to_stdout(named: dict[Hashable, str]) -> bool:
    """Whether an output is what is printed to, so that nothing else should be printed there."""
    return any(mark in named for mark in _marks(Path("/dev/stdout")))


class Pictures:
    """Where pictures go. One that is there already is left, for the next free number, unless it is to be overwritten.

    named: see `check`.
    """

    def __init__(self, args: argparse.Namespace, named: dict[Hashable, str]):
        self.args, self.output, self.named = args, args.output, named
        self.pattern = Pattern(args.output.name) if "{" in args.output.name or "}" in args.output.name else None
        if "{" in str(args.output.parent):
            raise UsageError(f"--output: fields belong into a file's name, not its folder's, got {str(args.output)!r}")
        self.written: list[Path] = []

    def number(self, n: int, frames: int = 1) -> None:
        """There will be n pictures, or videos of so many frames.

        Raises:
            UsageError: one would replace a file that is read, or there is only one for a grid.
            Failure: one cannot be written.
        """
        self.n, self.first = n, 1
        if self.args.grid and n * frames == 1:
            raise UsageError("--grid shows several pictures, and this draws one; see --num-images")
        for kind in ("grid",) * self.args.grid + ("compare",) * self.args.compare:
            if self.pattern is None and not is_stream(self.output):
                self._check(self.output.with_stem(f"{self.output.stem}-{kind}"))
        if n == 1 or self.pattern is not None or is_stream(self.output) or self.args.resume:
            return
        name = re.compile(re.escape(self.output.stem) + r"-(\d{1,18})" + re.escape(self.output.suffix))
        there = {int(found[1]) for file in os.listdir(self.output.parent) if (found := name.fullmatch(file))}
        for number in sorted(there) if not self.args.overwrite else ():
            if self.first <= number < self.first + n and not self._numbered(number).is_dir():
                self.first = number + 1
        for number in there:
            if self.first <= number < self.first + n:
                self._check(self._numbered(number))

    def save(self, number: int, settings: dict, write: Callable) -> Path:
        """Write the picture of this number, from 0, and return where.

        settings: what the picture says of itself; write: takes the file and, by keyword, whether to replace it.

        Raises:
            Failure: it cannot be written.
        """
        return self._write(self._names(number, settings), write)

    def find(self, number: int, settings: dict) -> Path | None:
        """The picture of this number if it was drawn before, as one of its names says that has these settings."""
        settings = json.loads(json.dumps(settings))
        for file in itertools.takewhile(os.path.lexists, self._names(number, settings)):
            if file not in self.written and _said_by(file) == settings:
                self.written.append(file)
                return file
        return None

    def _names(self, number: int, settings: dict) -> Iterator[Path]:
        """What a picture may be called, the best name first."""
        if self.pattern is None and self.n > 1:
            following = itertools.count(self.first + self.n)
            return (self._numbered(i) for i in itertools.chain([self.first + number], following))
        name = self.output.name if self.pattern is None else self.pattern.fill(settings, number + 1)
        return _free_names(self.output.with_name(name))

    def save_sheet(self, kind: str, write: Callable, suffix: str | None = None) -> Path:
        """The same for a picture that shows all of them; suffix: if another than theirs."""
        beside = self.output if self.pattern is None else self.written[0]
        beside = beside if suffix is None or is_stream(self.output) else beside.with_suffix(suffix)
        return self._write(_free_names(beside.with_stem(f"{beside.stem}-{kind}")), write)

    def folder(self, folder: Path) -> Path:
        """The folder for pictures of single steps, made, without any from before: another one of this name, or this
        one cleared of them if they are to be overwritten.

        Raises:
            UsageError: one of these is read.
            Failure: it cannot be made.
        """
        for place in _free_names(folder):
            if place != folder and place.exists() and not place.is_dir():
                continue
            try:
                place.mkdir(exist_ok=True)
                before = [file for file in place.iterdir() if STEP.fullmatch(file.name)]
                for file in before if self.args.overwrite else ():
                    self._check(file, "--save-steps")
                    file.unlink()
            except OSError as error:
                raise Failure(f"cannot make the folder {place}: {error.strerror or error}") from None
            if self.args.overwrite or not before:
                break
        check_writable(place / "step-001.png")
        return place

    def _numbered(self, number: int) -> Path:
        return self.output.with_stem(f"{self.output.stem}-{number}")

    def _check(self, file: Path, flag: str = "--output") -> None:
        check_writable(file)
        other = next((self.named[mark] for mark in _marks(file) if mark in self.named), flag)
        if other != flag and self.args.overwrite:
            raise UsageError(f"{flag} and {other} name the same file, {file}")

    def _write(self, names: Iterable[Path], write: Callable) -> Path:
        if is_stream(self.output):
            write(self.output)
            return self.output
        mine = {mark for mark, flag in self.named.items() if flag == "--output"}
        for file in names:
            marks = set(_marks(file))
            kept = marks & (self.named.keys() - mine) or marks & {m for done in self.written for m in _marks(done)}
            if kept or (os.path.lexists(file) and not self.args.overwrite):
                continue
            try:
                write(file, replace=self.args.overwrite)
            except FileExistsError:  # since just now
                continue
            self.written.append(file)
            return file
        raise AssertionError  # numbers do not end


def _said_by(file: Path) -> dict | None:
    """A picture's settings, or None if it has none that can be read."""
    try:
        return read(file)[0]
    except Failure:
        return None


def _free_names(file: Path) -> Iterator[Path]:
    """A name, then the same with -2, -3, ..."""
    yield file
    for number in itertools.count(2):
        yield file.with_stem(f"{file.stem}-{number}")


class Pattern:
    """A file's name with fields in braces: the settings that a picture records, and `n`, `date`, `time`."""

    def __init__(self, text: str):
        """Raises UsageError if there is no such field, or it is written in another way."""
        known = {"prompt", "n", "date", "time", *(o.key for o in recorded() if not o.many or o.nargs is not None)}
        try:
            self.parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UsageError(f"--output {text!r}: {error}; a brace itself is written twice") from None
        for _, name, form, conversion in self.parts:
            if name is not None and name not in known:
                raise UsageError(
                    f"--output {text!r}: there is no field {{{name}}}{suggest(name, known)}; there are "
                    + ", ".join(sorted(known))
                )
            if conversion or not re.fullmatch(r"0?\d{0,2}", form or ""):
                raise UsageError(f"--output {text!r}: a field is {{{name}}}, or {{{name}:03}} with three digits")
        now = datetime.datetime.now()
        self.now = {"date": now.strftime("%Y-%m-%d"), "time": now.strftime("%H%M%S")}

    def fill(self, settings: dict, n: int) -> str:
        """The name of picture n, from 1."""
        models = {o.key for o in recorded() if o.kind is KINDS["Model"]}
        values = settings | self.now | {"n": n}
        text = ""
        for literal, name, form, _ in self.parts:
            text += literal
            if name is None:
                continue
            value = "" if values.get(name) is None else values[name]
            value = os.path.basename(value) if name in models else value
            text += format(value, form) if isinstance(value, int) else format(safe(str(value)), form.lstrip("0"))
        stem, suffix = os.path.splitext(text)
        return _cut(stem, 2 * LONGEST - 20).lstrip("-") + suffix


def safe(text: str) -> str:
    """Text as a part of a file's name on any system: nothing that leads elsewhere, hides or steers."""
    text = unicodedata.normalize("NFC", text)
    text = "".join(" " if unicodedata.category(c)[0] in "CZ" else "_" if c in '/\\:*?"<>|' else c for c in text)
    return _cut(" ".join(text.split()).strip(" .-"), LONGEST).rstrip(" .") or "_"


def _cut(text: str, size: int) -> str:
    return text.encode()[:size].decode(errors="ignore")
