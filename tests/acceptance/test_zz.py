from tests.acceptance.test_async import *
import time
@pytest.mark.parametrize("kind", ["async_order", "gathered_order"])
@pytest.mark.parametrize("pool", ["solo", "prefork", "threads", "gevent"])
def test_cold(site, pool, kind):
    worker = site.workers.start(pool=pool, env=POOLS[pool])
    site.gates.close("a-1", "a-4", "a-3")
    h = getattr(site.shop, kind).delay("a")
    site.reaches("work", "a", 1)
    site.reaches("work", "a", 4 if kind == "async_order" else 3)
    t = time.time()
    worker.stop("cold")
    try:
        code = worker.wait_exit(40)
    except AssertionError:
        code = "stuck"
    print(pool, kind, "exit", code, "after", time.time() - t)
    other = site.workers.start(pool=pool, env=POOLS[pool])
    site.gates.open("a-1", "a-4", "a-3")
    st = site.finished(h.id)
    print(st, site.work_of("a", 5))
    assert 0
