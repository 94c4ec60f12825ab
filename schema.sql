-- awschat's database. Any number of replicas may apply this file, at once and again: every statement may run twice.
-- One row is one turn, so a question cannot lose its reply and no history can be malformed. A row belongs to its turn
-- until it is erased: its number is never used again. Every key starts with (owner, session_id), so a turn touches one
-- shard of a distributed PostgreSQL. What must be atomic is a function here; the module calls it.

-- Replicas queue up here, until the transaction that runs this file ends: two CREATE ... IF NOT EXISTS at one instant
-- can both find nothing and collide.
SELECT pg_advisory_xact_lock(hashtext('awschat schema'));

DO $$ BEGIN
    IF current_setting('server_encoding') <> 'UTF8' THEN
        RAISE EXCEPTION 'The database % is encoded in %. awschat needs UTF8: CREATE DATABASE ... ENCODING ''UTF8'' TEMPLATE template0.',
            current_database(), current_setting('server_encoding') USING ERRCODE = 'feature_not_supported';
    END IF;
END $$;

-- The versions of this file that have been applied. A replica sends the file only if its own is not among them.
CREATE TABLE IF NOT EXISTS schema_versions (
    hash       text        PRIMARY KEY,  -- MD5 of the file
    applied_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE IF NOT EXISTS turns (
    owner             text        NOT NULL,  -- name of the API key; 'everyone' without keys
    session_id        text        NOT NULL,  -- chosen by the client
    number            bigint      NOT NULL,  -- names the turn: from one sequence, so it grows within a session
    idempotency_key   text,
    question          text        NOT NULL,
    reply             text        NOT NULL DEFAULT '',  -- what is visible so far; once finished, the authoritative reply
    status            text        NOT NULL DEFAULT 'running'
        CHECK (status IN ('running', 'complete', 'refused', 'stopped', 'truncated', 'failed')),
    error             text,                  -- what the user was told, for failed turns
    verdicts          jsonb,                 -- the guard's, in order: [[decision, reason, stage], ...]
    usage             jsonb,                 -- as the provider counted it
    model             text,
    lease_until       timestamptz NOT NULL,  -- renewed while the turn's process lives; past it the turn is dead
    stop_requested    timestamptz,           -- when somebody asked the turn to stop
    created_at        timestamptz NOT NULL DEFAULT now(),
    finished_at       timestamptz,
    -- Of the verdict that decided; decision: allow | block | unsure, stage: rules | question | answer.
    guard_stage       text    GENERATED ALWAYS AS (verdicts -> -1 ->> 2) STORED,
    guard_decision    text    GENERATED ALWAYS AS (verdicts -> -1 ->> 0) STORED,
    guard_reason      text    GENERATED ALWAYS AS (verdicts -> -1 ->> 1) STORED,
    prompt_tokens     integer GENERATED ALWAYS AS ((usage ->> 'prompt_tokens')::integer) STORED,
    completion_tokens integer GENERATED ALWAYS AS ((usage ->> 'completion_tokens')::integer) STORED,
    -- Also serves every read: history, paging and resume walk it backwards from a session's newest turn.
    PRIMARY KEY (owner, session_id, number)
) WITH (fillfactor = 70);  -- room in each page for the one-a-second updates of running turns (HOT: no index is touched)

-- Takes over a database of 1.0.0, which counted 1, 2, 3, ... in each session and named attempts by an id.
ALTER TABLE turns DROP COLUMN IF EXISTS id;
DROP INDEX IF EXISTS turns_running;
DROP FUNCTION IF EXISTS claim_turn(text, text, text, text, text, double precision, bigint, text, integer);
DROP FUNCTION IF EXISTS end_expired_turns(text, text);
DO $$ BEGIN
    IF to_regclass('turn_numbers') IS NULL THEN
        CREATE SEQUENCE turn_numbers;
        PERFORM setval('turn_numbers', (SELECT coalesce(max(number), 0) + 1 FROM turns), false);
    END IF;
END $$;
ALTER TABLE turns ALTER COLUMN number SET DEFAULT nextval('turn_numbers');

-- At most one running turn a session that was not asked to stop, whatever the code believes. Also finds it.
CREATE UNIQUE INDEX IF NOT EXISTS turns_current ON turns (owner, session_id) WHERE status = 'running' AND stop_requested IS NULL;

-- Finds the few running turns among millions.
CREATE INDEX IF NOT EXISTS turns_running_now ON turns (owner, session_id, number) WHERE status = 'running';

-- One turn for one Idempotency-Key, and the way to find it.
CREATE UNIQUE INDEX IF NOT EXISTS turns_key ON turns (owner, session_id, idempotency_key) WHERE idempotency_key IS NOT NULL;

-- For retention, which erases the oldest first.
CREATE INDEX IF NOT EXISTS turns_age ON turns (created_at);

-- The leaky buckets of the rate limit: one row for an owner or address, empty again at empty_at.
CREATE TABLE IF NOT EXISTS rate_limits (
    bucket   text        PRIMARY KEY,
    empty_at timestamptz NOT NULL
);

-- Turns as every reader sees them: one whose process has died, so that its lease ran out, has failed.
CREATE OR REPLACE VIEW turns_as_read AS
    SELECT owner, session_id, number, idempotency_key, question, created_at, finished_at,
        CASE WHEN status = 'refused' THEN '' ELSE reply END AS reply,
        CASE WHEN dead THEN 'failed' ELSE status END AS status,
        -- what the reader was told instead of a reply, or after the beginning of one
        CASE WHEN dead THEN 'The service was interrupted while it answered. Please send the message again.'
            WHEN status = 'refused' THEN reply ELSE coalesce(error, '') END AS notice
    FROM turns, LATERAL (SELECT status = 'running' AND lease_until < now() AS dead) AS lease;

-- A message table for clients that know one: two rows a turn; where nothing was answered, what the user was told.
CREATE OR REPLACE VIEW chat_messages AS
    SELECT session_id, message.role, message.content, message.created_at, owner, number, message.id, status
    FROM turns_as_read, LATERAL (VALUES (2 * number, 'user', question, created_at),
        (2 * number + 1, 'assistant', coalesce(nullif(reply, ''), notice), coalesce(finished_at, created_at))
    ) AS message (id, role, content, created_at)
    WHERE message.content <> '';

-- Who uses how much: a row for an owner and a day (UTC). Tokens are those of the answers, as the provider counted them;
-- the judging model's are not among them.
CREATE OR REPLACE VIEW usage_by_day AS
    SELECT owner, (created_at AT TIME ZONE 'UTC')::date AS day, count(*) AS turns,
        coalesce(sum(prompt_tokens), 0) AS tokens_in, coalesce(sum(completion_tokens), 0) AS tokens_out,
        count(*) FILTER (WHERE status = 'refused') AS refused,
        count(*) FILTER (WHERE status = 'failed' OR (status = 'running' AND lease_until < now())) AS failed
    FROM turns GROUP BY owner, day;

-- In the functions below, a refusal is an exception whose SQLSTATE is AW and the HTTP status that the client gets; its
-- detail, if there is one, is the number of seconds to wait.

-- Claims a session for a new turn, all or nothing, and never waits for the turn that runs there: that one is asked to
-- stop and commits its own end when it learns of it. So the order of claims decides which message is the last.
--   history     [[question, reply], ...] for the model, oldest first, at most history_chars of them: the question is
--               stored as turn_number, and the caller must run it
--               NULL: the request repeats turn_number, running or finished; watch that one
--   superseded  the turn that was asked to stop, or NULL
CREATE OR REPLACE FUNCTION claim_turn(
    new_owner text, new_session text, new_question text, new_key text, lease_seconds double precision,
    history_chars bigint, rate_bucket text, per_minute integer)
RETURNS TABLE (turn_number bigint, history json, superseded bigint) LANGUAGE plpgsql AS $$
DECLARE
    twin turns_as_read;
    drip interval;  -- the time in which one turn leaks out of a bucket that holds a minute's worth
    wait integer;
BEGIN
    IF new_key !~ '^[!-~]{1,128}$' THEN
        RAISE EXCEPTION 'Idempotency-Key: send 1 to 128 visible ASCII characters.' USING ERRCODE = 'AW422';
    END IF;
    -- One claim at a time in one session: what is read here still holds at the INSERT.
    PERFORM pg_advisory_xact_lock(hashtextextended(new_owner || chr(10) || new_session, 0));

    -- The request repeats a turn if it has that turn's key, or the message of the one that runs.
    SELECT * INTO twin FROM turns_as_read WHERE owner = new_owner AND session_id = new_session AND idempotency_key = new_key;
    IF twin.question <> new_question THEN
        RAISE EXCEPTION 'This Idempotency-Key belongs to another message. Please make a new one.' USING ERRCODE = 'AW422';
    ELSIF twin.number IS NULL OR twin.status = 'failed' THEN
        SELECT number INTO turn_number FROM turns WHERE owner = new_owner AND session_id = new_session
            AND status = 'running' AND stop_requested IS NULL AND lease_until > now() AND question = new_question;
    ELSE
        turn_number := twin.number;
    END IF;
    IF turn_number IS NOT NULL THEN
        RETURN NEXT;
        RETURN;
    END IF;

    -- Before the running turn is asked to stop: a message that is refused here must not end it.
    IF per_minute > 0 THEN
        drip := interval '1 minute' / per_minute;
        INSERT INTO rate_limits AS b VALUES (rate_bucket, now() + drip)
            ON CONFLICT (bucket) DO UPDATE SET empty_at = greatest(b.empty_at, now()) + drip
            WHERE greatest(b.empty_at, now()) + drip <= now() + interval '1 minute';
        IF NOT FOUND THEN
            SELECT ceil(extract(epoch FROM empty_at + drip - interval '1 minute' - now())) INTO wait
                FROM rate_limits WHERE bucket = rate_bucket;
            RAISE EXCEPTION 'Too many questions. Please wait % s.', wait USING ERRCODE = 'AW429', DETAIL = wait;
        END IF;
    END IF;

    UPDATE turns SET stop_requested = now()
        WHERE owner = new_owner AND session_id = new_session AND status = 'running' AND stop_requested IS NULL
        RETURNING number INTO superseded;
    -- A failed turn that is sent again leaves, so that the history shows the question once.
    DELETE FROM turns WHERE owner = new_owner AND session_id = new_session AND number = twin.number;
    INSERT INTO turns (owner, session_id, idempotency_key, question, lease_until)
        VALUES (new_owner, new_session, new_key, new_question, now() + make_interval(secs => lease_seconds))
        RETURNING number INTO turn_number;

    -- The newest turns that fit, whole; also those that are just being stopped, with what is stored of them.
    SELECT coalesce(json_agg(json_build_array(question, reply) ORDER BY number), '[]') INTO history
        FROM (SELECT number, question, coalesce(nullif(reply, ''), '(Interrupted.)') AS reply,
                sum(length(question) + length(reply)) OVER (ORDER BY number DESC) AS chars
            FROM (SELECT * FROM turns WHERE owner = new_owner AND session_id = new_session AND number < turn_number
                ORDER BY number DESC LIMIT 50) AS newest
            WHERE status IN ('complete', 'truncated', 'stopped') OR (status = 'running' AND lease_until > now())) AS told
        WHERE chars <= history_chars;
    RETURN NEXT;
END $$;

-- Saves turns as their process knows them, each as [owner, session_id, number, what is visible, closing event or {},
-- verdicts, usage]: the text so far or the outcome, and a new lease. Returns those whose rows are there,
-- and whether they may go on. A save that comes late does not undo an outcome; the same outcome may be saved twice.
CREATE OR REPLACE FUNCTION save_turns(lease_seconds double precision, new_model text, news json)
RETURNS TABLE (saved bigint, go_on boolean) LANGUAGE sql AS $$
    WITH new AS (
        SELECT e ->> 0 AS owner, e ->> 1 AS session_id, (e ->> 2)::bigint AS number, e ->> 3 AS said,
            coalesce(e #>> '{4,status}', 'running') AS status, e #>> '{4,content}' AS content,
            (e -> 5)::jsonb AS verdicts, (e -> 6)::jsonb AS usage
        FROM json_array_elements(news) AS e)
    UPDATE turns SET status = new.status, model = new_model, verdicts = new.verdicts, usage = new.usage,
        reply = CASE WHEN new.status IN ('running', 'failed') THEN new.said ELSE new.content END,
        error = CASE WHEN new.status = 'failed' THEN new.content END,
        lease_until = now() + make_interval(secs => lease_seconds),
        finished_at = CASE WHEN new.status <> 'running' THEN now() END
    FROM new
    WHERE turns.owner = new.owner AND turns.session_id = new.session_id AND turns.number = new.number
        AND (turns.status = 'running' OR new.status <> 'running')
    RETURNING turns.number, turns.stop_requested IS NULL;
$$;

-- A turn as it is read; without a number, the newest of the session.
CREATE OR REPLACE FUNCTION find_turn(of_owner text, of_session text, of_number bigint)
RETURNS TABLE (turn_number bigint, status text, reply text, notice text) LANGUAGE plpgsql AS $$
BEGIN
    RETURN QUERY SELECT t.number, t.status, t.reply, t.notice FROM turns_as_read AS t
        WHERE t.owner = of_owner AND t.session_id = of_session AND t.number = coalesce(of_number, (
            SELECT max(number) FROM turns WHERE owner = of_owner AND session_id = of_session));
    IF NOT FOUND AND of_number IS NULL THEN
        RAISE EXCEPTION 'There is no such session.' USING ERRCODE = 'AW404';
    ELSIF NOT FOUND THEN
        RETURN QUERY SELECT of_number, 'failed', '', 'This conversation was erased.';
    END IF;
END $$;

-- Asks the running turn of a session to stop; its number.
CREATE OR REPLACE FUNCTION stop_turn(of_owner text, of_session text) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    stopped bigint;
BEGIN
    UPDATE turns SET stop_requested = coalesce(stop_requested, now())
        WHERE owner = of_owner AND session_id = of_session AND status = 'running' AND lease_until > now() AND number = (
            SELECT max(number) FROM turns WHERE owner = of_owner AND session_id = of_session)
        RETURNING number INTO stopped;
    IF stopped IS NULL THEN
        RAISE EXCEPTION 'Nothing runs in this session.' USING ERRCODE = 'AW404';
    END IF;
    RETURN stopped;
END $$;

-- Erases a session; the numbers of its turns.
CREATE OR REPLACE FUNCTION erase_session(of_owner text, of_session text) RETURNS SETOF bigint LANGUAGE plpgsql AS $$
BEGIN
    RETURN QUERY DELETE FROM turns WHERE owner = of_owner AND session_id = of_session RETURNING number;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'There is no such session.' USING ERRCODE = 'AW404';
    END IF;
END $$;

-- A page of a session's messages, newest first, as JSON; `before` is where the next page begins, or null. One message
-- more than asked for is read, to know whether there is a next page.
CREATE OR REPLACE FUNCTION read_messages(of_owner text, of_session text, before_id bigint, most integer)
RETURNS json LANGUAGE plpgsql AS $$
DECLARE
    page json;
BEGIN
    SELECT json_build_object(
        'messages', coalesce(json_agg(message ORDER BY place) FILTER (WHERE place <= most), '[]'),
        'before', CASE WHEN count(*) > most THEN min(id) FILTER (WHERE place <= most) END) INTO page
    FROM (SELECT id, row_number() OVER (ORDER BY id DESC) AS place,
            json_build_object('id', id, 'role', role, 'content', content, 'status', status, 'created_at',
                to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')) AS message
        FROM (SELECT * FROM chat_messages WHERE owner = of_owner AND session_id = of_session
                AND number <= before_id / 2 AND id < before_id ORDER BY number DESC, role LIMIT most + 1) AS newest) AS read;
    IF json_array_length(page -> 'messages') = 0 AND NOT EXISTS (
            SELECT FROM turns WHERE owner = of_owner AND session_id = of_session) THEN
        RAISE EXCEPTION 'There is no such session.' USING ERRCODE = 'AW404';
    END IF;
    RETURN page;
END $$;

-- Raises on a connection that can only read, which a standby and a demoted primary give out. Changes nothing.
CREATE OR REPLACE FUNCTION check_writable() RETURNS void LANGUAGE sql AS $$
    UPDATE turns SET status = status WHERE false;
$$;

-- Upkeep, by one replica at a time: dead turns become failed in the table, too, empty buckets go, and so do turns older
-- than retention_days (0: none), a few at a time.
CREATE OR REPLACE FUNCTION tidy_up(retention_days integer) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('awschat upkeep')) THEN
        RETURN;
    END IF;
    -- First, because claims lock buckets first, too: no two of us wait for each other.
    DELETE FROM rate_limits WHERE empty_at < now();
    -- A minute late: the turn of a process that had lost its database may yet renew its lease.
    UPDATE turns SET status = dead.status, error = dead.notice, finished_at = turns.lease_until FROM turns_as_read AS dead
        WHERE turns.status = 'running' AND turns.lease_until < now() - interval '1 minute'
            AND turns.owner = dead.owner AND turns.session_id = dead.session_id AND turns.number = dead.number;
    DELETE FROM turns WHERE retention_days > 0 AND (owner, session_id, number) IN (
        SELECT owner, session_id, number FROM turns
        WHERE created_at < now() - make_interval(days => retention_days) AND (status <> 'running' OR lease_until < now())
        ORDER BY created_at LIMIT 500);
END $$;
