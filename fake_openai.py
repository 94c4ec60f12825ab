"""A stand-in for an OpenAI-compatible provider: the real wire format, canned answers, no model.

    python fake_openai.py --port 8099              the demo: a few true sentences on an AWS question
    python fake_openai.py --port 0 --scripted      for tests: obeys directives; prints its base URL
    python fake_openai.py --first 0.3 --interval 0.03 --tokens 100          fixed answers, for measuring
    fake = await fake_openai.start(scripted=True)  the same in this loop: fake.base_url, await fake.close()

Routes: POST /v1/chat/completions (streamed or not), GET /v1/models; for tests GET /stats (counts and the last
50 calls, times as time.monotonic()), GET /requests (those calls with their messages), POST /stats/reset.

A call that is not streamed and whose system message says "ALLOW or BLOCK" is a judge call, answered with that
one word. It judges what follows a line with nothing but QUESTION or ANSWER (`## Answer`, `<answer>`) in it.

Scripted, `#fake(key=value, key="quoted value")` in the last user message steers the call (the last counts):

    first= interval=           seconds to the first token (0.01), from token to token and to the end (0.002)
    tokens= size= burst=       how many (40), of how many characters (4), how many in one write (1)
    answer="..." length=       this very text; AWS text of so many characters
    drift=k paragraph=1        k characters on AWS, then on baking up to length= (k+1500); in a new paragraph
    leak=                      the system prompt: 1 (verbatim), upper, list, code, middle (of AWS text)
    usage=0                    no usage chunk, even if asked for one
    judge= judge_answer=       verdict or any word, on a question (ALLOW), an answer (auto: BLOCK if baking)
    judge_delay= judge_fault=  seconds (0); a fault before the answer, broken_json, empty, garbage or refuse
    fault= after= fault_once=1 a fault; those in the middle after so many tokens (3); once for this very text
    retry_after=               seconds, with http429 and http503 (1)

Faults before the answer: http401 and any other status, hang (no headers ever), reset_before, html. In the
middle: reset (RST), cut (FIN inside the chunked body), eof (a whole body, but no finish_reason, no [DONE]),
error_event, stall, broken_json (one bad event, then a good end), content_filter. At the end: no_done, empty,
length, tools. Valid, must work: role_only (first chunk at once), comment (OpenRouter), no_choices (Azure's
first chunk), crlf, unicode (unescaped), split (unicode, a byte a write). Unstreamed, the middle breaks
before.
"""

import argparse
import asyncio
import collections
import contextlib
import functools
import itertools
import json
import math
import re
import signal
import socket
import struct
import time
from http import HTTPStatus
from types import SimpleNamespace

# ---- What it says ----

# Pattern in the question => answer. Every sentence names something of AWS, so a guard need not hold it back.
TOPICS = r"""
s3|buckets?|glacier => **Amazon S3** stores objects in buckets, designed for eleven nines of durability. New
  S3 buckets block public access by default. S3 Lifecycle rules move cold objects to S3 Glacier.
lambdas?|serverless => **AWS Lambda** runs a function for up to 15 minutes. A Lambda function's share of the
  CPU grows with its memory. Provisioned concurrency spares AWS Lambda its cold starts.
ec2|instances?|amis?|spot => **Amazon EC2** rents virtual machines that boot from an AMI. EC2 Spot Instances
  cost far less, but AWS takes them back with two minutes' notice. Savings Plans suit steady EC2 use.
dynamodb|nosql => **Amazon DynamoDB** finds an item by its partition key and optional sort key. A DynamoDB
  item holds at most 400 KB. DynamoDB on-demand capacity suits traffic that nobody can predict.
rds|multi-az|mysql|postgres(ql)? => **Amazon RDS** runs PostgreSQL, MySQL, MariaDB, Oracle, SQL Server and
  Db2. RDS Multi-AZ is for failover, RDS read replicas scale reading. RDS keeps backups up to 35 days.
aurora => **Amazon Aurora** speaks MySQL or PostgreSQL and keeps six copies of the data over three
  Availability Zones. An Aurora cluster has up to 15 Aurora Replicas, each able to take over as the writer.
vpcs?|subnets?|nat|security groups? => **Amazon VPC** is your own network in an AWS Region. VPC security
  groups are stateful, VPC network ACLs are not. A gateway endpoint reaches S3 without a NAT gateway.
iam|roles?|polic(y|ies)|permissions? => **AWS IAM** denies what no policy allows, and an explicit deny in an
  IAM policy always wins. IAM roles give temporary credentials; prefer them to access keys of IAM users.
cloudfront|cdn => **Amazon CloudFront** serves content from edge locations near the reader. With origin access
  control an S3 bucket answers CloudFront alone. A certificate for CloudFront must be in us-east-1.
route ?53|dns|domains? => **Amazon Route 53** is the DNS service of AWS. An alias record of Route 53 points
  the apex of a zone at a load balancer or a CloudFront distribution.
ecs|fargate|containers?|docker => **Amazon ECS** runs containers as tasks and services. With AWS Fargate no
  EC2 instance needs care: each ECS task pays for the vCPU and memory that it asks for.
eks|kubernetes|k8s => **Amazon EKS** runs the Kubernetes control plane over several Availability Zones. Pods
  on EKS get AWS permissions through EKS Pod Identity or IAM roles for service accounts.
[ean]lb|load balanc(er|ers|ing) => **Elastic Load Balancing** has the Application Load Balancer for HTTP and
  the Network Load Balancer for TCP and UDP. An ALB routes by host and path to EC2, ECS or Lambda.
auto ?scaling|scal(e|ing) => **Amazon EC2 Auto Scaling** keeps as many EC2 instances as the load needs. Target
  tracking holds a CloudWatch metric, such as average CPU, near a value that you choose.
ebs|efs|volumes?|file systems? => **Amazon EBS** volumes are disks for EC2 instances in one Availability Zone.
  Amazon EFS is a shared NFS file system that EC2, ECS and Lambda can mount in several zones.
sqs|queues?|dead.letter => **Amazon SQS** standard queues deliver at least once; SQS FIFO queues keep the
  order. What fails again and again belongs in an SQS dead-letter queue.
sns|notifications?|fan.?out => **Amazon SNS** pushes one message to many subscribers, such as SQS queues and
  Lambda functions. SNS filter policies spare a subscriber what it does not need.
eventbridge|event.driven|cron => **Amazon EventBridge** routes events by rules to AWS targets such as Lambda.
  Amazon EventBridge Scheduler starts them at a time or by a cron expression.
step functions?|workflows? => **AWS Step Functions** runs state machines. A Standard workflow of AWS Step
  Functions can take a year, an Express one five minutes.
api gateway|rest apis?|websockets? => **Amazon API Gateway** puts REST, HTTP and WebSocket APIs before AWS
  Lambda and others. HTTP APIs of API Gateway cost less than REST APIs and do less.
cloudwatch|logs?|metrics?|alarms? => **Amazon CloudWatch** keeps metrics, logs and alarms. Set a retention on
  every CloudWatch log group: by default CloudWatch keeps logs for ever.
cloudtrail|audit\w* => **AWS CloudTrail** records who called which AWS API. CloudTrail's event history shows
  90 days of management events; a CloudTrail trail to an S3 bucket keeps more.
cloudformation|cdk|stacks? => **AWS CloudFormation** creates a stack of AWS resources from a template and
  rolls back on failure. The AWS CDK writes CloudFormation templates from Python, TypeScript and others.
kms|secrets?|encrypt\w* => **AWS KMS** keeps the keys that S3, EBS and RDS encrypt with. AWS Secrets Manager
  stores passwords and can rotate those of Amazon RDS.
athena|glue|redshift|analytics => **Amazon Athena** runs SQL over files in S3, whose tables the AWS Glue Data
  Catalog describes. Amazon Redshift is the data warehouse of AWS.
bedrock|sagemaker => **Amazon Bedrock** offers foundation models of several companies behind one API. Amazon
  SageMaker AI trains and hosts models of your own.
costs?|pric\w+|billing|budgets? => **AWS Budgets** warns before spending passes a limit. AWS Cost Explorer
  shows which AWS service, Region or cost allocation tag the money went to.
"""
TOPICS = {
    re.compile(rf"(?i)(?<![a-z0-9])({pattern})(?![a-z0-9])"): text.replace("\n ", "")
    for pattern, text in re.findall(r"(?m)^(\S.*?) => (.+(?:\n  .+)*)", TOPICS)
}
DEMO_NOTE = "*AWS demo model: a canned answer, no language model is connected (set `OPENAI_API_KEY`).*"
GENERAL = """**AWS Well-Architected** rests on six pillars: operational excellence, security, reliability,
 performance efficiency, cost optimization and sustainability. Give people and AWS workloads IAM roles with
 least privilege. Let Amazon CloudWatch and AWS CloudTrail show what happens.""".replace("\n", "")
ON_SCOPE = "\n\n".join(TOPICS.values()) + "\n\n"
OFF_SCOPE_MARK = "dough"  # in every off-scope sentence, and nowhere else
OFF_SCOPE = """Bread dough wants flour, water, salt and patience. Knead the dough until it feels smooth and
 silky. Let the dough rise in a warm corner of the kitchen for two hours. Fold the dough gently, so that it
 keeps its bubbles. Wet dough sticks to your fingers, so flour your hands. A round of dough goes into a very
 hot oven. Once the dough sounds hollow, the loaf is ready for butter. """.replace("\n", "")
UNICODE = "Amazon S3 ☃ für große Daten:\u2028S3は安全です 🚀👩\u200d💻 아마존, «خدمة S3» \ufeff\u2029."
TECHNICAL = re.compile(
    r"""(?ix) aws | amazon | cloud | server | deploy | docker | container | kubernetes | linux | network |
    \b(sql|api|vm|dns|ip|tcp|http|ssh|tls|cpu|disk|json|yaml|git|log|port|node|cluster|python)s?\b | subnet |
    \b(arn|iam|ami|sns|sqs|ssm|alb|ebs|efs|kms|vpc)s?\b | instance | storage |
    encrypt | backup | replica | latency | terraform | scaling | firewall | database"""
)


def demo_answer(question):
    """Markdown on up to three topics that the question names; always says that it is a demo."""
    known = [text for pattern, text in TOPICS.items() if pattern.search(question)]
    return "\n\n".join([DEMO_NOTE, *(known[:3] or [GENERAL])])


def on_scope(length):
    """AWS text of exactly `length` characters."""
    return (ON_SCOPE * (length // len(ON_SCOPE) + 1))[:length]


def drifting(k, length, paragraph=False):
    """`length` characters: `k` about AWS, the rest about bread."""
    gap = "" if not k else "\n\n" if paragraph else " "
    return (on_scope(k) + gap + OFF_SCOPE * (length // len(OFF_SCOPE) + 1))[:length]


def leaking(how, prompt):
    """The system prompt, told in one of five ways."""
    bullets = "\n".join(f"- {line}" for line in prompt.splitlines() if line.strip())
    middle = f"{on_scope(400)}\n\n{prompt}\n\n{on_scope(200)}"
    ways = {"upper": prompt.upper(), "list": bullets, "code": f"```text\n{prompt}\n```\n", "middle": middle}
    return ways.get(how, prompt)


# ---- Directives ----

# fmt: off
DEFAULTS = {
    "first": 0.01, "interval": 0.002, "tokens": 40, "size": 4, "burst": 1, "usage": 1,
    "answer": "", "length": 0, "drift": -1, "paragraph": 0, "leak": "",
    "judge": "ALLOW", "judge_answer": "auto", "judge_delay": 0.0, "judge_fault": "",
    "fault": "", "after": 3, "fault_once": 0, "retry_after": 1,
}
# fmt: on
DEMO_PACE = {"first": 0.15, "interval": 0.02, "judge_delay": 0.1}
BEFORE = {"reset_before", "html"} | {f"http{status}" for status in HTTPStatus if status >= 400}
BROKEN = {"reset", "cut", "eof", "error_event", "stall"}  # in the middle, with nothing after it
ODD = {"hang", "broken_json", "content_filter", "no_done", "empty", "length", "tools", "garbage", "refuse"}
VALID = {"", "role_only", "comment", "no_choices", "crlf", "unicode", "split"}
DIRECTIVE = re.compile(r'#fake\(((?:[^()"]|"(?:[^"\\]|\\.)*")*)\)')
PAIR = re.compile(r'\s*(\w+)\s*=\s*("(?:[^"\\]|\\.)*"|[^\s,"]+)\s*(?:,|$)')
LABEL = re.compile(r"(?im)^[^\w\n/]*(question|answer)[^\w\n]*$")


class BadRequest(Exception):
    """The client's mistake; becomes a 400."""


def directive(text):
    """The last `#fake(...)` of a text as {key: value}."""
    found = DIRECTIVE.findall(text) or [""]
    try:
        said = {
            key: type(DEFAULTS[key])(json.loads(value, strict=False) if value[0] == '"' else value)
            for key, value in PAIR.findall(found[-1])
        }
    except (KeyError, ValueError) as error:
        raise BadRequest(f"directive with an unknown key or a bad value: {error}") from error
    known = {said.get("fault", ""), said.get("judge_fault", "")} <= BEFORE | BROKEN | ODD | VALID
    if PAIR.sub("", found[-1]).strip() or not known or min(said.get("burst", 1), said.get("size", 1)) < 1:
        raise BadRequest(f"directive not understood: {found[-1]}")
    return said


def answer_text(o, system):
    """The text that a scripted call is answered with."""
    if o.answer or o.fault in ("empty", "tools"):
        return o.answer
    if o.leak:
        return leaking(o.leak, system)
    if o.drift >= 0:
        return drifting(o.drift, o.length or o.drift + 1500, o.paragraph)
    return UNICODE if o.fault in ("unicode", "split") else on_scope(o.length or o.tokens * o.size)


def judge_text(o, text, demo):
    """What the judge says to its user message; the demo allows what looks technical."""
    ends = {label[1].lower(): label.end() for label in LABEL.finditer(text)}
    judged = text[max(ends.values(), default=0) :]
    if demo:
        return "ALLOW" if TECHNICAL.search(judged) else "BLOCK"
    if "answer" not in ends:
        return o.judge
    drifted = OFF_SCOPE_MARK in judged.lower()
    return o.judge_answer if o.judge_answer != "auto" else "BLOCK" if drifted else "ALLOW"


# ---- Chat completions ----

STREAM_HEAD = """HTTP/1.1 200 OK\r
Content-Type: text/event-stream; charset=utf-8\r
Transfer-Encoding: chunked\r
Connection: {}\r\n\r\n"""
LAST_CHUNK = b"0\r\n\r\n"
# Real providers put part of the key and host names into their errors; none of it may reach a user.
SECRET = "key sk-fa****ke at fake-host.internal"
CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}
FINISH = {"tools": "tool_calls", "length": "length", "content_filter": "content_filter"}
TOOL = {"index": 0, "id": "call_fake", "type": "function", "function": {"name": "lookup", "arguments": "{}"}}
GARBAGE = "On the one hand ALLOW, on the other hand: who am I to BLOCK?"


def dumps(value):
    """Compact JSON as bytes; nothing escaped that need not be."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def frame(data):
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


@functools.lru_cache(maxsize=16)
def tokens_of(text, size):
    """The text's tokens, each as a JSON string."""
    return [dumps(text[at : at + size]) for at in range(0, len(text), size)]


def text_of(message):
    """The text of a chat message, whose content may be a string, parts or nothing."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class Chat:
    """One chat completion.

    Its script is a generator that writes, then yields the loop time at which to go on (None: never). That
    costs a fraction of what a task does, and whoever drops the generator has stopped it.
    """

    ids = itertools.count(1)

    def __init__(self, connection, body):
        """Take a request's body; BadRequest for what the real API refuses, too."""
        self.connection, self.fake = connection, connection.fake
        try:
            body = json.loads(body)
            self.model, messages, self.stream = body["model"], body["messages"], bool(body.get("stream"))
            self.usage_wanted = bool((body.get("stream_options") or {}).get("include_usage"))
            self.system = "\n".join(text_of(m) for m in messages if m["role"] in ("system", "developer"))
            self.question = [text_of(m) for m in messages if m["role"] == "user"][-1]
            self.model.encode()
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"We could not parse the JSON body of your request: {error}") from error
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            raise BadRequest(f"Missing or wrong model, messages or user message: {error!r}") from error
        self.kind = "judge" if not self.stream and "ALLOW or BLOCK" in self.system else "generate"
        self.prepare()
        name = f"chatcmpl-fake{next(self.ids):08d}"
        self.envelope = {"id": name, "created": int(time.time()), "model": self.model}
        self.log = {"kind": self.kind, "stream": self.stream, "model": self.model, "question": self.question}
        self.log |= {"messages": messages, "tokens": 0, "fault": self.fault, "outcome": "open"}
        self.log |= {"started": time.monotonic(), "ended": None}

    def prepare(self):
        """Set the options `o`, the `fault`, the `text` and the time at which its first token is `due`."""
        fake, judge = self.fake, self.kind == "judge"
        self.o = o = SimpleNamespace(**fake.defaults | (directive(self.question) if fake.scripted else {}))
        self.fault = fake.fault_now(o.judge_fault if judge else o.fault, o.fault_once, self.question)
        if not self.stream and self.fault in BROKEN:  # it has no middle to break in
            self.fault = "hang" if self.fault == "stall" else "reset_before"
        if judge:
            self.text = judge_text(o, self.question, fake.demo)
        else:
            self.text = demo_answer(self.question) if fake.demo else answer_text(o, self.system)
        self.due = fake.loop.time() + (o.judge_delay if judge else o.first)

    def script(self):
        """Hang, fail before the answer, or answer."""
        if self.fault == "hang":
            yield None
        if self.fault in BEFORE:
            yield self.due
            self.fail()
        else:
            yield from self.streamed() if self.stream else self.whole()

    def fail(self):
        """Fail before the answer."""
        if self.fault == "reset_before":
            self.connection.reset()
        elif self.fault == "html":
            self.connection.reply(200, b"<!doctype html><title>Sign in</title>", "text/html")
        else:
            status = int(self.fault[4:])
            more = {"Retry-After": self.o.retry_after} if status in (429, 503) else {}
            self.connection.error(status, f"Asked to fail: {SECRET}", **more)

    def whole(self):
        """Script: the answer in one piece, when the last token would have been sent."""
        tokens = 1 if self.kind == "judge" else len(tokens_of(self.text, self.o.size))
        yield self.due + (0 if self.kind == "judge" else tokens * self.o.interval)
        self.log["tokens"] = tokens
        content = {"garbage": GARBAGE, "empty": "", "refuse": None}.get(self.fault, self.text)
        refusal = "I'm sorry, I can't help with that." if content is None else None
        message = {"role": "assistant", "content": content, "refusal": refusal}
        choice = {"index": 0, "message": message, "finish_reason": FINISH.get(self.fault, "stop")}
        answer = {"object": "chat.completion", "choices": [choice], "usage": self.usage()}
        data = dumps(self.envelope | answer)
        self.connection.reply(200, data[: len(data) // 2] if self.fault == "broken_json" else data)

    def streamed(self):
        """Script: the answer as a stream of events."""
        o, fault = self.o, self.fault
        if fault not in ("role_only", "comment"):
            yield self.due
        self.connection.keep_alive &= fault not in BROKEN and fault != "no_done"
        connection = "keep-alive" if self.connection.keep_alive else "close"
        self.connection.transport.write(STREAM_HEAD.format(connection).encode())
        opening = [self.chunk({"role": "assistant", "content": ""})]
        yield from self.send([self.chunk(None), *opening] if fault == "no_choices" else opening)
        tokens = tokens_of(self.text, o.size)
        if fault in BROKEN or fault in ("broken_json", "content_filter"):
            tokens = tokens[: o.after]
        before, after = self.chunk({"content": "@"}).split(b'"@"')
        for at in range(0, len(tokens), o.burst):
            yield self.due
            events = [before + token + after for token in tokens[at : at + o.burst]]
            self.log["tokens"] += len(events)
            yield from self.send([b": PROCESSING\n\n", *events] if fault == "comment" else events)
            self.due += o.interval
        yield self.due
        yield from self.broken_off() if fault in BROKEN else self.send(self.closing(), LAST_CHUNK)

    def broken_off(self):
        """Script: an end in the middle."""
        if self.fault == "stall":
            yield None
        elif self.fault == "reset":
            self.connection.reset()
        elif self.fault == "eof":
            yield from self.send([], LAST_CHUNK)
        elif self.fault == "error_event":
            error = {"message": f"The server had an error: {SECRET}", "code": "server_error"}
            yield from self.send([b"data: %b\n\n" % dumps({"error": error})], LAST_CHUNK)

    def closing(self):
        """The last events of an answer that was not broken off."""
        if self.fault == "broken_json":
            yield b'data: {"id":"chatcmpl-fake","choices":[{"index":0,"del\n\n'
        if self.fault == "tools":
            yield self.chunk({"tool_calls": [TOOL]})
        yield self.chunk({}, FINISH.get(self.fault, "stop"))
        if self.usage_wanted and self.o.usage:
            yield self.chunk(None, usage=self.usage())
        if self.fault != "no_done":
            yield b"data: [DONE]\n\n"

    def send(self, events, end=b""):
        """Script: write the events in one go, each a chunk of the body; `split`: each byte by itself."""
        write = self.connection.transport.write
        if self.fault == "crlf":
            events = [event.replace(b"\n", b"\r\n") for event in events]
        if self.fault == "split":
            for byte in b"".join(events):
                write(frame(bytes([byte])))
                yield 0
            events = []
        write(b"".join(map(frame, events)) + end)

    def chunk(self, delta, finish_reason=None, usage=None):
        """A chunk of the completion as an event; without a delta it has no choices."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = {"object": "chat.completion.chunk", "choices": [] if delta is None else [choice]}
        if self.usage_wanted:
            chunk["usage"] = usage
        return b"data: %b\n\n" % dumps(self.envelope | chunk)

    def usage(self):
        """What it cost; a token of the prompt has four characters."""
        asked = sum(len(text_of(m)) for m in self.log["messages"]) // 4 + 1
        done = self.log["tokens"]
        return {"prompt_tokens": asked, "completion_tokens": done, "total_tokens": asked + done}


# ---- Server ----


class Connection(asyncio.Protocol):
    """A client's connection: answers HTTP/1.1 requests one at a time, at once or by a chat's script."""

    def __init__(self, fake):
        self.fake, self.inbox, self.keep_alive = fake, bytearray(), True
        self.chat = self.script = None
        self.paused = self.held = False

    def connection_made(self, transport):
        self.transport = transport
        self.fake.connections.add(self)

    def connection_lost(self, error):
        self.fake.connections.discard(self)
        if self.script:
            self.end("aborted")

    def eof_received(self):
        self.transport.abort()  # who stops writing has gone; a close that waits for the buffer would hide it

    def data_received(self, data):
        self.inbox += data
        self.next_request()

    def next_request(self):
        """Answer the next request if a whole one is here and none is being answered."""
        head_end = self.inbox.find(b"\r\n\r\n")
        if self.script or head_end < 0 or self.transport.is_closing():
            return
        request, *lines = self.inbox[:head_end].decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        method, _, path = request.removesuffix(" HTTP/1.1").partition(" ")
        length = headers.get("content-length", "0")
        if request.count(" ") != 2 or " " in path or "transfer-encoding" in headers or not length.isdecimal():
            self.keep_alive = False
            self.error(400, "This server takes HTTP/1.1 with a Content-Length.")
            self.transport.close()
        elif len(self.inbox) >= (end := head_end + 4 + int(length)):
            body = bytes(self.inbox[head_end + 4 : end])
            del self.inbox[:end]
            self.keep_alive = headers.get("connection", "").lower() != "close"
            self.answer(method, path.partition("?")[0], headers.get("authorization"), body)

    def answer(self, method, path, authorization, body):
        """Answer a request, or start the script that does."""
        methods = {"/v1/chat/completions": "POST", "/v1/models": "GET", "/stats": "GET", "/requests": "GET"}
        methods["/stats/reset"] = "POST"
        if path not in methods or method != methods[path]:
            self.error(405 if path in methods else 404, f"No such route: {method} {path}")
        elif path.startswith("/v1/") and self.fake.key and authorization != f"Bearer {self.fake.key}":
            self.error(401, "Incorrect API key provided.")
        elif path != "/v1/chat/completions":
            self.reply(200, dumps(self.fake.report(path)))
        else:
            try:
                self.chat = Chat(self, body)
            except BadRequest as error:
                self.error(400, str(error))
            else:
                self.fake.logs.append(self.chat.log)
                self.fake.calls[self.chat.kind] += 1
                self.script = self.chat.script()
        if self.script:
            self.wake(self.script)
        else:
            self.end("finished")

    def wake(self, script):
        """Go on with the script, unless it is over or the client reads too slowly."""
        if script is not self.script:
            return
        if self.paused:
            self.held = True
            return
        due = next(script, "end")
        if due == "end":
            self.end("finished")
        elif due is not None:
            self.fake.wake_at(due, self.wake, script)

    def pause_writing(self):
        self.paused = True

    def resume_writing(self):
        self.paused = False
        if self.held:
            self.held = False
            self.wake(self.script)

    def end(self, outcome):
        """The answer is over: `finished`, or `aborted` by the client. On to the next request, or hang up."""
        if self.script:
            self.script.close()
            self.chat.log |= {"outcome": outcome, "ended": time.monotonic()}
            self.fake.streams[outcome] += self.chat.stream
        self.chat = self.script = None
        self.held = False
        if self.keep_alive:
            self.fake.loop.call_soon(self.next_request)
        else:
            self.transport.close()

    def error(self, status, message, **headers):
        """Answer with an error in OpenAI's form."""
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error = {"message": message, "type": kind, "param": None, "code": CODES.get(status, kind)}
        self.reply(status, dumps({"error": error}), **headers)

    def reply(self, status, data, content_type="application/json", **headers):
        """Write a whole response."""
        headers |= {"Content-Type": content_type, "Content-Length": len(data)}
        headers |= {} if self.keep_alive else {"Connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{head}\r\n".encode() + data)

    def reset(self):
        """Drop the connection with a RST."""
        raw = self.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class Fake:
    """The running server: `base_url`, `await close()`, its clock and what it has seen."""

    def __init__(self, scripted, key, defaults):
        self.scripted, self.key, self.loop = scripted, key, asyncio.get_running_loop()
        self.demo = not scripted and "tokens" not in defaults
        self.defaults = DEFAULTS | (DEMO_PACE if self.demo else {}) | defaults
        self.slots, self.connections = {}, set()
        self.forget()

    def forget(self):
        """Set the statistics back; what is open stays open."""
        self.calls, self.streams = {"generate": 0, "judge": 0}, {"finished": 0, "aborted": 0}
        self.logs, self.failed = collections.deque(maxlen=50), set()

    def wake_at(self, due, wake, script):
        """Call `wake(script)` at the loop's time `due`; streams due in the same millisecond share a timer."""
        slot = math.ceil(due * 1000)
        if slot not in self.slots:
            self.slots[slot] = []
            self.loop.call_at(slot / 1000, self.tick, slot)
        self.slots[slot].append((wake, script))

    def tick(self, slot):
        for wake, script in self.slots.pop(slot):
            wake(script)

    def fault_now(self, fault, once, question):
        """The fault, or none if it shall come once and has."""
        if fault and once and (fault, question) in self.failed:
            return ""
        self.failed |= {(fault, question)} if once else set()
        return fault

    def report(self, path):
        """What GET /v1/models, GET /requests, GET /stats or POST /stats/reset answers."""
        if path == "/v1/models":
            model = {"id": "fake-demo", "object": "model", "created": 0, "owned_by": "fake_openai"}
            return {"object": "list", "data": [model]}
        if path == "/requests":
            return list(self.logs)
        if path == "/stats/reset":
            self.forget()
        return {
            "calls": self.calls,
            "streams_open": sum(bool(c.chat and c.chat.stream) for c in self.connections),
            "streams_finished": self.streams["finished"],
            "streams_aborted": self.streams["aborted"],
            "tokens_when_aborted": [
                g["tokens"] for g in self.logs if g["stream"] and g["outcome"] == "aborted"
            ],
            "connections_open": len(self.connections) - 1,  # not the asker's
            "requests": [g | {"messages": len(g["messages"])} for g in self.logs],
        }

    async def close(self):
        """Stop listening and drop every connection, at once."""
        self.server.close()
        for connection in list(self.connections):
            connection.transport.abort()
        await asyncio.sleep(0)


async def start(host="127.0.0.1", port=0, *, scripted=False, key=None, **defaults):
    """Serve in the running loop; `defaults` as in DEFAULTS, where `tokens=` means fixed answers, no demo."""
    fake = Fake(scripted, key, defaults)
    fake.server = await fake.loop.create_server(lambda: Connection(fake), host, port, backlog=4096)
    fake.base_url = f"http://{host}:{fake.server.sockets[0].getsockname()[1]}/v1"
    return fake


async def serve(options):
    """Serve until SIGTERM or SIGINT."""
    fake, stop = await start(**options), asyncio.Event()
    print(fake.base_url, flush=True)
    for name in (signal.SIGTERM, signal.SIGINT):
        fake.loop.add_signal_handler(name, stop.set)
    await stop.wait()
    await fake.close()


def main():
    """Read the command line, allow many open files, serve on the fastest loop there is."""
    parser = argparse.ArgumentParser(epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8099)
    parser.add_argument("--scripted", action="store_true")
    parser.add_argument("--key")
    for name in ("first", "interval", "tokens", "size", "burst", "judge_delay"):
        option, kind = "--" + name.replace("_", "-"), type(DEFAULTS[name])
        parser.add_argument(option, type=kind, default=argparse.SUPPRESS)
    options, new_event_loop = vars(parser.parse_args()), None
    with contextlib.suppress(ImportError):
        from uvloop import new_event_loop
    with contextlib.suppress(ImportError, ValueError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve(options))


if __name__ == "__main__":
    main()
