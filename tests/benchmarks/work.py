"""Work for other processes, in a module that imports next to nothing."""

from __future__ import annotations

import os
import time
from typing import Any


def work(item: str, lock: Any) -> str:
    if item == "die":
        os._exit(3)
    if item == "raise":
        raise ValueError("a reason")
    if item == "sleep":
        time.sleep(120)
    if item.startswith("hold"):
        with lock:
            begin = time.time()
            time.sleep(0.1)
            return f"{begin} {time.time()}"
    with lock, lock:
        return f"{item} done"
