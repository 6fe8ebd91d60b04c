"""The database engine and its transactions. SQLite in WAL mode by default, PostgreSQL by URL."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Compiled, Engine, PoolProxiedConnection, Select, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

AnySelect = Select[*tuple[Any, ...]]


def utc_now() -> datetime:
    """Now, in UTC with its zone."""
    return datetime.now(UTC)


def make_engine(url: str, *, pooled: bool = True) -> Engine:
    """An engine for `url`; SQLite gets WAL, full durability, foreign keys and a patient lock.

    With `pooled=False` no connection outlives its transaction. Processes that fork need that: SQLite's locks do not
    survive a fork, and a child that believes to hold them can damage the file.
    """
    pool: dict[str, Any] = {"pool_size": 10, "max_overflow": 20} if pooled else {"poolclass": NullPool}
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=pooled, **pool)
    engine = create_engine(url, connect_args={"timeout": 30, "check_same_thread": False}, **pool)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        # Python's driver would open transactions on its own, as DEFERRED; see `_begin`.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")  # an answered 2xx survives a power cut
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA busy_timeout=30000")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        # A deferred transaction that later writes can fail at once with "database is locked";
        # transactions that say so take the write lock first and wait for it instead.
        options = connection.get_execution_options()
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("unseen_write", False) else "BEGIN DEFERRED")

    return engine


class Database:
    """Hands out short transactions: `with db.write() as session` commits at the end, `with db.read()` never does."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._read = sessionmaker(engine, expire_on_commit=False)
        self._write = sessionmaker(engine.execution_options(unseen_write=True), expire_on_commit=False)
        self._compiled: dict[AnySelect, Compiled] = {}
        self._of_the_loop: PoolProxiedConnection | None = None

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction that may write; commits on success, rolls back on any error."""
        with self._write() as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """One consistent view; nothing is committed."""
        with self._read() as session:
            yield session

    async def first(self, query: AnySelect, **values: Any) -> tuple[Any, ...] | None:
        """The only row of a query for text and numbers with `values` bound, as committed now; for hot paths.

        The driver alone runs it: what SQLAlchemy does around a query costs fifty times what SQLite needs for one. That
        is asked on the event loop, since its readers never wait for a writer (WAL); other databases in a thread.
        """
        if query not in self._compiled:
            self._compiled[query] = query.compile(self.engine)
        compiled = self._compiled[query]
        sql, by_name = str(compiled), dict(compiled.construct_params(values) or {})
        names = getattr(compiled, "positiontup", None)  # where the driver takes values by position
        bound: Any = by_name if names is None else [by_name[name] for name in names]
        try:
            if self.engine.dialect.name != "sqlite":
                return await asyncio.to_thread(self._pooled_row, sql, bound)
            return self._kept_row(sql, bound)
        except self.engine.dialect.loaded_dbapi.Error as error:  # as SQLAlchemy would raise it
            raise DBAPIError.instance(sql, bound, error, type(error), dialect=self.engine.dialect) from error

    def _pooled_row(self, sql: str, bound: Any) -> tuple[Any, ...] | None:
        with closing(self.engine.raw_connection()) as connection:
            return _row(connection, sql, bound)

    def _kept_row(self, sql: str, bound: Any) -> tuple[Any, ...] | None:
        if self._of_the_loop is None:
            self._of_the_loop = self.engine.raw_connection()
        try:
            return _row(self._of_the_loop, sql, bound)
        except Exception:
            self._of_the_loop.invalidate()  # it may never work again
            self._of_the_loop = None
            raise

    def close(self) -> None:
        """Closes every pooled connection."""
        if self._of_the_loop is not None:
            self._of_the_loop.close()
        self.engine.dispose()


def _row(connection: PoolProxiedConnection, sql: str, bound: Any) -> tuple[Any, ...] | None:
    with closing(connection.cursor()) as cursor:
        cursor.execute(sql, bound)
        rows = cursor.fetchall()
    return rows[0] if rows else None
