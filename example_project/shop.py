"""What the shop does in the world. Each call has its effect: nothing here knows of Celery, or of crashes.

A line in the journal stands for the systems of the warehouse, the carrier and the mail: it shows each time
that something was done, also what was done twice. Payments are a real HTTP service, invoices are real files.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

HOME = Path(os.environ.get("SHOP_HOME", "shop"))
PAYMENTS_URL = os.environ.get("PAYMENTS_URL", "http://localhost:8700")
WORK = 0.25
"""Seconds that the warehouse, the carrier and the mail take for an answer."""
APPROVAL_ABOVE = 5000
"""Cents. An order of more needs somebody's approval."""
FORMS_FOR = {"Chile", "Iceland", "Japan"}
"""Countries for which there is a customs form."""


class PaymentUnavailable(Exception):
    """The provider didn't do it, or didn't say. Call again, with the same idempotency key."""


class PaymentDeclined(Exception):
    """The provider said no. Calling again won't help."""


class CustomsRefused(Exception):
    """The parcel can't go there."""


def price(order_id: str) -> int:
    """Cents."""
    return 1000 + zlib.crc32(order_id.encode()) % 9000


def reserve_stock(order_id: str) -> None:
    journal("reserve_stock", order_id)
    time.sleep(WORK)


def release_stock(order_id: str) -> None:
    """Put back what is reserved for the order, if anything is."""
    journal("release_stock", order_id)
    time.sleep(WORK)


def charge(order_id: str, idempotency_key: str | None = None) -> str:
    """Charge the customer and return the payment's id.

    Raises PaymentUnavailable or PaymentDeclined. Called twice, it charges twice, unless the key is the same.
    """
    journal("charge", order_id)
    payment: str = ask_provider("charges", {"order": order_id, "cents": price(order_id)}, idempotency_key)["id"]
    return payment


def refund(order_id: str) -> None:
    """Give back what the order has cost so far, and nothing if that is nothing: it may be called twice.

    Raises PaymentUnavailable or PaymentDeclined.
    """
    journal("refund", order_id)
    ask_provider("refunds", {"order": order_id})


def ask_provider(what: str, body: dict[str, Any], idempotency_key: str | None = None) -> Any:
    """Return the payment provider's answer; raise PaymentUnavailable or PaymentDeclined."""
    headers = {"Content-Type": "application/json"}
    request = Request(f"{PAYMENTS_URL}/{what}", json.dumps(body).encode(), headers, method="POST")
    if idempotency_key is not None:
        request.add_header("Idempotency-Key", idempotency_key)
    try:
        with urlopen(request, timeout=30) as response:
            return json.load(response)
    except HTTPError as error:
        with error:
            if error.code < 500:
                raise PaymentDeclined(f"{body['order']}: {error.read().decode()}") from error
            raise PaymentUnavailable(f"{body['order']}: the provider answered {error.code}") from error
    except (URLError, HTTPException, ConnectionError) as error:
        raise PaymentUnavailable(f"{body['order']}: {error}") from error


def book_shipment(order_id: str) -> str:
    """Order a parcel from the carrier and return its number."""
    journal("book_shipment", order_id)
    time.sleep(WORK)
    return f"parcel-{zlib.crc32(order_id.encode()):08x}"


def cancel_shipment(order_id: str) -> None:
    """Tell the carrier that there won't be a parcel, if one is booked."""
    journal("cancel_shipment", order_id)
    time.sleep(WORK)


def declare(order_id: str, country: str) -> None:
    """Hand in the customs form; the answer comes days later. Raises CustomsRefused if there is no form."""
    journal("declare", order_id, country)
    if country not in FORMS_FOR:
        raise CustomsRefused(f"{order_id}: nobody delivers to {country}")


def pack(order_id: str, parcel: int) -> str:
    """Pack one parcel of an order and return its number."""
    journal("pack", order_id, str(parcel))
    time.sleep(WORK)
    return f"parcel-{zlib.crc32(order_id.encode()):08x}-{parcel}"


def write_invoice(order_id: str, payment: str) -> str:
    """Write the invoice and return its path. Whole or not at all, and the same when written twice."""
    journal("write_invoice", order_id)
    path = HOME / "invoices" / f"{order_id}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(f"Order   {order_id}\nPaid    {price(order_id) / 100:.2f}\nPayment {payment}\n")
    draft.replace(path)
    return str(path)


def notify(order_id: str, shipment: str) -> None:
    journal("notify", order_id, shipment)
    time.sleep(WORK)


def mail(order_id: str, text: str) -> None:
    journal("mail", order_id, text)
    time.sleep(WORK)


def journal(what: str, order_id: str, note: str | None = None) -> None:
    """Append one line, whole, from any number of processes at once."""
    entry = {"at": time.time(), "what": what, "order": order_id, "note": note}
    entry |= {"process": os.getpid(), "worker": os.getppid()}
    HOME.mkdir(parents=True, exist_ok=True)
    file = os.open(HOME / "journal.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, json.dumps(entry).encode() + b"\n")
    finally:
        os.close(file)
