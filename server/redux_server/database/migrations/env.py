"""What alembic runs to apply revisions: on the connection, and in the transaction, it was given."""

from alembic import context

from redux_server.database.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite's DDL is transactional too, if redux_server.database.connection begins transactions.
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
