"""Requests that nobody sends by mistake, and some that only look so. Each says who has to refuse it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from support.request_pictures import encode_image, image_part, to_url

from hostile.fields import FIELDS, FOR_ENGINE
from hostile.pictures import PICTURES_FOR_ENGINE, PICTURES_REFUSED, PICTURES_SERVED

MODEL = "nano"
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
GOOD_PNG = to_url(encode_image("PNG"))


class Judge(Enum):
    """Who refuses an entry."""

    ROUTER = "router"
    ENGINE = "engine"
    """Only the engine can: it depends on the model or on the pixels. It may also find it good."""
    NOBODY = "nobody"
    """It looks bad and is good."""


@dataclass(frozen=True)
class Entry:
    name: str
    judge: Judge
    raw: bytes
    """The whole HTTP request, byte for byte."""


def request(body: bytes, path: str = CHAT, headers: str = "", method: str = "POST") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def chat(**fields: Any) -> bytes:
    content = {"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": "Hello"}], **fields}
    return request(json.dumps(content).encode())


def text(**fields: Any) -> bytes:
    return request(json.dumps({"model": MODEL, "max_tokens": 2, "prompt": "Once", **fields}).encode(), TEXT)


def parts(*content: Any) -> bytes:
    return chat(messages=[{"role": "user", "content": list(content)}])


def picture(url: Any) -> bytes:
    return parts(image_part(url), {"type": "text", "text": "Free OCR."})


def spliced(value: bytes, field: str = "temperature") -> bytes:
    """A chat with bytes for a value that no JSON writer would write."""
    return request(
        b'{"model":"nano","max_tokens":2,"messages":[{"role":"user","content":"Hello"}],"%s":%s}'
        % (field.encode(), value)
    )


def nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    return (opening * depth + closing * depth).encode()


BODIES: dict[str, bytes] = {
    "no body": b"",
    "spaces": b"   ",
    "null": b"null",
    "number": b"3",
    "text": b'"nano"',
    "list": b"[1, 2]",
    "cut object": b'{"model": "nano", ',
    "cut text": b'{"model": "nan',
    "single quotes": b"{'model': 'nano'}",
    "comma at the end": b'{"model": "nano",}',
    "comment": b'{"model": "nano" /* good */}',
    "two objects": b'{"model": "nano"}{"model": "nano"}',
    "key without quotes": b'{model: "nano"}',
    "byte order mark": b'\xef\xbb\xbf{"model": "nano"}',
    "UTF-16": '{"model": "nano"}'.encode("utf-16"),
    "Latin-1": '{"model": "n\xe4no"}'.encode("latin-1"),
    "invalid UTF-8": b'{"model": "\xff\xfe"}',
    "overlong UTF-8": b'{"model": "\xc0\xae"}',
    "surrogate in UTF-8": b'{"model": "\xed\xa0\x80"}',
    "control character": b'{"model": "na\x00no"}',
    "unknown escape": b'{"model": "\\x41"}',
    "form": b"model=nano&messages=Hello",
    "XML": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
    "pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    "gzip": b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xabV\xcaM,*\xc9,\x06\0",
    "100,000 brackets": nested(100_000),
    "100,000 open brackets": b"[" * 100_000,
    "1,000 objects in each other": b'{"a":' * 1000 + b"1" + b"}" * 1000,
    "a list of 250,000 numbers": b'{"model": "nano", "messages": [' + b"0," * 250_000 + b"0]}",
    "250,000 keys": json.dumps({str(number): 0 for number in range(250_000)}).encode(),
    "250,000 empty lists": b'{"model": "nano", "messages": [' + b"[]," * 250_000 + b"[]]}",
}

SPLICED: dict[str, bytes] = {
    "NaN": b"NaN",
    "Infinity": b"Infinity",
    "minus Infinity": b"-Infinity",
    "1e400": b"1e400",
    "10,000 digits": b"9" * 10_000,
    "hexadecimal": b"0x10",
    "leading zero": b"01",
    "plus": b"+1",
    "dot without digits": b"1.",
    "lone high surrogate": b'"\\ud800"',
    "lone low surrogate": b'"\\udc00"',
    "surrogates the wrong way round": b'"\\udc00\\ud800"',
    "70 levels": nested(70),
    "nothing": b"",
}

MESSAGES: dict[str, Any] = {
    "missing": None,
    "empty": [],
    "text": "Hello",
    "object": {"role": "user"},
    "of texts": ["Hello"],
    "of nulls": [None],
    "of lists": [[{"role": "user", "content": "Hello"}]],
    "too many": [{"role": "user", "content": "Hello"}] * 1000,
    "without a role": [{"content": "Hello"}],
    "with an unknown role": [{"role": "root", "content": "Hello"}],
    "with a role that is a list": [{"role": ["user"], "content": "Hello"}],
    "with a number for content": [{"role": "user", "content": 3}],
    "with an object for content": [{"role": "user", "content": {"type": "text", "text": "Hello"}}],
    "with numbers for parts": [{"role": "user", "content": [3]}],
    "with a part that is no object": [{"role": "user", "content": [3]}],
    "with a text that is a number": [{"role": "user", "content": [{"type": "text", "text": 3}]}],
    "with a text that is a list": [{"role": "user", "content": [{"type": "text", "text": ["a"]}]}],
    "with calls that are a number": [{"role": "assistant", "tool_calls": 3}],
    "with calls that are text": [{"role": "assistant", "tool_calls": "rm"}],
    "with calls without a function": [{"role": "assistant", "tool_calls": [{"type": "function"}]}],
    "with calls of no function": [{"role": "assistant", "tool_calls": [{"type": "function", "function": 3}]}],
    "with a name that is a number": [{"role": "user", "content": "Hello", "name": 3}],
}

FETCHES: dict[str, str] = {
    "loopback": "http://127.0.0.1:8000/v1/models",
    "localhost": "http://localhost/",
    "IPv6 loopback": "http://[::1]/",
    "mapped loopback": "http://[::ffff:127.0.0.1]/",
    "zero": "http://0.0.0.0/",
    "short zero": "http://0/",
    "decimal loopback": "http://2130706433/",
    "octal loopback": "http://0177.0.0.1/",
    "hexadecimal loopback": "http://0x7f.1/",
    "metadata of AWS": "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
    "metadata of AWS by IPv6": "http://[fd00:ec2::254]/latest/meta-data/",
    "metadata of Google": "http://metadata.google.internal/computeMetadata/v1/",
    "metadata of Alibaba": "http://100.100.100.200/latest/meta-data/",
    "host of Azure": "http://168.63.129.16/machine",
    "Kubernetes": "https://kubernetes.default.svc/api",
    "private": "http://10.0.0.1/",
    "private by 6to4": "http://[2002:0a00:0001::]/",
    "private by NAT64": "http://[64:ff9b::a00:1]/",
    "Ray's dashboard": "http://127.0.0.1:8265/api/jobs/",
    "user in the URL": "http://example.com@127.0.0.1/",
    "backslash": "http://example.com\\@127.0.0.1/",
    "name that leads home": "http://127.0.0.1.nip.io/",
    "full stop of another script": "http://127\u30020\u30020\u30021/",
    "digits in circles": "http://\u2460\u2461\u2466.0.0.1/",
    "public": "https://example.com/page.png",
    "redirect service": "https://httpbin.org/redirect-to?url=http://127.0.0.1/",
    "no scheme": "//127.0.0.1/",
    "scheme in capitals": "HTTP://127.0.0.1/",
    "file": "file:///etc/passwd",
    "file on localhost": "file://localhost/etc/passwd",
    "ftp": "ftp://127.0.0.1/",
    "gopher": "gopher://127.0.0.1:6379/_FLUSHALL",
    "dict": "dict://127.0.0.1:6379/INFO",
    "ldap": "ldap://127.0.0.1/",
    "jar": "jar:http://127.0.0.1!/",
    "javascript": "javascript:alert(1)",
    "blob": "blob:http://127.0.0.1/",
    "S3": "s3://bucket/page.png",
    "path": "/etc/passwd",
    "path upwards": "../../etc/passwd",
    "line break in the URL": "http://127.0.0.1/\r\nX: y",
}

DATA_URLS: dict[str, str] = {
    "only a scheme": "data:",
    "without data": "data:image/png;base64,",
    "without a comma": "data:image/png;base64",
    "not base64": "data:image/png,hello",
    "percent signs": "data:image/png;base64,%%%",
    "wrong letters": "data:image/png;base64,@@@@",
    "url-safe letters": "data:image/png;base64,_-_-",
    "without padding": "data:image/png;base64,abc",
    "padding only": "data:image/png;base64,====",
    "umlauts": "data:image/png;base64,\xc4\xc4\xc4\xc4",
    "scheme in capitals": "DATA:image/png;base64,AAAA",
    "space before": " " + GOOD_PNG,
    "base64 twice": "data:image/png;base64,data:image/png;base64,AAAA",
    "base64 of base64": "data:image/png;base64," + base64.b64encode(GOOD_PNG.encode()).decode(),
    "line break in the head": "data:image/png\r\n;base64,AAAA",
    "a head of 1 MB": "data:" + "x" * 2**20 + ";base64,AAAA",
    "bare base64": GOOD_PNG.partition(",")[2],
}

PARTS: dict[str, Any] = {
    "video": {"type": "video_url", "video_url": {"url": "http://127.0.0.1/v.mp4"}},
    "audio": {"type": "audio_url", "audio_url": {"url": "http://127.0.0.1/a.mp3"}},
    "sound": {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    "image of the Responses API": {"type": "input_image", "image_url": "http://127.0.0.1/"},
    "embeddings": {"type": "image_embeds", "image_embeds": "gASVAAAA"},
    "embeddings of a prompt": {"type": "prompt_embeds", "data": "gASVAAAA"},
    "object in memory": {"type": "image_pil", "image_pil": {"size": [1, 1]}},
    "file": {"type": "file", "file": {"file_id": "file-1"}},
    "unknown type": {"type": "smell"},
    "type that is a number": {"type": 3, "text": "Hello"},
    "no type": {"text": "Hello"},
    "nothing": {},
    "text with an image": {"type": "text", "text": "Hello", "image_url": "http://127.0.0.1/"},
    "text with a cache key": {"type": "text", "text": "Hello", "uuid": "a", "video_url": "http://127.0.0.1/"},
    "image with a cache key": {**image_part(GOOD_PNG), "uuid": "of-another-tenant"},
    "image from the cache": {"type": "image_url", "image_url": None, "uuid": "of-another-tenant"},
    "image without a URL": {"type": "image_url"},
    "image with a number": image_part(3),
    "image with a list": image_part([GOOD_PNG]),
    "image with an empty URL": image_part(""),
    "image with a URL in a URL": image_part({"url": GOOD_PNG}),
    "unknown detail": {"type": "image_url", "image_url": {"url": GOOD_PNG, "detail": "extreme"}},
}

PROMPTS: dict[str, Any] = {
    "missing": None,
    "empty": "",
    "a number": 3,
    "an object": {},
    "an empty list": [],
    "empty texts": ["", ""],
    "truths": [True],
    "fractions": [1.5],
    "token ids below zero": [-1],
    "token ids of 2^40": [2**40],
    "a mixture": ["a", 1],
    "1,000 texts": ["a"] * 1000,
    "1,000 lists": [[1]] * 1000,
    "lists in lists": [[[1]]],
}

SERVED: dict[str, bytes] = {
    "duplicate keys": request(
        b'{"model":"x","model":"nano","max_tokens":2,"messages":[{"role":"user","content":"Hello"}]}'
    ),
    "nulls": chat(temperature=None, stop=None, n=None, tools=None, stream=None),
    "wrong MIME": picture(to_url(encode_image("PNG"), "application/x-msdownload")),
    "no MIME": picture(to_url(encode_image("PNG"), "")),
    "60 levels": spliced(b'{"a":' + nested(60) + b"}", "metadata"),
    "escapes": request(
        b'{"\\u006dodel":"n\\u0061no","max_tokens":2,"messages":[{"role":"user","content":"\\ud83d\\ude80\\u0000"}]}'
    ),
    "body in one-byte chunks": b"",
}


def _chunked(body: bytes) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += "Transfer-Encoding: chunked\r\n\r\n"
    return head.encode() + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"


BODY = chat().partition(b"\r\n\r\n")[2]
SERVED["body in one-byte chunks"] = _chunked(BODY)


def framed(
    *headers: str, body: bytes = BODY, first: str = f"POST {CHAT} HTTP/1.1", host: str = "Host: localhost"
) -> bytes:
    lines = [first, *([host] if host else []), "Content-Type: application/json", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


_LENGTH = f"Content-Length: {len(BODY)}"
_CHUNKED = "Transfer-Encoding: chunked"
_ONE_CHUNK = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)

WIRE: dict[str, bytes] = {
    "content type that is none": chat().replace(b"application/json", b"text/html"),
    "foreign host": chat().replace(b"Host: localhost", b"Host: evil.example"),
    "foreign origin": chat().replace(b"Host: localhost", b"Host: localhost\r\nOrigin: https://evil.example"),
    "length and chunks": framed(_LENGTH, _CHUNKED, body=_ONE_CHUNK),
    "chunks and length": framed(_CHUNKED, _LENGTH, body=_ONE_CHUNK),
    "two lengths": framed(_LENGTH, "Content-Length: 5"),
    "the same length twice": framed(_LENGTH, _LENGTH),
    "a list of lengths": framed(f"{_LENGTH}, {len(BODY)}"),
    "length below zero": framed("Content-Length: -5"),
    "length with a plus": framed("Content-Length: +5"),
    "length in hexadecimal": framed("Content-Length: 0x5"),
    "length of 10^30": framed(f"Content-Length: {10**30}"),
    "empty length": framed("Content-Length:"),
    "space before the colon": framed(f"Content-Length : {len(BODY)}"),
    "unknown coding": framed("Transfer-Encoding: xchunked", body=_ONE_CHUNK),
    "identity": framed("Transfer-Encoding: identity"),
    "chunked, then gzip": framed("Transfer-Encoding: chunked, gzip", body=_ONE_CHUNK),
    "gzip, then chunked": framed("Transfer-Encoding: gzip, chunked", body=_ONE_CHUNK),
    "chunked twice": framed(_CHUNKED, _CHUNKED, body=_ONE_CHUNK),
    "chunked, then identity": framed(_CHUNKED, "Transfer-Encoding: identity", body=_ONE_CHUNK),
    "vertical tab before chunked": framed("Transfer-Encoding: \x0bchunked", body=_ONE_CHUNK),
    "chunks in HTTP/1.0": framed(_CHUNKED, body=_ONE_CHUNK, first=f"POST {CHAT} HTTP/1.0"),
    "chunk of a negative size": framed(_CHUNKED, body=b"-5\r\nhello\r\n0\r\n\r\n"),
    "chunk of 2^68 bytes": framed(_CHUNKED, body=b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n"),
    "chunk that is longer than it says": framed(_CHUNKED, body=b"2\r\nhello\r\n0\r\n\r\n"),
    "chunk with a bare line feed": framed(_CHUNKED, body=b"5\nhello\r\n0\r\n\r\n"),
    "chunk extension of 1 MB": framed(_CHUNKED, body=b"5;" + b"x" * 2**20 + b"\r\nhello\r\n0\r\n\r\n"),
    "trailer of 1 MB": framed(_CHUNKED, body=b"5\r\nhello\r\n0\r\nX: " + b"x" * 2**20 + b"\r\n\r\n"),
    "header of 1 MB": framed("X: " + "x" * 2**20, _LENGTH),
    "10,000 headers": framed(*["X: y"] * 10_000, _LENGTH),
    "header name of 1 MB": framed("x" * 2**20 + ": y", _LENGTH),
    "path of 1 MB": framed(_LENGTH, first=f"POST /{'x' * 2**20} HTTP/1.1"),
    "folded header": framed("X: a\r\n b", _LENGTH),
    "bare line feed": framed("X: a\nY: b", _LENGTH),
    "bare carriage return": framed("X: a\rY: b", _LENGTH),
    "NUL in a header": framed("X: a\0b", _LENGTH),
    "NUL in a header's name": framed("X\0: a", _LENGTH),
    "umlaut in a header's name": framed("\xc4: a", _LENGTH),
    "no host": framed(_LENGTH, host=""),
    "two hosts": framed("Host: other", _LENGTH),
    "no version": b"GET /\r\n\r\n",
    "HTTP/3": framed(_LENGTH, first=f"POST {CHAT} HTTP/3.0"),
    "HTTP/9.9": framed(_LENGTH, first=f"POST {CHAT} HTTP/9.9"),
    "HTTP/2 at once": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "SMTP": b"EHLO example.com\r\n",
    "zeros": bytes(1000),
    "unknown method": framed(_LENGTH, first=f"STEAL {CHAT} HTTP/1.1"),
    "method in small letters": framed(_LENGTH, first=f"post {CHAT} HTTP/1.1"),
    "CONNECT": framed(first="CONNECT 127.0.0.1:22 HTTP/1.1", body=b""),
    "TRACE": framed(first="TRACE / HTTP/1.1", body=b""),
    "DELETE": framed(first=f"DELETE {CHAT} HTTP/1.1", body=b""),
    "path upwards": framed(_LENGTH, first="POST /v1/../../etc/passwd HTTP/1.1"),
    "path with a NUL": framed(_LENGTH, first="POST /v1/chat%00/completions HTTP/1.1"),
    "path that is no UTF-8": framed(_LENGTH, first="POST /v1/%ff%fe HTTP/1.1"),
    "path with bytes": framed(_LENGTH, first="POST /v1/\xff HTTP/1.1"),
    "path with a space": framed(_LENGTH, first="POST /v1/chat completions HTTP/1.1"),
    "other path": framed(_LENGTH, first="POST /v1/embeddings HTTP/1.1"),
    "the engine's own paths": framed(_LENGTH, first="POST /v1/load_lora_adapter HTTP/1.1"),
    "the engine's metrics through a path": framed(_LENGTH, first="POST /v1/openai/../../metrics HTTP/1.1"),
    "upgrade with a body": framed("Connection: Upgrade", "Upgrade: websocket", _LENGTH),
    "body over the limit": request(b"x" * 400_000),
    "body that is announced over the limit": request(b"x" * 400_000, headers="Expect: 100-continue\r\n"),
    "body of chunks over the limit": framed(_CHUNKED, body=b"61a80\r\n" + b"x" * 400_000 + b"\r\n0\r\n\r\n"),
}


def build_corpus() -> Iterator[Entry]:
    """Every entry; names are unique."""
    router = Judge.ROUTER
    yield from (Entry(f"body: {name}", router, request(body)) for name, body in BODIES.items())
    yield from (Entry(f"completions body: {name}", router, request(BODIES[name], TEXT)) for name in ("no body", "list"))
    yield from (Entry(f"value: {name}", router, spliced(value)) for name, value in SPLICED.items())
    yield from (Entry(f"messages: {name}", router, chat(messages=value)) for name, value in MESSAGES.items())
    yield from (Entry(f"fetch: {name}", router, picture(url)) for name, url in FETCHES.items())
    yield from (Entry(f"data URL: {name}", router, picture(url)) for name, url in DATA_URLS.items())
    yield from (Entry(f"part: {name}", router, parts(part)) for name, part in PARTS.items())
    yield Entry("part: 100 images", router, parts(*[image_part(GOOD_PNG)] * 100))
    yield from (Entry(f"field: {name}", router, chat(**FIELDS[name])) for name in list(FIELDS)[::10])
    yield from (Entry(f"prompt: {name}", router, text(prompt=value)) for name, value in PROMPTS.items())
    yield Entry("prompt: echo with logprobs", router, text(echo=True, logprobs=5))
    yield from (Entry(f"wire: {name}", router, raw) for name, raw in WIRE.items())
    for name, data in PICTURES_REFUSED.items():
        yield Entry(f"picture: {name}", router, picture(to_url(data)))
    for name, data in PICTURES_FOR_ENGINE.items():
        yield Entry(f"picture: {name}", Judge.ENGINE, picture(to_url(data)))
    for name, data in PICTURES_SERVED.items():
        yield Entry(f"picture: {name}", Judge.NOBODY, picture(to_url(data)))
    long_garbage = "data:image/png;base64," + to_url(encode_image("PNG")).partition(",")[2].rstrip("=")[:-4]
    yield Entry("picture: base64 that breaks off late", Judge.ENGINE, picture(long_garbage + "A" * 4 * 20_000 + "@@@@"))
    yield from (Entry(f"model: {name}", Judge.ENGINE, chat(**fields)) for name, fields in FOR_ENGINE.items())
    yield Entry("model: token ids beyond the vocabulary in a prompt", Judge.ENGINE, text(prompt=[2**31 - 1]))
    yield Entry("model: suffix", Judge.ENGINE, text(suffix="end"))
    yield from (Entry(f"good: {name}", Judge.NOBODY, raw) for name, raw in SERVED.items())


CORPUS = tuple(build_corpus())
