"""Authenticates requests: from the `Authorization` header to an identity."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from serving.errors import AuthenticationError, PermissionDeniedError, SettingsError
from serving.router.access.keys_file import KeyRecord, read_keys, split_key, verify_secret
from serving.settings.tenants import ANONYMOUS, Identity

logger = logging.getLogger(__name__)

_SCHEME = b"bearer"  # RFC 6750; the scheme's case does not matter: RFC 9110, section 11.1
_MAX_HEADER = 200
_Stamp = tuple[int, int, int]


class Authenticator:
    """Holds the keys file's content. Verified keys are not cached: the whole check takes a few microseconds, mostly one
    SHA-256 over 59 bytes, which a cache would need for its own key."""

    def __init__(
        self, keys_file: Path | None, clock: Callable[[], float] = time.time, *, is_local: bool = False
    ) -> None:
        """Read the file. Without one every request is accepted, as an admin's if the router `is_local`: only this
        machine can reach it.

        Raises:
            SettingsError: the file cannot be used.
        """
        self._file = keys_file
        self._anonymous = dataclasses.replace(ANONYMOUS, is_admin=is_local)
        self._clock = clock
        self._stamp: _Stamp | None = None
        self._known: dict[str, tuple[KeyRecord, Identity]] = {}
        if keys_file is not None:
            self._stamp = _read_stamp(keys_file)
            self._known = _load(keys_file)

    @property
    def is_open(self) -> bool:
        """Whether requests need no key."""
        return self._file is None

    def identify(self, headers: Mapping[bytes, bytes]) -> Identity:
        """Identify the tenant of a request.

        Args:
            headers: names in small letters.

        Raises:
            AuthenticationError: the key is missing or invalid; the message never says which part was wrong.
        """
        if self._file is None:
            return self._anonymous
        header = headers.get(b"authorization")
        if header is None:
            raise AuthenticationError(
                "You didn't provide an API key. Provide it in an Authorization header using Bearer auth "
                "(i.e. Authorization: Bearer YOUR_KEY)."
            )
        scheme, _, text = header[:_MAX_HEADER].partition(b" ")
        parts = split_key(text.strip().decode("latin-1")) if scheme.lower() == _SCHEME else None
        key_id, secret = parts or ("", "")
        record, identity = self._known.get(key_id, (None, ANONYMOUS))
        if not verify_secret(record, secret) or record is None:
            raise AuthenticationError("Incorrect API key provided.")
        if record.is_expired(self._clock()):
            raise AuthenticationError("This API key has expired.", code="expired_api_key")
        return identity

    def reload_if_changed(self) -> bool:
        """Read the file again if it has changed; otherwise this costs one `stat`.

        If the file cannot be used, the keys of the last valid one stay in force. May run in a thread: large files take
        a while to parse.

        Returns:
            Whether the keys have changed.
        """
        if self._file is None:
            return False
        try:
            stamp = _read_stamp(self._file)
            if stamp == self._stamp:
                return False
            # Set before reading, so that a file that changes meanwhile is read again, and an error is logged once per
            # change.
            self._stamp = stamp
            self._known = _load(self._file)
        except SettingsError as error:
            logger.error("the keys file cannot be used, the keys from before stay in force: %s", error)
            return False
        logger.info("%d keys read from %s", len(self._known), self._file)
        return True


def check_model_allowed(identity: Identity, model: str, *aliases: str) -> None:
    """Refuse a model that the tenant may not use.

    Answered with 403, not 404: which models exist is no secret, and after a 404 a client would look for a spelling
    mistake instead of asking for access.

    Args:
        identity: whose request it is.
        model: canonical name.
        aliases: its other names; a tenant may be granted the model by any of them.

    Raises:
        PermissionDeniedError: the tenant may not use it.
    """
    allowed = identity.tenant.models
    if allowed is not None and not any(name in allowed for name in (model, *aliases)):
        raise PermissionDeniedError(
            f"Your key does not give access to the model '{model}'.", param="model", code="model_not_allowed"
        )


def _read_stamp(file: Path) -> _Stamp:
    """A value that changes with the content. Follows links: Kubernetes updates a mounted secret by replacing one."""
    try:
        found = file.stat()
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}") from error
    return found.st_mtime_ns, found.st_size, found.st_ino


def _load(file: Path) -> dict[str, tuple[KeyRecord, Identity]]:
    content = read_keys(file)
    return {
        key.id: (key, Identity(key.tenant, content.tenants[key.tenant], key_id=key.id, is_admin=key.is_admin))
        for key in content.keys
    }
