#!/usr/bin/env bash
# Tests the installation with another release of Debian and its Python, as a new user without rights: in a
# folder made by debootstrap, clones the last commit, installs, answers once and runs the tests.
# outputs/debian/SUITE keeps that system and the environment for the next call; remove it to start from
# nothing. Needs root and the Debian package debootstrap. Packages come from the first mirror of this
# machine's apt, or from DEBIAN_MIRROR=URL, and from its pip's index. Arguments go to pytest.
#   bash scripts/test_debian.sh [SUITE [ARGUMENT ...]]     SUITE trixie: Debian 13, Python 3.13
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/common.sh"
suite=${1:-trixie}
shift $(($# > 0))
system=$root/outputs/debian/$suite
checkout=/home/user/nextgpt

# All of it runs in namespaces: with this process end all others and their mounts.
if [ -z "${IN_NAMESPACES:-}" ]; then
    [ "$EUID" = 0 ] && command -v debootstrap >/dev/null ||
        fail "root and debootstrap are needed: apt install debootstrap"
    IN_NAMESPACES=1 setpriv --pdeathsig KILL \
        unshare --mount --pid --fork --kill-child bash "$0" "$suite" "$@"
    exit
fi

step() { printf '\n== %s (%d s) ==\n' "$1" $SECONDS; }
mirror() { # nothing where apt has none of Debian's
    apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' 'Label: Debian' 2>/dev/null | sed -n 1p || true
}
in_checkout() { # commands, run by the user with this machine's access to the network
    local access
    mapfile -t access < <(env | grep -iE '^((https?|no)_proxy|pip_(cert|index_url|default_timeout))=')
    chroot --userspec=user:user "$system" env --ignore-environment "${access[@]}" LANG=C.UTF-8 \
        PATH=/usr/local/bin:/usr/bin:/bin HOME=/home/user bash -euc 'cd "$0"; eval "$1"' $checkout "$1"
}

step "Debian $suite"
if [ ! -d "$system" ]; then
    url=${DEBIAN_MIRROR:-$(mirror)}
    rm -rf --one-file-system "$system.partial"
    debootstrap --variant=minbase --include=ca-certificates,git,python3-venv \
        "$suite" "$system.partial" "${url:-http://deb.debian.org/debian}"
    chroot "$system.partial" useradd --create-home user
    mv "$system.partial" "$system"
fi
for path in /etc/hosts /etc/resolv.conf /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
    if [ -f $path ]; then cp $path "$system$path"; fi
done
mount -t proc proc "$system/proc"
mount --rbind /dev "$system/dev"
mount --rbind /sys "$system/sys"
mount -t tmpfs tmpfs "$system/dev/shm"

step "clone"
clone=$system$checkout.new
rm -rf "$clone"
git clone --quiet --depth 1 "file://$root" "$clone"
if [ -d "$system$checkout/.venv" ]; then mv "$system$checkout/.venv" "$clone"; fi
rm -rf "${system:?}$checkout"
mv "$clone" "$system$checkout"
chroot "$system" chown --recursive user:user $checkout

step "installation"
in_checkout "bash scripts/install.sh"
in_checkout ".venv/bin/python --version; .venv/bin/pip freeze" >"$system.versions.txt"
step "answer"
in_checkout ".venv/bin/python inference.py --prompt 'Describe it and let me hear it.' \
    --image code/mini_world/demo_examples/mini_example_image_000001.png --out outputs/flute"
step "tests"
in_checkout "bash scripts/test.sh ${*@Q}"
step "done"
