r"""awschat: a chat backend that answers questions about AWS and nothing else.

It streams each answer as server-sent events and keeps every conversation in PostgreSQL.

    python demo.py       everything included: an embedded database and a demo model
    python awschat.py    the service alone; it needs DATABASE_URL, and OPENAI_API_KEY or another provider

    POST   /chat/stream  {message, session_id}       run a turn, stream it (Idempotency-Key: safe to repeat)
    POST   /chat         {message, session_id}       the same turn as one JSON object
    GET    /chat/stream  ?session_id                 watch the running turn from its start, or the last one
    POST   /chat/stop    {session_id}                stop the running turn; what was said is kept
    GET    /chat         ?session_id&before&limit    a session's messages, newest first
    DELETE /chat         ?session_id                 erase a session
    GET    /  /web/  /openapi.yaml  /health  /ready  /metrics

    data: {"type": "token", "content": ...}          the next piece of text; every stream has at least one
    data: {"type": "end", "content": ..., "status"}  the whole reply: complete, refused, stopped or truncated
    data: {"type": "error", "content": ..., "status": "failed"}    `end` or `error` closes every stream

A turn is one question and its answer. It belongs to the server, not to a connection: a task of its own takes
it through these states, and any number of responses watch it. A stop or a failure ends it in any state.

    GUARD --allow--> GENERATE --text ends--> REVIEW --on scope--> DONE
      |                  |                      |
      +----- block ------+--- drifts off -------+-----> REFUSE --> DONE

Three rules of this file:
1. `end` is sent only after the outcome is committed to the database. If it can't be, an `error` says so.
2. Nothing is visible before the question is allowed, then at most ALLOWANCE characters of unproven text.
3. Only a turn's own task, with the reader that it starts, writes the text and decides the outcome of a turn
   that runs. Everybody else watches it, or asks it to stop; what they decide is a snapshot of their own.

Read from top to bottom; what a part uses stands below it. At first skip the fields of Settings (not the
limits after them) and the rules of the guard.
"""

import asyncio
import codecs
import json
import logging
import mimetypes
import os
import re
import secrets
import signal
import sys
import time
import traceback
import unicodedata
from collections.abc import Iterator, Sequence
from configparser import ConfigParser
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import aiohttp
import asyncpg
import httpx2
import hypercorn.asyncio
import openai
import prometheus_client as prometheus
from hypercorn.middleware import ProxyFixMiddleware
from openai.providers import bedrock
from pydantic import BaseModel, BeforeValidator, Field, FilePath, Json, SecretStr, ValidationError
from quart import Quart, Response, g, request
from quart_cors import cors
from werkzeug import exceptions as http

__version__ = "2.0.0"
HERE = Path(__file__).parent
clock = time.monotonic
unavailable = partial(http.ServiceUnavailable, retry_after=2)

# ---- Settings ----

CommaList = BeforeValidator(lambda text: [item.strip() for item in text.split(",") if item.strip()])
KeyList = BeforeValidator(lambda text: dict(item.strip().rpartition(":")[::2] for item in text.split(",")))
BaseUrl = Annotated[
    str, Field(pattern=r"^https?://(\[[0-9a-fA-F:.]+\]|[^\]\[/@:?#\s]+)(:\d{1,5})?([/?]\S*)?$")
]
Name = Annotated[str, Field(min_length=1)]
Key = Annotated[SecretStr, Field(min_length=16)]
Origin = Annotated[str, Field(pattern=r"^(\*|https?://[^/]+)$")]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]
HOSTS = r"((\[[0-9a-fA-F:.]+\]|[^\]\[/@:?#]*)(:\d+)?,?)*"  # of a database; IPv6 stands in brackets


class Settings(BaseModel):
    """The environment variables that awschat reads; an empty one counts as not set."""

    OPENAI_API_KEY: SecretStr = SecretStr("")
    OPENAI_BASE_URL: BaseUrl = ""  # of Ollama, vLLM, Azure, ...
    OPENAI_MODEL: str = "gpt-4.1-mini"  # answers
    BEDROCK_REGION: Annotated[str, Field(pattern=r"^[a-z]+(-[a-z0-9]+)+-\d+$")] = ""  # Amazon Bedrock answers
    GUARD_MODEL: str = ""  # judges where the rules are unsure; empty: OPENAI_MODEL
    MODEL_OPTIONS: Json[dict] = {}  # JSON merged into every request to the provider; null removes a key
    DATABASE_URL: Annotated[str, Field(pattern=rf"^postgres(ql)?://([^/@?#]*@)?{HOSTS}([/?][^#@]*)?$")] = ""
    HOST: str = "127.0.0.1"  # the address to listen on; 0.0.0.0 for all
    PORT: Annotated[int, Field(ge=0, le=65_535)] = 8000
    SYSTEM_PROMPT_FILE: FilePath = HERE / "system_prompt.txt"  # what the answering model is told
    JUDGE_PROMPT_FILE: FilePath = HERE / "judge_prompt.txt"  # what the judging model is told
    AWS_TERMS_FILE: FilePath = HERE / "aws_terms.txt"  # the guard's vocabulary
    REFUSAL: str = "I can only help with Amazon Web Services. Please ask me something about AWS."
    GUARD_FAIL: Literal["closed", "open"] = "closed"  # if the judge fails: closed refuses, open lets pass
    HISTORY_CHARS: Count = 24_000  # how much of the conversation the model is shown
    TURN_SECONDS: Seconds = 180  # the longest that a turn may take
    FIRST_TOKEN_SECONDS: Seconds = 45  # the provider's longest silence before its first text, or verdict
    STALL_SECONDS: Seconds = 20  # its longest silence after that
    GRACE_SECONDS: Seconds = 20  # how long running turns may go on after SIGTERM
    PING_SECONDS: Annotated[Seconds, Field(ge=0.1)] = 4  # the silence after which a stream gets a comment
    MAX_STREAMS: Count = 1000  # running turns; more get 503
    POOL_SIZE: Annotated[int, Field(ge=1, le=1000)] = 10  # database connections
    API_KEYS: Annotated[dict[Name, Key], KeyList] = {}  # name:key,... of the owners
    CORS_ORIGINS: Annotated[tuple[Origin, ...], CommaList] = ()  # whose pages may call; * for every page
    RATE_PER_MINUTE: Count = 0  # turns that an owner (without keys: an address) may start; 0: any number
    TRUSTED_HOPS: Annotated[int, Field(ge=0, le=10)] = 0  # proxies whose X-Forwarded-For is believed
    RETENTION_DAYS: Count = 0  # turns older than this are erased; 0: none


def load_settings() -> Settings:
    """Settings from the environment. A bad value ends the program with a line that names it, no secret."""
    given = {name: os.environ.get(name, "").strip() for name in Settings.model_fields}
    try:
        return Settings(**{name: value for name, value in given.items() if value})
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
        sys.exit(f"{' '.join(map(str, error['loc']))}: {error['msg']}")


settings = load_settings()
LEASE_SECONDS = 10  # without a heartbeat for so long, a turn counts as dead
HEARTBEAT_SECONDS = 1  # how often running turns renew their leases and learn that they shall stop
FLUSH_SECONDS = 0.1  # the rest between two reads of an answer: what comes meanwhile becomes one event
LOOK_SECONDS = min(0.4, settings.PING_SECONDS / 2)  # how often watchers are woken without news
ALLOWANCE = 600  # most characters that are visible beyond the proven text, whatever one read brings
PROOF_CHARS = 300  # so many unproven characters pause the reading until the judge has spoken
REPLY_CHARS = 100_000  # a longer reply is cut, so that no provider can fill the memory
CUT = "\n\n(The answer was cut at the length limit. Ask me to continue.)"


@dataclass
class Service:
    """What this process needs to serve."""

    pool: asyncpg.Pool = None
    provider: openai.AsyncOpenAI = None
    fresh_provider: openai.AsyncOpenAI = None  # the same, with a new connection for each request
    demo: bool = False  # the demo provider answers
    claims: int = 0  # requests whose turn is not in RUNNING yet
    ends_at: float = 0  # set by a signal: no new turns; from this moment on nothing is waited for


service = Service()

# ---- A turn and its task ----

State = Enum("State", "GUARD GENERATE REVIEW REFUSE DONE")


class OffScope(Exception):
    """The last verdict is a block: the turn goes on to REFUSE."""


@dataclass(eq=False)
class Turn:
    """One question and its answer.

    Until the outcome is decided, proven <= len(text) and visible <= min(len(text), proven + ALLOWANCE).
    `closed` is set only after the outcome is committed (or could not be, and says so); then all is visible.
    """

    owner: str  # name of the API key; everyone without keys
    session_id: str
    number: int  # of its row
    question: str = ""
    history: Sequence[tuple[str, str]] = ()  # (question, reply) that the model is shown, oldest first
    text: str = ""  # all that the model has said; in the end followed by the notice, if there is one
    proven: int = 0  # text[:proven] is on scope: AWS terms prove it, or the judge has said so
    visible: int = 0  # watchers may see text[:visible]
    outcome: dict[str, str] = field(default_factory=dict)  # the closing event, once the outcome is decided
    closed: bool = False  # the closing event may be sent
    failure: http.HTTPException | None = None  # why it failed
    verdicts: list["Verdict"] = field(default_factory=list)  # the guard's, in order
    usage: dict[str, int] = field(default_factory=dict)  # tokens, as the provider counted them
    began: float = field(default_factory=clock)
    seconds: dict[str, float] = field(default_factory=dict)  # from the beginning to the first_token; in total
    task: asyncio.Task | None = None  # None: it does not run here, this is a snapshot of its row
    news: asyncio.Event = field(default_factory=asyncio.Event)  # set, and replaced, to have watchers look

    def publish(self) -> None:
        """Show what may be visible by now, until the outcome is decided, and wake the watchers."""
        if not self.outcome:
            self.visible = min(len(self.text), self.proven + ALLOWANCE)
        if self.visible:
            self.seconds.setdefault("first_token", round(clock() - self.began, 4))
        self.news.set()
        self.news = asyncio.Event()

    def decide(self, status: str, notice: str = "") -> None:
        """Decide the outcome, which nobody sees yet. A notice (refusal, failure) follows the visible text."""
        if notice or status == "stopped":
            self.text = "\n\n".join(filter(None, (self.text[: self.visible], notice)))
        kind = "error" if status == "failed" else "end"
        self.outcome = {"type": kind, "content": notice or self.text, "status": status}

    def fail(self, failure: Exception) -> None:
        """Decide that the turn has failed."""
        self.failure = explain(failure)
        self.decide("failed", self.failure.description)

    def close(self) -> None:
        """Let the watchers see everything, the closing event too."""
        self.visible = len(self.text)
        self.closed = True
        self.publish()

    def stop(self) -> None:
        """Ask the task to end the turn, unless the outcome is decided already."""
        if self.task and not self.outcome:
            self.task.cancel()

    def out_of_time(self) -> bool:
        """Whether nothing more may be waited for."""
        return clock() > (service.ends_at or self.began + settings.TURN_SECONDS)


RUNNING: dict[int, Turn] = {}  # the turns whose task runs in this process, by number


async def run(turn: Turn) -> None:
    """The turn's task: take it from state to state, commit the outcome, close it."""
    RUNNING[turn.number] = turn
    state = State.GUARD
    try:
        async with asyncio.timeout(settings.TURN_SECONDS):
            while state is not State.DONE:
                state = await step(turn, state)
    except asyncio.CancelledError:
        turn.decide("stopped", "" if turn.visible else "(Stopped before there was an answer.)")
    except Exception as failure:
        turn.fail(failure)
    while not await settled(turn):
        await asyncio.sleep(0.25)
    turn.close()  # only here, with the commit behind us: rule 1
    del RUNNING[turn.number]
    report(turn)


async def step(turn: Turn, state: State) -> State:
    """Run the step of a state; returns the state that follows. Raises what it raises, except OffScope."""
    try:
        following = await STEPS[state](turn)
    except OffScope:
        following = State.REFUSE
    assert following in TRANSITIONS[state], f"{following} may not follow {state}"
    return following


async def settled(turn: Turn) -> bool:
    """True once the outcome is saved, or can't be and has become a failure. False: try again."""
    try:
        if turn.number not in await save([turn]):
            turn.fail(http.NotFound("This conversation was erased."))
    except Exception as failure:
        if isinstance(failure, http.ServiceUnavailable) and not turn.out_of_time():
            return False
        turn.fail(failure)
    return True


# ---- Watching a turn ----


async def watch(turn: Turn):
    """The turn as server-sent events. A watcher is a place in the text: a slow reader costs no memory."""
    seen, spoke = 0, clock()
    while not turn.closed or seen < turn.visible:
        news = turn.news  # taken before we look, so that no change is missed
        if turn.visible > seen:
            text = json.dumps(turn.text[seen : turn.visible])
            seen, spoke = turn.visible, clock()
            yield f'data: {{"type":"token","content":{text}}}\n\n'
        elif clock() - spoke > settings.PING_SECONDS - LOOK_SECONDS:
            spoke = clock()
            yield ": ping\n"  # one line feed: after a blank line some clients see an empty event
        elif turn.task:
            await news.wait()
        else:  # it runs elsewhere, and this is a snapshot that a newer one replaces
            await asyncio.sleep(LOOK_SECONDS)
            with suppress(http.ServiceUnavailable):
                turn = await find_turn(turn.owner, turn.session_id, turn.number, turn.text)
            if turn.out_of_time() and not turn.closed:  # no newer one comes, or this process ends
                turn.fail(unavailable("The service is interrupted. Please reload in a moment."))
                turn.close()
    yield f"data: {json.dumps(turn.outcome, separators=(',', ':'))}\n\n"


# ---- The steps: each returns the state that follows, or raises OffScope ----


async def guard(turn: Turn) -> State:
    """Judge the question by rules. Where they see no sign of AWS, the judge speaks before the answer."""
    verdict = judge(turn.question, turn.history)
    turn.verdicts.append(verdict)
    if verdict.decision == "block":
        raise OffScope
    if verdict.reason == NO_SIGN:
        await ask_judge(turn, "question")
    return State.GENERATE


async def generate(turn: Turn) -> State:
    """Have the provider answer. If the rules were unsure, nothing is read before the judge has decided."""
    allowed = asyncio.Event()
    reading = asyncio.create_task(read_answer(turn, allowed))
    try:
        if turn.verdicts[-1].decision == "unsure":  # else the rules, or the judge in GUARD, have decided
            await ask_judge(turn, "question")
        allowed.set()
        await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    return State.REVIEW


async def review(turn: Turn) -> State:
    """Have the judge read an answer in which nothing is proven, or too much of the end is not."""
    await prove(turn, complete=True)
    turn.decide("truncated" if turn.text.endswith(CUT) else "complete")
    return State.DONE


async def refuse(turn: Turn) -> State:
    """Make the refusal the reply."""
    turn.decide("refused", settings.REFUSAL)
    return State.DONE


STEPS = {State.GUARD: guard, State.GENERATE: generate, State.REVIEW: review, State.REFUSE: refuse}
TRANSITIONS = {
    State.GUARD: {State.GENERATE, State.REFUSE},
    State.GENERATE: {State.REVIEW, State.REFUSE},
    State.REVIEW: {State.DONE, State.REFUSE},
    State.REFUSE: {State.DONE},
}


async def prove(turn: Turn, complete: bool = False) -> None:
    """Move `proven` along: by AWS terms or, where they leave too much, by the judge. Raises OffScope."""
    turn.proven = proven_end(turn.text, turn.proven, complete)
    if len(turn.text) - turn.proven > PROOF_CHARS or (complete and not turn.proven):
        await ask_judge(turn, "answer")
        turn.proven = len(turn.text)


async def ask_judge(turn: Turn, stage: str) -> None:
    """Have the judge, a small model, decide on the question or the end of the answer. Raises OffScope."""
    fence = f"=== {secrets.token_hex(8)} ==="  # around the data; nobody can guess it
    earlier = [text[:500] for pair in turn.history[-2:] for text in pair]
    answer = ["ANSWER", turn.text[max(0, turn.proven - PROOF_CHARS) :]] if stage == "answer" else []
    data = f"\n{fence}\n".join(["", "EARLIER", *earlier, "QUESTION", turn.question, *answer, ""])
    prompt = JUDGE_PROMPT.replace("{fence}", fence).replace("{stage}", stage.upper())
    try:
        completion = await ask_provider(settings.GUARD_MODEL or settings.OPENAI_MODEL, prompt, data)
        word = word_of(text_of(completion["choices"][0]["message"]["content"]))
        turn.verdicts.append(Verdict(word, "the judge's word", stage))
    except (*PROVIDER_ERRORS, *MALFORMED) as failure:
        decision = "allow" if settings.GUARD_FAIL == "open" else "block"
        turn.verdicts.append(Verdict(decision, f"judge failed: {describe(failure)}", stage))
    if turn.verdicts[-1].decision == "block":
        raise OffScope


# ---- The provider: any server with OpenAI's chat completions ----

SYSTEM_PROMPT = settings.SYSTEM_PROMPT_FILE.read_text(encoding="utf-8")
JUDGE_PROMPT = settings.JUDGE_PROMPT_FILE.read_text(encoding="utf-8")
PROVIDER_ERRORS = (openai.OpenAIError, httpx2.HTTPError, aiohttp.ClientError, OSError)
MALFORMED = (ValueError, LookupError, AttributeError, TypeError, RecursionError)  # from reading its JSON
GOOD_ENDS = {"stop", "eos", "eos_token", "end_turn", "stop_sequence"}  # finish reasons
LENGTH_ENDS = {"length", "max_tokens", "max_length", "model_length"}
THOUGHT_TAGS = ("<think>", "<thinking>", "<reasoning>")
THOUGHT = re.compile(r"\A\s*<(think|thinking|reasoning)>.*?</\1>\s*", re.DOTALL)
FULL_READ = 16 * 1024  # bytes that the transport hands over at most
UTF_16 = partial(codecs.getincrementaldecoder("utf-16-le"), "replace")
EVENT_BYTES = 2_000_000  # what one event, or one thought, may have


def open_provider(keep_seconds: float) -> openai.AsyncOpenAI:
    """The provider's client, which follows no redirect, keeps no cookie and asks no proxy of the host."""
    how = {"follow_redirects": False, "trust_env": False, "event_hooks": {"response": [bound_body]}}
    connections = 2 * settings.MAX_STREAMS + 10
    how["limits"] = httpx2.Limits(max_connections=connections, keepalive_expiry=keep_seconds)
    how["cookies"] = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
    client = openai.DefaultAioHttpClient(**how)
    options = {"http_client": client, "max_retries": 0, "timeout": openai.Timeout(None, connect=10)}
    address, _, query = settings.OPENAI_BASE_URL.partition("?")
    if settings.BEDROCK_REGION:
        provider = bedrock(region=settings.BEDROCK_REGION, base_url=address or None)
        return openai.AsyncOpenAI(provider=provider, **options)
    key = settings.OPENAI_API_KEY.get_secret_value() or "none"
    query = dict(httpx2.QueryParams(query))
    return openai.AsyncOpenAI(api_key=key, base_url=address or None, default_query=query, **options)


async def bound_body(response: httpx2.Response) -> None:
    """Read here, up to a limit, what openai would read whole: an error, or what the judge says."""
    if response.is_success and b'"stream":true' in response.request.content:
        return  # ours only: the quotes of a question are escaped
    body = b""
    async for data in response.stream:
        body += data
        if len(body) > EVENT_BYTES:
            raise httpx2.ReadError("a body without an end")
    response.stream = httpx2.ByteStream(body)


async def ask_provider(model: str, system: str, *texts: str, **options: object) -> object:
    """The completion, or with stream=True its stream; `texts` are the user's and the model's in turns.

    A request that died with a kept connection is sent once more, over a new one. openai calls that a
    time-out, too; the error behind it tells.
    """
    roles = ("system", *("user", "assistant") * len(texts))
    messages = [{"role": role, "content": text} for role, text in zip(roles, (system, *texts), strict=False)]
    body = {"model": model, "messages": messages} | options | settings.MODEL_OPTIONS
    body = {name: value for name, value in body.items() if value is not None}
    how = {"cast_to": object, "stream": "stream" in options, "stream_cls": openai.AsyncStream[object]}
    async with asyncio.timeout(settings.FIRST_TOKEN_SECONDS):
        try:
            return await service.provider.post("/chat/completions", body=body, **how)
        except openai.APIConnectionError as failure:
            if isinstance(failure.__cause__ and failure.__cause__.__cause__, TimeoutError):
                raise  # it really is one, of aiohttp's
        return await service.fresh_provider.post("/chat/completions", body=body, **how)


async def read_answer(turn: Turn, allowed: asyncio.Event) -> None:
    """Ask for the answer and, once that is allowed, read it into turn.text. Only silence is timed."""
    conversation = [text for pair in turn.history for text in pair]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = await ask_provider(settings.OPENAI_MODEL, SYSTEM_PROMPT, *conversation, turn.question, **options)
    decoder = Decoder(turn.usage)
    now = asyncio.get_running_loop().time
    try:
        async with stream, asyncio.timeout(None) as silence:
            await allowed.wait()
            silence.reschedule(now() + decoder.patience())
            async for data in stream.response.aiter_bytes():
                text = decoder.decode(data)
                turn.text = (turn.text + text)[:REPLY_CHARS]
                turn.publish()
                if len(turn.text) == REPLY_CHARS:
                    break
                if len(turn.text) > turn.proven + PROOF_CHARS:
                    silence.reschedule(None)  # the judge has a limit of its own
                    await prove(turn)
                    turn.publish()
                deadline = now() + decoder.patience()  # after the finish reason, only text moves it on
                silence.reschedule(min(deadline, silence.when()) if decoder.finish and not text else deadline)
                if (text or decoder.held) and not decoder.finish:
                    await asyncio.sleep(0 if len(data) >= FULL_READ else FLUSH_SECONDS)
    except PROVIDER_ERRORS:  # a stall, too: TimeoutError is an OSError
        if not decoder.finish:
            raise
    whole = not decoder.finish or decoder.line.rstrip().endswith((b"}", b"]"))
    if whole and len(turn.text) < REPLY_CHARS:
        turn.text = (turn.text + decoder.decode(b"\n"))[:REPLY_CHARS]  # the last line may lack its end
    cut = len(turn.text) >= REPLY_CHARS or decoder.finish in LENGTH_ENDS
    if not cut and decoder.finish not in GOOD_ENDS:
        reason = RuntimeError(f"finish reason {decoder.finish!r}")
        raise unavailable("The answer broke off. Please send the message again.") from reason
    if not turn.text.strip():
        raise unavailable("The model said nothing, or only thinking. Please send the message again.")
    if cut:
        turn.text += CUT


@dataclass
class Decoder:
    """The provider's bytes in, text out. What is incomplete waits inside for the next bytes."""

    usage: dict[str, int]  # is filled in
    line: bytes = b""  # a line whose end has not come yet
    held: str = ""  # the beginning of the answer, while it may be a thought
    begun: bool = False  # the answer has begun; no thought comes any more
    finish: str = ""  # the finish reason, in lower case; `stop` if only [DONE] has come
    halves: codecs.IncrementalDecoder = field(default_factory=UTF_16)  # joins those of an emoji

    def decode(self, data: bytes) -> str:
        """The text that is ready. Raises 503 for what can't be read, openai.APIError for a reported error."""
        *lines, self.line = (self.line + data).split(b"\n")
        try:
            self.held += "".join(map(self.read_line, lines))
        except MALFORMED as nonsense:
            raise unavailable("The model provider sent nonsense. Please try again.") from nonsense
        if len(self.line) + len(self.held) > EVENT_BYTES:
            raise unavailable("The model provider sent something endless. Please try again.")
        if not self.begun:
            self.held = THOUGHT.sub("", self.held).lstrip()
            self.begun = not any(tag.startswith(self.held[: len(tag)]) for tag in THOUGHT_TAGS)
        if not self.begun:
            return ""
        text, self.held = self.held, ""
        text = self.halves.decode(text.encode("utf-16-le", "surrogatepass"))
        return text.replace("\0", "\ufffd")  # which PostgreSQL can't store

    def read_line(self, line: bytes) -> str:
        """The text of a line; comments and the like have none."""
        value = line.removeprefix(codecs.BOM_UTF8).strip()
        if not value.startswith(b"data:") or value == b"data:":
            return ""
        if value.endswith(b"[DONE]"):
            self.finish = self.finish or "stop"
            return ""
        event = json.loads(value[5:].decode(errors="surrogatepass"))
        if event.get("error"):
            raise openai.APIError(json.dumps(event["error"]), httpx2.Request("POST", ""), body=event["error"])
        for name, count in (event.get("usage") or {}).items():
            if name in ("prompt_tokens", "completion_tokens") and type(count) is int and 0 <= count < 2**31:
                self.usage[name] = count
        # The first choice; its index is 0 or missing.
        choice = next((choice for choice in event.get("choices") or () if not choice.get("index")), {})
        self.finish = (choice.get("finish_reason") or self.finish).lower()
        delta = choice.get("delta") or {}
        return text_of(delta.get("content")) + (delta.get("refusal") or "")

    def patience(self) -> float:
        """How many seconds of silence are allowed: some send a finish reason too early, or no end at all."""
        if self.finish:
            return 2
        return settings.STALL_SECONDS if self.begun else settings.FIRST_TOKEN_SECONDS


def text_of(content: str | list | None) -> str:
    """The text of a message's content, which some servers send as a list of typed parts."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if part.get("type") == "text")
    return content or ""


# ---- Guard: rules ----
# A block needs a reason of its own, an allow needs proof, the judging model gets the rest. What holds first:
#   [injection], [other subjects], [other work]    block; but unsure if a name is in the message or before it
#   a name of [subject], and no sentence strays    allow
NO_SIGN = "no sign of the subject"  # the reason of an `unsure` whose answer has to wait for the judging model
VETOES = ("injection", "other subjects", "other work")  # sections of aws_terms.txt, which explains them
NAMES = ("subject", "needs company")  # their terms are names; what matches [shapes] counts as [subject]
MOST_UNKNOWN = 2  # unknown words that a sentence may hold, however many names are in it
GAP_CHARS, OPENING_CHARS = 300, 150  # the longest gap that is proven between two names, and before the first
NEAR_CHARS, CHARS_A_NAME = 900, 250  # the last 900 characters need a different name for each 250 of them
GROW_CHARS = 50  # a term this near the end of an unfinished text may still become another one
# Invisible characters, and what NFKC makes long (\ufdfa) or takes quadratic time for (endless runs of marks).
NOISE = re.compile(r"[\xad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufdfa\ufe00-\ufe0f\ufeff]|[^\w\s]{50,}")
SENTENCE_END = re.compile(r"[!?;。।؟\n]|\.(?![a-z0-9_])")
# A run of Latin letters and digits, one of another alphabet, or a sign of a script without spaces.
WORD = r"[a-z0-9\xdf-\u024f\u1e00-\u1eff]+|[\u0370-\u0dff\u10a0-\u10ff\u1f00-\u1fff]+|[^\W_]"
THOUGHTS = re.compile(r"(?is)\A.*</(think|reason)\w*>|<(think|reason)\w*>.*")


class Verdict(NamedTuple):
    decision: str  # allow | block | unsure
    reason: str  # names at most a term of the vocabulary, never the user's own words
    stage: str = "rules"


def load_terms(path: Path) -> tuple[dict[str, str], str]:
    """{term: section}, and the shapes as one pattern. Ends the program if a term stands in two sections."""
    file = ConfigParser(allow_no_value=True, delimiters=["\0"], strict=False, interpolation=None)
    file.read_string(path.read_text(encoding="utf-8"))
    terms = {"<shape>": "subject"}
    for section in (*NAMES, "filler", *VETOES):
        for item in filter(str.strip, ",".join(file[section]).split(",")):
            words = re.findall(WORD, item)
            for term in (" ".join(words), " ".join(words) + "s", "".join(words)):
                if terms.setdefault(term, section) != section:
                    sys.exit(f"{path}: {term!r} stands in [{terms[term]}] and in [{section}]")
    return terms, "|".join(file["shapes"]) or "(?!)"  # which matches nothing


TERMS, SHAPES = load_terms(settings.AWS_TERMS_FILE)
TOKEN = re.compile(rf"(?=\w)(?P<shape>{SHAPES})|{WORD}")
MOST_WORDS = {tuple(t[:2]): len(t) for t in sorted(map(str.split, TERMS), key=len)}  # by the first two words


def find_terms(text: str, offset: int = 0) -> Iterator[tuple[str, str, int, int]]:
    """Cut lower-case text into (section or "", term, start, end), the longest term at each place."""
    tokens = list(TOKEN.finditer(text))
    words = ["<shape>" if token.lastgroup else token.group() for token in tokens]
    at = 0
    while at < len(words):
        size = min(MOST_WORDS.get(tuple(words[at : at + 2]), 1), len(words) - at)
        while size > 1 and " ".join(words[at : at + size]) not in TERMS:
            size -= 1
        term = " ".join(words[at : at + size])
        yield TERMS.get(term, ""), term, offset + tokens[at].start(), offset + tokens[at + size - 1].end()
        at += size


def survey(text: str) -> tuple[dict[str, str], bool]:
    """{section: its first term}, and whether a sentence strays: more unknown words than different names."""
    text = unicodedata.normalize("NFKC", NOISE.sub("", text)).lower()
    found, strays = {}, False
    for sentence in SENTENCE_END.split(text):
        terms = [(section, term) for section, term, _, _ in find_terms(sentence)]
        names = {term for section, term in terms if section in NAMES}
        strays |= [section for section, _ in terms].count("") > min(len(names), MOST_UNKNOWN)
        found = dict(reversed(terms)) | found  # of each section the first term stays
    return found, strays


def judge(message: str, history: Sequence[tuple[str, str]] = ()) -> Verdict:
    """Decide by the rules above, in time linear in the message. history: (question, reply) pairs."""
    found, strays = survey(message)
    sign = found.get("subject") or found.get("needs company")
    answered = [f"{question}\n{reply[:500]}" for question, reply in history[-3:] if reply != settings.REFUSAL]
    if not sign and any("subject" in survey(turn)[0] for turn in answered):
        sign = "an earlier turn"
    if veto := next((section for section in VETOES if section in found), ""):
        return Verdict("unsure" if sign else "block", f"{veto}: {found[veto]}")
    if "subject" in found and not strays:
        return Verdict("allow", f"names {sign}")
    return Verdict("unsure", f"perhaps: {sign}" if sign else NO_SIGN)


def proven_end(text: str, start: int, complete: bool = False) -> int:
    """How far different names, near each other, prove an answer that is proven or judged up to `start`."""
    begin = max(0, start - NEAR_CHARS - GROW_CHARS)  # no further back: in pieces, too, it takes linear time
    proven, near = start, {}  # near: {name: its end}
    reached = begin - 2  # the end of the last name
    for section, name, first, end in find_terms(text[begin:].replace("İ", "i").lower(), begin):
        if section not in NAMES or (end > len(text) - GROW_CHARS and not complete):
            continue
        if first - max(start, reached) > (GAP_CHARS if start or near else OPENING_CHARS):
            break
        if first > reached + 1:  # else it belongs to the name before it: "AWS Lambda"
            near[name.removesuffix("s")] = end
        near = {name: at for name, at in near.items() if at > end - NEAR_CHARS}
        if end > start and len(near) >= max(2, min(end, NEAR_CHARS) / CHARS_A_NAME):
            proven = end
        reached = end
    return proven


proven_length = partial(proven_end, start=0, complete=True)  # of a whole reply


def word_of(reply: str) -> str:
    """The judging model's word, allow or block, whatever wraps it. Raises ValueError for both or none."""
    (word,) = set(re.findall(r"(?<![a-z])(?<!n.t )(allow|block)(?![a-z])", THOUGHTS.sub("", reply.lower())))
    return word


# ---- The database: the module calls the functions of schema.sql ----

CALLER_FAULTS = {"22", "23", "42", "AW"}  # SQLSTATE classes that the call caused; all others become a 503
FINAL = r"^\w+ (0A|28|3D|42)|authentication failed|no such (user|database)"  # what no waiting mends
SCHEMA = (HERE / "schema.sql").read_text(encoding="utf-8")


async def open_pool() -> None:
    """Set up the pool and try it for at most 3 s. A wrong URL ends the program; a database may come later."""
    options = {"min_size": 0, "max_size": settings.POOL_SIZE, "timeout": 3, "init": apply_schema}
    options["reset"] = lambda connection: asyncio.sleep(0)  # no call leaves anything to undo
    service.pool = await asyncpg.create_pool(settings.DATABASE_URL, **options)
    try:
        await asyncio.wait_for(call("check_writable"), 3)
    except (http.ServiceUnavailable, TimeoutError, asyncpg.PostgresError) as failure:
        problem = describe(failure)
        if re.search(FINAL, problem) or isinstance(failure.__cause__, ValueError | FileNotFoundError):
            sys.exit(f"DATABASE_URL: {problem}")
        log("the database is not ready yet", problem=problem)


async def apply_schema(conn: asyncpg.Connection) -> None:
    """Bring the database to this version, unless it is there: each new connection looks."""
    with suppress(asyncpg.UndefinedTableError):
        if await conn.fetchval("SELECT hash FROM schema_versions WHERE hash = md5($1)", SCHEMA):
            return
    async with conn.transaction():
        await conn.execute("SET LOCAL lock_timeout = '1s'")  # all replicas would wait behind us
        await conn.execute(SCHEMA)
        await conn.execute("INSERT INTO schema_versions VALUES (md5($1)) ON CONFLICT DO NOTHING", SCHEMA)


async def call(function: str, *args: object) -> list[asyncpg.Record]:
    """The rows that an SQL function returns. Raises 503 without a database, else what PostgreSQL raises."""
    marks = ", ".join(f"${n}" for n in range(1, len(args) + 1))
    try:
        connection = await service.pool.acquire(timeout=10)
        try:
            return await connection.fetch(f"SELECT * FROM {function}({marks})", *args, timeout=3)
        finally:
            await service.pool.release(connection, timeout=1)  # a database that hangs would keep us longer
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as failure:
        sqlstate = getattr(failure, "sqlstate", "08")
        if sqlstate == "25006":  # read-only, since a failover: the pool's other connections may be, too
            await service.pool.expire_connections()
        if sqlstate[:2] in CALLER_FAULTS:
            raise
        raise unavailable("The database is away. Please try again soon.") from failure


async def start_turn(owner: str, asked: "Question", key: str | None, bucket: str) -> Turn:
    """Claim the session and start a turn, or find the one that this request repeats. Raises 422, 429, 503."""
    if service.ends_at or len(RUNNING) + service.claims >= settings.MAX_STREAMS:
        raise unavailable("The service is full, or about to restart. Please try again soon.")
    claim = (owner, asked.session_id, asked.message, key)
    limits = (LEASE_SECONDS, settings.HISTORY_CHARS, bucket, settings.RATE_PER_MINUTE)
    service.claims += 1
    try:
        [(number, history, superseded)] = await call("claim_turn", *claim, *limits)
        if superseded in RUNNING:  # elsewhere it stops with its next heartbeat
            RUNNING[superseded].stop()
        if history is None:
            return await find_turn(owner, asked.session_id, number)
        turn = Turn(owner, asked.session_id, number, asked.message, json.loads(history))
        turn.task = asyncio.create_task(run(turn))
        await asyncio.sleep(0)  # a task that is cancelled before its first step would never close the turn
        return turn
    finally:
        service.claims -= 1


async def find_turn(owner: str, session_id: str, number: int | None = None, said: str = "") -> Turn:
    """A turn, by default the newest: itself if it runs here, else a snapshot, whose notice follows `said`.

    A row whose process let the lease run out reads as failed: that is a rule of schema.sql.
    """
    [(number, status, reply, notice)] = await call("find_turn", owner, session_id, number)
    if number in RUNNING:
        return RUNNING[number]
    text = reply or said
    turn = Turn(owner, session_id, number, text=text, proven=len(text), visible=len(text))
    if status != "running":
        turn.decide(status, notice)
        turn.close()
    return turn


async def save(turns: list[Turn]) -> dict[int, bool]:
    """Save texts, outcomes and leases: {number: whether it may go on}, without those whose rows are gone."""
    rows = []
    for turn in turns:
        said = turn.text[: turn.visible]
        rows.append((turn.owner, turn.session_id, turn.number, said, turn.outcome, turn.verdicts, turn.usage))
    return dict(await call("save_turns", LEASE_SECONDS, settings.OPENAI_MODEL, json.dumps(rows)))


async def heartbeat() -> None:
    """Save all turns that run here. Those that were asked to stop, or whose row is gone, stop."""
    turns = list(RUNNING.values())
    going_on = await save(turns) if turns else {}
    for turn in turns:
        if not going_on.get(turn.number):
            turn.stop()


async def wake_watchers() -> None:
    """Have all watchers look up, for their pings: one timer for them all."""
    for turn in RUNNING.values():
        turn.publish()


# ---- HTTP ----

app = Quart(__name__, static_folder="web", static_url_path="/web")
app.config.update(MAX_CONTENT_LENGTH=2**16, BODY_TIMEOUT=10, RESPONSE_TIMEOUT=settings.TURN_SECONDS + 60)
app.config.update(BACKGROUND_TASK_SHUTDOWN_TIMEOUT=0.1)  # the jobs of serve() never end
KEYLESS = {"page", "contract", "static", "health", "get_ready"}  # endpoints that need no key
POLICY = "default-src 'none'; connect-src 'self'; img-src 'self' data:; script-src 'self'; style-src 'self'; "
POLICY += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}
HEADERS |= {"X-Content-Type-Options": "nosniff"}
STORABLE = r"^[^\x00]*$"  # PostgreSQL can hold no NUL
# No proxy buffers a stream. Its connection ends with it: Hypercorn would keep one whose client has gone.
STREAM_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no", "Connection": "close"}


class Session(BaseModel):
    session_id: Annotated[str, Field(min_length=1, max_length=128, pattern=STORABLE)]


class Page(Session):
    before: Annotated[int, Field(gt=0, le=2**62)] = 2**62
    limit: Annotated[int, Field(gt=0, le=200)] = 50


class Question(Session):
    message: Annotated[str, Field(min_length=1, max_length=4000, pattern=STORABLE)]


async def read_request(model: type[Session] = Session) -> Session:
    """What the JSON of a POST, or else the query, holds. Raises 415, ValidationError."""
    if request.method != "POST":
        return model.model_validate(request.args.to_dict())
    if not request.is_json:
        raise http.UnsupportedMediaType("Send JSON, with the header Content-Type: application/json.")
    return model.model_validate_json(await request.get_data())


@app.before_request
async def authenticate() -> None:
    """Set g.owner to the name of the request's key; without keys all is everyone's. Raises 401."""
    given = request.headers.get("Authorization", "").partition(" ")[2].strip().encode()
    keys = {name: key.get_secret_value().encode() for name, key in settings.API_KEYS.items()}
    owners = [name for name, key in keys.items() if secrets.compare_digest(key, given)]
    if keys and not owners and request.endpoint not in KEYLESS and request.method != "OPTIONS":
        raise http.Unauthorized("Send a valid key, with the header Authorization: Bearer <key>.")
    g.owner = owners[0] if owners else "everyone"


@app.post("/chat")
@app.post("/chat/stream")
async def post_chat():
    asked = await read_request(Question)
    key = request.headers.get("Idempotency-Key")
    bucket = g.owner if settings.API_KEYS else str(request.remote_addr)[:100]
    claim = asyncio.create_task(start_turn(g.owner, asked, key, bucket))
    claim.add_done_callback(lambda done: done.exception())  # retrieved, even if the client has gone
    turn = await asyncio.shield(claim)  # what is claimed must run, whether or not its client has gone
    return stream(turn) if request.path == "/chat/stream" else await closing_json(turn)


@app.get("/chat/stream")
async def get_stream():
    asked = await read_request()
    return stream(await find_turn(g.owner, asked.session_id))


@app.post("/chat/stop")
async def post_stop():
    asked = await read_request()
    [(number,)] = await call("stop_turn", g.owner, asked.session_id)
    turn = await find_turn(g.owner, asked.session_id, number)
    turn.stop()  # elsewhere it stops with its next heartbeat
    return await closing_json(turn)


@app.get("/chat")
async def get_chat():
    asked = await read_request(Page)
    [(page,)] = await call("read_messages", g.owner, asked.session_id, asked.before, asked.limit)
    return Response(page, content_type="application/json", headers={"Cache-Control": "no-store"})


@app.delete("/chat")
async def delete_chat():
    asked = await read_request()
    for (number,) in await call("erase_session", g.owner, asked.session_id):
        if number in RUNNING:
            RUNNING[number].stop()
    return "", 204


@app.get("/ready")
async def get_ready():
    missing = ["draining"] if service.ends_at else []
    try:
        await call("check_writable")
    except (http.ServiceUnavailable, asyncpg.PostgresError):
        missing.append("database")
    state = {"status": "unready" if missing else "ready", "version": __version__, "demo": service.demo}
    return state | {"missing": missing}, 503 if missing else 200


@app.get("/metrics")
async def get_metrics():
    return Response(prometheus.generate_latest(), content_type=prometheus.CONTENT_TYPE_LATEST)


mimetypes.add_type("application/yaml", ".yaml")
app.add_url_rule("/health", "health", lambda: {"status": "healthy"})
app.add_url_rule("/", "page", partial(app.send_static_file, "index.html"))
app.add_url_rule("/openapi.yaml", "contract", partial(app.send_static_file, "openapi.yaml"))


def stream(turn: Turn) -> Response:
    """The response that watches a turn."""
    headers = STREAM_HEADERS | {"Turn-Number": turn.number}
    return Response(watch(turn), mimetype="text/event-stream", headers=headers)


async def closing_json(turn: Turn) -> tuple[dict, int, dict]:
    """The closing event, once it has come, as a JSON response."""
    async for event in watch(turn):
        last = event
    closing = json.loads(last.removeprefix("data:"))
    closing["reply"] = closing["content"]
    headers = {"Turn-Number": turn.number}
    if closing["type"] == "end":
        return closing, 200, headers
    return closing, 503, headers | {"Retry-After": getattr(turn.failure, "retry_after", 2)}


@app.after_request
async def add_headers(response: Response) -> Response:
    response.headers.update(HEADERS)
    return response


@app.errorhandler(Exception)
async def on_error(failure: Exception):
    """What goes wrong before the first event is a status with the error body."""
    error = explain(failure)
    if error.code in (429, 503):
        log("refused a request", status=error.code, problem=describe(error))
        REFUSED.labels(error.code).inc()
    headers = dict(error.get_headers()) | {"Content-Type": "application/json"}
    headers |= {"WWW-Authenticate": "Bearer"} if error.code == 401 else {}
    return {"type": "error", "content": error.description}, error.code, headers


app = cors(app, allow_origin=settings.CORS_ORIGINS, expose_headers=("Retry-After", "Turn-Number"))


async def app_with_path(scope: dict, receive: object, send: object) -> None:
    """The app, which fails on a target that does not begin with a path: `?x`, or half an IPv6 address."""
    scope["path"] = re.sub(r"^(\w+://[^/]*)?/?", "/", scope.get("path", ""))
    await app(scope, receive, send)


# What a provider's error, as "status description", means for people: the first pattern that fits.
PROVIDER_ERROR_TEXTS = {
    "^413|context.?(length|window|size)|(?<!took )too long|max_length": "It is too long. Please shorten it.",
    "quota|billing|credential|^(3|40[0-7]|41|42[0-8])": "The provider refuses us. Please tell the operator.",
    "^429|rate.?limit": "The model provider is busy. Please try again in {} s.",
    "": "The model provider has a problem, or takes too long. Please try again soon.",
}


def explain(failure: Exception) -> http.HTTPException:
    """The HTTP error, with a text for people, for an exception. A bug leaves its traceback in the log."""
    match failure:
        case http.HTTPException():
            return failure
        case ValidationError():
            detail = failure.errors(include_input=False, include_url=False)[0]
            kind = http.BadRequest if detail["type"] == "json_invalid" else http.UnprocessableEntity
            error = kind(": ".join([*map(str, detail["loc"]), detail["msg"]]))
        case asyncpg.PostgresError() if failure.sqlstate.startswith("AW"):  # schema.sql refuses
            error = http.default_exceptions[int(failure.sqlstate[2:])](failure.args[0])
            error.retry_after = failure.detail
        case TimeoutError() | openai.OpenAIError() | httpx2.HTTPError() | aiohttp.ClientError() | OSError():
            said = f"{getattr(failure, 'status_code', '')} {describe(failure)}".lower()
            text = next(text for words, text in PROVIDER_ERROR_TEXTS.items() if re.search(words, said))
            wait = getattr(failure, "response", httpx2.Response(0)).headers.get("Retry-After", "")
            wait = int(wait) if re.fullmatch("[0-9]{1,3}", wait) else 30
            error = unavailable(text.format(wait), retry_after=wait)
        case _:
            log("a bug", problem=describe(failure), where=traceback.format_tb(failure.__traceback__)[-5:])
            error = http.InternalServerError("Something went wrong here. Please try again.")
    error.__cause__ = failure
    return error


# ---- The log and the metrics ----

TURNS = prometheus.Counter("awschat_turns", "Turns by how they ended", ["status"])
FAILURES = prometheus.Counter("awschat_failures", "Failed turns by the kind of failure", ["kind"])
REFUSED = prometheus.Counter("awschat_refused_requests", "Requests that were turned away", ["status"])
VERDICTS = prometheus.Counter("awschat_verdicts", "Verdicts of the guard", ["stage", "decision"])
TOKENS = prometheus.Counter("awschat_tokens", "Tokens as the provider counted them", ["direction"])
SECONDS = prometheus.Histogram("awschat_seconds", "Of a turn", ["to"], buckets=(0.1, 0.3, 1, 3, 10, 30, 100))
DROPPED = prometheus.Counter("awschat_log_lines_dropped", "Log lines that nobody read in time")
prometheus.Gauge("awschat_running", "Running turns").set_function(lambda: len(RUNNING))
SECRET = re.compile(r"\w+://\S+|\b(sk|key|bearer)[-_ =]\S+|(token|signature)['\"]?[:=]\s*\S+", re.IGNORECASE)


def log(message: str, **fields: object) -> None:
    """One line on stdout: JSON, or text on a terminal. It is dropped if the pipe is full."""
    fields = {"message": message, "time": round(time.time(), 3)} | fields
    readable = (f"{name}={json.dumps(value)}" for name, value in fields.items())
    line = " ".join(readable) if sys.stdout.isatty() else json.dumps(fields)
    try:
        os.write(1, f"{line}\n".encode())
    except OSError:
        DROPPED.inc()


def describe(failure: BaseException) -> str:
    """Why something failed, for the operator: kind, status, code and message of its root; no key, no URL."""
    while failure.__cause__ and not isinstance(failure, TimeoutError):
        failure = failure.__cause__
    facts = [getattr(failure, name, "") for name in ("status_code", "sqlstate", "code", "type")]
    words = " ".join([type(failure).__name__, *map(str, filter(None, facts)), str(failure)])
    words = words.replace(settings.OPENAI_API_KEY.get_secret_value() or "\0", "***")
    return SECRET.sub("***", words[:1000])[:300].replace("\0", "").encode(errors="replace").decode()


def report(turn: Turn) -> None:
    """Count and log a turn that has ended, without a word that was said in it."""
    turn.seconds["total"] = round(clock() - turn.began, 4)
    status = turn.outcome["status"]
    TURNS.labels(status).inc()
    problem = describe(turn.failure) if turn.failure else ""
    if turn.failure:
        FAILURES.labels(problem.partition(" ")[0]).inc()
    for verdict in turn.verdicts:
        VERDICTS.labels(verdict.stage, verdict.decision).inc()
    for direction in ("prompt", "completion"):
        TOKENS.labels(direction).inc(turn.usage.get(f"{direction}_tokens", 0))
    for moment, seconds in turn.seconds.items():
        SECONDS.labels(moment).observe(seconds)
    facts = {name: getattr(turn, name) for name in ("number", "session_id", "owner", "usage", "seconds")}
    log("turn", status=status, problem=problem, verdicts=turn.verdicts[-3:], **facts)


# ---- Main ----

GONE = {"ON_DISCONNECT": "/chat/stop", "STATEMENT_CACHE": "PgBouncer 1.21", "TRUSTED_PROXIES": "TRUSTED_HOPS"}


async def repeat(seconds: float, job: object, *args: object) -> None:
    """Do a job time and again. What it raises is logged, at first and then once a minute."""
    silent_until = 0.0
    while True:
        await asyncio.sleep(seconds)
        try:
            await job(*args)
        except Exception as failure:
            if clock() > silent_until:
                silent_until = clock() + 60
                log("something fails again and again", problem=describe(failure))


def on_lost_error(loop: asyncio.AbstractEventLoop, context: dict) -> None:
    """Log what Hypercorn lets go, as when data follows the offer of a WebSocket."""
    problem = describe(context.get("exception") or Exception(context["message"]))
    log("an error of a connection", problem=problem)


def on_signal(number: int, frame: object) -> None:
    """From now on no new turns; running ones get GRACE_SECONDS. A second signal ends the process at once."""
    service.ends_at = clock() + settings.GRACE_SECONDS
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_DFL)


async def drained() -> None:
    """Wait for a signal, then until all turns are saved and closed; after the grace they are stopped."""
    keys = "set" if settings.API_KEYS else "NONE: whoever reaches this address may use it"
    address = f"http://{settings.HOST}:{settings.PORT}"
    log("serving", address=address, version=__version__, demo=service.demo, API_KEYS=keys)
    while not service.ends_at or RUNNING or service.claims:
        await asyncio.sleep(0.2)
        if service.ends_at and clock() > service.ends_at:
            for turn in list(RUNNING.values()):
                turn.stop()
    service.ends_at = clock()
    await asyncio.sleep(LOOK_SECONDS + 0.2)  # in which watchers of other replicas' turns learn of the end
    asyncio.get_running_loop().call_later(3, os._exit, 0)  # ends the wait for clients that do not read


async def serve(demo: bool) -> None:
    """Serve until SIGTERM or SIGINT."""
    service.demo = demo
    service.provider = open_provider(keep_seconds=4)  # less than the 5 s after which many servers hang up
    service.fresh_provider = open_provider(keep_seconds=0)
    await open_pool()
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    app.add_background_task(repeat, HEARTBEAT_SECONDS, heartbeat)
    app.add_background_task(repeat, LOOK_SECONDS, wake_watchers)
    app.add_background_task(repeat, 10, call, "tidy_up", settings.RETENTION_DAYS)
    address = f"{settings.HOST}:{settings.PORT}"
    options = {"bind": address, "backlog": 4096, "errorlog": logging.getLogger("hypercorn")}
    options |= {"include_server_header": False, "keep_alive_timeout": 75}  # above the 60 s of load balancers
    config = hypercorn.Config.from_mapping(options)
    served = app_with_path
    if settings.TRUSTED_HOPS:
        served = ProxyFixMiddleware(served, trusted_hops=settings.TRUSTED_HOPS)
    asyncio.get_running_loop().set_exception_handler(on_lost_error)
    try:
        async with service.provider, service.fresh_provider:
            await hypercorn.asyncio.serve(served, config, shutdown_trigger=drained)
    except OSError as failure:
        sys.exit(f"HOST {settings.HOST}, PORT {settings.PORT}: {failure}")


def main(demo: bool = False) -> None:
    """Run the service until it is told to end."""
    if not settings.DATABASE_URL:
        sys.exit("DATABASE_URL is missing. Set it, or run the demo: python demo.py")
    given = settings.model_fields_set
    if not given & {"OPENAI_API_KEY", "OPENAI_BASE_URL", "BEDROCK_REGION"}:
        sys.exit("Set OPENAI_API_KEY, OPENAI_BASE_URL or BEDROCK_REGION, or run the demo: python demo.py")
    if "BEDROCK_REGION" in given and ("OPENAI_API_KEY" in given or "OPENAI_MODEL" not in given):
        sys.exit("BEDROCK_REGION works with AWS credentials: unset OPENAI_API_KEY, and set OPENAI_MODEL.")
    if os.name == "posix" and not sys.stdout.isatty():
        os.set_blocking(1, False)  # a full pipe raises, instead of stopping all turns
    for name in GONE.keys() & os.environ.keys():
        log(f"{name} is no setting any more; use {GONE[name]}")
    try:
        from uvloop import run as run_loop
    except ImportError:  # not on Windows
        from asyncio import run as run_loop
    run_loop(serve(demo))


if __name__ == "__main__":
    main()
