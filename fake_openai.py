"""A stand-in for an OpenAI-compatible provider: the real wire format, canned answers, no model.

    python fake_openai.py --port 8099              the demo: a few true sentences on an AWS question
    python fake_openai.py --port 0 --scripted      for tests: obeys directives; prints its base URL
    python fake_openai.py --first 0.3 --interval 0.03 --tokens 100          fixed answers, for measuring
    fake = await fake_openai.start(scripted=True)  the same in this loop: fake.base_url, await fake.close()
    base_url = fake_openai.start_in_thread()       the same in a daemon thread; it ends with the process

Routes: POST /v1/chat/completions, GET /v1/models; for tests GET /stats (counts and the last 500 calls, times
as time.monotonic()), GET /requests (those calls with their messages), POST /stats/reset. Each HTTP request
for a completion is a call: the calls with a question's text are its tries. A call's "connection" and "nth"
tell where it came, and as which request there. "http" counts requests by method and path.

A call that is not streamed asks the judge, and gets one word. What it judges is what follows the last label
QUESTION or ANSWER in the last message: a line by itself, between fences; the first line is the fence.

Scripted, `#fake(key=value, key="quoted value")` in the last user message steers the call (the last counts);
one_word() writes it as a single word, which a guard that reads the question minds less.
As options (`--judge-delay 1`) and in start(judge_delay=1) the same keys hold for every call.

    first= interval=           seconds to the first token (0.01), from token to token and to the end (0.002)
    tokens= size= burst=       how many (40), of how many characters (4), how many in one write (1)
    answer="..." length=       this very text; AWS text of so many characters
    drift=k paragraph=1        k characters on AWS, then on baking up to length= (k+1500); in a new paragraph
    leak=                      the system prompt: 1 (verbatim), upper, list, code, middle (of AWS text)
    think=tag                  <tag>, a thought on baking and </tag> before the text; size=1 splits the tags
    finish=word                this finish_reason, whatever the word (stop)
    usage=0                    no usage chunk, even if asked for one
    judge= judge_answer=       verdict or any text, on a question (ALLOW), an answer (auto: BLOCK if baking)
    judge_delay= judge_fault=  seconds (0); a fault of the judge: those marked * below
    fault= fault_once=1        a fault or dialect of the table FAULTS (`--help` shows it); once for this text
    after= pause= thinking=    for faults: tokens before it (3), seconds of silence (1.6), of thinking (2)
    kb= location=              for faults: size of a big event (150), target of a redirect (this server)
    code= message=             the words of an error, in place of typical ones
    retry_after=               the Retry-After of an error, any text (1 with http429 and http503)
    hang_up=1                  as llama.cpp's server: a stream's head says `Keep-Alive: timeout=5`, yet right
                               after it the connection ends (1: FIN, 2: RST), and a request on it is lost

`--hang-up` is hang_up=1 for every call; `--idle 2` closes connections unused for 2 s, as gunicorn does.
"""

import argparse
import asyncio
import collections
import concurrent.futures
import contextlib
import difflib
import functools
import itertools
import json
import math
import re
import signal
import socket
import struct
import threading
import time
from http import HTTPStatus
from types import SimpleNamespace
from typing import NamedTuple

# ---- Faults and dialects: what the bytes of an answer look like. * means: the judge can have it, too ----

FAULTS = {
    # Before the answer
    "hang": "* no headers, ever",
    "reset_before": "* RST instead of an answer",
    "html": "* 200 and a page of HTML",
    "http500": "* this or any other status from 400 on, with an error in OpenAI's form",
    "http307": "* 301, 302, 303, 307 or 308 to location=, by default where the answer is given",
    "context_length": "* 400, code context_length_exceeded",
    "too_long": "* 400 without a code; only its message speaks of the length",
    "bad_parameter": "* 400, code unsupported_parameter",
    "bad_model": "* 404, code model_not_found",
    "credits": "* 402 as OpenRouter says it, its code a number",
    "quota": "* 429, code insufficient_quota",
    "rate_limit": "* 429, code rate_limit_exceeded, Retry-After: 30",
    "gateway": "* 504; its message says that something took too long",
    "endless_body": "* a body that never ends: of an error, for the judge that of its word",
    "no_stream_options": "400 for a request that has the key stream_options, else an answer",
    # After so many tokens (after=) the answer is broken off
    "reset": "RST",
    "cut": "FIN inside the chunked body",
    "eof": "the body ends well, but with neither finish_reason nor [DONE]",
    "error_event": 'data: {"error": {...}}',
    "error_text": 'data: {"error": "..."}',
    "stall": "silence for ever",
    # After so many tokens, but with a good end
    "broken_json": "* half an event, then finish_reason and [DONE]; the judge: half of its JSON",
    "content_filter": "finish_reason content_filter",
    "early_finish": "finish_reason, pause= seconds of silence, the rest of the text, [DONE]",
    # At the end
    "no_done": "finish_reason, but no [DONE]",
    "no_finish": "[DONE], but no finish_reason",
    "no_newline": "last piece of text and finish_reason in the last event, which has no newline; no [DONE]",
    "done_no_newline": "the body ends with `data: [DONE]` without newline; no finish_reason",
    "comments_after": "comments after [DONE], for thinking= seconds",
    "length": "finish_reason length",
    # No text
    "empty": "* no text, finish_reason stop",
    "tools": "a tool call, finish_reason tool_calls",
    "thinking_only": "reasoning_content for thinking= seconds, then finish_reason length (or finish=)",
    "refuse": "* a refusal in place of content",
    "garbage": "* the judge can't decide: both words",
    # Life before the text, for thinking= seconds
    "reasoning_content": "deltas with reasoning_content and content null (DeepSeek, vLLM, llama.cpp)",
    "reasoning": "deltas with reasoning and content empty (OpenRouter, Ollama)",
    "comments": "comments (OpenRouter)",
    "role_only": "the first chunk at once, its text after first= seconds",
    # Other forms of a whole answer
    "cookie": "Set-Cookie with a letter that is not ASCII",
    "comment": "a comment before every event, the first chunk at once",
    "empty_data": "`data:` without a value before every event, with and without the space",
    "fields": "event:, id: and retry: before every event's data",
    "no_space": "data:{...}, without the space",
    "crlf": "line ends are CR LF",
    "bom": "a byte order mark before the first event",
    "unicode": "characters of all kinds, unescaped",
    "split": "the same, each byte in a write of its own",
    "halves": "the same, \\u-escaped, one UTF-16 unit an event: an emoji's halves come in two events",
    "lone_half": "the first half of an emoji, then text",
    "null_error": '* "error": null in every chunk',
    "nulls": "chunks whose choices, delta or content are null before the text",
    "no_choices": "a first chunk without choices (Azure)",
    "second_choice": "before every chunk the same again as choice 1",
    "parts": "* content as a list of typed parts, a thinking part first (Mistral)",
    "big_event": "an event of kb= KB without text before the text",
    "endless_line": "an event that never ends",
}
STATUSES = {f"http{status}" for status in (301, 302, 303, 307, 308)}
STATUSES |= {f"http{status.value}" for status in HTTPStatus if status >= 400}
BROKEN_OFF = {"reset", "cut", "eof", "error_event", "error_text", "stall"}
CUT_SHORT = BROKEN_OFF | {"broken_json", "content_filter"}
THINKING = {"reasoning_content", "reasoning", "comments", "thinking_only"}
AT_ONCE = THINKING | {"role_only", "comment"}  # head and first chunk do not wait for the first token
FINISH = {"tools": "tool_calls", "length": "length", "content_filter": "content_filter"}
FINISH["thinking_only"] = "length"

# ---- Directives ----

# fmt: off
DEFAULTS = {
    "first": 0.01, "interval": 0.002, "tokens": 40, "size": 4, "burst": 1, "usage": 1,
    "answer": "", "length": 0, "drift": -1, "paragraph": 0, "leak": "", "think": "", "finish": "",
    "judge": "ALLOW", "judge_answer": "auto", "judge_delay": 0.0, "judge_fault": "",
    "fault": "", "fault_once": 0, "after": 3, "pause": 1.6, "thinking": 2.0, "kb": 150,
    "location": "", "code": "", "message": "", "retry_after": "", "hang_up": 0,
}
# fmt: on
DEMO_PACE = {"first": 0.15, "interval": 0.02, "judge_delay": 0.1}
DIRECTIVE = re.compile(r'#fake\(((?:[^()"]|"(?:[^"\\]|\\.)*")*)\)')
WORD = re.compile("fake0([0-9a-f]+)")
PAIR = re.compile(r'\s*(\w+)\s*=\s*("(?:[^"\\]|\\.)*"|[^\s,"]+)\s*(?:,|$)')


class BadRequest(Exception):
    """The client's mistake; becomes a 400."""


def one_word(**keys):
    """A directive as one word, for a question that a guard reads: to its rules it is one unknown word."""
    pairs = ", ".join(f"{key}={json.dumps(value)}" for key, value in keys.items())
    return f"fake0{f'#fake({pairs})'.encode().hex()}"


def directive(text):
    """The last `#fake(...)` of a text as {key: value}. BadRequest for a key, value or fault unknown here."""
    text = WORD.sub(lambda match: bytes.fromhex(match[1]).decode(), text)
    found = DIRECTIVE.findall(text) or [""]
    try:
        said = {
            key: type(DEFAULTS[key])(json.loads(value, strict=False) if value[0] == '"' else value)
            for key, value in PAIR.findall(found[-1])
        }
    except (KeyError, ValueError) as error:
        raise BadRequest(f"directive with an unknown key or a bad value: {error}") from error
    known = {said.get("fault", ""), said.get("judge_fault", "")} <= {"", *FAULTS, *STATUSES}
    if PAIR.sub("", found[-1]).strip() or not known or min(said.get("burst", 1), said.get("size", 1)) < 1:
        raise BadRequest(f"directive not understood: {found[-1]}")
    return said


# ---- What a scripted call is answered with ----

OFF_SCOPE_MARK = "dough"  # in every off-scope sentence, and nowhere else
OFF_SCOPE = """Bread dough wants flour, water, salt and patience. Knead the dough until it feels smooth and
 silky. Let the dough rise in a warm corner of the kitchen for two hours. Fold the dough gently, so that it
 keeps its bubbles. Wet dough sticks to your fingers, so flour your hands. A round of dough goes into a very
 hot oven. Once the dough sounds hollow, the loaf is ready for butter. """.replace("\n", "")
THOUGHT = "First I think of bread dough. "  # a guard that sees it blocks
REFUSAL = "I'm sorry, I can't help with that."
GARBAGE = "On the one hand ALLOW, on the other hand: who am I to BLOCK?"
UNICODE = "Amazon S3 ☃ für große Daten:\u2028S3は安全です 🚀👩\u200d💻 아마존, «خدمة S3» \ufeff\u2029."


def on_scope(length):
    """AWS text of exactly `length` characters."""
    return (ON_SCOPE * (length // len(ON_SCOPE) + 1))[:length]


def drifting(k, length, paragraph=False):
    """`length` characters: `k` about AWS, the rest about bread."""
    gap = "\n\n" if paragraph else " "
    begin = on_scope(k) + gap if k else ""
    return (begin + OFF_SCOPE * (length // len(OFF_SCOPE) + 1))[:length]


def leaking(how, prompt):
    """The system prompt, told in one of five ways."""
    bullets = "\n".join(f"- {line}" for line in prompt.splitlines() if line.strip())
    middle = f"{on_scope(400)}\n\n{prompt}\n\n{on_scope(200)}"
    ways = {"upper": prompt.upper(), "list": bullets, "code": f"```text\n{prompt}\n```\n", "middle": middle}
    return ways.get(how, prompt)


def answer_text(o, system):
    """The text that a scripted call is answered with, without its thoughts."""
    if o.answer or o.fault in ("empty", "tools", "thinking_only"):
        return o.answer
    if o.fault == "refuse":
        return REFUSAL
    if o.leak:
        return leaking(o.leak, system)
    if o.drift >= 0:
        return drifting(o.drift, o.length or o.drift + 1500, o.paragraph)
    if o.fault in ("unicode", "split", "halves"):
        return UNICODE
    return on_scope(o.length or o.tokens * o.size)


# ---- The judge ----

LABEL = re.compile(r"(?i)[^\w\n/]*(question|answer)[^\w\n]*")


class Judged(NamedTuple):
    """What a judge call is about."""

    stage: str  # question or answer
    text: str  # what is to be judged
    earlier: str  # all that was said before


def judged(data):
    """Take apart the data of a judge call, whose parts stand between lines that equal the first one."""
    lines = data.strip().split("\n")
    fence = lines[0]
    parts = [""]
    for line in lines:
        if line == fence and lines.count(fence) > 1:
            parts.append("")
        else:
            parts[-1] += line + "\n"
    parts = [part.strip() for part in parts if part.strip()]
    if len(parts) < 2:  # no fences: labels alone
        parts = re.split(r"(?im)^([^\w\n/]*(?:question|answer)[^\w\n]*)$", data)
    for at in range(len(parts) - 2, -1, -1):
        if label := LABEL.fullmatch(parts[at]):
            return Judged(label[1].lower(), "\n".join(parts[at + 1 :]), "\n".join(parts[:at]))
    return Judged("question", data, "")


def judge_text(o, data):
    """What the scripted judge says."""
    stage, text, _ = judged(data)
    if stage == "question":
        return o.judge
    if o.judge_answer != "auto":
        return o.judge_answer
    return "BLOCK" if OFF_SCOPE_MARK in text.lower() else "ALLOW"


# ---- What the demo says ----

# For each topic: the pattern that names it, then its text; $ what is billed; ? why one uses it; > a command
# of the AWS CLI that only looks; + a Terraform resource. Every sentence names something of AWS, so that a
# guard need not hold it back.
TOPIC_TEXTS = r"""
s3|buckets?|glacier
  **Amazon S3** stores objects in buckets, designed for eleven nines of durability. New S3 buckets block
  public access by default. S3 Lifecycle rules move cold objects to S3 Glacier.
  $ Amazon S3 bills the gigabytes kept in each storage class, requests, and data that leaves the AWS Region.
  ? S3 Standard keeps each object in at least three Availability Zones, and S3 has no disk that can be full.
  > aws s3api list-buckets
  + aws_s3_bucket: bucket = "example-notes"
lambdas?|serverless
  **AWS Lambda** runs a function for up to 15 minutes. A Lambda function's share of the CPU grows with its
  memory. Provisioned concurrency spares AWS Lambda its cold starts.
  $ AWS Lambda bills requests and the time that a function runs, times its memory; an idle function is free.
  ? With AWS Lambda nobody patches servers, and a Lambda function scales from nothing with its events.
  > aws lambda list-functions
  + aws_lambda_function: function_name = "example"; role = aws_iam_role.example.arn; runtime = "python3.13";
    handler = "app.handler"; filename = "app.zip"; timeout = 30
ec2|instances?|amis?|spot
  **Amazon EC2** rents virtual machines that boot from an AMI. EC2 Spot Instances cost far less, but AWS
  takes them back with two minutes' notice. Savings Plans suit steady EC2 use.
  $ Amazon EC2 bills the seconds that an instance runs, by its type; its EBS volumes cost even while it is
    stopped.
  ? An EC2 instance runs any software, with the operating system and the hardware that you choose from AWS.
  > aws ec2 describe-instances
  + aws_instance: ami = data.aws_ami.example.id; instance_type = "t4g.micro"
dynamodb|nosql
  **Amazon DynamoDB** finds an item by its partition key and optional sort key. A DynamoDB item holds at
  most 400 KB. DynamoDB on-demand capacity suits traffic that nobody can predict.
  $ Amazon DynamoDB bills reads and writes, on demand or as provisioned capacity, and the gigabytes stored.
  ? DynamoDB answers in milliseconds at any size of the table, as long as your AWS application asks by key.
  > aws dynamodb list-tables
  + aws_dynamodb_table: name = "example"; billing_mode = "PAY_PER_REQUEST"; hash_key = "id"; attribute {;
    name = "id"; type = "S"; }
rds|multi-az|mysql|postgres(ql)?
  **Amazon RDS** runs PostgreSQL, MySQL, MariaDB, Oracle, SQL Server and Db2. RDS Multi-AZ is for failover,
  RDS read replicas scale reading. RDS keeps backups up to 35 days.
  $ Amazon RDS bills the hours of each DB instance, its storage, and backups beyond the size of the
    database.
  ? RDS patches, backs up and fails over the database, which on an EC2 instance would be your work.
  > aws rds describe-db-instances
  + aws_db_instance: identifier = "example"; engine = "postgres"; instance_class = "db.t4g.micro";
    allocated_storage = 20; username = "app"; manage_master_user_password = true; multi_az = true
aurora
  **Amazon Aurora** speaks MySQL or PostgreSQL and keeps six copies of the data over three Availability
  Zones. An Aurora cluster has up to 15 Aurora Replicas, each able to take over as the writer.
  $ Amazon Aurora bills the capacity of its instances, storage by the gigabyte and, in Aurora Standard, each
    I/O.
  ? An Aurora Replica shares the storage of the writer, so an Aurora failover copies nothing and is short.
  > aws rds describe-db-clusters
  + aws_rds_cluster: cluster_identifier = "example"; engine = "aurora-postgresql"; master_username = "app";
    manage_master_user_password = true
vpcs?|subnets?|nat|security groups?
  **Amazon VPC** is your own network in an AWS Region. VPC security groups are stateful, VPC network ACLs
  are not. A gateway endpoint reaches S3 without a NAT gateway.
  $ A VPC is free; NAT gateways, interface endpoints of AWS PrivateLink and public IPv4 addresses are
    billed.
  ? A private subnet of a VPC keeps databases such as Amazon RDS out of reach of the internet.
  > aws ec2 describe-vpcs
  + aws_vpc: cidr_block = "10.0.0.0/16"; enable_dns_hostnames = true
iam|roles?|polic(y|ies)|permissions?
  **AWS IAM** denies what no policy allows, and an explicit deny in an IAM policy always wins. IAM roles
  give temporary credentials; prefer them to access keys of IAM users.
  $ AWS IAM is free of charge, and so is AWS STS, which gives out the temporary credentials.
  ? An IAM role has no long-lived secret that could leak, and AWS CloudTrail records each use of it.
  > aws iam list-roles
  + aws_iam_role: name = "example"; assume_role_policy = data.aws_iam_policy_document.example.json
cloudfront|cdn
  **Amazon CloudFront** serves content from edge locations near the reader. With origin access control an S3
  bucket answers CloudFront alone. A certificate for CloudFront must be in us-east-1.
  $ Amazon CloudFront bills data sent to readers and requests; what AWS origins send to CloudFront is free.
  ? CloudFront is near the reader, and what it has cached costs the S3 bucket or the EC2 instance nothing.
  > aws cloudfront list-distributions
  + aws_cloudfront_origin_access_control: name = "example"; origin_access_control_origin_type = "s3";
    signing_behavior = "always"; signing_protocol = "sigv4"
route ?53|dns|domains?
  **Amazon Route 53** is the DNS service of AWS. An alias record of Route 53 points the apex of a zone at a
  load balancer or a CloudFront distribution.
  $ Amazon Route 53 bills hosted zones and queries; queries for alias records that point to AWS are free.
  ? Route 53 health checks lead readers away from a Region of AWS that does not answer.
  > aws route53 list-hosted-zones
  + aws_route53_zone: name = "example.com"
ecs|fargate|containers?|docker
  **Amazon ECS** runs containers as tasks and services. With AWS Fargate no EC2 instance needs care: each
  ECS task pays for the vCPU and memory that it asks for.
  $ Amazon ECS is free by itself; you pay for the EC2 instances, or for the vCPU and memory of AWS Fargate
    tasks.
  ? ECS asks for less knowledge than Kubernetes on Amazon EKS and gives each task an IAM role of its own.
  > aws ecs list-clusters
  + aws_ecs_cluster: name = "example"
eks|kubernetes|k8s
  **Amazon EKS** runs the Kubernetes control plane over several Availability Zones. Pods on EKS get AWS
  permissions through EKS Pod Identity or IAM roles for service accounts.
  $ Amazon EKS bills each cluster by the hour, and besides the EC2 instances or AWS Fargate pods that do the
    work.
  ? EKS runs what runs on any Kubernetes, and AWS keeps the control plane of the EKS cluster alive.
  > aws eks list-clusters
  + aws_eks_cluster: name = "example"; role_arn = aws_iam_role.example.arn; vpc_config {; subnet_ids =
    aws_subnet.example[*].id; }
[ean]lb|load balanc(er|ers|ing)
  **Elastic Load Balancing** has the Application Load Balancer for HTTP and the Network Load Balancer for
  TCP and UDP. An ALB routes by host and path to EC2, ECS or Lambda.
  $ Elastic Load Balancing bills the hours of each ALB or NLB and the capacity units that its traffic takes.
  ? An ALB sends nothing to an EC2 instance or ECS task that fails its health check.
  > aws elbv2 describe-load-balancers
  + aws_lb: name = "example"; load_balancer_type = "application"; subnets = aws_subnet.example[*].id
auto ?scaling|scal(e|ing)
  **Amazon EC2 Auto Scaling** keeps as many EC2 instances as the load needs. Target tracking holds a
  CloudWatch metric, such as average CPU, near a value that you choose.
  $ Amazon EC2 Auto Scaling is free; you pay for the EC2 instances that it starts and for CloudWatch alarms.
  ? EC2 Auto Scaling replaces a broken EC2 instance by itself, even in a group of one.
  > aws autoscaling describe-auto-scaling-groups
  + aws_autoscaling_group: min_size = 1; max_size = 4; vpc_zone_identifier = aws_subnet.example[*].id;
    launch_template {; id = aws_launch_template.example.id; }
ebs|efs|volumes?|file systems?
  **Amazon EBS** volumes are disks for EC2 instances in one Availability Zone. Amazon EFS is a shared NFS
  file system that EC2, ECS and Lambda can mount in several zones.
  $ Amazon EBS bills the gigabytes that you provision, Amazon EFS the gigabytes that you use.
  ? An EBS volume outlives its EC2 instance, and an EBS snapshot of it can be restored in any zone of the
    Region.
  > aws ec2 describe-volumes
  + aws_ebs_volume: availability_zone = "eu-central-1a"; size = 20; type = "gp3"; encrypted = true
sqs|queues?|dead.letter
  **Amazon SQS** standard queues deliver at least once; SQS FIFO queues keep the order. What fails again and
  again belongs in an SQS dead-letter queue.
  $ Amazon SQS bills requests, a little more for FIFO queues; long polling saves empty ones.
  ? An SQS queue keeps the work while a Lambda function or ECS service that does it is slow or down.
  > aws sqs list-queues
  + aws_sqs_queue: name = "example"; visibility_timeout_seconds = 60
sns|notifications?|fan.?out
  **Amazon SNS** pushes one message to many subscribers, such as SQS queues and Lambda functions. SNS filter
  policies spare a subscriber what it does not need.
  $ Amazon SNS bills what is published and delivered; deliveries to SQS and Lambda cost no fee of their own.
  ? With SNS the sender need not know which SQS queues and Lambda functions listen.
  > aws sns list-topics
  + aws_sns_topic: name = "example"
eventbridge|event.driven|cron
  **Amazon EventBridge** routes events by rules to AWS targets such as Lambda. Amazon EventBridge Scheduler
  starts them at a time or by a cron expression.
  $ Amazon EventBridge bills custom events; events that AWS services send to the default bus are free.
  ? EventBridge starts a Lambda function or an ECS task without a server that waits for the hour.
  > aws events list-rules
  + aws_cloudwatch_event_rule: name = "example"; schedule_expression = "rate(1 day)"
step functions?|workflows?
  **AWS Step Functions** runs state machines. A Standard workflow of AWS Step Functions can take a year, an
  Express one five minutes.
  $ AWS Step Functions bills state transitions of Standard workflows, requests and duration of Express ones.
  ? AWS Step Functions retries, waits and branches between Lambda functions, and shows each step in the
    console.
  > aws stepfunctions list-state-machines
  + aws_sfn_state_machine: name = "example"; role_arn = aws_iam_role.example.arn; definition =
    file("steps.json")
api gateway|rest apis?|websockets?
  **Amazon API Gateway** puts REST, HTTP and WebSocket APIs before AWS Lambda and others. HTTP APIs of API
  Gateway cost less than REST APIs and do less.
  $ Amazon API Gateway bills the requests that it receives and data that leaves AWS.
  ? API Gateway checks tokens and limits the rate before a Lambda function is called and billed.
  > aws apigatewayv2 get-apis
  + aws_apigatewayv2_api: name = "example"; protocol_type = "HTTP"
cloudwatch|logs?|metrics?|alarms?
  **Amazon CloudWatch** keeps metrics, logs and alarms. Set a retention on every CloudWatch log group: by
  default CloudWatch keeps logs for ever.
  $ Amazon CloudWatch bills logs by the gigabyte taken in and kept, custom metrics, alarms and dashboards.
  ? A CloudWatch alarm tells Amazon SNS that something is wrong before your users do.
  > aws logs describe-log-groups
  + aws_cloudwatch_log_group: name = "/example/app"; retention_in_days = 30
cloudtrail|audit\w*
  **AWS CloudTrail** records who called which AWS API. CloudTrail's event history shows 90 days of
  management events; a CloudTrail trail to an S3 bucket keeps more.
  $ The first copy of management events in an AWS CloudTrail trail is free; data events and S3 storage are
    billed.
  ? CloudTrail answers who deleted the S3 bucket, when, and with which IAM role.
  > aws cloudtrail lookup-events
  + aws_cloudtrail: name = "example"; s3_bucket_name = aws_s3_bucket.example.id; is_multi_region_trail =
    true
cloudformation|cdk|stacks?
  **AWS CloudFormation** creates a stack of AWS resources from a template and rolls back on failure. The AWS
  CDK writes CloudFormation templates from Python, TypeScript and others.
  $ AWS CloudFormation is free for AWS resource types; you pay for what its stacks create.
  ? A CloudFormation template can be reviewed and repeated, which clicks in the AWS console can not.
  > aws cloudformation list-stacks
  + aws_cloudformation_stack: name = "example"; template_body = file("template.yaml")
kms|secrets?|encrypt\w*
  **AWS KMS** keeps the keys that S3, EBS and RDS encrypt with. AWS Secrets Manager stores passwords and can
  rotate those of Amazon RDS.
  $ AWS KMS bills each customer managed key by the month, and requests; AWS Secrets Manager bills each
    secret.
  ? A key in AWS KMS never leaves it in plain text, and a KMS key policy says who may use it.
  > aws kms list-keys
  + aws_kms_key: description = "example"; enable_key_rotation = true
athena|glue|redshift|analytics
  **Amazon Athena** runs SQL over files in S3, whose tables the AWS Glue Data Catalog describes. Amazon
  Redshift is the data warehouse of AWS.
  $ Amazon Athena bills the terabytes that a query scans; Parquet files and partitions in S3 make that less.
  ? Athena needs no cluster: the data stays in S3, and only queries cost.
  > aws athena list-work-groups
  + aws_athena_workgroup: name = "example"
bedrock|sagemaker
  **Amazon Bedrock** offers foundation models of several companies behind one API. Amazon SageMaker AI
  trains and hosts models of your own.
  $ Amazon Bedrock bills the tokens that go in and out, by model; Amazon SageMaker AI bills instances by
    time.
  ? With Amazon Bedrock an IAM role is enough: no further account, and AWS CloudTrail records the calls.
  > aws bedrock list-foundation-models
  + aws_bedrock_guardrail: name = "example"; blocked_input_messaging = "Sorry, no.";
    blocked_outputs_messaging = "Sorry, no."
costs?|pric\w+|billing|budgets?
  **AWS Budgets** warns before spending passes a limit. AWS Cost Explorer shows which AWS service, Region or
  cost allocation tag the money went to.
  $ Looking into AWS Cost Explorer is free; its API and budgets with actions of AWS Budgets cost a little.
  ? AWS bills what is used, so only AWS Budgets tells you before the bill that something runs too long.
  > aws ce list-cost-allocation-tags
  + aws_budgets_budget: name = "example"; budget_type = "COST"; limit_amount = "100"; limit_unit = "USD";
    time_unit = "MONTHLY"
"""


class Topic(NamedTuple):
    """What the demo knows about an AWS service."""

    pattern: re.Pattern  # names it in a question
    text: str  # Markdown, a few sentences; begins with the service in bold
    cost: str  # a sentence on what is billed
    why: str  # a sentence on why one uses it
    command: str  # of the AWS CLI; lists, and needs no arguments
    terraform: str  # "resource: argument; argument"

    @property
    def service(self):
        """The service in bold."""
        return self.text[: self.text.index("**", 2) + 2]


def read_topics(text):
    """The topics of a text like TOPIC_TEXTS."""
    for block in re.split(r"\n(?=\S)", text.strip()):
        pattern, body = block.split("\n", 1)
        fields = re.split(r"\n  [$?>+] ", body)
        pattern = re.compile(rf"(?i)(?<![a-z0-9])({pattern})(?![a-z0-9])")
        yield Topic(pattern, *(" ".join(field.split()) for field in fields))


TOPICS = list(read_topics(TOPIC_TEXTS))
COSTS = TOPICS[-1]  # a question about the cost of something is about something else
ON_SCOPE = "\n\n".join(topic.text for topic in TOPICS) + "\n\n"
DEMO_NOTE = "*AWS demo model: a canned answer, no language model is connected (set `OPENAI_API_KEY`).*"
GENERAL = """**AWS Well-Architected** rests on six pillars: operational excellence, security, reliability,
 performance efficiency, cost optimization and sustainability. Give people and AWS workloads IAM roles with
 least privilege. Let Amazon CloudWatch and AWS CloudTrail show what happens.""".replace("\n", "")


def words_of(text):
    """The words of a text, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


HELLO = "Hello! Ask me about AWS, such as *What is Amazon S3?* or *How much does AWS Lambda cost?*"
SMALL_TALK = {
    r"thank\w*|thx|danke|merci|gracias": "You are welcome. Is there anything else about AWS?",
    r"bye|goodbye|tschüss|adios": "Goodbye, and good luck with AWS.",
    r"hi|hello|hey|hallo|hola|bonjour|ciao|moin|(good|guten) \w+|who|what|how|help": HELLO,
    r"": "Good. What else would you like to know about AWS?",
}
SMALL_TALK_WORDS = set(
    words_of("""
    hi hello hey there hallo hola bonjour ciao moin good guten morning afternoon evening day tag morgen
    thank thanks you thx danke merci gracias very so much a lot for the your that this help helped bye
    goodbye tschüss adios see later ok okay great cool nice perfect awesome wonderful got it understood
    please who are what can do how me
""")
)
# A follow-up consists of these words alone. One that names a service or a tool needs no list.
FOLLOW_UP_WORDS = set(
    words_of("""
    a about according actually again all alternative alternatives am an and another any are as at aws bad be
    because been being best better between bigger both briefly but by can case cases change charge cheap
    cheaper clear clearer cli code come command common compare compared console continue cost costs could
    deeper detail details did differ difference different disadvantages do does doesn doing done drawbacks
    each easier elaborate else enable english enough even ever every exactly example examples expensive
    explain explanation faq fast faster fee fees few first fix for free from further german get give go good
    got had handle happen happens hard has have help here how i if important in instead into is isn it its
    just keep know latency less let like limit limits line link links list long longer made main make many
    matter may me mean means might month monthly more most much must my need needed needs next no not now of
    off ok okay on once one ones only option options or other others our out over part pay per performance
    please point possible practice practices price prices pricing pro problem problems pros quick quickly
    quota quotas rather read really reason recommend reliable rewrite right s sample say second secure
    security set setting settings setup short shorter should show simple simpler simply size slow smaller
    snippet so some something sources spend start step steps still stop summarise summarize summary sure
    switch t table take tell test than that the their them then there these they thing things this those
    through time tip tips to together too translate try turn two under understand up us use used useful
    using vs was way we well were what when where whether which while who why will with without word words
    work works worth would write wrong year yes yet you your
""")
)
# What a question asks for; the first that matches counts.
KINDS = {
    "terraform": r"terraform|opentofu|hcl|infrastructure as code",
    "python": r"python|boto3?|sdk",
    "table": r"compar\w+|differ\w*|versus|vs|better|alternatives?|table|overview",
    "cost": r"costs?|pric\w+|bill\w*|expensive|cheap\w*|pay|free|charges?|fees?|spend",
    "example": r"examples?|samples?|snippet|code|commands?|cli|show|how (do|can|to|would|should)|steps?",
    "why": r"why|reason|how come|worth|important|pros?|point",
    "more": r"more|details?|elaborate|explain|continue|go on|deeper|further|long\w*|short\w*|tips?",
}
# Misspelled, these still count: "lamda", "dynmodb".
NAMES = words_of("""
    lambda dynamodb cloudfront cloudwatch cloudtrail cloudformation eventbridge redshift sagemaker fargate
    kubernetes
""")
TECHNICAL = re.compile(
    r"""(?ix) aws | amazon | cloud | server | deploy | docker | container | kubernetes | linux | network |
    (?<![a-z0-9]) (
        (sql|api|vm|dns|ip|tcp|http|ssh|tls|cpu|disk|json|yaml|git|log|port|node|cluster|python) |
        (arn|iam|ami|sns|sqs|ssm|alb|ebs|efs|kms|vpc|s3|ec2|rds|ecs|eks|cdk|bucket|lambda) |
        dynamodb | glacier | redshift | sagemaker | bedrock | eventbridge | athena | aurora | route\ ?53 |
        step\ functions? | load\ balanc(er|ing) | code(build|commit|deploy|pipeline)
    ) s? (?![a-z0-9]) |
    subnet | instance | storage | encrypt | backup | replica | latency | terraform | scaling | firewall |
    database | when\ calling\ the\ \w+\ operation | [a-z](exception|fault)\b | nosuch[a-z]+ | accessdenied"""
)
OFF_TOPIC = re.compile(
    r"""(?ix) \b(poem|haiku|song|lyrics|joke|recipe|bake|cook|weather|horoscope)s?\b |
    \b(novel|movie|football|world\ cup)s?\b |
    (ignore|forget|disregard|override)\b.{0,40}\b(instruction|rule|prompt|above|previous|prior) |
    \b(system\ prompt|you\ are\ now|pretend|jailbreak|DAN)\b |
    ^(?!.*(aws|amazon)).*\b(azure|gcp|google\ cloud|alibaba\ cloud|oracle\ cloud)\b"""
)


def matches(pattern, text):
    """Whether the pattern stands in the text as whole words."""
    return re.search(rf"(?i)\b(?:{pattern})\b", text)


def mended(text):
    """The text and, behind it, the AWS names that its misspelled words stand for."""
    long = [word for word in words_of(text) if len(word) >= 5 and word not in NAMES]
    names = [difflib.get_close_matches(word, NAMES, 1, 0.8) for word in long]
    meant = [name[0] for word, name in zip(long, names, strict=True) if name and name[0][0] == word[0]]
    return " ".join([text, *meant])


def topics_of(text):
    """The topics that a text names, in the order in which it does."""
    found = [(match.start(), topic) for topic in TOPICS if (match := topic.pattern.search(text))]
    return [topic for _, topic in sorted(found, key=lambda pair: pair[0])]


def small_talk(question):
    """The answer to a greeting, thanks or the like; None for anything else."""
    words = words_of(question)
    if not words or len(words) > 8 or not set(words) <= SMALL_TALK_WORDS:
        return None
    if words[0] in ("what", "how", "who", "can") and "you" not in words:  # "how much", "what for"
        return None
    return next(answer for pattern, answer in SMALL_TALK.items() if matches(pattern, question))


def earlier_topics(messages):
    """The topics of the last question, or else of the last answer, that had any."""
    for asked in ("user", "assistant"):
        for message in reversed(messages[:-1]):
            known = topics_of(text_of(message).removeprefix(DEMO_NOTE))
            if known and message["role"] == asked:
                return [topic for topic in known if topic is not COSTS] or known
    return []


def demo_answer(messages):
    """Markdown on up to three topics that the last message, or else the conversation before it, names."""
    question = mended(text_of(messages[-1]))
    if talk := small_talk(question):
        return f"{talk}\n\n{DEMO_NOTE}"
    kinds = [kind for kind, pattern in KINDS.items() if matches(pattern, question)]
    named = topics_of(question)
    if kinds[:1] in (["cost"], ["table"]):
        named = [topic for topic in named if topic is not COSTS]
    topics = named or earlier_topics(messages) or topics_of(question)
    if "table" in kinds and len(named) == 1:
        topics = list(dict.fromkeys(earlier_topics(messages)[:1] + named))
    if "table" in kinds and len(topics) < 2:
        kinds.remove("table")
    kind = (kinds or ["text" if named else "more"])[0]
    return "\n\n".join([DEMO_NOTE, *(ABOUT[kind](topics[:3]) if topics else [GENERAL])])


def about_example(topics):
    """For each topic its text and a command."""
    for topic in topics:
        yield topic.text
        yield "With the AWS CLI, this shows what you have there:"
        yield f"```bash\n{topic.command} --output table\n```"


def about_python(topics):
    """For each topic its command, said with boto3."""
    for topic in topics:
        _, client, call = topic.command.replace("s3api", "s3").split()
        lines = [
            "import boto3",
            "",
            f'client = boto3.client("{client}")',
            f"print(client.{call.replace('-', '_')}())",
        ]
        yield f"{topic.service} from Python, with boto3, the AWS SDK:"
        yield "\n".join(["```python", *lines, "```"])


def about_terraform(topics):
    """For each topic the beginning of a Terraform resource."""
    for topic in topics:
        resource, arguments = topic.terraform.split(": ", 1)
        lines = [f'resource "{resource}" "example" {{']
        indent = "  "
        for argument in arguments.split("; "):
            if argument == "}":
                indent = "  "
            lines.append(indent + argument)
            if argument.endswith("{"):
                indent = "    "
        yield f"{topic.service} in Terraform begins like this; the AWS provider's documentation has the rest."
        yield "\n".join(["```hcl", *lines, "}", "```"])


def about_table(topics):
    """The topics side by side."""
    rows = ["| AWS service | What it is for | What is billed |", "|---|---|---|"]
    for topic in topics:
        purpose = topic.text.removeprefix(topic.service).split(". ")[0].strip()
        rows.append(f"| {topic.service} | {purpose} | {topic.cost} |")
    yield f"{' and '.join(topic.service for topic in topics)} side by side:"
    yield "\n".join(rows)


def about_cost(topics):
    """For each topic what is billed."""
    for topic in topics:
        yield f"What {topic.service} costs: {topic.cost}"
    yield "Prices differ by AWS Region: the AWS Pricing Calculator has today's."


ABOUT = {
    "text": lambda topics: [topic.text for topic in topics],
    "why": lambda topics: [f"Why {topic.service}? {topic.why}" for topic in topics],
    "more": lambda topics: [f"{topic.text} {topic.why} {topic.cost}" for topic in topics],
    "example": about_example,
    "python": about_python,
    "terraform": about_terraform,
    "table": about_table,
    "cost": about_cost,
}


def demo_verdict(data):
    """What the demo's judge says: ALLOW for AWS, technology, greetings, and what follows up on AWS."""
    stage, text, earlier = judged(data)
    if OFF_TOPIC.search(text):
        return "BLOCK"
    text = mended(text)
    follows_up = TECHNICAL.search(earlier) and set(words_of(text)) <= FOLLOW_UP_WORDS
    allowed = TECHNICAL.search(text) or small_talk(text) or follows_up
    return "ALLOW" if allowed else "BLOCK"


# ---- Chat completions ----

STREAM_HEAD = """HTTP/1.1 200 OK\r
Content-Type: text/event-stream; charset=utf-8\r
Transfer-Encoding: chunked\r
{}\r\n\r\n"""
ENDLESS_HEAD = "HTTP/1.1 {} \r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"
THINK_SECONDS = 0.1  # between two signs of life
# Real providers put part of the key and host names into their errors; none of it may reach a user.
SECRET = "key sk-fa****ke at fake-host.internal"
TOOL = {"index": 0, "id": "call_fake", "type": "function", "function": {"name": "lookup", "arguments": "{}"}}


def dumps(value):
    """Compact JSON as bytes; nothing escaped that need not be."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def frame(data):
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event_of(value):
    """A JSON value as an event."""
    return b"data: %b\n\n" % dumps(value)


def twice(event):
    """The event, and before it the same as choice 1."""
    return event.replace(b'"index":0', b'"index":1') + event if b'"index":0,"delta"' in event else event


# What a fault changes in the bytes of an event.
FRAMINGS = {
    "comment": lambda event: b": PROCESSING\n\n" + event,
    "empty_data": lambda event: b"data:\n\ndata: \n\n" + event,
    "fields": lambda event: b"event: message\nid: 7\nretry: 3000\n" + event,
    "no_space": lambda event: event.replace(b"data: ", b"data:", 1),
    "crlf": lambda event: event.replace(b"\n", b"\r\n"),
    "second_choice": twice,
}
# Where a fault puts the text in a delta.
DELTAS = {
    "parts": lambda text: {"content": [{"type": "text", "text": text}]},
    "refuse": lambda text: {"refusal": text},
    "reasoning_content": lambda text: {"content": text, "reasoning_content": None},
}
# Errors in the words of real providers: status, code, message.
REFUSED = {
    "context_length": (
        400,
        "context_length_exceeded",
        "This model's maximum context length is 8192 tokens. However, your messages resulted in 9313 tokens.",
    ),
    "too_long": (400, None, "prompt is too long: 9313 tokens > 8192 maximum"),
    "gateway": (504, None, "The upstream server took too long to respond."),
    "bad_parameter": (
        400,
        "unsupported_parameter",
        "Unsupported parameter: 'temperature' is not supported with this model.",
    ),
    "bad_model": (404, "model_not_found", "The model does not exist or you do not have access to it."),
    "credits": (402, 402, "Insufficient credits. Add more to your account."),
    "quota": (
        429,
        "insufficient_quota",
        "You exceeded your current quota, please check your plan and billing details.",
    ),
    "rate_limit": (429, "rate_limit_exceeded", "Rate limit reached. Please try again in 30s."),
    "no_stream_options": (400, None, "Unrecognized request argument supplied: stream_options"),
}
CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


@functools.lru_cache(maxsize=16)
def tokens_of(text, size):
    """The text's tokens, each as a JSON string."""
    return [dumps(text[at : at + size]) for at in range(0, len(text), size)]


def units_of(text):
    """The text's UTF-16 units, each as an escaped JSON string: a character past U+FFFF becomes two halves."""
    data = text.encode("utf-16-be")
    units = [data[at : at + 2].decode("utf-16-be", "surrogatepass") for at in range(0, len(data), 2)]
    return [json.dumps(unit).encode() for unit in units]


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

    def __init__(self, connection, body, log):
        """Take a request's body; BadRequest for what the real API refuses, too."""
        self.connection = connection
        self.fake = connection.fake
        try:
            body = json.loads(body)
            self.model = body["model"]
            self.messages = body.pop("messages")
            self.options = body
            self.stream = bool(body.get("stream"))
            self.has_stream_options = "stream_options" in body
            self.usage_wanted = bool((body.get("stream_options") or {}).get("include_usage"))
            self.system = "\n".join(text_of(m) for m in self.messages if m["role"] in ("system", "developer"))
            self.question = [text_of(m) for m in self.messages if m["role"] == "user"][-1]
            self.model.encode()
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"We could not parse the JSON body of your request: {error}") from error
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            raise BadRequest(f"Missing or wrong model, messages or user message: {error!r}") from error
        self.kind = "generate" if self.stream else "judge"
        self.prepare()
        self.envelope = {
            "id": f"chatcmpl-fake{next(self.ids):08d}",
            "created": int(time.time()),
            "model": self.model,
        }
        if self.fault == "null_error":
            self.envelope["error"] = None
        self.log = {"kind": self.kind, "stream": self.stream, "model": self.model, "question": self.question}
        self.log |= {
            "messages": self.messages,
            "options": self.options,
            "tokens": 0,
            "fault": self.fault,
            "outcome": "open",
        }
        self.log |= {"started": time.monotonic(), "ended": None, **log}

    def prepare(self):
        """Set the options `o`, the `fault`, the `text` and the time at which its first token is `due`."""
        fake = self.fake
        judge = not self.stream
        self.o = o = SimpleNamespace(**fake.defaults | (directive(self.question) if fake.scripted else {}))
        self.fault = fake.fault_now(o.judge_fault if judge else o.fault, o.fault_once, self.question)
        if judge and self.fault in BROKEN_OFF:  # it has no middle to break in
            self.fault = "hang" if self.fault == "stall" else "reset_before"
        if self.fault == "no_stream_options" and not self.has_stream_options:
            self.fault = ""
        if judge:
            self.text = demo_verdict(self.question) if fake.demo else judge_text(o, self.question)
        else:
            self.text = demo_answer(self.messages) if fake.demo else answer_text(o, self.system)
        if o.think and not judge:
            self.text = f"<{o.think}>\n{THOUGHT * 3}\n</{o.think}>\n\n{self.text}"
        self.due = fake.loop.time() + (o.judge_delay if judge else o.first)

    def script(self):
        """Hang, fail before the answer, or answer."""
        if self.fault == "hang":
            yield None
        if self.fault in STATUSES or self.fault in REFUSED or self.fault in ("reset_before", "html"):
            yield self.due
            self.fail()
        elif self.fault == "endless_body":
            yield self.due
            self.connection.transport.write(ENDLESS_HEAD.format(400 if self.stream else 200).encode())
            yield from self.endless()
        else:
            yield from self.streamed() if self.stream else self.whole()

    def fail(self):
        """Fail before the answer."""
        if self.fault == "reset_before":
            self.connection.reset()
        elif self.fault == "html":
            self.connection.reply(200, b"<!doctype html><title>Sign in</title>", "text/html")
        elif self.fault in REFUSED:
            status, code, message = REFUSED[self.fault]
            self.error(status, code, message, "30" if self.fault == "rate_limit" else "")
        elif self.fault < "http4":
            location = self.o.location or "/redirected/v1/chat/completions"
            self.connection.reply(int(self.fault[4:]), b"", Location=location)
        else:
            status = int(self.fault[4:])
            code = CODES.get(status, kind_of_error(status))
            self.error(status, code, "Asked to fail", "1" if status in (429, 503) else "")

    def error(self, status, code, message, retry_after):
        """Answer with an error; what the directive says replaces its words."""
        retry_after = self.o.retry_after or retry_after
        more = {"Retry-After": retry_after} if retry_after else {}
        message = self.o.message or f"{message} ({SECRET})"
        self.connection.error(status, message, self.o.code or code, **more)

    def whole(self):
        """Script: the judge's word as one JSON object."""
        yield self.due
        self.log["tokens"] = 1
        content = {"garbage": GARBAGE, "empty": "", "refuse": None}.get(self.fault, self.text)
        if self.fault == "parts":
            content = [{"type": "text", "text": content}]
        message = {"role": "assistant", "content": content, "refusal": REFUSAL if content is None else None}
        choice = {"index": 0, "message": message, "finish_reason": FINISH.get(self.fault, "stop")}
        answer = {"object": "chat.completion", "choices": [choice], "usage": self.usage()}
        data = dumps(self.envelope | answer)
        self.connection.reply(200, data[: len(data) // 2] if self.fault == "broken_json" else data)

    def streamed(self):
        """Script: the answer as a stream of events."""
        if self.fault not in AT_ONCE:
            yield self.due
        self.head()
        yield from self.opening()
        tokens = self.tokens()
        if self.fault == "early_finish":
            yield from self.said(tokens[: self.o.after])
            yield from self.send([self.chunk({}, "stop")])
            self.due += self.o.pause
            tokens = tokens[self.o.after :]
        if self.fault == "no_newline":
            last = json.loads(tokens.pop())
        yield from self.said(tokens)
        yield self.due
        if self.fault in BROKEN_OFF:
            yield from self.broken_off()
        elif self.fault == "no_newline":
            yield from self.send([self.chunk({"content": last}, "stop").rstrip()], LAST_CHUNK)
        elif self.fault == "comments_after":
            yield from self.send(self.closing())
            yield from self.thinking()
            yield from self.send([], LAST_CHUNK)
        else:
            yield from self.send(self.closing(), LAST_CHUNK)

    def head(self):
        """Begin the response. What breaks off closes its connection, and says so."""
        self.connection.keep_alive &= self.fault not in BROKEN_OFF and self.fault != "no_done"
        line = "Connection: keep-alive" if self.connection.keep_alive else "Connection: close"
        if self.o.hang_up:
            line = "Keep-Alive: timeout=5, max=100"
        if self.fault == "cookie":
            line += "\r\nSet-Cookie: größe=1"
        self.connection.transport.write(STREAM_HEAD.format(line).encode())

    def opening(self):
        """Script: what comes before the text."""
        fault = self.fault
        events = [self.chunk({"role": "assistant", "content": ""})]
        if fault == "no_choices":
            events.insert(0, self.chunk(None))
        elif fault == "bom":
            events[0] = b"\xef\xbb\xbf" + events[0]
        elif fault == "nulls":
            events += [
                self.chunk({"content": None}),
                event_of(self.envelope | {"choices": None}),
                self.chunk({}),
            ]
            events.append(event_of(self.envelope | {"choices": [{"index": 0, "delta": None}]}))
        elif fault == "parts":
            thought = {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]}
            events.append(self.chunk({"content": [thought]}))
        elif fault == "big_event":
            events.append(event_of(self.envelope | {"choices": [], "padding": "x" * (self.o.kb * 1000)}))
        yield from self.send(events)
        if fault in THINKING:
            yield from self.thinking()
        if fault == "endless_line":
            yield from self.send([b'data: {"padding":"'])
            yield from self.endless()

    def endless(self):
        """Script: bytes without end."""
        while True:
            yield from self.send([b"x" * 65536])
            yield self.fake.loop.time() + self.o.interval

    def thinking(self):
        """Script: signs of life for `thinking` seconds."""
        event = self.chunk({"content": None, "reasoning_content": THOUGHT})
        if self.fault == "reasoning":
            event = self.chunk({"content": "", "reasoning": THOUGHT})
        elif self.fault in ("comments", "comments_after"):
            event = b": OPENROUTER PROCESSING\n\n"
        end = self.fake.loop.time() + self.o.thinking
        while self.fake.loop.time() < end:
            yield from self.send([event])
            yield min(end, self.fake.loop.time() + THINK_SECONDS)
        self.due = max(self.due, end)

    def tokens(self):
        """The pieces of the text, each as a JSON string."""
        if self.fault == "halves":
            return units_of(self.text)
        tokens = list(tokens_of(self.text, self.o.size))
        if self.fault == "lone_half":
            tokens.insert(0, b'"\\ud83d"')
        return tokens[: self.o.after] if self.fault in CUT_SHORT else tokens

    def said(self, tokens):
        """Script: the tokens, each when it is due."""
        delta = DELTAS.get(self.fault, lambda text: {"content": text})
        before, after = self.chunk(delta("@")).split(b'"@"')
        for at in range(0, len(tokens), self.o.burst):
            yield self.due
            events = [before + token + after for token in tokens[at : at + self.o.burst]]
            self.log["tokens"] += len(events)
            yield from self.send(events)
            self.due += self.o.interval

    def broken_off(self):
        """Script: an end in the middle."""
        error = f"The server had an error: {SECRET}"
        if self.fault == "stall":
            yield None
        elif self.fault == "reset":
            self.connection.reset()
        elif self.fault == "eof":
            yield from self.send([], LAST_CHUNK)
        elif self.fault == "error_text":
            yield from self.send([event_of({"error": error})], LAST_CHUNK)
        elif self.fault == "error_event":
            yield from self.send(
                [event_of({"error": {"message": error, "code": "server_error"}})], LAST_CHUNK
            )

    def closing(self):
        """The last events of an answer that was not broken off."""
        if self.fault == "broken_json":
            yield b'data: {"id":"chatcmpl-fake","choices":[{"index":0,"del\n\n'
        if self.fault == "tools":
            yield self.chunk({"tool_calls": [TOOL]})
        if self.fault not in ("no_finish", "done_no_newline", "early_finish"):
            yield self.chunk({}, self.o.finish or FINISH.get(self.fault, "stop"))
        if self.usage_wanted and self.o.usage:
            yield self.chunk(None, usage=self.usage())
        if self.fault == "done_no_newline":
            yield DONE.rstrip()
        elif self.fault != "no_done":
            yield DONE

    def send(self, events, end=b""):
        """Script: write the events in one go, each a chunk of the body; `split`: each byte by itself."""
        write = self.connection.transport.write
        if framing := FRAMINGS.get(self.fault):
            events = [framing(event) for event in events]
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
        return event_of(self.envelope | chunk)

    def usage(self):
        """What it cost; a token of the prompt has four characters."""
        asked = sum(len(text_of(m)) for m in self.messages) // 4 + 1
        done = self.log["tokens"]
        return {"prompt_tokens": asked, "completion_tokens": done, "total_tokens": asked + done}


# ---- Server ----

ROUTES = {
    "/v1/chat/completions": "POST",
    "/redirected/v1/chat/completions": "POST",  # where redirects lead
    "/v1/models": "GET",
    "/stats": "GET",
    "/requests": "GET",
    "/stats/reset": "POST",
}
DYING_SECONDS = 0.01  # from the end of a stream to the end of its connection; stands for a slow network


def kind_of_error(status):
    """OpenAI's word for errors of a status."""
    return "server_error" if status >= 500 else "invalid_request_error"


class Connection(asyncio.Protocol):
    """A client's connection: answers HTTP/1.1 requests one at a time, at once or by a chat's script."""

    numbers = itertools.count(1)

    def __init__(self, fake):
        self.fake = fake
        self.number = next(self.numbers)
        self.requests = 0  # that came on it
        self.inbox = bytearray()
        self.keep_alive = True
        self.dying = 0  # its stream's hang_up=: whatever comes now is lost
        self.chat = None  # the running one, and its script
        self.script = None
        self.paused = False  # the client reads too slowly
        self.held = False  # the script is due, but paused
        self.idle_timer = None

    def connection_made(self, transport):
        self.transport = transport
        self.fake.connections.add(self)
        self.wait_idle()

    def connection_lost(self, error):
        self.fake.connections.discard(self)
        self.stop_waiting()
        if self.script:
            self.end("aborted")

    def eof_received(self):
        self.transport.abort()  # who stops writing has gone; a close that waits for the buffer would hide it

    def data_received(self, data):
        self.inbox += data
        self.next_request()

    def wait_idle(self):
        """Close the connection if no request comes in time."""
        self.stop_waiting()
        if self.fake.idle:
            self.idle_timer = self.fake.loop.call_later(self.fake.idle, self.transport.close)

    def stop_waiting(self):
        if self.idle_timer:
            self.idle_timer.cancel()
            self.idle_timer = None

    def next_request(self):
        """Answer the next request if a whole one is here and none is being answered."""
        head_end = self.inbox.find(b"\r\n\r\n")
        if self.script or head_end < 0 or self.transport.is_closing():
            return
        request, *lines = self.inbox[:head_end].decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        method, _, target = request.removesuffix(" HTTP/1.1").partition(" ")
        length = headers.get("content-length", "0")
        if (
            request.count(" ") != 2
            or " " in target
            or "transfer-encoding" in headers
            or not length.isdecimal()
        ):
            self.keep_alive = False
            self.error(400, "This server takes HTTP/1.1 with a Content-Length.")
            self.transport.close()
        elif len(self.inbox) >= (end := head_end + 4 + int(length)):
            body = bytes(self.inbox[head_end + 4 : end])
            del self.inbox[:end]
            self.keep_alive = headers.get("connection", "").lower() != "close"
            self.requests += 1
            self.stop_waiting()
            self.answer(method, target, headers.get("authorization", ""), body)

    def answer(self, method, target, authorization, body):
        """Answer a request, or start the script that does."""
        path = target.partition("?")[0]
        self.fake.http[f"{method} {path}" if path in ROUTES else "other"] += 1
        if method != ROUTES.get(path):
            self.error(405 if path in ROUTES else 404, f"No such route: {method} {path}")
        elif "/v1/" in path and self.fake.key and authorization != f"Bearer {self.fake.key}":
            self.error(401, "Incorrect API key provided.")
        elif path.endswith("/chat/completions"):
            log = {"target": target, "authorized": bool(authorization)}
            log |= {"connection": self.number, "nth": self.requests}
            self.begin(body, log)
        else:
            self.reply(200, dumps(self.fake.report(path)))
        if self.script:
            self.wake(self.script)
        else:
            self.end("finished")

    def begin(self, body, log):
        """Begin a chat completion, or refuse it."""
        try:
            self.chat = Chat(self, body, log)
        except BadRequest as error:
            self.error(400, str(error))
            return
        if log["target"].startswith("/redirected") and self.chat.fault < "http4":
            self.chat.fault = ""
        self.fake.logs.append(self.chat.log)
        self.fake.calls[self.chat.kind] += 1
        self.script = self.chat.script()
        if self.dying:
            self.hang_up()
            self.end("dropped")

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
        """The answer is over: finished, aborted by the client or dropped. On to the next request."""
        if self.script:
            self.script.close()
            self.chat.log |= {"outcome": outcome, "ended": time.monotonic()}
            self.fake.streams[outcome] += self.chat.stream
            if self.chat.stream and self.chat.o.hang_up:
                self.dying = self.chat.o.hang_up
                self.fake.loop.call_later(DYING_SECONDS, self.hang_up)
        self.chat = None
        self.script = None
        self.held = False
        if not self.keep_alive:
            self.transport.close()
        elif not self.transport.is_closing():
            self.wait_idle()
            self.fake.loop.call_soon(self.next_request)

    def error(self, status, message, code=None, **headers):
        """Answer with an error in OpenAI's form."""
        kind = kind_of_error(status)
        error = {"message": message, "type": kind, "param": None, "code": code}
        self.reply(status, dumps({"error": error}), **headers)

    def reply(self, status, data, content_type="application/json", **headers):
        """Write a whole response."""
        headers |= {"Content-Type": content_type, "Content-Length": len(data)}
        headers |= {} if self.keep_alive else {"Connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{head}\r\n".encode() + data)

    def hang_up(self):
        """End the connection without a word."""
        if self.dying == 2 and not self.transport.is_closing():
            self.reset()
        self.transport.close()

    def reset(self):
        """Drop the connection with a RST."""
        raw = self.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class Fake:
    """The running server: `base_url`, `await close()`, its clock and what it has seen."""

    def __init__(self, scripted, key, idle, defaults):
        self.scripted = scripted
        self.key = key
        self.idle = idle
        self.loop = asyncio.get_running_loop()
        self.demo = not scripted and "tokens" not in defaults
        self.defaults = DEFAULTS | (DEMO_PACE if self.demo else {}) | defaults
        self.slots = {}
        self.connections = set()
        self.forget()

    def forget(self):
        """Set the statistics back; what is open stays open."""
        self.calls = {"generate": 0, "judge": 0}
        self.streams = {"finished": 0, "aborted": 0, "dropped": 0}
        self.http = collections.Counter()
        self.logs = collections.deque(maxlen=500)
        self.failed = set()

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
            "http": self.http,
            "streams_open": sum(bool(c.chat and c.chat.stream) for c in self.connections),
            "streams_finished": self.streams["finished"],
            "streams_aborted": self.streams["aborted"],
            "streams_dropped": self.streams["dropped"],
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


async def start(host="127.0.0.1", port=0, *, scripted=False, key=None, idle=0, **defaults):
    """Serve in the running loop; `defaults` as in DEFAULTS, where `tokens=` means fixed answers, no demo."""
    if unknown := defaults.keys() - DEFAULTS:
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
    fake = Fake(scripted, key, idle, defaults)
    fake.server = await fake.loop.create_server(lambda: Connection(fake), host, port, backlog=4096)
    fake.base_url = f"http://{host}:{fake.server.sockets[0].getsockname()[1]}/v1"
    return fake


def start_in_thread(**options):
    """Serve, as start() does, in a daemon thread with a loop of its own; the base URL."""
    started = concurrent.futures.Future()

    async def serve_for_ever():
        try:
            fake = await start(**options)
        except Exception as error:
            started.set_exception(error)
        else:
            started.set_result(fake.base_url)
            await asyncio.Event().wait()

    threading.Thread(target=lambda: asyncio.run(serve_for_ever()), name="fake_openai", daemon=True).start()
    return started.result()


async def serve(options):
    """Serve until SIGTERM or SIGINT."""
    fake = await start(**options)
    stop = asyncio.Event()
    print(fake.base_url, flush=True)
    for name in (signal.SIGTERM, signal.SIGINT):
        fake.loop.add_signal_handler(name, stop.set)
    await stop.wait()
    await fake.close()


def parse_arguments():
    """The command line as options of start()."""
    table = "\n".join(f"    {name:18} {what}" for name, what in FAULTS.items())
    parser = argparse.ArgumentParser(
        epilog=f"{__doc__}\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options]",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8099)
    parser.add_argument("--scripted", action="store_true")
    parser.add_argument("--key")
    parser.add_argument("--idle", type=float, default=0)
    parser.add_argument("--hang-up", action="store_const", const=1, default=argparse.SUPPRESS)
    for name in DEFAULTS.keys() - {"hang_up"}:
        option = "--" + name.replace("_", "-")
        parser.add_argument(
            option, type=type(DEFAULTS[name]), default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return vars(parser.parse_args())


def main():
    """Allow many open files, serve on the fastest loop there is."""
    options = parse_arguments()
    new_event_loop = None
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
