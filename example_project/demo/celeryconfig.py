"""Settings for the demo: everything is noticed sooner than one would want it in production."""

durable_heartbeat_interval = 0.5
durable_lease = 2
durable_recovery_interval = 0.5
durable_republish_after = 2

# Few orders in the workers' memory, most in the broker: so that flushing it hurts.
worker_prefetch_multiplier = 1
