"""Does the service stay as fast when the database fills? First-token times with an empty and a full table.

    python bench/grow.py                         1,000,000 turns, one session of 10,000 among them

Two services run side by side on two databases, and the cases alternate: a new session in an empty table, a
new session among a million turns, and sessions of 100 and of 10,000 turns. The session of 100 already fills
the history that the model is shown. What it costs more than a new one is sending that; what the one of 10,000
costs more than that is growth.
"""

import statistics
import sys

from common import ROOT, arguments, chat_server, execute, load, postgres, provider

FIRST, TOKENS = 0.03, 2
LONG_TURNS, SHORT_TURNS, TURNS_A_SESSION = 10_000, 100, 20

FILL = """
INSERT INTO turns (owner, session_id, number, question, reply, status, verdicts, model, usage,
                   lease_until, created_at, finished_at)
SELECT {owner}, {session}, nextval('turn_numbers'),
       'How do I make bucket ' || n || ' of Amazon S3 private?',
       repeat('Amazon S3 blocks public access by default. ', {sentences}),
       'complete', '[["allow", "names amazon s3", "rules"]]', 'bench',
       '{{"prompt_tokens": 500, "completion_tokens": 150}}', moment, moment, moment
FROM generate_series(1, {rows}) AS n, LATERAL (SELECT now() - n * interval '2 seconds' AS moment) AS made
"""


def fill(url, turns):
    """Sessions of 10,000 and 100 turns, the rest in sessions of 20, for the owner that the service uses."""
    owner = "(SELECT owner FROM turns LIMIT 1)"
    many = FILL.format(
        owner=owner,
        session=f"'bench-' || (n / {TURNS_A_SESSION})",
        sentences=5,
        rows=turns - LONG_TURNS - SHORT_TURNS,
    )
    sized = [
        FILL.format(owner=owner, session=f"'bench-of-{rows}'", sentences=14, rows=rows)
        for rows in (SHORT_TURNS, LONG_TURNS)
    ]
    execute(url, many, *sized, "VACUUM ANALYZE turns")


def first_token(url, **options):
    """The median first-token time of 40 turns one after the other, in ms."""
    result = load(url, streams=40, one_by_one=True, **options)
    if result["failed"]:
        raise SystemExit(f"failed: {result['failed']}")
    return result["first_token_ms"]["p50"]


def main():
    args = arguments(__doc__, turns=1_000_000, rounds=7)
    script = ROOT / "awschat.py"
    with postgres() as database, provider(FIRST, 0.001, TOKENS) as (_, provider_url):
        empty_db, full_db = database("empty"), database("full")
        with (
            chat_server(script, empty_db, provider_url, args.python) as (_, empty_port, _),
            chat_server(script, full_db, provider_url, args.python) as (_, full_port, _),
        ):
            empty, full = (f"http://127.0.0.1:{port}/chat/stream" for port in (empty_port, full_port))
            first_token(empty)  # warms up, and shows in the table which owner the service uses
            first_token(full)
            fill(full_db, args.turns)
            cases = {
                "new session, empty table": (empty, {}),
                f"new session, {args.turns:,} turns in the table": (full, {}),
                f"session of {SHORT_TURNS} of these": (full, {"session": f"bench-of-{SHORT_TURNS}"}),
                f"session of {LONG_TURNS:,} of these": (full, {"session": f"bench-of-{LONG_TURNS}"}),
            }
            times = {case: [] for case in cases}
            for _ in range(args.rounds):
                for case, (url, options) in cases.items():
                    times[case].append(first_token(url, **options))
    base, good = None, True
    print("| | first token p50 (ms) | less the provider's 30 ms | of the empty one | |")
    print("|---|---|---|---|---|")
    for case, seen in times.items():
        value = statistics.median(seen)
        base = base or value
        good &= value <= 1.2 * base
        verdict = "ok" if value <= 1.2 * base else "**OVER**"
        print(f"| {case} | {value:.1f} | {value - FIRST * 1000:.1f} | {value / base:.2f} | {verdict} |")
    sys.exit(not good)


if __name__ == "__main__":
    main()
