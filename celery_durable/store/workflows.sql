-- name: publish
-- A workflow is born: its row and its message, before the message is sent. Nothing is written if the id is taken, or
-- if an unfinished workflow of this task has the same deduplication id: that one is returned.
WITH holder AS MATERIALIZED (
    SELECT id FROM {schema}.workflow
    WHERE name = %(name)s AND deduplication_id = %(deduplication_id)s AND finished_at IS NULL
), born AS (
    INSERT INTO {schema}.workflow
        (id, name, queue, state, max_crashes, timeout, retries, parent_id, root_id, deduplication_id, publish_at, published_at)
    SELECT %(id)s, %(name)s, %(queue)s, 'ENQUEUED', %(max_crashes)s, make_interval(secs => %(timeout)s), %(retries)s,
        %(parent_id)s, %(root_id)s, %(deduplication_id)s,
        clock_timestamp() + make_interval(secs => coalesce(%(delay)s::float8, %(republish_after)s::float8)),
        CASE WHEN %(delay)s::float8 IS NULL THEN clock_timestamp() END
    WHERE NOT EXISTS (SELECT FROM holder)
    ON CONFLICT (id) DO NOTHING
    RETURNING id, published_at
), kept AS (
    INSERT INTO {schema}.input (workflow, envelope, body, content_type, content_encoding)
    SELECT id, %(envelope)s, %(body)s, %(content_type)s, %(content_encoding)s FROM born
    ON CONFLICT (workflow) DO UPDATE SET envelope = excluded.envelope, body = excluded.body,
        content_type = excluded.content_type, content_encoding = excluded.content_encoding
), hooked AS (
    INSERT INTO {schema}.on_cancel
        (workflow, id, name, queue, max_crashes, timeout, envelope, body, content_type, content_encoding)
    SELECT born.id, h.id, h.name, h.queue, h.max_crashes, make_interval(secs => h.timeout), h.envelope,
        decode(h.body, 'base64'), h.content_type, h.content_encoding
    FROM born, jsonb_to_record(%(on_cancel)s::jsonb) AS h (id text, name text, queue text, max_crashes integer,
        timeout float8, envelope text, body text, content_type text, content_encoding text)
    WHERE h.id IS NOT NULL
    ON CONFLICT (workflow) DO NOTHING
)
SELECT EXISTS (SELECT FROM born), (SELECT published_at FROM born), (SELECT id FROM holder)

-- name: publish_many
-- Workflows are born together, as by publish; returns those that are.
WITH asked AS MATERIALIZED (
    SELECT * FROM unnest(%(ids)s::text[], %(names)s::text[], %(queues)s::text[], %(max_crashess)s::integer[],
        %(timeouts)s::float8[], %(parent_ids)s::text[], %(root_ids)s::text[], %(delays)s::float8[], %(envelopes)s::text[],
        %(bodys)s::bytea[], %(content_types)s::text[], %(content_encodings)s::text[])
        AS r (id, name, queue, max_crashes, timeout, parent_id, root_id, delay, envelope, body, content_type, content_encoding)
), born AS (
    INSERT INTO {schema}.workflow
        (id, name, queue, state, max_crashes, timeout, parent_id, root_id, publish_at, published_at)
    SELECT id, name, queue, 'ENQUEUED', max_crashes, make_interval(secs => timeout), parent_id, root_id,
        clock_timestamp() + make_interval(secs => coalesce(delay, %(republish_after)s)),
        CASE WHEN delay IS NULL THEN clock_timestamp() END
    FROM asked ORDER BY id
    ON CONFLICT (id) DO NOTHING
    RETURNING id, published_at
), kept AS (
    INSERT INTO {schema}.input (workflow, envelope, body, content_type, content_encoding)
    SELECT asked.id, envelope, body, content_type, content_encoding FROM asked JOIN born ON born.id = asked.id
    ON CONFLICT (workflow) DO UPDATE SET envelope = excluded.envelope, body = excluded.body,
        content_type = excluded.content_type, content_encoding = excluded.content_encoding
)
SELECT id, published_at FROM born

-- name: names_of
-- Which tasks have taken these ids.
SELECT id, name FROM {schema}.workflow WHERE id = ANY(%(ids)s::text[])

-- name: births_of
-- When these workflows were made, as text.
SELECT id, created_at::text FROM {schema}.workflow WHERE id = ANY(%(ids)s::text[])

-- name: bear
-- A workflow starts a child: the child's rows and the parent's checkpoint, all of it or nothing. It is written only if
-- all is well with the parent and the id isn't taken by another task; the child ends with the parent's deadline.
WITH run AS (
    SELECT w.id, w.state, coalesce(n.draining, false) AS draining,
        coalesce(w.deadline <= clock_timestamp(), false) AS late, w.deadline
    FROM {schema}.workflow w LEFT JOIN {schema}.node n ON n.id = w.node
    WHERE w.id = %(parent)s AND w.attempt = %(attempt)s AND w.token = %(token)s AND w.state IN ('RUNNING', 'CANCELLED')
    FOR SHARE OF w
), taken AS MATERIALIZED (
    SELECT name FROM {schema}.workflow WHERE id = %(id)s
), holder AS MATERIALIZED (
    SELECT id FROM {schema}.workflow
    WHERE name = %(name)s AND deduplication_id = %(deduplication_id)s AND finished_at IS NULL
), saved AS (
    INSERT INTO {schema}.checkpoint
        (workflow, key, seq, attempt, tries, ok, value, content_type, args, fingerprint, child_id, started_at, at)
    SELECT run.id, %(key)s, %(seq)s, %(attempt)s, 1, true, %(value)s, %(value_type)s, %(args)s, %(fingerprint)s,
        coalesce((SELECT id FROM holder), %(id)s), clock_timestamp(), clock_timestamp()
    FROM run WHERE run.state = 'RUNNING' AND NOT run.draining AND NOT run.late
    AND NOT EXISTS (SELECT FROM taken WHERE name <> %(name)s)
    ON CONFLICT (workflow, key) DO UPDATE SET child_id = checkpoint.child_id
    RETURNING child_id, xmax = 0 AS is_new
), born AS (
    INSERT INTO {schema}.workflow
        (id, name, queue, state, max_crashes, timeout, deadline, parent_id, root_id, deduplication_id, publish_at,
         published_at)
    SELECT %(id)s, %(name)s, %(queue)s, 'ENQUEUED', %(max_crashes)s, make_interval(secs => %(timeout)s), run.deadline,
        %(parent_id)s, %(root_id)s, %(deduplication_id)s,
        clock_timestamp() + make_interval(secs => coalesce(%(delay)s::float8, %(republish_after)s::float8)),
        CASE WHEN %(delay)s::float8 IS NULL THEN clock_timestamp() END
    FROM saved, run WHERE saved.is_new AND NOT EXISTS (SELECT FROM holder)
    ON CONFLICT (id) DO NOTHING
    RETURNING id, published_at
), kept AS (
    INSERT INTO {schema}.input (workflow, envelope, body, content_type, content_encoding)
    SELECT id, %(envelope)s, %(body)s, %(content_type)s, %(content_encoding)s FROM born
    ON CONFLICT (workflow) DO UPDATE SET envelope = excluded.envelope, body = excluded.body,
        content_type = excluded.content_type, content_encoding = excluded.content_encoding
), hooked AS (
    INSERT INTO {schema}.on_cancel
        (workflow, id, name, queue, max_crashes, timeout, envelope, body, content_type, content_encoding)
    SELECT born.id, h.id, h.name, h.queue, h.max_crashes, make_interval(secs => h.timeout), h.envelope,
        decode(h.body, 'base64'), h.content_type, h.content_encoding
    FROM born, jsonb_to_record(%(on_cancel)s::jsonb) AS h (id text, name text, queue text, max_crashes integer,
        timeout float8, envelope text, body text, content_type text, content_encoding text)
    WHERE h.id IS NOT NULL
    ON CONFLICT (workflow) DO NOTHING
)
SELECT run.state, run.draining, run.late, (SELECT name FROM taken), saved.child_id, coalesce(saved.is_new, true),
    (SELECT published_at FROM born)
FROM run LEFT JOIN saved ON true

-- name: unsent
-- Its message couldn't be sent: recovery sends it as soon as it can. Only what is enqueued has such a time; its state,
-- beside the id, might lead through all that is enqueued.
UPDATE {schema}.workflow SET publish_at = clock_timestamp(), published_at = NULL
WHERE id = ANY(%(ids)s) AND publish_at IS NOT NULL

-- name: leave_to_others
-- A worker that hasn't got their task has taken these messages. None is lost, for each of them has come: they are sent
-- once more after their delay, which doesn't grow.
WITH waiting AS (
    SELECT w.id, r.delay
    FROM {schema}.workflow w JOIN unnest(%(ids)s::text[], %(delays)s::float8[]) AS r (id, delay) ON r.id = w.id
    WHERE w.state = 'ENQUEUED' OR NOT w.dispatched AND w.node IS NULL
    ORDER BY w.id FOR NO KEY UPDATE OF w
)
UPDATE {schema}.workflow w SET published_at = NULL, publishes = 0,
    publish_at = CASE WHEN w.state = 'ENQUEUED' THEN clock_timestamp() + make_interval(secs => waiting.delay) END
FROM waiting WHERE w.id = waiting.id

-- name: claim
-- One process takes an enqueued workflow and loads its history. The attempt must be the one that this
-- statement's own snapshot saw, so that every earlier attempt's checkpoints are in it. The same token again
-- (the answer was lost) gets the same attempt, also while the first one is still on its way. A node that is
-- silent itself gets nothing, nor does a message from before Celery's last retry of the workflow.
-- One that was resumed belongs to its last owner until that has released it. If that is gone, this statement only takes
-- it away, and waits for a checkpoint of it that is on its way; the next claim, whose snapshot has that, gets it.
WITH seen AS MATERIALIZED (
    SELECT attempt, state FROM {schema}.workflow WHERE id = %(id)s
), orphaned AS (
    SELECT w.id, w.state FROM {schema}.workflow w
    WHERE w.id = %(id)s AND (SELECT state FROM seen) = 'ENQUEUED' AND w.node IS NOT NULL
    AND NOT EXISTS (SELECT FROM {schema}.node o WHERE o.id = w.node AND o.seen > clock_timestamp() - o.lease
                    AND (w.claimed_at < o.as_of AND w.id <> ALL (o.active)) IS NOT TRUE)
    FOR UPDATE
), freed AS (
    UPDATE {schema}.workflow w SET node = NULL, token = NULL
    FROM orphaned WHERE w.id = orphaned.id AND orphaned.state = 'ENQUEUED'
), run AS (
    UPDATE {schema}.workflow w
    SET state = 'RUNNING', attempt = w.attempt + (w.state = 'ENQUEUED')::int, token = %(token)s, node = %(node)s,
        claimed_at = clock_timestamp(), started_at = coalesce(w.started_at, clock_timestamp()),
        publish_at = NULL, published_at = NULL, publishes = 0, wake_at = NULL, waiting_for = NULL, awaits = NULL,
        topics = NULL, worker = (SELECT n.hostname FROM {schema}.node n WHERE n.id = %(node)s),
        deadline = CASE WHEN w.started_at IS NULL THEN least(w.deadline, clock_timestamp() + w.timeout) ELSE w.deadline END
    WHERE w.id = %(id)s AND w.name = %(name)s
    AND (w.state = 'RUNNING' AND w.token = %(token)s
         OR w.state = 'ENQUEUED' AND w.node IS NULL AND w.attempt = (SELECT attempt FROM seen)
         AND w.retries = %(retries)s AND (w.deadline IS NULL OR w.deadline > clock_timestamp())
         AND EXISTS (SELECT FROM {schema}.node n WHERE n.id = %(node)s AND NOT n.draining
                     AND n.seen > clock_timestamp() - n.lease))
    RETURNING w.id, w.attempt, w.crashes, w.deadline
)
SELECT NULL AS key, NULL AS seq, NULL AS tries, NULL AS ok, NULL AS value, NULL AS content_type, NULL AS args,
    NULL AS fingerprint, NULL AS errors, NULL AS due_in, NULL AS overran, NULL AS spent, NULL AS child_id,
    run.attempt, run.crashes, clock_timestamp(), extract(epoch FROM run.deadline - clock_timestamp())::float8
FROM run
UNION ALL
SELECT c.key, c.seq, c.tries, c.ok, c.value, c.content_type, c.args, c.fingerprint,
    c.errors, extract(epoch FROM c.wake_at - clock_timestamp())::float8, c.overran, c.spent, c.child_id,
    NULL, NULL, NULL, NULL
FROM run JOIN {schema}.checkpoint c ON c.workflow = run.id

-- name: look
-- How a workflow stands, as one attempt on one node sees it.
SELECT w.name, w.state, w.retries, coalesce(w.token = %(token)s AND w.attempt = %(attempt)s, false) AS mine,
    EXISTS (SELECT FROM {schema}.node n WHERE n.id = %(node)s AND n.seen > clock_timestamp() - n.lease) AS beating,
    coalesce((SELECT n.draining FROM {schema}.node n WHERE n.id = %(node)s), false) AS draining,
    coalesce(w.deadline <= clock_timestamp(), false) AS late,
    coalesce(NOT w.dispatched AND w.node IS NULL, false) AS undelivered, w.created_at::text AS born
FROM {schema}.workflow w WHERE w.id = %(id)s

-- name: finish
-- An attempt ends with an outcome. The lock waits for a checkpoint of this attempt that is still on its way. Here and
-- below the state stands behind it: see `save`.
WITH own AS (
    SELECT id, state FROM {schema}.workflow
    WHERE id = %(id)s AND attempt = %(attempt)s AND token = %(token)s
    AND (deadline IS NULL OR deadline > clock_timestamp())
    FOR UPDATE
), done AS (
    UPDATE {schema}.workflow w
    SET state = %(state)s, finished_at = clock_timestamp(), dispatched = %(dispatched)s, error = %(error)s,
        node = CASE WHEN %(dispatched)s THEN NULL ELSE w.node END
    FROM own WHERE w.id = own.id AND own.state = 'RUNNING'
    RETURNING w.id, w.root_id
), compensated AS (
    INSERT INTO {schema}.workflow (id, name, queue, state, max_crashes, timeout, parent_id, root_id, publish_at)
    SELECT o.id, o.name, o.queue, 'ENQUEUED', o.max_crashes, o.timeout, o.workflow, done.root_id, clock_timestamp()
    FROM {schema}.on_cancel o JOIN done ON done.id = o.workflow AND %(state)s = 'DEAD'
    ON CONFLICT (id) DO NOTHING
    RETURNING id
), with_message AS (
    INSERT INTO {schema}.input (workflow, envelope, body, content_type, content_encoding)
    SELECT o.id, o.envelope, o.body, o.content_type, o.content_encoding
    FROM {schema}.on_cancel o JOIN compensated ON compensated.id = o.id
    ON CONFLICT (workflow) DO NOTHING
)
INSERT INTO {schema}.output (workflow, ok, value, content_type)
SELECT id, %(ok)s, %(value)s, %(content_type)s FROM done
ON CONFLICT (workflow) DO UPDATE SET ok = excluded.ok, value = excluded.value, content_type = excluded.content_type
RETURNING true

-- name: suspend
-- An attempt waits without a worker, until its time or until what it awaits has come; what is there already makes it
-- runnable at once. Whatever arrives counts `signal` up: if that has moved since this statement's own snapshot,
-- nothing is written, and the statement is made again.
WITH seen AS MATERIALIZED (
    SELECT signal FROM {schema}.workflow WHERE id = %(id)s
), own AS (
    SELECT id, state, signal, node, worker, claimed_at,
        EXISTS (SELECT FROM {schema}.checkpoint c WHERE c.workflow = %(id)s AND c.attempt = %(attempt)s
                AND c.ok IS NOT NULL) AS moved
    FROM {schema}.workflow
    WHERE id = %(id)s AND attempt = %(attempt)s AND token = %(token)s
    FOR UPDATE
), missing AS MATERIALIZED (
    SELECT min((SELECT count(*) FROM {schema}.awaiting a WHERE a.waiter = %(id)s AND a.wait = n.wait) - n.spare)::integer
        AS awaits
    FROM unnest(%(waits)s::text[], %(spares)s::integer[]) AS n (wait, spare)
), arrived AS MATERIALIZED (
    SELECT coalesce(missing.awaits <= 0, false) OR EXISTS (
        SELECT FROM unnest(%(topics)s::text[]) AS t (topic), {schema}.message m
        WHERE m.workflow = %(id)s AND m.topic = t.topic AND m.taken_by IS NULL) AS already
    FROM missing
), freed AS (
    UPDATE {schema}.workflow w
    SET state = CASE WHEN arrived.already THEN 'ENQUEUED' ELSE 'SUSPENDED' END, node = NULL, token = NULL,
        crashes = CASE WHEN own.moved THEN 0 ELSE w.crashes END,
        wake_at = clock_timestamp() + make_interval(secs => %(seconds)s), waiting_for = %(reason)s,
        awaits = missing.awaits, topics = %(topics)s::text[],
        publish_at = CASE WHEN arrived.already THEN clock_timestamp() + make_interval(secs => %(republish_after)s) END,
        published_at = CASE WHEN arrived.already THEN clock_timestamp() END
    FROM own, seen, missing, arrived WHERE w.id = own.id AND own.state = 'RUNNING' AND own.signal = seen.signal
    RETURNING w.id, w.state, w.published_at, w.attempt
), noted AS (
    INSERT INTO {schema}.attempt (workflow, attempt, node, worker, began_at, ended_at, ending)
    SELECT freed.id, freed.attempt, own.node, own.worker, own.claimed_at, clock_timestamp(), 'suspended'
    FROM freed JOIN own ON own.id = freed.id ON CONFLICT (workflow, attempt) DO NOTHING
)
SELECT freed.state, i.workflow, freed.published_at, freed.attempt, i.envelope, i.body, i.content_type, i.content_encoding
FROM own LEFT JOIN freed ON freed.id = own.id
LEFT JOIN {schema}.input i ON i.workflow = freed.id AND freed.state = 'ENQUEUED'
WHERE own.state = 'RUNNING'

-- name: release
-- An attempt is handed over: enqueued again, its message sent by the one who releases it.
WITH own AS (
    SELECT id, state, node, worker, claimed_at,
        EXISTS (SELECT FROM {schema}.checkpoint c WHERE c.workflow = %(id)s AND c.attempt = %(attempt)s
                AND c.ok IS NOT NULL) AS moved
    FROM {schema}.workflow
    WHERE id = %(id)s AND attempt = %(attempt)s AND token = %(token)s
    FOR UPDATE
), freed AS (
    UPDATE {schema}.workflow w
    SET state = 'ENQUEUED', node = NULL, token = NULL,
        crashes = CASE WHEN own.moved THEN 0 ELSE w.crashes END, published_at = clock_timestamp(),
        publish_at = clock_timestamp() + make_interval(secs => %(republish_after)s)
    FROM own WHERE w.id = own.id AND own.state = 'RUNNING'
    RETURNING w.id, w.published_at, w.attempt
), noted AS (
    INSERT INTO {schema}.attempt (workflow, attempt, node, worker, began_at, ended_at, ending)
    SELECT freed.id, freed.attempt, own.node, own.worker, own.claimed_at, clock_timestamp(), 'handed over'
    FROM freed JOIN own ON own.id = freed.id ON CONFLICT (workflow, attempt) DO NOTHING
)
SELECT freed.id, freed.published_at, freed.attempt, i.envelope, i.body, i.content_type, i.content_encoding
FROM freed JOIN {schema}.input i ON i.workflow = freed.id

-- name: again
-- An attempt ends by Celery's own retry: its new message replaces the old one, its failed steps run anew.
WITH own AS (
    SELECT id, state, node, worker, claimed_at,
        EXISTS (SELECT FROM {schema}.checkpoint c WHERE c.workflow = %(id)s AND c.attempt = %(attempt)s
                AND c.ok IS NOT NULL) AS moved
    FROM {schema}.workflow
    WHERE id = %(id)s AND attempt = %(attempt)s AND token = %(token)s
    FOR UPDATE
), freed AS (
    UPDATE {schema}.workflow w
    SET state = 'SUSPENDED', node = NULL, token = NULL, retries = %(retries)s,
        crashes = CASE WHEN own.moved THEN 0 ELSE w.crashes END, waiting_for = 'retry',
        wake_at = clock_timestamp() + make_interval(secs => %(seconds)s)
    FROM own WHERE w.id = own.id AND own.state = 'RUNNING'
    RETURNING w.id, w.attempt
), noted AS (
    INSERT INTO {schema}.attempt (workflow, attempt, node, worker, began_at, ended_at, ending)
    SELECT freed.id, freed.attempt, own.node, own.worker, own.claimed_at, clock_timestamp(), 'retried'
    FROM freed JOIN own ON own.id = freed.id ON CONFLICT (workflow, attempt) DO NOTHING
), renewed AS (
    UPDATE {schema}.input i
    SET envelope = %(envelope)s, body = %(body)s, content_type = %(content_type)s, content_encoding = %(content_encoding)s
    FROM freed WHERE i.workflow = freed.id
), cleared AS (
    DELETE FROM {schema}.checkpoint c USING freed WHERE c.workflow = freed.id AND c.ok IS NOT TRUE
)
SELECT true FROM freed

-- name: resume
-- Workflows that have ended without success go on past their completed steps, all of them or none; failed steps run
-- anew, no deadline holds any more. While its last owner still delivers the old end, or runs the step in which it was
-- cancelled, the message waits for that; the step may still record its outcome.
WITH ended AS MATERIALIZED (
    SELECT id, state, attempt, node, worker, claimed_at, finished_at FROM {schema}.workflow
    WHERE id = ANY(%(ids)s::text[]) AND state IN ('CANCELLED', 'DEAD', 'FAILURE') ORDER BY id FOR UPDATE
), freed AS (
    UPDATE {schema}.workflow w
    SET state = 'ENQUEUED', finished_at = NULL, dispatched = NULL, crashes = 0, timeout = NULL,
        token = CASE WHEN w.node IS NOT NULL THEN w.token END,
        deadline = NULL, wake_at = NULL, waiting_for = NULL, awaits = NULL, topics = NULL, signal = w.signal + 1,
        error = NULL, publishes = 0, published_at = clock_timestamp(),
        publish_at = clock_timestamp() + make_interval(secs => %(republish_after)s)
    FROM ended WHERE w.id = ended.id AND (SELECT count(*) FROM ended) = cardinality(%(ids)s::text[])
    RETURNING w.id, w.published_at, w.attempt
), noted AS (
    INSERT INTO {schema}.attempt (workflow, attempt, node, worker, began_at, ended_at, ending)
    SELECT freed.id, freed.attempt, ended.node, ended.worker,
        CASE WHEN ended.claimed_at < ended.finished_at THEN ended.claimed_at END, ended.finished_at, ended.state
    FROM freed JOIN ended ON ended.id = freed.id WHERE freed.attempt > 0 ON CONFLICT (workflow, attempt) DO NOTHING
), cleared AS (
    DELETE FROM {schema}.checkpoint c USING freed WHERE c.workflow = freed.id AND c.ok IS NOT TRUE
), withdrawn AS (
    DELETE FROM {schema}.output o USING freed WHERE o.workflow = freed.id
)
SELECT freed.id, freed.published_at, freed.attempt, i.envelope, i.body, i.content_type, i.content_encoding
FROM freed JOIN {schema}.input i ON i.workflow = freed.id

-- name: cancel
-- Workflows end at once, whatever they do; a running step may still be recorded, and nothing new starts.
WITH live AS MATERIALIZED (
    SELECT id FROM {schema}.workflow WHERE id = ANY(%(ids)s::text[]) AND finished_at IS NULL
    ORDER BY id FOR NO KEY UPDATE
), ended AS (
    UPDATE {schema}.workflow w SET state = 'CANCELLED', finished_at = clock_timestamp(), dispatched = false,
        signal = w.signal + 1, publish_at = NULL, published_at = NULL, wake_at = NULL, awaits = NULL, topics = NULL
    FROM live WHERE w.id = live.id
    RETURNING w.id, w.root_id
), told AS (
    INSERT INTO {schema}.output (workflow, ok, value) SELECT id, false, %(verdict)s FROM ended
    ON CONFLICT (workflow) DO UPDATE SET ok = excluded.ok, value = excluded.value, content_type = NULL
), compensated AS (
    INSERT INTO {schema}.workflow (id, name, queue, state, max_crashes, timeout, parent_id, root_id, publish_at)
    SELECT o.id, o.name, o.queue, 'ENQUEUED', o.max_crashes, o.timeout, o.workflow, ended.root_id, clock_timestamp()
    FROM {schema}.on_cancel o JOIN ended ON ended.id = o.workflow
    ON CONFLICT (id) DO NOTHING
    RETURNING id
), with_message AS (
    INSERT INTO {schema}.input (workflow, envelope, body, content_type, content_encoding)
    SELECT o.id, o.envelope, o.body, o.content_type, o.content_encoding
    FROM {schema}.on_cancel o JOIN compensated ON compensated.id = o.id
    ON CONFLICT (workflow) DO NOTHING
)
SELECT id FROM ended

-- name: family
-- Workflows with all that they have started, and what those have; what makes up for a cancelled one isn't meant.
WITH RECURSIVE family AS (
    SELECT id FROM {schema}.workflow WHERE id = ANY(%(ids)s::text[])
    UNION
    SELECT w.id FROM family JOIN {schema}.workflow w ON w.parent_id = family.id
    WHERE NOT EXISTS (SELECT FROM {schema}.on_cancel o WHERE o.workflow = family.id AND o.id = w.id)
)
SELECT w.id FROM family JOIN {schema}.workflow w ON w.id = family.id WHERE w.finished_at IS NULL

-- name: ask_to_cancel
-- A transaction of the caller's own wants workflows cancelled; it must not hold locks on any row that is there already.
INSERT INTO {schema}.cancellation (workflow, children) SELECT id, %(children)s FROM unnest(%(ids)s::text[]) AS asked (id)

-- name: asked_to_cancel
-- What is to be cancelled, and whether with all that it has started.
SELECT seq, workflow, children FROM {schema}.cancellation ORDER BY seq LIMIT %(limit)s

-- name: forget_cancellations
-- These are cancelled, or were finished already.
DELETE FROM {schema}.cancellation WHERE seq = ANY(%(seqs)s::bigint[])

-- name: fork
-- New workflows begin with what others had completed before a step, all of them or none; each is enqueued at once, and
-- has a compensation of its own if the other one has one.
WITH asked AS MATERIALIZED (
    SELECT * FROM unnest(%(ids)s::text[], %(sources)s::text[], %(cuts)s::integer[], %(envelopes)s::text[], %(bodys)s::bytea[],
        %(content_types)s::text[], %(content_encodings)s::text[], %(hooks)s::text[], %(hook_envelopes)s::text[],
        %(hook_bodys)s::bytea[])
        AS r (id, source, cut, envelope, body, content_type, content_encoding, hook, hook_envelope, hook_body)
), born AS (
    INSERT INTO {schema}.workflow (id, name, queue, state, max_crashes, timeout, root_id, forked_from, publish_at,
        published_at)
    SELECT asked.id, w.name, w.queue, 'ENQUEUED', w.max_crashes, w.timeout, asked.id, w.id,
        clock_timestamp() + make_interval(secs => %(republish_after)s), clock_timestamp()
    FROM asked JOIN {schema}.workflow w ON w.id = asked.source
    RETURNING id, published_at
), kept AS (
    INSERT INTO {schema}.input (workflow, envelope, body, content_type, content_encoding)
    SELECT asked.id, envelope, body, content_type, content_encoding FROM asked JOIN born ON born.id = asked.id
    ON CONFLICT (workflow) DO UPDATE SET envelope = excluded.envelope, body = excluded.body,
        content_type = excluded.content_type, content_encoding = excluded.content_encoding
), copied AS (
    INSERT INTO {schema}.checkpoint (workflow, key, seq, attempt, tries, ok, value, content_type, args, fingerprint,
        errors, child_id, wake_at, started_at, at)
    SELECT born.id, c.key, c.seq, 0, c.tries, c.ok, c.value, c.content_type, c.args, c.fingerprint, c.errors, c.child_id,
        c.wake_at, c.started_at, c.at
    FROM asked JOIN born ON born.id = asked.id
    JOIN {schema}.checkpoint c ON c.workflow = asked.source AND c.seq < asked.cut AND c.ok IS NOT NULL
), hooked AS (
    INSERT INTO {schema}.on_cancel
        (workflow, id, name, queue, max_crashes, timeout, envelope, body, content_type, content_encoding)
    SELECT born.id, asked.hook, o.name, o.queue, o.max_crashes, o.timeout, asked.hook_envelope, asked.hook_body,
        o.content_type, o.content_encoding
    FROM asked JOIN born ON born.id = asked.id JOIN {schema}.on_cancel o ON o.workflow = asked.source
    WHERE asked.hook IS NOT NULL
)
SELECT id, published_at FROM born

-- name: hooks_of
-- The messages of what is started when workflows are cancelled or given up.
SELECT o.workflow, o.id, o.envelope, o.body, o.content_type, o.content_encoding
FROM {schema}.on_cancel o WHERE o.workflow = ANY(%(ids)s::text[])

-- name: message_of
-- The stored message of workflows.
SELECT w.id, w.published_at, w.attempt, i.envelope, i.body, i.content_type, i.content_encoding
FROM {schema}.workflow w JOIN {schema}.input i ON i.workflow = w.id WHERE w.id = ANY(%(ids)s::text[])

-- name: expired
-- A workflow that wasn't started before Celery's `expires` ends; whoever found that delivers this outcome. That it is
-- enqueued is said as in `unsent`.
WITH ended AS (
    UPDATE {schema}.workflow SET state = 'CANCELLED', finished_at = clock_timestamp(), dispatched = false,
        publish_at = NULL, published_at = NULL
    WHERE id = ANY(%(ids)s::text[]) AND publish_at IS NOT NULL AND attempt = 0
    RETURNING id, root_id
), told AS (
    INSERT INTO {schema}.output (workflow, ok, value) SELECT id, false, %(verdict)s FROM ended
    ON CONFLICT (workflow) DO UPDATE SET ok = excluded.ok, value = excluded.value, content_type = NULL
), compensated AS (
    INSERT INTO {schema}.workflow (id, name, queue, state, max_crashes, timeout, parent_id, root_id, publish_at)
    SELECT o.id, o.name, o.queue, 'ENQUEUED', o.max_crashes, o.timeout, o.workflow, ended.root_id, clock_timestamp()
    FROM {schema}.on_cancel o JOIN ended ON ended.id = o.workflow
    ON CONFLICT (id) DO NOTHING
    RETURNING id
), with_message AS (
    INSERT INTO {schema}.input (workflow, envelope, body, content_type, content_encoding)
    SELECT o.id, o.envelope, o.body, o.content_type, o.content_encoding
    FROM {schema}.on_cancel o JOIN compensated ON compensated.id = o.id
    ON CONFLICT (workflow) DO NOTHING
)
SELECT id FROM ended

-- name: rescue
-- Orphans are enqueued again: those of a node that is silent for a lease (if a witness can tell, and no young
-- checkpoint says otherwise), those that their living node doesn't list, and those named as lost by this node.
-- Too many crashes since the last new checkpoint: DEAD. A process that was alive when its step's hard time limit
-- passed was ended by that: no crash, but a failed try.
WITH lost AS (
    SELECT w.id, w.attempt, w.node,
        CASE WHEN w.node = %(node)s AND w.id = ANY(%(lost)s::text[]) THEN clock_timestamp() ELSE n.seen END AS alive_at
    FROM {schema}.workflow w LEFT JOIN {schema}.node n ON n.id = w.node
    WHERE w.state = 'RUNNING' AND (
        w.node = %(node)s AND w.id = ANY(%(lost)s::text[])
        OR w.claimed_at < n.as_of AND w.id <> ALL (n.active)
        OR (n.id IS NULL OR n.seen < clock_timestamp() - n.lease)
        AND w.claimed_at < clock_timestamp() - coalesce(n.lease, make_interval(secs => %(lease)s))
        AND EXISTS (SELECT FROM {schema}.node v WHERE v.unbroken < clock_timestamp() - v.lease
                    AND v.seen > clock_timestamp() - v.lease / 2)
        AND NOT EXISTS (SELECT FROM {schema}.checkpoint c WHERE c.workflow = w.id AND c.attempt = w.attempt
                        AND c.at > clock_timestamp() - coalesce(n.lease, make_interval(secs => %(lease)s)))
    )
    ORDER BY w.id LIMIT %(limit)s
    FOR UPDATE OF w SKIP LOCKED
), overrun AS (
    UPDATE {schema}.checkpoint c SET overran = true, tries = c.tries - c.spent::int, spent = false
    FROM lost WHERE c.workflow = lost.id AND c.attempt = lost.attempt AND c.ok IS NULL AND c.kill_at <= lost.alive_at
    RETURNING c.workflow
), judged AS (
    SELECT lost.id, (lost.id NOT IN (SELECT workflow FROM overrun))::int
        + CASE WHEN EXISTS (SELECT FROM {schema}.checkpoint c WHERE c.workflow = w.id AND c.attempt = w.attempt
                            AND c.ok IS NOT NULL)
          THEN 0 ELSE w.crashes END AS crashes
    FROM lost JOIN {schema}.workflow w ON w.id = lost.id
), freed AS (
    UPDATE {schema}.workflow w
    SET crashes = judged.crashes, node = NULL, token = NULL,
        state = CASE WHEN judged.crashes > w.max_crashes THEN 'DEAD' ELSE 'ENQUEUED' END,
        publish_at = CASE WHEN judged.crashes <= w.max_crashes THEN clock_timestamp() END,
        finished_at = CASE WHEN judged.crashes > w.max_crashes THEN clock_timestamp() END,
        dispatched = CASE WHEN judged.crashes > w.max_crashes THEN false END,
        error = CASE WHEN judged.crashes > w.max_crashes THEN %(error)s END
    FROM judged WHERE w.id = judged.id
    RETURNING w.id, w.state, w.root_id, w.attempt, w.worker, w.claimed_at
), noted AS (
    INSERT INTO {schema}.attempt (workflow, attempt, node, worker, began_at, ended_at, ending)
    SELECT freed.id, freed.attempt, lost.node, freed.worker, freed.claimed_at, clock_timestamp(),
        CASE WHEN freed.id IN (SELECT workflow FROM overrun) THEN 'timed out' ELSE 'crashed' END
    FROM freed JOIN lost ON lost.id = freed.id ON CONFLICT (workflow, attempt) DO NOTHING
), told AS (
    INSERT INTO {schema}.output (workflow, ok, value)
    SELECT id, false, %(verdict)s FROM freed WHERE state = 'DEAD'
    ON CONFLICT (workflow) DO UPDATE SET ok = excluded.ok, value = excluded.value, content_type = NULL
), compensated AS (
    INSERT INTO {schema}.workflow (id, name, queue, state, max_crashes, timeout, parent_id, root_id, publish_at)
    SELECT o.id, o.name, o.queue, 'ENQUEUED', o.max_crashes, o.timeout, o.workflow, freed.root_id, clock_timestamp()
    FROM {schema}.on_cancel o JOIN freed ON freed.id = o.workflow AND freed.state = 'DEAD'
    ON CONFLICT (id) DO NOTHING
    RETURNING id
), with_message AS (
    INSERT INTO {schema}.input (workflow, envelope, body, content_type, content_encoding)
    SELECT o.id, o.envelope, o.body, o.content_type, o.content_encoding
    FROM {schema}.on_cancel o JOIN compensated ON compensated.id = o.id
    ON CONFLICT (workflow) DO NOTHING
)
SELECT id, state FROM freed

-- name: hand_over
-- A cold shutdown: what this node still runs is enqueued again; no crash is counted, and no try.
WITH own AS (
    SELECT id, node, worker, claimed_at,
        EXISTS (SELECT FROM {schema}.checkpoint c WHERE c.workflow = w.id AND c.attempt = w.attempt
                AND c.ok IS NOT NULL) AS moved
    FROM {schema}.workflow w WHERE state = 'RUNNING' AND node = %(node)s AND id = ANY(%(ids)s::text[])
    ORDER BY id FOR UPDATE
), unspent AS (
    UPDATE {schema}.checkpoint c SET tries = c.tries - 1, spent = false
    FROM own WHERE c.workflow = own.id AND c.ok IS NULL AND c.spent
), freed AS (
    UPDATE {schema}.workflow w SET state = 'ENQUEUED', node = NULL, token = NULL, publish_at = clock_timestamp(),
        crashes = CASE WHEN own.moved THEN 0 ELSE w.crashes END
    FROM own WHERE w.id = own.id
    RETURNING w.id, w.attempt
), noted AS (
    INSERT INTO {schema}.attempt (workflow, attempt, node, worker, began_at, ended_at, ending)
    SELECT freed.id, freed.attempt, own.node, own.worker, own.claimed_at, clock_timestamp(), 'handed over'
    FROM freed JOIN own ON own.id = freed.id ON CONFLICT (workflow, attempt) DO NOTHING
)
SELECT id FROM freed

-- name: wake
-- Suspended workflows whose time has come.
WITH due AS (
    SELECT id FROM {schema}.workflow WHERE state = 'SUSPENDED' AND wake_at <= (SELECT clock_timestamp())
    ORDER BY wake_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
)
UPDATE {schema}.workflow w SET state = 'ENQUEUED', publish_at = clock_timestamp(), published_at = NULL, awaits = NULL,
    topics = NULL
FROM due WHERE w.id = due.id
RETURNING w.id

-- name: expire
-- Workflows past their deadline are cancelled, whatever they do; a running step may still be recorded.
WITH late AS (
    SELECT id FROM {schema}.workflow WHERE deadline <= (SELECT clock_timestamp()) AND finished_at IS NULL
    ORDER BY deadline LIMIT %(limit)s FOR UPDATE SKIP LOCKED
), ended AS (
    UPDATE {schema}.workflow w SET state = 'CANCELLED', finished_at = clock_timestamp(), dispatched = false,
        signal = w.signal + 1, publish_at = NULL, published_at = NULL, wake_at = NULL, awaits = NULL, topics = NULL
    FROM late WHERE w.id = late.id
    RETURNING w.id, w.root_id
), told AS (
    INSERT INTO {schema}.output (workflow, ok, value) SELECT id, false, %(verdict)s FROM ended
    ON CONFLICT (workflow) DO UPDATE SET ok = excluded.ok, value = excluded.value, content_type = NULL
), compensated AS (
    INSERT INTO {schema}.workflow (id, name, queue, state, max_crashes, timeout, parent_id, root_id, publish_at)
    SELECT o.id, o.name, o.queue, 'ENQUEUED', o.max_crashes, o.timeout, o.workflow, ended.root_id, clock_timestamp()
    FROM {schema}.on_cancel o JOIN ended ON ended.id = o.workflow
    ON CONFLICT (id) DO NOTHING
    RETURNING id
), with_message AS (
    INSERT INTO {schema}.input (workflow, envelope, body, content_type, content_encoding)
    SELECT o.id, o.envelope, o.body, o.content_type, o.content_encoding
    FROM {schema}.on_cancel o JOIN compensated ON compensated.id = o.id
    ON CONFLICT (workflow) DO NOTHING
)
SELECT id FROM ended

-- name: republish
-- Take the messages that are to be sent: those never sent, those that a later one of their queue has overtaken,
-- and of a queue in which nothing moves one probe. Their next time lies twice as far away.
-- What nodes have accepted is compared as text, as it sorts as times do: one that isn't a time spoils no sweep.
WITH taken AS MATERIALIZED (
    SELECT a.key AS queue, max(a.value COLLATE "C") FILTER (
        WHERE a.value COLLATE "C" <= to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')
    ) AS at
    FROM {schema}.node n, jsonb_each_text(CASE WHEN jsonb_typeof(n.accepted) = 'object' THEN n.accepted END) a
    GROUP BY a.key
), probes AS MATERIALIZED (
    SELECT DISTINCT ON (o.queue) o.id FROM {schema}.workflow o
    WHERE o.state = 'ENQUEUED' AND o.publish_at <= (SELECT clock_timestamp()) AND o.published_at IS NOT NULL
    AND o.queue NOT IN (SELECT p.queue FROM {schema}.workflow p
                        WHERE p.state = 'ENQUEUED' AND p.publish_at > clock_timestamp() AND p.publishes > 0)
    ORDER BY o.queue, o.publish_at, o.id
), due AS (
    SELECT w.id FROM {schema}.workflow w LEFT JOIN taken ON taken.queue = w.queue
    WHERE w.state = 'ENQUEUED' AND w.publish_at <= (SELECT clock_timestamp())
    AND (w.published_at IS NULL OR w.id IN (SELECT id FROM probes)
         OR taken.at > to_char(w.published_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"'))
    ORDER BY w.publish_at, w.id LIMIT %(limit)s
    FOR UPDATE OF w SKIP LOCKED
), sent AS (
    UPDATE {schema}.workflow w
    SET published_at = clock_timestamp(), publishes = w.publishes + (w.published_at IS NOT NULL)::int,
        publish_at = clock_timestamp() + least(
            make_interval(secs => %(republish_after)s) * (2 ^ least(w.publishes, 20)),
            greatest(make_interval(hours => 1), make_interval(secs => %(republish_after)s)))
    FROM due WHERE w.id = due.id
    RETURNING w.id, w.published_at, w.attempt
)
SELECT sent.id, sent.published_at, sent.attempt, i.envelope, i.body, i.content_type, i.content_encoding
FROM sent JOIN {schema}.input i ON i.workflow = sent.id

-- name: redispatch
-- Outcomes that Celery hasn't delivered, of owners that are gone: their message is sent once more, and whoever
-- takes it returns the stored outcome through Celery's tracer. The next time lies twice as far away. A living
-- owner that hasn't said in ten leases that Celery is done has lost the answer of its pool.
WITH stuck AS (
    SELECT w.id FROM {schema}.workflow w LEFT JOIN {schema}.node n ON n.id = w.node
    WHERE NOT w.dispatched AND (
        w.claimed_at < n.as_of AND w.id <> ALL (n.active)
        OR n.seen > clock_timestamp() - n.lease
        AND w.finished_at < clock_timestamp() - greatest(n.lease * 10, make_interval(secs => %(republish_after)s))
        OR w.node IS NULL AND coalesce(w.published_at < clock_timestamp() - least(
            make_interval(secs => %(republish_after)s) * (2 ^ least(w.publishes, 20)),
            greatest(make_interval(hours => 1), make_interval(secs => %(republish_after)s))), true)
        OR w.node IS NOT NULL AND (n.id IS NULL OR n.seen < clock_timestamp() - n.lease)
        AND w.finished_at < clock_timestamp() - coalesce(n.lease, make_interval(secs => %(lease)s))
        AND EXISTS (SELECT FROM {schema}.node v WHERE v.unbroken < clock_timestamp() - v.lease
                    AND v.seen > clock_timestamp() - v.lease / 2)
    )
    ORDER BY w.id LIMIT %(limit)s
    FOR UPDATE OF w SKIP LOCKED
), freed AS (
    UPDATE {schema}.workflow w
    SET node = NULL, published_at = clock_timestamp(), publishes = w.publishes + (w.published_at IS NOT NULL)::int
    FROM stuck WHERE w.id = stuck.id
    RETURNING w.id, w.published_at, w.attempt
)
SELECT freed.id, freed.published_at, freed.attempt, i.envelope, i.body, i.content_type, i.content_encoding
FROM freed JOIN {schema}.input i ON i.workflow = freed.id

-- name: adopt
-- One process takes over the delivery of a stored outcome.
UPDATE {schema}.workflow w SET node = %(node)s, claimed_at = clock_timestamp()
FROM {schema}.output o
WHERE w.id = %(id)s AND w.name = %(name)s AND NOT w.dispatched AND w.node IS NULL AND o.workflow = w.id
RETURNING w.state, o.ok, o.value, o.content_type

-- name: confirm
-- Celery has delivered these outcomes. One that was resumed meanwhile isn't final any more, and can be claimed now.
WITH mine AS (
    SELECT id FROM {schema}.workflow
    WHERE id = ANY(%(ids)s::text[]) AND node = %(node)s AND (NOT dispatched OR state = 'ENQUEUED')
    ORDER BY id FOR UPDATE
)
UPDATE {schema}.workflow w SET dispatched = CASE WHEN w.finished_at IS NOT NULL THEN true END, node = NULL,
    token = CASE WHEN w.state <> 'ENQUEUED' THEN w.token END
FROM mine WHERE w.id = mine.id

-- name: prune
-- Finished long ago, delivered, released, and neither the child of one that lives nor awaited by one: gone with all
-- that belongs to it. One final state after the other, of each the oldest first; what is kept for ever isn't looked at.
-- Only the index workflow_kept has this order, with NULLS FIRST: another one would lead through those that stay. Until it
-- is there nothing is pruned. The last two conditions are subselects and no joins: for a join the planner may well read
-- the whole table.
-- The times are made first, here as in other sweeps, because no index is searched by a volatile function.
WITH kept AS MATERIALIZED (
    SELECT state, clock_timestamp() - make_interval(secs => seconds) AS until
    FROM unnest(%(states)s::text[], %(ages)s::float8[]) AS kept (state, seconds)
    WHERE EXISTS (SELECT FROM {schema}.migration WHERE number = 3)
), old AS (
    SELECT oldest.id FROM kept CROSS JOIN LATERAL (
        SELECT w.id FROM {schema}.workflow w
        WHERE w.state = kept.state AND w.finished_at < kept.until AND w.dispatched AND w.node IS NULL
        AND (SELECT p.finished_at IS NULL FROM {schema}.workflow p WHERE p.id = w.parent_id) IS NOT TRUE
        AND (SELECT bool_or((SELECT p.finished_at IS NULL FROM {schema}.workflow p WHERE p.id = a.waiter))
             FROM {schema}.awaiting a WHERE a.target = w.id) IS NOT TRUE
        ORDER BY w.finished_at NULLS FIRST LIMIT %(limit)s
        FOR UPDATE OF w SKIP LOCKED
    ) AS oldest
    LIMIT %(limit)s
), gone AS (
    DELETE FROM {schema}.workflow w USING old WHERE w.id = old.id RETURNING w.id
), inputs AS (
    DELETE FROM {schema}.input i USING gone WHERE i.workflow = gone.id
), outputs AS (
    DELETE FROM {schema}.output o USING gone WHERE o.workflow = gone.id
), checkpoints AS (
    DELETE FROM {schema}.checkpoint c USING gone WHERE c.workflow = gone.id
), attempts AS (
    DELETE FROM {schema}.attempt a USING gone WHERE a.workflow = gone.id
), messages AS (
    DELETE FROM {schema}.message m USING gone WHERE m.workflow = gone.id
), events AS (
    DELETE FROM {schema}.event e USING gone WHERE e.workflow = gone.id
), waits AS (
    DELETE FROM {schema}.awaiting a USING gone WHERE a.waiter = gone.id
), hooks AS (
    DELETE FROM {schema}.on_cancel o USING gone WHERE o.workflow = gone.id
)
SELECT id FROM gone

-- name: count_old
-- How many workflows have been finished for longer than they are kept, counted up to so many.
WITH kept AS MATERIALIZED (
    SELECT state, clock_timestamp() - make_interval(secs => seconds) AS until
    FROM unnest(%(states)s::text[], %(ages)s::float8[]) AS kept (state, seconds)
)
SELECT count(*) FROM (
    SELECT FROM kept CROSS JOIN LATERAL (
        SELECT FROM {schema}.workflow w WHERE w.state = kept.state AND w.finished_at < kept.until
        ORDER BY w.finished_at NULLS FIRST LIMIT %(most)s
    ) AS old
    LIMIT %(most)s
) AS counted

-- name: next_due
-- Seconds until something has to be woken, sent or cancelled; null if nothing waits for a time.
SELECT extract(epoch FROM min(at) - clock_timestamp())::float8 FROM (
    (SELECT wake_at AS at FROM {schema}.workflow WHERE state = 'SUSPENDED' ORDER BY wake_at LIMIT 1)
    UNION ALL
    (SELECT deadline FROM {schema}.workflow WHERE deadline IS NOT NULL AND finished_at IS NULL ORDER BY deadline LIMIT 1)
    UNION ALL
    (SELECT min(publish_at) FROM {schema}.workflow WHERE state = 'ENQUEUED' AND published_at IS NULL)
) AS timers

-- name: by_id
-- One workflow with its message and outcome; of values that take more bytes than wanted, only how many they are.
SELECT w.id, w.name, w.state, w.queue, w.attempt, w.crashes, w.created_at, w.started_at, w.finished_at, w.wake_at,
    w.deadline, w.waiting_for, w.parent_id, w.root_id, w.forked_from, w.node::text, w.dispatched, w.retries,
    w.worker, w.claimed_at, w.error,
    CASE WHEN octet_length(i.body) <= %(most)s::bigint THEN i.body END, octet_length(i.body), i.content_type,
    i.content_encoding, o.ok, CASE WHEN octet_length(o.value) <= %(most)s::bigint THEN o.value END, octet_length(o.value),
    o.content_type
FROM {schema}.workflow w LEFT JOIN {schema}.input i ON i.workflow = w.id LEFT JOIN {schema}.output o ON o.workflow = w.id
WHERE w.id = %(id)s
