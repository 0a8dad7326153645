-- name: matching
-- The newest workflows that fit all the given filters, after a certain one. Planned with its parameters: a filter that
-- isn't given costs nothing, and each index is used for what it is there for.
WITH page AS MATERIALIZED (
    SELECT w.* FROM {schema}.workflow w
    WHERE (%(states)s::text[] IS NULL OR w.state = ANY(%(states)s))
    AND (NOT %(ended)s OR w.finished_at IS NOT NULL)
    AND (%(id)s::text IS NULL OR w.id = %(id)s)
    AND (%(names)s::text[] IS NULL OR w.name = ANY(%(names)s))
    AND (%(queue)s::text IS NULL OR w.queue = %(queue)s)
    AND (%(parent_id)s::text IS NULL OR w.parent_id = %(parent_id)s)
    AND (%(root_id)s::text IS NULL OR w.id = %(root_id)s AND w.root_id = %(root_id)s
         OR w.root_id = %(root_id)s AND w.root_id <> w.id)
    AND (%(forked_from)s::text IS NULL OR w.forked_from = %(forked_from)s)
    AND (%(error)s::text IS NULL OR w.error IS NOT NULL AND strpos(lower(w.error), lower(%(error)s)) > 0)
    AND (%(created_after)s::timestamptz IS NULL OR w.created_at >= %(created_after)s)
    AND (%(created_before)s::timestamptz IS NULL OR w.created_at < %(created_before)s)
    AND (%(after_at)s::timestamptz IS NULL OR (w.created_at, w.id) < (%(after_at)s, %(after_id)s))
    ORDER BY w.created_at DESC, w.id DESC LIMIT %(limit)s
)
SELECT w.id, w.name, w.state, w.queue, w.attempt, w.crashes, w.created_at, w.started_at, w.finished_at, w.wake_at,
    w.deadline, w.waiting_for, w.parent_id, w.root_id, w.forked_from, w.node::text, w.dispatched, w.retries,
    w.worker, w.claimed_at, w.error,
    CASE WHEN octet_length(i.body) <= %(most)s::bigint THEN i.body END, octet_length(i.body), i.content_type,
    i.content_encoding, o.ok, CASE WHEN octet_length(o.value) <= %(most)s::bigint THEN o.value END, octet_length(o.value),
    o.content_type
FROM page w LEFT JOIN {schema}.input i ON i.workflow = w.id LEFT JOIN {schema}.output o ON o.workflow = w.id
ORDER BY w.created_at DESC, w.id DESC

-- name: count
-- How many workflows of one state fit the filters, counted no further than wanted; planned as above.
SELECT count(*) FROM (
    SELECT FROM {schema}.workflow w
    WHERE w.state = %(state)s
    AND (NOT %(ended)s OR w.finished_at IS NOT NULL)
    AND (%(id)s::text IS NULL OR w.id = %(id)s)
    AND (%(names)s::text[] IS NULL OR w.name = ANY(%(names)s))
    AND (%(queue)s::text IS NULL OR w.queue = %(queue)s)
    AND (%(parent_id)s::text IS NULL OR w.parent_id = %(parent_id)s)
    AND (%(root_id)s::text IS NULL OR w.id = %(root_id)s AND w.root_id = %(root_id)s
         OR w.root_id = %(root_id)s AND w.root_id <> w.id)
    AND (%(forked_from)s::text IS NULL OR w.forked_from = %(forked_from)s)
    AND (%(error)s::text IS NULL OR w.error IS NOT NULL AND strpos(lower(w.error), lower(%(error)s)) > 0)
    AND (%(created_after)s::timestamptz IS NULL OR w.created_at >= %(created_after)s)
    AND (%(created_before)s::timestamptz IS NULL OR w.created_at < %(created_before)s)
    LIMIT %(most)s
) AS counted

-- name: names
-- The names of the tasks that have workflows: from one to the next in the index, whose other rows aren't read.
WITH RECURSIVE known AS (
    (SELECT name FROM {schema}.workflow ORDER BY name LIMIT 1)
    UNION ALL
    SELECT (SELECT w.name FROM {schema}.workflow w WHERE w.name > known.name ORDER BY w.name LIMIT 1)
    FROM known WHERE known.name IS NOT NULL
)
SELECT name FROM known WHERE name IS NOT NULL

-- name: attempts
-- The attempts of a workflow that have ended without its end, or before it was resumed, the first one first.
SELECT attempt, worker, node::text, began_at, ended_at, ending FROM {schema}.attempt
WHERE workflow = %(id)s ORDER BY attempt

-- name: standings
-- How all of it stands: what should have been done by now, and how long ago somebody looked.
WITH silent AS MATERIALIZED (
    SELECT n.id FROM {schema}.node n WHERE n.seen < clock_timestamp() - n.lease
)
SELECT clock_timestamp(),
    (SELECT count(*) FROM {schema}.workflow w LEFT JOIN {schema}.node n ON n.id = w.node
     WHERE w.state = 'RUNNING' AND (w.claimed_at < n.as_of AND w.id <> ALL (n.active)
         OR n.id IS NULL AND w.claimed_at < clock_timestamp() - make_interval(secs => %(lease)s)
         OR n.id IN (SELECT id FROM silent))),
    (SELECT count(*) FROM (SELECT FROM {schema}.workflow WHERE state = 'DEAD' AND finished_at IS NOT NULL LIMIT %(most)s) d),
    (SELECT count(*) FROM (SELECT FROM {schema}.workflow WHERE NOT dispatched LIMIT %(most)s) u),
    (SELECT extract(epoch FROM greatest(clock_timestamp() - min(at), '0')) FROM (
        (SELECT wake_at AS at FROM {schema}.workflow WHERE state = 'SUSPENDED' ORDER BY wake_at LIMIT 1)
        UNION ALL
        (SELECT deadline FROM {schema}.workflow WHERE deadline IS NOT NULL AND finished_at IS NULL ORDER BY deadline LIMIT 1)
        UNION ALL
        (SELECT min(publish_at) FROM {schema}.workflow WHERE state = 'ENQUEUED' AND published_at IS NULL)) AS timers
     HAVING min(at) IS NOT NULL)::float8,
    (SELECT extract(epoch FROM clock_timestamp() - published_at) FROM {schema}.workflow
     WHERE state = 'ENQUEUED' AND published_at IS NOT NULL ORDER BY publish_at LIMIT 1)::float8

-- name: live
-- How many workflows of each task are in each state that isn't final. Of one state so many are counted at most: the order
-- is that of the index which holds no other state.
SELECT state, name, count(*) FROM (
    (SELECT state, name FROM {schema}.workflow WHERE state = 'ENQUEUED' ORDER BY publish_at LIMIT %(most)s)
    UNION ALL
    (SELECT state, name FROM {schema}.workflow WHERE state = 'RUNNING' ORDER BY node LIMIT %(most)s)
    UNION ALL
    (SELECT state, name FROM {schema}.workflow WHERE state = 'SUSPENDED' ORDER BY wake_at LIMIT %(most)s)) AS live
GROUP BY state, name ORDER BY state, name

-- name: nodes
-- The workers' main processes, and how many workflows each of them runs.
SELECT n.id::text, n.hostname, n.pid, n.started_at, n.seen, n.seen > clock_timestamp() - n.lease, n.draining,
    (SELECT count(*) FROM {schema}.workflow w WHERE w.state = 'RUNNING' AND w.node = n.id)
FROM {schema}.node n ORDER BY n.hostname, n.started_at

-- name: sweeps
-- The last sweep of each kind of sweeper, the latest one first.
SELECT sweeper, worker, at, extract(epoch FROM clock_timestamp() - at)::float8 FROM {schema}.sweep ORDER BY at DESC
