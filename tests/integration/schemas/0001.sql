CREATE SCHEMA celery_durable;
CREATE TABLE celery_durable.awaiting (
    target text NOT NULL,
    event text NOT NULL,
    waiter text NOT NULL,
    wait text NOT NULL
);

COMMENT ON TABLE celery_durable.awaiting IS 'Which workflow awaits which: its end (event is empty), or an event of it. Gone as soon as that has come.';

COMMENT ON COLUMN celery_durable.awaiting.wait IS 'The key of the wait: one wait may be for many.';

CREATE TABLE celery_durable.cancellation (
    seq bigint NOT NULL,
    workflow text NOT NULL,
    children boolean NOT NULL
);

COMMENT ON TABLE celery_durable.cancellation IS 'Workflows to be cancelled: what a transaction of the caller''s own has asked for.';

ALTER TABLE celery_durable.cancellation ALTER COLUMN seq ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME celery_durable.cancellation_seq_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE celery_durable.checkpoint (
    workflow text NOT NULL,
    key text NOT NULL,
    seq integer NOT NULL,
    attempt integer NOT NULL,
    tries integer NOT NULL,
    ok boolean,
    value bytea,
    content_type text,
    args text,
    fingerprint bytea,
    errors bytea,
    child_id text,
    wake_at timestamp with time zone,
    spent boolean DEFAULT false NOT NULL,
    kill_at timestamp with time zone,
    overran boolean DEFAULT false NOT NULL,
    started_at timestamp with time zone NOT NULL,
    at timestamp with time zone NOT NULL,
    CONSTRAINT checkpoint_settled CHECK (((ok IS NULL) = (value IS NULL)))
);

COMMENT ON TABLE celery_durable.checkpoint IS 'The kept outcome of each step; ok is null while it is not settled (a failed try, a wait).';

COMMENT ON COLUMN celery_durable.checkpoint.spent IS 'The last of the tries was counted before it began: it may be the one that crashes its process.';

COMMENT ON COLUMN celery_durable.checkpoint.kill_at IS 'When the hard time limit of the try that runs will have ended its process.';

COMMENT ON COLUMN celery_durable.checkpoint.overran IS 'That time limit has ended the process; the next attempt counts the try as failed.';

CREATE TABLE celery_durable.event (
    workflow text NOT NULL,
    key text NOT NULL,
    value bytea NOT NULL,
    content_type text,
    at timestamp with time zone NOT NULL
);

COMMENT ON TABLE celery_durable.event IS 'What each workflow has published; the latest value of each key.';

CREATE TABLE celery_durable.input (
    workflow text NOT NULL,
    envelope text NOT NULL,
    body bytea NOT NULL,
    content_type text NOT NULL,
    content_encoding text NOT NULL
);

COMMENT ON TABLE celery_durable.input IS 'The Celery message of each workflow, as it was first sent.';

CREATE TABLE celery_durable.message (
    seq bigint NOT NULL,
    workflow text NOT NULL,
    topic text NOT NULL,
    idempotency_key text NOT NULL,
    body bytea NOT NULL,
    content_type text,
    taken_by text,
    told boolean NOT NULL,
    sent_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);

COMMENT ON TABLE celery_durable.message IS 'What was sent to each workflow; kept, once taken, for its idempotency key.';

COMMENT ON COLUMN celery_durable.message.taken_by IS 'The key of the recv that has it.';

COMMENT ON COLUMN celery_durable.message.told IS 'The workflow knows that it came: whoever sent it has woken it.';

ALTER TABLE celery_durable.message ALTER COLUMN seq ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME celery_durable.message_seq_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE celery_durable.migration (
    number integer NOT NULL,
    applied_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);

CREATE TABLE celery_durable.node (
    id uuid NOT NULL,
    hostname text NOT NULL,
    pid integer NOT NULL,
    started_at timestamp with time zone NOT NULL,
    lease interval NOT NULL,
    seen timestamp with time zone NOT NULL,
    unbroken timestamp with time zone NOT NULL,
    as_of timestamp with time zone NOT NULL,
    active text[] NOT NULL,
    accepted jsonb NOT NULL,
    draining boolean NOT NULL,
    able boolean NOT NULL
);

COMMENT ON TABLE celery_durable.node IS 'One incarnation of a running worker main process; the id is random, never the host name.';

COMMENT ON COLUMN celery_durable.node.seen IS 'The last heartbeat.';

COMMENT ON COLUMN celery_durable.node.unbroken IS 'Since when heartbeats have come without a gap: what makes this node a witness.';

COMMENT ON COLUMN celery_durable.node.as_of IS 'The active list holds every workflow that this node had claimed by then and not finished.';

COMMENT ON COLUMN celery_durable.node.active IS 'Ids of the workflows whose requests are in execution.';

COMMENT ON COLUMN celery_durable.node.accepted IS 'For each queue, when the newest message that was taken from it had been published.';

COMMENT ON COLUMN celery_durable.node.draining IS 'The worker shuts down: it claims nothing, and its runs are handed over.';

COMMENT ON COLUMN celery_durable.node.able IS 'It can be elected to sweep: the thread that would do it is alive, too.';

CREATE TABLE celery_durable.on_cancel (
    workflow text NOT NULL,
    id text NOT NULL,
    name text NOT NULL,
    queue text NOT NULL,
    max_crashes integer NOT NULL,
    timeout interval,
    envelope text NOT NULL,
    body bytea NOT NULL,
    content_type text NOT NULL,
    content_encoding text NOT NULL
);

COMMENT ON TABLE celery_durable.on_cancel IS 'The workflow, with its message, that is born when another one ends as CANCELLED or DEAD.';

CREATE TABLE celery_durable.output (
    workflow text NOT NULL,
    ok boolean NOT NULL,
    value bytea NOT NULL,
    content_type text
);

COMMENT ON TABLE celery_durable.output IS 'What a finished workflow returned (ok), or the error it ended with. No content type means JSON.';

CREATE TABLE celery_durable.workflow (
    id text NOT NULL,
    name text NOT NULL,
    queue text NOT NULL,
    state text NOT NULL,
    attempt integer DEFAULT 0 NOT NULL,
    token uuid,
    node uuid,
    claimed_at timestamp with time zone,
    crashes integer DEFAULT 0 NOT NULL,
    max_crashes integer NOT NULL,
    signal bigint DEFAULT 0 NOT NULL,
    timeout interval,
    deadline timestamp with time zone,
    wake_at timestamp with time zone,
    waiting_for text,
    awaits integer,
    topics text[],
    publish_at timestamp with time zone,
    published_at timestamp with time zone,
    publishes integer DEFAULT 0 NOT NULL,
    retries integer DEFAULT 0 NOT NULL,
    dispatched boolean,
    deduplication_id text,
    parent_id text,
    root_id text,
    forked_from text,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    started_at timestamp with time zone,
    finished_at timestamp with time zone,
    CONSTRAINT workflow_dispatched CHECK (((dispatched IS NOT NULL) = (finished_at IS NOT NULL))),
    CONSTRAINT workflow_enqueued CHECK (((state = 'ENQUEUED'::text) = (publish_at IS NOT NULL))),
    CONSTRAINT workflow_final CHECK (((state = ANY (ARRAY['SUCCESS'::text, 'FAILURE'::text, 'CANCELLED'::text, 'DEAD'::text])) = (finished_at IS NOT NULL))),
    CONSTRAINT workflow_running CHECK (((state <> 'RUNNING'::text) OR ((node IS NOT NULL) AND (token IS NOT NULL) AND (claimed_at IS NOT NULL)))),
    CONSTRAINT workflow_state CHECK ((state = ANY (ARRAY['ENQUEUED'::text, 'RUNNING'::text, 'SUSPENDED'::text, 'SUCCESS'::text, 'FAILURE'::text, 'CANCELLED'::text, 'DEAD'::text]))),
    CONSTRAINT workflow_suspended CHECK (((state <> 'SUSPENDED'::text) OR (node IS NULL)))
)
WITH (fillfactor='70', autovacuum_vacuum_scale_factor='0.05');

COMMENT ON TABLE celery_durable.workflow IS 'One durable instance of a workflow task; the id is the Celery task id.';

COMMENT ON COLUMN celery_durable.workflow.token IS 'Made anew for each claim; every write of the attempt carries it.';

COMMENT ON COLUMN celery_durable.workflow.crashes IS 'Crashes since the last new checkpoint.';

COMMENT ON COLUMN celery_durable.workflow.signal IS 'Counts what has arrived for this workflow; a suspension must have seen all of it.';

COMMENT ON COLUMN celery_durable.workflow.awaits IS 'How many of the things that it awaits must still come before it is woken; null: it awaits none.';

COMMENT ON COLUMN celery_durable.workflow.topics IS 'The topics of the messages that wake it; the empty text is the one of messages without a topic.';

COMMENT ON COLUMN celery_durable.workflow.publish_at IS 'When its message may be sent, or sent again.';

COMMENT ON COLUMN celery_durable.workflow.published_at IS 'When its message was last sent; null while it has to be sent.';

COMMENT ON COLUMN celery_durable.workflow.retries IS 'How often Celery has retried the whole workflow: which of its messages counts.';

COMMENT ON COLUMN celery_durable.workflow.dispatched IS 'Whether Celery has delivered the outcome (result, links, chain, chord).';

INSERT INTO celery_durable.awaiting VALUES
	('answering', 'answered', 'watching', 'durable.get_event'),
	('fd3c806e-5d79-5bf2-bec5-bebc5eda5bfc', '', 'convoy', 'durable.get');

INSERT INTO celery_durable.cancellation OVERRIDING SYSTEM VALUE VALUES
	(1, 'unwanted', false);

INSERT INTO celery_durable.checkpoint VALUES
	('refused', 'tests.fixtures.apps.released.pack', 1, 1, 1, true, '\x30', NULL, '''refused'', 0', '\x6af2780d84680af4', NULL, NULL, NULL, false, NULL, false, '2026-11-28 11:29:22.768764+00', '2026-11-28 11:29:22.795754+00'),
	('shipped', 'tests.fixtures.apps.released.pack', 1, 1, 1, true, '\x30', NULL, '''shipped'', 0', '\x7aae99090332a309', NULL, NULL, NULL, false, NULL, false, '2026-11-28 11:29:22.825854+00', '2026-11-28 11:29:22.827111+00'),
	('shipped', 'tests.fixtures.apps.released.pack#2', 2, 1, 1, true, '\x31', NULL, '''shipped'', 1', '\xafc60ac466590b41', NULL, NULL, NULL, false, NULL, false, '2026-11-28 11:29:22.841102+00', '2026-11-28 11:29:22.841988+00'),
	('shipped', 'tests.fixtures.apps.released.pack#3', 3, 1, 1, true, '\x32', NULL, '''shipped'', 2', '\xbc542344e451950b', NULL, NULL, NULL, false, NULL, false, '2026-11-28 11:29:22.860542+00', '2026-11-28 11:29:22.86152+00'),
	('dropped', 'tests.fixtures.apps.released.pack', 1, 1, 1, true, '\x30', NULL, '''dropped'', 0', '\x4d11ec4368701803', NULL, NULL, NULL, false, NULL, false, '2026-11-28 11:29:22.927498+00', '2026-11-28 11:29:22.945531+00'),
	('stored', 'tests.fixtures.apps.released.pack', 1, 1, 1, true, '\x30', NULL, '''stored'', 0', '\x33b4042a40b2e348', NULL, NULL, NULL, false, NULL, false, '2026-11-28 11:29:23.911764+00', '2026-11-28 11:29:23.912799+00'),
	('stored', 'durable.sleep', 2, 1, 0, true, '\x6e756c6c', NULL, '', NULL, NULL, NULL, '2026-11-28 12:29:23.941021+00', false, NULL, false, '2026-11-28 11:29:23.941022+00', '2026-11-28 11:29:23.941022+00'),
	('late', 'tests.fixtures.apps.released.pack', 1, 1, 1, true, '\x30', NULL, '''late'', 0', '\xb795db14d7bc2c3f', NULL, NULL, NULL, false, NULL, false, '2026-11-28 11:29:24.025847+00', '2026-11-28 11:29:24.026968+00'),
	('late', 'durable.sleep', 2, 1, 0, true, '\x6e756c6c', NULL, '', NULL, NULL, NULL, '2026-11-28 12:29:24.044563+00', false, NULL, false, '2026-11-28 11:29:24.044564+00', '2026-11-28 11:29:24.044564+00'),
	('asking', 'durable.set_event', 1, 1, 1, true, '\x6e756c6c', NULL, '''asked'', [''asking'']', '\xdeed577c62e1ac98', NULL, NULL, NULL, false, NULL, false, '2026-11-28 11:29:24.2358+00', '2026-11-28 11:29:24.2358+00'),
	('cancelled', 'durable.set_event', 1, 1, 1, true, '\x6e756c6c', NULL, '''asked'', [''cancelled'']', '\xbacccc588fff4a4d', NULL, NULL, NULL, false, NULL, false, '2026-11-28 11:29:24.359994+00', '2026-11-28 11:29:24.359994+00'),
	('checked', 'tests.fixtures.apps.released.weigh', 1, 1, 1, NULL, NULL, NULL, '''checked''', '\x269f7ef5d5010dce', '\x7b2274797065223a20226275696c74696e733a436f6e6e656374696f6e4572726f72222c20226d657373616765223a2022746865207363616c657320617265206f6666222c202274726163656261636b223a202254726163656261636b20286d6f737420726563656e742063616c6c206c617374293a5c6e202046696c65205c222f6170702f63656c6572795f64757261626c652f656e67696e652f737465702e70795c222c206c696e65203236382c20696e2063616c6c5f626f64795c6e2020202072657475726e20456e64656428626f6479282a73656c662e617267732c202a2a73656c662e6b776172677329295c6e20202020202020202020202020202020205e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5c6e202046696c65205c222f6170702f63656c6572795f64757261626c652f696e6c696e652e70795c222c206c696e652036362c20696e205f5f63616c6c5f5f5c6e202020207769746820696e6c696e652e7472616e736c6174656428292c205f7075736865642873656c662e5f7461736b2c2072657175657374293a5c6e202046696c65205c222f6170702f6c69622f707974686f6e332e31312f636f6e746578746c69622e70795c222c206c696e65203135382c20696e205f5f657869745f5f5c6e2020202073656c662e67656e2e7468726f77287479702c2076616c75652c2074726163656261636b295c6e202046696c65205c222f6170702f63656c6572795f64757261626c652f696e6c696e652e70795c222c206c696e65203133332c20696e207472616e736c617465645c6e202020207261697365206572726f722066726f6d205f63617573655f6f66286572726f72295c6e202046696c65205c222f6170702f6c69622f707974686f6e332e31312f736974652d7061636b616765732f63656c6572792f6170702f6175746f72657472792e70795c222c206c696e652033382c20696e2072756e5c6e2020202072657475726e207461736b2e5f6f7269675f72756e282a617267732c202a2a6b7761726773295c6e20202020202020202020205e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5c6e202046696c65205c222f6170702f74657374732f66697874757265732f617070732f72656c65617365642e70795c222c206c696e652034312c20696e2077656967685c6e20202020726169736520436f6e6e656374696f6e4572726f72285c22746865207363616c657320617265206f66665c22295c6e436f6e6e656374696f6e4572726f723a20746865207363616c657320617265206f66665c6e222c202261747472696275746573223a207b7d2c20226d656d62657273223a207b7d2c202261726773223a205b22746865207363616c657320617265206f6666225d2c20226174223a2022323032362d31312d32385431313a32393a32342e3430393933322b30303a3030227d', NULL, '2026-11-28 12:29:24.450238+00', false, NULL, false, '2026-11-28 11:29:24.450239+00', '2026-11-28 11:29:24.450239+00'),
	('asking', 'durable.recv', 2, 2, 0, true, '\x7b226669727374223a20317d', NULL, '''first''', '\x2d4668a027f663d5', NULL, NULL, NULL, false, NULL, false, '2026-11-28 11:29:24.612556+00', '2026-11-28 11:29:24.612556+00'),
	('asking', 'tests.fixtures.apps.released.pack', 3, 2, 1, true, '\x30', NULL, '''asking'', 0', '\x9e79c30594318b2c', NULL, NULL, NULL, false, NULL, false, '2026-11-28 11:29:24.620581+00', '2026-11-28 11:29:24.621122+00'),
	('0a5b848e-4254-49ae-9ba2-3318645b7b81', 'tests.fixtures.apps.released.pack', 1, 1, 1, true, '\x30', NULL, '''cancelled-refund'', 0', '\x24a29e518c7f0d88', NULL, NULL, NULL, false, NULL, false, '2026-11-28 11:29:25.257733+00', '2026-11-28 11:29:25.258622+00'),
	('convoy', 'tests.fixtures.apps.released.ship.delay', 1, 1, 1, true, '\x2266643363383036652d356437392d356266322d626563352d62656263356564613562666322', NULL, '''convoy-a''', '\x3381aa7cb5535062', NULL, 'fd3c806e-5d79-5bf2-bec5-bebc5eda5bfc', NULL, false, NULL, false, '2026-11-28 11:29:25.332615+00', '2026-11-28 11:29:25.332615+00'),
	('convoy', 'tests.fixtures.apps.released.answer.delay', 2, 1, 1, true, '\x2239353436656131652d616539312d356335372d623935322d64313065316434663832343422', NULL, '''convoy-b''', '\xfb709f620c86b289', NULL, '9546ea1e-ae91-5c57-b952-d10e1d4f8244', NULL, false, NULL, false, '2026-11-28 11:29:25.363165+00', '2026-11-28 11:29:25.363165+00'),
	('9546ea1e-ae91-5c57-b952-d10e1d4f8244', 'tests.fixtures.apps.released.pack', 1, 1, 1, true, '\x30', NULL, '''convoy-b'', 0', '\xf2f1884ebbfd6a2d', NULL, NULL, NULL, false, NULL, false, '2026-11-28 11:29:25.425116+00', '2026-11-28 11:29:25.426834+00'),
	('9546ea1e-ae91-5c57-b952-d10e1d4f8244', 'durable.set_event', 2, 1, 1, true, '\x6e756c6c', NULL, '''answered'', ''yes''', '\x7c322a8254db8ed1', NULL, NULL, NULL, false, NULL, false, '2026-11-28 11:29:25.434357+00', '2026-11-28 11:29:25.434357+00'),
	('running', 'tests.fixtures.apps.released.pack', 1, 1, 1, true, '\x30', NULL, '''running'', 0', '\x69e75c2e00f1564c', NULL, NULL, NULL, false, NULL, false, '2026-11-28 11:29:25.480029+00', '2026-11-28 11:29:25.481207+00');

INSERT INTO celery_durable.event VALUES
	('asking', 'asked', '\x5b2261736b696e67225d', NULL, '2026-11-28 11:29:24.235895+00'),
	('cancelled', 'asked', '\x5b2263616e63656c6c6564225d', NULL, '2026-11-28 11:29:24.360043+00'),
	('9546ea1e-ae91-5c57-b952-d10e1d4f8244', 'answered', '\x2279657322', NULL, '2026-11-28 11:29:25.434411+00');

INSERT INTO celery_durable.input VALUES
	('shipped', '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.ship", "id": "shipped", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "shipped", "parent_id": null, "argsrepr": "(''shipped'',)", "kwargsrepr": "{}", "origin": "gen27101@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "shipped", "reply_to": "4cdc0945-4724-3df5-b4d1-04ba876b3bd4"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b2273686970706564225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8'),
	('refused', '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.refuse", "id": "refused", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "refused", "parent_id": null, "argsrepr": "(''refused'',)", "kwargsrepr": "{}", "origin": "gen27101@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "refused", "reply_to": "4cdc0945-4724-3df5-b4d1-04ba876b3bd4"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b2272656675736564225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8'),
	('dropped', '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.drop", "id": "dropped", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "dropped", "parent_id": null, "argsrepr": "(''dropped'',)", "kwargsrepr": "{}", "origin": "gen27101@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "dropped", "reply_to": "4cdc0945-4724-3df5-b4d1-04ba876b3bd4"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b2264726f70706564225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8'),
	('stored', '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.store", "id": "stored", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "stored", "parent_id": null, "argsrepr": "(''stored'',)", "kwargsrepr": "{}", "origin": "gen27101@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "stored", "reply_to": "4cdc0945-4724-3df5-b4d1-04ba876b3bd4"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b2273746f726564225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8'),
	('late', '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.store", "id": "late", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "late", "parent_id": null, "argsrepr": "(''late'',)", "kwargsrepr": "{}", "origin": "gen27101@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}, "durable_timeout": 7200.0}, "properties": {"correlation_id": "late", "reply_to": "4cdc0945-4724-3df5-b4d1-04ba876b3bd4"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b226c617465225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8'),
	('asking', '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.ask", "id": "asking", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "asking", "parent_id": null, "argsrepr": "(''asking'',)", "kwargsrepr": "{}", "origin": "gen27101@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "asking", "reply_to": "4cdc0945-4724-3df5-b4d1-04ba876b3bd4"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b2261736b696e67225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8'),
	('cancelled', '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.ask", "id": "cancelled", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "cancelled", "parent_id": null, "argsrepr": "(''cancelled'',)", "kwargsrepr": "{}", "origin": "gen27101@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "cancelled", "reply_to": "4cdc0945-4724-3df5-b4d1-04ba876b3bd4"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b2263616e63656c6c6564225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8'),
	('checked', '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.check", "id": "checked", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "checked", "parent_id": null, "argsrepr": "(''checked'',)", "kwargsrepr": "{}", "origin": "gen27101@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "checked", "reply_to": "4cdc0945-4724-3df5-b4d1-04ba876b3bd4"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b22636865636b6564225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8'),
	('answering', '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.answer", "id": "answering", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "answering", "parent_id": null, "argsrepr": "(''answering'',)", "kwargsrepr": "{}", "origin": "gen27101@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "answering", "reply_to": "4cdc0945-4724-3df5-b4d1-04ba876b3bd4"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b22616e73776572696e67225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8'),
	('watching', '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.watch", "id": "watching", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "watching", "parent_id": null, "argsrepr": "(''answering'',)", "kwargsrepr": "{}", "origin": "gen27101@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "watching", "reply_to": "4cdc0945-4724-3df5-b4d1-04ba876b3bd4"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b22616e73776572696e67225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8'),
	('0a5b848e-4254-49ae-9ba2-3318645b7b81', '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.refund", "id": "0a5b848e-4254-49ae-9ba2-3318645b7b81", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "0a5b848e-4254-49ae-9ba2-3318645b7b81", "parent_id": null, "argsrepr": "(''cancelled'',)", "kwargsrepr": "{}", "origin": "gen27101@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "0a5b848e-4254-49ae-9ba2-3318645b7b81", "reply_to": "4cdc0945-4724-3df5-b4d1-04ba876b3bd4"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b2263616e63656c6c6564225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8'),
	('convoy', '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.convoy", "id": "convoy", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "convoy", "parent_id": null, "argsrepr": "(''convoy'',)", "kwargsrepr": "{}", "origin": "gen27101@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "convoy", "reply_to": "4cdc0945-4724-3df5-b4d1-04ba876b3bd4"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b22636f6e766f79225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8'),
	('fd3c806e-5d79-5bf2-bec5-bebc5eda5bfc', '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.ship", "id": "fd3c806e-5d79-5bf2-bec5-bebc5eda5bfc", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "convoy", "parent_id": "convoy", "argsrepr": "(''convoy-a'',)", "kwargsrepr": "{}", "origin": "gen27374@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "fd3c806e-5d79-5bf2-bec5-bebc5eda5bfc", "reply_to": "9e7d6e3c-9ff9-34bc-8942-0aa60f4752c6"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b22636f6e766f792d61225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8'),
	('9546ea1e-ae91-5c57-b952-d10e1d4f8244', '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.answer", "id": "9546ea1e-ae91-5c57-b952-d10e1d4f8244", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "convoy", "parent_id": "convoy", "argsrepr": "(''convoy-b'',)", "kwargsrepr": "{}", "origin": "gen27374@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "9546ea1e-ae91-5c57-b952-d10e1d4f8244", "reply_to": "9e7d6e3c-9ff9-34bc-8942-0aa60f4752c6"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b22636f6e766f792d62225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8'),
	('running', '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.ship", "id": "running", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "running", "parent_id": null, "argsrepr": "(''running'',)", "kwargsrepr": "{}", "origin": "gen27101@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "running", "reply_to": "4cdc0945-4724-3df5-b4d1-04ba876b3bd4"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b2272756e6e696e67225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8'),
	('enqueued', '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.ship", "id": "enqueued", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "enqueued", "parent_id": null, "argsrepr": "(''enqueued'',)", "kwargsrepr": "{}", "origin": "gen27101@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "enqueued", "reply_to": "4cdc0945-4724-3df5-b4d1-04ba876b3bd4"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b22656e717565756564225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8'),
	('unwanted', '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.store", "id": "unwanted", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "unwanted", "parent_id": null, "argsrepr": "(''unwanted'',)", "kwargsrepr": "{}", "origin": "gen27101@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "unwanted", "reply_to": "4cdc0945-4724-3df5-b4d1-04ba876b3bd4"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b22756e77616e746564225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8');

INSERT INTO celery_durable.message OVERRIDING SYSTEM VALUE VALUES
	(1, 'asking', 'first', 'key', '\x', NULL, 'durable.recv', true, '2026-11-28 11:29:24.571971+00'),
	(2, 'asking', 'second', 'untold', '\x7b227365636f6e64223a20327d', NULL, NULL, false, '2026-11-28 11:29:25.775234+00');

INSERT INTO celery_durable.migration VALUES
	(1, '2026-11-28 11:29:21.317033+00');

INSERT INTO celery_durable.node VALUES
	('7a4d8ac4-0bc4-4d57-9631-b2f7333e1c87', 'worker1@test', 27293, '2026-11-28 11:29:21.334533+00', '00:00:02', '2026-11-28 11:29:25.05622+00', '2026-11-28 11:29:21.334533+00', '2026-11-28 11:29:24.558254+00', '{answering}', '{"celery": "2026-11-28T11:29:24.572321+00:00"}', false, true);

INSERT INTO celery_durable.on_cancel VALUES
	('asking', '62ade4ee-33e3-4703-988c-43ed98d391cd', 'tests.fixtures.apps.released.refund', 'celery', 10, NULL, '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.refund", "id": "62ade4ee-33e3-4703-988c-43ed98d391cd", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "62ade4ee-33e3-4703-988c-43ed98d391cd", "parent_id": null, "argsrepr": "(''asking'',)", "kwargsrepr": "{}", "origin": "gen27101@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "62ade4ee-33e3-4703-988c-43ed98d391cd", "reply_to": "4cdc0945-4724-3df5-b4d1-04ba876b3bd4"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b2261736b696e67225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8'),
	('cancelled', '0a5b848e-4254-49ae-9ba2-3318645b7b81', 'tests.fixtures.apps.released.refund', 'celery', 10, NULL, '{"headers": {"lang": "py", "task": "tests.fixtures.apps.released.refund", "id": "0a5b848e-4254-49ae-9ba2-3318645b7b81", "shadow": null, "eta": null, "expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": "0a5b848e-4254-49ae-9ba2-3318645b7b81", "parent_id": null, "argsrepr": "(''cancelled'',)", "kwargsrepr": "{}", "origin": "gen27101@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "0a5b848e-4254-49ae-9ba2-3318645b7b81", "reply_to": "4cdc0945-4724-3df5-b4d1-04ba876b3bd4"}, "exchange": "", "routing_key": "celery", "queue": "celery", "compression": null}', '\x5b5b2263616e63656c6c6564225d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c20226572726261636b73223a206e756c6c2c2022636861696e223a206e756c6c2c202263686f7264223a206e756c6c7d5d', 'application/json', 'utf-8');

INSERT INTO celery_durable.output VALUES
	('refused', false, '\x7b2274797065223a20226275696c74696e733a56616c75654572726f72222c20226d657373616765223a20226e6f20637573746f6d7320666f726d222c202274726163656261636b223a202254726163656261636b20286d6f737420726563656e742063616c6c206c617374293a5c6e202046696c65205c222f6170702f63656c6572795f64757261626c652f656e67696e652f72756e6e65722e70795c222c206c696e652033322c20696e2063616c6c5f626f64795c6e2020202076616c7565203d20626f647928295c6e2020202020202020202020205e5e5e5e5e5e5c6e202046696c65205c222f6170702f63656c6572795f64757261626c652f64656c69766572792e70795c222c206c696e65203334382c20696e2063616c6c5c6e2020202076616c7565203d20626f647928295c6e2020202020202020202020205e5e5e5e5e5e5c6e202046696c65205c222f6170702f63656c6572795f64757261626c652f7461736b2e70795c222c206c696e65203137382c20696e203c6c616d6264613e5c6e2020202072657475726e206361737428432c2064656c6976657228696e7374616c6c6174696f6e2c2073656c662c206c616d6264613a2073656c662e746f5f6974735f656e6428626f64792829292c206d61785f637261736865733d73656c662e5f6d61785f63726173686573282929295c6e20202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020202020205e5e5e5e5e5e5c6e202046696c65205c222f6170702f6c69622f707974686f6e332e31312f736974652d7061636b616765732f63656c6572792f6170702f74726163652e70795c222c206c696e65203838332c20696e205f5f70726f7465637465645f63616c6c5f5f5c6e2020202072657475726e2073656c662e72756e282a617267732c202a2a6b7761726773295c6e20202020202020202020205e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5c6e202046696c65205c222f6170702f74657374732f66697874757265732f617070732f72656c65617365642e70795c222c206c696e652036302c20696e207265667573655c6e2020202072616973652056616c75654572726f72285c226e6f20637573746f6d7320666f726d5c22295c6e56616c75654572726f723a206e6f20637573746f6d7320666f726d5c6e222c202261747472696275746573223a207b7d2c20226d656d62657273223a207b7d2c202261726773223a205b226e6f20637573746f6d7320666f726d225d7d', NULL),
	('shipped', true, '\x5b302c20312c20325d', NULL),
	('dropped', false, '\x7b2274797065223a202263656c6572795f64757261626c652e657863657074696f6e733a576f726b666c6f7744656164222c20226d657373616765223a202254686520776f726b666c6f772077617320676976656e2075703a2069747320776f726b65722064696564206d6f7265206f6674656e207468616e206d61785f7265636f766572795f617474656d70747320616c6c6f77732073696e636520697473206c61737420636f6d706c6574656420737465702e222c202274726163656261636b223a202263656c6572795f64757261626c652e657863657074696f6e732e576f726b666c6f77446561643a2054686520776f726b666c6f772077617320676976656e2075703a2069747320776f726b65722064696564206d6f7265206f6674656e207468616e206d61785f7265636f766572795f617474656d70747320616c6c6f77732073696e636520697473206c61737420636f6d706c6574656420737465702e5c6e222c202261747472696275746573223a207b7d2c20226d656d62657273223a207b7d2c202261726773223a205b2254686520776f726b666c6f772077617320676976656e2075703a2069747320776f726b65722064696564206d6f7265206f6674656e207468616e206d61785f7265636f766572795f617474656d70747320616c6c6f77732073696e636520697473206c61737420636f6d706c6574656420737465702e225d7d', NULL),
	('cancelled', false, '\x7b2274797065223a202263656c6572795f64757261626c652e657863657074696f6e733a576f726b666c6f7743616e63656c6c65644572726f72222c20226d657373616765223a202254686520776f726b666c6f77207761732063616e63656c6c65642e222c202274726163656261636b223a202263656c6572795f64757261626c652e657863657074696f6e732e576f726b666c6f7743616e63656c6c65644572726f723a2054686520776f726b666c6f77207761732063616e63656c6c65642e5c6e222c202261747472696275746573223a207b7d2c20226d656d62657273223a207b7d2c202261726773223a205b2254686520776f726b666c6f77207761732063616e63656c6c65642e225d7d', NULL),
	('0a5b848e-4254-49ae-9ba2-3318645b7b81', true, '\x22726566756e64656422', NULL),
	('9546ea1e-ae91-5c57-b952-d10e1d4f8244', true, '\x22616e73776572656422', NULL);

INSERT INTO celery_durable.workflow VALUES
	('refused', 'tests.fixtures.apps.released.refuse', 'celery', 'FAILURE', 1, 'd18ee8b0-948b-413e-ae42-03f18d064363', NULL, '2026-11-28 11:29:22.701364+00', 0, 10, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, true, NULL, NULL, 'refused', NULL, '2026-11-28 11:29:22.596348+00', '2026-11-28 11:29:22.701364+00', '2026-11-28 11:29:22.856708+00'),
	('shipped', 'tests.fixtures.apps.released.ship', 'celery', 'SUCCESS', 1, '75bb3ed8-10b9-48de-8039-af626efde31d', NULL, '2026-11-28 11:29:22.72164+00', 0, 10, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, true, NULL, NULL, 'shipped', NULL, '2026-11-28 11:29:22.440932+00', '2026-11-28 11:29:22.721641+00', '2026-11-28 11:29:22.915403+00'),
	('stored', 'tests.fixtures.apps.released.store', 'celery', 'SUSPENDED', 1, NULL, NULL, '2026-11-28 11:29:23.853002+00', 0, 10, 0, NULL, NULL, '2026-11-28 12:29:24.008682+00', 'sleep', NULL, '{}', NULL, NULL, 0, 0, NULL, NULL, NULL, 'stored', NULL, '2026-11-28 11:29:23.600142+00', '2026-11-28 11:29:23.853002+00', NULL),
	('late', 'tests.fixtures.apps.released.store', 'celery', 'SUSPENDED', 1, NULL, NULL, '2026-11-28 11:29:23.920873+00', 0, 10, 0, '02:00:00', '2026-11-28 13:29:23.920873+00', '2026-11-28 12:29:24.112539+00', 'sleep', NULL, '{}', NULL, NULL, 0, 0, NULL, NULL, NULL, 'late', NULL, '2026-11-28 11:29:23.636992+00', '2026-11-28 11:29:23.920873+00', NULL),
	('checked', 'tests.fixtures.apps.released.check', 'celery', 'SUSPENDED', 1, NULL, NULL, '2026-11-28 11:29:24.402758+00', 0, 10, 0, NULL, NULL, '2026-11-28 12:29:24.471045+00', 'retry of step tests.fixtures.apps.released.weigh', NULL, '{}', NULL, NULL, 0, 0, NULL, NULL, NULL, 'checked', NULL, '2026-11-28 11:29:23.733929+00', '2026-11-28 11:29:24.402758+00', NULL),
	('dropped', 'tests.fixtures.apps.released.drop', 'celery', 'DEAD', 1, NULL, NULL, '2026-11-28 11:29:24.250633+00', 1, 0, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, '2026-11-28 11:29:23.639547+00', 0, 0, true, NULL, NULL, 'dropped', NULL, '2026-11-28 11:29:22.631005+00', '2026-11-28 11:29:22.793011+00', '2026-11-28 11:29:23.561714+00'),
	('answering', 'tests.fixtures.apps.released.answer', 'celery', 'RUNNING', 1, 'fad1576d-7dc4-4655-ae54-d79ea35a27f0', '7a4d8ac4-0bc4-4d57-9631-b2f7333e1c87', '2026-11-28 11:29:24.509347+00', 0, 10, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, NULL, NULL, NULL, 'answering', NULL, '2026-11-28 11:29:23.768817+00', '2026-11-28 11:29:24.509347+00', NULL),
	('watching', 'tests.fixtures.apps.released.watch', 'celery', 'SUSPENDED', 1, NULL, NULL, '2026-11-28 11:29:24.473376+00', 0, 10, 0, NULL, NULL, NULL, 'event answered of answering', 1, '{}', NULL, NULL, 0, 0, NULL, NULL, NULL, 'watching', NULL, '2026-11-28 11:29:23.793897+00', '2026-11-28 11:29:24.473376+00', NULL),
	('asking', 'tests.fixtures.apps.released.ask', 'celery', 'SUSPENDED', 2, NULL, NULL, '2026-11-28 11:29:24.597052+00', 0, 10, 1, NULL, NULL, NULL, 'message second', NULL, '{second}', NULL, NULL, 0, 0, NULL, 'asking', NULL, 'asking', NULL, '2026-11-28 11:29:23.68027+00', '2026-11-28 11:29:24.056343+00', NULL),
	('cancelled', 'tests.fixtures.apps.released.ask', 'celery', 'CANCELLED', 1, NULL, NULL, '2026-11-28 11:29:25.200288+00', 0, 10, 1, NULL, NULL, NULL, 'message first', NULL, NULL, NULL, '2026-11-28 11:29:25.165685+00', 0, 0, true, NULL, NULL, 'cancelled', NULL, '2026-11-28 11:29:23.714285+00', '2026-11-28 11:29:24.31746+00', '2026-11-28 11:29:24.662306+00'),
	('0a5b848e-4254-49ae-9ba2-3318645b7b81', 'tests.fixtures.apps.released.refund', 'celery', 'SUCCESS', 1, 'a12130ad-a639-4392-b958-6dcaa37edc9a', '7a4d8ac4-0bc4-4d57-9631-b2f7333e1c87', '2026-11-28 11:29:25.231423+00', 0, 10, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, false, NULL, 'cancelled', 'cancelled', NULL, '2026-11-28 11:29:24.662438+00', '2026-11-28 11:29:25.231424+00', '2026-11-28 11:29:25.267572+00'),
	('fd3c806e-5d79-5bf2-bec5-bebc5eda5bfc', 'tests.fixtures.apps.released.ship', 'celery', 'RUNNING', 1, 'ef8cdf71-fa0e-4654-be5e-771fab7c6861', '7a4d8ac4-0bc4-4d57-9631-b2f7333e1c87', '2026-11-28 11:29:25.380266+00', 0, 10, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, NULL, NULL, 'convoy', 'convoy', NULL, '2026-11-28 11:29:25.332701+00', '2026-11-28 11:29:25.380267+00', NULL),
	('convoy', 'tests.fixtures.apps.released.convoy', 'celery', 'SUSPENDED', 1, NULL, NULL, '2026-11-28 11:29:25.302517+00', 0, 10, 0, NULL, NULL, NULL, 'workflow fd3c806e-5d79-5bf2-bec5-bebc5eda5bfc', 1, '{}', NULL, NULL, 0, 0, NULL, NULL, NULL, 'convoy', NULL, '2026-11-28 11:29:25.292025+00', '2026-11-28 11:29:25.302518+00', NULL),
	('running', 'tests.fixtures.apps.released.ship', 'celery', 'RUNNING', 1, 'f8b29f71-7548-44e6-8360-a9011a42bf00', '7a4d8ac4-0bc4-4d57-9631-b2f7333e1c87', '2026-11-28 11:29:25.471954+00', 0, 10, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, NULL, NULL, NULL, 'running', NULL, '2026-11-28 11:29:25.448933+00', '2026-11-28 11:29:25.471955+00', NULL),
	('enqueued', 'tests.fixtures.apps.released.ship', 'celery', 'ENQUEUED', 0, NULL, NULL, NULL, 0, 10, 0, NULL, NULL, NULL, NULL, NULL, NULL, '2026-11-28 11:29:26.695504+00', '2026-11-28 11:29:25.695506+00', 0, 0, NULL, NULL, NULL, 'enqueued', NULL, '2026-11-28 11:29:25.695508+00', NULL, NULL),
	('unwanted', 'tests.fixtures.apps.released.store', 'celery', 'ENQUEUED', 0, NULL, NULL, NULL, 0, 10, 0, NULL, NULL, NULL, NULL, NULL, NULL, '2026-11-28 11:29:26.718585+00', '2026-11-28 11:29:25.718587+00', 0, 0, NULL, NULL, NULL, 'unwanted', NULL, '2026-11-28 11:29:25.718588+00', NULL, NULL),
	('9546ea1e-ae91-5c57-b952-d10e1d4f8244', 'tests.fixtures.apps.released.answer', 'celery', 'SUCCESS', 1, 'b5c025e1-4f3c-4047-b048-8aac518b719a', '7a4d8ac4-0bc4-4d57-9631-b2f7333e1c87', '2026-11-28 11:29:25.395205+00', 0, 10, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, false, NULL, 'convoy', 'convoy', NULL, '2026-11-28 11:29:25.363225+00', '2026-11-28 11:29:25.395206+00', '2026-11-28 11:29:25.462495+00');

SELECT pg_catalog.setval('celery_durable.cancellation_seq_seq', 1, true);

SELECT pg_catalog.setval('celery_durable.message_seq_seq', 2, true);

ALTER TABLE ONLY celery_durable.awaiting
    ADD CONSTRAINT awaiting_pkey PRIMARY KEY (target, event, waiter, wait);

ALTER TABLE ONLY celery_durable.cancellation
    ADD CONSTRAINT cancellation_pkey PRIMARY KEY (seq);

ALTER TABLE ONLY celery_durable.checkpoint
    ADD CONSTRAINT checkpoint_pkey PRIMARY KEY (workflow, key);

ALTER TABLE ONLY celery_durable.event
    ADD CONSTRAINT event_pkey PRIMARY KEY (workflow, key);

ALTER TABLE ONLY celery_durable.input
    ADD CONSTRAINT input_pkey PRIMARY KEY (workflow);

ALTER TABLE ONLY celery_durable.message
    ADD CONSTRAINT message_pkey PRIMARY KEY (seq);

ALTER TABLE ONLY celery_durable.message
    ADD CONSTRAINT message_workflow_idempotency_key_key UNIQUE (workflow, idempotency_key);

ALTER TABLE ONLY celery_durable.migration
    ADD CONSTRAINT migration_pkey PRIMARY KEY (number);

ALTER TABLE ONLY celery_durable.node
    ADD CONSTRAINT node_pkey PRIMARY KEY (id);

ALTER TABLE ONLY celery_durable.on_cancel
    ADD CONSTRAINT on_cancel_pkey PRIMARY KEY (workflow);

ALTER TABLE ONLY celery_durable.output
    ADD CONSTRAINT output_pkey PRIMARY KEY (workflow);

ALTER TABLE ONLY celery_durable.workflow
    ADD CONSTRAINT workflow_pkey PRIMARY KEY (id);

CREATE INDEX awaiting_waiter ON celery_durable.awaiting USING btree (waiter, wait);

CREATE INDEX message_untold ON celery_durable.message USING btree (seq) WHERE (NOT told);

CREATE INDEX message_waiting ON celery_durable.message USING btree (workflow, topic, seq) WHERE (taken_by IS NULL);

CREATE UNIQUE INDEX on_cancel_id ON celery_durable.on_cancel USING btree (id);

CREATE INDEX workflow_deadline ON celery_durable.workflow USING btree (deadline) WHERE ((deadline IS NOT NULL) AND (finished_at IS NULL));

CREATE UNIQUE INDEX workflow_deduplication ON celery_durable.workflow USING btree (name, deduplication_id) WHERE ((deduplication_id IS NOT NULL) AND (finished_at IS NULL));

CREATE INDEX workflow_due ON celery_durable.workflow USING btree (publish_at) WHERE (state = 'ENQUEUED'::text);

CREATE INDEX workflow_finished ON celery_durable.workflow USING btree (finished_at) WHERE (finished_at IS NOT NULL);

CREATE INDEX workflow_parent ON celery_durable.workflow USING btree (parent_id) WHERE (parent_id IS NOT NULL);

CREATE INDEX workflow_running ON celery_durable.workflow USING btree (node) WHERE (state = 'RUNNING'::text);

CREATE INDEX workflow_undispatched ON celery_durable.workflow USING btree (id) WHERE (NOT dispatched);

CREATE INDEX workflow_unsent ON celery_durable.workflow USING btree (publish_at) WHERE ((state = 'ENQUEUED'::text) AND (published_at IS NULL));

CREATE INDEX workflow_waking ON celery_durable.workflow USING btree (wake_at) WHERE (state = 'SUSPENDED'::text);
