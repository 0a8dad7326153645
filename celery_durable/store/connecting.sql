-- name: ours
-- A session for our own statements. What a role is allowed by default isn't meant for them: each
-- is short or a batch, none waits for a lock for ever, and all are made again. Nothing is set if the session isn't ours
-- alone: behind a pooler it would be set for others.
SELECT pid, CASE WHEN pid = %(pid)s THEN set_config('default_transaction_isolation', %(isolation)s, false)
    || set_config('statement_timeout', '0', false) || set_config('lock_timeout', %(lock_timeout)s, false) END
FROM pg_backend_pid() AS pid

-- name: lent
-- A session that is lent to the app's own code, whose own limits hold.
SELECT pid, CASE WHEN pid = %(pid)s THEN set_config('default_transaction_isolation', %(isolation)s, false) END
FROM pg_backend_pid() AS pid
