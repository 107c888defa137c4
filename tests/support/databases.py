"""Databases for tests: a private PostgreSQL, and an empty database of each kind."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr

from serving.billing.database import Database
from serving.settings.billing import BillingSettings, SpoolSettings

START_S = 60.0
MakeSettings = Callable[..., BillingSettings]


def find_postgres() -> Path | None:
    """The folder of PostgreSQL's server programs: Debian keeps them out of the path."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A private cluster on a free port, gone with the tests; PostgreSQL refuses to run as root."""
    programs = find_postgres()
    if programs is None:
        if os.environ.get("CI"):
            pytest.fail("PostgreSQL is not installed, and CI must not pass it by; see .ci/run")
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    as_user: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="serving-postgres-"))
    if as_user:
        shutil.chown(folder, "postgres", "postgres")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    options = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, **as_user}
    data = str(folder / "data")
    subprocess.run(
        [programs / "initdb", "-D", data, "-U", "serving", "-A", "trust", "--no-sync", "-E", "UTF8"],
        check=True,
        **options,
    )
    server = subprocess.Popen(
        [programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-c", "fsync=off"],
        **options,
    )
    try:
        url = f"postgresql://serving@127.0.0.1:{port}/postgres"
        asyncio.run(wait_for_postgres(url, server))
        yield url
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


async def wait_for_postgres(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            await (await asyncpg.connect(url)).close()
            return
        except (OSError, asyncpg.PostgresError):
            assert server.poll() is None, "PostgreSQL ended"
            assert time.monotonic() < deadline, "PostgreSQL does not answer"
            await asyncio.sleep(0.05)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """An empty database of each kind; None is SQLite beside the spool."""
    if request.param == "sqlite":
        yield None
        return
    server_url: str = request.getfixturevalue("postgres_url")
    name = f"test_{uuid.uuid4().hex}"
    run_sql(server_url, f"CREATE DATABASE {name}")
    yield server_url.rpartition("/")[0] + f"/{name}"
    run_sql(server_url, f"DROP DATABASE {name} WITH (FORCE)")


def run_sql(url: str, statement: str) -> None:
    """From outside of any event loop of the test's."""

    async def run() -> None:
        connection = await asyncpg.connect(url)
        await connection.execute(statement)
        await connection.close()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, run()).result()


@pytest.fixture
def make_settings(tmp_path: Path, database_url: str | None) -> MakeSettings:
    def make(**changes: Any) -> BillingSettings:
        values: dict[str, Any] = {
            "directory": tmp_path / "billing",
            "database_url": None if database_url is None else SecretStr(database_url),
            "flush_s": 0.02,
            "spool": SpoolSettings(adopt_s=0.05),
            **changes,
        }
        return BillingSettings(**values)

    return make


@pytest.fixture
async def database(make_settings: MakeSettings) -> AsyncIterator[Database]:
    database = Database(make_settings())
    await database.migrate()
    yield database
    await database.close()
