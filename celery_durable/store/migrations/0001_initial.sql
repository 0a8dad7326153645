-- The schema. Times are the database's own; no column is ever filled from a worker's clock.

CREATE TABLE {schema}.node (
    id          uuid PRIMARY KEY,
    hostname    text NOT NULL,
    pid         integer NOT NULL,
    started_at  timestamptz NOT NULL,
    lease       interval NOT NULL,
    seen        timestamptz NOT NULL,
    unbroken    timestamptz NOT NULL,
    as_of       timestamptz NOT NULL,
    active      text[] NOT NULL,
    accepted    jsonb NOT NULL,
    draining    boolean NOT NULL,
    able        boolean NOT NULL
);
COMMENT ON TABLE {schema}.node IS 'One incarnation of a running worker main process; the id is random, never the host name.';
COMMENT ON COLUMN {schema}.node.seen IS 'The last heartbeat.';
COMMENT ON COLUMN {schema}.node.unbroken IS 'Since when heartbeats have come without a gap: what makes this node a witness.';
COMMENT ON COLUMN {schema}.node.as_of IS 'The active list holds every workflow that this node had claimed by then and not finished.';
COMMENT ON COLUMN {schema}.node.active IS 'Ids of the workflows whose requests are in execution.';
COMMENT ON COLUMN {schema}.node.accepted IS 'For each queue, when the newest message that was taken from it had been published.';
COMMENT ON COLUMN {schema}.node.draining IS 'The worker shuts down: it claims nothing, and its runs are handed over.';
COMMENT ON COLUMN {schema}.node.able IS 'It can be elected to sweep: the thread that would do it is alive, too.';

CREATE TABLE {schema}.workflow (
    id            text PRIMARY KEY,
    name          text NOT NULL,
    queue         text NOT NULL,
    state         text NOT NULL,
    attempt       integer NOT NULL DEFAULT 0,
    token         uuid,
    node          uuid,
    claimed_at    timestamptz,
    crashes       integer NOT NULL DEFAULT 0,
    max_crashes   integer NOT NULL,
    signal        bigint NOT NULL DEFAULT 0,
    timeout       interval,
    deadline      timestamptz,
    wake_at       timestamptz,
    waiting_for   text,
    awaits        integer,
    topics        text[],
    publish_at    timestamptz,
    published_at  timestamptz,
    publishes     integer NOT NULL DEFAULT 0,
    retries       integer NOT NULL DEFAULT 0,
    dispatched    boolean,
    deduplication_id text,
    parent_id     text,
    root_id       text,
    forked_from   text,
    created_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at    timestamptz,
    finished_at   timestamptz,

    CONSTRAINT workflow_state CHECK (state IN ('ENQUEUED', 'RUNNING', 'SUSPENDED', 'SUCCESS', 'FAILURE', 'CANCELLED', 'DEAD')),
    CONSTRAINT workflow_running CHECK (state <> 'RUNNING' OR (node IS NOT NULL AND token IS NOT NULL AND claimed_at IS NOT NULL)),
    CONSTRAINT workflow_suspended CHECK (state <> 'SUSPENDED' OR node IS NULL),
    CONSTRAINT workflow_enqueued CHECK ((state = 'ENQUEUED') = (publish_at IS NOT NULL)),
    CONSTRAINT workflow_final CHECK ((state IN ('SUCCESS', 'FAILURE', 'CANCELLED', 'DEAD')) = (finished_at IS NOT NULL)),
    CONSTRAINT workflow_dispatched CHECK ((dispatched IS NOT NULL) = (finished_at IS NOT NULL))
) WITH (fillfactor = 70);
COMMENT ON TABLE {schema}.workflow IS 'One durable instance of a workflow task; the id is the Celery task id.';
COMMENT ON COLUMN {schema}.workflow.token IS 'Made anew for each claim; every write of the attempt carries it.';
COMMENT ON COLUMN {schema}.workflow.crashes IS 'Crashes since the last new checkpoint.';
COMMENT ON COLUMN {schema}.workflow.signal IS 'Counts what has arrived for this workflow; a suspension must have seen all of it.';
COMMENT ON COLUMN {schema}.workflow.awaits IS 'How many of the things that it awaits must still come before it is woken; null: it awaits none.';
COMMENT ON COLUMN {schema}.workflow.topics IS 'The topics of the messages that wake it; the empty text is the one of messages without a topic.';
COMMENT ON COLUMN {schema}.workflow.publish_at IS 'When its message may be sent, or sent again.';
COMMENT ON COLUMN {schema}.workflow.published_at IS 'When its message was last sent; null while it has to be sent.';
COMMENT ON COLUMN {schema}.workflow.retries IS 'How often Celery has retried the whole workflow: which of its messages counts.';
COMMENT ON COLUMN {schema}.workflow.dispatched IS 'Whether Celery has delivered the outcome (result, links, chain, chord).';

-- Sweeps cost what is active: each of these holds none of the finished workflows.
CREATE INDEX workflow_due ON {schema}.workflow (publish_at) WHERE state = 'ENQUEUED';
CREATE INDEX workflow_unsent ON {schema}.workflow (publish_at) WHERE state = 'ENQUEUED' AND published_at IS NULL;
CREATE INDEX workflow_running ON {schema}.workflow (node) WHERE state = 'RUNNING';
CREATE INDEX workflow_waking ON {schema}.workflow (wake_at) WHERE state = 'SUSPENDED';
CREATE INDEX workflow_deadline ON {schema}.workflow (deadline) WHERE deadline IS NOT NULL AND finished_at IS NULL;
CREATE INDEX workflow_undispatched ON {schema}.workflow (id) WHERE NOT dispatched;
CREATE INDEX workflow_finished ON {schema}.workflow (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX workflow_parent ON {schema}.workflow (parent_id) WHERE parent_id IS NOT NULL;
CREATE UNIQUE INDEX workflow_deduplication ON {schema}.workflow (name, deduplication_id)
    WHERE deduplication_id IS NOT NULL AND finished_at IS NULL;

CREATE TABLE {schema}.input (
    workflow          text PRIMARY KEY,
    envelope          text NOT NULL,
    body              bytea NOT NULL,
    content_type      text NOT NULL,
    content_encoding  text NOT NULL
);
COMMENT ON TABLE {schema}.input IS 'The Celery message of each workflow, as it was first sent.';

CREATE TABLE {schema}.output (
    workflow      text PRIMARY KEY,
    ok            boolean NOT NULL,
    value         bytea NOT NULL,
    content_type  text
);
COMMENT ON TABLE {schema}.output IS 'What a finished workflow returned (ok), or the error it ended with. No content type means JSON.';

CREATE TABLE {schema}.checkpoint (
    workflow      text NOT NULL,
    key           text NOT NULL,
    seq           integer NOT NULL,
    attempt       integer NOT NULL,
    tries         integer NOT NULL,
    ok            boolean,
    value         bytea,
    content_type  text,
    args          text,
    fingerprint   bytea,
    errors        bytea,
    child_id      text,
    wake_at       timestamptz,
    spent         boolean NOT NULL DEFAULT false,
    kill_at       timestamptz,
    overran       boolean NOT NULL DEFAULT false,
    started_at    timestamptz NOT NULL,
    at            timestamptz NOT NULL,
    PRIMARY KEY (workflow, key),
    CONSTRAINT checkpoint_settled CHECK ((ok IS NULL) = (value IS NULL))
);
COMMENT ON TABLE {schema}.checkpoint IS 'The kept outcome of each step; ok is null while it is not settled (a failed try, a wait).';
COMMENT ON COLUMN {schema}.checkpoint.spent IS 'The last of the tries was counted before it began: it may be the one that crashes its process.';
COMMENT ON COLUMN {schema}.checkpoint.kill_at IS 'When the hard time limit of the try that runs will have ended its process.';
COMMENT ON COLUMN {schema}.checkpoint.overran IS 'That time limit has ended the process; the next attempt counts the try as failed.';

CREATE TABLE {schema}.message (
    seq              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    workflow         text NOT NULL,
    topic            text NOT NULL,
    idempotency_key  text NOT NULL,
    body             bytea NOT NULL,
    content_type     text,
    taken_by         text,
    told             boolean NOT NULL,
    sent_at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (workflow, idempotency_key)
);
COMMENT ON TABLE {schema}.message IS 'What was sent to each workflow; kept, once taken, for its idempotency key.';
COMMENT ON COLUMN {schema}.message.taken_by IS 'The key of the recv that has it.';
COMMENT ON COLUMN {schema}.message.told IS 'The workflow knows that it came: whoever sent it has woken it.';
CREATE INDEX message_waiting ON {schema}.message (workflow, topic, seq) WHERE taken_by IS NULL;
CREATE INDEX message_untold ON {schema}.message (seq) WHERE NOT told;

CREATE TABLE {schema}.event (
    workflow      text NOT NULL,
    key           text NOT NULL,
    value         bytea NOT NULL,
    content_type  text,
    at            timestamptz NOT NULL,
    PRIMARY KEY (workflow, key)
);
COMMENT ON TABLE {schema}.event IS 'What each workflow has published; the latest value of each key.';

CREATE TABLE {schema}.awaiting (
    target  text NOT NULL,
    event   text NOT NULL,
    waiter  text NOT NULL,
    wait    text NOT NULL,
    PRIMARY KEY (target, event, waiter, wait)
);
COMMENT ON TABLE {schema}.awaiting IS 'Which workflow awaits which: its end (event is empty), or an event of it. Gone as soon as that has come.';
COMMENT ON COLUMN {schema}.awaiting.wait IS 'The key of the wait: one wait may be for many.';
CREATE INDEX awaiting_waiter ON {schema}.awaiting (waiter, wait);

CREATE TABLE {schema}.on_cancel (
    workflow          text PRIMARY KEY,
    id                text NOT NULL,
    name              text NOT NULL,
    queue             text NOT NULL,
    max_crashes       integer NOT NULL,
    timeout           interval,
    envelope          text NOT NULL,
    body              bytea NOT NULL,
    content_type      text NOT NULL,
    content_encoding  text NOT NULL
);
CREATE UNIQUE INDEX on_cancel_id ON {schema}.on_cancel (id);
COMMENT ON TABLE {schema}.on_cancel IS 'The workflow, with its message, that is born when another one ends as CANCELLED or DEAD.';

CREATE TABLE {schema}.cancellation (
    seq       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    workflow  text NOT NULL,
    children  boolean NOT NULL
);
COMMENT ON TABLE {schema}.cancellation IS 'Workflows to be cancelled: what a transaction of the caller''s own has asked for.';

ALTER TABLE {schema}.workflow SET (autovacuum_vacuum_scale_factor = 0.05);
