#!/usr/bin/env bash
# Two replicas behind nginx, PgBouncer before a primary with a synchronous standby: what if parts of it die?
#
#     apt-get install curl nginx-light pgbouncer postgresql util-linux      PgBouncer 1.21 or newer
#     pip install -r requirements-dev.txt
#     PYTHON=python bench/scale_out.sh          about a minute; exit status 1 if a promise was broken
#
#     clients -> nginx -> replica A, replica B -> PgBouncer -> primary => standby
#
# While 40 clients talk, replica A is killed with SIGKILL and later comes back, then the primary is killed,
# the standby promoted and PgBouncer pointed to it. Clients post again with the same Idempotency-Key when a
# stream breaks; a second device watches each turn with GET /chat/stream, and again when that breaks. In the
# end every reply that anybody saw must be in the history.
#
# All of it runs on loopback in a temporary directory and ends with the script, also on Ctrl-C. As root, what
# refuses to run as root runs as the user postgres.
set -euo pipefail

bench=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$bench")
python=${PYTHON:-python3}
for program in nginx pgbouncer setpriv curl; do
    command -v "$program" >/dev/null || { echo "not installed: $program" >&2 && exit 2; }
done
bouncer_version=$(pgbouncer --version | sed -n 's/^PgBouncer //p')
printf '1.21\n%s\n' "$bouncer_version" | sort -VC || {
    echo "PgBouncer $bouncer_version can't prepare statements in transaction mode; 1.21 can" >&2 && exit 2
}
postgres=$(find /usr/lib/postgresql -maxdepth 2 -name bin | sort -V | tail -1)
[ -n "$postgres" ] || { echo "not installed: postgresql" >&2 && exit 2; }
seconds=36 # how long the clients start new turns
dir=$(mktemp -d "${TMPDIR:-/tmp}/scale-out-XXXXXX")
declare -A pid=()

# ---- Processes ----

# Runs a command as somebody other than root.
unprivileged() {
    if [ "$(id -u)" = 0 ]; then
        exec setpriv --reuid=postgres --regid=postgres --init-groups "$@"
    fi
    exec "$@"
}

# start NAME COMMAND...: in the background, its output in a file of that name.
start() {
    "${@:2}" >>"$dir/$1.log" 2>&1 &
    pid[$1]=$!
    disown $! # the shell is not to report it when it is killed
}

# Ends everything that was started, by its pid.
finish() {
    local status=$? name signal
    trap - EXIT
    trap "" INT TERM
    for name in pause clients nginx A B provider pgbouncer standby primary; do
        [ -n "${pid[$name]:-}" ] || continue
        signal=TERM
        [[ $name =~ ^(standby|primary)$ ]] && signal=INT # PostgreSQL's fast shutdown
        kill -$signal "${pid[$name]}" 2>>"$dir/finish.log" || continue
        for _ in {1..50}; do
            kill -0 "${pid[$name]}" 2>>"$dir/finish.log" || break
            sleep 0.1
        done
        kill -KILL "${pid[$name]}" 2>>"$dir/finish.log" || true
    done
    wait || true
    rm -rf "$dir"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# until_true SECONDS COMMAND...: waits until the command succeeds.
until_true() {
    local deadline=$((SECONDS + $1))
    until "${@:2}" >>"$dir/until.log" 2>&1; do
        if [ $SECONDS -ge $deadline ]; then
            echo "in vain: ${*:2}" >&2
            tail -n 5 "$dir"/*.log >&2
            exit 1
        fi
        sleep 0.1
    done
}

# kill_now NAME: as a crash would.
kill_now() {
    kill -KILL "${pid[$1]}"
    mark "$1 killed"
    unset "pid[$1]"
}

# Like sleep, but a signal ends it at once.
pause() {
    sleep "$1" &
    pid[pause]=$!
    wait $!
    unset "pid[pause]"
}

# mark EVENT: when it happened, for the clients' figures.
mark() {
    echo "$1 $(date +%s.%N)" >>"$dir/events"
    echo "$(date +%T)  $1"
}

# ---- The stack ----

if [ "$(id -u)" = 0 ]; then
    chown postgres: "$dir"
fi
read -r port_nginx port_a port_b port_bouncer port_primary port_standby port_provider < <(
    "$python" -c '
import socket
probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(7)]
print(*(probe.getsockname()[1] for probe in probes))'
)

sql() { "$postgres/psql" -h 127.0.0.1 -p "$1" -U awschat -d "$2" -qAtc "$3"; }
database() { # NAME PORT OPTION...
    start "$1" unprivileged "$postgres/postgres" -D "$dir/$1" -p "$2" "${@:3}" \
        -c listen_addresses=127.0.0.1 -c unix_socket_directories=
    until_true 20 sql "$2" postgres "SELECT 1"
}
(unprivileged "$postgres/initdb" -D "$dir/primary" -U awschat --auth=trust --encoding=UTF8) >"$dir/initdb.log"
# An answer is acknowledged to nobody before the standby has it on disk: synchronous_commit is on by default.
database primary "$port_primary" -c "synchronous_standby_names=*"
primary="postgresql://awschat@127.0.0.1:$port_primary"
(unprivileged "$postgres/pg_basebackup" -d "$primary" -D "$dir/standby" -R -c fast)
database standby "$port_standby" # waits for nobody once it is the primary
replicates() { sql "$port_primary" postgres "SELECT sync_state FROM pg_stat_replication" | grep -q sync; }
until_true 20 replicates
sql "$port_primary" postgres "CREATE DATABASE awschat"

bouncer() { # PORT of the primary
    cat >"$dir/pgbouncer.ini" <<INI
[databases]
awschat = host=127.0.0.1 port=$1 user=awschat
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = $port_bouncer
unix_socket_dir =
auth_type = any
pool_mode = transaction
max_client_conn = 200
default_pool_size = 20
# While the primary is away: look for it every second, and let nobody wait for long.
server_login_retry = 1
server_connect_timeout = 2
query_wait_timeout = 3
INI
}
bouncer "$port_primary"
start pgbouncer unprivileged pgbouncer "$dir/pgbouncer.ini"

start provider "$python" "$root/fake_openai.py" --scripted --port "$port_provider"
replica() { # NAME PORT
    start "$1" env HOST=127.0.0.1 PORT="$2" OPENAI_API_KEY=none GRACE_SECONDS=1 \
        OPENAI_BASE_URL="http://127.0.0.1:$port_provider/v1" \
        DATABASE_URL="postgresql://awschat@127.0.0.1:$port_bouncer/awschat" "$python" "$root/awschat.py"
    until_true 20 curl -fsS "http://127.0.0.1:$2/ready"
}
replica A "$port_a"
replica B "$port_b"

cat >"$dir/nginx.conf" <<NGINX
daemon off;
worker_processes 1;
pid $dir/nginx.pid;
error_log stderr;
events { worker_connections 1024; }
http {
    access_log off;
    client_body_temp_path $dir/body;
    proxy_temp_path $dir/proxy;
    fastcgi_temp_path $dir/fastcgi;
    uwsgi_temp_path $dir/uwsgi;
    scgi_temp_path $dir/scgi;
    upstream awschat {
        server 127.0.0.1:$port_a max_fails=1 fail_timeout=2s;
        server 127.0.0.1:$port_b max_fails=1 fail_timeout=2s;
        keepalive 64;           # idle connections; awschat keeps them for 75 s, nginx for 60 s
    }
    server {
        listen 127.0.0.1:$port_nginx;
        location / {
            proxy_pass http://awschat;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host \$host;
            proxy_set_header X-Forwarded-For \$proxy_add_x_forwarded_for;  # believed with TRUSTED_HOPS=1
            proxy_buffering off;        # each event at once
            proxy_connect_timeout 2s;
            proxy_read_timeout 60s;     # awschat sends something every 4 s
            proxy_send_timeout 60s;
            add_header X-Replica \$upstream_addr;
        }
    }
}
NGINX
start nginx unprivileged nginx -e stderr -p "$dir" -c "$dir/nginx.conf"
until_true 20 curl -fsS "http://127.0.0.1:$port_nginx/ready"

# ---- The clients ----

cat >"$dir/clients.py" <<'PYTHON'
"""40 people with two devices each: they talk, and hold what they saw against the history in the end."""

import asyncio
import json
import random
import secrets
import statistics
import sys
import time
from contextlib import suppress

import aiohttp
import asyncpg

bench, url, database_url, seconds, events_file = sys.argv[1:]
sys.path.insert(0, bench)
from faults import LEASE, SLACK, malformed, question

PEOPLE, GIVE_UP = 40, 40
clock = time.time  # the shell's clock
until = clock() + float(seconds)
tries, questions, wrong = [], {}, []


async def request(http, session, asked, key=None):
    """Post a question or, without a key, watch the session; the dict of what was seen."""
    seen = {"session": session, "asked": asked, "watches": not key, "said": "", "first": 0, "closing": None}
    seen |= {"status": 0, "replica": None, "began": clock()}
    tries.append(seen)
    options = {"params": {"session_id": session}}
    if key:
        options = {"json": {"session_id": session, "message": asked}, "headers": {"Idempotency-Key": key}}
    with suppress(aiohttp.ClientError, OSError):
        async with http.request("POST" if key else "GET", f"{url}/chat/stream", **options) as answer:
            seen["status"], seen["replica"] = answer.status, answer.headers.get("X-Replica")
            async for line in answer.content:
                if line.startswith(b"data: ") and line.endswith(b"\n"):
                    event = json.loads(line[6:])
                    seen["first"] = seen["first"] or clock()
                    if event["type"] == "token":
                        seen["said"] += event["content"]
                    else:
                        seen["closing"] = event
    seen["ended"] = clock()
    return seen


def answered(seen):
    return bool(seen["closing"]) and seen["closing"]["type"] == "end"


async def watch(http, session, asked):
    """The second device: look on, and again whenever that breaks."""
    await asyncio.sleep(0.3)
    deadline = clock() + GIVE_UP
    while not (await request(http, session, asked))["closing"] and clock() < deadline:
        await asyncio.sleep(0.2)


async def talk(http, number):
    """One person: ask, post again with the same key until there is an answer, think, ask the next."""
    rng, session = random.Random(number), f"person-{number}"
    await asyncio.sleep(rng.uniform(0, 3))
    while clock() < until:
        asked, key, deadline = question(rng, rng.uniform(1, 4)), secrets.token_hex(8), clock() + GIVE_UP
        questions[asked] = session
        watcher = asyncio.create_task(watch(http, session, asked))
        while not answered(await request(http, session, asked, key)):
            if clock() > deadline:
                wrong.append(f"{session} gave up")
                break
            await asyncio.sleep(0.2)
        await watcher
        await asyncio.sleep(rng.uniform(0, 0.5))


async def history(http, session):
    """All messages of a session, oldest first."""
    messages, params = [], {"session_id": session, "limit": 100}
    while params.get("before", 1):
        async with http.get(f"{url}/chat", params=params) as answer:
            page = await answer.json()
        messages += page["messages"]
        params["before"] = page["before"]
    return messages[::-1]


async def check(http):
    """Everything that anybody saw must be in the promoted standby, once."""
    connection = await asyncpg.connect(database_url)
    for session in sorted(set(questions.values())):
        rows = await connection.fetch("SELECT * FROM turns WHERE session_id = $1 ORDER BY number", session)
        messages = await history(http, session)
        stored = {(m["role"], m["content"], m["status"]) for m in messages}
        wrong.extend(f"{session}: {what}" for what in malformed(rows, messages))
        for seen in [seen for seen in tries if seen["session"] == session]:
            closing, asked = seen["closing"], seen["asked"]
            if answered(seen) and ("assistant", closing["content"], closing["status"]) not in stored:
                wrong.append(f"{session}: lost the reply {closing}")
            if seen["said"] and not seen["watches"] and sum(row["question"] == asked for row in rows) != 1:
                wrong.append(f"{session}: lost or doubled the question {asked}")
    await connection.close()


def figures(events):
    """Print what each death cost."""
    limits = {"A killed": LEASE + SLACK, "primary killed": LEASE + SLACK}
    limits["primary killed"] += events["standby promoted, PgBouncer pointed to it"] - events["primary killed"]
    rows = [("turns asked for", len(questions)), ("replies acknowledged", sum(map(answered, tries)))]
    for event, limit in limits.items():
        at, blocked = events[event], []
        window = [seen for seen in tries if at <= seen["ended"] < at + limit and seen["status"] != 404]
        hit = [seen for seen in window if not answered(seen)]
        for asked in {seen["asked"] for seen in hit}:
            firsts = [t["first"] for t in tries if t["asked"] == asked and answered(t) and t["ended"] > at]
            blocked.append(max(0, min(firsts, default=clock()) - at))
            if blocked[-1] > limit:
                wrong.append(f"{questions[asked]} was stuck for {blocked[-1]:.1f} s after: {event}")
        broken = [seen for seen in hit if seen["status"] == 200 and not seen["closing"]]
        resumed = [seen for seen in broken if resumes(seen)]
        rows += [(f"{event}: streams broken", len(broken))]
        rows += [("  asked again on the other replica", sum(not seen["watches"] for seen in resumed))]
        rows += [("  watched again on the other replica", sum(seen["watches"] for seen in resumed))]
        rows += [("  closed with an error", sum(bool(seen["closing"]) for seen in hit))]
        rows += [("  answered 502 or 503", sum(seen["status"] in (502, 503) for seen in hit))]
        rows += [("  turns hit", len(blocked))]
        if blocked:
            rows.append(("  seconds until they went on, p50", f"{statistics.median(blocked):.2f}"))
            rows.append((f"  seconds until they went on, max (limit {limit:.1f})", f"{max(blocked):.2f}"))
        if len(resumed) < len(broken):
            wrong.append(f"{len(broken) - len(resumed)} streams were not resumed after: {event}")
    rows += [("broken promises (lost, doubled, malformed, stuck)", len(wrong))]
    for label, value in rows:
        print(f"{label:58}{value:>8}")


def resumes(broken):
    """Did the same device get its answer from another replica later, or, watching, that there is none?"""
    own = [t for t in tries if t["asked"] == broken["asked"] and t["watches"] == broken["watches"]]
    later = [t for t in own if t["began"] > broken["ended"] and t["replica"] != broken["replica"]]
    return any(answered(t) or (t["watches"] and t["closing"]) for t in later)


async def main():
    timeout = aiohttp.ClientTimeout(total=GIVE_UP)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
        await asyncio.gather(*[talk(http, number) for number in range(PEOPLE)])
        await check(http)


asyncio.run(main())
with open(events_file) as lines:
    events = dict(line.rsplit(" ", 1) for line in lines)
figures({name: float(at) for name, at in events.items()})
for each in wrong[:20]:
    print(each)
sys.exit(bool(wrong))
PYTHON

mark "clients start"
"$python" "$dir/clients.py" "$bench" "http://127.0.0.1:$port_nginx" \
    "postgresql://awschat@127.0.0.1:$port_standby/awschat" "$seconds" "$dir/events" >"$dir/figures" 2>&1 &
pid[clients]=$!

pause 6
kill_now A
pause 12
replica A "$port_a"
mark "A is back"
pause 4

kill_now primary
pause 3 # until whatever watches over the database has noticed
(unprivileged "$postgres/pg_ctl" promote -D "$dir/standby") >>"$dir/standby.log"
bouncer "$port_standby"
kill -HUP "${pid[pgbouncer]}"
mark "standby promoted, PgBouncer pointed to it"

status=0
wait "${pid[clients]}" || status=$?
unset "pid[clients]"
cat "$dir/figures"
if grep -l Traceback "$dir/A.log" "$dir/B.log"; then
    grep -h -A 80 Traceback "$dir/A.log" "$dir/B.log" | head -n 400
    status=1
fi
exit "$status"
