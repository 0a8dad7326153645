-- name: make_clock
-- A database's own clock_timestamp(), which can be set forward. It is found before Postgres' own by whoever doesn't say
-- which one is meant: our statements, and the defaults of our columns.
CREATE SCHEMA durable_clock;
CREATE TABLE durable_clock.shift (by interval NOT NULL);
INSERT INTO durable_clock.shift VALUES ('0');
CREATE FUNCTION durable_clock.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
    AS 'SELECT pg_catalog.clock_timestamp() + by FROM durable_clock.shift';

-- name: has_clock
-- Whether time can be set here: there is such a clock, and it is the one that our statements find.
SELECT coalesce(to_regprocedure('clock_timestamp()') = to_regprocedure('durable_clock.clock_timestamp()'), false)

-- name: now
-- The time.
SELECT clock_timestamp()

-- name: advance
-- Set the clock forward.
UPDATE durable_clock.shift SET by = by + make_interval(secs => %(seconds)s)

-- name: empty
-- Nothing is left of earlier tests. Not TRUNCATE, which takes a hundred times as long for a few rows.
WITH a AS (DELETE FROM {schema}.workflow), b AS (DELETE FROM {schema}.node), c AS (DELETE FROM {schema}.input),
    d AS (DELETE FROM {schema}.output), e AS (DELETE FROM {schema}.checkpoint), f AS (DELETE FROM {schema}.message),
    g AS (DELETE FROM {schema}.event), h AS (DELETE FROM {schema}.awaiting), i AS (DELETE FROM {schema}.on_cancel),
    j AS (DELETE FROM {schema}.cancellation), k AS (DELETE FROM {schema}.attempt), l AS (DELETE FROM {schema}.sweep)
SELECT

-- name: reset
-- The clock shows the real time again.
UPDATE durable_clock.shift SET by = '0'

-- name: runnable
-- The workflow that a worker would run next: its message is on its way, or due to be sent.
SELECT w.id, w.published_at, w.attempt, i.envelope, i.body, i.content_type, i.content_encoding
FROM {schema}.workflow w JOIN {schema}.input i ON i.workflow = w.id
WHERE w.state = 'ENQUEUED' AND (w.published_at IS NOT NULL OR w.publish_at <= clock_timestamp())
AND w.id <> ALL (%(not_now)s::text[])
ORDER BY coalesce(w.published_at, w.publish_at), w.id LIMIT 1

-- name: next_timer
-- Seconds until a workflow wakes or starts by itself, or is cancelled by a deadline before that; null: none does.
WITH timers AS (
    SELECT least(
        (SELECT min(wake_at) FROM {schema}.workflow WHERE state = 'SUSPENDED'),
        (SELECT min(publish_at) FROM {schema}.workflow WHERE state = 'ENQUEUED' AND published_at IS NULL)) AS at
), deadlines AS (
    SELECT min(deadline) AS at FROM {schema}.workflow WHERE deadline IS NOT NULL AND finished_at IS NULL
)
SELECT extract(epoch FROM CASE WHEN %(with_deadlines)s OR timers.at IS NOT NULL THEN least(timers.at, deadlines.at) END
    - clock_timestamp())::float8
FROM timers, deadlines

-- name: answer
-- A step has its outcome before the workflow begins; whatever its arguments will be. Its place is before all others,
-- so that nothing looks as if an earlier attempt had come past it.
INSERT INTO {schema}.checkpoint (workflow, key, seq, attempt, tries, ok, value, content_type, started_at, at)
VALUES (%(id)s, %(key)s, 0, 0, 1, %(ok)s, %(value)s, %(content_type)s, clock_timestamp(), clock_timestamp())

-- name: settled
-- The outcomes of steps of some workflows.
SELECT workflow, key, ok, value, tries FROM {schema}.checkpoint WHERE workflow = ANY(%(ids)s::text[]) AND ok IS NOT NULL
