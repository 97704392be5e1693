# Makes a restored clone its own machine. Run by haulier inside the guest, as root, by /bin/sh, from standard input.
# Before it come assignments of: entropy_hex name machine_id now ssh_key ssh_pub mac address gateway address6 gateway6
# ("" = leave alone). Each step says on stderr what went wrong and the rest goes on; the exit code counts the failures.
# Builtins are preferred to programs: under TCG on a busy host, starting one takes a good part of a second.
# The order matters: randomness first, so that nothing that is derived below comes from the state shared by all clones.

PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH
umask 022
failures=0

fail() {
    echo "$1" >&2
    failures=$((failures + 1))
}

# RNDADDENTROPY credits the bytes, RNDRESEEDCRNG makes the generator use them at once.
perl_reseed='
    my $seed = pack "H*", <STDIN>;
    open my $dev, ">", "/dev/random" or die "open: $!\n";
    ioctl $dev, 0x40085203, pack("ii", 8 * length $seed, length $seed) . $seed or die "RNDADDENTROPY: $!\n";
    ioctl $dev, 0x5207, 0 or die "RNDRESEEDCRNG: $!\n";
'
python_reseed='
import fcntl, struct, sys
seed = bytes.fromhex(sys.stdin.read().strip())
with open("/dev/random", "wb") as dev:
    fcntl.ioctl(dev, 0x40085203, struct.pack("ii", 8 * len(seed), len(seed)) + seed)
    fcntl.ioctl(dev, 0x5207, 0)
'
reseed() {
    if command -v perl >/dev/null; then
        printf %s "$entropy_hex" | perl -e "$perl_reseed"
    elif command -v python3 >/dev/null; then
        printf %s "$entropy_hex" | python3 -I -c "$python_reseed"
    else
        echo "neither perl nor python3 is there" >&2
        return 1
    fi
}
reseed || fail "randomness was not renewed"

# The seed that the next boot starts from must not be the shared one either.
for seed in /var/lib/systemd/random-seed /var/lib/urandom/random-seed; do
    if [ -e "$seed" ]; then
        head -c 512 /dev/urandom >"$seed" || fail "$seed was not renewed"
    fi
done

if [ -n "$now" ]; then
    date -u -s "@$now" >/dev/null || fail "the clock was not set"
fi

if [ -n "$name" ]; then
    printf '%s\n' "$name" >/etc/hostname || fail "/etc/hostname was not written"
    printf '%s\n' "$name" >/proc/sys/kernel/hostname || fail "the host name was not set"
    kept=''
    while [ -r /etc/hosts ] && IFS= read -r line; do
        case $line in
        127.0.1.1[[:space:]]*) ;;
        *) kept="$kept$line
" ;;
        esac
    done </etc/hosts
    printf '%s127.0.1.1\t%s\n' "$kept" "$name" >/etc/hosts || fail "/etc/hosts was not written"
fi

if [ -n "$machine_id" ]; then
    printf '%s\n' "$machine_id" >/etc/machine-id || fail "/etc/machine-id was not written"
    if [ -e /var/lib/dbus/machine-id ] && [ ! -L /var/lib/dbus/machine-id ]; then
        printf '%s\n' "$machine_id" >/var/lib/dbus/machine-id || fail "the machine id of D-Bus was not written"
    fi
fi

if [ -n "$ssh_key" ] && [ -d /etc/ssh ]; then
    rm -f /etc/ssh/ssh_host_*
    (umask 077 && printf '%s\n' "$ssh_key" >/etc/ssh/ssh_host_ed25519_key) || fail "the SSH host key was not written"
    printf '%s\n' "$ssh_pub" >/etc/ssh/ssh_host_ed25519_key.pub
    if [ -e /run/sshd.pid ] && command -v systemctl >/dev/null; then
        systemctl try-restart --no-block ssh.service sshd.service 2>/dev/null
    fi
fi

interface_of() {
    nic=''
    for entry in /sys/class/net/*; do
        if read -r found <"$entry/address" && [ "$found" = "$1" ]; then
            nic=${entry##*/}
            return 0
        fi
    done 2>/dev/null
    return 1
}

# Calls a function with each address that there is, its gateway or "", and its family: inet or inet6.
each_address() {
    for pair in "$address $gateway" "$address6 $gateway6"; do
        case $pair in
        ' '*) ;;
        *:*) "$1" "${pair%% *}" "${pair#* }" inet6 || return 1 ;;
        *) "$1" "${pair%% *}" "${pair#* }" inet || return 1 ;;
        esac
    done
}

stanza() {
    printf 'iface %s %s static\n    address %s\n' "$nic" "$3" "$1"
    [ -z "$2" ] || printf '    gateway %s\n' "$2"
}

unit() {
    printf 'Address=%s\n' "$1"
    [ -z "$2" ] || printf 'Gateway=%s\n' "$2"
}

profile() {
    version=ipv4
    [ "$3" = inet ] || version=ipv6
    nmcli connection modify haulier $version.method manual $version.addresses "$1" \
        ${2:+$version.gateway "$2"} >/dev/null
}

line() {
    case $3 in
    inet) echo "address add $1 broadcast + dev $nic" ;;
    # Nobody else has it: it is of use at once.
    *) echo "address add $1 dev $nic nodad" ;;
    esac
    [ -z "$2" ] || echo "route replace default via $2 dev $nic"
}

# For the next boots, in the words of whatever sets the network up in this image. What runs now is set below.
keep_address() {
    units=/etc/systemd/system/multi-user.target.wants
    networkd=/lib/systemd/system/systemd-networkd.service
    if [ ! -e $units/systemd-networkd.service ] && command -v ifup >/dev/null; then
        mkdir -p /etc/network/interfaces.d
        {
            printf 'auto %s\n' "$nic"
            each_address stanza
        } >/etc/network/interfaces.d/haulier
    elif [ ! -e $units/systemd-networkd.service ] && command -v nmcli >/dev/null; then
        nmcli connection add type ethernet con-name haulier mac "$mac" ipv4.method disabled >/dev/null &&
            each_address profile
    elif [ -e $networkd ]; then
        mkdir -p /etc/systemd/network $units
        {
            printf '[Match]\nMACAddress=%s\n\n[Network]\n' "$mac"
            each_address unit
        } >/etc/systemd/network/10-haulier.network
        # Not started now: one daemon less, and the same address either way.
        [ -e $units/systemd-networkd.service ] || ln -s $networkd $units/systemd-networkd.service
    else
        echo "nothing known here sets the network up at boot: the address is for this run only" >&2
    fi
}

if [ -n "$mac" ]; then
    # The NIC was plugged in a moment ago and its driver may still be looking at it.
    tries=0
    while ! interface_of "$mac" && [ $tries -lt 300 ]; do
        sleep 0.1
        tries=$((tries + 1))
    done
    if [ -z "$nic" ]; then
        fail "no network interface has the MAC $mac"
    elif [ -n "$address" ]; then
        keep_address || fail "the network settings were not written"
        {
            echo "link set $nic up"
            echo "address flush dev $nic scope global"
            each_address line
        } | ip -batch - || fail "$nic did not take the address $address${address6:+ or $address6} and its gateway"
    fi
fi

# The image's own part: programs that hold secrets or seeds of their own in memory are renewed here.
for hook in /etc/haulier/clone.d/*; do
    if [ -x "$hook" ]; then
        "$hook" </dev/null || fail "$hook failed"
    fi
done

sync
[ $failures -lt 100 ] || failures=100
exit $failures
