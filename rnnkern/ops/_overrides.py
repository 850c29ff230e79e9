"""What a thread has set for the calls it makes: a forced backend and engine, the notes that `explain` collects."""

import threading
from typing import Any

_thread = threading.local()
count = 0  # threads that are inside `backend` or `explain`: the common call looks no further
_lock = threading.Lock()


class Override:
    """Sets an attribute of this thread while it lasts."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def __enter__(self) -> None:
        global count
        self.before = getattr(_thread, self.name, None)
        setattr(_thread, self.name, self.value)
        with _lock:
            count += 1

    def __exit__(self, *_: object) -> None:
        global count
        setattr(_thread, self.name, self.before)
        with _lock:
            count -= 1


def get(name: str) -> Any:
    """What this thread has set, or None."""
    return getattr(_thread, name, None) if count else None
