#!/usr/bin/env bash
# Stand-ins for the official images of Debian, Python, PostgreSQL and Redis, made from Debian's packages of this machine's
# own mirror: for machines that reach no image registry. Needs root, podman and debootstrap; takes some minutes.
set -euo pipefail
cd "$(dirname "$0")"
release=bookworm
mirror=$(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' | awk -v release="$release" '$1 == release { print $2; exit }')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

make_image() { # IMAGE PACKAGES [podman import's options]
  local image=$1 packages=$2
  shift 2
  podman image exists "$image" && return
  echo "making $image from Debian's packages ..."
  debootstrap --variant=minbase --include="$packages" "$release" "$work/root" "$mirror" >"$work/log" || { tail "$work/log" "$work/root/debootstrap/debootstrap.log"; exit 1; }
  rm -rf "$work/root"/var/cache/apt/archives/*.deb "$work/root"/var/lib/apt/lists/* \
    "$work/root"/usr/share/{doc,man} "$work/root"/var/lib/postgresql/*/main
  cp /etc/ssl/certs/ca-certificates.crt "$work/root/etc/ssl/certs/" # with this machine's own authorities
  install -m 0755 server-entrypoint.sh "$work/root/usr/local/bin/"
  tar -C "$work/root" -c . | podman import "$@" - "$image" >/dev/null
  rm -rf "$work/root"
}

make_image localhost/python:3.11-bookworm ca-certificates,python3,python3-venv,netbase,tzdata
make_image localhost/debian:bookworm ca-certificates,netbase,tzdata # with this machine's own mirror for apt
make_image localhost/postgres:15-bookworm ca-certificates,postgresql-15,gosu,netbase,tzdata \
  --change 'ENV PG_MAJOR=15' --change 'ENV PATH=/usr/lib/postgresql/15/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
  --change 'ENTRYPOINT ["server-entrypoint.sh"]' --change 'CMD ["postgres"]' --change 'STOPSIGNAL SIGINT'
make_image localhost/redis:7-bookworm ca-certificates,redis-server,gosu,netbase,tzdata \
  --change 'ENTRYPOINT ["server-entrypoint.sh"]' --change 'CMD ["redis-server"]'
