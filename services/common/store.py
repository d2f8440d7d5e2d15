"""What persists, in one SQLite file: API keys, and secrets that the gateways of a deployment share.

Any number of processes may have it open. SQLAlchemy takes a quarter of a second to import: modules
that start a process import this one only when they need it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    String,
    Table,
    create_engine,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.schema import CreateTable

from core.errors import NotFound, Unavailable
from services.common.data_folder import open_private
from services.common.keys import ApiKey, KeyLimits

# How long one process waits for another's transaction, of which none takes more than milliseconds.
_LOCK_TIMEOUT_S = 5.0
_SALT_SECRET = "prefix cache salt"
_SECRET_BYTES = 32

_TABLES = MetaData()
_KEYS = Table(
    "api_keys",
    _TABLES,
    Column("key_id", String, primary_key=True),
    Column("tenant", String, nullable=False),
    Column("secret_hash", LargeBinary, nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("models", JSON, nullable=False),
    Column("limits", JSON, nullable=False),
    Column("created_at_s", Float, nullable=False),
    Column("expires_at_s", Float),
    Column("revoked_at_s", Float),
)
_SECRETS = Table(
    "secrets",
    _TABLES,
    Column("name", String, primary_key=True),
    Column("value", LargeBinary, nullable=False),
)
# One row: the format of the file, and the number of changes of keys since it was made.
_STATE = Table(
    "state",
    _TABLES,
    Column("format", Integer, primary_key=True),
    Column("revision", Integer, nullable=False),
)
_FORMAT = 1
_ONE_CHANGE = update(_STATE).values(revision=_STATE.c.revision + 1)


class Store:
    """The store of one deployment; methods may be called from any thread, and block.

    All raise Unavailable where the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        """Creates the file, for its owner only, where there is none."""
        self._path = path
        with self._translated():
            # Closing any descriptor of the file would drop the locks that SQLite holds on it.
            if not path.exists():
                os.close(open_private(path, os.O_RDWR))
            self._engine = create_engine(
                f"sqlite:///{path}", connect_args={"timeout": _LOCK_TIMEOUT_S}
            )
            with self._engine.begin() as connection:
                for table in _TABLES.sorted_tables:  # another process may do so at the same time
                    connection.execute(CreateTable(table, if_not_exists=True))
                self._check_format(connection)

    def close(self) -> None:
        self._engine.dispose()

    # --- keys

    def add_key(self, key: ApiKey) -> None:
        with self._transaction() as connection:
            connection.execute(_KEYS.insert().values(_row_of(key)))
            connection.execute(_ONE_CHANGE)

    def revision(self) -> int:
        """Changes whenever a key has changed; costs far less than `all_keys`."""
        with self._transaction() as connection:
            return int(connection.execute(select(_STATE.c.revision)).scalar_one())

    def all_keys(self) -> list[ApiKey]:
        """All that were ever made, the oldest first."""
        with self._transaction() as connection:
            return [_key_of(row) for row in connection.execute(_oldest_first())]

    def revoke_key(self, key_id: str, *, now_s: float) -> ApiKey:
        """Ends a key for good, and returns it; raises NotFound. Idempotent."""
        with self._transaction() as connection:
            is_it = _KEYS.c.key_id == key_id
            is_live = _KEYS.c.revoked_at_s.is_(None)
            connection.execute(update(_KEYS).where(is_it, is_live).values(revoked_at_s=now_s))
            connection.execute(_ONE_CHANGE)
            row = connection.execute(select(_KEYS).where(is_it)).one_or_none()
        if row is None:
            raise NotFound(f"there is no key {key_id!r}: `penstock keys list` shows all")
        return _key_of(row)

    # --- secrets

    def salt_secret(self) -> bytes:
        """What the salts of tenants are made with: the same for all gateways of the store."""
        fresh = secrets.token_bytes(_SECRET_BYTES)
        row = insert(_SECRETS).values(name=_SALT_SECRET, value=fresh).on_conflict_do_nothing()
        with self._transaction() as connection:
            connection.execute(row)
            found = select(_SECRETS.c.value).where(_SECRETS.c.name == _SALT_SECRET)
            return bytes(connection.execute(found).scalar_one())

    # --- the file

    def _check_format(self, connection: Connection) -> None:
        first = insert(_STATE).values(format=_FORMAT, revision=0)
        found = connection.execute(select(_STATE.c.format)).scalar_one_or_none()
        if found is None:
            connection.execute(first.on_conflict_do_nothing())
        elif found != _FORMAT:
            raise Unavailable(f"{self._path} has format {found}; this program reads {_FORMAT}")

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with self._translated(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            why = getattr(error, "orig", None) or error
            raise Unavailable(f"the store {self._path} cannot be used: {why}") from error


def _oldest_first() -> Any:
    return select(_KEYS).order_by(_KEYS.c.created_at_s, _KEYS.c.key_id)


def _row_of(key: ApiKey) -> dict[str, Any]:
    sets = {"scopes": sorted(key.scopes), "models": sorted(key.models)}
    return vars(key) | sets | {"limits": vars(key.limits)}


def _key_of(row: Row[Any]) -> ApiKey:
    fields = row._asdict()
    sets = {name: frozenset(fields[name]) for name in ("scopes", "models")}
    return ApiKey(**fields | sets | {"limits": KeyLimits(**fields["limits"])})
