#!/bin/sh
# Debian 12's smallest system as a tar archive on standard output, with this machine's package sources. Usage: bookworm.sh FOLDER
# Ends with 75 (EX_TEMPFAIL) if what debootstrap needs cannot be downloaded, else with its exit code.
set -e
root=$1/root
mirror=$(awk '/^URIs:/ {print $2; exit}' /etc/apt/sources.list.d/*.sources)
LC_ALL=C debootstrap --variant=minbase bookworm "$root" "$mirror" >"$1/debootstrap.log" 2>&1 || {
  code=$?
  grep -Eq "^E: (Failed getting release|Couldn't download)" "$1/debootstrap.log" && exit 75
  exit $code
}
rm -f "$root"/etc/apt/sources.list
cp /etc/apt/sources.list.d/*.sources "$root/etc/apt/sources.list.d/"
cp /usr/share/keyrings/debian-archive-keyring.* "$root/usr/share/keyrings/"
grep -l Acquire:: /etc/apt/apt.conf.d/* | xargs -r cp -t "$root/etc/apt/apt.conf.d/"
printf 'Dir::Cache::pkgcache "";\nDir::Cache::srcpkgcache "";\n' > "$root/etc/apt/apt.conf.d/docker-clean"
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/doc "$root"/usr/share/man "$root"/usr/share/locale
tar -C "$root" -c .
rm -rf "$root"
