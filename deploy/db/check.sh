#!/bin/sh
# The health check of the container `db`. It logs in as the service does, over the network and with the password,
# because PostgreSQL takes POSTGRES_PASSWORD only when it makes the volume: a later change in .env does not reach it.
# (A server that sets up a new volume listens on its socket only, so it is not healthy before that is done.)
pg_isready --quiet --host=db --username="$POSTGRES_USER" --dbname="$POSTGRES_DB" || exit 1
export PGPASSWORD="$POSTGRES_PASSWORD"
psql --quiet --no-psqlrc --host=db --username="$POSTGRES_USER" --dbname="$POSTGRES_DB" --command='SELECT' > /dev/null && exit
# Over the socket no password is needed. This line goes to the log of the database.
psql --quiet --no-psqlrc --username="$POSTGRES_USER" --dbname="$POSTGRES_DB" --file=/deploy/say.sql
exit 1
