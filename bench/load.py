"""The load generator: N simultaneous chat streams against one server, one JSON summary on stdout.

    python bench/load.py --url http://127.0.0.1:8000/chat/stream --streams 400 --over 3
    python bench/load.py --url http://127.0.0.1:8000/chat/stream --streams 40 --one-by-one
    python bench/load.py --url http://127.0.0.1:9000/v1/chat/completions --wire openai --streams 400

It is written against the socket (asyncio protocols, its own chunked decoder), so that it measures the
server instead of itself; `cpu_share` in the summary says how busy its core was. Every stream has its own
TCP connection and session, as browsers have, and its clock starts before it connects. A stream counts as ok
only when it was well formed to the end: status 200, at least one token, a closing event, and a reply that
equals its tokens joined. Everything else is a failure with a reason.
"""

import argparse
import asyncio
import json
import resource
import sys
import time
import uuid
from collections import Counter
from urllib.parse import urlsplit

try:
    from uvloop import run
except ImportError:
    from asyncio import run

QUESTION = "How do I move old objects from Amazon S3 to Glacier with a lifecycle rule?"


class ChunkedBody:
    """Decodes `Transfer-Encoding: chunked` as it arrives."""

    def __init__(self):
        self.buffer = b""
        self.left = 0  # bytes of the current chunk, with its CRLF, that have not arrived
        self.finished = False

    def feed(self, data):
        """The payload in `data`; sets `finished` after the last chunk."""
        self.buffer += data
        out = []
        while self.buffer:
            if self.left == 0:
                line, found, rest = self.buffer.partition(b"\r\n")
                if not found:
                    break
                size = int(line.split(b";")[0], 16)
                if size == 0:
                    self.finished = True
                    break
                self.left, self.buffer = size + 2, rest
            taken = self.buffer[: self.left]
            # The chunk's own CRLF is the last two bytes of `left`, and may arrive apart from its payload.
            out.append(taken[: max(0, self.left - 2)])
            self.left -= len(taken)
            self.buffer = self.buffer[len(taken) :]
        return b"".join(out)


class Stream(asyncio.Protocol):
    """One chat stream: sends its request, notes when what arrived, resolves `done` with None or a reason."""

    def __init__(self, request, read_event):
        self.request, self.read_event = request, read_event
        self.started = time.monotonic()  # not loop.time(): uvloop's has a resolution of a millisecond
        self.connected = self.first_byte = self.ended = None
        self.token_times, self.pieces, self.events = [], [], 0
        self.head, self.body, self.rest = b"", None, b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport, self.connected = transport, time.monotonic()
        transport.write(self.request)

    def data_received(self, data):
        now = time.monotonic()
        if self.first_byte is None:
            self.first_byte = now
        try:
            self.read(data, now)
        except Exception as error:  # a malformed answer is a result, not a crash of the generator
            self.close(f"malformed: {type(error).__name__}")

    def connection_lost(self, error):
        self.close(f"connection lost: {type(error).__name__}" if error else "closed before its closing event")

    def read(self, data, now):
        """Split what arrived into head, chunks and events."""
        if self.body is None:
            self.head += data
            head, found, data = self.head.partition(b"\r\n\r\n")
            if not found:
                return
            if not head.startswith(b"HTTP/1.1 200 "):
                self.close("answered " + head.partition(b"\r\n")[0].decode())
                return
            self.body = ChunkedBody()
        *events, self.rest = (self.rest + self.body.feed(data)).split(b"\n\n")
        for event in events:
            self.events += 1
            self.read_event(self, event.partition(b"data: ")[2], now)  # what precedes it is a heartbeat
        if self.body.finished and not self.done.done():
            self.close("closed before its closing event")

    def token(self, text, now):
        self.token_times.append(now)
        self.pieces.append(text)

    def end(self, reply, now):
        """The closing event came; the reply must equal what was streamed (None: nothing to compare with)."""
        self.ended = now
        if not self.token_times:
            self.close("no token")
        elif reply is not None and reply != "".join(self.pieces):
            self.close("the reply differs from its tokens")
        else:
            self.close(None)

    def close(self, reason):
        if not self.done.done():
            self.done.set_result(reason)
            self.transport.close()


def read_awschat(stream, data, now):
    """One event of the service's or the peer's wire contract."""
    event = json.loads(data)
    if event["type"] == "token":
        stream.token(event["content"], now)
    elif event["type"] == "end":
        stream.end(event["content"], now)
    else:
        stream.close("error event: " + event["content"][:80])


def read_openai(stream, data, now):
    """One chunk of a provider's own stream, for the systems that only pass it through."""
    if data == b"[DONE]":
        stream.end(None, now)
        return
    choices = json.loads(data)["choices"]
    if choices and choices[0]["delta"].get("content"):
        stream.token(choices[0]["delta"]["content"], now)


def request_bytes(url, wire, message, session):
    """The whole HTTP request for one stream."""
    if wire == "openai":
        body = {"model": "bench", "stream": True, "messages": [{"role": "user", "content": message}]}
        body["stream_options"] = {"include_usage": True}
    else:
        body = {"message": message, "session_id": session}
    payload = json.dumps(body).encode()
    head = (
        f"POST {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nAccept: text/event-stream\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


async def run_stream(url, args, number, delay=0.0):
    """Run one stream after `delay` seconds -> (Stream or None, reason or None)."""
    await asyncio.sleep(delay)
    session = args.session or f"bench-{number}-{uuid.uuid4()}"
    request = request_bytes(url, args.wire, args.message, session)
    read_event = read_openai if args.wire == "openai" else read_awschat
    stream = Stream(request, read_event)
    loop = asyncio.get_running_loop()
    try:
        await asyncio.wait_for(loop.create_connection(lambda: stream, url.hostname, url.port), args.timeout)
    except OSError as error:
        return None, f"connect: {type(error).__name__}"
    try:
        return stream, await asyncio.wait_for(stream.done, args.timeout)
    except TimeoutError:
        stream.transport.abort()
        return stream, f"not finished after {args.timeout:g} s"


async def run_all(args):
    """Start the streams as asked and wait for all of them -> [(Stream or None, reason or None)]."""
    url = urlsplit(args.url)
    if args.one_by_one:
        return [await run_stream(url, args, number) for number in range(args.streams)]
    step = args.over / args.streams
    return await asyncio.gather(*(run_stream(url, args, n, n * step) for n in range(args.streams)))


def quantiles(values, scale=1.0):
    """{"p50", "p99", "max"} of `values` by nearest rank, times `scale`; None when there are none."""
    if not values:
        return None
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        name: round(ordered[round(last * part)] * scale, 3)
        for name, part in (("p50", 0.5), ("p99", 0.99), ("max", 1))
    }


def summary(results, wall, cpu):
    """What the run showed, as a JSON-able dict; times in ms where the name says so, else in seconds."""
    good = [stream for stream, reason in results if reason is None]
    times = [s.token_times for s in good]
    gaps = [[b - a for a, b in zip(t, t[1:], strict=False)] for t in times]
    return {
        "streams": len(results),
        "ok": len(good),
        "failed": dict(Counter(reason for _, reason in results if reason)),
        "no_progress": sum(1 for s, _ in results if s is None or not s.token_times),
        "events": sum(s.events for s in good),
        "token_events": sum(map(len, times)),
        "characters": quantiles([sum(map(len, s.pieces)) for s in good]),
        "connect_ms": quantiles([s.connected - s.started for s in good], 1000),
        "first_byte_ms": quantiles([s.first_byte - s.started for s in good], 1000),
        "first_token_ms": quantiles([s.token_times[0] - s.started for s in good], 1000),
        "last_token_s": quantiles([s.token_times[-1] - s.started for s in good]),
        "end_s": quantiles([s.ended - s.started for s in good]),
        "gap_ms": quantiles([gap for stream in gaps for gap in stream], 1000),
        "longest_gap_ms": quantiles([max(stream, default=0) for stream in gaps], 1000),
        "wall_s": round(wall, 3),
        "cpu_share": round(cpu / wall, 3),
    }


def arguments():
    """The command line, parsed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--over", type=float, default=0.0, help="start them evenly over so many seconds")
    parser.add_argument("--one-by-one", action="store_true", help="start each when the one before has ended")
    parser.add_argument("--wire", choices=("awschat", "openai"), default="awschat")
    parser.add_argument("--message", default=QUESTION)
    parser.add_argument("--session", help="one session for all (default: a new one for each stream)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds until a stream has failed")
    return parser.parse_args()


def main():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wall, cpu = time.monotonic(), time.process_time()
    results = run(run_all(arguments()))
    json.dump(summary(results, time.monotonic() - wall, time.process_time() - cpu), sys.stdout)
    print()


if __name__ == "__main__":
    main()
