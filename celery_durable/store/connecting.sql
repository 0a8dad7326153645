-- name: ours
-- A session for our own statements. What a role is allowed by default isn't meant for them: each
-- is short or a batch, none waits for a lock for ever, and all are made again. Each has its indexes, whatever the
-- statistics say: a plan that was made while a table was small is kept when it has grown. (Before Postgres 18 a table
-- that can only be read as a whole would then be dear enough for a plan to be compiled.) Nothing is set if the session
-- isn't ours alone: behind a pooler it would be set for others.
SELECT pid, CASE WHEN pid = %(pid)s THEN set_config('default_transaction_isolation', %(isolation)s, false)
    || set_config('statement_timeout', '0', false) || set_config('lock_timeout', %(lock_timeout)s, false)
    || set_config('enable_seqscan', 'off', false) || set_config('jit', 'off', false) END
FROM pg_backend_pid() AS pid

-- name: lent
-- A session that is lent to the app's own code, whose own limits hold.
SELECT pid, CASE WHEN pid = %(pid)s THEN set_config('default_transaction_isolation', %(isolation)s, false) END
FROM pg_backend_pid() AS pid
