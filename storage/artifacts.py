"""Files under one root, on a local disk or any fsspec URL, addressed by checked keys.

Belongs here: keys that cannot leave the root, atomic writes, hashes of what was written. Does not: which
file holds what (`keys.py`), when a result counts as finished (`manifest.py`), the inside of a file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upath import UPath

from storage.errors import ArtifactError, UserError

_PART = re.compile(r"[A-Za-z0-9_.=+-]{1,120}")
_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", "conin$", "conout$"]
    + [f"com{i}" for i in range(10)]
    + [f"lpt{i}" for i in range(10)]
)
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
# Stores where a folder is only a prefix: making one costs a request, or even tries to create a bucket.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "http", "https"})
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_READ_ONLY = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
# What some network file systems answer when a folder is to be synced.
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS})
# What tells one version of an object from the next, where a store lists it; names differ by store.
_MARKS = ("ETag", "etag", "md5Hash", "md5", "generation", "LastModified", "last_modified", "mtime", "created")
# Seconds for which a write holds out against somebody who removes its folder.
_PATIENCE = 5.0


# The fields and methods below are named like the types.
_Bytes = bytes
_Keys = list[str]


@dataclass(frozen=True)
class FileRecord:
    """What a file must be to count as the file that was written. `sha256`: hex digest; `bytes`: its
    length.
    """

    sha256: str
    bytes: int

    @classmethod
    def of(cls, data: _Bytes) -> FileRecord:
        return cls(hashlib.sha256(data).hexdigest(), len(data))

    def problem(self, data: _Bytes) -> str | None:
        """Why `data` is not that file, or None."""
        if len(data) < self.bytes:
            return f"the file is truncated: {len(data)} of {self.bytes} bytes"
        if len(data) != self.bytes:
            return f"the file has {len(data)} bytes instead of {self.bytes}"
        if hashlib.sha256(data).hexdigest() != self.sha256:
            return "the file was altered after it was written (its SHA-256 differs)"
        return None


def is_device_name(name: str) -> bool:
    """Whether Windows would take `name` (with any extension) for a device instead of a file."""
    return name.split(".", 1)[0].rstrip(" ").lower() in _DEVICES


def to_json(obj: Any, *, where: str = "$") -> Any:
    """`obj` as plain JSON types; numpy scalars become Python numbers, tuples lists, integer keys strings.

    Raises UserError naming the path inside `obj` for NaN, infinities and types that JSON does not have.
    """
    if obj is None or isinstance(obj, bool | str):
        return str(obj) if isinstance(obj, str) else obj
    if isinstance(obj, int):
        return int(obj)
    if isinstance(obj, float):
        if not math.isfinite(obj):
            raise UserError(
                f"{obj} cannot be stored", where=where, remedy="Store null where there is no number."
            )
        return float(obj)
    if isinstance(obj, dict):
        out: dict[str, Any] = {}
        for key, value in obj.items():
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise UserError(f"the key {key!r} is neither a string nor an integer", where=where)
            if str(key) in out:
                raise UserError(f"the key {key!r} occurs as a string and as an integer", where=where)
            out[str(key)] = to_json(value, where=f"{where}.{key}")
        return out
    if isinstance(obj, list | tuple):
        return [to_json(value, where=f"{where}[{i}]") for i, value in enumerate(obj)]
    # numpy scalars, without importing numpy here
    if getattr(obj, "shape", None) == () and hasattr(obj, "dtype") and hasattr(obj, "item"):
        return to_json(obj.item(), where=where)
    raise UserError(
        f"a {type(obj).__name__} cannot be stored as JSON",
        where=where,
        remedy="Give plain numbers, strings, lists and dictionaries.",
    )


def encode_json(obj: Any, *, indent: int | None = 1) -> bytes:
    """UTF-8 JSON, the same bytes for equal objects: sorted keys, no NaN, a newline at the end."""
    plain = to_json(obj)
    separators = (",", ": ") if indent is not None else (",", ":")
    text = json.dumps(
        plain, sort_keys=True, allow_nan=False, indent=indent, separators=separators, ensure_ascii=False
    )
    try:
        return (text + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair has no UTF-8 form, an escape keeps it
        text = json.dumps(plain, sort_keys=True, allow_nan=False, indent=indent, separators=separators)
        return (text + "\n").encode("ascii")


class ArtifactStore:
    """Bytes and JSON under `root` by key.

    On a local disk a write is atomic and durable: temporary file in the same folder, fsync, rename, fsync
    of the folder. Elsewhere it is a plain write; a reader that must not trust it passes the `FileRecord`
    it expects.
    """

    def __init__(self, root: str | os.PathLike[str] | UPath) -> None:
        given = root if isinstance(root, UPath) else UPath(os.fspath(root))
        self._local: Path | None = None
        if given.protocol in ("", "file", "local"):
            self._local = Path(os.path.abspath(given.path))
            given = UPath(str(self._local))
        elif not isinstance(root, UPath):
            # A cached listing would hide what another process wrote.
            given = UPath(os.fspath(root), use_listings_cache=False)
        # Links inside the root may not lead out of it; the root itself may be one.
        self._real = None if self._local is None else os.path.realpath(self._local)
        self.root: UPath = given
        self._fs = None if self._local is not None else given.fs
        self._base = given.path.rstrip("/")

    # Addresses

    @staticmethod
    def check_key(key: str) -> str:
        """`key` if it is a legal one: relative, "/"-separated, harmless on every file system. UserError
        otherwise.
        """
        if not isinstance(key, str) or not key:
            raise UserError(f"{key!r} is not a storage key", remedy="Give a relative path.")
        if len(key) > 700:
            raise UserError(f"the storage key {key[:60]!r}… has {len(key)} characters; 700 are allowed")
        for part in key.split("/"):
            if not _PART.fullmatch(part) or part.endswith(".") or part == ".." or is_device_name(part):
                raise UserError(
                    f"{part!r} is not allowed in the storage key {key!r}",
                    remedy="Use parts of 1 to 120 characters from A-Z a-z 0-9 _ . = + - (no device names).",
                )
            if _TEMPORARY.fullmatch(part):
                raise UserError(f"{part!r} is reserved for unfinished files")
        return key

    def _path(self, key: str) -> Path:
        assert self._local is not None
        return Path(f"{self._local}/{self.check_key(key)}")

    def _url(self, key: str) -> str:
        return f"{self._base}/{self.check_key(key)}"

    def local_path(self, key: str) -> Path | None:
        """The file's path on a local disk (for memory-mapping), None for any other store."""
        self.check_key(key)
        return None if self._local is None else self._path(key)

    def describe(self, key: str) -> str:
        """What to show a human: an absolute path or a URL."""
        return str(self._path(key)) if self._local is not None else f"{str(self.root).rstrip('/')}/{key}"

    def _refuse_way_out(self, path: Path) -> None:
        """UserError where a link below the root would have `path` written or removed somewhere else."""
        real = os.path.realpath(path.parent)
        if self._inside(real):
            return
        # the root may have become a link since, or have been one that was set anew
        self._real = os.path.realpath(str(self._local))
        if not self._inside(real):
            raise UserError(
                f"a link leads out of the results folder, to {real}",
                where=str(path),
                remedy=f"Remove the link, or make {self._local} itself the link.",
            )

    def _inside(self, real: str) -> bool:
        assert self._real is not None
        return real == self._real or real.startswith(self._real.rstrip(os.sep) + os.sep)

    # Writing

    def write_bytes(self, key: str, data: bytes) -> FileRecord:
        """Put `data` at `key`, replacing what was there. UserError when the disk is full or not writable."""
        self.check_key(key)
        record = FileRecord.of(data)
        try:
            if self._local is not None:
                self._refuse_way_out(self._path(key))
                self._write_local(self._path(key), data)
            else:
                self._write_remote(self._url(key), data)
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise UserError(
                    "no space left to write this file",
                    where=self.describe(key),
                    remedy="Free some space and run again; everything finished before is kept.",
                ) from error
            if error.errno in _READ_ONLY or isinstance(
                error,
                NotADirectoryError
                | IsADirectoryError
                | FileExistsError
                | FileNotFoundError
                | PermissionError,
            ):
                raise UserError(
                    f"this file cannot be written ({error.strerror or error})",
                    where=self.describe(key),
                    remedy="Check that the folder or bucket exists, its owner, permissions and mount.",
                ) from error
            raise
        return record

    @staticmethod
    def _write_local(path: Path, data: bytes) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
            try:
                _make_folders(path.parent)
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
                _sync_folder(path.parent)
                return
            except FileNotFoundError:
                # another process has just removed the folder, which was empty for it
                if time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(0, 0.02))
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise

    def _write_remote(self, url: str, data: bytes) -> None:
        assert self._fs is not None
        if self.root.protocol not in _OBJECT_STORES:
            self._fs.makedirs(url.rsplit("/", 1)[0], exist_ok=True)
        self._fs.pipe_file(url, data)

    def write_json(self, key: str, obj: Any) -> FileRecord:
        """Put `obj` at `key` as deterministic JSON. UserError naming the path inside `obj` for NaN and
        alien types.
        """
        try:
            data = encode_json(obj)
        except UserError as error:
            raise UserError(
                error.what, where=f"{self.describe(key)} at {error.where}", remedy=error.remedy
            ) from None
        return self.write_bytes(key, data)

    # Reading

    def read_bytes(self, key: str, expect: FileRecord | None = None) -> bytes:
        """The file's content. ArtifactError when it is missing or is not the file that `expect` describes."""
        try:
            if self._local is not None:
                data = self._path(key).read_bytes()
            else:
                assert self._fs is not None
                data = self._fs.cat_file(self._url(key))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ArtifactError(
                "the file is missing",
                where=self.describe(key),
                remedy="Run its stage again; it is rebuilt from what is there.",
            ) from error
        except PermissionError as error:
            raise UserError(
                f"the file cannot be read ({error.strerror or error})",
                where=self.describe(key),
                remedy="Check its owner and permissions, or the credentials of the store.",
            ) from error
        if expect is not None and (problem := expect.problem(data)) is not None:
            raise ArtifactError(
                problem,
                where=self.describe(key),
                remedy="Run its stage again; it is rebuilt from what is there.",
            )
        return data

    def read_json(self, key: str, expect: FileRecord | None = None) -> Any:
        """The parsed file. ArtifactError when it is missing, altered, or no JSON."""
        data = self.read_bytes(key, expect)
        try:
            return json.loads(data, parse_constant=_refuse_constant)
        except ValueError as error:
            raise ArtifactError(
                f"the file is not valid JSON ({error})",
                where=self.describe(key),
                remedy="Delete it and run its stage again.",
            ) from error

    def exists(self, key: str) -> bool:
        if self._local is not None:
            return self._path(key).is_file()
        assert self._fs is not None
        self._fs.invalidate_cache()
        return bool(self._fs.isfile(self._url(key)))

    def size(self, key: str) -> int:
        """Length in bytes. ArtifactError when the file is missing."""
        try:
            if self._local is not None:
                return self._path(key).stat().st_size
            assert self._fs is not None
            self._fs.invalidate_cache()
            return int(self._fs.size(self._url(key)))
        except FileNotFoundError as error:
            raise ArtifactError("the file is missing", where=self.describe(key)) from error

    def mark(self, key: str) -> str | None:
        """What changes when the file is written again, without reading it; None when it is missing."""
        try:
            if self._local is not None:
                return _mark_of(self._path(key).stat())
            assert self._fs is not None
            self._fs.invalidate_cache()
            return _mark_of_object(self._fs.info(self._url(key)))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def marks(self, prefix: str = "") -> dict[str, str]:
        """Key → mark of all files under the folder `prefix`, by listing it."""
        if self._local is not None:
            found = {key: self.mark(key) for key in self.list(prefix)}
            return {key: mark for key, mark in found.items() if mark is not None}
        if prefix:
            self.check_key(prefix)
        return {key: _mark_of_object(info) for key, info in self._walk_remote(prefix)}

    def list(self, prefix: str = "") -> _Keys:
        """All keys under the folder `prefix` (recursive, sorted; unfinished and hidden files left out)."""
        if prefix:
            self.check_key(prefix)
        return sorted(self._walk(prefix))

    def _walk(self, prefix: str) -> Iterator[str]:
        if self._local is not None:
            top = self._local.joinpath(*prefix.split("/")) if prefix else self._local
            cut = len(str(self._local)) + 1
            for folder, folders, files in os.walk(top):
                folders[:] = [name for name in folders if not name.startswith(".")]
                relative = folder[cut:].replace(os.sep, "/")
                for name in files:
                    if not name.startswith("."):
                        yield f"{relative}/{name}" if relative else name
            return
        yield from (key for key, _ in self._walk_remote(prefix))

    def _walk_remote(self, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        assert self._fs is not None
        self._fs.invalidate_cache()
        top_url = f"{self._base}/{prefix}" if prefix else self._base
        try:
            found = self._fs.find(top_url, detail=True)
        except FileNotFoundError:  # not even a bucket
            return
        except PermissionError as error:
            raise self._not_listed(prefix, error) from error
        for url, info in found.items():
            key = url[len(self._base) :].lstrip("/") if url.startswith(f"{self._base}/") else ""
            # `find` of a plain file gives the file itself; consoles leave objects named like folders
            inside = bool(key) and not key.endswith("/") and (not prefix or key.startswith(f"{prefix}/"))
            if inside and not any(part.startswith(".") for part in key.split("/")):
                yield key, info

    def _not_listed(self, prefix: str, error: PermissionError) -> UserError:
        return UserError(
            f"the folder cannot be listed ({error.strerror or error})",
            where=self.describe(prefix),
            remedy="Check the credentials of the store.",
        )

    def children(self, prefix: str = "") -> _Keys:
        """Names directly under the folder `prefix`, sorted; hidden ones left out."""
        if prefix:
            self.check_key(prefix)
        if self._local is not None:
            top = self._local.joinpath(*prefix.split("/")) if prefix else self._local
            try:
                names = [entry.name for entry in os.scandir(top)]
            except (FileNotFoundError, NotADirectoryError):
                return []
        else:
            assert self._fs is not None
            self._fs.invalidate_cache()
            top_url = f"{self._base}/{prefix}" if prefix else self._base
            try:
                listed = self._fs.ls(top_url, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
            except PermissionError as error:
                raise self._not_listed(prefix, error) from error
            # the listing of a file is the file itself, that of a folder may name the folder
            names = [
                url.rstrip("/").rsplit("/", 1)[-1]
                for url in listed
                if url.rstrip("/").rpartition("/")[0].lstrip("/") == top_url.lstrip("/")
            ]
        return sorted({name for name in names if name and not name.startswith(".")})

    # Removing

    def delete(self, key: str) -> bool:
        """Remove one file; False when it was not there."""
        try:
            if self._local is not None:
                self._refuse_way_out(self._path(key))
                self._path(key).unlink()
                return True
            assert self._fs is not None
            self._fs.invalidate_cache()
            if not self._fs.isfile(self._url(key)):
                return False
            self._fs.rm_file(self._url(key))
            return True
        except FileNotFoundError:
            return False

    def delete_tree(self, prefix: str) -> int:
        """Remove everything under the folder `prefix` and the folder itself; gives the number of files."""
        self.check_key(prefix)
        if self._local is not None:
            self._refuse_way_out(self._path(prefix) / "x")
        keys = self.list(prefix)
        for key in keys:
            self.delete(key)
        if self._local is not None:
            top = self._path(prefix)
            for folder, _, files in os.walk(top, topdown=False):
                for name in files:
                    if _TEMPORARY.fullmatch(name):
                        with suppress(OSError):
                            os.unlink(os.path.join(folder, name))
                with suppress(OSError):  # a file that another process has just written keeps its folder
                    os.rmdir(folder)
        elif self._fs is not None and self.root.protocol not in _OBJECT_STORES:
            with suppress(OSError):
                if self._fs.isdir(self._url(prefix)):
                    self._fs.rm(self._url(prefix), recursive=True)
        return len(keys)

    def remove_leftovers(self, prefix: str = "", *, older_than: float = 3600.0) -> int:
        """Remove temporary files that killed writers left behind (local disks); age in seconds. Gives
        their number.
        """
        if self._local is None:
            return 0
        top = self._path(prefix) if prefix else self._local
        removed = 0
        for folder, _, files in os.walk(top):
            for name in files:
                path = os.path.join(folder, name)
                if _TEMPORARY.fullmatch(name):
                    with suppress(OSError):
                        if time.time() - os.stat(path).st_mtime > older_than:
                            os.unlink(path)
                            removed += 1
        return removed


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _make_folders(folder: Path) -> None:
    """Like mkdir -p, and durable: each new entry is synced into its parent."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there; NTFS journals the rename itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _mark_of(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"


def _mark_of_object(info: dict[str, Any]) -> str:
    # one name alone: times differ in precision between the ways to ask
    version = next((str(info[name]).strip('"') for name in _MARKS if info.get(name)), "")
    return f"{info.get('size')}-{version}"
