"""Throws nonsense at the service: requests made from its contract, and broken bytes on raw sockets.

    pip install -r requirements-dev.txt schemathesis
    python bench/fuzz.py                          both, more than 5,000 cases each, 20 minutes on 2 cores
    python bench/fuzz.py --only bytes --seed 7    one of them; the same seed sends the same bytes

schemathesis asserts that every answer is one that openapi.yaml documents (status, headers, type, schema),
that what breaks the contract is rejected, and that only the routes which ask for no key work without one. Of
the bytes it is asserted that no answer is a 5xx but the designed 503 and h11's 501 for an unknown transfer
coding, and that no connection hangs; but Hypercorn 0.18 never closes a connection that upgrades a CONNECT to
HTTP/2. Of both:
nothing strange in the log; /health and a chat work afterwards; memory, open files and running turns are back
to where they were after a warm-up. Exit status 1, with the offending bytes, if not. It starts its own
service, provider and PostgreSQL on loopback and ends them.
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random

from common import KEPT_SECONDS, ROOT, free_port, get, postgres, prepare, provider, running, wait_healthy

KEY = "fuzz-key-0123456789"
AT_ONCE = 40  # connections that send, or wait for the beginning of an answer
ANSWER_SECONDS = 5  # so long it is waited for; half a request gets none
HANG_SECONDS = KEPT_SECONDS + 25  # of silence; the service gives a body 10
CHAT = ["/chat", "/chat/stream", "/chat/stop"]
PATHS = [*CHAT, "/health", "/ready", "/metrics", "/openapi.yaml", "/", "/nowhere"]
METHODS = ["GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT", "TRACE", "CONNECT", "get", "PRI", "X" * 300]

# ---- Broken bytes: each function makes what one connection sends, piece by piece ----


def request(method="GET", path="/health", body=b"", **headers):
    """A well-formed request, but for what is given."""
    given = {"Host": "x", "Authorization": f"Bearer {KEY}"}
    if body and "Transfer_Encoding" not in headers:
        given |= {"Content-Type": "application/json", "Content-Length": len(body)}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def chat(r):
    """The body of a good question."""
    message = r.choice(["What is S3?", "hello", "Bake a cake?", "cloud " * 50])
    return json.dumps({"session_id": f"fuzz-{r.randrange(50)}", "message": message}).encode()


def good(r):
    """A request that is all right, or nearly."""
    query = f"?session_id=fuzz-{r.randrange(50)}"
    kinds = [request("POST", r.choice(CHAT), chat(r), Idempotency_Key=r.choice(["a", "b", "\xff"]))]
    kinds += [request("GET", f"{r.choice(PATHS)}{query}&limit={r.randrange(300)}")]
    kinds += [request("DELETE", f"/chat{query}")]
    kinds += [request("OPTIONS", r.choice(PATHS), Origin="https://x", Access_Control_Request_Method="POST")]
    return r.choice(kinds)


def mutated(r):
    """A good request with bytes changed, lost, doubled or put in."""
    data = bytearray(good(r))
    for _ in range(r.randint(1, 6)):
        at, size = r.randrange(len(data)), r.choice([1, 1, 2, 10, 60])
        pieces = [b"\0", b"\r\n", b"\n", b" ", b":", b"\xff\xfe", b"%00", b"\x80" * 9, r.randbytes(4)]
        data[at : at + r.choice([0, 1, size])] = r.choice([*pieces, data[at : at + size]])
    return [bytes(data)]


def chunked(r):
    """A body in chunks, not quite."""
    body, codings = (
        chat(r),
        ["chunked", "CHUNKED", "chunked, chunked", "gzip, chunked", "identity", "\x0bchunked"],
    )
    sizes = [
        b"%x" % len(body),
        b"%x;ext=1" % len(body),
        b"%x" % (len(body) + 9),
        b"-1",
        b"zz",
        b"f" * 16,
        b"f" * 200,
    ]
    ends = [
        b"\r\n0\r\n\r\n",
        b"",
        b"\r\n",
        b"0\r\n\r\n",
        b"\r\n0\r\nA: b\r\n\r\n",
        b"\r\n0\r\n" + b"T: x\r\n" * 5000,
    ]
    asks = {"Transfer_Encoding": r.choice(codings), "Content_Type": "application/json"}
    asks |= {"Content_Length": r.choice([0, 5, 10**6])} if r.random() < 0.2 else {}
    head, size, end = request("POST", r.choice(CHAT), **asks), r.choice(sizes), r.choice(ends)
    return [head, size + b"\r\n" + body + end]


def lengths(r):
    """A Content-Length that lies, or is none; bodies that end early."""
    length = r.choice([0, 1, 10, 10**4, 65_536, 65_537, 2**63, 10**400, -1, "1e3", "0x9", "+5", " ", "5, 5"])
    return [request("POST", r.choice(CHAT), chat(r)[: r.randrange(60)], Content_Length=length)]


def headers(r):
    """Too many headers, too long ones, and such as are none."""
    lines = [
        b"X-%d: y\r\n" % r.randrange(9) * r.choice([1, 100, 3000]),
        b"X: " + b"y" * r.choice([5_000, 70_000]),
    ]
    lines += [
        b"no colon",
        b": nameless",
        b"A : b",
        b"A: b\r\n folded",
        b"N\0UL: x",
        b"N: x\0y",
        b"\xe9: \xe9",
    ]
    lines += [b"Host: a\r\nHost: b", b"Connection: close, upgrade", b"Expect: 100-continue", b"Expect: much"]
    lines += [b"X-Forwarded-For: " + r.choice([b"1.2.3.4, " * 500, b"\xff", b"::1%eth0", b"127.0.0.1:80"])]
    lines += [b"Authorization: " + r.choice([b"Basic eDp5", b"\xc3\xa4", b"Bearer " * 99])]
    lines += [b"Content-Type: " + r.choice([b"application/json; charset=\xff", b";", b"x/y; a=b; " * 99])]
    lines += [
        b"Origin: " + r.randbytes(20).replace(b"\n", b""),
        b"Content-Encoding: gzip",
        b"Range: bytes=0-1",
    ]
    start, end = good(r).split(b"\r\n", 1)
    return [b"\r\n".join([start, *r.sample(lines, r.randint(1, 5)), end])]


def targets(r):
    """Request lines that hardly anybody sends."""
    known = """?x * http://x/health https://u:p@x:0/chat x:443 // //x/chat /%zz /%00 /\xff /chat#x http://[::1
        /;/ /chat?session_id=%ff%fe /chat?session_id=%00 /../../etc/passwd /chat/stream/ http:/chat
        /chat?session_id=x&limit=\u0661"""
    long = ["/" + "a" * 70_000, "/chat?" + "a&" * 3000, "/chat?session_id=x&before=" + "9" * 5000, "", "/a b"]
    version = r.choice(
        ["HTTP/1.1"] * 3 + ["HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/9.9", "http/1.1", "RTSP/1"]
    )
    return [f"{r.choice(METHODS)} {r.choice(known.split() + long)} {version}\r\nHost: x\r\n\r\n".encode()]


def pipeline(r):
    """Several requests in one go, perhaps with garbage behind them."""
    requests = [good(r) for _ in range(r.randint(2, 30))]
    return [b"".join(requests) + r.choice([b"", b"\r\n\r\n", r.randbytes(50)])]


def http2(r):
    """HTTP/2 by its preface or by an upgrade, then frames of noise."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + r.choice([b"\0\0\0\4\0\0\0\0\0", b""])
    token = r.choice(["AAMAAABkAAQAAP__", "", "====", "\xff", "A" * 5000])
    asks = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2_Settings": token}
    upgrade = request(r.choice(METHODS), r.choice(PATHS), **asks)
    frames = b""
    for _ in range(r.randint(0, 6)):
        size, kind, flags, stream = (
            r.choice([0, 1, 5, 8, 40]),
            r.randrange(12),
            r.randrange(64),
            r.randrange(3),
        )
        frames += bytes([0, 0, size, kind, flags, 0, 0, 0, stream]) + r.randbytes(size)
    return [r.choice([preface, preface[: r.randrange(30)], upgrade, upgrade + preface]), frames]


def websocket(r):
    """Upgrades to a protocol that the service does not speak, then frames."""
    asks = {"Connection": r.choice(["Upgrade", "close", "keep-alive, Upgrade"]), "Upgrade": "websocket"}
    asks["Sec_WebSocket_Version"] = r.choice([13, 8, "x"])
    asks["Sec_WebSocket_Key"] = r.choice(["AAAAAAAAAAAAAAAAAAAAAA==", "", "x"])
    return [request(r.choice(["GET", "GET", "POST"]), r.choice(PATHS), **asks), r.randbytes(r.randrange(99))]


def bodies(r):
    """JSON that is none, or not what was asked for."""
    values = [
        "null",
        "[]",
        "1e999",
        "NaN",
        '""',
        "{}",
        '"\\ud800"',
        '"\\u0000"',
        f'"{"x" * 5000}"',
        "[" * 50_000,
    ]
    whole = [r.choice(values), '{"a":' * 9000, '{"session_id": "x", "mess']
    whole += [f'{{"session_id": {r.choice(values)}, "message": {r.choice(values)}}}'] * 2
    body = r.choice(whole).encode()
    body = r.choice([body, body, r.randbytes(99), b"\xef\xbb\xbf" + body, body.decode().encode("utf-16")])
    kind = r.choice(["application/json"] * 4 + ["text/plain", "application/json; charset=utf-16", "a/x+json"])
    return [request("POST", r.choice(CHAT), body, Content_Type=kind)]


def slow(r):
    """A good request that trickles in."""
    data = good(r)
    return [data[at : at + 9] for at in range(0, len(data), 9)]


SHAPES = [mutated, mutated, chunked, lengths, headers, targets, pipeline, http2, websocket, bodies, slow]


async def converse(port, pieces, gate, leave=False):
    """Send the pieces and end the connection, rudely if `leave` -> what came back, b"hangs" if it does."""
    answer, writer = b"", None
    try:
        async with gate:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.002)
            # Who ends his side before the answer may get none, and a 500 would go unseen.
            with suppress(TimeoutError):
                while data := await asyncio.wait_for(reader.read(65_536), 0.3 if answer else ANSWER_SECONDS):
                    answer += data
        if leave:
            return answer
        writer.write_eof()
        while data := await asyncio.wait_for(reader.read(65_536), HANG_SECONDS):
            answer += data
    except TimeoutError:
        answer += b"hangs"
    except OSError:  # the service closed it first
        pass
    finally:
        if writer:
            writer.transport.abort()
    return answer


async def fuzz_bytes(port, cases, seed):
    """Hold `cases` conversations -> what was found wrong."""
    statuses, violations, gate = Counter(), [], asyncio.Semaphore(AT_ONCE)

    async def hold(number):
        r, shape = Random(seed * 1_000_003 + number), SHAPES[number % len(SHAPES)]
        pieces = shape(r)
        answer = await converse(port, pieces, gate, leave=r.random() < 0.1)
        found = re.findall(r"(?<=HTTP/1.1 )\d{3}|hangs$", answer.decode("latin-1")) or ["closed"]
        statuses.update(found)
        designed = {"503", "501"} if b"Transfer-" in b"".join(pieces) else {"503"}
        designed |= {"hangs"} if b"CONNECT" in pieces[0] and shape is http2 else set()  # Hypercorn's fault
        if bad := [status for status in found if status[0] in "5h" and status not in designed]:
            what = f"{bad[0]} after {shape.__name__}, case {number} of seed {seed}"
            violations.append(f"{what}: {b''.join(pieces)[:300]!r} -> {answer[-300:]!r}")

    began = time.monotonic()
    await asyncio.gather(*(hold(number) for number in range(cases)))
    print(f"bytes: {cases} connections in {time.monotonic() - began:.0f} s:", dict(sorted(statuses.items())))
    return violations


# ---- Requests from the contract ----


def fuzz_contract(port, examples, seed, folder):
    """Run schemathesis -> what was found wrong."""
    # positive_data_acceptance does not know that an Idempotency-Key may not come back with another message.
    options = [
        "--checks",
        "all",
        "--exclude-checks",
        "positive_data_acceptance",
        "--warnings",
        "off",
        "--no-shrink",
    ]
    options += [
        "--max-examples",
        examples,
        "--seed",
        seed,
        "--continue-on-failure",
        "--suppress-health-check",
        "all",
    ]
    options += ["--url", f"http://127.0.0.1:{port}", "--header", f"Authorization: Bearer {KEY}"]
    options += ["--request-timeout", 20]
    command = [sys.executable, "-m", "schemathesis.cli", "run", ROOT / "web" / "openapi.yaml", *options]
    began = time.monotonic()
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True)
    cases = int((re.findall(r"(\d+) generated", done.stdout.replace(",", "")) or [0])[-1])
    print(f"contract: {cases} cases in {time.monotonic() - began:.0f} s")
    few = [f"{cases} cases are too few"] if examples >= 900 > cases / 6 else []
    return few + ([done.stdout + done.stderr] if done.returncode else [])


# ---- What must hold afterwards ----


def settle(process, port):
    """Wait until no turn runs and no connection is kept -> (resident MB, open files)."""
    deadline = time.monotonic() + 60
    while b"awschat_running 0.0" not in get(port, "/metrics", Authorization=f"Bearer {KEY}")[1]:
        if time.monotonic() > deadline:
            sys.exit("VIOLATION: a minute after the last request turns still run, or /metrics fails")
        time.sleep(0.5)
    time.sleep(KEPT_SECONDS + 5)
    return process.rss() / 2**20, process.open_files()


def fuzz(process, port, given, folder):
    """A warm-up, the cases, and a look at what they left -> what was found wrong."""
    asyncio.run(fuzz_bytes(port, given.cases, seed=0))  # as many, since memory follows the most at once
    fuzz_contract(port, 30, 0, folder)
    memory, files = settle(process, port)
    violations = asyncio.run(fuzz_bytes(port, given.cases, given.seed)) if given.only != "contract" else []
    violations += fuzz_contract(port, given.examples, given.seed, folder) if given.only != "bytes" else []
    later, later_files = settle(process, port)
    print(
        f"memory {memory:.1f} -> {later:.1f} MB, open files {files} -> {later_files}; /health",
        *get(port, "/health"),
    )
    if later > memory * 1.1 + 5:
        violations.append("memory grew")
    if later_files > files + 50:  # of 5,500 connections some 20 upgrade a CONNECT
        violations.append("open files grew")
    asked = [request("POST", "/chat", chat(Random(1)), Connection="close")]
    answer = asyncio.run(converse(port, asked, asyncio.Semaphore(1)))
    if not answer.startswith(b"HTTP/1.1 200"):
        violations.append(f"a good question gets {answer!r}")
    return violations


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5500, help="connections with broken bytes")
    parser.add_argument("--examples", type=int, default=900, help="schemathesis' cases for each operation")
    parser.add_argument("--only", choices=["bytes", "contract"])
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    prepare()
    folder, port = tempfile.mkdtemp(prefix="bench-fuzz-"), free_port()
    env = {"HOST": "127.0.0.1", "PORT": str(port), "API_KEYS": f"fuzz:{KEY}", "TURN_SECONDS": "20"}
    env |= {"OPENAI_API_KEY": "fuzz", "CORS_ORIGINS": "https://x", "TRUSTED_HOPS": "1"}
    log = Path(folder, "service.log")
    with postgres() as database, provider(0, 0.001, 20) as (_, url), log.open("wb") as output:
        env |= {"DATABASE_URL": database("fuzz"), "OPENAI_BASE_URL": url}
        with running([sys.executable, ROOT / "awschat.py"], env, output) as process:
            wait_healthy(process, port)
            violations = fuzz(process, port, given, folder)
    lines = log.read_text(errors="replace").splitlines(keepends=True)
    if strange := [line for line in lines if not line.startswith('{"message": ')]:
        violations.append(f"in the log ({log}): " + "".join(strange[:60]))
    print(*(f"VIOLATION: {violation}" for violation in violations[:20]), sep="\n")
    print(len(violations), "violations")
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
