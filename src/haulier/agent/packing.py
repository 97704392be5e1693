"""Bodies of calls between sites, deflated against what most of them have in common: both sites know it.

It only makes messages smaller: any body can be packed so. Both sites need the same `_USUAL`; who changes it gives
`ENCODING` another name.
"""

from __future__ import annotations

import zlib
from typing import Final

from haulier.errors import Corrupt

ENCODING: Final = "haulier-1"
"""As Content-Encoding and Accept-Encoding: raw deflate that begins as if `_USUAL` had been said before."""

# What is said most comes last: distances to it are short. Flags as /proc/cpuinfo of x86 and Arm names them.
_USUAL: Final = (
    b"asimd asimddp asimdfhm asimdhp asimdrdm atomics bf16 cpuid crc32 dcpodp dcpop dgh dit evtstrm fcma flagm "
    b"fphp frint i8mm ilrcpc jscvt lrcpc paca pacg pmull sb sha1 sha2 sha3 sha512 sm3 sm4 ssbs sve sve2 "
    b"svebf16 svei8mm uscat 3dnowprefetch abm acpi adx aes aperfmperf apic arat arch_capabilities arch_perfmon "
    b"art avx avx2 avx512_bf16 avx512_bitalg avx512_fp16 avx512_vbmi2 avx512_vnni avx512_vp2intersect "
    b"avx512_vpopcntdq avx512bw avx512cd avx512dq avx512f avx512ifma avx512vbmi avx512vl avx_vnni bmi1 bmi2 "
    b"bts cat_l2 cat_l3 cdp_l3 clflush clflushopt clwb clzero cmov cmp_legacy constant_tsc cpb cpuid "
    b"cpuid_fault cqm cqm_llc cr8_legacy cx16 cx8 dca de decodeassists ds_cpl dtes64 dtherm dts enqcmd epb ept "
    b"erms est extapic extd_apicid f16c flexpriority flush_l1d flushbyasid fma fpu fsgsbase fsrm fxsr fxsr_opt "
    b"gfni hle ht hw_pstate hwp hypervisor ibpb ibrs ibrs_enhanced ibs ida intel_pt invpcid lahf_lm lbrv lm "
    b"mba mca mce md_clear misalignsse mmx mmxext monitor movbe movdir64b movdiri msr mtrr mwaitx nonstop_tsc "
    b"nopl npt nrip_save nx osvw overflow_recov pae pat pcid pclmulqdq pdcm pdpe1gb perfctr_core pge pku ospke "
    b"pln pni popcnt pse pse36 pts rdpid rdrand rdseed rdt_a rdtscp rep_good rtm sdbg sep serialize sev sha_ni "
    b"skinit smap smep smca ssbd ss sse sse2 sse4_1 sse4_2 sse4a ssse3 stibp succor svm syscall tm tm2 topoext "
    b"tpr_shadow tsc tsc_adjust tsc_deadline_timer tsc_known_freq tsx umip vaes vgif vme vmmcall vmx vnmi "
    b"vpclmulqdq vpid waitpkg wbnoinvd wdt x2apic xgetbv1 xsave xsavec xsaveerptr xsaveopt xsaves xtopology "
    b'xtpr", "vdso": "{"port": 40000, "bulk": ["10.0.0.1"], "manifest": true, "golden": false, "memory_base": '
    b'"", "complete": true, "images": [], "qemu": "", "accelerator": "", "site_address": "", "same_vdso": '
    b'true}{"messages": [["took", 2]]}{"guest": "", "event": "token", "epoch": 2, "handoff": "h"}{"handoff": '
    b'"h", "source": "", "spec": {"name": "", "uuid": "", "image": "", "golden": "", "memory_mib": 512, '
    b'"vcpus": 1, "disk_size": 10737418240, "mac": "52:54:00:", "address": "10.0.0.10/24", "gateway": '
    b'"10.0.0.1", "address6": "", "gateway6": "", "machine": "pc-q35-8.2", "cpu": "Nehalem-v1", "vmgenid": "", '
    b'"free_page_hint": false, "net": "hook", "site_address": "", "container": {"layers": [], "command": '
    b'["python3", "-u", "/bin/sh", "-c", ""], "env": '
    b'["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "cwd": "/", "uid": 0, "gid": 0, '
    b'"lxc": []}}, "epoch": 2, "secret": "", "manifest": "", "disk_bytes": 0, "memory_bases": ["golden:", ""], '
    b'"images": ["", ""], "golden": true, "qemu": "", "accelerator": "kvm", "host": {"kernel": "6.1.0-", '
    b'"criu": "4.2", "runc": "1.1.5", "cpu": "", "vdso": ""}, "options": {"downtime_ms": 300, "check": false, '
    b'"deadline_s": 0.0, "level": 0, "stall_s": 60.0, "allow": [], "keep_fresh_s": 0.0, "disk": "full", '
    b'"transport": "striping", "join": "ahead", "paths": "deadline"}}'
)


def pack(data: bytes) -> bytes:
    """`data`, smaller for what it has in common with other calls."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zdict=_USUAL)
    return deflater.compress(data) + deflater.flush()


def unpack(data: bytes, most: int) -> bytes:
    """What `pack` was given; Corrupt if it is no such thing, or more than `most` bytes."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS, zdict=_USUAL)
    try:
        plain = inflater.decompress(data, most)
    except zlib.error as error:
        raise Corrupt(f"a packed call makes no sense ({error}): run the same haulier at both sites") from None
    if not inflater.eof or inflater.unused_data:
        raise Corrupt(
            f"a packed call is cut short, or holds more than {most} bytes: run the same haulier at both sites"
        )
    return plain
