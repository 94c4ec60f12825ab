"""Many turns for minutes on end: does memory grow, does anything leak?

    python bench/soak.py                         21,000 turns over 5 minutes
    python bench/soak.py --turns 60000 --minutes 15

Prints memory, open files and the provider's connections every half minute, then the checks: RSS at the end
within 5 % of RSS after the first minute, files and connections back to where they were, no failure.
"""

import json
import statistics
import sys
import time

from common import ROOT, arguments, chat_server, get_json, load, load_command, postgres, provider, running

TOKENS, INTERVAL = 20, 0.03


def state(process, fake):
    """(RSS in MiB, open files of the service, connections and streams open at the provider) now."""
    stats = get_json(fake[1].removesuffix("/v1") + "/stats")
    return process.rss() / 2**20, process.open_files(), stats["connections_open"], stats["streams_open"]


def around(samples, second):
    """The median RSS of the ten seconds that end at `second`."""
    return statistics.median(rss for at, rss in samples if second - 10 <= at <= second)


def row(when, now):
    print("| {} | {:.1f} | {} | {} | {} |".format(when, *now), flush=True)


def soak(process, fake, url, args):
    """Run the load and print what the process uses meanwhile -> (load's summary, [(second, RSS in MiB)])."""
    seconds, samples = args.minutes * 60, []
    with running(load_command(url, streams=args.turns, over=seconds)) as generator:
        started = time.monotonic()
        while generator.popen.poll() is None:
            at = time.monotonic() - started
            samples.append((at, process.rss() / 2**20))
            if len(samples) % 30 == 0:
                row(f"{at:.0f} s", state(process, fake))
            time.sleep(1)
        return json.loads(generator.popen.stdout.read()), [(at, rss) for at, rss in samples if at <= seconds]


def settled(process, fake, before, seconds=90):
    """Wait until files and connections are as `before`: idle ones are kept a while -> the last state."""
    for _ in range(seconds):
        now = state(process, fake)
        if now[1] <= before[1] and now[2] <= before[2] and now[3] == 0:
            break
        time.sleep(1)
    return now


def main():
    args = arguments(__doc__, turns=21_000, minutes=5.0)
    with (
        postgres() as database,
        provider(0.03, INTERVAL, TOKENS) as fake,
        chat_server(ROOT / "awschat.py", database("soak"), fake[1], args.python) as (process, port, _),
    ):
        url = f"http://127.0.0.1:{port}/chat/stream"
        load(url, streams=20, over=1)  # so that the pool and the provider's connections exist
        print("| | RSS (MiB) | open files | provider connections | provider streams |\n|---|---|---|---|---|")
        before = state(process, fake)
        row("start", before)
        result, samples = soak(process, fake, url, args)
        after = settled(process, fake, before)
        row("after", after)
    first, last = around(samples, 60), around(samples, samples[-1][0])
    print(
        f"\n{result['ok']} of {result['streams']} turns ok in {result['wall_s']:.0f} s",
        result["failed"] or "",
    )
    print(f"RSS after the first minute {first:.1f} MiB, at the end {last:.1f} MiB: {last / first - 1:+.1%}")
    good = not result["failed"] and last <= first * 1.05 and after[1] <= before[1] and after[2] <= before[2]
    print("ok" if good else "FAILED")
    sys.exit(not good)


if __name__ == "__main__":
    main()
