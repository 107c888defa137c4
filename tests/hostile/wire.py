"""Sends bytes as they are and reads an HTTP answer, however early it comes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def error(self) -> dict[str, Any]:
        """The error of an answer in OpenAI's shape."""
        shown = json.loads(self.body)
        assert list(shown) == ["error"], shown
        error: dict[str, Any] = shown["error"]
        assert list(error) == ["message", "type", "param", "code"], shown
        assert error["message"]
        assert len(error["message"]) < 4000
        assert isinstance(error["type"], str)
        assert isinstance(error["code"], str | None)
        return error


async def send(port: int, raw: bytes, timeout_s: float = 30.0) -> Answer:
    """The first answer to the bytes; the connection is closed after it."""
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        sending = asyncio.create_task(_send(writer, raw))
        try:
            status, headers = await _read_head(reader)
            while status == 100:
                status, headers = await _read_head(reader)
            body = await _read_body(reader, headers)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    return Answer(status, headers, body)


async def _send(writer: asyncio.StreamWriter, raw: bytes) -> None:
    with contextlib.suppress(OSError):
        writer.write(raw)
        await writer.drain()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = (line.split(": ", 1) for line in lines[1:] if line)
    return int(lines[0].split(" ")[1]), {name.lower(): value for name, value in headers}


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    return body
