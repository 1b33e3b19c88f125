"""Keyed signatures that tell which stored texts this user has made on this machine.

A signature file, beside the texts, has a line with a code for every text that was stored. The code is added before its
text, so that no crash leaves a text without one. It reveals nothing and may be uploaded with the run.
"""

import hmac
import os
import secrets
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ksuit_runner.errors import ResumeError
from ksuit_runner.system.atomic_files import append_line
from ksuit_runner.system.untrusted_files import UnsafeFileError, open_file, read_text

KEY_VARIABLE = "KSUIT_KEY_FILE"
"""Variable of the environment that names the file of the key, by default ``~/.local/state/ksuit_runner/key``."""

_KEY_BYTES = 32
_SIZE_LIMIT = 100_000_000  # a sweep has a code for every job


def sign(signature: Path, *texts: str) -> None:
    """Sign texts that are about to be stored; nothing is signed where no key can be stored.

    Args:
        signature: File of the codes, beside the texts.
        *texts: The texts, as they are stored.
    """
    if key := _key(may_create=True):
        append_line(signature, "\n".join(_code(key, text) for text in texts))


def is_signed(signature: Path, texts: Sequence[str]) -> bool:
    """Whether this user has stored these texts on this machine, and nobody has changed them since."""
    key = _key()
    try:
        known = set(read_text(signature, signature.parent, _SIZE_LIMIT).split()) if key else set()
    except UnsafeFileError:
        return False
    return key is not None and all(_code(key, text) in known for text in texts)


def _code(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(errors="surrogatepass"), "sha256").hexdigest()


def key_path() -> Path:
    """Return the file of the key."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(os.environ.get(KEY_VARIABLE) or f"{state}/ksuit_runner/key").absolute()


def _key(may_create: bool = False) -> bytes | None:
    """Return the user's key, None if there is none that only this user can read."""
    path = key_path()
    with suppress(OSError, UnsafeFileError, ResumeError):
        if may_create and not path.exists():
            _create(path)
        with os.fdopen(open_file(path), "rb") as file:
            status, key = os.fstat(file.fileno()), file.read(_KEY_BYTES)
        is_private = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        return key if is_private and len(key) == _KEY_BYTES else None
    return None


def _create(path: Path) -> None:
    """Make a key; of two processes that do so at once, one key stays."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, secrets.token_bytes(_KEY_BYTES))
        os.fsync(descriptor)
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.close(descriptor)
        draft.unlink()
