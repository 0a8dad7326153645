-- name: is_there
-- A row if the schema has a ledger. Not to_regclass(): it may answer from what this session knew before others made it.
SELECT true FROM pg_catalog.pg_tables WHERE schemaname = %(schema)s AND tablename = 'migration'

-- name: ledger
-- What was applied. The column is there once a migration has needed it.
SELECT number, (to_jsonb(m) ->> 'oldest')::integer FROM {schema}.migration AS m

-- name: has_schema
-- A row if there is one. To make it again "if it doesn't exist" needs a right on the database all the same.
SELECT true FROM pg_catalog.pg_namespace WHERE nspname = %(schema)s

-- name: make_schema
-- The schema itself.
CREATE SCHEMA IF NOT EXISTS {schema};

-- name: make_ledger
-- The table of what was applied.
CREATE TABLE {schema}.migration (
    number      integer PRIMARY KEY,
    applied_at  timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- name: note
-- This migration is applied.
INSERT INTO {schema}.migration (number) VALUES (%s);

-- name: note_oldest
-- This migration is applied, and code that doesn't know the other one can't work any more.
ALTER TABLE {schema}.migration ADD COLUMN IF NOT EXISTS oldest integer;
INSERT INTO {schema}.migration (number, oldest) VALUES (%s, %s);

-- name: seeing
-- What others have applied during the wait for a lock must be seen, and no snapshot be kept, for which an index that is
-- built would wait.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED

-- name: unbounded
-- What a role is allowed by default isn't meant for a migration, but nobody may queue for long behind one that waits.
SELECT set_config('statement_timeout', '0', true), set_config('idle_in_transaction_session_timeout', '0', true),
    set_config('lock_timeout', %(lock_timeout)s, true)

-- name: lock
-- Whether this transaction is the one that changes the schema. It doesn't wait: a statement that waits has a snapshot.
SELECT pg_try_advisory_xact_lock(%(key)s)

-- name: lock_build
-- Whether this transaction is the one beside which the online migrations of this schema are applied.
SELECT pg_try_advisory_xact_lock(%(key)s, hashtext(%(schema)s))

-- name: builder
-- A session that builds for as long as it takes, and ends with its client. Nothing is set if the session isn't ours
-- alone: behind a pooler it would be set for others.
SELECT CASE WHEN pid = %(pid)s THEN set_config('statement_timeout', '0', false) || set_config('lock_timeout', '0', false)
    || set_config('client_connection_check_interval', '2s', false) END
FROM pg_backend_pid() AS pid

-- name: busy
-- A row if another client's session builds, drops or vacuums here: that of a process that has died may still do so.
SELECT true FROM pg_catalog.pg_locks l
JOIN pg_catalog.pg_class c ON c.oid = l.relation
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
WHERE l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()) AND l.granted
AND l.mode = 'ShareUpdateExclusiveLock' AND n.nspname = %(schema)s AND l.pid <> pg_backend_pid() AND a.usesysid IS NOT NULL
LIMIT 1

-- name: invalid
-- Indexes whose building was begun, and isn't going to be ended.
SELECT i.relname FROM pg_catalog.pg_index x
JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
JOIN pg_catalog.pg_namespace n ON n.oid = i.relnamespace
WHERE n.nspname = %(schema)s AND NOT x.indisvalid

-- name: owner
-- Whose the schema is.
SELECT pg_catalog.pg_get_userbyid(nspowner) FROM pg_catalog.pg_namespace WHERE nspname = %(schema)s

-- name: drop
-- All that there is.
DROP SCHEMA IF EXISTS {schema} CASCADE

-- name: clear
-- No workflow is left.
TRUNCATE {schema}.workflow, {schema}.node, {schema}.input, {schema}.output, {schema}.checkpoint, {schema}.message,
    {schema}.event, {schema}.awaiting, {schema}.on_cancel, {schema}.cancellation, {schema}.attempt, {schema}.sweep
