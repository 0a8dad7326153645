-- online
-- Lists of workflows by page, however many there are; and pruning by state, whose order no other index has.
CREATE INDEX CONCURRENTLY IF NOT EXISTS workflow_listed ON {schema}.workflow (created_at, id);
CREATE INDEX CONCURRENTLY IF NOT EXISTS workflow_named ON {schema}.workflow (name, created_at, id);
CREATE INDEX CONCURRENTLY IF NOT EXISTS workflow_ended ON {schema}.workflow (state, created_at, id)
    WHERE finished_at IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS workflow_unsuccessful ON {schema}.workflow (name, state, created_at, id)
    WHERE state IN ('FAILURE', 'CANCELLED', 'DEAD');
CREATE INDEX CONCURRENTLY IF NOT EXISTS workflow_failed ON {schema}.workflow (created_at, id) WHERE error IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS workflow_kept ON {schema}.workflow (state, finished_at NULLS FIRST)
    WHERE finished_at IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS workflow_started_by ON {schema}.workflow (root_id) WHERE root_id <> id;
CREATE INDEX CONCURRENTLY IF NOT EXISTS workflow_forked ON {schema}.workflow (forked_from) WHERE forked_from IS NOT NULL;
