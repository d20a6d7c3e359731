#!/bin/sh
# Installs what lies beside this script; no network is needed.
#   sudo ./install.sh                     into /opt/stillhouse, with a systemd service
#   PREFIX=~/stillhouse ./install.sh --no-service
# PYTHON names the interpreter, HOST and PORT what the service listens on, SERVICE_USER who it runs as.
set -eu
PREFIX=${PREFIX:-/opt/stillhouse}
case $PREFIX in /*) ;; *) PREFIX=$PWD/$PREFIX ;; esac
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"

fail() { echo "error: $1" >&2; echo "hint: $2" >&2; exit 1; }

# Before anything of the bundle is read.
command -v sha256sum >/dev/null || fail "sha256sum is missing" "install coreutils"
damaged=$(LC_ALL=C sha256sum --check --quiet --strict SHA256SUMS 2>/dev/null) || {
  damaged=${damaged%%: FAILED*}  # the first of them
  fail "this bundle is damaged: ${damaged:-SHA256SUMS}" "copy it here again"
}
. ./bundle.conf

PYTHON=${PYTHON:-python$PYTHON_VERSION}
HOST=${HOST:-127.0.0.1}
PORT=${PORT:-9000}
SERVICE_USER=${SERVICE_USER:-stillhouse}
service=yes
[ "${1:-}" = --no-service ] && service=no

command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON" "name another: PYTHON=python3 ./install.sh"
found=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$found" = "$PYTHON_VERSION" ] ||
  fail "$PYTHON is Python $found, the wheels are for $PYTHON_VERSION" "make the bundle with --python $found"
machine=$("$PYTHON" -c 'import platform; print(platform.machine())')
[ "$machine" = "$MACHINE" ] || fail "this is $machine, the wheels are for $MACHINE" "make a bundle for this machine"
mkdir -p "$PREFIX" 2>/dev/null && [ -w "$PREFIX" ] ||
  fail "$PREFIX cannot be written" "run it with sudo, or name another place: PREFIX=~/stillhouse ./install.sh"

# Each bundle's environment has a folder of its own: one that serves goes on until the new one is whole.
venv=$PREFIX/venvs/$(sha256sum SHA256SUMS | cut -c 1-12)
if [ ! -e "$venv/whole" ]; then
  echo "making $venv"
  "$PYTHON" -m venv --without-pip --clear $VENV_OPTIONS "$venv"
  set -- wheels/pip-*.whl
  # pip runs out of its own wheel: the device's Python needs neither pip nor ensurepip.
  "$venv/bin/python" "$1/pip" install --quiet --no-index --find-links wheels --disable-pip-version-check \
    "stillhouse[$EXTRAS]==$STILLHOUSE_VERSION" $FURTHER_WHEELS
  sync
  touch "$venv/whole"
fi
ln -sfn "$venv" "$PREFIX/venv.new"
mv -T "$PREFIX/venv.new" "$PREFIX/venv"

echo "installing $MODEL version $VERSION"
"$PREFIX/venv/bin/stillhouse" edge pull "$here/model/$MODEL/$VERSION" --repository "$PREFIX/model_repository"

sed -e "s|@PREFIX@|$PREFIX|g" -e "s|@MODEL@|$MODEL|g" -e "s|@HOST@|$HOST|g" -e "s|@PORT@|$PORT|g" \
  -e "s|@USER@|$SERVICE_USER|g" stillhouse.service >"$PREFIX/stillhouse.service"
if [ "$service" = yes ] && [ "$(id -u)" = 0 ] && [ -d /run/systemd/system ]; then
  id "$SERVICE_USER" >/dev/null 2>&1 || useradd --system --home-dir "$PREFIX" --shell /usr/sbin/nologin "$SERVICE_USER"
  for group in video render; do
    ! getent group "$group" >/dev/null || usermod --append --groups "$group" "$SERVICE_USER"
  done
  chown -R "$SERVICE_USER:" "$PREFIX/model_repository"
  cp "$PREFIX/stillhouse.service" /etc/systemd/system/stillhouse.service
  systemctl daemon-reload
  systemctl enable --quiet --now stillhouse.service
  systemctl restart stillhouse.service
  echo "stillhouse.service serves http://$HOST:$PORT; its log: journalctl -u stillhouse"
else
  echo "installed: $PREFIX/venv/bin/stillhouse edge serve $PREFIX/model_repository/$MODEL"
  echo "a unit for systemd is $PREFIX/stillhouse.service"
fi
for other in "$PREFIX"/venvs/*; do
  [ "$other" = "$venv" ] || rm -rf "$other"
done
