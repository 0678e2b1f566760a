"""Payment records for the fraud class: no two alike, 60 to 120 model tokens, the same for the same random stream.

These are machine-made records, as a payment service would send them, not questions that somebody typed.
"""

from __future__ import annotations

import numpy as np

COUNTRIES = ("DE", "FR", "NL", "PL", "ES", "IT", "AT", "SE", "RO", "US", "BR", "VN")
DEVICES = ("known phone", "known laptop", "new phone", "new laptop", "emulator", "tablet seen once")


def payment(rng: np.random.Generator, products: list[str], number: int) -> str:
    """One record in words."""
    card, ship, ip = (COUNTRIES[int(i)] for i in rng.integers(0, len(COUNTRIES), 3))
    if rng.random() < 0.7:  # most payments are what they seem
        ship = ip = card
    chosen = rng.integers(0, len(products), int(rng.integers(1, 3)))
    items = ", ".join(f"{products[int(i)]} x{int(rng.integers(1, 4))}" for i in chosen)
    parts = [
        f"Payment {480_000 + number}: {rng.integers(5, 900)}.{rng.integers(0, 100):02d} EUR for {items}.",
        f"Card from {card}, shipped to {ship}, address seen at {ip}.",
        f"Account {rng.integers(0, 2000)} days old, {rng.integers(0, 7)} orders in the last hour,",
        f"{rng.integers(0, 3)} chargebacks, device: {DEVICES[int(rng.integers(0, len(DEVICES)))]}.",
        f"CVV {'matches' if rng.random() < 0.9 else 'wrong once'},",
        f"3-D Secure {'passed' if rng.random() < 0.75 else 'not offered'}.",
    ]
    return " ".join(parts)
