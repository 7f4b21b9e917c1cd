"""The seed rule against MD5 values taken by hand, and its independence of torch."""

import subprocess
import sys

from domainbed.seeding import seed_hash


def test_seed_is_the_low_31_bits_of_the_md5_of_the_printed_tuple():
    # printf "(0, 'lr')" | md5sum  ->  the last eight hex digits, the top bit cleared
    digest = subprocess.run(["md5sum"], input=b"(0, 'lr')", capture_output=True, check=True).stdout.split()[0]
    assert seed_hash(0, "lr") == int(digest[-8:], 16) & 0x7FFFFFFF


def test_one_value_is_hashed_as_a_tuple():
    digest = subprocess.run(["md5sum"], input=b"(3,)", capture_output=True, check=True).stdout.split()[0]
    assert seed_hash(3) == int(digest[-8:], 16) & 0x7FFFFFFF


def test_seed_and_console_do_not_import_torch():
    code = (
        "import sys, domainbed.seeding, domainbed.console; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
