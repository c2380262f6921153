"""Where drivers share a study: a journal, and a PostgreSQL that tests start for themselves."""

import getpass
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import free_port

STORAGES = ["journal", "postgresql"]


def _binaries() -> Path:
    """Return the folder of PostgreSQL's programs; Debian keeps those of servers out of the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if on_path := shutil.which("initdb"):
        found.append(Path(on_path))
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    return found[-1].resolve().parent


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of a PostgreSQL of our own, without the name of a database."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    binaries = _binaries()
    user = "postgres" if os.getuid() == 0 else getpass.getuser()  # it refuses to run as root
    rights: dict = {"user": user, "group": user, "extra_groups": []} if os.getuid() == 0 else {}
    home = tempfile.mkdtemp(prefix="postgresql-")
    if rights:
        shutil.chown(home, user, user)
    try:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": home, **rights}
        subprocess.run(
            [binaries / "initdb", "-D", f"{home}/data", "-U", "tests", "-A", "trust", "-N"],
            check=True,
            **quiet,
        )
        port = free_port()
        options = [
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            f"unix_socket_directories={home}",
            "-c",
            "fsync=off",
        ]
        process = subprocess.Popen(
            [binaries / "postgres", "-D", f"{home}/data", "-p", str(port), *options], **quiet
        )
        try:
            ready = [binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-q"]
            while subprocess.run(ready, check=False).returncode != 0:
                assert process.poll() is None, "the server ended as it started"
            yield f"postgresql+psycopg://tests@127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)  # ends its connections, and then itself
            process.wait(timeout=30)
    finally:
        shutil.rmtree(home)


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place to keep a study in."""
    if request.param == "journal":
        return f"journal:{tmp_path / 'shared.log'}"
    import psycopg

    url = request.getfixturevalue("server")
    name = f"sweep_{tmp_path.name.lower()}".replace("-", "_")
    with psycopg.connect(f"{url.replace('+psycopg', '')}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return f"{url}/{name}"
