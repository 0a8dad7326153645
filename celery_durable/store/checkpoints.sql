-- name: save
-- A step, fast: fence, drain flag, deadline and checkpoint in one statement. It writes only if all is well;
-- no row, or a unique violation, asks for save_slow. The state stands behind the lock: beside the id, the planner may
-- well read the index of all that run.
WITH run AS (
    SELECT w.id, w.state FROM {schema}.workflow w JOIN {schema}.node n ON n.id = w.node AND NOT n.draining
    WHERE w.id = %(id)s AND w.attempt = %(attempt)s AND w.token = %(token)s
    AND (w.deadline IS NULL OR w.deadline > clock_timestamp())
    FOR KEY SHARE OF w
)
INSERT INTO {schema}.checkpoint
    (workflow, key, seq, attempt, tries, ok, value, content_type, args, fingerprint, errors, started_at, at)
SELECT run.id, %(key)s, %(seq)s, %(attempt)s, %(tries)s, %(ok)s, %(value)s, %(content_type)s, %(args)s, %(fingerprint)s,
    %(errors)s, clock_timestamp() - make_interval(secs => %(took)s), clock_timestamp()
FROM run WHERE run.state = 'RUNNING'

-- name: save_slow
-- A step, slow: record if the token matches, while it runs and when it was cancelled (and perhaps resumed) meanwhile;
-- keep an outcome that is already there, and tell how the run stands. No row: another worker owns it.
WITH run AS (
    SELECT w.id, w.state, coalesce(n.draining, false) AS draining,
        coalesce(w.deadline <= clock_timestamp(), false) AS late
    FROM {schema}.workflow w LEFT JOIN {schema}.node n ON n.id = w.node
    WHERE w.id = %(id)s AND w.attempt = %(attempt)s AND w.token = %(token)s
    AND w.state IN ('RUNNING', 'CANCELLED', 'ENQUEUED')
    FOR KEY SHARE OF w
), saved AS (
    INSERT INTO {schema}.checkpoint AS c
        (workflow, key, seq, attempt, tries, ok, value, content_type, args, fingerprint, errors, started_at, at)
    SELECT run.id, %(key)s, %(seq)s, %(attempt)s, %(tries)s, %(ok)s, %(value)s, %(content_type)s, %(args)s, %(fingerprint)s,
        %(errors)s, clock_timestamp() - make_interval(secs => %(took)s), clock_timestamp()
    FROM run
    ON CONFLICT (workflow, key) DO UPDATE
    SET attempt = excluded.attempt, tries = excluded.tries, ok = excluded.ok, value = excluded.value,
        content_type = excluded.content_type, errors = excluded.errors, wake_at = NULL,
        spent = false, kill_at = NULL, overran = false, started_at = excluded.started_at, at = excluded.at
    WHERE c.ok IS NULL
    RETURNING true
)
SELECT run.state, run.draining, run.late, p.ok, p.value, p.content_type
FROM run LEFT JOIN {schema}.checkpoint p
    ON p.workflow = run.id AND p.key = %(key)s AND p.ok IS NOT NULL AND NOT EXISTS (SELECT FROM saved)

-- name: save_many
-- Steps that are ready together, fast: as save, all of them or none.
WITH run AS (
    SELECT w.id, w.state FROM {schema}.workflow w JOIN {schema}.node n ON n.id = w.node AND NOT n.draining
    WHERE w.id = %(id)s AND w.attempt = %(attempt)s AND w.token = %(token)s
    AND (w.deadline IS NULL OR w.deadline > clock_timestamp())
    FOR KEY SHARE OF w
)
INSERT INTO {schema}.checkpoint
    (workflow, key, seq, attempt, tries, ok, value, content_type, args, fingerprint, errors, started_at, at)
SELECT run.id, r.key, r.seq, %(attempt)s, r.tries, r.ok, r.value, r.content_type, r.args, r.fingerprint, r.errors,
    clock_timestamp() - make_interval(secs => r.took), clock_timestamp()
FROM run, unnest(%(keys)s::text[], %(seqs)s::integer[], %(triess)s::integer[], %(oks)s::boolean[], %(values)s::bytea[],
    %(content_types)s::text[], %(argss)s::text[], %(fingerprints)s::bytea[], %(errorss)s::bytea[], %(tooks)s::float8[])
    AS r (key, seq, tries, ok, value, content_type, args, fingerprint, errors, took)
WHERE run.state = 'RUNNING'

-- name: bound
-- From here on a worker that hangs loses its transaction, and with it the lock on its workflow. What the step has
-- allowed for its own statements doesn't hold for ours.
SELECT set_config('idle_in_transaction_session_timeout', %(timeout)s, true), set_config('statement_timeout', '0', true),
    set_config('lock_timeout', '0', true)

-- name: save_try
-- A try that failed, or that is about to start: kept with the time of the next one, never given back. An outcome
-- that is there already is kept and returned; one whose commit is still on its way is waited for.
WITH run AS (
    SELECT w.id, w.state, coalesce(n.draining, false) AS draining,
        coalesce(w.deadline <= clock_timestamp(), false) AS late
    FROM {schema}.workflow w LEFT JOIN {schema}.node n ON n.id = w.node
    WHERE w.id = %(id)s AND w.attempt = %(attempt)s AND w.token = %(token)s
    AND w.state IN ('RUNNING', 'CANCELLED', 'ENQUEUED')
    FOR KEY SHARE OF w
), saved AS (
    INSERT INTO {schema}.checkpoint AS c
        (workflow, key, seq, attempt, tries, args, fingerprint, errors, spent, wake_at, kill_at, started_at, at)
    SELECT run.id, %(key)s, %(seq)s, %(attempt)s, %(tries)s, %(args)s, %(fingerprint)s, %(errors)s, %(spent)s,
        clock_timestamp() + make_interval(secs => %(delay)s), clock_timestamp() + make_interval(secs => %(kill_in)s),
        clock_timestamp(), clock_timestamp()
    FROM run
    ON CONFLICT (workflow, key) DO UPDATE
    SET attempt = excluded.attempt, tries = excluded.tries, errors = excluded.errors, spent = excluded.spent,
        wake_at = excluded.wake_at, kill_at = excluded.kill_at, overran = false, at = excluded.at
    WHERE c.ok IS NULL
    RETURNING true
)
SELECT run.state, run.draining, run.late, p.ok, p.value, p.content_type
FROM run LEFT JOIN {schema}.checkpoint p
    ON p.workflow = run.id AND p.key = %(key)s AND p.ok IS NOT NULL AND NOT EXISTS (SELECT FROM saved)

-- name: of_workflow
-- All steps of a workflow in the order of their first call; of values that take more bytes than wanted, only how many
-- they are.
SELECT c.key, c.seq, c.attempt, c.tries, c.ok, CASE WHEN octet_length(c.value) <= %(most)s::bigint THEN c.value END,
    octet_length(c.value), c.content_type, c.args, c.fingerprint, c.errors,
    c.child_id, c.wake_at, c.started_at, c.at
FROM {schema}.checkpoint c WHERE c.workflow = %(id)s ORDER BY c.seq, c.key
