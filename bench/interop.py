"""Real parts around the service: does it work with the proxies, model servers and databases that people have?

    python bench/interop.py                          all parts; 16 minutes on two busy cores
    python bench/interop.py --only nginx,gunicorn    some of: litellm, llamacpp, gunicorn, nginx-provider,
                                                     nginx, postgresql, pgbouncer
    python bench/interop.py --cache DIR --pgbouncer PATH    where to install; which PgBouncer

It runs awschat.py with each part and tries a stream, the judge, a stop, a wrong key (or password) and 300
turns in bursts of 50, with pauses in which kept connections grow old. A turn has failed unless it is complete
for its client and in the database. In the end it prints a table; the exit status is 1 if something was wrong.
A part that can't be had is `not available`, with the reason, and has passed nothing.

It installs from PyPI, each into a virtual environment of its own below --cache (awschat-interop in the temp
folder, where it stays for the next run): litellm[proxy] (0.8 GB), gunicorn, and xllamacpp, which is
llama.cpp's own HTTP server as a library. gguf makes its tiny model, which says ALLOW, then words of AWS by
chance. It takes from the machine: nginx and PostgreSQL (Debian's packages nginx-light and postgresql) and
PgBouncer 1.21 or newer (Debian 12 has 1.18). As root, the last two run as the user postgres. In front of the
service, nginx is configured as docs/operations.md says; LiteLLM has the settings of deploy/litellm.yml.

Everything listens on 127.0.0.1, on free ports, with its files in a temp folder, and ends with the script.
"""

import argparse
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common import (
    BENCH,
    ROOT,
    chat_server,
    execute,
    free_port,
    get,
    load,
    postgres,
    prepare,
    provider,
    running,
)

from fake_openai import one_word

KEY, WRONG = "sk-interop-right-key", "sk-interop-wrong-key"  # of providers and databases alike
ASKED = "How do I move old objects from Amazon S3 to Glacier with a lifecycle rule?"
JUDGED = "Why is it so slow?"  # no sign of AWS: the judge decides before the answer
REVIEWED = f"{ASKED} {one_word(answer='It depends on what you need.')}"  # proves nothing: the judge reads it
LONG = f"{ASKED} {one_word(tokens=3000, interval=0.03)}"  # 90 s
REFUSES = "The provider refuses us. Please tell the operator."
BURSTS, STREAMS = 6, 50
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"  # llama.cpp's template
IMPORTABLE = {"PYTHONPATH": str(BENCH)}  # this file, in the processes that it starts


class NotAvailable(Exception):
    """A part can't be had here; says why."""


@dataclass
class Row:
    """What was tried with a part, and what came of it."""

    part: str
    version: str = ""
    tried: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    turns: int = 0
    failed: int = 0

    def check(self, what, good, found):
        """Note that `what` was tried and, if it is not good, what was found."""
        print(f"  {'ok ' if good else 'BAD'} {what}{'' if good else f': {found}'}", flush=True)
        self.tried.append(what)
        if not good:
            self.wrong.append(f"{what}: {found}")


# ---- What is tried ----


def request(port, method, path, body=None, headers=(), source="127.0.0.1"):
    """The response to one request, its body unread."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120, source_address=(source, 0))
    data = None if body is None else json.dumps(body)
    connection.request(method, path, data, {"Content-Type": "application/json", **dict(headers)})
    return connection.getresponse()


def events_of(response):
    """The events of a stream as they come; a status that is not 200 becomes an error event."""
    if response.status != 200:
        yield {"type": "error", "status": response.status, "content": response.read().decode()}
        return
    for line in response:
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def ask(port, message, session, **options):
    """Ask, and read the stream to its end -> (what its tokens say, the closing event)."""
    body = {"message": message, "session_id": session}
    *tokens, closing = events_of(request(port, "POST", "/chat/stream", body, **options))
    return "".join(event["content"] for event in tokens), closing


def check_turn(row, what, port, message=ASKED, status="complete", text=None):
    """One turn, which must end with this status and with the text that was streamed -> its session."""
    session = f"{what}-{time.monotonic_ns()}"
    said, closing = ask(port, message, session)
    good = closing["status"] == status and closing["content"] == said == (text or said)
    row.check(what, good, closing)
    return session


def check_stop(row, port, message, what="stop"):
    """Stop a long answer after three events, which must come while the model still speaks."""
    session = f"stop-{time.monotonic_ns()}"
    events = events_of(request(port, "POST", "/chat/stream", {"message": message, "session_id": session}))
    seen = [event for _, event in zip(range(3), events, strict=False)]
    stopped = json.load(request(port, "POST", "/chat/stop", {"session_id": session}))
    *tokens, closing = [*seen, *events]
    streamed = "".join(event["content"] for event in tokens) == closing["content"]
    row.check(what, streamed and stopped["status"] == closing["status"] == "stopped", closing)


def check_bursts(row, port, database_url, pauses):
    """300 turns, 50 at once, of three kinds; all must be complete for the client and in the database."""
    good, reasons = 0, {}
    for burst in range(BURSTS):
        message = (ASKED, JUDGED, REVIEWED)[burst % 3]
        summary = load(f"http://127.0.0.1:{port}/chat/stream", streams=STREAMS, message=message)
        good += summary["ok"]
        reasons |= summary["failed"]
        time.sleep(pauses[burst % len(pauses)])
    how = "SELECT status, count(*), max(guard_reason), max(error) FROM turns WHERE session_id LIKE 'bench-%'"
    stored = {status: tuple(rest) for status, *rest in execute(database_url, f"{how} GROUP BY status")}
    row.turns = BURSTS * STREAMS
    row.failed = row.turns - min(good, stored.get("complete", (0,))[0])
    row.check("bursts", not row.failed, f"{good} ended well; {reasons}; in the database {stored}")


def exercise(row, port, database_url, pauses=(0.5,), long=LONG):
    """A stream, the judge before and after the answer, a stop, the bursts."""
    check_turn(row, "stream", port)
    for what, message in {"judge": JUDGED, "judge of the answer": REVIEWED}.items():
        session = check_turn(row, what, port, message)
        reason = f"SELECT guard_reason FROM turns WHERE session_id = '{session}'"
        word = execute(database_url, reason)[0][0]
        if word != "the judge's word":
            row.check(f"word of the {what}", False, word)
    if long:
        check_stop(row, port, long)
    check_bursts(row, port, database_url, pauses)


@contextmanager
def service(database_url, provider_url, **env):
    """The service -> its port. In the end the first of its log lines that tell of a problem are printed."""
    env = {"OPENAI_API_KEY": KEY} | env
    with chat_server(ROOT / "awschat.py", database_url, provider_url, **env) as (process, port, _):
        yield port
        lines = process.log.read_text(errors="replace").splitlines()
        bad = [line for line in lines if '"problem": ""' not in line and '"serving"' not in line]
        for line in bad[:5]:
            print("  log", line[:400])


def exercise_provider(row, database_url, url, patience="45", **how):
    """The same with the service straight at a provider, and then with a wrong key."""
    with service(database_url, url, FIRST_TOKEN_SECONDS=patience) as ours:
        exercise(row, ours, database_url, **how)
    check_wrong(row, "wrong key", database_url, url, OPENAI_API_KEY=WRONG)


def check_wrong(row, what, *urls, **env):
    """With this wrong setting people must read that the operator has to do something."""
    with service(*urls, **env) as port:
        check_turn(row, what, port, status="failed", text=REFUSES)


# ---- Getting and starting parts ----


def install(row, args, name, *packages):
    """The interpreter of a virtual environment with these packages, made if it is not there."""
    folder = args.cache / name
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        output(sys.executable, "-m", "venv", folder)
        try:
            output(python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *packages)
        except subprocess.CalledProcessError as failure:
            raise NotAvailable(f"pip can't install {packages}: {failure.stderr.strip()[-200:]}") from failure
        (folder / "installed").touch()
    package = packages[0].partition("[")[0]
    row.version = output(python, "-c", f"from importlib.metadata import version; print(version('{package}'))")
    return python


def program(name, *folders):
    """The path of an installed program."""
    path = shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ["PATH"], "/usr/sbin"]))
    if not path:
        raise NotAvailable(f"{name} is not installed")
    return path


def output(*command):
    """What a command that must succeed prints."""
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip()


@contextmanager
def listening(folder, command, port, ready=None, env=None):
    """The command as a Process, once ready() is true, or else an HTTP server answers, no matter what."""
    ready = ready or (lambda: get(port, "/health")[0])
    log = folder / f"{Path(command[0]).name}.log"
    with log.open("ab") as file, running(command, env, file) as process:
        while not ready():
            if process.popen.poll() is not None or time.monotonic() > process.started + 120:
                raise RuntimeError(f"{command[0]} does not serve: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        yield process


def fake():
    """fake_openai.py, which obeys directives and wants the key; an answer takes 0.8 s."""
    return provider(0.05, 0.02, 40, extra=["--scripted", "--key", KEY])


# ---- Providers ----


def try_litellm(row, args, folder):
    """LiteLLM's proxy between service and provider, with keys of its own."""
    python = install(row, args, "litellm", "litellm[proxy]")
    shipped = (ROOT / "deploy/litellm.yml").read_text().partition("litellm_settings:")[2]
    model = "  - {model_name: %s, litellm_params: {model: openai/x, api_base: '%s', api_key: %s}}\n"
    port, config = free_port(), folder / "litellm.yml"
    url = f"http://127.0.0.1:{port}/v1"
    with postgres() as database, fake() as (_, upstream):
        models = model % ("bench", upstream, KEY) + model % ("locked", upstream, WRONG)
        config.write_text(
            f"model_list:\n{models}litellm_settings:{shipped}\ngeneral_settings: {{master_key: {KEY}}}\n"
        )
        command = [python.with_name("litellm"), "--config", config, "--host", "127.0.0.1", "--port", port]
        database_url, offline = database("litellm"), {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        with listening(folder, command, port, env=offline):
            exercise_provider(row, database_url, url)
            with service(database_url, url) as ours:
                check_turn(row, "judge says BLOCK", ours, f"{JUDGED} {one_word(judge='BLOCK')}", "refused")
                counted = "SELECT session_id LIKE 'bench-%', count(*) FROM turns WHERE completion_tokens > 0"
                counts = dict(execute(database_url, f"{counted} AND status = 'complete' GROUP BY 1"))
                row.check("usage by stream_options", counts.get(False) == 3, counts)
                print(f"      in the bursts {counts.get(True)} of {row.turns} turns have their usage")
            with service(database_url, url, MODEL_OPTIONS='{"stream_options": null}') as ours:
                check_turn(row, "without stream_options", ours)
            check_wrong(row, "its key is wrong", database_url, url, OPENAI_MODEL="locked")
            check_wrong(row, "unknown model", database_url, url, OPENAI_MODEL="unknown")


def try_llamacpp(row, args, folder):
    """llama.cpp's server, which ends each connection after a stream."""
    python = install(row, args, "llamacpp", "xllamacpp", "gguf")
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    command = [python, "-c", f"import interop; interop.serve_llamacpp({port}, '{folder}/tiny.gguf')"]
    with postgres() as database, listening(folder, command, port, env=IMPORTABLE):
        database_url = database("llamacpp")
        # 50 turns with their judges wait for 8 slots on this machine's cores.
        exercise_provider(row, database_url, url, patience="180", long="")
        with service(database_url, url, MODEL_OPTIONS='{"ignore_eos": true}') as ours:
            check_stop(row, ours, ASKED)


def serve_llamacpp(port, path):
    """In llama.cpp's environment: make a model, and serve it until the process is ended."""
    import gguf
    import numpy
    import xllamacpp

    words = "ALLOW Amazon S3, Lambda functions, DynamoDB tables, CloudFront, IAM roles, SQS queues, SNS, EC2."
    said = [f"▁{word}" for word in words.split()]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *said]
    kinds = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.BYTE] * 256
    kinds += [gguf.TokenType.NORMAL] * len(said)
    end, allow, size = 2, tokens.index("▁ALLOW"), 32
    facts = {"tokenizer_model": "llama", "token_list": tokens, "token_types": kinds, "bos_token_id": 1}
    facts |= {"token_scores": [0.0] * len(tokens), "eos_token_id": end, "vocab_size": len(tokens)}
    facts |= {"context_length": 2**17, "embedding_length": size, "feed_forward_length": size}
    facts |= {"block_count": 1, "head_count": 1, "head_count_kv": 1, "rope_dimension_count": size}
    facts |= {"layer_norm_rms_eps": 1e-5, "chat_template": CHAT}
    # Attention does nothing: what comes next depends on whether the last token is one of the words.
    knows, says = numpy.zeros((2, len(tokens), size), numpy.float32)
    knows[:allow, 0] = knows[allow:, 1] = 1
    says[:, :2] = -4
    says[allow, 0] = 4  # after the question: ALLOW; after a word: any word, or, about one time in 10, the end
    says[allow + 1 :, 1] = 1
    says[end, 1] = 1.05
    nothing, ones = numpy.zeros((size, size), numpy.float32), numpy.ones(size, numpy.float32)
    blocks = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    tensors = {"token_embd": knows, "output": says} | {f"blk.0.{name}": nothing for name in blocks}
    tensors |= dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), ones)
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in facts.items():
        getattr(writer, f"add_{name}")(value)
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    for what in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{what}_to_file")()
    writer.close()
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.port, parameters.api_keys = path, port, [KEY]
    parameters.n_parallel, parameters.n_ctx = 8, 8 * 16_384
    server = xllamacpp.Server(parameters)
    while server:
        time.sleep(60)


def try_gunicorn(row, args, folder):
    """gunicorn, which ends connections that were idle for 2 s; every answer needs the judge."""
    python = install(row, args, "gunicorn", "gunicorn")
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    command = [python.with_name("gunicorn"), "--bind", f"127.0.0.1:{port}", "--keep-alive", "2"]
    command += ["--worker-class", "gthread", "--threads", "64", "interop:chat_completions"]
    with postgres() as database, listening(folder, command, port, env=IMPORTABLE):
        # With the time that load.py takes to start, each burst comes just when gunicorn hangs up.
        exercise_provider(row, database("gunicorn"), url, pauses=(1.2, 1.35, 1.5, 1.65, 1.8))


def chat_completions(environ, start_response):
    """The WSGI program that gunicorn serves: ALLOW, or an answer that proves nothing."""
    if environ.get("HTTP_AUTHORIZATION") != f"Bearer {KEY}":
        start_response("401 Unauthorized", [("Content-Type", "application/json")])
        return [b'{"error": {"message": "Incorrect API key", "code": "invalid_api_key"}}']
    asked = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    streams, times = asked.get("stream"), 500 if asked["messages"][-1]["content"] == LONG else 1
    start_response("200 OK", [("Content-Type", "text/event-stream" if streams else "application/json")])
    if not streams:
        return [b'{"choices": [{"message": {"role": "assistant", "content": "ALLOW"}}]}']
    return pieces("It depends on what you need. " * times)


def pieces(text):
    """The chunks of a stream that says this, word by word."""
    for word in text.split():
        time.sleep(0.02)
        yield b'data: {"choices": [{"delta": {"content": "%s "}}]}\n\n' % word.encode()
    yield b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


# ---- nginx ----


@contextmanager
def nginx(row, folder, *blocks):
    """nginx with these blocks."""
    path, text = program("nginx"), "\n".join(blocks)
    said = subprocess.run([path, "-v"], capture_output=True, text=True).stderr
    row.version = said.strip().rpartition("/")[2]
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    head = f"daemon off; worker_processes 1; pid {folder}/pid; events {{ worker_connections 2048; }}"
    (folder / "conf").write_text(f"{head}\nhttp {{ access_log off; {folders}\n{text}\n}}\n")
    folder.chmod(0o755)  # as root, the workers of nginx are somebody else
    port = int(re.search(r"listen 127.0.0.1:(\d+)", text)[1])
    with listening(folder, [path, "-e", "stderr", "-p", folder, "-c", folder / "conf"], port):
        yield


def try_nginx_provider(row, args, folder):
    """nginx between service and provider, which ends a connection after 20 requests or 2 s."""
    port = free_port()
    with postgres() as database, fake() as (_, upstream):
        block = f"""
            upstream model {{ server {upstream.removeprefix("http://").removesuffix("/v1")}; keepalive 32; }}
            server {{
                listen 127.0.0.1:{port}; keepalive_timeout 2s; keepalive_requests 20; proxy_buffering off;
                proxy_http_version 1.1; proxy_set_header Connection "";
                location / {{ proxy_pass http://model; }}
            }}"""
        with nginx(row, folder, block):
            exercise_provider(row, database("nginx"), f"http://127.0.0.1:{port}/v1", pauses=(1.2, 1.5, 1.8))


def fronted(ours, port):
    """The server block of docs/operations.md, for these ports."""
    block = re.search(r"```nginx\n(.*?)```", (ROOT / "docs/operations.md").read_text(), re.DOTALL)[1]
    block = block.replace("127.0.0.1:8000", f"127.0.0.1:{ours}")
    return block.replace("listen 80", f"listen 127.0.0.1:{port}")


def try_nginx(row, args, folder):
    """nginx in front of the service: as docs/operations.md has it, and with nothing set but proxy_pass."""
    port, for_limited, for_keyed, bare = (free_port() for _ in range(4))
    with (
        postgres() as database,
        fake() as (_, upstream),
        service(url := database("nginx"), upstream, FIRST_TOKEN_SECONDS="90") as ours,
        service(url, upstream, TRUSTED_HOPS="1", RATE_PER_MINUTE="3") as limited,
        service(url, upstream, API_KEYS=f"alice:{KEY}") as keyed,
    ):
        plain = f"server {{ listen 127.0.0.1:{bare}; location / {{ proxy_pass http://127.0.0.1:{ours}; }} }}"
        blocks = fronted(ours, port), fronted(limited, for_limited), fronted(keyed, for_keyed), plain
        with nginx(row, folder, *blocks), ThreadPoolExecutor() as pool:
            slow = f"{ASKED} {one_word(first=65)}"  # longer than nginx's time-outs
            stream = pool.submit(ask, port, slow, "slow-stream")
            whole = pool.submit(request, port, "POST", "/chat", {"message": slow, "session_id": "slow-whole"})
            check_stop(row, bare, LONG, "stream and stop with proxy_pass alone")
            exercise(row, port, url)
            check_rate(row, for_limited)
            wrong = {"Authorization": f"Bearer {WRONG}"}
            status = request(for_keyed, "GET", "/chat?session_id=s", headers=wrong).status
            row.check("wrong key: 401", status == 401, status)
            status = request(port, "GET", "/metrics").status
            row.check("/metrics: 404", status == 404, status)
            closing = stream.result()[1]
            row.check("stream after 65 s of silence", closing["status"] == "complete", closing)
            row.check("POST /chat after 60 s: 504", whole.result().status == 504, whole.result().status)
            *_, closing = events_of(request(port, "GET", "/chat/stream?session_id=slow-whole"))
            row.check("its turn is complete", closing["status"] == "complete", closing)


def check_rate(row, port):
    """Three turns a minute for each address, whatever address a client claims to have."""
    seen = []
    for n, source in enumerate(["127.0.0.1"] * 4 + ["127.0.0.2"]):
        forged = {"X-Forwarded-For": f"203.0.113.{n}"}
        seen.append(ask(port, ASKED, f"rate-{n}", headers=forged, source=source)[1]["status"])
    row.check("rate limit by true address", seen == ["complete"] * 3 + [429, "complete"], seen)


# ---- Databases ----


def taking(port, folders):
    """A function that says whether PostgreSQL, or PgBouncer, takes connections there."""
    command = [program("pg_isready", *folders), "-q", "-h", "127.0.0.1", "-p", str(port)]
    return lambda: subprocess.run(command).returncode == 0


@contextmanager
def debian_postgres(row, folder):
    """Debian's PostgreSQL, with SCRAM and a database awschat -> (port, folders, how to run as its user)."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: -int(path.parent.name))
    initdb, server = program("initdb", *folders), program("postgres", *folders)
    row.version = output(server, "--version").split()[2]
    user, port = [], free_port()
    if os.geteuid() == 0:
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
    for name, text in {"password": KEY, "users": f'"awschat" "{KEY}"\n'}.items():
        (folder / name).write_text(text)
    for path in (folder, *folder.iterdir()) if user else ():
        shutil.chown(path, "postgres", "postgres")
    output(*user, initdb, "-D", folder / "data", "-U", "admin", "-A", "scram-sha-256", "-E", "UTF8",
           f"--pwfile={folder}/password")  # fmt: skip
    command = [*user, server, "-D", folder / "data", "-p", port, "-h", "127.0.0.1", "-k", folder]
    with listening(folder, command, port, taking(port, folders)):
        role = f"CREATE ROLE awschat LOGIN PASSWORD '{KEY}'"
        admin = f"postgresql://admin:{KEY}@127.0.0.1:{port}/postgres"
        execute(admin, role, "CREATE DATABASE awschat OWNER awschat")
        yield port, folders, user


def check_start(row, what, database_url, words, seconds=20):
    """With this URL the service must not start, but say why, in one line and without the password."""
    env = os.environ | {"DATABASE_URL": database_url, "OPENAI_API_KEY": KEY, "PORT": str(free_port())}
    command = ["timeout", str(seconds), sys.executable, ROOT / "awschat.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    good = done.returncode == 1 and words in said and "\n" not in said and "sk-interop" not in said
    found = "it starts all the same" if done.returncode == 124 else f"exit {done.returncode}"
    print(f"      {said[:400]}")
    row.check(f"{what}: exit 1", good, f"{found}, and says {said[-150:]!r}")


def try_postgresql(row, args, folder):
    """Debian's PostgreSQL, by TCP and by its Unix socket."""
    with debian_postgres(row, folder) as (port, _, _), fake() as (_, upstream):
        url = f"postgresql://awschat:{KEY}@127.0.0.1:{port}/awschat"
        with service(url, upstream) as ours:
            exercise(row, ours, url)
        with service(f"postgresql://awschat:{KEY}@/awschat?host={folder}&port={port}", upstream) as ours:
            check_turn(row, "stream by the Unix socket", ours)
        check_start(row, "wrong password", url.replace(KEY, WRONG), "password authentication failed")
        check_start(row, "missing database", url.removesuffix("awschat") + "nothing", "does not exist")


def try_pgbouncer(row, args, folder):
    """PgBouncer in transaction mode, with fewer connections than two replicas have."""
    path = program(args.pgbouncer)
    version = output(path, "--version").split()[1]
    if tuple(map(int, version.split(".")[:2])) < (1, 21):
        raise NotAvailable(f"{version} is older than 1.21")
    with debian_postgres(row, folder) as (port, folders, user), fake() as (_, upstream):
        row.version = f"{version}, PostgreSQL {row.version}"
        outside = free_port()
        (folder / "ini").write_text(
            f"[databases]\nawschat = host=127.0.0.1 port={port}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {outside}\nunix_socket_dir =\n"
            f"auth_type = scram-sha-256\nauth_file = {folder}/users\n"
            "pool_mode = transaction\ndefault_pool_size = 5\nmax_prepared_statements = 200\n"
        )
        with listening(folder, [*user, path, folder / "ini"], outside, taking(outside, folders)):
            url = f"postgresql://awschat:{KEY}@127.0.0.1:{outside}/awschat"
            with service(url, upstream) as one, service(url, upstream) as other:
                check_turn(row, "stream of a second replica", other)
                exercise(row, one, url.replace(str(outside), str(port)))
            check_start(row, "wrong password", url.replace(KEY, WRONG), "authentication failed")


# ---- Main ----

PARTS = {
    "litellm": ("LiteLLM's proxy, in front of the provider", try_litellm),
    "llamacpp": ("llama.cpp's server, as the provider", try_llamacpp),
    "gunicorn": ("gunicorn, keep-alive 2 s, as the provider", try_gunicorn),
    "nginx-provider": ("nginx, in front of the provider", try_nginx_provider),
    "nginx": ("nginx, in front of the service", try_nginx),
    "postgresql": ("Debian's PostgreSQL", try_postgresql),
    "pgbouncer": ("PgBouncer, transaction mode", try_pgbouncer),
}


def try_part(part, attempt, args):
    """One part -> its row, whatever happens."""
    print(part, flush=True)
    row = Row(part)
    folder = Path(tempfile.mkdtemp(prefix="interop-"))
    try:
        attempt(row, args, folder)
    except NotAvailable as reason:
        row.wrong.append(f"not available: {reason}")
    except Exception as failure:
        traceback.print_exc()
        row.wrong.append(f"{type(failure).__name__}: {failure}")
    finally:
        shutil.rmtree(folder)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "awschat-interop")
    parser.add_argument("--pgbouncer", default="pgbouncer", help="the program")
    args = parser.parse_args()
    prepare()
    rows = [try_part(*PARTS[name], args) for name in args.only.split(",")]
    print(f"\n{time.strftime('%Y-%m-%d')}, Python {sys.version.split()[0]}\n")
    print("| part | version | tried | result | failed of turns |\n|---|---|---|---|---|")
    for row in rows:
        turns = f"{row.failed} of {row.turns}" if row.turns else ""
        result = "; ".join(row.wrong) or "ok"
        print(f"| {row.part} | {row.version} | {', '.join(row.tried)} | {result} | {turns} |")
    sys.exit(any(row.wrong for row in rows))


if __name__ == "__main__":
    main()
