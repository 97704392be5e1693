#!/bin/sh
# Last step inside mmdebstrap: "$1" is the guest's root, everything is installed in it. What a guest of the lab has no
# use for goes, because every page it would touch at boot travels later.
set -eu
root=$1
chroot "$root" systemctl -q enable haulier-workload.service
chroot "$root" passwd -q -d root
chroot "$root" passwd -q -l root
rm -f "$root"/etc/ssh/ssh_host_* "$root/etc/hostname"
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id" "$root/etc/apt/apt.conf.d/99mmdebstrap"
rm -f "$root/usr/lib/udev/hwdb.bin" "$root/etc/udev/hwdb.bin"
rm -rf "$root"/usr/lib/udev/hwdb.d/* "$root"/var/log/*.log "$root"/var/log/apt/* "$root"/var/cache/debconf/*-old
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/cache/ldconfig
for kind in vmlinuz initrd.img; do
  newest=$(cd "$root/boot" && ls -v "$kind"-* | tail -n 1)
  ln -sf "$newest" "$root/boot/$kind"
done
# So that nothing takes the first boot for one after an update.
touch "$root/etc/.updated" "$root/var/.updated"
