-- What awschat 1.0.0 left behind: its schema.sql, word for word, and turns that it has run, one of each status.
-- The last one was running when its process was killed. Made by running 1.0.0; test_awschat.py takes it over.

-- awschat's database, applied whole at every start, by any number of replicas at once: every statement may run again.
-- One row is one turn, so a question can't lose its reply and a history can't be malformed. Every key starts with
-- (owner, session_id): a turn touches one shard of a distributed PostgreSQL.

-- First of all, queue up: CREATE ... IF NOT EXISTS is not safe against itself, two at once can both find nothing and collide.
-- Held until the transaction that runs this file ends.
SELECT pg_advisory_xact_lock(hashtext('awschat schema'));

CREATE TABLE IF NOT EXISTS turns (
    owner             text        NOT NULL,  -- name of the API key; 'everyone' without keys
    session_id        text        NOT NULL,  -- chosen by the client
    number            bigint      NOT NULL,  -- 1, 2, 3, ... within the session; a turn that was retried leaves a gap
    id                text        NOT NULL,  -- one attempt, never reused: a late writer can't hit a newer turn's row
    idempotency_key   text,
    question          text        NOT NULL,
    reply             text        NOT NULL DEFAULT '',  -- what was shown so far; once finished, the authoritative reply
    status            text        NOT NULL DEFAULT 'running'
        CHECK (status IN ('running', 'complete', 'refused', 'stopped', 'truncated', 'failed')),
    error             text,                  -- what the user was told, for failed turns
    verdicts          jsonb,                 -- the guard's, in order: [[decision, reason, stage], ...]
    usage             jsonb,                 -- as the provider counted it
    model             text,
    lease_until       timestamptz NOT NULL,  -- renewed while the turn's process lives; past it the turn is nobody's
    stop_requested    timestamptz,          -- when its turn was asked to stop
    created_at        timestamptz NOT NULL DEFAULT now(),
    finished_at       timestamptz,
    -- Of the verdict that decided; stage: rules | question | answer | leak, decision: allow | block | unsure.
    guard_stage       text    GENERATED ALWAYS AS (verdicts -> -1 ->> 2) STORED,
    guard_decision    text    GENERATED ALWAYS AS (verdicts -> -1 ->> 0) STORED,
    guard_reason      text    GENERATED ALWAYS AS (verdicts -> -1 ->> 1) STORED,
    prompt_tokens     integer GENERATED ALWAYS AS ((usage ->> 'prompt_tokens')::integer) STORED,
    completion_tokens integer GENERATED ALWAYS AS ((usage ->> 'completion_tokens')::integer) STORED,
    -- Also serves every read: history, paging and resume walk it backwards from a session's newest turn.
    PRIMARY KEY (owner, session_id, number)
) WITH (fillfactor = 70);  -- room in each page for the one-a-second updates of running turns (HOT: no index is touched)

-- At most one running turn a session, whatever the code believes. Also finds the few running rows among millions.
CREATE UNIQUE INDEX IF NOT EXISTS turns_running ON turns (owner, session_id) WHERE status = 'running';

-- One turn for one Idempotency-Key, and the way to find it.
CREATE UNIQUE INDEX IF NOT EXISTS turns_key ON turns (owner, session_id, idempotency_key) WHERE idempotency_key IS NOT NULL;

-- For retention, which erases the oldest first.
CREATE INDEX IF NOT EXISTS turns_age ON turns (created_at);

-- The leaky buckets of the rate limit: one row for an owner or address, empty again at empty_at.
CREATE TABLE IF NOT EXISTS rate_limits (
    bucket   text        PRIMARY KEY,
    empty_at timestamptz NOT NULL
);

-- A message table for clients that know one: two rows a turn; where nothing was answered, what the user was told.
CREATE OR REPLACE VIEW chat_messages AS
    SELECT session_id, message.role, message.content, message.created_at, owner, number, message.id, status
    FROM turns, LATERAL (VALUES (2 * number, 'user', question, created_at),
        (2 * number + 1, 'assistant', coalesce(nullif(reply, ''), error, ''), coalesce(finished_at, created_at))
    ) AS message (id, role, content, created_at)
    WHERE message.content <> '';

-- Claims a session for a new turn, all or nothing. Outcomes:
--   claimed  the question is stored as this turn, running; the caller must run it, with this history:
--            [[question, reply], ...], at most history_chars of them, oldest first
--   repeat   the request repeats this turn, running or finished: watch that one
--   busy     this turn runs, and has been asked to stop: claim again in a moment
-- A refusal is an exception whose SQLSTATE is AW and the HTTP status, its detail the seconds to wait.
CREATE OR REPLACE FUNCTION claim_turn(
    new_owner text, new_session text, new_id text, new_question text, new_key text, lease_seconds double precision,
    history_chars bigint, rate_bucket text, per_minute integer)
RETURNS TABLE (outcome text, turn_id text, turn_number bigint, history json) LANGUAGE plpgsql AS $$
DECLARE
    twin turns;
    ongoing turns;
    drip interval;  -- the time in which one turn leaks out of a bucket that holds a minute's worth
    until timestamptz;
    place bigint;
BEGIN
    -- One claim at a time in one session: what is read here still holds at the INSERT.
    PERFORM pg_advisory_xact_lock(hashtextextended(new_owner || chr(10) || new_session, 0));
    PERFORM end_expired_turns(new_owner, new_session);

    SELECT * INTO twin FROM turns WHERE owner = new_owner AND session_id = new_session AND idempotency_key = new_key;
    IF twin.question <> new_question THEN
        RAISE EXCEPTION 'This Idempotency-Key belongs to another message. Please make a new one.'
            USING ERRCODE = 'AW422';
    ELSIF twin.status <> 'failed' THEN
        RETURN QUERY SELECT 'repeat', twin.id, twin.number, NULL::json;
        RETURN;
    END IF;

    SELECT * INTO ongoing FROM turns WHERE owner = new_owner AND session_id = new_session AND status = 'running';
    IF ongoing.question = new_question THEN
        RETURN QUERY SELECT 'repeat', ongoing.id, ongoing.number, NULL::json;
        RETURN;
    END IF;

    -- Before the running turn is asked to stop: a message that is refused here must not end it.
    IF per_minute > 0 THEN
        drip := interval '1 minute' / per_minute;
        INSERT INTO rate_limits AS b VALUES (rate_bucket, now() + drip)
            ON CONFLICT (bucket) DO UPDATE SET empty_at = greatest(b.empty_at, now()) + drip
            WHERE greatest(b.empty_at, now()) + drip <= now() + interval '1 minute';
        IF NOT FOUND THEN
            SELECT empty_at + drip - interval '1 minute' INTO until FROM rate_limits WHERE bucket = rate_bucket;
            RAISE EXCEPTION 'Too many questions. Please wait % s.', ceil(extract(epoch FROM until - now()))
                USING ERRCODE = 'AW429', DETAIL = ceil(extract(epoch FROM until - now()));
        END IF;
    END IF;

    IF ongoing.stop_requested < now() - interval '2 seconds' THEN  -- its process hangs, or is dead: it lost its lease
        UPDATE turns SET lease_until = '-infinity'
            WHERE owner = new_owner AND session_id = new_session AND number = ongoing.number;
        PERFORM end_expired_turns(new_owner, new_session);
    ELSIF ongoing.id IS NOT NULL THEN
        UPDATE turns SET stop_requested = coalesce(stop_requested, now())
            WHERE owner = new_owner AND session_id = new_session AND number = ongoing.number;
        RETURN QUERY SELECT 'busy', ongoing.id, ongoing.number, NULL::json;
        RETURN;
    END IF;

    -- A retry takes the failed attempt's place, so the history shows the question once.
    DELETE FROM turns WHERE owner = new_owner AND session_id = new_session AND number = twin.number;
    SELECT coalesce(max(number), 0) + 1 INTO place FROM turns WHERE owner = new_owner AND session_id = new_session;
    INSERT INTO turns (owner, session_id, number, id, idempotency_key, question, lease_until)
        VALUES (new_owner, new_session, place, new_id, new_key, new_question, now() + make_interval(secs => lease_seconds));

    -- What the model is shown: the newest turns that fit, whole, oldest first.
    RETURN QUERY SELECT 'claimed', new_id, place, coalesce(json_agg(json_build_array(question, reply) ORDER BY number), '[]')
        FROM (SELECT *, sum(length(question) + length(reply)) OVER (ORDER BY number DESC) AS chars FROM turns
            WHERE owner = new_owner AND session_id = new_session AND number BETWEEN place - 50 AND place - 1
                AND status IN ('complete', 'truncated', 'stopped')) AS latest
        WHERE chars <= history_chars;
END $$;

-- Ends a session's turn whose process has died: its lease ran out. What it had said stays.
CREATE OR REPLACE FUNCTION end_expired_turns(in_owner text, in_session text) RETURNS void LANGUAGE sql AS $$
    UPDATE turns SET status = 'failed', finished_at = now(),
        error = 'The service was interrupted while it answered. Please send the message again.'
    WHERE owner = in_owner AND session_id = in_session AND status = 'running' AND lease_until < now();
$$;

-- Upkeep, by one replica at a time: the history shows a dead turn as failed even if its session is never used again
-- (half a minute late, so that turns which outlive a lost database renew their lease first); old turns go, a few at a time.
CREATE OR REPLACE FUNCTION tidy_up(retention_days integer) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('awschat upkeep')) THEN
        RETURN;
    END IF;
    PERFORM end_expired_turns(owner, session_id) FROM turns
        WHERE status = 'running' AND lease_until < now() - interval '30 seconds';
    DELETE FROM rate_limits WHERE empty_at < now();
    DELETE FROM turns WHERE retention_days > 0 AND (owner, session_id, number) IN (
        SELECT owner, session_id, number FROM turns
        WHERE created_at < now() - make_interval(days => retention_days) AND status <> 'running'
        ORDER BY created_at LIMIT 500);
END $$;

INSERT INTO turns (owner, session_id, number, id, idempotency_key, question, reply, status, error, verdicts, usage, model, lease_until, stop_requested, created_at, finished_at)
    VALUES ('everyone', 'first steps', '1', 'b8e77c35259f84e22e9d744a7c338f00', 'key-1', 'What is S3?', 'Amazon S3 keeps objects in buckets.', 'complete', NULL, '[["allow", "names s3", "rules"]]', '{"total_tokens": 341, "prompt_tokens": 332, "completion_tokens": 9}', 'gpt-4.1-mini', '2026-11-26 23:36:17.811406+00', NULL, '2026-11-26 23:36:07.811406+00', '2026-11-26 23:36:07.867142+00');
INSERT INTO turns (owner, session_id, number, id, idempotency_key, question, reply, status, error, verdicts, usage, model, lease_until, stop_requested, created_at, finished_at)
    VALUES ('everyone', 'first steps', '2', 'aace61d04196fbcb41c0969d9e8ff3bc', NULL, 'And EC2?', 'Amazon EC2 runs virtual machines; an AMI is their template.', 'complete', NULL, '[["allow", "names ec2", "rules"]]', '{"total_tokens": 385, "prompt_tokens": 370, "completion_tokens": 15}', 'gpt-4.1-mini', '2026-11-26 23:36:18.01823+00', NULL, '2026-11-26 23:36:08.01823+00', '2026-11-26 23:36:08.065636+00');
INSERT INTO turns (owner, session_id, number, id, idempotency_key, question, reply, status, error, verdicts, usage, model, lease_until, stop_requested, created_at, finished_at)
    VALUES ('everyone', 'off scope', '1', 'b6d6689e3ed4f66a1531799c65b526a7', 'key-2', 'How do I bake a sourdough bread?', 'I can only help with Amazon Web Services. Please ask me something about AWS.', 'refused', NULL, '[["block", "no AWS term", "rules"]]', '{}', 'gpt-4.1-mini', '2026-11-26 23:36:18.189834+00', NULL, '2026-11-26 23:36:08.189834+00', '2026-11-26 23:36:08.191999+00');
INSERT INTO turns (owner, session_id, number, id, idempotency_key, question, reply, status, error, verdicts, usage, model, lease_until, stop_requested, created_at, finished_at)
    VALUES ('everyone', 'first steps', '3', 'fcd8e781d313c81342b99071fc691ef5', 'key-3', 'How does S3 bill? ☁🪣', '**Amazon S3** stores objects in buckets, designe

(The answer was cut at the length limit. Ask me to continue.)', 'truncated', NULL, '[["allow", "names s3", "rules"]]', '{"total_tokens": 427, "prompt_tokens": 415, "completion_tokens": 12}', 'gpt-4.1-mini', '2026-11-26 23:36:18.317541+00', NULL, '2026-11-26 23:36:08.317541+00', '2026-11-26 23:36:08.363583+00');
INSERT INTO turns (owner, session_id, number, id, idempotency_key, question, reply, status, error, verdicts, usage, model, lease_until, stop_requested, created_at, finished_at)
    VALUES ('everyone', E'mixed ''quotes'' \\ 名前', '1', 'f5bb1afd768da9e0db604597cf332cea', 'key-4', 'What is S3 Glacier?', '**Amazon S3*', 'failed', 'The connection to the model provider broke. Please try again.', '[["allow", "names s3 glacier", "rules"]]', '{}', 'gpt-4.1-mini', '2026-11-26 23:36:18.483093+00', NULL, '2026-11-26 23:36:08.483093+00', '2026-11-26 23:36:08.508433+00');
INSERT INTO turns (owner, session_id, number, id, idempotency_key, question, reply, status, error, verdicts, usage, model, lease_until, stop_requested, created_at, finished_at)
    VALUES ('everyone', E'mixed ''quotes'' \\ 名前', '2', '4898b351965032f6b4cce307a3152f0f', NULL, 'What is S3 Glacier?', '', 'failed', 'The model provider has a problem. Please try again soon.', '[["allow", "names s3 glacier", "rules"]]', '{}', 'gpt-4.1-mini', '2026-11-26 23:36:18.696318+00', NULL, '2026-11-26 23:36:08.696318+00', '2026-11-26 23:36:08.716631+00');
INSERT INTO turns (owner, session_id, number, id, idempotency_key, question, reply, status, error, verdicts, usage, model, lease_until, stop_requested, created_at, finished_at)
    VALUES ('everyone', E'mixed ''quotes'' \\ 名前', '3', 'c217fd7cd7a356f917d554dc61c28473', NULL, 'What is S3 Glacier?', 'Amazon S3 Glacier keeps archives; S3 Lifecycle moves objects there.', 'complete', NULL, '[["allow", "names s3 glacier", "rules"]]', '{"total_tokens": 359, "prompt_tokens": 342, "completion_tokens": 17}', 'gpt-4.1-mini', '2026-11-26 23:36:18.862935+00', NULL, '2026-11-26 23:36:08.862935+00', '2026-11-26 23:36:08.928922+00');
INSERT INTO turns (owner, session_id, number, id, idempotency_key, question, reply, status, error, verdicts, usage, model, lease_until, stop_requested, created_at, finished_at)
    VALUES ('everyone', 'stopped early', '1', '20ea8cdeb5b8a969dffb20daa2c1c8b7', NULL, 'How does S3 replicate?', '**Amazon S3** stores objects in buckets, designed for eleven nines of durability. New S3 buckets block public access by default.', 'stopped', NULL, '[["allow", "names s3", "rules"]]', '{}', 'gpt-4.1-mini', '2026-11-26 23:36:19.95143+00', '2026-11-26 23:36:10.624063+00', '2026-11-26 23:36:09.061893+00', '2026-11-26 23:36:10.636796+00');
INSERT INTO turns (owner, session_id, number, id, idempotency_key, question, reply, status, error, verdicts, usage, model, lease_until, stop_requested, created_at, finished_at)
    VALUES ('alice', 'first steps', '1', 'aa54503ad74b0776a6d77f0fb8aa791d', 'key-1', 'What is VPC in AWS?', 'Amazon VPC is a network of your own for EC2.', 'complete', NULL, '[["allow", "names vpc", "rules"]]', '{"total_tokens": 348, "prompt_tokens": 337, "completion_tokens": 11}', 'gpt-4.1-mini', '2026-11-26 23:36:26.511449+00', NULL, '2026-11-26 23:36:16.511449+00', '2026-11-26 23:36:16.562024+00');
INSERT INTO turns (owner, session_id, number, id, idempotency_key, question, reply, status, error, verdicts, usage, model, lease_until, stop_requested, created_at, finished_at)
    VALUES ('everyone', 'cut off', '1', '309fd5535bdef0236f970440237eb0a0', NULL, 'How do S3 events work?', '**Amazon S3** stores objects in buckets, designed for eleven nines of durability. New S3 buckets block public access by default. S3 Lifecycle rules move cold objects to S3 Glacier.

**AWS Lambda**', 'running', NULL, NULL, NULL, NULL, '2026-11-26 23:36:34.767134+00', NULL, '2026-11-26 23:36:22.26687+00', NULL);
