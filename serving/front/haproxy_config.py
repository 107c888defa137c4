"""HAProxy's configuration, as a function of the settings. Pure.

It is written once, when the process starts, and never reloaded: a reload ends streams that are older than its grace.
Replicas come and go through `slots.py` instead.

What is tried again on another replica, `router.max_tries` times in all:

- A connection that is refused or times out: always. Nothing has been sent, whatever the size of the request.
- A replica that hangs up without a byte of an answer, or answers 503: when the whole request fits into `BUFFER_BYTES`
  less a kilobyte, since HAProxy has to hold it. Of a larger request the client sees the 502 or the 503.

Never: a request whose answer has begun, one that took too long, or one that got any other answer; and a document that
had come to a replica, which may have made a job of it. Generating twice is safe: nothing is stored, and a replica bills
what it sends.

A stream that breaks ends without its last chunk and without `[DONE]`, which every HTTP client takes for an error:
HAProxy cannot add an event to it. Bytes that are no HTTP at all, and headers that come too slowly, get HAProxy's own
400 and 408 page: it has no other for a request that it could not read. A body without content-length is measured by
the replica.
"""

from __future__ import annotations

import json
import math
import re

from serving.errors import (
    BodyTooLargeError,
    HeadersTooLargeError,
    InternalError,
    InvalidRequestError,
    NoReplicaError,
    PermissionDeniedError,
    ReplicaTimeoutError,
    ReplicaUnreachableError,
    RequestTimeoutError,
    ServingError,
    SettingsError,
)
from serving.settings import ModelSettings, Settings

FRONTEND = "clients"
BACKEND = "replicas"
BUFFER_BYTES = 2**19
"""Bytes of a request, or of an answer under way, that one connection may hold."""

_MIN_SLOTS = 32
_SLOTS_PER_REPLICA = 4
_MAX_CONNECTIONS = 20_000
_SPARE_FILES = 200
_HOT_BUFFERS = 32
_MIN_BUFFERS = 256
_MAX_MS = 2**31 - 1
_KEEP_ALIVE_S = 75.0
_FORM_BYTES = 128 * 1024
"""What a form or JSON may add to a document."""
_CHECK_S = 5.0
"""A replica whose event loop is held for less is not taken for dead."""
_HOST = re.compile(r"[A-Za-z0-9.:_-]+")

# HAProxy's own answers: it has a status, the message is ours. `http-error` knows no other statuses.
_ERRORS: tuple[ServingError, ...] = (
    InvalidRequestError("This is not a request that can be read."),
    PermissionDeniedError("This request is not allowed."),
    RequestTimeoutError("The request did not arrive in time."),
    InternalError("The server failed on this request; it was not your request's format. Try again."),
    ReplicaUnreachableError("The model's replica ended without an answer. Try again."),
    NoReplicaError("No replica of the model is ready; try again shortly."),
    ReplicaTimeoutError("The model did not answer in time."),
)

_TEMPLATE = """\
global
    maxconn {max_connections}
    nbthread {num_threads}
    hard-stop-after {drain}
    tune.bufsize {buffer_bytes}
    # Each thread keeps so much at hand: with the default 512 kB, buffers of this size would be made anew every time.
    tune.memory.hot-size {hot_bytes}
    tune.buffers.limit {max_buffers}
    # Lives as long as the two processes that hold its ends; nobody else can speak to it.
    stats socket sockpair@{control_fd} level admin
    stats timeout 1m

defaults
    mode http
    maxconn {max_connections}
    timeout connect {connect}
    timeout client {client}
    timeout server {read}
    timeout tunnel {read}
    timeout check {check}
    timeout http-request {header}
    timeout http-keep-alive {keep_alive}
    # A chunk goes out at once, though more is known to follow.
    option http-no-delay
    # Browsers connect ahead of need, load balancers to see who is there: neither wants a 408.
    option http-ignore-probes
    # A client that hangs up ends its request on the replica, before the first byte of the answer too.
    option abortonclose
    option forwardfor
    retries {num_retries}
    option redispatch 1
    retry-on conn-failure empty-response 503
{errors}

frontend {frontend}
    bind {address}
    option disable-h2-upgrade
    http-request return {headers_too_large} if {{ req.hdrs,length gt {max_header_bytes} }}
    acl is_document path_beg /v1/ocr /v1/openai/ocr
    http-request return {body_too_large} if !is_document {{ req.body_size gt {max_body_bytes} }}
    http-request return {document_too_large} if is_document {{ req.body_size gt {max_document_bytes} }}
    # A job that is asked for twice is two jobs.
    http-request disable-l7-retry if is_document
    # A request that fits is sent on when it is whole: slow bodies cost no replica anything, and it can be sent twice.
    http-request wait-for-body time {body}
    default_backend {backend}

backend {backend}
    balance leastconn
    # A connection of its own for every request: one that is used again may have been closed by the replica a moment
    # ago, and a large request would be lost with it. It costs a tenth of a millisecond.
    option http-server-close
    option httpchk
    http-check send meth GET uri /health ver HTTP/1.1 hdr host replica
    http-check expect status 200
    # One failed connection takes a replica out, and so do two failed checks in a row; one good check brings it back.
    default-server inter 500ms fastinter 200ms downinter 500ms fall 2 rise 1
    default-server observe layer4 error-limit 1 on-error mark-down
    server-template slot 1-{num_slots} 127.0.0.1:1 check disabled
"""


def render_config(settings: Settings, *, control_fd: int, max_files: int) -> str:
    """The text of the configuration file.

    Args:
        settings: the whole of them; one model.
        control_fd: number of the inherited socket that commands come through.
        max_files: how many files the process may have open; each request takes two.

    Raises:
        SettingsError: `router.host` is no address or name, or `max_files` leaves no room for a client.
    """
    router, limits = settings.router, settings.router.limits
    (model,) = settings.models.values()
    num_slots = count_slots(model)
    max_connections = min(_MAX_CONNECTIONS, (max_files - num_slots - _SPARE_FILES) // 2)
    if max_connections < 1:
        raise SettingsError(f"{max_files} open files are too few for HAProxy; raise `ulimit -n`")
    max_document_bytes = max(limits.max_body_bytes, settings.ocr.max_document_bytes) + _FORM_BYTES
    buffer_bytes = max(BUFFER_BYTES, 2 * limits.max_header_bytes)  # headers must fit, and those that HAProxy adds
    return _TEMPLATE.format(
        **_timeouts(settings),
        address=_address(router.host, router.port),
        backend=BACKEND,
        body_too_large=_reply(BodyTooLargeError(f"The body is larger than {limits.max_body_bytes} bytes.")),
        buffer_bytes=buffer_bytes,
        control_fd=control_fd,
        document_too_large=_reply(BodyTooLargeError(f"The body is larger than {max_document_bytes} bytes.")),
        errors="\n".join(f"    http-error {_reply(error)}" for error in _ERRORS),
        frontend=FRONTEND,
        headers_too_large=_reply(HeadersTooLargeError(f"The headers are larger than {limits.max_header_bytes} bytes.")),
        hot_bytes=_HOT_BUFFERS * buffer_bytes,
        max_body_bytes=limits.max_body_bytes,
        max_buffers=max(_MIN_BUFFERS, limits.max_held_bytes // buffer_bytes),
        max_connections=max_connections,
        max_document_bytes=max_document_bytes,
        max_header_bytes=limits.max_header_bytes,
        num_retries=router.max_tries - 1,
        num_slots=num_slots,
        num_threads=max(1, math.ceil(router.cpus_per_replica)),
    )


def count_slots(model: ModelSettings) -> int:
    """Places for replicas: four times as many as there can be, at least 32.

    An update runs old and new ones side by side, and a place is best left alone while its last streams end.
    """
    scaling = model.autoscaling
    return max(_MIN_SLOTS, _SLOTS_PER_REPLICA * (scaling.max_replicas if scaling else model.num_replicas))


def _timeouts(settings: Settings) -> dict[str, str]:
    router, limits = settings.router, settings.router.limits
    seconds = {
        "body": limits.body_timeout_s,
        "check": _CHECK_S,
        # One clock for both: it runs while the client ought to send, and while it ought to take. The replica holds
        # each to its own limit.
        "client": max(limits.body_timeout_s, limits.write_timeout_s),
        "connect": router.connect_timeout_s,
        "drain": settings.engine.drain_s,
        "header": limits.header_timeout_s,
        "keep_alive": _KEEP_ALIVE_S,
        "read": router.read_timeout_s,
    }
    return {name: f"{min(_MAX_MS, max(1, math.ceil(value * 1000)))}ms" for name, value in seconds.items()}


def _address(host: str, port: int) -> str:
    if not _HOST.fullmatch(host):
        raise SettingsError(f"router.host: {host!r} is neither an address nor a host's name")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _reply(error: ServingError) -> str:
    """`status S content-type T string B hdr ...`, the end of a rule that answers.

    Inside single quotes HAProxy takes everything as it is, save for the quote, which JSON can write otherwise.
    """
    body = json.dumps(error.body()).replace("'", "\\u0027")
    headers = "".join(f" hdr {name} {value}" for name, value in error.headers.items())
    return f"status {error.http_status} content-type application/json string '{body}'{headers}"
