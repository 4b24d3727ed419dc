"""What somebody else wrote: read within bounds, so that nothing in it exhausts this process or leads to the network."""

import contextlib
import json
import os
import resource
from pathlib import Path

from huggingface_hub import constants as hub_constants

from harness.errors import UserError


def read_json(path, max_bytes):
    """Returns the value in a JSON file. Raises UserError where it cannot be read, is no JSON, or is too large."""
    try:
        if not os.path.isfile(path):  # a FIFO would be waited for
            raise UserError(f"{path} is not a file")
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > max_bytes:
        raise UserError(f"{path} is larger than {max_bytes / 2**20:g} MiB")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):  # bytes that are not UTF-8, too many digits, too deeply nested
        raise UserError(f"{path} is not JSON") from None


@contextlib.contextmanager
def limited_memory(max_bytes):
    """Lets this process take `max_bytes` more of address space while it lasts, and gets a MemoryError beyond that."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([*limits, pages * resource.getpagesize() + max_bytes]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def without_hub():
    """Makes every request to the hub, by whatever library, an OfflineModeIsEnabled of huggingface_hub's.

    What a hub id in a model's files would fetch is not the model's own.
    """
    before = hub_constants.HF_HUB_OFFLINE
    hub_constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub_constants.HF_HUB_OFFLINE = before
