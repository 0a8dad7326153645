"""A task as many Celery apps have one: three things must happen for an order. The README makes it durable."""

import json
import os
from urllib.request import Request, urlopen

from celery import Celery

app = Celery("shop", broker="redis://localhost:6379/0")


@app.task(acks_late=True)
def fulfil(order_id):
    reserve_stock(order_id)
    payment = charge(order_id)
    notify(order_id, payment)
    return payment


def reserve_stock(order_id):
    post("reservations", order=order_id)


def charge(order_id):
    return post("charges", order=order_id)["id"]


def notify(order_id, payment):
    post("mails", order=order_id, payment=payment)


def post(what, **body):
    headers = {"Content-Type": "application/json"}
    request = Request(f"{os.environ['BACKOFFICE_URL']}/{what}", json.dumps(body).encode(), headers)
    with urlopen(request, timeout=30) as response:
        return json.load(response)
