#!/bin/sh
# pip, inside a build: with the pip.conf and the CA bundle that the build was given as secrets, if it was.
#   docker build --secret id=pip,src=pip.conf --secret id=ca,src=ca.pem …
[ ! -f /run/secrets/pip ] || export PIP_CONFIG_FILE=/run/secrets/pip
[ ! -f /run/secrets/ca ] || export PIP_CERT=/run/secrets/ca
exec /opt/build/bin/pip --no-cache-dir --disable-pip-version-check "$@"
