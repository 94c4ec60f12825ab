"""Can greedy streams starve the others? 50 get a token every 30 ms while 20 get 5,000 tokens in one burst.

    python bench/starve.py

The same is measured against the provider alone, because the burst also keeps the provider and the load
generators busy; that row is what the rig itself adds. The others' p99 gap between events must stay under
150 ms, of which 100 are the rest between two reads, and a burst's first token must come at once, not with
its last.
"""

import json
import sys
import time
from contextlib import ExitStack

from common import ROOT, arguments, chat_server, load, load_command, postgres, provider, running

OTHERS, BURSTS, BURST_TOKENS = 50, 20, 5000
QUESTION = "How do I move old objects from Amazon S3 to Glacier with a lifecycle rule? "


def question(**directives):
    """An AWS question that steers the provider. Of several answer= the last counts; the others keep the rules
    from doubting it, because in doubt an answer is held back, which is not what is measured here."""
    steer = "".join(f'{name}={value}, answer="AWS", ' for name, value in directives.items())
    return f'{QUESTION} #fake({steer}answer="") S3'


STEADY = question(first=0.03, interval=0.03, tokens=200)
BURST = question(first=0.03, interval=0.03, tokens=BURST_TOKENS, burst=BURST_TOKENS)


def measure(**target):
    """The steady streams, and after two seconds the bursts -> (summary of the steady ones, of the bursts)."""
    with ExitStack() as stack:
        steady = load_command(**target, streams=OTHERS, over=1, message=STEADY)
        burst = load_command(**target, streams=BURSTS, message=BURST)
        steady = stack.enter_context(running(steady))
        time.sleep(2)
        burst = stack.enter_context(running(burst))
        return [json.loads(process.popen.communicate()[0]) for process in (steady, burst)]


def row(name, steady, burst):
    """One line of the table."""
    gap, first, last = steady["gap_ms"], burst["first_token_ms"], burst["last_token_s"]
    cells = [f"{gap['p50']:.0f} / {gap['p99']:.0f} / {gap['max']:.0f}"]
    cells += [f"{first['p50'] - 30:.0f} / {first['max'] - 30:.0f}"]
    cells += [f"{last['p50'] * 1000 - 30:.0f} / {last['max'] * 1000 - 30:.0f}"]
    cells += [f"{burst['token_events'] / BURSTS:.0f}", str(steady["failed"] or burst["failed"] or 0)]
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main():
    args = arguments(__doc__)
    print(
        "| | others' gap, p50 / p99 / max (ms) | burst's first token behind the provider's, p50 / max (ms)",
        end="",
    )
    print(" | … last token | events a burst | failures |\n|---|---|---|---|---|---|")
    with postgres() as database, provider(extra=["--scripted"]) as (_, provider_url):
        row("provider alone", *measure(url=provider_url + "/chat/completions", wire="openai"))
        server = chat_server(ROOT / "awschat.py", database("starve"), provider_url, args.python)
        with server as (_, port, _):
            url = f"http://127.0.0.1:{port}/chat/stream"
            load(url, streams=5)
            steady, burst = measure(url=url)
    row("awschat", steady, burst)
    first, last = burst["first_token_ms"]["p50"], burst["last_token_s"]["p50"] * 1000
    checks = {
        "others' p99 gap under 150 ms": steady["gap_ms"]["p99"] < 150,
        "a burst's first token comes in less than half the time of its last, p50": first < last / 2,
        "no failure": not steady["failed"] and not burst["failed"],
    }
    print()
    for title, held in checks.items():
        print(f"{'ok  ' if held else 'OVER'} {title}")
    sys.exit(not all(checks.values()))


if __name__ == "__main__":
    main()
