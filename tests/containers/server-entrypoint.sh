#!/bin/sh
# What the official images' entry points do, as far as compose.yaml relies on it.
set -eu
case $1 in
  postgres) user=postgres data=$PGDATA ;;
  redis-server) user=redis data=/data ;;
  *) exec "$@" ;;
esac
if [ "$(id -u)" = 0 ]; then
  mkdir -p "$data"
  chown "$user" "$data" /run/postgresql 2>/dev/null || chown "$user" "$data"
  [ "$user" = redis ] || chmod 0700 "$data"
  exec gosu "$user" "$0" "$@"
fi
if [ "$1" = postgres ] && [ ! -s "$PGDATA/PG_VERSION" ]; then
  initdb -D "$PGDATA" -U "$POSTGRES_USER" --pwfile="$POSTGRES_PASSWORD_FILE" --auth-local=trust --auth-host=scram-sha-256 -E UTF8
  echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
  pg_ctl -D "$PGDATA" -w -o "-c listen_addresses=" start
  createdb -U "$POSTGRES_USER" "$POSTGRES_DB"
  pg_ctl -D "$PGDATA" -m fast -w stop
fi
[ "$1" != postgres ] || set -- "$@" -c listen_addresses='*'
exec "$@"
