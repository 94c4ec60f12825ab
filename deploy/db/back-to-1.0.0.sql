-- Makes a database of 2.x one that awschat 1.0.0 can use again, with all conversations. Stop 2.x before, dump the database,
-- then: docker compose exec db psql -U awschat -f /deploy/back-to-1.0.0.sql
-- An upgrade to 2.x is possible again afterwards.
\set ON_ERROR_STOP on
BEGIN;
LOCK TABLE turns;

-- What only 2.x has. Without schema_versions and turn_numbers a later upgrade begins anew; with them it would do nothing.
DROP VIEW IF EXISTS usage_by_day, chat_messages, turns_as_read;
DROP FUNCTION IF EXISTS claim_turn, save_turns, find_turn, stop_turn, erase_session, read_messages, check_writable;
DROP INDEX IF EXISTS turns_current, turns_running_now;
DROP TABLE IF EXISTS schema_versions;
ALTER TABLE turns ALTER COLUMN number DROP DEFAULT;
DROP SEQUENCE IF EXISTS turn_numbers;

-- 1.0.0 allows one running turn a session, and none runs any more. What was running has failed when its lease ran out.
UPDATE turns SET status = 'failed', finished_at = lease_until,
    error = 'The service was interrupted while it answered. Please send the message again.' WHERE status = 'running';

-- 1.0.0 names each turn by an id, too.
ALTER TABLE turns ADD COLUMN id text;
UPDATE turns SET id = replace(gen_random_uuid()::text, '-', '');
ALTER TABLE turns ALTER COLUMN id SET NOT NULL;

-- 1.0.0 counts 1, 2, 3, ... in a session, and shows its model only turns among the last 50 numbers. Below zero first,
-- because no two turns of a session may have one number at any moment.
UPDATE turns SET number = -place
    FROM (SELECT owner, session_id, number, row_number() OVER (PARTITION BY owner, session_id ORDER BY number) AS place
        FROM turns) AS counted
    WHERE turns.owner = counted.owner AND turns.session_id = counted.session_id AND turns.number = counted.number;
UPDATE turns SET number = -number;
COMMIT;
