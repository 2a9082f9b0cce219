"""Faults to be planted, one at a time, and the tests that must notice each.

They break what ``docs/internals/reliability.md`` and ``docs/deploy/security.md`` promise. A fault
is an edit of one place. A change of the code there changes it here: ``test_faults`` insists on it.
"""

from dataclasses import dataclass

_SERVER = "server/redux_server/"
_TESTS = "tests/server/"


@dataclass(frozen=True)
class Fault:
    """``text`` in ``file`` becomes ``spoiled``; one of ``tests`` must fail.

    ``file`` is in the server's package, ``tests`` are pytest's names below ``tests/server``.
    """

    promise: str
    name: str
    file: str
    text: str
    spoiled: str
    tests: tuple[str, ...]

    @property
    def path(self) -> str:
        """The file, from the root of the project."""
        return _SERVER + self.file

    @property
    def node_ids(self) -> list[str]:
        """The tests, from the root of the project."""
        return [_TESTS + test for test in self.tests]


FAULTS = (
    # --- accept -----------------------------------------------------------------------------------
    Fault(
        "accept",
        "idempotency-keys-of-all",
        "tasks/accepting.py",
        "found = known.get((new.key_id, new.idempotency_key)) if new.idempotency_key else None",
        "found = {key: each for (_, key), each in known.items()}.get(new.idempotency_key)",
        ("tasks/test_accepting.py",),
    ),
    Fault(
        "accept",
        "one-task-over-the-bound",
        "tasks/accepting.py",
        "if answer is None and len(rows) >= room:",
        "if answer is None and len(rows) > room:",
        ("tasks/test_accepting.py", "tasks/test_store.py"),
    ),
    Fault(
        "accept",
        "no-bound-on-what-is-stored",
        "tasks/accepting.py",
        "if needed > left else None",
        "if needed > left + 10**12 else None",
        ("tasks/test_stored.py",),
    ),
    Fault(
        "accept",
        "deleted-tasks-still-count",
        "tasks/store.py",
        "freed[row.key_id] -= row.stored_bytes",
        "freed[row.key_id] -= 0",
        ("tasks/test_stored.py",),
    ),
    Fault(
        "accept",
        "idempotency-keys-forgotten",
        "tasks/accepting.py",
        "    if entries:\n        db.execute(insert(idempotency), entries)",
        "    if not entries:\n        db.execute(insert(idempotency), entries)",
        ("tasks/test_accepting.py",),
    ),
    Fault(
        "accept",
        "other-body-same-key",
        "tasks/accepting.py",
        "if digest != new.digest or task is None:",
        "if task is None:",
        ("tasks/test_accepting.py",),
    ),
    # --- claim ------------------------------------------------------------------------------------
    Fault(
        "claim",
        "attempts-not-counted",
        "tasks/claiming.py",
        '"attempt": tasks.c.attempt + 1,',
        '"attempt": tasks.c.attempt,',
        ("tasks/test_store.py",),
    ),
    Fault(
        "claim",
        "busy-keys-first",
        "tasks/claiming.py",
        "        func.coalesce(usage_table.c.seconds, 0.0),\n",
        "        -func.coalesce(usage_table.c.seconds, 0.0),\n",
        ("tasks/test_claiming.py",),
    ),
    Fault(
        "claim",
        "priority-upside-down",
        "tasks/claiming.py",
        "db.scalar(select(func.max(tasks.c.priority)).where(*wanted.ready, *below))",
        "db.scalar(select(func.min(tasks.c.priority)).where(*wanted.ready, *below))",
        ("tasks/test_claiming.py", "tasks/test_store.py"),
    ),
    # --- lease ------------------------------------------------------------------------------------
    Fault(
        "lease",
        "lost-workers-keep-tasks",
        "tasks/store.py",
        "        self._take_back(db, tasks.c.lease_until < now, now)\n",
        "",
        ("tasks/test_store.py",),
    ),
    Fault(
        "lease",
        "renewed-by-anyone",
        "tasks/store.py",
        ".where(tasks.c.owner == owner, IS_LEASED)",
        ".where(IS_LEASED)",
        ("tasks/test_store.py",),
    ),
    Fault(
        "lease",
        "poison-for-ever",
        "tasks/store.py",
        'suspect = {"crashes": tasks.c.crashes + 1, "shape": ""}',
        'suspect = {"crashes": tasks.c.crashes, "shape": ""}',
        ("tasks/test_store.py",),
    ),
    Fault(
        "lease",
        "returned-to-the-end",
        "tasks/store.py",
        'back = {"queued_at": tasks.c.created_at} if delay_s <= 0',
        'back = {"queued_at": now} if delay_s <= 0',
        ("tasks/test_store.py",),
    ),
    # --- finish -----------------------------------------------------------------------------------
    Fault(
        "finish",
        "no-fence",
        "tasks/store.py",
        "is_current = tasks.c.id == task_id, tasks.c.attempt == attempt",
        "is_current = tasks.c.id == task_id, tasks.c.attempt >= 0",
        ("tasks/test_store.py",),
    ),
    Fault(
        "finish",
        "ends-twice",
        "tasks/store.py",
        "is_running = tasks.c.status == Status.PROCESSING",
        "is_running = tasks.c.status != Status.CREATED",
        ("tasks/test_store.py",),
    ),
    Fault(
        "finish",
        "an-end-without-its-webhook",
        "tasks/rows.py",
        "    if messages:\n        db.execute(insert(webhooks), messages)\n",
        "",
        ("webhooks/test_outbox.py",),
    ),
    # --- webhooks ---------------------------------------------------------------------------------
    Fault(
        "webhooks",
        "two-nodes-send-one",
        "webhooks/outbox.py",
        ".where(webhooks.c.task_id == one.task_id, webhooks.c.tries == one.tries)",
        ".where(webhooks.c.task_id == one.task_id)",
        ("webhooks/test_outbox.py",),
    ),
    Fault(
        "webhooks",
        "given-up-at-once",
        "webhooks/outbox.py",
        "if tries >= MAX_TRIES:",
        "if tries >= 1:",
        ("webhooks/test_outbox.py", "webhooks/test_sender.py"),
    ),
    Fault(
        "webhooks",
        "lost-with-their-sender",
        "webhooks/outbox.py",
        ".values(next_at=until, tries=one.tries + 1)",
        ".values(next_at=until + 1e9, tries=one.tries + 1)",
        ("webhooks/test_outbox.py",),
    ),
    Fault(
        "webhooks",
        "body-not-signed",
        "webhooks/delivery.py",
        'message = f"{message_id}.{timestamp}.".encode() + body',
        'message = f"{message_id}.{timestamp}.".encode()',
        ("webhooks/test_delivery.py",),
    ),
    # --- files ------------------------------------------------------------------------------------
    Fault(
        "files",
        "pictures-not-flushed",
        "storage/blobs.py",
        "            _flush(path)\n            path = path.parent",
        "            path = path.parent",
        ("storage/test_blobs.py",),
    ),
    Fault(
        "files",
        "only-the-picture-flushed",
        "storage/blobs.py",
        "        while path != self._folder.parent:",
        "        while path.is_file():",
        ("storage/test_blobs.py",),
    ),
    Fault(
        "files",
        "folder-of-pictures-open",
        "storage/blobs.py",
        "        private_folder(folder)\n",
        "        folder.mkdir(parents=True, exist_ok=True, mode=0o755)\n",
        ("storage/test_blobs.py",),
    ),
    Fault(
        "files",
        "database-open",
        "database/connection.py",
        "    private_file(path)\n",
        "",
        ("test_private_files.py",),
    ),
    Fault(
        "files",
        "links-lead-out",
        "storage/blobs.py",
        "        if not _is_inside(self._folder, key):",
        "        if key is None:",
        ("storage/test_blobs.py",),
    ),
    Fault(
        "files",
        "full-disk-accepts",
        "storage/disk.py",
        "        if free_bytes >= self._floor_bytes:\n",
        "        if free_bytes >= 0:\n",
        ("storage/test_disk.py",),
    ),
    # --- signing ----------------------------------------------------------------------------------
    Fault(
        "signing",
        "urls-never-end",
        "storage/signing.py",
        '        if int(match["exp"]) < self._clock():\n',
        '        if int(match["exp"]) < 0:\n',
        ("storage/test_signing.py",),
    ),
    Fault(
        "signing",
        "one-signature-for-all-files",
        "storage/signing.py",
        'return self._digest(f"{expiry}/{key}")',
        'return self._digest(f"{expiry}/")',
        ("storage/test_signing.py",),
    ),
    Fault(
        "signing",
        "longer-by-editing-the-url",
        "storage/signing.py",
        'return self._digest(f"{expiry}/{key}")',
        'return self._digest(f"/{key}")',
        ("storage/test_signing.py",),
    ),
    # --- keys -------------------------------------------------------------------------------------
    Fault(
        "keys",
        "revoked-keys-pass",
        "api/auth.py",
        "            keys.c.digest == digest, keys.c.revoked_at.is_(None)\n",
        "            keys.c.digest == digest\n",
        ("api/test_auth.py",),
    ),
    Fault(
        "keys",
        "streams-of-revoked-keys-go-on",
        "api/following.py",
        "                subscription.revoke()",
        "                pass",
        ("api/test_following.py",),
    ),
    Fault(
        "keys",
        "tasks-of-others",
        "api/dependencies.py",
        "if task is None or task.key_id != request.state.key_id:",
        "if task is None:",
        ("api/routes/test_predictions.py",),
    ),
    # --- confinement ------------------------------------------------------------------------------
    Fault(
        "confinement",
        "no-filter",
        "pictures/decode_child.py",
        "    return confinement.confine()",
        '    return ""',
        ("pictures/test_confinement.py",),
    ),
    Fault(
        "confinement",
        "code-in-data",
        "pictures/confinement.py",
        "(_IF_ANY_BIT, 1, 0, _PROT_EXEC),",
        "(_IF_ANY_BIT, 0, 0, _PROT_EXEC),",
        ("pictures/test_confinement.py",),
    ),
    Fault(
        "confinement",
        "processes-like-threads",
        "pictures/confinement.py",
        "        (_IF_EQUAL, 0, 1, _THREAD_FLAGS[1]),\n",
        "        (_IF_EQUAL, 0, 0, _THREAD_FLAGS[1]),\n",
        ("pictures/test_confinement.py",),
    ),
    Fault(
        "confinement",
        "descriptors-to-spare",
        "pictures/decode_child.py",
        "limits.append((resource.RLIMIT_NOFILE, 0, 0))",
        "limits.append((resource.RLIMIT_NOFILE, 3, 3))",
        ("pictures/test_confinement.py",),
    ),
    Fault(
        "confinement",
        "killed-means-damaged",
        "pictures/decode.py",
        "        if status in _KILLED:",
        "        if status is True:",
        ("pictures/test_decode.py::test_a_decoder_that_was_killed_is_started_again",),
    ),
    Fault(
        "confinement",
        "memory-without-bound",
        "pictures/memory_budget.py",
        "self._waiting[0] is turn and self._free_bytes >= wanted",
        "self._waiting[0] is turn",
        ("pictures/test_memory_budget.py",),
    ),
    # --- addresses --------------------------------------------------------------------------------
    Fault(
        "addresses",
        "every-port-of-an-allowed-host",
        "net/guard.py",
        "return not self.ports or port in self.ports",
        "return True",
        ("net/test_guard.py",),
    ),
    Fault(
        "addresses",
        "own-public-address",
        "net/guard.py",
        "return is_global and not self.is_own(address)",
        "return is_global",
        ("net/test_guard.py",),
    ),
)
