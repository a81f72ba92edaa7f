#!/usr/bin/env bash
# Makes stand-ins for public images out of Debian's packages, on a machine that can reach those but no registry of images.
#
#   docker/base.sh python:3.11-slim-bookworm redis:7.4-bookworm prom/prometheus:v3.5.0
#
# Each gets the name given, with what Debian 12 has: Python 3.11, Redis 7.0, Prometheus 2.42. It needs root, debootstrap and an engine;
# DOCKER names the client, DEBIAN_MIRROR a mirror other than debootstrap's own. Nothing of this machine is copied into an image.
set -euo pipefail

docker=${DOCKER:-docker}
label="org.adrank.stand-in"

python_image() { # a Debian with Python, as python:slim is
  local root
  root=$(mktemp -d)
  # shellcheck disable=SC2064  # the folder's name as it is now
  trap "rm -rf '$root'" EXIT
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv bookworm "$root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
  ln -s python3 "$root/usr/bin/python"
  rm -rf "$root"/usr/lib/python3*/EXTERNALLY-MANAGED "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,locale,man}/*
  tar --create --directory "$root" --exclude ./proc/* --exclude ./sys/* . |
    "$docker" import --change 'CMD ["python3"]' --change "LABEL $label=debian-python" - "$1"
}

package_image() { # NAME PARENT PACKAGE COMMANDS: one of Debian's packages over the image with Python, set up by further lines
  printf 'FROM %s\nRUN apt-get update && apt-get install -y --no-install-recommends %s && rm -rf /var/lib/apt/lists/*\n%s\nLABEL %s=debian-%s\n' \
    "$2" "$3" "$4" "$label" "$3" | DOCKER_BUILDKIT=1 "$docker" build --tag "$1" -
}

parent=""
for name in "$@"; do
  case $name in
    python:*) python_image "$name" && parent=$name ;;
    redis:*) package_image "$name" "${parent:?name a python image first}" redis-server \
      $'RUN install -d -o 999 -g 999 /data\nWORKDIR /data\nUSER 999:999\nCMD ["redis-server"]' ;;
    prom/prometheus:*) package_image "$name" "${parent:?name a python image first}" prometheus \
      $'RUN install -d -o 65534 -g 65534 /prometheus\nWORKDIR /prometheus\nUSER 65534:65534\nENTRYPOINT ["/bin/prometheus"]' ;;
    *) echo "docker/base.sh: no recipe for $name" >&2 && exit 2 ;;
  esac
done
