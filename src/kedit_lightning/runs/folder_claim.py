"""The claim of a run on its output folder, which no other run may use meanwhile."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from kedit_lightning.errors import OutputFolderError, ResumeError

#: The lock, which the system takes back when its process ends, and who holds it.
_LOCK, _OWNER = ".lock", ".owner.json"


@contextmanager
def claimed(path: Path, create: bool, option: str = "--output") -> Iterator[None]:
    """Claim a folder for this process; inside, no other process can.

    Args:
        path: The folder.
        create: Make the folder where there is none.
        option: What names the folder on the command line.

    Raises:
        OutputFolderError: Another run has claimed it, or it cannot be written to.
        ResumeError: There is no such folder, and none is to be made.
    """
    if not (create or path.is_dir()):
        raise ResumeError(
            f"{path} holds no run to continue; start one with --output {path}, or correct --resume"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / _LOCK, blocking=False)
        lock.acquire()
    except Timeout as error:
        raise OutputFolderError(
            f"{path} is in use by another run ({_owner(path)}); wait for its end, or name another "
            f"folder with {option}"
        ) from error
    except (OSError, NotImplementedError, ValueError) as error:
        raise OutputFolderError(
            f"{path} cannot be used as an output folder ({error}); name one that can be written "
            "to, or change its rights"
        ) from error
    try:
        _write_owner(path)
        yield
    finally:
        (path / _OWNER).unlink(missing_ok=True)
        lock.release()


def _write_owner(path: Path) -> None:
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": shlex.join(sys.orig_argv),
    }
    try:
        (path / _OWNER).write_text(json.dumps(owner), encoding="utf-8")
    except OSError as error:
        raise OutputFolderError.of(path, error) from error


def _owner(path: Path) -> str:
    try:
        owner = json.loads((path / _OWNER).read_text(encoding="utf-8"))
        command = " ".join(owner["command"].split())
        return (
            f"process {owner['pid']} on {owner['host']}, started at {owner['started']}: {command}"
        )
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ):  # it is just beginning or ending
        return "its process is not known"
