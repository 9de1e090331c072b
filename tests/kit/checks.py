"""The checks of test_bus.py in a test's own process: four at a time, as each mostly waits and knows of no other.

But those of the search: it waits half a second for its index, which all messages of the others go through.
"""
import os
from concurrent.futures import ThreadPoolExecutor

import test_bus
from tests.kit.processes import PATIENCE

CHECKS = {check.__doc__.split()[0]: check for name, check in vars(test_bus).items() if name.startswith("test_")}
# Those that send hundreds of messages, or start programs, are left out where the same is checked of many buses. Every
# run of test_bus.py has them, and so has that with ALONE=1.
HEAVY = set() if "ALONE" in os.environ else {"5.10", "7.4", "9.6", "9.22"}


def possible(bus, without=()):
    """The checks that can be made of this test_bus.Bus, but those with these numbers."""
    light = [check for number, check in CHECKS.items() if number not in without]
    return [check for check in light if not test_bus.reason_to_skip(check, bus)]


def make(bus, checks):
    """Make these checks; an error if one of them fails."""
    searching = [check for check in checks if test_bus.extension_of(check) is test_bus.SEARCH]
    with ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(check, bus) for check in checks if check not in searching]:
            result.result(9 * PATIENCE)  # those before it in the pool take their time, too
    for check in searching:
        check(bus)
