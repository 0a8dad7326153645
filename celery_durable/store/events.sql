-- name: set
-- A workflow publishes a value: its checkpoint and the event, both or neither. Who awaits it is told afterwards.
WITH run AS (
    SELECT w.id, w.state, coalesce(n.draining, false) AS draining, coalesce(w.deadline <= clock_timestamp(), false) AS late
    FROM {schema}.workflow w LEFT JOIN {schema}.node n ON n.id = w.node
    WHERE w.id = %(id)s AND w.attempt = %(attempt)s AND w.token = %(token)s AND w.state IN ('RUNNING', 'CANCELLED')
    FOR KEY SHARE OF w
), saved AS (
    INSERT INTO {schema}.checkpoint
        (workflow, key, seq, attempt, tries, ok, value, content_type, args, fingerprint, started_at, at)
    SELECT run.id, %(key)s, %(seq)s, %(attempt)s, 1, true, %(value)s, %(value_type)s, %(args)s, %(fingerprint)s,
        clock_timestamp(), clock_timestamp()
    FROM run WHERE run.state = 'RUNNING' AND NOT run.draining AND NOT run.late
    ON CONFLICT (workflow, key) DO NOTHING
    RETURNING workflow
), published AS (
    INSERT INTO {schema}.event (workflow, key, value, content_type, at)
    SELECT workflow, %(event)s, %(body)s, %(content_type)s, clock_timestamp() FROM saved
    ON CONFLICT (workflow, key) DO UPDATE SET value = excluded.value, content_type = excluded.content_type, at = excluded.at
)
SELECT run.state, run.draining, run.late FROM run

-- name: get
-- An event, with the state of its workflow. No row: there is no such workflow.
SELECT w.state, e.value, e.content_type FROM {schema}.workflow w
LEFT JOIN {schema}.event e ON e.workflow = w.id AND e.key = %(event)s
WHERE w.id = %(workflow)s

-- name: of_workflow
-- All events of a workflow; of values that take more bytes than wanted, only how many they are.
SELECT key, CASE WHEN octet_length(value) <= %(most)s::bigint THEN value END, octet_length(value), content_type FROM {schema}.event WHERE workflow = %(workflow)s ORDER BY key

-- name: receive
-- An event becomes the outcome of a get_event. Without it the default does, as soon as its time has passed or the other
-- workflow has finished, which will publish nothing any more. Nothing is written if the run isn't well.
WITH run AS (
    SELECT w.id, w.state, coalesce(n.draining, false) AS draining, coalesce(w.deadline <= clock_timestamp(), false) AS late
    FROM {schema}.workflow w LEFT JOIN {schema}.node n ON n.id = w.node
    WHERE w.id = %(id)s AND w.attempt = %(attempt)s AND w.token = %(token)s AND w.state IN ('RUNNING', 'CANCELLED')
    FOR KEY SHARE OF w
), prior AS MATERIALIZED (
    SELECT ok, value, content_type, wake_at FROM {schema}.checkpoint WHERE workflow = %(id)s AND key = %(key)s
), target AS MATERIALIZED (
    SELECT w.finished_at, e.value, e.content_type,
        coalesce((SELECT wake_at FROM prior), clock_timestamp() + make_interval(secs => %(timeout)s)) AS until
    FROM {schema}.workflow w LEFT JOIN {schema}.event e ON e.workflow = w.id AND e.key = %(event)s
    WHERE w.id = %(target)s
), found AS MATERIALIZED (
    SELECT until, target.value IS NOT NULL OR target.finished_at IS NOT NULL AS has_come,
        CASE WHEN target.value IS NOT NULL OR target.finished_at IS NOT NULL OR until <= clock_timestamp()
                  THEN true END AS ok,
        CASE WHEN target.value IS NOT NULL THEN target.value
             WHEN target.finished_at IS NOT NULL OR until <= clock_timestamp() THEN %(value)s END AS value,
        CASE WHEN target.value IS NOT NULL THEN target.content_type
             WHEN target.finished_at IS NOT NULL OR until <= clock_timestamp() THEN %(value_type)s END AS content_type
    FROM target
), saved AS (
    INSERT INTO {schema}.checkpoint AS c
        (workflow, key, seq, attempt, tries, ok, value, content_type, args, fingerprint, wake_at, started_at, at)
    SELECT run.id, %(key)s, %(seq)s, %(attempt)s, 0, found.ok, found.value, found.content_type, %(args)s, %(fingerprint)s,
        found.until, clock_timestamp(), clock_timestamp()
    FROM run, found WHERE run.state = 'RUNNING' AND NOT run.draining AND NOT run.late
    AND (found.ok IS NOT NULL OR found.until IS NOT NULL)
    ON CONFLICT (workflow, key) DO UPDATE
    SET attempt = excluded.attempt, ok = excluded.ok, value = excluded.value, content_type = excluded.content_type,
        at = excluded.at
    WHERE c.ok IS NULL
    RETURNING ok, value, content_type
), cleared AS (
    DELETE FROM {schema}.awaiting a USING saved, found
    WHERE found.has_come AND a.target = %(target)s AND a.event = %(event)s AND a.waiter = %(id)s
)
SELECT run.state, run.draining, run.late, extract(epoch FROM found.until - clock_timestamp())::float8,
    coalesce(saved.ok, prior.ok), coalesce(saved.value, prior.value), coalesce(saved.content_type, prior.content_type),
    EXISTS (SELECT FROM target)
FROM run LEFT JOIN found ON true LEFT JOIN saved ON true LEFT JOIN prior ON true
