"""Measures the service beside its peer and its limit, in one run on one machine; prints one Markdown table.

    python bench/run.py                          three rounds of about 14 minutes
    python bench/run.py --quick                  one round without the 1,000 streams
    python bench/run.py --paced --rounds 1       only CPU a token, at the load that keeps no system busy
    python bench/run.py --only service,nginx     some of: service, peer, bare, nginx, alone
    python bench/run.py --svg bench/bench.svg    also draws it

How each figure is made is in bench/README.md. The script makes the virtual environments bench/.venv-service
and bench/.venv-peer from the two requirements files, so that the sizes it prints are real; it needs
requirements-dev.txt itself (for the embedded PostgreSQL) and nginx. It ends everything that it started.
"""

import argparse
import ast
import hashlib
import itertools
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from contextlib import contextmanager
from pathlib import Path

import chart
from common import (
    BENCH,
    ROOT,
    chat_server,
    execute,
    free_port,
    load,
    postgres,
    prepare,
    provider,
    running,
    wait_healthy,
)

SPEEDS, LENGTHS = (33, 100, 300), (100, 400)  # the provider's tokens a second, and tokens an answer
PACE = 1000  # tokens a second in all, of a load that keeps no system busy; so many seconds of it:
PACED_SECONDS = 16
FIRST, INTERVAL, TOKENS = 0.03, 0.03, 100  # of the crowds
PROVIDER_SECONDS = FIRST + (TOKENS - 1) * INTERVAL  # to the last token, if nothing slows it: 3.0
SHORT = 5  # tokens an answer when streams run one by one
NAMES = {
    "service": "awschat",
    "peer": "LangGraph peer",
    "bare": "peer without database",
    "nginx": "nginx",
    "alone": "provider alone",
}

# ---- The systems ----


class Bench:
    """What a run needs of its surroundings: databases, interpreters, a directory for scratch files."""

    def __init__(self, args, database, scratch):
        self.scratch = Path(scratch)
        self.script = {"service": ROOT / "awschat.py", "peer": BENCH / "peer_langgraph.py"}
        self.script["bare"] = self.script["peer"]
        self.python, self.database = {}, {}
        if "service" in args.only:
            requirements = ROOT / "requirements.txt"
            self.python["service"] = args.service_python or make_venv(BENCH / ".venv-service", requirements)
            self.database["service"] = database("service")
        if {"peer", "bare"} & set(args.only):
            requirements = BENCH / "requirements-peer.txt"
            self.python["peer"] = args.peer_python or make_venv(BENCH / ".venv-peer", requirements)
            self.python["bare"] = self.python["peer"]
            self.database |= {"peer": database("peer"), "bare": ""}

    @contextmanager
    def start(self, name, provider_process, provider_url):
        """One system before this provider -> (its Process, options for load(), seconds until healthy)."""
        if name == "alone":
            yield provider_process, {"url": provider_url + "/chat/completions", "wire": "openai"}, None
        elif name == "nginx":
            with nginx(provider_url, self.scratch) as (process, port, seconds):
                yield process, {"url": f"http://127.0.0.1:{port}/chat/stream", "wire": "openai"}, seconds
        else:
            server = chat_server(self.script[name], self.database[name], provider_url, self.python[name])
            with server as (process, port, seconds):
                yield process, {"url": f"http://127.0.0.1:{port}/chat/stream"}, seconds


NGINX_CONF = """
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/nginx-error.log;
{user}
events {{ worker_connections 8192; }}
http {{
    access_log {folder}/nginx-access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream provider {{ server {host}; keepalive 1000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = /health {{ return 200 '{{"status":"healthy"}}'; }}
        location = /chat/stream {{
            proxy_pass http://provider{path}/chat/completions;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 300s;
        }}
    }}
}}
"""


@contextmanager
def nginx(provider_url, scratch):
    """nginx with one worker before the provider -> (Process, port, seconds until healthy)."""
    program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if program is None:
        raise SystemExit("nginx is not installed: apt-get install nginx-light, or leave it out with --only")
    host, _, path = provider_url.removeprefix("http://").partition("/")
    port, user = free_port(), "user root;" if os.geteuid() == 0 else ""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    conf = NGINX_CONF.format(folder=folder, user=user, host=host, path="/" + path, port=port)
    (folder / "nginx.conf").write_text(conf)
    with running([program, "-e", folder / "nginx-error.log", "-c", folder / "nginx.conf"]) as process:
        yield process, port, wait_healthy(process, port)


def make_venv(folder, requirements):
    """A venv with exactly these requirements -> its interpreter; made again when they change."""
    stamp = folder / "made-from"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest() + sys.version
    if not stamp.exists() or stamp.read_text() != wanted:
        note(f"installing {requirements.name} into {folder}")
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([folder / "bin/python", "-m", "pip", "install", "-q", "-r", requirements], check=True)
        stamp.write_text(wanted)
    return folder / "bin/python"


# ---- Measuring ----


def note(text):
    print(text, file=sys.stderr, flush=True)


def paced(bench, name):
    """CPU a provider's token at each speed and length, at a load that keeps nobody busy."""
    figures = {"busy": 0}
    for speed, tokens in itertools.product(SPEEDS, LENGTHS):
        with (
            provider(FIRST, 1 / speed, tokens) as fake,
            bench.start(name, *fake) as (process, options, seconds),
        ):
            load(**options, streams=5)
            before, began = process.cpu(), time.monotonic()
            result = load(**options, streams=PACE * PACED_SECONDS // tokens, over=PACED_SECONDS)
            used = process.cpu() - before
            key = f"{tokens}_{speed}"
            figures[f"cpu_{key}"] = 1e6 * used / max(1, result["ok"] * tokens)
            figures["busy"] = max(figures["busy"], 100 * used / (time.monotonic() - began))
            figures |= failures(f"paced_{key}", result) | {"start": seconds}
            note(f"  {tokens} tokens at {speed} a second: {figures[f'cpu_{key}']:.1f} µs a token")
    return figures


def one_by_one(bench, name, streams):
    """First tokens with one stream at a time, on a server that was just started (which is timed as well)."""
    with provider(FIRST, INTERVAL, SHORT) as fake, bench.start(name, *fake) as (_, options, seconds):
        load(**options, streams=5, one_by_one=True)
        result = load(**options, streams=streams, one_by_one=True)
    return {"start": seconds, **first_token(1, result), **failures(1, result)}


def crowds(bench, name, thousand):
    """100 and 400 streams over 3 s, 400 at one instant, and 1,000: on one server, in this order."""
    with provider(FIRST, INTERVAL, TOKENS) as fake, bench.start(name, *fake) as (process, options, seconds):
        load(**options, streams=5)
        idle = process.rss()
        figures = {"start": seconds}
        result = load(**options, streams=100, over=3)
        figures |= first_token(100, result) | failures(100, result)

        process.reset_peak()
        before = process.cpu()
        result = load(**options, streams=400, over=3)
        if name != "alone":  # the provider's own CPU and memory are no figure of a server
            figures["cpu"] = 1e6 * (process.cpu() - before) / max(1, result["ok"] * TOKENS)
            figures["memory_busy"] = (process.peak() - idle) / 400 / 1024
        figures |= first_token(400, result) | failures(400, result) | stretch("stretch", result)

        result = load(**options, streams=400, over=0)
        figures |= stretch("stretch_instant", result) | failures("400_instant", result)
        if thousand:
            result = load(**options, streams=1000, over=3)
            figures |= failures(1000, result) | stretch("stretch_1000", result)
            figures["no_progress"] = result["no_progress"]
    return figures


def memory(bench, name):
    """KiB a stream with 400 open at once: one token a second, so that the slowest server holds them all."""
    with provider(FIRST, 1, 12) as fake, bench.start(name, *fake) as (process, options, seconds):
        load(**options, streams=5)
        idle = process.rss()
        process.reset_peak()
        result = load(**options, streams=400, over=8)
        return {"start": seconds, "memory": (process.peak() - idle) / 400 / 1024, **failures("slow", result)}


def first_token(streams, result):
    """Milliseconds by which the client's first token came later than the provider's, at p50 and p99."""
    seen = result["first_token_ms"] or {}
    return {f"first_{streams}_{q}": seen[q] - FIRST * 1000 for q in ("p50", "p99") if seen}


def stretch(key, result):
    """The time to the last token as a multiple of what the provider needs, at p50 and p99."""
    seen = result["last_token_s"] or {}
    return {f"{key}_{q}": seen[q] / PROVIDER_SECONDS for q in ("p50", "p99") if seen}


def failures(streams, result):
    if result["failed"]:
        note(f"  failed: {result['failed']}")
    return {f"failed_{streams}": result["streams"] - result["ok"]}


def measure(bench, args):
    """All rounds, the systems in turn in each -> {system: {figure: its median; failures: their sum}}."""
    rounds = {name: [] for name in args.only}
    for number in range(args.rounds):
        for name in args.only:
            note(f"round {number + 1} of {args.rounds}: {name}")
            if name != "alone":
                rounds[name].append(paced(bench, name))
            if args.paced:
                continue
            if name != "bare":  # the rest with its database, as the service
                rounds[name].append(one_by_one(bench, name, 20))
                rounds[name].append(crowds(bench, name, not args.quick))
            if name not in ("alone", "bare"):
                rounds[name].append(memory(bench, name))
    return {name: combined(seen) for name, seen in rounds.items()}


def combined(rounds):
    """The median of each figure over the rounds that have it; failures add up instead."""
    values = {}
    for figures in rounds:
        for key, value in figures.items():
            values.setdefault(key, []).append(value)
    figures = {}
    for key, seen in values.items():
        if None not in seen:
            figures[key] = sum(seen) if key.startswith(("failed", "no_progress")) else statistics.median(seen)
    return figures


def interpreter_seconds(python):
    """How long the bare interpreter takes to start and end: the median of 9."""
    times = []
    for _ in range(9):
        started = time.monotonic()
        subprocess.run([python, "-c", "pass"], check=True)
        times.append(time.monotonic() - started)
    return statistics.median(times)


def static_figures(bench, name):
    """What needs no traffic: size of the dependencies, lines of code, the interpreter's own start."""
    if name not in ("service", "peer"):
        return {}
    script, python = bench.script[name], bench.python[name]
    return {
        "interpreter": interpreter_seconds(python),
        "dependencies": dependencies_bytes(python) / 2**20,
        "lines": code_lines(script.read_text()),
        "all_lines": len(script.read_text().splitlines()),
    }


def dependencies_bytes(python):
    """Bytes in the interpreter's site-packages, without pip and setuptools."""
    (folder,) = (Path(python).parent.parent / "lib").glob("python3*/site-packages")
    installer = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence")
    packages = (package for package in folder.iterdir() if not package.name.startswith(installer))
    files = (file for package in packages for file in (package, *package.rglob("*")))
    return sum(file.stat().st_size for file in files if file.is_file())


def code_lines(source):
    """Lines that hold code: no blank lines, comments or docstrings."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    prose = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(1 for n, line in lines if n not in prose and line.strip() and not line.strip().startswith("#"))


# ---- Reporting ----

ROWS = [  # what it is, format, keys
    *(
        (f"CPU a token, {tokens} tokens at {speed} a second (µs)", "{:.1f}", [f"cpu_{tokens}_{speed}"])
        for tokens, speed in itertools.product(LENGTHS, SPEEDS)
    ),
    ("CPU in use at that load, at most (% of a core)", "{:.0f}", ["busy"]),
    ("CPU a token, 400 streams of 100 tokens at 33 a second (µs)", "{:.1f}", ["cpu"]),
    ("First token behind the provider's, 1 stream, p50 / p99 (ms)", "{:.1f}", ["first_1_p50", "first_1_p99"]),
    ("… 1 stream, p50, less the same of the provider alone", "{:.1f}", ["behind"]),
    ("… 100 streams over 3 s", "{:.1f}", ["first_100_p50", "first_100_p99"]),
    ("… 400 streams over 3 s", "{:.1f}", ["first_400_p50", "first_400_p99"]),
    ("Stretch, 400 streams over 3 s, p50 / p99", "{:.3f}", ["stretch_p50", "stretch_p99"]),
    ("… 400 streams at one instant", "{:.3f}", ["stretch_instant_p50", "stretch_instant_p99"]),
    ("… 1,000 streams over 3 s", "{:.3f}", ["stretch_1000_p50", "stretch_1000_p99"]),
    ("Failures, 400 streams over 3 s", "{:.0f}", ["failed_400"]),
    ("… 400 streams at one instant", "{:.0f}", ["failed_400_instant"]),
    ("… 1,000 streams over 3 s", "{:.0f}", ["failed_1000"]),
    ("Streams of 1,000 that never got a token", "{:.0f}", ["no_progress"]),
    ("Memory a stream, 400 open at once (KiB)", "{:.1f}", ["memory"]),
    ("… 400 streams over 3 s", "{:.1f}", ["memory_busy"]),
    ("Process start to first /health (s)", "{:.3f}", ["start"]),
    ("Import to first /health (s)", "{:.3f}", ["import"]),
    ("Installed dependencies (MiB)", "{:.1f}", ["dependencies"]),
    ("Lines of code / of the file", "{:.0f}", ["lines", "all_lines"]),
]

CHECKS = [  # what must hold, figure, of whom (None: by itself), at most
    ("CPU a token, 400 tokens at 33 a second, of the bare peer's", "cpu_400_33", "bare", 1 / 4),
    ("... at 100 a second", "cpu_400_100", "bare", 1 / 6),
    ("... at 300 a second", "cpu_400_300", "bare", 1 / 8),
    ("CPU a token, 100 tokens at 33 a second, of the bare peer's", "cpu_100_33", "bare", 1 / 3.5),
    ("... at 100 a second", "cpu_100_100", "bare", 1 / 4.5),
    ("... at 300 a second", "cpu_100_300", "bare", 1 / 4.5),
    ("CPU a token, 400 tokens at 33 a second, of nginx's", "cpu_400_33", "nginx", 6),
    ("... at 100 a second", "cpu_400_100", "nginx", 4.5),
    ("... at 300 a second", "cpu_400_300", "nginx", 3.5),
    ("stretch p99, 400 streams at one instant, of the peer's", "stretch_instant_p99", "peer", 0.25),
    ("stretch p99, 400 streams over 3 s", "stretch_p99", None, 1.15),
    ("failures, 400 streams over 3 s", "failed_400", None, 0),
    ("failures, 400 streams at one instant", "failed_400_instant", None, 0),
    ("failures, 1,000 streams", "failed_1000", None, 0),
    ("streams of 1,000 that never got a token", "no_progress", None, 0),
    ("first token p50, 1 stream, behind the provider alone (ms)", "behind", None, 12),
    ("memory a stream, 400 open at once (KiB)", "memory", None, 90),
    ("memory a stream, 400 open at once, of the peer's", "memory", "peer", 1 / 4),
    ("process start to first /health, of the peer's", "start", "peer", 1 / 2),
]


def table(figures):
    """The Markdown table of all figures."""
    lines = ["| | " + " | ".join(NAMES[name] for name in figures) + " |"]
    lines.append("|---" * (len(figures) + 1) + "|")
    for title, form, keys in ROWS:
        cells = []
        for seen in figures.values():
            known = [form.format(seen[key]) for key in keys if key in seen]
            cells.append(" / ".join(known) or "–")
        if set(cells) != {"–"}:
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def checks(figures):
    """The limits that the service must keep, one line each, with `ok` or `OVER`."""
    lines = ["| limit | measured | at most | |", "|---|---|---|---|"]
    service = figures.get("service", {})
    for title, key, other, most in CHECKS:
        base = figures.get(other, {}).get(key) if other else 1
        if key in service and base:
            value = service[key] / base
            lines.append(f"| {title} | {value:.3g} | {most:.3g} | {'ok' if value <= most else '**OVER**'} |")
    return "\n".join(lines)


def machine():
    """The processor, the number of cores, the kernel and the Python of this machine, in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"


def arguments():
    """The command line, parsed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(NAMES))
    parser.add_argument("--rounds", type=int, help="default 3, with --quick 1")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--paced", action="store_true", help="CPU a token only")
    parser.add_argument("--svg", type=Path, help="draw the result into this file")
    parser.add_argument("--service-python", help="an interpreter with requirements.txt (default: own venv)")
    parser.add_argument("--peer-python", help="an interpreter with requirements-peer.txt (default: own venv)")
    args = parser.parse_args()
    if unknown := set(args.only) - set(NAMES):
        parser.error(f"--only takes {', '.join(NAMES)}; not {', '.join(sorted(unknown))}")
    args.rounds = args.rounds or (1 if args.quick else 3)
    return args


def main():
    args = arguments()
    prepare()
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch, postgres() as database:
        bench = Bench(args, database, scratch)
        for name in bench.database:  # makes the tables and the bytecode, so that no timed start has to
            with provider() as fake, bench.start(name, *fake):
                note(f"{NAMES[name]} has started once")
        figures = measure(bench, args)
        for name, seen in figures.items():
            seen |= static_figures(bench, name)
            if "interpreter" in seen:
                seen["import"] = seen["start"] - seen["interpreter"]
            # What shows without a server between is the rig's: connecting, timers of a millisecond.
            if "first_1_p50" in seen:
                seen["behind"] = seen["first_1_p50"] - figures.get("alone", {}).get("first_1_p50", 0)
        urls = list(filter(None, bench.database.values()))[:1]
        version = [f"PostgreSQL {execute(url, 'SHOW server_version')[0][0]}" for url in urls]
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    command = " ".join(["python bench/run.py", *sys.argv[1:]])
    caption = f"{when}, {', '.join([machine(), *version])}, median of {args.rounds}: `{command}`"
    print(f"{table(figures)}\n\n{checks(figures)}\n\n{caption}")
    if args.svg:
        args.svg.write_text(chart.svg({NAMES[name]: seen for name, seen in figures.items()}, when))


if __name__ == "__main__":
    main()
