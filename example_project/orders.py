"""Start orders by hand: `python -m example_project.orders order-1 order-2`. Twice the same order is one."""

from __future__ import annotations

import sys

from example_project.tasks import fulfil

for order_id in sys.argv[1:]:
    fulfil.apply_async((order_id,), task_id=order_id)
    print(order_id)
