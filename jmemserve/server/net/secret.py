"""The secret that the processes of one cluster share: who does not know it can neither join nor read blocks."""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from jmemserve.errors import ConfigError

VARIABLE = "JMEMSERVE_SECRET"  # in the environment: hexadecimal digits
_LENGTH = 32  # bytes
NONCE = 16


def default_secret_file() -> Path:
    """The user's own secret, good for all processes of this user that see this file."""
    return Path.home() / ".cache" / "jmemserve" / "secret"


def load_secret(path: str | None) -> bytes:
    """From the environment, else from the file, which is made if it is the user's own. Raises ConfigError."""
    given = os.environ.get(VARIABLE)
    if given and path is None:
        try:
            found = bytes.fromhex(given)
        except ValueError:
            raise ConfigError(f"{VARIABLE} in the environment must be hexadecimal digits") from None
        return _checked(found, VARIABLE)
    file = default_secret_file() if path is None else Path(path).expanduser()
    try:
        if path is None and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f"secret.{os.getpid()}")
            temporary.touch(mode=0o600)
            temporary.write_bytes(make_secret())
            try:
                os.link(temporary, file)  # whoever comes second keeps what the first one made
            except FileExistsError:
                pass
            temporary.unlink()
        return _checked(file.read_bytes().strip(), str(file))
    except OSError as error:
        raise ConfigError(f"--secret-file {file} cannot be used: {error.strerror}") from None


def make_secret() -> bytes:
    """A new one, in hexadecimal digits."""
    return secrets.token_hex(_LENGTH).encode()


def _checked(secret: bytes, where: str) -> bytes:
    if len(secret) < NONCE:
        raise ConfigError(f"the secret in {where} has {len(secret)} bytes; it needs at least {NONCE}")
    return secret


def proof(secret: bytes, who: bytes, nonces: bytes) -> bytes:
    """That ``who`` knows the secret, for these two nonces."""
    return hmac.new(secret, who + nonces, hashlib.sha256).digest()


def is_proof(given: bytes, secret: bytes, who: bytes, nonces: bytes) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(given, proof(secret, who, nonces))
