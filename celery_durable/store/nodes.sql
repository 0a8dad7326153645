-- name: beat
-- Say that this node lives, and with which workflows; a gap of half a lease ends its time as a witness.
-- Returns the database's time, the drain flag, and whether this node is the one that sweeps.
INSERT INTO {schema}.node AS mine
    (id, hostname, pid, started_at, lease, seen, unbroken, as_of, active, accepted, draining, able)
VALUES (%(id)s, %(hostname)s, %(pid)s, clock_timestamp(), make_interval(secs => %(lease)s), clock_timestamp(),
        clock_timestamp(), coalesce(%(as_of)s::timestamptz, '-infinity'), %(active)s::text[], %(accepted)s::jsonb, %(draining)s, %(able)s)
ON CONFLICT (id) DO UPDATE
SET seen = excluded.seen,
    unbroken = CASE WHEN excluded.seen - mine.seen > mine.lease / 2 THEN excluded.seen ELSE mine.unbroken END,
    as_of = excluded.as_of,
    active = excluded.active,
    accepted = excluded.accepted,
    draining = mine.draining OR excluded.draining,
    able = excluded.able
RETURNING seen, draining,
    coalesce(id = (SELECT n.id FROM {schema}.node n
                   WHERE n.able AND NOT n.draining AND n.seen > clock_timestamp() - n.lease
                   ORDER BY n.started_at, n.id LIMIT 1), true) AS elected

-- name: swept
-- A sweep has ended; of each kind of sweeper the last one is kept.
INSERT INTO {schema}.sweep (sweeper, worker, at, found)
VALUES (%(sweeper)s, (SELECT n.hostname FROM {schema}.node n WHERE n.id = %(node)s), clock_timestamp(), %(found)s::jsonb)
ON CONFLICT (sweeper) DO UPDATE SET worker = excluded.worker, at = excluded.at, found = excluded.found

-- name: leave
-- Remove a node that stops, unless something still runs under its name: then it is found to be silent.
DELETE FROM {schema}.node WHERE id = %(id)s
AND NOT EXISTS (SELECT FROM {schema}.workflow w WHERE w.state = 'RUNNING' AND w.node = %(id)s)

-- name: forget
-- Remove nodes that fell silent long ago and own nothing any more.
DELETE FROM {schema}.node n WHERE n.seen < clock_timestamp() - greatest(n.lease * 10, interval '1 hour')
AND NOT EXISTS (SELECT FROM {schema}.workflow w WHERE w.state = 'RUNNING' AND w.node = n.id)
AND NOT EXISTS (SELECT FROM {schema}.workflow w WHERE NOT w.dispatched AND w.node = n.id)
