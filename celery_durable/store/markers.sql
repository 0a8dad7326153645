-- name: exists
-- Whether this database has markers.
SELECT to_regclass(%(table)s) IS NOT NULL

-- name: bound
-- A worker that hangs in this transaction loses it, long before its marker may be forgotten.
SELECT set_config('idle_in_transaction_session_timeout', %(timeout)s, true)
WHERE current_setting('idle_in_transaction_session_timeout') IN ('0', '0ms')

-- name: hurry
-- With its marker written, a worker that hangs keeps its successor waiting.
SELECT set_config('idle_in_transaction_session_timeout', %(timeout)s, true)

-- name: reserve
-- The attempt that runs a step from here on: no earlier one can commit it any more. Returns the step's value if one
-- has been committed, and whose turn it is else. No row: another transaction was committed meanwhile, look again.
WITH reserved AS (
    INSERT INTO {schema}.marker AS m (workflow, born, key, attempt, token, at)
    VALUES (%(workflow)s, %(born)s, %(key)s, %(attempt)s, %(token)s, clock_timestamp())
    ON CONFLICT (workflow, born, key) DO UPDATE
    SET attempt = excluded.attempt, token = excluded.token, at = excluded.at
    WHERE m.value IS NULL AND m.attempt <= excluded.attempt
    RETURNING token, value, content_type
)
SELECT token, value, content_type FROM reserved
UNION ALL
SELECT token, value, content_type FROM {schema}.marker
WHERE workflow = %(workflow)s AND born = %(born)s AND key = %(key)s AND NOT EXISTS (SELECT FROM reserved)

-- name: keep
-- The value of a step, committed with its effects. No row: a later attempt has reserved the step, or it has a value.
INSERT INTO {schema}.marker AS m (workflow, born, key, attempt, token, value, content_type, at)
VALUES (%(workflow)s, %(born)s, %(key)s, %(attempt)s, %(token)s, %(value)s, %(content_type)s, clock_timestamp())
ON CONFLICT (workflow, born, key) DO UPDATE
SET value = excluded.value, content_type = excluded.content_type, at = excluded.at
WHERE m.token = excluded.token AND m.value IS NULL
RETURNING true

-- name: old
-- Workflows of which there are old markers, those after some that were looked at already; the oldest first.
SELECT workflow, born, at FROM {schema}.marker
WHERE at < clock_timestamp() - make_interval(secs => %(age)s) AND (%(after)s::timestamptz IS NULL OR at > %(after)s)
ORDER BY at LIMIT %(limit)s

-- name: forget
-- The old markers of these workflows, which have ended.
DELETE FROM {schema}.marker m
USING unnest(%(workflows)s::text[], %(borns)s::text[]) AS w (workflow, born)
WHERE m.workflow = w.workflow AND m.born = w.born AND m.at < clock_timestamp() - make_interval(secs => %(age)s)
