"""How much off-scope text does the hold-back let through, and what does holding back cost?

    python bench/holdback.py        620 drifting answers, then the price; about a minute

Drift: scripted answers turn from AWS to bread after k characters, k from 0 to 3,000, each ten times after a
question that the rules allow (confident) and ten times after one that they leave to the model (in doubt). The
provider is slow and fast, and drifts within a paragraph and in a new one. At most 600 characters about bread
may reach the client; the closing event and the stored reply must be the refusal.

Price: an answer that stays on scope is streamed in doubt, after a confident verdict, and by the provider
itself, all at the same time. The provider needs 300 ms for its first token and the judge 400 ms for its word;
they run side by side, so that in doubt the first token takes 400 ms, not 700. Last, the judge says BLOCK: the
provider's stream must end there.
"""

import asyncio
import json
import math
import secrets
import statistics
import sys
import time
from itertools import product

import aiohttp
from common import ROOT, arguments, chat_server, execute, get, get_json, postgres, provider

from fake_openai import one_word

REFUSAL = "This assistant answers questions about AWS."
DRIFTS, RUNS, AT_ONCE = range(0, 3001, 100), 10, 20
BUCKETS = [range(1), range(1, 501), range(501, 1001), range(1001, 2001), range(2001, 3001)]
PRICE_RUNS, PRICE_AT_ONCE = 40, 10  # of each of the three
BLOCK_RUNS, LONG = 20, 2000
PACE = {"first": 0.3, "interval": 0.03, "judge_delay": 0.4}


# ---- What is asked ----


def confident(**directives):
    """A question that the rules allow."""
    return f"How do I make an S3 bucket private? {one_word(**directives)} S3"


def doubtful(**directives):
    """A question that the rules leave to the model, though they see AWS in it."""
    return f"Should I leave Azure for Amazon S3? {one_word(**directives)}"


ASKED = {"confident": confident, "doubtful": doubtful}


class Client:
    """Talks to the service and to its provider."""

    def __init__(self, http, service, provider):
        self.http, self.service, self.provider = http, service, provider

    async def events(self, url, body):
        """POST -> [(seconds since then, the JSON of a data line), ...]; without comments and [DONE]."""
        began = time.perf_counter()
        async with self.http.post(url, json=body, raise_for_status=True) as response:
            lines = [(time.perf_counter() - began, line) async for line in response.content]
        return [(at, json.loads(line[6:])) for at, line in lines if line.startswith(b"data: {")]

    async def chat(self, kind, **directives):
        """A turn in a session of its own -> (session id, its events)."""
        session = f"{kind}-{secrets.token_hex(8)}"
        body = {"session_id": session, "message": ASKED[kind](**directives)}
        return session, await self.events(f"{self.service}/chat/stream", body)

    async def without_guard(self, **directives):
        """The provider's own stream -> the events that carry text or a finish reason."""
        body = {"model": "bench", "stream": True, "stream_options": {"include_usage": True}}
        body["messages"] = [{"role": "user", "content": doubtful(**directives)}]
        events = await self.events(f"{self.provider}/chat/completions", body)
        choices = [(at, choice) for at, event in events for choice in event["choices"]]
        return [(at, c) for at, c in choices if c["delta"].get("content") or c["finish_reason"]]

    async def stored(self, session):
        """The newest message of a session."""
        async with self.http.get(f"{self.service}/chat", params={"session_id": session}) as response:
            return (await response.json())["messages"][0]


# ---- Drift ----


async def drift(client, kind, k, run):
    """An answer that leaves AWS after k characters -> (characters shown past k, refused, refusal stored)."""
    style = {"burst": run % 2 * 7 + 1, "paragraph": run // 2 % 2}  # a token or eight a millisecond
    session, events = await client.chat(kind, drift=k, interval=0.001, judge_delay=0.05, **style)
    *tokens, notice, closing = [event for _, event in events]
    shown = "".join(token["content"] for token in tokens)
    refused = (closing["type"], closing["content"], notice["content"].strip()) == ("end", REFUSAL, REFUSAL)
    stored = await client.stored(session)
    return max(0, len(shown) - k), refused, (stored["role"], stored["content"]) == ("assistant", REFUSAL)


async def drift_table(client):
    """Run and print the drifting answers -> {what must hold: whether it did}."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(case):
        async with gate:
            return case, await drift(client, *case)

    cases = list(product(ASKED, DRIFTS, range(RUNS)))
    results = dict(await asyncio.gather(*map(one, cases)))
    print("| answer leaves AWS after | off-scope characters shown, confident: median / max", end="")
    print(" | in doubt: max | `end` is the refusal | stored reply, too |\n|---|---|---|---|---|")
    for bucket in BUCKETS:
        inside = {case: result for case, result in results.items() if case[1] in bucket}
        off = {kind: [result[0] for case, result in inside.items() if case[0] == kind] for kind in ASKED}
        name = f"{bucket[0]:,} to {bucket[-1]:,} characters" if len(bucket) > 1 else "0 characters"
        cells = [name, f"{statistics.median(off['confident']):.0f} / {max(off['confident'])}"]
        cells += [str(max(off["doubtful"]))]
        cells += [f"{sum(result[at] for result in inside.values())} of {len(inside)}" for at in (1, 2)]
        print("| " + " | ".join(cells) + " |", flush=True)
    worst = {kind: max(result[0] for case, result in results.items() if case[0] == kind) for kind in ASKED}
    print()
    return {
        f"after an allow of either kind at most 600 are shown (most: {worst})": max(worst.values()) <= 600,
        "the closing event is the refusal": all(refused for _, refused, _ in results.values()),
        "the stored reply is the refusal": all(stored for _, _, stored in results.values()),
    }


# ---- Price ----


def p50_p99(values):
    """Two quantiles (nearest rank) of seconds, as text in ms."""
    ordered = sorted(values)
    return " / ".join(f"{ordered[math.ceil(share * len(ordered)) - 1] * 1000:.0f}" for share in (0.5, 0.99))


async def price_table(client):
    """Run and print the answers on scope -> {what must hold: whether it did}."""
    seen = {"provider itself": [], "confident": [], "doubtful": []}

    async def one(number, name):
        await asyncio.sleep(number / 10)  # spread over a second: no crowd at the door is measured here
        if name in ASKED:
            _, events = await client.chat(name, tokens=200, **PACE)
        else:
            events = await client.without_guard(tokens=200, **PACE)
        seen[name].append(events)

    for _ in range(PRICE_RUNS // PRICE_AT_ONCE):
        await asyncio.gather(*(one(number, name) for number in range(PRICE_AT_ONCE) for name in seen))
    print("| 200 tokens on AWS, one every 30 ms; p50 / p99 | first token (ms)", end="")
    print(" | longest gap between events (ms) | events, p50 | whole answer (ms) |\n|---|---|---|---|---|")
    first = {}
    for name, streams in seen.items():
        times = [[at for at, _ in events] for events in streams]
        first[name] = [at[0] for at in times]
        gaps = [max(later - at for at, later in zip(at, at[1:], strict=False)) for at in times]
        cells = [name, p50_p99(first[name]), p50_p99(gaps)]
        cells += [f"{statistics.median(map(len, times)):.0f}", p50_p99([at[-1] for at in times])]
        print("| " + " | ".join(cells) + " |", flush=True)
    print()
    ends = [events[-1][1] for name in ASKED for events in seen[name]]
    middle = statistics.median(first["doubtful"])
    return {
        "all these answers are complete": all(event.get("status") == "complete" for event in ends),
        "in doubt nothing is shown before the judge's word": min(first["doubtful"]) >= PACE["judge_delay"],
        f"judge and answer run side by side: first token after {middle:.3f} s, not 0.7": middle < 0.5,
    }


async def block(client):
    """The judge blocks long answers after 400 ms -> {what must hold: whether it did}."""
    async with client.http.post(client.provider.removesuffix("/v1") + "/stats/reset"):
        pass
    turns = [client.chat("doubtful", judge="BLOCK", tokens=LONG, **PACE) for _ in range(BLOCK_RUNS)]
    streams = [events for _, events in await asyncio.gather(*turns)]
    await asyncio.sleep(0.5)
    stats = await asyncio.to_thread(get_json, client.provider.removesuffix("/v1") + "/stats")
    sent, calls = stats["tokens_when_aborted"], [r for r in stats["requests"] if r["kind"] == "generate"]
    lived = [call["ended"] - call["started"] for call in calls if call["outcome"] == "aborted"] or [0]
    print(f"| the judge blocks an answer of {LONG:,} tokens after 400 ms | p50 / p99 (ms) |\n|---|---|")
    print(f"| refusal at the client | {p50_p99([events[0][0] for events in streams])} |")
    print(f"| provider's stream cancelled | {p50_p99(lived)} |")
    print(f"\nTokens that the provider had sent by then: {min(sent, default=0)} to {max(sent, default=0)}.\n")
    refused = {tuple(event["content"] for _, event in events) for events in streams} == {(REFUSAL, REFUSAL)}
    return {
        "of a blocked answer nothing is shown but the refusal": refused,
        f"the provider's streams are cancelled ({len(sent)} of {BLOCK_RUNS})": len(sent) == BLOCK_RUNS,
        "within 20 tokens": max(sent, default=0) <= 20,
    }


# ---- Main ----


async def measure(service, provider_url):
    """All three parts -> {what must hold: whether it did}."""
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        client = Client(http, service, provider_url)
        return await drift_table(client) | await price_table(client) | await block(client)


def main():
    args = arguments(__doc__)
    with postgres() as database, provider(extra=["--scripted"]) as (_, provider_url):
        url, script = database("holdback"), ROOT / "awschat.py"
        with chat_server(script, url, provider_url, args.python, REFUSAL=REFUSAL) as (_, port, _):
            while get(port, "/ready")[0] != 200:  # it is healthy before it has its tables
                time.sleep(0.01)
            checks = asyncio.run(measure(f"http://127.0.0.1:{port}", provider_url))
            sql = "SELECT DISTINCT split_part(session_id, '-', 1), verdicts -> 0 ->> 0 FROM turns ORDER BY 1"
            judged = [tuple(row) for row in execute(url, sql)]
    rules = "the rules were sure of the confident questions and of no doubtful one"
    checks[rules] = judged == [("confident", "allow"), ("doubtful", "unsure")]
    for title, held in checks.items():
        print(f"{'ok  ' if held else 'OVER'} {title}")
    sys.exit(not all(checks.values()))


if __name__ == "__main__":
    main()
