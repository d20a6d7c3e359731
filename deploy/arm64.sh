#!/usr/bin/env bash
# An aarch64 Linux without a board, in .arm64 (ignored by git): qemu's user mode, Debian's own arm64 packages, wheels
# for aarch64. `make arm64` runs this and then the tests that need it; a second call finds it done.
set -euo pipefail
cd "$(dirname "$0")/.."
place=$PWD/.arm64
python=${PYTHON:-.venv/bin/python}
# Another version of anything, or another recipe, is another machine.
wanted=$(cat deploy/arm64.sh constraints.txt | sha256sum)
[ "$(cat "$place/done" 2>/dev/null)" = "$wanted" ] && exit 0

fail() { echo "error: $1" >&2; echo "hint: $2" >&2; exit 1; }
command -v apt-get >/dev/null || fail "apt-get is missing: the sysroot is made of Debian's packages" "use a Debian or Ubuntu"
if ! command -v qemu-aarch64-static >/dev/null; then
  [ "$(id -u)" = 0 ] || fail "qemu-aarch64-static is missing" "sudo apt-get install qemu-user-static"
  apt-get -o APT::Sandbox::User=root update -qq && apt-get install -y -qq --no-install-recommends qemu-user-static >/dev/null
fi

# Where this Debian has its own packages from.
mirror=${DEBIAN_MIRROR:-$(. /etc/os-release
  [ "$ID" != debian ] || apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Identifier: Packages' |
    awk -v main="$VERSION_CODENAME main" '$1 " " $2 == main && !found++ {print $3}')}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -n "$mirror" ] || fail "apt names no mirror of Debian here" "name one: DEBIAN_MIRROR=http://… make arm64"
[ -f "$keyring" ] || fail "$keyring is missing" "sudo apt-get install debian-archive-keyring"

rm -rf "$place"
mkdir -p "$place"/apt/{state/lists/partial,cache/archives/partial} "$place"/sysroot "$place"/site
: >"$place/apt/status"
echo "deb [arch=arm64 signed-by=$keyring] $mirror bookworm main" >"$place/apt/sources.list"
apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Sandbox::User=root
  -o Dir::Etc::SourceList="$place/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
  -o Dir::State="$place/apt/state" -o Dir::State::status="$place/apt/status" -o Dir::Cache="$place/apt/cache")
echo "fetching Debian's arm64 packages"
"${apt[@]}" update
"${apt[@]}" install -y --no-install-recommends --download-only python3.11 libstdc++6 libgomp1 >/dev/null
for package in "$place"/apt/cache/archives/*.deb; do dpkg -x "$package" "$place/sysroot"; done
# onnxruntime from 1.29 on ends without the processor's parts: those of an Orin's Cortex-A78AE.
mkdir -p "$place/sysroot/proc"
for core in 0 1 2 3; do
  printf 'processor\t: %s\nBogoMIPS\t: 62.50\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd42\nCPU revision\t: 1\n\n' "$core"
done >"$place/sysroot/proc/cpuinfo"

echo "fetching wheels for aarch64"
platforms=(--platform manylinux2014_aarch64)
# Bookworm's glibc is 2.36.
for minor in $(seq 17 36); do platforms+=(--platform "manylinux_2_${minor}_aarch64"); done
"$python" -m pip install -q --disable-pip-version-check --no-compile --target "$place/site" -c constraints.txt \
  "${platforms[@]}" --implementation cp --python-version 3.11 --only-binary=:all: \
  onnxruntime numpy pydantic tokenizers jinja2 llguidance typer rich
echo "$wanted" >"$place/done"
