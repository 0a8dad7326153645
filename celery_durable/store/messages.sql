-- name: send
-- A message for a live workflow, which is woken if it waits for one of this topic. No row: there is no such workflow,
-- or it has finished. The same idempotency key again writes nothing; one that somebody's open transaction holds is
-- waited for before the workflow is locked. The row is locked by its UPDATE alone: a lock before it would be a second
-- way through the versions of the row, on which two senders deadlock while a checkpoint's transaction is open.
WITH sent AS (
    INSERT INTO {schema}.message (workflow, topic, idempotency_key, body, content_type, told)
    SELECT id, %(topic)s, %(idempotency_key)s, %(body)s, %(content_type)s, true FROM {schema}.workflow
    WHERE id = %(workflow)s AND finished_at IS NULL
    ON CONFLICT (workflow, idempotency_key) DO NOTHING
    RETURNING seq
), arrival AS MATERIALIZED (
    SELECT clock_timestamp() AS at FROM (SELECT count(*) FROM sent) AS written
), told AS (
    UPDATE {schema}.workflow w SET signal = w.signal + 1,
        state = CASE WHEN w.state = 'SUSPENDED' AND %(topic)s = ANY(w.topics) THEN 'ENQUEUED' ELSE w.state END,
        published_at = CASE WHEN w.state = 'SUSPENDED' AND %(topic)s = ANY(w.topics) THEN arrival.at
                       ELSE w.published_at END,
        publish_at = CASE WHEN w.state = 'SUSPENDED' AND %(topic)s = ANY(w.topics)
                     THEN clock_timestamp() + make_interval(secs => %(republish_after)s) ELSE w.publish_at END
    FROM arrival WHERE w.id = %(workflow)s AND w.finished_at IS NULL
    RETURNING w.id, w.published_at, w.attempt, w.state = 'ENQUEUED' AND w.published_at = arrival.at AS wakes
)
SELECT i.workflow, told.published_at, told.attempt, i.envelope, i.body, i.content_type, i.content_encoding
FROM told LEFT JOIN {schema}.input i ON i.workflow = told.id AND told.wakes

-- name: send_as_step
-- A workflow sends: its checkpoint and the message, both or neither. The other one is told afterwards, by `tell`.
WITH run AS (
    SELECT w.id, w.state, coalesce(n.draining, false) AS draining, coalesce(w.deadline <= clock_timestamp(), false) AS late
    FROM {schema}.workflow w LEFT JOIN {schema}.node n ON n.id = w.node
    WHERE w.id = %(id)s AND w.attempt = %(attempt)s AND w.token = %(token)s AND w.state IN ('RUNNING', 'CANCELLED')
    FOR KEY SHARE OF w
), target AS MATERIALIZED (
    SELECT id, state FROM {schema}.workflow WHERE id = %(workflow)s
), saved AS (
    INSERT INTO {schema}.checkpoint
        (workflow, key, seq, attempt, tries, ok, value, content_type, args, fingerprint, started_at, at)
    SELECT run.id, %(key)s, %(seq)s, %(attempt)s, 1, true, %(value)s, %(value_type)s, %(args)s, %(fingerprint)s,
        clock_timestamp(), clock_timestamp()
    FROM run, target WHERE run.state = 'RUNNING' AND NOT run.draining AND NOT run.late
    AND target.state IN ('ENQUEUED', 'RUNNING', 'SUSPENDED')
    ON CONFLICT (workflow, key) DO NOTHING
    RETURNING workflow
), sent AS (
    INSERT INTO {schema}.message (workflow, topic, idempotency_key, body, content_type, told)
    SELECT %(workflow)s, %(topic)s, %(idempotency_key)s, %(body)s, %(content_type)s, false FROM saved
    ON CONFLICT (workflow, idempotency_key) DO NOTHING
)
SELECT run.state, run.draining, run.late, (SELECT state FROM target),
    EXISTS (SELECT FROM saved) OR EXISTS (SELECT FROM {schema}.checkpoint WHERE workflow = %(id)s AND key = %(key)s)
FROM run

-- name: put
-- A message in a transaction of the caller's own: nobody else sees it before its commit, and then the sweep tells. It
-- locks no row that is there already. No row: there is no such workflow, or it has finished.
WITH target AS MATERIALIZED (
    SELECT id FROM {schema}.workflow WHERE id = %(workflow)s AND finished_at IS NULL
), sent AS (
    INSERT INTO {schema}.message (workflow, topic, idempotency_key, body, content_type, told)
    SELECT id, %(topic)s, %(idempotency_key)s, %(body)s, %(content_type)s, false FROM target
    ON CONFLICT (workflow, idempotency_key) DO NOTHING
)
SELECT id FROM target

-- name: tell
-- Wake the workflows of messages that nobody has told of: all of a workflow, or the oldest. Only several workflows are
-- locked before their UPDATE, for their order.
WITH untold AS MATERIALIZED (
    SELECT seq, workflow, topic FROM {schema}.message
    WHERE NOT told AND (%(workflow)s::text IS NULL OR workflow = %(workflow)s)
    ORDER BY seq LIMIT %(limit)s FOR UPDATE SKIP LOCKED
), noted AS (
    UPDATE {schema}.message m SET told = true FROM untold WHERE m.seq = untold.seq
), target AS MATERIALIZED (
    SELECT workflow AS id, array_agg(topic) AS topics, clock_timestamp() AS at FROM untold GROUP BY workflow
), several AS MATERIALIZED (
    SELECT w.id FROM {schema}.workflow w JOIN target ON target.id = w.id
    WHERE (SELECT count(*) FROM target) > 1 ORDER BY w.id FOR NO KEY UPDATE OF w
), woken AS (
    UPDATE {schema}.workflow w SET signal = w.signal + 1,
        state = CASE WHEN w.state = 'SUSPENDED' AND w.topics && target.topics THEN 'ENQUEUED' ELSE w.state END,
        published_at = CASE WHEN w.state = 'SUSPENDED' AND w.topics && target.topics THEN target.at
                       ELSE w.published_at END,
        publish_at = CASE WHEN w.state = 'SUSPENDED' AND w.topics && target.topics
                     THEN clock_timestamp() + make_interval(secs => %(republish_after)s) ELSE w.publish_at END
    FROM target, (SELECT count(*) FROM several) AS locked
    WHERE w.id = target.id AND w.finished_at IS NULL
    RETURNING w.id, w.published_at, w.attempt, w.state = 'ENQUEUED' AND w.published_at = target.at AS wakes
)
SELECT (SELECT count(*) FROM untold), i.workflow, woken.published_at, woken.attempt, i.envelope, i.body, i.content_type,
    i.content_encoding
FROM (SELECT) AS one LEFT JOIN woken ON woken.wakes LEFT JOIN {schema}.input i ON i.workflow = woken.id

-- name: receive
-- The oldest message of a topic becomes the outcome of a recv; with none there, its default does as soon as its time
-- has passed. The message is taken only by the checkpoint that is written with it. Nothing is written if the run isn't
-- well. Last column: there was something to be had, and it wasn't: this very recv has just had its outcome by another
-- statement of ours, whose own answer was lost; the next look finds it.
WITH run AS (
    SELECT w.id, w.state, coalesce(n.draining, false) AS draining, coalesce(w.deadline <= clock_timestamp(), false) AS late
    FROM {schema}.workflow w LEFT JOIN {schema}.node n ON n.id = w.node
    WHERE w.id = %(id)s AND w.attempt = %(attempt)s AND w.token = %(token)s AND w.state IN ('RUNNING', 'CANCELLED')
    FOR KEY SHARE OF w
), prior AS MATERIALIZED (
    SELECT ok, value, content_type, wake_at FROM {schema}.checkpoint WHERE workflow = %(id)s AND key = %(key)s
), until AS MATERIALIZED (
    SELECT coalesce((SELECT wake_at FROM prior), clock_timestamp() + make_interval(secs => %(timeout)s)) AS at
), there AS MATERIALIZED (
    SELECT m.seq FROM {schema}.message m WHERE m.workflow = %(id)s AND m.topic = %(topic)s AND m.taken_by IS NULL LIMIT 1
), oldest AS MATERIALIZED (
    SELECT m.seq, m.body, m.content_type FROM {schema}.message m, run
    WHERE m.workflow = %(id)s AND m.topic = %(topic)s AND m.taken_by IS NULL
    AND run.state = 'RUNNING' AND NOT run.draining AND NOT run.late
    AND NOT EXISTS (SELECT FROM prior WHERE ok IS NOT NULL)
    ORDER BY m.seq LIMIT 1 FOR UPDATE OF m
), saved AS (
    INSERT INTO {schema}.checkpoint AS c
        (workflow, key, seq, attempt, tries, ok, value, content_type, args, fingerprint, wake_at, started_at, at)
    SELECT run.id, %(key)s, %(seq)s, %(attempt)s, 0,
        CASE WHEN oldest.seq IS NOT NULL OR until.at <= clock_timestamp() THEN true END,
        CASE WHEN oldest.seq IS NOT NULL THEN oldest.body WHEN until.at <= clock_timestamp() THEN %(value)s END,
        CASE WHEN oldest.seq IS NOT NULL THEN oldest.content_type WHEN until.at <= clock_timestamp() THEN %(value_type)s END,
        %(args)s, %(fingerprint)s, until.at, clock_timestamp(), clock_timestamp()
    FROM run CROSS JOIN until LEFT JOIN oldest ON true
    WHERE run.state = 'RUNNING' AND NOT run.draining AND NOT run.late
    AND (oldest.seq IS NOT NULL OR until.at IS NOT NULL)
    ON CONFLICT (workflow, key) DO UPDATE
    SET attempt = excluded.attempt, ok = excluded.ok, value = excluded.value, content_type = excluded.content_type,
        at = excluded.at
    WHERE c.ok IS NULL
    RETURNING ok, value, content_type
), taken AS (
    UPDATE {schema}.message m SET taken_by = %(key)s, body = ''::bytea FROM oldest, saved WHERE m.seq = oldest.seq
)
SELECT run.state, run.draining, run.late, extract(epoch FROM until.at - clock_timestamp())::float8,
    coalesce(saved.ok, prior.ok), coalesce(saved.value, prior.value), coalesce(saved.content_type, prior.content_type),
    (EXISTS (SELECT FROM there) OR coalesce(until.at <= clock_timestamp(), false))
        AND saved.ok IS NULL AND prior.ok IS NULL AND run.state = 'RUNNING' AND NOT run.draining AND NOT run.late
FROM run CROSS JOIN until LEFT JOIN saved ON true LEFT JOIN prior ON true

-- name: of_workflow
-- The messages of a workflow in their order; of those that take more bytes than wanted, only how many they are. One that
-- was taken is the outcome of the wait that has it.
WITH first AS MATERIALIZED (
    SELECT m.seq, m.topic, m.idempotency_key, m.sent_at, m.taken_by,
        CASE WHEN m.taken_by IS NULL THEN m.body ELSE c.value END AS body,
        CASE WHEN m.taken_by IS NULL THEN m.content_type ELSE c.content_type END AS content_type
    FROM {schema}.message m LEFT JOIN {schema}.checkpoint c ON c.workflow = m.workflow AND c.key = m.taken_by
    WHERE m.workflow = %(workflow)s ORDER BY m.seq LIMIT %(limit)s
)
SELECT seq, topic, idempotency_key, CASE WHEN octet_length(body) <= %(most)s::bigint THEN body END,
    coalesce(octet_length(body), 0), content_type, sent_at, taken_by
FROM first ORDER BY seq
