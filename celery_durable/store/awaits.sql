-- name: register
-- A workflow is to be told when others end, or publish an event. Committed before it looks for the last time: whoever
-- commits what it awaits looks for these rows afterwards, so one of the two sees the other.
WITH run AS (
    SELECT id, state FROM {schema}.workflow WHERE id = %(id)s AND attempt = %(attempt)s AND token = %(token)s FOR KEY SHARE
)
INSERT INTO {schema}.awaiting (target, event, waiter, wait)
SELECT r.target, %(event)s, run.id, r.wait
FROM run, unnest(%(targets)s::text[], %(waits)s::text[]) AS r (target, wait)
WHERE run.state = 'RUNNING'
ON CONFLICT DO NOTHING

-- name: settle
-- The outcomes of others become those of the waits for them, for all that have ended by now. A wait whose time has
-- passed ends with its own. Nothing is written if the run isn't well.
WITH run AS (
    SELECT w.id, w.state, coalesce(n.draining, false) AS draining, coalesce(w.deadline <= clock_timestamp(), false) AS late
    FROM {schema}.workflow w LEFT JOIN {schema}.node n ON n.id = w.node
    WHERE w.id = %(id)s AND w.attempt = %(attempt)s AND w.token = %(token)s AND w.state IN ('RUNNING', 'CANCELLED')
    FOR KEY SHARE OF w
), asked AS MATERIALIZED (
    SELECT r.key, r.seq, r.target, r.args, r.fingerprint, p.ok, p.value, p.content_type,
        coalesce(p.wake_at, clock_timestamp() + make_interval(secs => %(timeout)s)) AS until
    FROM unnest(%(keys)s::text[], %(seqs)s::integer[], %(targets)s::text[], %(argss)s::text[], %(fingerprints)s::bytea[])
        AS r (key, seq, target, args, fingerprint)
    LEFT JOIN {schema}.checkpoint p ON p.workflow = %(id)s AND p.key = r.key
), found AS MATERIALIZED (
    SELECT asked.*, t.id IS NOT NULL AS is_known, o.ok AS their_ok, o.value AS their_value,
        o.content_type AS their_content_type, o.workflow IS NOT NULL AS has_ended, asked.until <= clock_timestamp() AS is_due
    FROM asked LEFT JOIN {schema}.workflow t ON t.id = asked.target
    LEFT JOIN {schema}.output o ON o.workflow = t.id AND t.finished_at IS NOT NULL
), saved AS (
    INSERT INTO {schema}.checkpoint AS c
        (workflow, key, seq, attempt, tries, ok, value, content_type, args, fingerprint, child_id, wake_at, started_at, at)
    SELECT run.id, found.key, found.seq, %(attempt)s, 0,
        CASE WHEN has_ended THEN their_ok WHEN is_due THEN false END,
        CASE WHEN has_ended THEN their_value WHEN is_due THEN %(value)s END,
        CASE WHEN has_ended THEN their_content_type WHEN is_due THEN %(value_type)s END,
        found.args, found.fingerprint, found.target, found.until, clock_timestamp(), clock_timestamp()
    FROM run, found
    WHERE run.state = 'RUNNING' AND NOT run.draining AND NOT run.late AND found.ok IS NULL
    AND (has_ended OR is_due OR found.until IS NOT NULL)
    ON CONFLICT (workflow, key) DO UPDATE
    SET attempt = excluded.attempt, ok = excluded.ok, value = excluded.value, content_type = excluded.content_type,
        at = excluded.at
    WHERE c.ok IS NULL
    RETURNING key, ok, value, content_type
), cleared AS (
    DELETE FROM {schema}.awaiting a USING saved, found
    WHERE saved.key = found.key AND found.has_ended AND a.target = found.target AND a.event = '' AND a.waiter = %(id)s
)
SELECT run.state, run.draining, run.late, found.key, found.is_known,
    extract(epoch FROM found.until - clock_timestamp())::float8, coalesce(saved.ok, found.ok),
    coalesce(saved.value, found.value), coalesce(saved.content_type, found.content_type)
FROM run CROSS JOIN found LEFT JOIN saved ON saved.key = found.key

-- name: sleep
-- The time at which a sleep ends, fixed at its first call. A statement that is repeated waits for the first one, whose
-- answer was lost, and returns its time. Nothing is written if the run isn't well.
WITH run AS (
    SELECT w.id, w.state, coalesce(n.draining, false) AS draining, coalesce(w.deadline <= clock_timestamp(), false) AS late
    FROM {schema}.workflow w LEFT JOIN {schema}.node n ON n.id = w.node
    WHERE w.id = %(id)s AND w.attempt = %(attempt)s AND w.token = %(token)s AND w.state IN ('RUNNING', 'CANCELLED')
    FOR KEY SHARE OF w
), saved AS (
    INSERT INTO {schema}.checkpoint (workflow, key, seq, attempt, tries, ok, value, content_type, args, wake_at, started_at, at)
    SELECT run.id, %(key)s, %(seq)s, %(attempt)s, 0, true, %(value)s, %(value_type)s, %(args)s,
        coalesce(%(until)s::timestamptz, clock_timestamp() + make_interval(secs => %(seconds)s)),
        clock_timestamp(), clock_timestamp()
    FROM run WHERE run.state = 'RUNNING' AND NOT run.draining AND NOT run.late
    ON CONFLICT (workflow, key) DO UPDATE SET wake_at = checkpoint.wake_at
    RETURNING wake_at
)
SELECT run.state, run.draining, run.late, extract(epoch FROM saved.wake_at - clock_timestamp())::float8
FROM run LEFT JOIN saved ON true

-- name: first
-- Which of some workflows has ended first, which of them there are, and how many of those asked for are none.
SELECT (SELECT w.id FROM {schema}.workflow w WHERE w.id = ANY(%(targets)s::text[]) AND w.finished_at IS NOT NULL
        ORDER BY w.finished_at, w.id LIMIT 1),
    ARRAY(SELECT w.id FROM {schema}.workflow w WHERE w.id = ANY(%(targets)s::text[]))

-- name: forget
-- A wait is over: what else it was for doesn't wake the workflow any more.
DELETE FROM {schema}.awaiting WHERE waiter = %(id)s AND wait = %(wait)s

-- name: notify
-- Wake those that await the end, or an event, of these workflows. One that awaits several is woken by the last of them.
-- Only several waiters are locked before their UPDATE, for their order: see `send`. Most often there is one target and
-- nobody awaits it. The planner doesn't see how many there are, or it would make a new plan each time; and what has come
-- is asked in subselects and no joins, for which it may well read whole tables.
WITH come AS MATERIALIZED (
    SELECT a.target, a.event, a.waiter, a.wait FROM {schema}.awaiting a
    WHERE a.target = ANY((SELECT %(targets)s::text[])::text[])
    AND ((SELECT t.finished_at IS NOT NULL FROM {schema}.workflow t WHERE t.id = a.target)
         OR (SELECT true FROM {schema}.event e WHERE e.workflow = a.target AND e.key = a.event))
    ORDER BY a.target, a.event, a.waiter, a.wait FOR UPDATE
), told AS (
    DELETE FROM {schema}.awaiting a USING come
    WHERE a.target = come.target AND a.event = come.event AND a.waiter = come.waiter AND a.wait = come.wait
    RETURNING a.waiter
), waiter AS MATERIALIZED (
    SELECT waiter AS id, count(*)::integer AS number, clock_timestamp() AS at FROM told GROUP BY waiter
), several AS MATERIALIZED (
    SELECT w.id FROM {schema}.workflow w JOIN waiter ON waiter.id = w.id
    WHERE (SELECT count(*) FROM waiter) > 1 ORDER BY w.id FOR NO KEY UPDATE OF w
), woken AS (
    UPDATE {schema}.workflow w SET signal = w.signal + 1, awaits = w.awaits - waiter.number,
        state = CASE WHEN w.state = 'SUSPENDED' AND w.awaits <= waiter.number THEN 'ENQUEUED' ELSE w.state END,
        published_at = CASE WHEN w.state = 'SUSPENDED' AND w.awaits <= waiter.number THEN waiter.at
                       ELSE w.published_at END,
        publish_at = CASE WHEN w.state = 'SUSPENDED' AND w.awaits <= waiter.number
                     THEN clock_timestamp() + make_interval(secs => %(republish_after)s) ELSE w.publish_at END
    FROM waiter, (SELECT count(*) FROM several) AS locked
    WHERE w.id = waiter.id AND w.finished_at IS NULL
    RETURNING w.id, w.published_at, w.attempt, w.state = 'ENQUEUED' AND w.published_at = waiter.at AS wakes
)
SELECT woken.id, woken.published_at, woken.attempt, i.envelope, i.body, i.content_type, i.content_encoding
FROM woken JOIN {schema}.input i ON i.workflow = woken.id WHERE woken.wakes

-- name: come
-- Workflows that others still await, although what is awaited has come: whoever had to tell them has died.
SELECT a.target FROM {schema}.awaiting a JOIN {schema}.workflow t ON t.id = a.target
WHERE t.finished_at IS NOT NULL OR EXISTS (SELECT FROM {schema}.event e WHERE e.workflow = a.target AND e.key = a.event)
GROUP BY a.target LIMIT %(limit)s
