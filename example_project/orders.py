"""Start orders by hand: `python -m example_project.orders order-1 order-2`. Twice the same order is one.

With `--export Iceland` they are sold abroad, and a cancelled one is undone.
"""

from __future__ import annotations

import argparse

from example_project.tasks import export, fulfil, undo_export

parser = argparse.ArgumentParser(prog="python -m example_project.orders", description=__doc__)
parser.add_argument("orders", nargs="+", metavar="order")
parser.add_argument("--export", metavar="COUNTRY", dest="country")
options = parser.parse_args()

for order_id in options.orders:
    if options.country is None:
        fulfil.apply_async((order_id,), task_id=order_id)
    else:
        export.apply_async((order_id, options.country), task_id=order_id, on_cancel=undo_export.s(order_id))
    print(order_id)
