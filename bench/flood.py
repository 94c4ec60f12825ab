"""Holds 2,000 connections open and looks whether the service still answers.

    pip install -r requirements-dev.txt
    python bench/flood.py        about four minutes; needs a limit of more than 2,200 open files (ulimit -Hn)

Each connection does what a flood does: says nothing, stops in the middle of a header or of a body, asks for a
stream and never reads it, or asks now and then. It is asserted that meanwhile /health answers every time,
before the container's health check would give up (4 s); that a chat works; that no turn is left running;
and that a little later memory and open files are back to where they were after an earlier flood. Exit
status 1 if not. It starts its own service, provider and PostgreSQL on loopback and ends them.
"""

import argparse
import asyncio
import json
import sys
import time
from contextlib import suppress

from common import KEPT_SECONDS, ROOT, chat_server, get, postgres, prepare, provider

POST = (
    "POST /chat/stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{}"
)


def question(number):
    """A whole request for a stream, in a session of its own."""
    body = json.dumps({"session_id": f"flood-{number}", "message": "How do I keep an S3 bucket private?"})
    return POST.format(len(body), body).encode()


async def hold(port, number, release):
    """One connection of the flood, open until the release. Whether it got in and stayed for that long."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    kind = number % 5
    writer.write(
        [b"", b"GET /health HTTP/1.1\r\nHos", POST.format(500, '{"sess').encode(), question(number), b""][
            kind
        ]
    )
    with suppress(OSError):
        while not release.is_set():
            if kind == 4:
                writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                await reader.readuntil(b"healthy")
            await asyncio.sleep(5 if kind == 4 else 0.5)
    writer.transport.abort()


async def flood(port, connections, seconds):
    """The flood, /health and a chat in its middle -> (seconds of each /health, chat's answer, failures)."""
    release, waits = asyncio.Event(), []
    held = []
    for number in range(connections):
        held.append(asyncio.create_task(hold(port, number, release)))
        if number % 50 == 0:
            await asyncio.sleep(0.1)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.monotonic()
        status, _ = await asyncio.to_thread(get, port, "/health")
        waits.append(time.monotonic() - began if status == 200 else float("inf"))
        await asyncio.sleep(0.2)
    broken = [task.exception() for task in held if task.done()]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(question("good"))
    async with asyncio.timeout(30):
        answer = await reader.readuntil(b'"status":"complete"')
    writer.close()
    release.set()
    await asyncio.gather(*held, return_exceptions=True)
    return waits, answer, broken


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=15, help="how long they are held")
    given = parser.parse_args()
    prepare()
    violations = []
    with (
        postgres() as database,
        provider(first=0.1, interval=0.2, tokens=60) as (_, url),
        chat_server(ROOT / "awschat.py", database("flood"), url) as (process, port, _),
    ):
        asyncio.run(flood(port, given.connections, 5))  # Python keeps the memory of its first flood, not more
        time.sleep(KEPT_SECONDS + 5)
        memory, files = process.rss() / 2**20, process.open_files()
        waits, answer, broken = asyncio.run(flood(port, given.connections, given.seconds))
        peak, middle = process.rss() / 2**20, sorted(waits)[len(waits) // 2]
        print(f"{given.connections} connections held, {len(broken)} of them broke; then {peak:.0f} MB")
        print(f"{len(waits)} times /health: median {middle * 1000:.0f} ms, worst {max(waits) * 1000:.0f} ms")
        if max(waits) > 4:
            violations.append("/health did not answer within 4 s")
        if broken:
            violations.append(f"connections were not held: {broken[0]!r}")
        if b"S3" not in answer:
            violations.append(f"a chat got {answer!r}")
        time.sleep(KEPT_SECONDS + 5)
        later, later_files = process.rss() / 2**20, process.open_files()
        print(f"{KEPT_SECONDS + 5} s later: memory {memory:.0f} -> {later:.0f} MB,", end=" ")
        print(f"open files {files} -> {later_files}")
        if b"awschat_running 0.0" not in get(port, "/metrics")[1]:
            violations.append("turns still run")
        if later_files > files + 20:
            violations.append(f"open files grew from {files} to {later_files}")
        if later > memory * 1.1 + 5:
            violations.append(f"memory grew from {memory:.0f} to {later:.0f} MB")
    for violation in violations:
        print("VIOLATION:", violation)
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
