"""Loaded by every Python process that has this folder on its path: other dates, planted bugs.

``CHAOS_CLOCK_FILE`` names a file with the seconds to add to ``time.time``. ``CHAOS_HANG_FILE``
names one that makes the next step on a device hang for good, once it is there. ``CHAOS_BUG`` names
a bug to plant in the server, which the checker of histories must then find.
"""

import contextlib
import dataclasses
import os
import sys
import threading
import time
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

_LOOK_EVERY_S = 0.5


def shift_clock(path):
    """Have ``time.time`` follow the file. Not the date of other libraries: nothing here uses it."""
    true, steady = time.time, time.monotonic
    seen = [0.0, -1.0]

    def shifted():
        if steady() - seen[1] > _LOOK_EVERY_S:
            seen[1] = steady()
            with open(path) as file:
                seen[0] = float(file.read() or 0)
        return true() + seen[0]

    time.time = shifted


def hang_steps(path):
    """Let whichever step of the fake model finds the file take it away, and never end."""
    sleep = time.sleep

    def hanging(seconds):
        if threading.current_thread().name.startswith("device"):
            with contextlib.suppress(OSError):
                os.unlink(path)
                while True:
                    sleep(3600)
        sleep(seconds)

    time.sleep = hanging


def no_fence(store):
    """The store believes whoever comes last, and tells no worker that it lost a task."""

    def finish(self, task_id, attempt, outcome, **_):
        values = {"status": outcome.status, "outcome": dataclasses.asdict(outcome)}
        ended = {"queued_at": None, "lease_until": None, "finished_at": self._clock()}
        with self._database.begin() as db:
            row = store.tasks.c.id == task_id
            db.execute(store.update(store.tasks).where(row).values(**values, **ended))
        return True

    renew = store.TaskStore.renew

    def believe(self, owner, held):
        return store.Lease(lost=frozenset(), cancelled=renew(self, owner, held).cancelled)

    store.TaskStore.finish = finish
    store.TaskStore.renew = believe


def no_reconciler(store):
    """A dead worker's tasks stay with it for good: nobody reconciles."""
    store.TaskStore._take_back = lambda *_, **__: 0


def killed_means_damaged(decode):
    """A decoding process that was killed says that its picture is damaged."""
    decode._KILLED = ()


def no_watchdog(watchdog):
    """A device that hangs is waited for, for ever."""
    watchdog.Watchdog.keep = lambda *_, **__: None


def full_means_failed(outputs):
    """An image that finds no room fails its task."""

    def put_or_fail(self, key, data, *, check_wanted):
        check_wanted()
        try:
            self._blobs.put(key, data)
        except OSError as error:
            raise RuntimeError("no room") from error

    outputs.RetryingStore.put = put_or_fail


class Planter(MetaPathFinder):
    """Plants ``bug`` in the module ``name`` of the server once that is loaded."""

    def __init__(self, name, bug):
        self.name = f"redux_server.{name}"
        self.bug = bug

    def find_spec(self, name, path=None, target=None):
        """Import machinery's entry."""
        if name != self.name:
            return None
        spec = PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def load_and_plant(module):
            load(module)
            self.bug(module)

        spec.loader.exec_module = load_and_plant
        return spec


BUGS = {
    "no-fence": ("tasks.store", no_fence),
    "no-reconciler": ("tasks.store", no_reconciler),
    "killed-means-damaged": ("pictures.decode", killed_means_damaged),
    "no-watchdog": ("worker.watchdog", no_watchdog),
    "full-means-failed": ("worker.outputs", full_means_failed),
}

if "CHAOS_CLOCK_FILE" in os.environ:
    shift_clock(os.environ["CHAOS_CLOCK_FILE"])
if "CHAOS_HANG_FILE" in os.environ:
    hang_steps(os.environ["CHAOS_HANG_FILE"])
if "CHAOS_BUG" in os.environ:
    sys.meta_path.insert(0, Planter(*BUGS[os.environ["CHAOS_BUG"]]))
