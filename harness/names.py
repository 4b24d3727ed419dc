"""Names of files that are made from a model's name: two models never share one."""

import hashlib
import re


def file_stem(name):
    """Returns a file name's stem for a model's name, a hub id or a directory's path; other names give other stems.

    The hub allows no "--" in a name, so that "--" can stand for the slash of "owner/name", as in the hub's own cache.
    """
    if re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name) and "--" not in name:
        return name.replace("/", "--")
    readable = re.sub(r"[^\w.-]+", "_", name).strip("_.")[-60:]
    return f"{readable}--{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]}"
