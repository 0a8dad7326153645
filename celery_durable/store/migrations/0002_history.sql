-- How each attempt has ended, who ran a workflow last, and when the last sweeps were: what is shown, and decides nothing.

CREATE TABLE {schema}.attempt (
    workflow  text NOT NULL,
    attempt   integer NOT NULL,
    node      uuid,
    worker    text,
    began_at  timestamptz,
    ended_at  timestamptz NOT NULL,
    ending    text NOT NULL,
    PRIMARY KEY (workflow, attempt),
    CONSTRAINT attempt_ending CHECK (ending IN
        ('suspended', 'handed over', 'retried', 'crashed', 'timed out', 'FAILURE', 'CANCELLED', 'DEAD'))
);
COMMENT ON TABLE {schema}.attempt IS 'The attempts that have ended without the end of their workflow, or were followed by a resume; the last one is in the workflow.';
COMMENT ON COLUMN {schema}.attempt.worker IS 'The host name of the node.';

ALTER TABLE {schema}.workflow ADD COLUMN worker text, ADD COLUMN error text;
COMMENT ON COLUMN {schema}.workflow.worker IS 'The host name of the node that has claimed it last.';
COMMENT ON COLUMN {schema}.workflow.error IS 'The beginning of the error that it has ended with, to be found by.';

CREATE TABLE {schema}.sweep (
    sweeper  text PRIMARY KEY,
    worker   text,
    at       timestamptz NOT NULL,
    found    jsonb NOT NULL
);
COMMENT ON TABLE {schema}.sweep IS 'The last sweep of each kind of sweeper: a worker''s node, beat, a command.';
